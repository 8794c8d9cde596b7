"""The CUDA source of the solver step on the CPU, in child processes that put it in the place of the CPU code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cudaoncpu import COMPILER, CSRC, TESTS, compile_on_cpu
from solversteponcpu import ALL, TRAFFIC, Traffic

from prfl_fast.ops.library import COMPILED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILED is None or COMPILER is None, reason="needs the compiled ops and a C++ compiler"),
]

KERNEL = "ops/solver_step/kernel.cuh"
TORCH = Path(torch.__file__).parent


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TESTS / "solversteponcpu.py"), str(library), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the library, with the text of kernel.cuh replaced when one is given; torch's headers are read once."""
    folder = tmp_path_factory.mktemp("solver_step")
    torch_flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
    registered = compile_on_cpu(folder / "register.o", "-c", *torch_flags, CSRC / "ops/solver_step/register.cpp")

    def make(kernel: str | None = None) -> Path:
        csrc, more = CSRC, []
        if kernel is not None:
            more = ["-O0"]  # compiled sooner; it runs one case only
            csrc = folder / f"csrc{len(list(folder.iterdir()))}"
            shutil.copytree(CSRC, csrc)
            (csrc / KERNEL).write_text(kernel)
        library = folder / f"library{len(list(folder.iterdir()))}.so"
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        source = TESTS / "ops/solver_step_on_cpu.cpp"
        return compile_on_cpu(library, "-shared", *more, source, registered, *libraries, csrc=csrc)

    return make


@pytest.fixture(scope="module")
def library(build: Callable[..., Path]) -> Path:
    return build()


def test_the_cuda_source_gives_the_references_results(library: Path) -> None:
    done = run(library, "results")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"passed {name}" for name in ALL]


def excess(launch: Traffic) -> float:
    """Bytes moved over bytes that have to be moved."""
    assert launch.loaded >= launch.expected_load and launch.stored >= launch.expected_store
    return (launch.loaded + launch.stored) / (launch.expected_load + launch.expected_store)


def test_every_byte_is_moved_once(library: Path) -> None:
    done = run(library, "traffic")
    assert done.returncode == 0, done.stderr
    launches = [Traffic(**json.loads(line)) for line in done.stdout.splitlines()]
    assert [(launch.name, launch.transposed) for launch in launches] == [(n, t) for n in TRAFFIC for t in (False, True)]
    for launch in launches:
        assert 1.0 <= excess(launch) <= 1.05, launch
        # A vector of four doubles is two instructions, each of which touches every sector of the warp's part; bytes of
        # a mask that is not contiguous, and elements at addresses that are not aligned, are moved one by one.
        if launch.name in ("broadcast mask", "unaligned"):
            continue
        instructions = 2 if launch.name == "float64" else 1
        moved = launch.load_sectors + launch.store_sectors
        least = (launch.expected_load + launch.expected_store) / 32
        # The last thread moves up to three elements one by one.
        assert least <= moved <= 1.05 * instructions * least + 3 * launch.tensors, launch


@pytest.mark.parametrize(
    ("right", "wrong", "case", "complaint"),
    [
        # Alignment is not asked for.
        ("== 0) {\n    const Pack<E> pack", ">= 0) {\n    const Pack<E> pack", "unaligned", "misaligned, expected"),
        # The last element is not written.
        ("if (i < count) global_store", "if (i + 1 < count) global_store", "one element", "AssertionError"),
        # A term is dropped.
        ("if (t + k < map.plain) accum", "if (t + k + 1 < map.plain) accum", "several blocks", "AssertionError"),
        # Neighbouring blocks overlap by a thread.
        ("(blockIdx.x) * kThreads", "(blockIdx.x) * (kThreads - 1)", "several blocks", "race, byte"),
    ],
)
def test_a_wrong_kernel_is_noticed(
    build: Callable[..., Path], right: str, wrong: str, case: str, complaint: str
) -> None:
    kernel = (CSRC / KERNEL).read_text()
    assert right in kernel
    done = run(build(kernel.replace(right, wrong)), "results", case)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_a_term_that_is_read_twice_is_noticed(build: Callable[..., Path]) -> None:
    right = "accumulate<T, kRows>(map, 0, value, sum);"
    kernel = (CSRC / KERNEL).read_text()
    assert right in kernel
    twice = build(kernel.replace(right, right + "\n    load(map.term[0], start, count, value);"))
    done = run(twice, "traffic", "masked")
    assert done.returncode == 0, done.stderr
    assert all(excess(Traffic(**json.loads(line))) > 1.05 for line in done.stdout.splitlines())
