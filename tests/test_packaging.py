"""The source distribution builds a working wheel, also where there is no compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["pyproject.toml", "setup.py", "k5_command.py", "MANIFEST.in", "CMakeLists.txt", "LICENSE", "README.md"]
FOLDERS = ["csrc", "k5kernels", "tests"]


def build(kind: str, folder: Path, target: Path, **environment: str) -> Path:
    """What setuptools' build backend makes of a folder, without isolation and so without a network."""
    target.mkdir()
    command = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    variables = {name: value for name, value in os.environ.items() if name != "CXX"} | environment
    done = subprocess.run([sys.executable, "-c", command], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(target.iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, unpacked; made from a copy, because building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    (folder / "copy").mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / "copy")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "copy" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    archive = build("sdist", folder / "copy", folder / "dist")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel of the source distribution on a machine without a compiler."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel") / "dist", PATH="")


def relative(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern)}


def test_the_sdist_has_all_that_the_build_needs(sdist):
    assert all((sdist / name).is_file() for name in SOURCES)
    assert relative(sdist / "csrc", "*.*") == relative(ROOT / "csrc", "*.*")
    assert relative(sdist / "k5kernels", "*.py", "py.typed") == relative(ROOT / "k5kernels", "*.py", "py.typed")


def test_the_sdist_has_no_tests(sdist):
    assert not (sdist / "tests").exists()


def test_without_a_compiler_the_wheel_is_for_every_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_has_the_packages_code_and_data(wheel):
    names = {name.removeprefix("k5kernels/") for name in zipfile.ZipFile(wheel).namelist()}
    assert relative(ROOT / "k5kernels", "*.py", "py.typed", "*.json", "*.csv") <= names
    assert not any(name.endswith(".so") or name.startswith(("tests/", "model/", "train/", "bench/")) for name in names)
