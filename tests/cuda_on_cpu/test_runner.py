"""The CPU runner of CUDA kernels: what is right passes under every order of threads, each kind of defect is found."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from cudaoncpu import COMPILER, CSRC, RUNNER, compile_on_cpu

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

SEEDS = 6
CORRECT = [
    "block_sum", "warp_sums", "transposition", "row_norm", "histogram", "half_warps", "prefix_sum", "numbers", "votes",
    "strided", "wide", "word_of_two_halves", "short_copies", "product_f16", "product_bf16", "product_by_rows",
]  # fmt: skip

PRODUCT_RACE = (
    r"^race, byte \d+ of shared 'block_shared' .*, with a (read|write) by thread \(\d+, 0, 0\) at matrix\.cuh:\d+: "
    r"(read|write) of 16 bytes by thread \(\d+, 0, 0\) of block \(0, 0, 0\) at matrix\.cuh:\d+$"
)
HERE = r"by thread \(\d+, 0, 0\) of block \([01], 0, 0\) at defects\.cuh:\d+$"
RACE = r"^race, byte \d+ of {} .*, with a (read|write|modification) by {} at defects\.cuh:\d+: \w+ of 4 bytes "
SHARED_RACE = RACE.format("shared 'block_shared'", r"(thread \(\d+, 0, 0\)|warp \d)") + HERE
BLOCK_RACE = RACE.format("global 'to'", "an earlier block") + HERE

# What the runner has to say, under every seed.
DEFECTS = {
    "no_syncthreads": SHARED_RACE,
    "no_syncwarp": SHARED_RACE,
    "shuffle_for_syncwarp": SHARED_RACE,
    "syncwarp_of_half": SHARED_RACE,
    "one_half_waited_for": SHARED_RACE,
    "syncwarp_for_syncthreads": SHARED_RACE,
    "write_after_read": SHARED_RACE,
    "branch_around_barrier": r"^deadlock in block \(0, 0, 0\): threads 40-63 have exited; "
    r"threads 0-39 wait in __syncthreads at defects\.cuh:\d+$",
    "barrier_in_both_branches": r"calls __syncthreads at defects\.cuh:\d+ while others wait at another one, in "
    r"divergent code: threads [\d, -]+ wait in __syncthreads at defects\.cuh:\d+$",
    "syncwarp_in_branch": r"^deadlock .*: threads 8-63 wait in __syncthreads .*; threads 0-7 wait in __syncwarp ",
    "reads_one_too_far": r"^out of bounds, byte 256 of global 'from' \(256 bytes\): read of 4 bytes " + HERE,
    "reads_one_too_early": r"^out of bounds, byte -4 of global 'from' \(256 bytes\): read of 4 bytes " + HERE,
    "writes_one_too_far": r"^out of bounds, byte 256 of global 'to' \(256 bytes\): write of 4 bytes " + HERE,
    "one_byte_too_far": r"^out of bounds, byte 256 of global 'from' \(259 bytes\): read of 4 bytes " + HERE,
    "shared_out_of_bounds": r"^out of bounds, byte 256 of shared 'block_shared' \(256 bytes\): read of 4 bytes " + HERE,
    "uninitialised": r"^not a number: to\[5\]$",
    "left_by_another_block": r"^not a number: to\[(64|0)\]$",
    "misaligned": r"^misaligned, expected a multiple of 16, byte 4 of global 'from' .*: read of 16 bytes " + HERE,
    "blocks_write_one_place": BLOCK_RACE,
    "blocks_read_and_write": BLOCK_RACE,
    "atomic_and_plain": RACE.format("global 'to'", r"thread \(\d+, 0, 0\)") + HERE,
    "shuffle_from_inactive": r"^__shfl_down_sync .*: lane 8 reads lane 16, which is inactive: only lanes 0-15 take",
    "shuffle_from_exited": r"^__shfl_xor_sync .*: lane 8 reads lane 24, which is inactive: only lanes 0-23 take",
    "shuffle_in_branch": r"^deadlock .*: threads 0-15 wait in __shfl_xor_sync .*; threads 16-63 wait in __syncthreads ",
    "mask_without_itself": r"calls __shfl_xor_sync at .* with a mask of lanes 16-31, which leaves itself out$",
    "product_no_wait": r"^wrong result: c\[0\] is -?nan",
    "product_early_read": r"^wrong result: c\[0\] is -?nan",
    "product_no_syncwarp": PRODUCT_RACE,
    "product_no_syncwarp_after": PRODUCT_RACE,
    "product_half_a_warp": r"^load_matrices at matrix\.cuh:\d+: all lanes have to take part, only 0-15 do$",
    "plain_access": r"touches byte \d+ of global 'from' \(256 bytes\) without prfl::global_load or _store$",
    "wrong_space": r"^not shared memory, byte 0 of global 'from' \(256 bytes\): read of 4 bytes " + HERE,
    "no_dynamic_shared": r"asks for dynamic shared memory, of which the launch gives none$",
    "recursion_without_end": r"overflows its stack$",
}


@dataclass(frozen=True)
class Run:
    """One case under one seed."""

    error: str | None
    seconds: float = 0.0
    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    load_sectors: int = 0
    store_sectors: int = 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """All cases under all seeds, compiled and run once."""
    program = compile_on_cpu(tmp_path_factory.mktemp("runner") / "cases", RUNNER / "kernels/main.cpp")
    done = subprocess.run([str(program), *CORRECT, *DEFECTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Run]] = {}
    for line in done.stdout.splitlines():
        name, seed, outcome, rest = line.split(" ", 3)
        seconds, *counts = rest.split() if outcome == "ok" else ("0",)
        run = Run(None, float(seconds), *map(int, counts)) if outcome == "ok" else Run(rest)
        assert int(seed) == len(found.setdefault(name, []))
        found[name].append(run)
    return found


@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels_pass_under_every_seed(runs: dict[str, list[Run]], name: str) -> None:
    assert [run.error for run in runs[name]] == [None] * SEEDS


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_found_under_every_seed(runs: dict[str, list[Run]], name: str) -> None:
    assert len(runs[name]) == SEEDS
    for run in runs[name]:
        assert run.error is not None and re.search(DEFECTS[name], run.error), run.error


def test_a_row_norm_of_64_rows_takes_part_of_a_second(runs: dict[str, list[Run]]) -> None:
    fastest = min(run.seconds for run in runs["row_norm"])
    print(f"row_norm, 64 x 5120: {fastest:.3f} s")
    assert fastest < 5.0  # 0.2 s on an idle core; the machine may be busy


def test_traffic_is_counted(runs: dict[str, list[Run]]) -> None:
    rows = 64 * 5120 * 4
    for run in runs["row_norm"]:
        assert (run.loaded, run.stored, run.atomic) == (2 * rows, rows, 0)
        assert (run.load_sectors, run.store_sectors) == (2 * rows // 32, rows // 32)
    for run in runs["warp_sums"]:  # of the last launch: 288 doubles in, three times as many out
        assert (run.loaded, run.stored) == (288 * 8, 3 * 288 * 8)
        assert (run.load_sectors, run.store_sectors) == (72, 3 * 72)
    # Row r starts at byte 404 r: a warp's 128 bytes touch 5 sectors unless r is a multiple of 8.
    for run in runs["transposition"]:
        assert run.loaded == run.stored == 67 * 101 * 4
        assert run.load_sectors == segments(67, 101) and run.store_sectors == segments(101, 67)
    # Stores by a stride of 128 bytes: a sector each.
    for run in runs["strided"]:
        assert (run.stored, run.store_sectors) == (4 * 96, 96)
    for run in runs["wide"]:  # 32 bytes a thread, in two instructions that each touch every sector
        assert (run.loaded, run.load_sectors) == (32 * 64, 2 * 64)
    for run in runs["histogram"]:
        assert (run.loaded, run.stored, run.atomic) == (777 * 4, 0, 7 * 16 * 4)


def segments(rows: int, columns: int) -> int:
    """Sectors that the warps touch when each takes 32 neighbouring floats of a row."""
    total = 0
    for row in range(rows):
        for start in range(0, columns, 32):
            first = 4 * (row * columns + start)
            last = 4 * (row * columns + min(start + 32, columns)) - 1
            total += last // 32 - first // 32 + 1
    return total


NVCC = next((path for path in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if path and Path(path).exists()), None)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_nvcc_compiles_the_same_kernels(tmp_path: Path) -> None:
    # The accessors are the plain accesses there: 16 bytes at once, shared memory as shared memory, no stack.
    source = tmp_path / "kernels.cu"
    product = "template __global__ void kernels::matrix_product<{0}, {1}>(const {0}*, const {0}*, float*, int);\n"
    source.write_text(
        '#include "kernels/correct.cuh"\n#include "kernels/matrix.cuh"\n'
        + product.format("prfl::Half", "false")
        + product.format("prfl::BFloat16", "true")
    )
    command = [str(NVCC), "-std=c++17", "-arch=sm_80", "-cubin", "--keep", "--keep-dir", str(tmp_path)]
    command += [f"-I{RUNNER}", f"-I{CSRC}", str(source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = (tmp_path / "kernels.ptx").read_text()
    kernels = [name for name in CORRECT if not name.startswith("product")]
    assert sorted(re.findall(r"\.entry _ZN7kernels\d+([a-z_]+?)(?:E|I)", code)) == sorted(
        [*kernels, "matrix_product", "matrix_product"]
    )
    assert "ld.global.v4.f32" in code or "ld.global.v4.b32" in code
    assert "st.shared" in code and "ld.shared" in code and ".local" not in code
    assert not re.search(r"\b(ld|st)\.(volatile\.)?[fubs]\d", code), "a generic access: the space was lost"
    for instruction in ("f32.f16.f16.f32", "f32.bf16.bf16.f32", "x4.shared.b16", "x4.trans.shared.b16", "cp.async.cg"):
        assert instruction in code
