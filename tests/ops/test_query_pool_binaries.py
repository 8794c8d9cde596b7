"""Machine code of the pooling kernels for three architectures, read without a GPU."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

# Shared memory that a program may have, in bytes (CUDA programming guide, table of compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OVER_TOKENS = {"pool_scores_kernel", "pool_sums_kernel", "pool_backward_kernel", "pool_d_tokens_kernel"}
# Writes the gradient of the tokens too.
FUSED = ("pool_backward_kernel", 8)
# Channels, heads times queries, dtype: the widest trunk as published; a width of partial tiles with most rows a group.
PROBLEMS = [(5120, 8, torch.bfloat16), (1920, 40, torch.bfloat16)]


def compiled(channels: int, rows: int, dtype: torch.dtype, architecture: int) -> list[Any]:
    from prfl_fast.kernels import ahead_of_time, query_pool_launch
    from prfl_fast.kernels.configurations import Launch, shape_of

    f32, length = torch.float32, 32760
    x, folded = shape_of(1, length, channels, dtype=dtype), shape_of(rows, channels, dtype=f32)
    sums, lse = shape_of(1, rows, channels, dtype=f32), shape_of(1, rows, dtype=f32)
    scores = shape_of(1, rows, length, dtype=f32)
    runs = [
        partial(query_pool_launch.forward, x, folded, None, None, 132),
        partial(
            query_pool_launch.backward, x, folded, sums, lse, scores, sums, None, None, (True, True), None, 132
        ),
    ]
    made = []
    for run in runs:
        for kernel, args, kwargs in ahead_of_time.recorded(Launch("query_pool", "", run)):
            source, target, options = ahead_of_time.prepare(kernel, args, kwargs, architecture)
            if source.name in OVER_TOKENS:
                made.append(ahead_of_time.compile_kernel(source, target, options))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize(("channels", "rows", "dtype"), PROBLEMS)
def test_no_spills_tensor_cores_wide_access(channels: int, rows: int, dtype: torch.dtype, architecture: int) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in the interpreter")
    from prfl_fast.kernels import ahead_of_time

    with ahead_of_time.private_cache():
        kernels = compiled(channels, rows, dtype, architecture)
    backward = ["pool_backward_kernel"] if rows <= 16 else ["pool_backward_kernel", "pool_d_tokens_kernel"]
    names = [kernel.kernel for kernel in kernels]
    assert names == ["pool_scores_kernel", "pool_sums_kernel", *backward, "pool_sums_kernel"]
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.shared <= SHARED[architecture], kernel
        assert kernel.tensor_core > 0, kernel
        if kernel.kernel != "pool_d_tokens_kernel":  # which reads none
            assert kernel.copies, kernel  # tokens are copied ahead
        if kernel.kernel in ("pool_sums_kernel", "pool_d_tokens_kernel") or (kernel.kernel, rows) == FUSED:
            assert kernel.stores.get("128", 0) > 0, kernel


def test_production_lists_every_trunk_and_direction() -> None:
    pytest.importorskip("triton")
    from prfl_fast.kernels import configurations

    assert "query_pool_launch" in configurations.MODULES
    names = {launch.name for launch in configurations.production(90) if launch.op == "query_pool"}
    assert {name.split()[-1] for name in names} == {"forward", "backward", "frozen"}
    assert {int(word) for name in names for word in name.split() if word.isdigit()} == {1536, 2048, 3072, 5120}
