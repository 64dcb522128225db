"""Builds csrc/ with CMake where a compiler is there; without one the library runs on its references."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def find_tools() -> tuple[str | None, str | None]:
    """(cmake, compiler), None for what is missing; cmake may lie beside this Python, as the package from PyPI does."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((found for name in compilers if name and (found := shutil.which(name))), None)
    return cmake, compiler


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt against the torch of the build environment."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the binary uses torch's stable ABI and none of Python's."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        import torch

        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        configure = [CMAKE, "-S", str(ROOT), "-B", self.build_temp, f"-DCMAKE_CXX_COMPILER={COMPILER}"]
        configure += [f"-DTORCH_ROOT={Path(torch.__file__).parent}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
        subprocess.run(configure, check=True)
        subprocess.run([CMAKE, "--build", self.build_temp, "--parallel"], check=True)


CMAKE, COMPILER = find_tools()
if not (CMAKE and COMPILER):
    print("k5kernels: no C++ compiler or no cmake; installing without native kernels", file=sys.stderr)
setup(
    ext_modules=[Extension("k5kernels._native", [])] if CMAKE and COMPILER else [],
    cmdclass={"build_ext": CMakeBuild},
)
