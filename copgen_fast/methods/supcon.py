"""SupCon: NT-Xent in which all samples of a class are positives of each other (Khosla et al. 2020).

The classes are a conditional generator's, or those of real images: the paper's supervised extension.
"""

from __future__ import annotations

from copgen_fast.methods.simclr import SEVERAL_POSITIVES, Config, build

__all__ = ["NEEDS_LABELS", "SEVERAL_POSITIVES", "Config", "build"]

NEEDS_LABELS = True
