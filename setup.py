"""The compiled part of the package; everything else that is not code lives in pyproject.toml.

With a C++ compiler, CMake builds the ops library (with CUDA kernels where nvcc works) and `prfl_fast._native`. Without
one the package is pure Python and says what that costs when asked (`prfl-fast doctor`). A compiler that is there but
fails is an error: nothing is left out in silence.

PRFL_CUDA=on|off|auto       CUDA kernels: an error when they can't be built, never, or where nvcc works (the default)
PRFL_CUDA_ARCHS='80;90a'    their architectures; the last one also as PTX unless it ends in a or f
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS_LIBRARY = "libprfl_fast_ops.so"
COMPILERS = ("c++", "g++", "clang++")


def compiler() -> str | None:
    """The C++ compiler that CMake will take, or None."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shutil.which(chosen.split()[0])
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def tool(name: str) -> str | None:
    """cmake or ninja: of this environment, else on PATH."""
    module = importlib.util.find_spec(name)
    for folder in module.submodule_search_locations or [] if module is not None else []:
        for candidate in (Path(folder) / "data" / "bin" / name, Path(folder) / name):
            if candidate.is_file():
                return str(candidate)
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def torch_folder() -> Path | None:
    """Folder of torch, which is not imported: that of this process, else (under build isolation) of its interpreter."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    # -I: without the paths by which pip hides the environment from the build.
    answer = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    origin = answer.stdout.strip()
    return Path(origin).parent if origin else None


def pybind11_folder() -> str | None:
    """CMake folder of pybind11, or None."""
    if importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    return str(pybind11.get_cmake_dir())


class BuildExt(build_ext):
    """One CMake build for both libraries.

    It hangs on `run`, not on `build_extension`: setuptools knows of one extension, and an editable install would lose
    the other library.
    """

    def run(self) -> None:
        built = self.build_with_cmake()
        for library in built:
            target = self.folder() / library.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or not filecmp.cmp(library, target, shallow=False):
                target.unlink(missing_ok=True)  # a running process keeps the old file
                shutil.copy2(library, target)

    def folder(self) -> Path:
        """Where the package is: the sources' own folder in an editable or in-place build."""
        return ROOT / "prfl_fast" if self.inplace or self.editable_mode else Path(self.build_lib) / "prfl_fast"

    def build_with_cmake(self) -> list[Path]:
        torch = torch_folder()
        found = {
            "torch (pip install 'torch>=2.10')": torch,
            "cmake (pip install cmake)": tool("cmake"),
            "ninja (pip install ninja)": tool("ninja"),
            "pybind11 (pip install pybind11)": pybind11_folder(),
        }
        missing = [name for name, where in found.items() if where is None]
        if missing:
            raise SystemExit(
                f"prfl_fast: there is a C++ compiler ({compiler()}), but its build needs {', '.join(missing)}. "
                "Install that, or build with isolation (without --no-build-isolation)."
            )
        torch, cmake, ninja, pybind11 = found.values()
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        output = build / "out"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,  # each time: a cached one may name an environment that is gone
            "PRFL_TORCH": torch,
            "PRFL_CUDA": os.environ.get("PRFL_CUDA") or "auto",
            "PRFL_CUDA_ARCHS": (os.environ.get("PRFL_CUDA_ARCHS") or "").replace(",", ";").replace(" ", ";"),
            "PRFL_OUTPUT": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11,
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        self.call([str(cmake), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags])
        self.call([str(cmake), "--build", str(build), *(["--parallel", str(self.parallel)] if self.parallel else [])])
        return [output / OPS_LIBRARY, *output.glob(f"_native*{sysconfig.get_config_var('EXT_SUFFIX')}")]

    @staticmethod
    def call(command: list[str]) -> None:
        done = subprocess.run(command)
        if done.returncode:
            raise SystemExit(
                f"prfl_fast: {' '.join(command)}\nfailed with code {done.returncode}. PRFL_CUDA=off builds without "
                "CUDA kernels; without a C++ compiler on PATH the package installs as pure Python."
            )

    def names(self) -> tuple[str, str]:
        return OPS_LIBRARY, Path(self.get_ext_filename("prfl_fast._native")).name

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "prfl_fast" / name) for name in self.names()]

    def get_output_mapping(self) -> dict[str, str]:
        """What a strict editable install links to: the built files beside the sources."""
        if not (self.inplace or self.editable_mode):
            return {}
        return {
            output: str(self.folder() / name) for output, name in zip(self.get_outputs(), self.names(), strict=True)
        }


if compiler() is None:
    print("prfl_fast: no C++ compiler (c++, g++, clang++ or $CXX): a pure Python package is built", file=sys.stderr)
    setup()
else:
    setup(
        # Tells setuptools that the package has compiled parts; CMake knows which.
        ext_modules=[Extension("prfl_fast._native", sources=[])],
        cmdclass={"build_ext": BuildExt},
        # Under isolation, and where the environment has no torch yet.
        setup_requires=["torch>=2.10"] if torch_folder() is None else [],
    )
