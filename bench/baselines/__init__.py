"""What the areas are measured against: other packages, and the reference implementation's own way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def optional(package: str) -> Iterator[None]:
    """Leave the peers of a package out where it is not installed, with a line that says so."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"left out: {package} ({error}): pip install -c constraints.txt {package}", flush=True)
