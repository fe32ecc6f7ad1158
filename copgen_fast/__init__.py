"""copgen_fast: from a pretrained generator to a contrastive encoder (COP-Gen, NeurIPS 2022), made fast."""

__version__ = "0.2.0"
