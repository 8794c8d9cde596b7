"""Compiles sources against the CPU runner of CUDA kernels, tests/cuda_on_cpu."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
RUNNER = TESTS / "cuda_on_cpu"
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def compile_on_cpu(to: Path, *arguments: str | Path, csrc: Path = CSRC) -> Path:
    """One run of the C++ compiler: ``arguments`` are sources and further flags, ``to`` is what it makes."""
    command = [
        str(COMPILER), "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
        "-fsanitize=bounds,shift", "-fno-sanitize-recover=all",
        "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Werror",
        f"-I{RUNNER}", f"-I{csrc}", *map(str, arguments), "-o", str(to),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to
