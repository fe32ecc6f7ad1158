"""copgen_fast: from a pretrained generator to a contrastive encoder (COP-Gen, NeurIPS 2022), made fast."""

import sys

from copgen_fast.errors import explain_uncaught

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"]:  # `python -m copgen_fast.COMMAND`: memory may not suffice to import what it needs
    sys.excepthook = explain_uncaught
