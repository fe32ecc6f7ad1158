"""Packaging of copgen_fast. `pip install .`, `pip install -e .` and `make install` all work without a compiler."""

from setuptools import find_packages, setup

setup(
    name="copgen_fast",
    version="0.1.0",
    description="The fastest way from a pretrained generator to a contrastive encoder (COP-Gen)",
    python_requires=">=3.10",
    packages=find_packages(include=["copgen_fast", "copgen_fast.*"]),
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
    extras_require={"dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.6", "lightly>=1.5"]},
)
