"""Peers of the areas: other packages, and the forms of the reference code (of COP-Gen, Li et al. 2022)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def optional(package: str) -> Iterator[None]:
    """Leave out the peers of a package that is not installed, with a printed line."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"left out: {package} ({error}): pip install -c constraints.txt {package}", flush=True)
