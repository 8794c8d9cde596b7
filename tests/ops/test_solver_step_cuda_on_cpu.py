"""The CUDA source of the solver step on the CPU: a child process puts it in the place of the CPU code.

Compiled with the undefined-behaviour sanitiser, which stops at a vector access that is not aligned.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prfl_fast.ops.library import COMPILED

ROOT = Path(__file__).parent.parent.parent
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)

CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from prfl_fast import ops
torch.ops.load_library(sys.argv[1])
from solverstepcases import BFLOAT16_CASES, CASES, check
for number, (name, case) in enumerate({**CASES, **BFLOAT16_CASES}.items()):
    torch.manual_seed(number)
    try:
        check(case, "cpu")
    except AssertionError as error:
        raise AssertionError(f"case {name!r}") from error
    print("passed", name)
"""


def build(to: Path, kernel: str | None = None) -> Path:
    """The serial library; ``kernel`` replaces the text of kernel.cuh."""
    csrc = ROOT / "csrc"
    if kernel is not None:
        csrc = to / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        (csrc / "ops/solver_step/kernel.cuh").write_text(kernel)
    torch_folder = Path(torch.__file__).parent
    library = to / "serial.so"
    command = [
        str(COMPILER), "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
        "-fsanitize=alignment,bounds,shift", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}", "-isystem", str(torch_folder / "include"),
        str(ROOT / "tests/ops/solver_step_serial.cpp"), str(csrc / "ops/solver_step/register.cpp"), "-o", str(library),
        f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def run(library: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(library), str(ROOT / "tests")]
    return subprocess.run(command, capture_output=True, text=True)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILED is None or COMPILER is None, reason="needs the compiled ops and a C++ compiler"),
]


def test_the_cuda_source_gives_the_references_results(tmp_path: Path) -> None:
    done = run(build(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") == 24


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("== 0) {\n    const Pack<E> pack", ">= 0) {\n    const Pack<E> pack"),  # alignment is not asked for
        ("if (i < count) to[i]", "if (i + 1 < count) to[i]"),  # the last element is not written
        ("if (t + k < map.plain) accumulate", "if (t + k + 1 < map.plain) accumulate"),  # a term is dropped
    ],
)
def test_a_wrong_kernel_is_noticed(tmp_path: Path, right: str, wrong: str) -> None:
    kernel = (ROOT / "csrc/ops/solver_step/kernel.cuh").read_text()
    assert right in kernel
    done = run(build(tmp_path, kernel.replace(right, wrong)))
    assert done.returncode != 0
    assert "AssertionError" in done.stderr or "misaligned" in done.stderr
