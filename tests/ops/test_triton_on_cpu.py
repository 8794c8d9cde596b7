"""The watch over Triton's interpreter sees what it is there for: kernels that are wrong on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tritononcpu import OutOfBounds, poisoned, watched

pytestmark = pytest.mark.interpreter


def kernels() -> dict[str, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, out, n, BLOCK: tl.constexpr, READ: tl.constexpr, WRITTEN: tl.constexpr):
        at = tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n + READ, other=0.0)
        tl.store(out + at, value, mask=at < n + WRITTEN)

    @triton.jit
    def unmasked(x, out, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at), mask=at < n)

    @triton.jit
    def wide(x, out, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        value = tl.load(x.to(tl.pointer_type(tl.float64)) + at, mask=at < n // 2, other=0.0)
        tl.store(out + at, value.to(tl.float32), mask=at < n // 2)

    @triton.jit
    def added(x, out, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.atomic_add(out + at * 0, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)

    return {"copy": copy, "unmasked": unmasked, "wide": wide, "added": added}


def launch(name: str, x: torch.Tensor, out: torch.Tensor, **constants: int) -> None:
    kernels()[name][(1,)](x, out, x.shape[0], BLOCK=16, **constants)


def test_a_right_kernel_passes_and_its_bytes_are_counted() -> None:
    x, out = torch.randn(10), torch.empty(10)
    with watched() as watch:
        launch("copy", x, out, READ=0, WRITTEN=0)
    assert torch.equal(x, out)
    assert watch.launches == ["copy"]
    assert [(a.name, int(a.reads.sum()), int(a.writes.sum()), a.requested, a.distinct) for a in watch.arguments] == [
        ("x", 10, 0, 40, 40),
        ("out", 0, 10, 40, 40),
    ]


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("copy", {"READ": 1, "WRITTEN": 0}),
        ("copy", {"READ": 0, "WRITTEN": 1}),
        ("unmasked", {}),
        ("wide", {}),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_is_beyond_the_end_is_caught(name: str, constants: dict[str, int], inside: bool) -> None:
    # Inside: what follows is memory of the same storage, which no other check would notice.
    x, out = (torch.zeros(20)[:10], torch.zeros(20)[:10]) if inside else (torch.zeros(10), torch.zeros(10))
    with watched(), pytest.raises(OutOfBounds, match="reads|writes"):
        launch(name, x, out, **constants)


def test_gaps_of_a_slice_are_out_of_bounds() -> None:
    x, out = torch.randn(10, 2)[:, 0], torch.empty(10)
    with watched(), pytest.raises(OutOfBounds, match="copy reads 4 bytes"):
        launch("copy", x, out, READ=0, WRITTEN=0)  # takes x for contiguous


def test_atomics_are_refused() -> None:
    with watched(), pytest.raises(AssertionError, match="atomics"):
        launch("added", torch.randn(10), torch.zeros(10))


def test_repeated_reads_are_told_from_distinct_ones() -> None:
    x = torch.randn(1).expand(10)
    with watched() as watch:
        kernels()["copy"][(3,)](x[:1], torch.empty(1), 1, BLOCK=16, READ=0, WRITTEN=0)
    assert (watch.arguments[0].requested, watch.arguments[0].distinct) == (12, 4)


def test_new_memory_is_poisoned() -> None:
    x = torch.zeros(3)
    with poisoned():
        made = [torch.empty(3), torch.empty_like(x), x.new_empty(3), x.new_empty((3,), dtype=torch.float16)]
    assert all(tensor.isnan().all() for tensor in made)
