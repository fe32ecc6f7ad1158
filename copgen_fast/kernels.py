"""Triton kernels: the files of the top-level folder `kernels/`, imported as `copgen_fast.kernels.NAME`."""

from pathlib import Path

_installed = Path(__file__).with_suffix("")
__path__ = [str(_installed if _installed.is_dir() else Path(__file__).parents[1] / "kernels")]
