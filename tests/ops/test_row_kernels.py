"""The row kernels in Triton's interpreter: values, bounds and bytes of the launches that the public ops make.

Workspaces and results start as NaN, what lies between the rows of a slice is NaN, and every address is checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plainerror import assert_as_exact
from rowcases import BF16, F32, F64, HALF, MODULATIONS, OPS, Case, in_float64, leaves_of, ours, plain, run, views
from torch import Tensor
from tritononcpu import Watch, poisoned, watched

from prfl_fast import ops

pytestmark = pytest.mark.interpreter

# Read again by every token of a sample: a cache holds them, so memory sees each element once per launch.
PARAMETERS = ("gate", "scale", "shift", "weight", "bias")


def in_triton(case: Case, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], Watch]:
    with ops.backend("triton"), poisoned(), watched() as watch:
        return run(case, leaves, ours), watch


def check(case: Case) -> None:
    leaves = leaves_of(case)
    actual, watch = in_triton(case, leaves)
    expected, exact = run(case, leaves, plain), in_float64(case, leaves)
    assert actual.keys() == exact.keys()
    for key, value in actual.items():
        assert_as_exact(value, expected[key], exact[key], f"{case}: {key}")
    # Without a gate the gradient of a residual is passed on as it came.
    nothing = case.op == "gated_residual" and not (case.gated and case.rows)
    assert set(watch.launches) - {"column_sum_kernel"} == (
        {"row_forward_kernel"} if nothing else {"row_forward_kernel", "row_backward_kernel"}
    )


@pytest.mark.parametrize("dtype", [F32, BF16, HALF])
@pytest.mark.parametrize("channels", [1536, 1920, 2048, 3072, 5120])
def test_widths_of_models(channels: int, dtype: torch.dtype) -> None:
    check(
        Case(channels=channels, length=3, dtype=dtype, modulation=dtype, rows="segment", segments=(1, 2), sliced=True)
    )


@pytest.mark.parametrize("channels", [1, 17, 333, 257, 1025, 2047])
def test_odd_widths(channels: int) -> None:
    for op, kind in (("gated_residual_norm", "layer"), ("modulated_norm", "rms"), ("gated_residual", "layer")):
        check(Case(op=op, channels=channels, length=3, dtype=BF16, kind=kind, affine=True, sliced=True))


@pytest.mark.parametrize("length", [1, 2, 31, 257])
def test_lengths(length: int) -> None:
    check(Case(channels=24, length=length, batch=2 if length < 100 else 1))


@pytest.mark.parametrize(("op", "length"), [("modulated_norm", 769), ("gated_residual", 1023)])
def test_long_sums_of_columns(op: str, length: int) -> None:
    check(Case(op=op, batch=1, channels=16, length=length, rows="segment", segments=(length - 1, 1)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", MODULATIONS)
def test_every_modulation(op: str, name: str) -> None:
    check(replace(MODULATIONS[name], op=op))


@pytest.mark.parametrize(
    ("dtype", "modulation"), [(BF16, F32), (BF16, BF16), (HALF, HALF), (F32, BF16), (F64, F64), (F64, F32)]
)
def test_dtypes(dtype: torch.dtype, modulation: torch.dtype) -> None:
    for name in ("runs", "rms affine"):
        case = replace(MODULATIONS[name], channels=67, dtype=dtype, modulation=modulation)
        if dtype != F64:
            check(case)
            continue
        leaves = leaves_of(case)
        actual, _ = in_triton(case, leaves)
        for key, value in run(case, leaves, ours).items():
            # The kernel sums in another order; modulations in float32 have gradients in float32.
            eps = torch.finfo(value.dtype).eps
            assert torch.allclose(actual[key], value, rtol=0, atol=100 * eps * max(1, float(value.abs().max())))


def test_no_tokens() -> None:
    for shape in ((0, 3), (2, 0)):
        case = Case(batch=shape[0], length=shape[1], affine=True)
        actual, _ = in_triton(case, leaves_of(case))
        assert all(torch.isfinite(value).all() for value in actual.values())
        assert not actual["gradient of weight"].any()


def wanted_only(case: Case, names: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of these arguments, from the kernels and from the reference."""
    leaves = leaves_of(case)
    results = []
    for backend in ("triton", "reference"):
        with ops.backend(backend), poisoned():
            a = {k: None if v is None else v.detach() for k, v in views(case, leaves).items()}
            for name in names:
                a[name].requires_grad_()
            total = sum((o.double().square().sum() for o in ours(case, a)), torch.zeros((), dtype=F64))
            results.append(list(torch.autograd.grad(total, [a[name] for name in names])))
    return results[0], results[1]


