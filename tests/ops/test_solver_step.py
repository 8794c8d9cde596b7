"""The solver step against a dense matrix, its derivative by gradcheck, its adjoint by the inner product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prfl_fast.ops import StepCoefficients, solver_step, solver_step_transpose

SHAPES = [(3,), (2, 5), (2, 3, 1, 4, 2), (1, 1), (0, 3)]


def coefficients(n_out: int, n_in: int, n_noise: int) -> StepCoefficients:
    matrix = torch.randn(n_out, n_in + 1 + n_noise, dtype=torch.float64).tolist()
    return StepCoefficients(
        tuple(tuple(r[:n_in]) for r in matrix),
        tuple(r[n_in] for r in matrix),
        tuple(tuple(r[n_in + 1 :]) for r in matrix),
    )


def matrix_of(c: StepCoefficients) -> Tensor:
    rows = [[*a, b, *e] for a, b, e in zip(c.A, c.B, c.C, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def strided(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random, with a gap between its elements."""
    return torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(1, 1, 0), (3, 2, 0), (2, 4, 2), (1, 3, 1)])
def test_equals_the_matrix(sizes: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    c = coefficients(*sizes)
    z, noise = (tuple(strided(*shape) for _ in range(k)) for k in (sizes[1], sizes[2]))
    m = strided(*shape)
    out = solver_step(z, (m,), c, noise=noise)
    expected = torch.einsum("oi,i...->o...", matrix_of(c), torch.stack([*z, m, *noise]))
    # At most 7 terms of size below 4 in another order: 7 * 2^-53 * 30.
    assert len(out) == sizes[0] and all(o.shape == shape for o in out)
    assert torch.allclose(torch.stack(out), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    c = coefficients(3, 2, 1)
    mask = torch.rand(2, 1, 3) < 0.5 if masked else None
    inputs = [strided(2, 2, 3).requires_grad_() for _ in range(4)]

    def run(x: Tensor, h: Tensor, m: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return solver_step((x, h), (m,), c, noise=(e,), latent_mask=mask)

    def guided(x: Tensor, h: Tensor, m: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return solver_step((x, h), (m, u), coefficients_2, guidance_scale=3.5, latent_mask=mask)

    coefficients_2 = coefficients(2, 2, 0)
    for function in (run, guided):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("mask_kind", ["none", "bool", "numbers", "all", "nothing"])
@pytest.mark.parametrize("shape", SHAPES)
def test_adjoint_identity(shape: tuple[int, ...], mask_kind: str) -> None:
    c = coefficients(3, 2, 0)
    random = torch.rand(shape) < 0.5
    mask = {
        "none": None,
        "bool": random,
        "numbers": random.float(),
        "all": torch.ones(shape),
        "nothing": torch.zeros(shape, dtype=torch.bool),
    }[mask_kind]
    z, w = (tuple(strided(*shape) for _ in range(k)) for k in (2, 3))
    m = strided(*shape)
    out = solver_step(z, (m,), c, latent_mask=mask)
    into_z, (into_m,) = solver_step_transpose(w, c, latent_mask=mask)
    left = sum(float((a * b).sum()) for a, b in zip(out, w, strict=True))
    pairs = zip((*z, m), (*into_z, into_m), strict=True)
    right = sum(float((a * b).sum()) for a, b in pairs if b is not None)
    # Up to 50 elements, 9 terms each, of size some 10: 450 * 10 * 2^-53.
    assert left == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transpose_is_autograds(dtype: torch.dtype) -> None:
    c = coefficients(3, 2, 0)
    mask = torch.rand(2, 3) < 0.5
    z = tuple(torch.randn(2, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    m = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    w = tuple(torch.randn(2, 3, dtype=dtype) for _ in range(3))
    expected = torch.autograd.grad(solver_step(z, (m,), c, latent_mask=mask), (*z, m), w)
    into_z, (into_m,) = solver_step_transpose(w, c, latent_mask=mask)
    for actual, wanted in zip((*into_z, into_m), expected, strict=True):
        # Three terms below 10, each rounded to the dtype by autograd.
        assert actual is not None and actual.dtype == dtype
        assert torch.allclose(actual, wanted, rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_none_is_zero_in_the_transpose() -> None:
    c = coefficients(3, 2, 0)
    g, zero = strided(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    for mask in (None, torch.rand(2, 3) < 0.5):
        full = solver_step_transpose((zero, g, zero), c, latent_mask=mask)
        for given in ((None, g, None), (None, g)):
            into_z, into_m = solver_step_transpose(given, c, latent_mask=mask)
            pairs = zip((*into_z, *into_m), (*full[0], *full[1]), strict=True)
            assert all(a is not None and b is not None and a.equal(b) for a, b in pairs)
        assert solver_step_transpose((None, None), c, latent_mask=mask) == ((None, None), (None,))
        assert solver_step_transpose((), c, output_dtypes=(), latent_mask=mask) == ((None, None), ())
        assert solver_step_transpose((), c, output_dtypes=(torch.half,) * 2) == ((None, None), (None, None))


def test_zero_coefficients_give_zero_and_no_gradient() -> None:
    c = StepCoefficients(((0.0, 2.0), (0.0, 0.0)), (0.0, 0.0), ((), ()))
    x, h, m = torch.randn(3), torch.randn(3), torch.full((3,), torch.nan)
    first, second = solver_step((x, h), (m,), c)
    assert first.equal(2 * h) and second.equal(torch.zeros(3))
    into, (into_m,) = solver_step_transpose((x, h), c)
    assert into[0] is None and into[1] is not None and into[1].equal(2 * x) and into_m is None


def test_an_entry_handed_on_is_the_same_tensor() -> None:
    c = StepCoefficients(((0.5, 0.0), (1.0, 0.0)), (0.25, 0.0), ((), ()))
    x, h = torch.randn(3), torch.randn(3)
    assert solver_step((x, h), (h,), c)[1] is x


def test_inputs_stay_as_they_are() -> None:
    c = coefficients(2, 2, 1)
    tensors = [torch.randn(2, 3) for _ in range(5)]
    before = [t.clone() for t in tensors]
    x, h, m, e, g = tensors
    solver_step((x, h), (m,), c, noise=(e,), latent_mask=torch.rand(2, 3) < 0.5)
    solver_step_transpose((x, g), c, latent_mask=torch.rand(2, 3) < 0.5)
    assert all(a.equal(b) for a, b in zip(tensors, before, strict=True))


def test_float32_is_rounded_once() -> None:
    # Terms of size 1e4 that cancel to order 1: the float64 sum is right to 1e4 * 2^-53, so the result is the float32
    # nearest to the exact one but for ties; float32 sums would err by 1e4 * 2^-24.
    c = StepCoefficients(((1e4, -1e4 + 0.37),), (3.3,), ((),))
    x, m = torch.randn(1000), torch.randn(1000)
    h = x + 1e-4 * torch.randn(1000)
    exact = 1e4 * x.double() + (-1e4 + 0.37) * h.double() + 3.3 * m.double()
    (actual,) = solver_step((x, h), (m,), c)
    assert actual.dtype == torch.float32 and actual.equal(exact.float())


def test_nothing_is_kept_for_the_backward() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    z = tuple(torch.randn(2, 3, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        solver_step(z, (torch.randn(2, 3, requires_grad=True),), coefficients(3, 3, 0))
    assert not saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_outputs_of_any_float_dtype_are_cast_to_the_states(dtype: torch.dtype) -> None:
    c = coefficients(1, 1, 0)
    x, m = torch.randn(2, 3), torch.randn(2, 3).to(dtype).requires_grad_()
    (out,) = solver_step((x,), (m,), c)
    assert out.dtype == torch.float32 and out.equal(solver_step((x,), (m.float(),), c)[0])
    out.sum().backward()
    assert m.grad is not None and m.grad.dtype == dtype


def test_guidance_is_its_formula() -> None:
    c = coefficients(2, 2, 0)
    x, h, m, u = (torch.randn(2, 3) for _ in range(4))
    guided = solver_step((x, h), (m, u), c, guidance_scale=4.0)
    expected = solver_step((x, h), (u + 4.0 * (m - u),), c)
    assert all(a.equal(b) for a, b in zip(guided, expected, strict=True))


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (3,), (2, 1)])
def test_masks_broadcast_and_hold_entry_0_only(shape: tuple[int, ...]) -> None:
    c = coefficients(2, 2, 0)
    x, h, m = (torch.randn(2, 3) for _ in range(3))
    mask = torch.rand(shape) < 0.5
    free, held = solver_step((x, h), (m,), c), solver_step((x, h), (m,), c, latent_mask=mask)
    assert held[0].equal(torch.where(mask, free[0], x)) and held[1].equal(free[1])


def test_permutation_of_elements() -> None:
    c = coefficients(2, 2, 1)
    x, h, m, e = (torch.randn(24) for _ in range(4))
    order = torch.randperm(24)
    there = solver_step((x[order], h[order]), (m[order],), c, noise=(e[order],))
    back = solver_step((x, h), (m,), c, noise=(e,))
    assert all(a.equal(b[order]) for a, b in zip(there, back, strict=True))


X = torch.zeros(2, 3)
ONE = StepCoefficients(((1.0,),), (1.0,), ((),))
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: solver_step((X, X), (X,), ONE), ValueError, "state: expected 1 tensors, got 2"),
    (lambda: solver_step((X,), (), ONE), ValueError, r"model_outputs: expected \(m,\) or .* got 0 tensors"),
    (lambda: solver_step((X,), (X, X, X), ONE), ValueError, "model_outputs: .* got 3 tensors"),
    (lambda: solver_step((X,), (X,), ONE, noise=(X,)), ValueError, "noise: expected 0 tensors, got 1"),
    (lambda: solver_step((X.half(),), (X,), ONE), TypeError, "state: expected float32 or float64, got torch.float16"),
    (lambda: solver_step((X,), (X.T,), ONE), ValueError, r"model_outputs: expected .* \(2, 3\), got \(3, 2\)"),
    (
        lambda: solver_step((X, X.double()), (X,), StepCoefficients(((1.0, 1.0),), (1.0,), ((),))),
        ValueError,
        "state: expected one dtype and shape",
    ),
    (lambda: solver_step_transpose((X, X), ONE), ValueError, "cotangents: expected at most 1 tensors, got 2"),
    (lambda: solver_step_transpose((X,), ONE, output_dtypes=(X.dtype,) * 3), ValueError, "output_dtypes: .* got 3"),
    (lambda: solver_step((X,), (X, X), ONE, guidance_dtype=torch.int8), TypeError, "guidance_dtype: .* got torch.int8"),
    (lambda: StepCoefficients((), (), ()), ValueError, "one row per output entry, got 0, 0 and 0 rows"),
    (lambda: StepCoefficients(((1.0,),), (1.0, 2.0), ((),)), ValueError, "got 1, 2 and 1 rows"),
    (lambda: StepCoefficients(((1.0,), (1.0, 2.0)), (1.0, 2.0), ((), ())), ValueError, "rows of one length"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_wrong_input_is_named(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
