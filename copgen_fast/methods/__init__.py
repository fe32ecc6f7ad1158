"""What pretraining minimises."""

from copgen_fast.methods._nt_xent import nt_xent

__all__ = ["nt_xent"]
