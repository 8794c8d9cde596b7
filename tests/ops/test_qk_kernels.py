"""The kernels of qk_norm_rope in Triton's interpreter: values, bounds and bytes of the launches that the op makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plainerror import assert_as_exact
from qkcases import BF16, F32, F64, HALF, VARIANTS, Case, in_float64, leaves_of, ours, plain, run
from torch import Tensor
from tritononcpu import Watch, poisoned, watched

from prfl_fast import ops

pytestmark = pytest.mark.interpreter


def in_triton(case: Case, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], Watch]:
    with ops.backend("triton"), poisoned(), watched() as watch:
        return run(case, leaves, ours), watch


def check(case: Case) -> None:
    leaves = leaves_of(case)
    actual, watch = in_triton(case, leaves)
    expected, exact = run(case, leaves, plain), in_float64(case, leaves)
    for key, value in actual.items():
        assert_as_exact(value, expected[key], exact[key], f"{case}: {key}")
    assert {"qk_norm_rope_forward_kernel", "qk_norm_rope_backward_kernel"} <= set(watch.launches)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str, dtype: torch.dtype) -> None:
    check(replace(VARIANTS[name], dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, HALF])
@pytest.mark.parametrize(("heads", "dim"), [(12, 128), (24, 128), (40, 128), (30, 64), (32, 64), (48, 64)])
def test_heads_of_models(heads: int, dim: int, dtype: torch.dtype) -> None:
    base = Case(length=3, heads=heads, dim=dim, dtype=dtype, layout="packed")
    if dim == 128:
        check(base)
    else:
        check(replace(base, tables=heads, batch=1))
        check(replace(base, across=False, kind="layer", biased=True, rope=(1, 3), layout="heads"))


@pytest.mark.parametrize("length", [1, 2, 31, 257])
def test_lengths(length: int) -> None:
    check(Case(length=length, batch=2 if length < 100 else 1, heads=2, dim=16))


def test_long_sums() -> None:
    length = 769
    case = Case(length=length, batch=1, heads=1, dim=8, kind="layer", biased=True, tables=0)
    leaves = leaves_of(case)
    leaves["x"].requires_grad_(False)
    results = []
    for backend in ("triton", "reference"):
        with ops.backend(backend), poisoned():
            out = ours(case, leaves)
            results.append(torch.autograd.grad(out.square().sum(), [leaves["weight"], leaves["bias"]]))
    for actual, expected in zip(*results, strict=True):
        # Sums of about a thousand terms in another order: at most a rounding of the running sum for each.
        bound = length * torch.finfo(F32).eps * float(expected.abs().max())
        assert torch.allclose(actual, expected, rtol=0, atol=bound)


def test_float64_and_two_tensors() -> None:
    for name in ("LTX", "CogVideoX", "small weights"):
        case = replace(VARIANTS[name], dtype=F64)
        leaves = leaves_of(case)
        actual, _ = in_triton(case, leaves)
        for key, value in run(case, leaves, ours).items():
            bound = 100 * torch.finfo(F64).eps * max(1.0, float(value.abs().max())) / min(1.0, case.least)
            assert torch.allclose(actual[key], value, rtol=0, atol=bound)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("weight", "bias")])
def test_some_gradients_alone(wanted: tuple[str, ...]) -> None:
    for across in (True, False):
        case = Case(biased=True, kind="layer", across=across)
        leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in leaves_of(case).items()}
        results = []
        for backend in ("triton", "reference"):
            with ops.backend(backend), poisoned():
                out = ours(case, leaves)
                results.append(torch.autograd.grad(out.square().sum(), [leaves[name] for name in wanted]))
        for actual, expected in zip(*results, strict=True):
            bound = 100 * torch.finfo(F32).eps * float(expected.abs().max()) / case.least
            assert torch.allclose(actual, expected, rtol=0, atol=bound)


def test_no_tokens() -> None:
    for batch, length in ((0, 3), (2, 0)):
        case = Case(batch=batch, length=length)
        actual, _ = in_triton(case, leaves_of(case))
        assert not actual["gradient of weight"].any()


@pytest.mark.parametrize("name", ["LTX", "CogVideoX"])
def test_the_same_bits_in_every_run_and_sample(name: str) -> None:
    case = replace(VARIANTS[name], dtype=BF16)
    leaves = leaves_of(case)
    first, _ = in_triton(case, leaves)
    second, _ = in_triton(case, leaves)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    swapped = {k: v.detach().flip(0) if k == "x" else v for k, v in leaves.items()}
    third, _ = in_triton(case, swapped)
    assert torch.equal(third["output"].flip(0), first["output"])


def test_sums_do_not_depend_on_how_they_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from prfl_fast.kernels import qk_norm_rope

    # The bias takes the cotangent alone: of whole numbers every order of adding gives the same sum.
    case = Case(length=23, heads=2, dim=2, tables=0, biased=True)
    leaves = {k: v.detach().requires_grad_(k == "bias") for k, v in leaves_of(case).items()}
    cotangent = torch.arange(1.0, 1 + 2 * 23 * 4).view(2, 23, 2, 2)
    for programs in (1, 5, 30):
        monkeypatch.setattr(qk_norm_rope, "_PROGRAMS", programs)
        with ops.backend("triton"), poisoned():
            (into,) = torch.autograd.grad(ours(case, leaves), [leaves["bias"]], cotangent)
        assert torch.equal(into, cotangent.sum((0, 1)).flatten())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["Wan", "CogVideoX"])
def test_bytes(name: str, trained: bool) -> None:
    """2 units of tokens forward and 3 backward for each of queries and keys (PERFORMANCE: 4 and 6 for both)."""
    base = Case(layout="packed") if name == "Wan" else replace(VARIANTS[name], layout="packed")
    batch, length, heads, dim = 2, 9, 24, 64
    case = replace(base, batch=batch, length=length, heads=heads, dim=dim, dtype=BF16)
    leaves = {k: v.detach().requires_grad_(trained or k == "x") for k, v in leaves_of(case).items()}
    with ops.backend("triton"), poisoned(), watched() as watch:
        out = ours(case, leaves)
        seen = len(watch.arguments)
        torch.autograd.grad(out, [v for v in leaves.values() if v.requires_grad], torch.ones_like(out))
    unit = batch * length * heads * dim * 2
    for part, units in ((watch.arguments[:seen], 2), (watch.arguments[seen:], 3)):
        tokens = [a for a in part if a.name in ("x", "out", "kept", "d_out", "d_x")]
        # Every read and write of tokens counts, not only the first of each element.
        assert sum(a.requested for a in tokens) == units * unit
        rest = 0.0
        for a in part:
            if a.name in ("mean", "rstd", "cos", "sin"):
                # Tables are read by every head of every sample: memory sees them once.
                rest += a.distinct / (1 if a.name in ("cos", "sin") else batch) / length * 75600
            elif a.name in ("weight", "bias", "sums"):
                rest += a.distinct
            elif a not in tokens:
                rest += a.requested / batch / 4 * 2 * 132  # partial sums of 4 programs here, 264 on 132 multiprocessors
        # Statistics of every head, and a table of R / 2 cosines and sines for H heads of D, stand beside the formula.
        tables = 2 * 4 * dim // 2 * 75600
        statistics = 0 if case.across else 2 * 4 * heads * 75600
        assert rest <= 0.02 * units * 75600 * heads * dim * 2 + tables + statistics
