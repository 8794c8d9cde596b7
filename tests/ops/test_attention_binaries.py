"""Machine code of our attention kernels for three architectures, read without a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Shared memory that a program may have, in bytes (CUDA programming guide, table of compute capabilities).
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
NAMES = tuple(f"attention: Wan 1.3B 12x128 cross {way}" for way in ("forward", "backward"))
KERNELS = {
    "attention_forward_kernel", "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel",
    "attention_add_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in the interpreter")
    from prfl_fast.compile import compile_kernels

    made: list[dict[str, Any]] = compile_kernels(ops=["attention"], names=NAMES, progress=False)["kernels"]
    return made


@pytest.mark.slow
def test_nothing_spills_and_shared_memory_is_there(rows: list[dict[str, Any]]) -> None:
    assert {(row["arch"], row["kernel"]) for row in rows} == {(arch, kernel) for arch in SHARED for kernel in KERNELS}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED[row["arch"]], row


@pytest.mark.slow
def test_products_run_on_tensor_cores_and_tiles_are_copied_ahead(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        products = row["kernel"] in {"attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel"}
        assert (row["tensor_core"] > 0) == products, row
        assert bool(row["copies"]) == products, row
        # 16 bytes a thread where a tile is not copied to shared memory.
        assert row["loads"].get("128", 0) > 0, row
