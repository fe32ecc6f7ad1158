"""Metadata agree, and sdist and wheel carry what belongs in them."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from copgen_fast import __version__
from tests.docs.pages import ROOT

UNTRACKED = (".git", ".venv", "runs", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*cache")


def build(kind, folder):
    """Build an sdist or a wheel of the sources in a folder as where torch is missing: without the extensions."""
    code = (
        f"import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.build_{kind}('dist')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*UNTRACKED))
    return build("sdist", folder)


def test_the_sdist_carries_what_builds_and_explains_the_package(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        top = archive.getnames()[0].partition("/")[0]
        metadata = archive.extractfile(f"{top}/PKG-INFO").read().decode()
    assert top == f"copgen_fast-{__version__}"
    assert {"LICENSE", "CITATION.cff", "CHANGELOG.md", "README.md", "constraints.txt", "Makefile"} <= names
    for folder, pattern in (
        ("csrc", "*"),
        ("kernels", "*.py"),
        ("docs", "*.*"),
        ("bench", "*.json"),
        ("tests", "*.py"),
    ):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= names
    assert "License-Expression: MIT" in metadata and f"Version: {__version__}" in metadata


def test_the_wheel_made_from_the_sdist_carries_the_package(sdist, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)
    (folder,) = tmp_path.iterdir()
    with zipfile.ZipFile(build("wheel", folder)) as archive:
        names = set(archive.namelist())
    assert f"copgen_fast-{__version__}.dist-info/licenses/LICENSE" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "copgen_fast").rglob("*") if path.suffix == ".py"}
    others = (ROOT / "copgen_fast").rglob("*.*")
    data = {str(path.relative_to(ROOT)) for path in others if path.suffix in (".safetensors", ".html", ".typed")}
    kernels = {f"copgen_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources | data | kernels <= names
    assert not any(Path(name).parts[0] in ("tests", "bench", "docs", "kernels") for name in names)


def test_versions_agree():
    assert re.search(rf"^version: {re.escape(__version__)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == __version__
