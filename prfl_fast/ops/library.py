"""The compiled ops: where they are, how they were built, what they run on. Loaded once, when the ops are imported."""

from __future__ import annotations

import ctypes
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

PATH = Path(__file__).parent.parent / "libprfl_fast_ops.so"

REMEDY = (
    "install a CUDA toolkit with nvcc (or set CUDA_HOME) and reinstall from source: "
    "PRFL_CUDA=on pip install --no-build-isolation --no-deps --force-reinstall <prfl_fast's folder>"
)
REMEDY_CPU = (
    "install a C++ compiler (g++), cmake, ninja and pybind11, and reinstall from source: "
    "pip install --no-build-isolation --no-deps --force-reinstall <prfl_fast's folder>"
)


@dataclass(frozen=True)
class CompiledOps:
    """The library as it was built.

    Attributes:
        cuda: version of nvcc, empty without CUDA kernels.
        archs: of the CUDA kernels: ``sm_80`` is machine code, ``compute_100`` is PTX for cards that come later.
        reason: why there are no CUDA kernels.
    """

    cuda: str
    archs: tuple[str, ...]
    reason: str

    def covers(self, major: int, minor: int) -> bool:
        """True where a card of this compute capability can run the CUDA kernels."""
        return any(_covers(arch, major, minor) for arch in self.archs)


def _covers(arch: str, major: int, minor: int) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    kind, built_major, built_minor, suffix = match[1], int(match[2]), int(match[3]), match[4]
    if suffix == "a":
        return (major, minor) == (built_major, built_minor)
    if kind == "sm" or suffix == "f":
        return major == built_major and minor >= built_minor
    return (major, minor) >= (built_major, built_minor)


def load(path: Path = PATH) -> CompiledOps | None:
    """Loads the compiled ops; None where the package was installed without them.

    What is there and does not load is announced by a warning, as are CUDA kernels that this torch could use and that
    were not built.
    """
    if not path.is_file():
        ops = None
    else:
        try:
            torch.ops.load_library(str(path))
            ops = _read_info(path)
        except OSError as error:
            warnings.warn(f"prfl_fast: its compiled ops do not load, plain torch runs instead: {error}", stacklevel=2)
            return None
    if (ops is None or not ops.cuda) and torch.version.cuda is not None and torch.cuda.is_available():
        reason = "the package was installed without compiled ops" if ops is None else ops.reason
        warnings.warn(
            f"prfl_fast: there is a GPU, but no CUDA kernels: {reason}. Triton or plain torch runs instead. "
            f"To get them, {REMEDY}",
            stacklevel=2,
        )
    return ops


def _read_info(path: Path) -> CompiledOps:
    function = ctypes.CDLL(str(path)).prfl_fast_build_info
    function.restype = ctypes.c_char_p
    info = json.loads(function())
    return CompiledOps(info["cuda"], tuple(info["archs"].split()), info["reason"])


COMPILED = load()
