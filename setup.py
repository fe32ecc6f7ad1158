"""Packaging of copgen_fast. `pip install .`, `pip install -e .` and `make install` all work without a compiler.

The C++ operators are built when torch can be imported while building (`--no-build-isolation`, as `make` does) and a
C++ compiler is there; otherwise one line says so and PyTorch's own operators do their work.
"""

import os
import shutil
from glob import glob

from setuptools import find_packages, setup


def compiled() -> dict:
    """Arguments of setup() that build csrc/, or none."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("copgen_fast: csrc/ is not built, torch is not installed where the build runs")
        return {}
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        print("copgen_fast: csrc/ is not built, there is no C++ compiler (set CXX)")
        return {}
    extension = CppExtension(
        "copgen_fast._cpp",
        sorted(glob("csrc/*.cpp")),
        # Errors and traps of the floating-point unit are not looked at; without them loops vectorise.
        extra_compile_args=["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wno-psabi"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="copgen_fast",
    version="0.1.0",
    description="The fastest way from a pretrained generator to a contrastive encoder (COP-Gen)",
    python_requires=">=3.10",
    packages=[*find_packages(include=["copgen_fast", "copgen_fast.*"]), "copgen_fast.kernels"],
    package_dir={"copgen_fast.kernels": "kernels"},
    package_data={
        "copgen_fast": ["py.typed", "generators/weights/*.safetensors", "stages/*.html"],
    },
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy",
        "scipy>=1.10",
        "scikit-learn>=1.3",
        "safetensors>=0.4",
        "pillow>=9",
        "tyro>=0.9",
        "tqdm>=4.60",
        "tensorboard>=2.12",
        "matplotlib>=3.7",
        "jinja2>=3",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "ruff>=0.6",
            "lightly>=1.5",
            "kornia>=0.7",
            "pytorch-metric-learning>=2.4",
        ],
    },
    **compiled(),
)
