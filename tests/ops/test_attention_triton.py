"""Our attention kernels, in Triton's interpreter, against float64 and against what attention has to obey."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from plainerror import assert_as_exact
from torch import Tensor
from tritononcpu import poisoned, watched

from prfl_fast.ops.attention import attention, choice
from prfl_fast.ops.attention.provider import Problem
from prfl_fast.ops.attention.reference import Reference
from prfl_fast.ops.backends import backend

interpreted = pytest.mark.interpreter
TRITON = choice.PROVIDERS["triton"]
FLOAT32 = torch.finfo(torch.float32).eps

# Batch, queries, keys, heads, head dimension; tiles are 64 by 32 and 32 by 64 here.
SHAPES = [
    (2, 1, 257, 1, 64),
    (1, 257, 2, 2, 40),
    (2, 31, 31, 2, 128),
    (1, 2, 1, 3, 64),
    (1, 129, 65, 1, 40),
    (1, 64, 64, 1, 64),
    (1, 31, 257, 1, 128),
]


def kernels() -> Any:
    from prfl_fast.kernels import attention

    return attention


def within_nan(tensor: Tensor) -> Tensor:
    """The same values as a slice of a larger tensor that is NaN elsewhere: rows, heads and columns lie apart."""
    batch, length, heads, dim = tensor.shape
    room = torch.full((batch, length + 2, heads + 1, dim + 8), float("nan"), dtype=tensor.dtype)
    view = room[:, 1:-1, 1:, :dim]
    view.copy_(tensor)
    return view


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, d_out within NaN, and d_lse."""
    batch, queries, keys, heads, dim = shape
    made = [within_nan(torch.randn(batch, n, heads, dim, dtype=dtype)) for n in (queries, keys, keys, queries)]
    return [*made, torch.randn(batch, heads, queries)]


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention with the scores in memory, in the dtype of the inputs."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def by_autograd(inputs: list[Tensor], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Output, log-sum-exp, gradients of q, k and v."""
    q, k, v, d_out, d_lse = (tensor.to(dtype) for tensor in inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out, lse = written_out(leaves[0], leaves[1], leaves[2], scale)
    gradients = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
    return [out.detach(), lse.detach(), *gradients]


def plain_run(inputs: list[Tensor], scale: float) -> list[Tensor]:
    """What plain torch makes of the inputs in their dtype; float32 where the kernels keep float32 whatever comes.

    In float32 the gradients go by the log-sum-exp, as every attention that keeps no weights has to.
    """
    q, k, v, d_out, d_lse = inputs
    if q.dtype == torch.float32:
        out, lse = Reference().forward(q, k, v, scale)
        return [out, lse, *Reference().backward(d_out, q, k, v, out, lse, scale, d_lse, True)]
    made = by_autograd(inputs, scale, q.dtype)
    made[1] = written_out(q.float(), k.float(), v.float(), scale)[1]
    return made


def run(inputs: list[Tensor], scale: float, splits: int | None = None) -> list[Tensor]:
    q, k, v, d_out, d_lse = inputs
    out, lse = kernels().forward(q, k, v, scale)
    return [out, lse, *kernels().backward(d_out, q, k, v, out, lse, scale, d_lse, splits=splits)]


def sizes(inputs: list[Tensor], scale: float) -> list[Tensor]:
    """What the results would be, were every term of every sum positive: rounding errors are shares of it."""
    q, k, v, d_out = (tensor.double().transpose(1, 2) for tensor in inputs[:4])
    scores = q @ k.mT * scale
    weights = scores.softmax(-1)
    out = weights @ v.abs()
    level = (d_out.abs() * out).sum(-1, keepdim=True) + inputs[4].abs().unsqueeze(-1)
    d_scores = weights * (d_out.abs() @ v.abs().mT + level) * scale
    d_keys = d_scores.mT @ q.abs(), weights.mT @ d_out.abs()
    tokens = [tensor.transpose(1, 2) for tensor in (out, d_scores @ k.abs(), *d_keys)]
    return [tokens[0], scores.logsumexp(-1).abs() + 1, *tokens[1:]]


NAMES = ("out", "lse", "dq", "dk", "dv")


def check(actual: list[Tensor], inputs: list[Tensor], scale: float) -> None:
    exact = by_autograd(inputs, scale, torch.float64)
    for name, ours, plain, right in zip(NAMES, actual, plain_run(inputs, scale), exact, strict=True):
        assert_as_exact(ours, plain, right, name)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = problem(shape, dtype)
    # Of one key only half the gradients are other than zero, and a negative scale turns the largest score over.
    scale = -0.3 if shape[2] == 65 else shape[-1] ** -0.5
    with watched() as watch, poisoned():
        actual = run(inputs, scale, splits=2)
    check(actual, inputs, scale)
    assert set(watch.launches) >= {"attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel"}
    from prfl_fast.kernels.attention_settings import Chip, settings

    tile = settings(Chip(0, 1), shape[-1], dtype.itemsize, "dkdv").block_m
    assert ("attention_add_kernel" in watch.launches) == (shape[1] > tile)  # one tile of queries can't be split
    for argument in watch.select("out", "dq", "dk", "dv", "lse", "delta"):
        if argument.writes.any():
            assert (argument.writes[argument.given] == 1).all(), "written once, all of it"


@interpreted
def test_packed_and_transposed_inputs() -> None:
    packed = torch.randn(2, 33, 3, 2, 64, dtype=torch.float16)
    q, k, v = packed.unbind(2)
    heads_first = torch.randn(2, 2, 33, 64, dtype=torch.float16).transpose(1, 2)
    for d_out in (heads_first, torch.ones((), dtype=torch.float16).expand(2, 33, 2, 64), heads_first.flip(3)):
        inputs = [q, k, heads_first, d_out, torch.randn(2, 2, 33)]
        check(run(inputs, 0.125), inputs, 0.125)
    # Columns that do not lie side by side.
    inputs = [q.mT.contiguous().mT, k, v, heads_first, torch.randn(2, 2, 33)]
    assert inputs[0].stride(3) != 1
    check(run(inputs, 0.125), inputs, 0.125)


@interpreted
def test_offsets_beyond_two_to_the_31() -> None:
    # Rows 4 M elements apart, memory that is never touched between them.
    room = torch.empty(2**31 + 2**24, dtype=torch.float16)
    keys = 514
    assert (keys - 1) * 2**22 > 2**31
    far = room.as_strided((1, keys, 1, 16), (0, 2**22, 16, 1))
    far.copy_(torch.randn(far.shape))
    q, d_out = torch.randn(2, 1, 3, 1, 16, dtype=torch.float16).unbind()
    inputs = [q, far, far, d_out, torch.randn(1, 1, 3)]
    check(run(inputs, 0.25), inputs, 0.25)
    inputs = [far, q, q, far, torch.randn(1, 1, keys)]
    check(run(inputs, 0.25), inputs, 0.25)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The public op on these kernels."""
    with backend("triton"):
        return attention(q, k, v, scale=scale, kv_lengths=lengths, return_lse=True)


@interpreted
# Rows of dk and dv that nobody stores may be infinite.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_scores_far_below_zero() -> None:
    # Where a key that is not there has a score of 0, it must not outweigh those that are.
    q, k, v, d_out, d_lse = problem((1, 33, 33, 1, 64), torch.float32)
    inputs = [q.abs() * 6, -k.abs() * 6, v, d_out, d_lse]
    exact = by_autograd(inputs, 0.125, torch.float64)
    assert exact[1].max() < -128 * math.log(2)
    # An exponent has the errors of 64 products and of six roundings of its own (scale, base, log-sum-exp there and
    # back), half an eps of its size each; a weight has them twice, its own and its sum's.
    largest = float(torch.einsum("bqhd,bkhd->bhqk", inputs[0], inputs[1]).abs().max() * 0.125)
    share = 2 * (64 + 6) * FLOAT32 / 2 * largest
    for name, ours, right, size in zip(NAMES, run(inputs, 0.125), exact, sizes(inputs, 0.125), strict=True):
        assert ((ours - right).abs() <= share * size).all(), name


@interpreted
def test_lengths_of_keys() -> None:
    q, k, v, d_out, d_lse = problem((2, 5, 40, 2, 40), torch.float16)
    lengths = [40, 7]
    k[1, 7:], v[1, 7:] = float("nan"), float("nan")
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out, lse = attend(leaves[0], leaves[1], leaves[2], 0.2, lengths)
    dq, dk, dv = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
    for i, count in enumerate(lengths):
        one = slice(i, i + 1)
        inputs = [q[one], k[one, :count], v[one, :count], d_out[one], d_lse[one]]
        check([out[one].detach(), lse[one].detach(), dq[one], dk[one, :count], dv[one, :count]], inputs, 0.2)
    assert not dk[1, 7:].any() and not dv[1, 7:].any()


@interpreted
def test_gradient_of_the_log_sum_exp_alone() -> None:
    q, k, v, _, d_lse = problem((1, 33, 40, 2, 40), torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k)]
    refuse = mock.patch.object(Reference, "some_gradients", side_effect=AssertionError("the reference was asked"))
    with refuse:
        gradients = torch.autograd.grad(attend(leaves[0], leaves[1], v, 0.2)[1], leaves, d_lse)
    inputs = [q, k, v, torch.zeros_like(q), d_lse]
    plain, exact = plain_run(inputs, 0.2), by_autograd(inputs, 0.2, torch.float64)
    for ours, near, right in zip(gradients, plain[2:4], exact[2:4], strict=True):
        assert_as_exact(ours, near, right)


@interpreted
def test_backward_of_another_forward() -> None:
    inputs = problem((1, 33, 40, 2, 64), torch.float16)
    q, k, v, d_out, d_lse = inputs
    out, lse = choice.PROVIDERS["aten_cpu"].forward(q, k, v, 0.125)
    gradients = TRITON.backward(d_out, q, k, v, out, lse, 0.125, d_lse, True)
    plain, exact = plain_run(inputs, 0.125), by_autograd(inputs, 0.125, torch.float64)
    for name, ours, near, right in zip(NAMES[2:], gradients, plain[2:], exact[2:], strict=True):
        assert_as_exact(ours, near, right, name)


@interpreted
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_that_nobody_needs(needed: tuple[bool, bool, bool]) -> None:
    q, k, v, d_out, d_lse = problem((1, 33, 40, 1, 40), torch.float16)
    out, lse = kernels().forward(q, k, v, 0.2)
    rest = (d_out, q, k, v, out, lse, 0.2, d_lse, True)
    with watched() as watch:
        some = TRITON.some_gradients(needed, *rest)
    for flag, one, right in zip(needed, some, TRITON.backward(*rest), strict=True):
        assert (one is None) != flag
        assert one is None or torch.equal(one, right)
    assert ("attention_dq_kernel" in watch.launches) == needed[0]
    assert ("attention_dkdv_kernel" in watch.launches) == any(needed[1:])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_keys_in_two_parts_merge_by_their_log_sum_exp(dtype: torch.dtype) -> None:
    inputs = problem((1, 9, 71, 2, 64), dtype)
    q, k, v = inputs[:3]
    parts = [kernels().forward(q, k[:, part], v[:, part], 0.125) for part in (slice(0, 45), slice(45, None))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out.float() * (own - lse).exp().mT.unsqueeze(-1) for out, own in parts)
    # Parts are rounded to their dtype before they are merged: the output is rounded as often as a plain run's.
    exact = by_autograd(inputs, 0.125, torch.float64)
    plain = plain_run(inputs, 0.125)
    assert_as_exact(merged.to(dtype), plain[0], exact[0])
    assert_as_exact(lse, plain[1], exact[1])


@interpreted
def test_order_of_keys_and_queries_does_not_matter() -> None:
    inputs = problem((1, 37, 71, 1, 40), torch.float32)
    q, k, v, d_out, d_lse = inputs
    rows, columns = torch.randperm(37), torch.randperm(71)
    out, lse, dq, dk, dv = run([q[:, rows], k[:, columns], v[:, columns], d_out[:, rows], d_lse[..., rows]], 0.2)
    back, home = rows.argsort(), columns.argsort()
    check([out[:, back], lse[..., back], dq[:, back], dk[:, home], dv[:, home]], inputs, 0.2)


@interpreted
def test_a_batch_is_its_samples() -> None:
    inputs = problem((3, 33, 40, 2, 40), torch.float16)
    whole = run(inputs, 0.2, splits=2)
    for i in range(3):
        for both, alone in zip(whole, run([tensor[i : i + 1] for tensor in inputs], 0.2, splits=2), strict=True):
            assert torch.equal(both[i : i + 1], alone)


@interpreted
def test_number_of_splits() -> None:
    inputs = problem((1, 257, 31, 2, 64), torch.float32)
    q, k, v, d_out, d_lse = inputs
    out, lse = kernels().forward(q, k, v, 0.125)
    made = {
        splits: kernels().backward(d_out, q, k, v, out, lse, 0.125, d_lse, splits=splits)
        for splits in (1, 2, 3, 9, 100)
    }
    # Two orders of one float32 sum: each is off by at most (terms - 1) half an eps of the sum of its sizes. A query's
    # own term has the same bits in each, up to the order of its tile's products, one more sum of 64.
    for splits, (dq, dk, dv) in made.items():
        assert torch.equal(dq, made[1][0])
        for ours, base, size in zip((dk, dv), made[1][1:], sizes(inputs, 0.125)[3:], strict=True):
            bound = (257 + 64) * FLOAT32 * size
            assert ((ours - base).abs() <= bound).all(), splits
    assert not torch.equal(made[3][1], made[1][1])  # it was split


@interpreted
def test_directional_derivatives() -> None:
    inputs = [tensor.contiguous() for tensor in problem((1, 33, 40, 1, 64), torch.float32)]
    d_out, d_lse = inputs[3:]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float]:
        out, lse = kernels().forward(q, k, v, 0.2)
        terms = [(out.double() * d_out).flatten(), (lse.double() * d_lse).flatten()]
        return float(torch.cat(terms).sum()), float(torch.cat(terms).abs().sum())

    gradients = run(inputs, 0.2)[2:]
    for index, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        slopes = []
        for step in (0.02, 0.04):
            values = []
            for sign in (1, -1):
                moved = list(inputs[:3])
                moved[index] = moved[index] + sign * step * direction
                value, size = loss(*moved)
                values.append(value)
            slopes.append((values[0] - values[1]) / (2 * step))
        ours = float((gradient.double() * direction).sum())
        # Central differences miss by a step's square: a third of what doubling the step changes, taken three times.
        # Rounding: 64 products, their exponentials and 40 weights, an eps each, of independent signs: 16 eps.
        bound = abs(slopes[1] - slopes[0]) + 16 * FLOAT32 * size / 0.02
        assert abs(ours - slopes[0]) <= bound
        assert bound <= 0.03 * float(gradient.norm())  # it would see a term that is missing


@interpreted
def test_same_bits_whatever_the_order_of_programs() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    inputs = problem((1, 129, 65, 2, 40), torch.float16)
    place: Callable[..., None] = InterpreterBuilder.set_grid_idx

    def from_the_last(self: Any, *index: int) -> None:
        place(self, *(size - 1 - i for size, i in zip(self.grid_dim, index, strict=True)))

    made = []
    for order in (nullcontext(), nullcontext(), mock.patch.object(InterpreterBuilder, "set_grid_idx", from_the_last)):
        with order, poisoned():
            made.append(run(inputs, 0.2, splits=3))
    for again in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], again, strict=True))


def asked(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "batch": 1, "queries": 5, "keys": 5, "heads": 2,
        "head_dim": 64, "deterministic": True,
    }  # fmt: skip
    return Problem(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "not for torch.float64"),
        ({"head_dim": 260}, "head dimension 260 is no multiple of 8 up to 256"),
        ({"head_dim": 44}, "head dimension 44 is no multiple of 8 up to 256"),
        ({"queries": 0}, "no tokens"),
        ({"batch": 0}, "no tokens"),
        ({"device": torch.device("meta")}, "for CUDA tensors (TRITON_INTERPRET=1 runs Triton on the CPU)"),
        ({"device": torch.device("cpu")}, "for CUDA tensors (TRITON_INTERPRET=1 runs Triton on the CPU)"),
    ],
    ids=str,
)
def test_what_it_does_not_run(changes: dict[str, Any], reason: str) -> None:
    pytest.importorskip("triton")
    assert TRITON.why_not(asked(**changes), backward=False) == reason
    assert TRITON.takes_d_lse


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from prfl_fast.ops.attention import triton_provider

    monkeypatch.setattr(triton_provider, "_INSTALLED", False)
    assert TRITON.missing() == "triton is not installed (pip install triton)"


@pytest.mark.parametrize(("heads", "keys", "queries"), [(12, 512, 32760), (24, 512, 32760), (40, 512, 75600)])
def test_splits_fill_the_chip(heads: int, keys: int, queries: int) -> None:
    pytest.importorskip("triton")
    from prfl_fast.kernels.attention_settings import Chip, settings, splits_for

    chip = Chip(90, 132)
    programs = math.ceil(keys / settings(chip, 128, 2, "dkdv").block_n) * heads
    splits = splits_for(chip, programs, queries)
    waves = math.ceil(programs * splits / chip.processors)
    assert splits > 1
    assert programs * splits >= 0.85 * waves * chip.processors
    assert splits_for(chip, 4 * chip.processors, queries) == 1
    assert splits_for(chip, 1, 1) == 1
