"""The compiled extensions and the package layout; metadata and dependencies are in pyproject.toml.

`pip install .`, `pip install -e .` and `make install` all work without a compiler. The C++ operators are built when
torch can be imported during the build (`pip install --no-build-isolation`, or `python setup.py build_ext --inplace`, as
`make` does) and there is a C++ compiler, the CUDA operators when there is a CUDA compiler too; otherwise a line says so
and PyTorch's operators are used.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

# Absolute: ninja compiles in another folder.
CSRC = str(Path(__file__).parent.resolve() / "csrc")
# Where no GPU is visible, as in a container build: sm_75 and sm_80, and PTX that newer GPUs compile on loading.
CUDA_TARGETS = ["-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_80,code=[sm_80,compute_80]"]


def compiled() -> dict:
    """Arguments of setup() that build csrc/; empty where it cannot be built."""
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
        sorted(set(glob("csrc/**/*.cpp", recursive=True)) - set(glob("csrc/*/*_cuda.cpp"))),
        include_dirs=[CSRC],
        # Nothing reads errno or floating-point traps; loops vectorise only without them.
        extra_compile_args=["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wno-psabi"],
        extra_link_args=["-fopenmp"],
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        optional=True,
    )

    class OneByOne(BuildExtension):
        """Build each extension separately, so that one that fails does not stop the others."""

        def build_extensions(self) -> None:
            everything = self.extensions
            for one in everything:
                self.extensions = [one]
                try:
                    super().build_extensions()
                except Exception as error:
                    print(f"copgen_fast: {one.name} is not built, {type(error).__name__}: {error}")
            self.extensions = everything

    return {"ext_modules": [extension, *cuda_extension()], "cmdclass": {"build_ext": OneByOne}}


def cuda_extension() -> list:
    """The extension copgen_fast._cuda in a list; empty where it cannot be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None or CUDA_HOME is None:
        missing = "torch is built without CUDA" if torch.version.cuda is None else "there is no nvcc (set CUDA_HOME)"
        print(f"copgen_fast: the CUDA operators are not built, {missing}")
        return []
    # CUDA_HOME may hold no more than a script that starts the compiler; the compiler knows where it is.
    tried = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--dryrun", "any.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", tried.stderr, re.MULTILINE)
    toolkit = Path(top[1] if top else CUDA_HOME).resolve()
    chosen = "TORCH_CUDA_ARCH_LIST" in os.environ or torch.cuda.device_count() > 0
    extension = CUDAExtension(
        "copgen_fast._cuda",
        sorted(glob("csrc/*/*.cu") + glob("csrc/*/*_cuda.cpp")),
        include_dirs=[CSRC, str(toolkit / "include")],
        library_dirs=[str(toolkit / "lib64"), str(toolkit / "lib")],
        extra_compile_args={"cxx": ["-O2", "-g0"], "nvcc": ["-O3", "--threads=2", *([] if chosen else CUDA_TARGETS)]},
        depends=sorted(glob("csrc/*/*.cuh") + glob("csrc/*/*_cuda.h")),
        optional=True,
    )
    folders = [*extension.library_dirs, *(os.environ.get("LIBRARY_PATH", "").split(":"))]
    if not any(Path(folder, "libcudart.so").exists() for folder in folders):
        # A toolkit without the library: torch's own dependencies hold it, under a name with its version.
        spec = importlib.util.find_spec("nvidia")
        roots = spec.submodule_search_locations if spec else []
        for library in [found for root in roots for found in glob(f"{root}/*/lib/libcudart.so.*")][:1]:
            extension.libraries.remove("cudart")
            extension.library_dirs.append(str(Path(library).parent))
            extension.extra_link_args.append(f"-l:{Path(library).name}")
    return [extension]


setup(
    packages=[*find_packages(include=["copgen_fast", "copgen_fast.*"]), "copgen_fast.kernels"],
    # kernels/ stays beside csrc/, without an __init__.py that would shadow the package `kernels` of others.
    package_dir={"copgen_fast.kernels": "kernels"},
    package_data={
        "copgen_fast": [
            "py.typed",
            "generators/weights/*.safetensors",
            "stages/report/report.html",
            "stages/report/explorer.js",
            "studies/study.html",
        ]
    },
    **compiled(),
)
