from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_fast.memory.trace import LiveBytes, storage_bytes

KIB = 1024


def test_every_storage_counts_once_rounded_up_and_while_it_lives() -> None:
    with LiveBytes() as live:
        a = torch.ones(3, dtype=torch.float64)  # 24 bytes -> 512
        b = torch.ones(129)  # 516 bytes -> 1024
        assert live.current == live.peak == 512 + KIB
        views = (a[1:], a.view(3, 1), b.detach(), b.t(), b[:0])
        assert live.current == 512 + KIB
        del a, b
        assert live.current == 512 + KIB, "views keep their storages"
        del views
        assert (live.current, live.peak) == (0, 512 + KIB)


def test_nothing_for_what_was_there_before_and_for_writing_into_it() -> None:
    outside = torch.randn(100, 100)
    with LiveBytes() as live:
        outside.mul_(2)
        view = outside[::2].t()
        outside.add_(1)
        assert (live.current, live.peak) == (0, 0)
        copy = view.contiguous()
        assert live.current == storage_bytes(copy) == -(-50 * 100 * 4 // 512) * 512


def test_empty_tensors_and_lists_of_tensors() -> None:
    with LiveBytes() as live:
        empty = torch.ones(0, 5)
        assert live.current == 0
        parts = torch.ones(300).split(100)
        assert live.current == 1536  # 1,200 bytes, one storage
        copies = torch._foreach_add(parts, 1)
        assert live.current == 1536 + 3 * 512
    assert len(copies) == 3 and empty.numel() == 0


def test_a_peak_between_two_operations_is_seen() -> None:
    x = torch.randn(256)  # 1 KiB
    with LiveBytes() as live:
        y = (x + 1) * 2
        assert (live.current, live.peak) == (KIB, 2 * KIB)
        del y
    assert live.current == 0


def test_forward_and_backward_of_a_product() -> None:
    x = torch.randn(64, 32)
    w = torch.randn(32, 16, requires_grad=True)
    with LiveBytes() as live:
        y = torch.tanh(x @ w)  # the product's result is let go, tanh saves its own: 64 * 16 * 4 = 4 KiB
        assert live.current == 4 * KIB
        assert live.peak == 8 * KIB
        y.sum().backward()  # the gradient of w is 32 * 16 * 4 = 2 KiB
        assert w.grad is not None
        assert live.current == 6 * KIB
        del y
        assert live.current == 2 * KIB
        w.grad = None
        assert live.current == 0


def test_after_the_end_nothing_is_counted_any_more_but_releases() -> None:
    with LiveBytes() as live:
        x = torch.ones(256)
    other = torch.ones(256)
    assert live.current == KIB
    del x, other
    gc.collect()
    assert (live.current, live.peak) == (0, KIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors_count_as_real_ones_do(dtype: torch.dtype) -> None:
    def work(make: Callable[..., Tensor]) -> tuple[int, int]:
        q, w = make(2, 3, 40, 16), make(16, 16)
        with LiveBytes() as live:
            h = torch.nn.functional.scaled_dot_product_attention(q @ w, q, q)
            h = torch.nn.functional.layer_norm(torch.nn.functional.gelu(h), (16,))
            h.square().mean().backward()
            del h
        return live.peak, live.current

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    real = work(make)
    with FakeTensorMode():
        fake = work(make)
    assert real == fake
    # Gradients of q and w are what stays.
    assert real[1] == sum(-(-count * dtype.itemsize // 512) * 512 for count in (2 * 3 * 40 * 16, 16 * 16)) < real[0]


def test_two_counters_one_inside_the_other() -> None:
    with LiveBytes() as outer:
        x = torch.ones(256)
        with LiveBytes() as inner:
            y = x * 2
        assert (outer.current, inner.current) == (2 * KIB, KIB)
    del x, y
    assert (outer.current, inner.current) == (0, 0)