@pytest.mark.parametrize("rows", ["sample", "token", "segment"])
@pytest.mark.parametrize(
    "names", [("x",), ("y",), ("gate",), ("scale",), ("shift",), ("weight",), ("bias",), ("x", "y"), ("gate", "bias")]
)
def test_some_gradients_alone(names: tuple[str, ...], rows: str) -> None:
    case = Case(rows=rows, segments=(4, 3) if rows == "segment" else (), affine=True)
    for gradient, expected in zip(*wanted_only(case, names), strict=True):
        # Sums of 14 tokens or 20 channels in another order.
        bound = 100 * torch.finfo(F32).eps * float(expected.abs().max())
        assert torch.allclose(gradient, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["runs", "affine", "many runs"])
def test_the_same_bits_in_every_run(name: str) -> None:
    case = replace(MODULATIONS[name], dtype=BF16, channels=40)
    leaves = leaves_of(case)
    first, _ = in_triton(case, leaves)
    second, _ = in_triton(case, leaves)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_sums_of_columns_do_not_depend_on_how_they_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from prfl_fast.kernels import row_launch

    # Whole numbers: every order of adding gives the same sum, so any row lost or taken twice shows.
    case = replace(MODULATIONS["sample"], op="gated_residual", length=23, channels=5)
    leaves = {k: v.detach().round().requires_grad_() for k, v in leaves_of(case).items()}

    def counted(shape: torch.Size, **_: Any) -> Tensor:
        return torch.arange(1.0, 1 + shape.numel()).view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", counted)
        expected = run(case, leaves, plain)
        for programs in (1, 5, 40):
            patch.setattr(row_launch, "_multiprocessors", lambda device, programs=programs: programs)
            patch.setattr(row_launch, "_PROGRAMS", 1)
            actual, _ = in_triton(case, leaves)
            assert torch.equal(actual["gradient of mods"], expected["gradient of mods"])


def test_samples_do_not_know_each_other() -> None:
    case = replace(MODULATIONS["runs"], dtype=BF16)
    leaves = leaves_of(case)
    whole, _ = in_triton(case, leaves)
    for sample in range(2):
        one = {k: v.detach()[sample : sample + 1] for k, v in leaves.items()}
        # Both samples alike: a cotangent belongs to a place in the batch.
        twice = {k: v.repeat(2, *[1] * (v.ndim - 1)).requires_grad_() for k, v in one.items()}
        both, _ = in_triton(case, twice)
        for key, value in both.items():
            assert torch.equal(value[sample], whole[key][sample]), key


# Bytes.

UNITS: list[tuple[str, bool, int, int]] = [
    # op, whether modulations want a gradient, tokens [L, C] read and written forward and backward (PERFORMANCE: 2 and 3
    # units for the norm, 4 and 5 or 6 for the residual with its norm).
    ("modulated_norm", False, 2, 3),
    ("modulated_norm", True, 2, 3),
    ("gated_residual", False, 3, 2),
    ("gated_residual", True, 3, 3),
    ("gated_residual_norm", False, 4, 5),
    ("gated_residual_norm", True, 4, 6),
]


@pytest.mark.parametrize(("op", "trained", "forward", "backward"), UNITS)
def test_bytes(op: str, trained: bool, forward: int, backward: int) -> None:
    batch, length, channels, width = 2, 9, 1536, 2
    case = Case(op=op, batch=batch, length=length, channels=channels, dtype=BF16, sliced=True)
    leaves = leaves_of(case)
    leaves["mods"].requires_grad_(trained)
    with ops.backend("triton"), poisoned(), watched() as watch:
        fresh = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in leaves.items()}
        outputs = ours(case, views(case, fresh))
        seen = len(watch.arguments)
        wanted = [v for v in fresh.values() if v.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    unit = batch * length * channels * width
    for part, units, kernel in (
        (watch.arguments[:seen], forward, "row_forward_kernel"),
        (watch.arguments[seen:], backward, "row_backward_kernel"),
    ):
        tokens = [a for a in part if a.kernel == kernel and a.given.sum() >= batch * length * channels]
        # Every read and write of tokens counts, not only the first of each element.
        measured = sum(a.requested for a in tokens)
        assert 1.0 <= measured / (units * unit) <= 1.02
        assert all(a.requested == a.distinct for a in tokens)
        rest = [a for a in part if not any(a is t for t in tokens)]
        assert extrapolated(rest, batch, length, channels) <= 0.02 * units * 75600 * channels * width


def extrapolated(rest: list[Any], batch: int, length: int, channels: int) -> float:
    """Bytes of modulations, statistics and partial sums for one sample of 75,600 tokens on 132 multiprocessors."""
    total = 0.0
    programs = 4  # of the interpreter: 2 for each of 2 multiprocessors
    for a in rest:
        if a.name in ("mean", "rstd"):
            total += a.requested / (batch * length) * 75600
        elif a.name in PARAMETERS or a.name == "sums":
            total += a.distinct / batch
        else:
            total += a.requested / batch / programs * 2 * 132
    return total
