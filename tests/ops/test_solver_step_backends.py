"""Every backend of the solver step against the reference, results and gradients, with poisoned memory."""

from __future__ import annotations

import pytest
import torch
from solverstepcases import BFLOAT16_CASES, CASES, Case, Problem, check, random_coefficients

from prfl_fast import ops
from prfl_fast.ops import StepCoefficients, backends, solver_step, solver_step_transpose
from prfl_fast.ops.library import COMPILED

compiled = pytest.mark.skipif(COMPILED is None, reason="installed without compiled ops")
ALL = {**CASES, **BFLOAT16_CASES}


def named(cases: dict[str, Case]) -> list[object]:
    return [pytest.param(case, id=name) for name, case in cases.items()]


@compiled
@pytest.mark.parametrize("case", named(ALL))
def test_cpu(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", named(CASES))
def test_triton_in_its_interpreter(case: Case) -> None:
    check(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", named(ALL))
def test_gpu(case: Case, backend: str) -> None:
    check(case, backend, "cuda")


@compiled
def test_many_threads_do_the_same() -> None:
    threads = torch.get_num_threads()
    problem = Problem.draw(Case(shape=(3, 100_001), guided=True, mask=(3, 1)))
    try:
        torch.set_num_threads(1)
        one = problem.run("cpu")
        torch.set_num_threads(3)
        three = problem.run("cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(one, three, strict=True))


@compiled
def test_a_term_that_does_not_count_may_be_infinite() -> None:
    c = StepCoefficients(((0.5, 0.0), (0.0, 2.0)), (0.25, 0.0), ((), ()))
    x, h, m = torch.randn(9), torch.full((9,), torch.inf), torch.randn(9)
    for name in ("cpu", "reference"):
        with ops.backend(name):
            first, second = solver_step((x, h), (m,), c)
        assert first.isfinite().all() and second.isinf().all()


@compiled
def test_signs_of_zero_are_the_references() -> None:
    c = StepCoefficients(((-1.0, 0.0), (1.0, 1.0), (2.0, 0.0)), (0.0, 0.0, 0.0), ((), (), ()))
    x, h = torch.tensor([0.0, -0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, -0.0, 0.0])
    with ops.backend("reference"):
        expected = solver_step((x, h), (x,), c)
    with ops.backend("cpu"):
        actual = solver_step((x, h), (x,), c)
    assert all(a.signbit().equal(e.signbit()) for a, e in zip(actual, expected, strict=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_as_torch_does(dtype: torch.dtype) -> None:
    # Every 16-bit pattern in, and values around every rounding boundary out.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    c = StepCoefficients(((1.0,),), (1.0,), ((),))
    zero = torch.zeros(2**16)
    with ops.backend("cpu"):
        (widened,) = solver_step((zero,), (patterns,), c)
    assert torch.equal(widened.nan_to_num(0.5), patterns.float().nan_to_num(0.5) + 0.0)
    finite = patterns.float()[patterns.isfinite()]
    spread = torch.cat([finite * (1 + k * torch.finfo(dtype).eps / 4) for k in range(-3, 4)])
    spread = torch.cat([spread, torch.tensor([65519.99, 65520.0, 7e4, torch.inf, -torch.inf, torch.nan, 1e-8, 3e-8])])
    with ops.backend("cpu"):
        x, narrowed = solver_step((spread,), (torch.zeros_like(spread),), halves(1.0), model_dtype=dtype)
    assert torch.equal(x.nan_to_num(0.5), spread.nan_to_num(0.5))
    expected = spread.to(dtype)
    assert torch.equal(narrowed.nan_to_num(0.5), expected.nan_to_num(0.5)) and narrowed.isnan().sum() == 1


def halves(total: float) -> StepCoefficients:
    """x' = total x + m: computed, not handed on."""
    return StepCoefficients(((total,),), (1.0,), ((),))


@compiled
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_to_second_order(guided: bool, masked: bool) -> None:
    c = random_coefficients(2, 2, 1)
    mask = torch.rand(2, 1, 3) < 0.5 if masked else None
    inputs = [torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)]

    def run(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = (t[2], t[3]) if guided else (t[2],)
        with ops.backend("cpu"):
            return solver_step(t[:2], outputs, c, guidance_scale=2.5, noise=(t[4],), latent_mask=mask)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def op_arguments(device: str = "cpu") -> list[tuple[object, ...]]:
    def tensors(n: int, grad: bool = True) -> list[torch.Tensor]:
        return [torch.randn(2, 3, device=device, requires_grad=grad) for _ in range(n)]

    mask = (torch.rand(2, 1) < 0.5).to(device).expand(2, 3)
    half = torch.randn(2, 3, device=device, dtype=torch.float16, requires_grad=True)
    return [
        (tensors(2), None, None, [0.5, 2.0], -1, 1.0, 0, 0, -1),
        ([*tensors(1), half], half.detach().clone().requires_grad_(), mask, [0.5, 2.0, 1.0, 0.0], 1, 3.0, 2, 0, 2),
    ]


@compiled
@pytest.mark.parametrize("index", [0, 1])
def test_opcheck(index: int) -> None:
    torch.library.opcheck(torch.ops.prfl_fast.solver_step.default, op_arguments()[index])


@compiled
def test_opcheck_of_the_transpose() -> None:
    cotangents = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    copy = torch.randn(2, 3).half().requires_grad_()
    mask = (torch.rand(2, 1) < 0.5).expand(2, 3)
    for arguments in [
        (cotangents, None, None, [1.0, 2.0], [0], -1, 1.0, 0, -1),
        (cotangents, copy, mask, [1.0, 2.0, 3.0, 4.0], [0, 2], 1, 3.0, 2, 2),
    ]:
        torch.library.opcheck(torch.ops.prfl_fast.solver_step_transpose.default, arguments)


@compiled
def test_schemas_of_all_backends_are_one() -> None:
    for name in ("solver_step", "solver_step_transpose"):
        ours = str(getattr(torch.ops.prfl_fast, name).default._schema).partition("(")[2]
        theirs = str(getattr(torch.ops.prfl_fast, f"{name}_triton").default._schema).partition("(")[2]
        assert ours == theirs


@compiled
@pytest.mark.slow
def test_torch_compile_makes_one_graph() -> None:
    problem = Problem.draw(Case(guided=True, mask=(3, 5, 7), copy=torch.float16))
    step = torch.compile(lambda: problem.run(None), fullgraph=True, backend="aot_eager")
    expected, actual = problem.run("reference"), step()
    for mine, theirs in zip(actual, expected, strict=True):
        # Near ties aside, the same float32.
        assert (mine != theirs).sum() <= 1
    for mine, theirs in zip(problem.gradients(actual), problem.gradients(expected), strict=True):
        assert mine is not None and theirs is not None
        assert torch.allclose(mine.float(), theirs.float(), atol=5 * 2**-11 * problem.bound)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": [1.0, 2.0, 3.0]}, "rows of 2 coefficients"),
        ({"coefficients": [1.0] * 40}, "1 to 16"),
        ({"dtype": 2}, "float32 or float64 state"),
        ({"dtype": 9}, "no such dtype"),
        ({"terms": [torch.zeros(3), torch.zeros(4)]}, "one shape"),
        ({"terms": [torch.zeros(3, dtype=torch.int64)] * 2}, "float32, float64, float16 or bfloat16"),
        ({"mask": torch.zeros(3)}, "bool mask"),
        ({"unconditional": torch.zeros(3), "guided": 2}, "no such term"),
        ({"unconditional": torch.zeros(3), "guided": 1, "guidance_dtype": -1}, "no such dtype"),
        ({"unconditional": torch.zeros(3), "guided": 1, "guidance_dtype": 1}, "float64 needs a float64 state"),
        ({"unconditional": torch.zeros(3), "guided": 0, "mask": torch.zeros(3, dtype=torch.bool)}, "x as the first"),
    ],
)
def test_the_op_itself_refuses_what_would_read_wild(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "terms": [torch.zeros(3), torch.zeros(3)],
        "unconditional": None,
        "mask": None,
        "coefficients": [1.0, 2.0],
        "guided": -1,
        "guidance_scale": 1.0,
        "guidance_dtype": 0,
        "dtype": 0,
        "copy_dtype": -1,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.prfl_fast.solver_step(**{**arguments, **change})


def test_the_backend_can_be_named() -> None:
    with pytest.raises(ValueError, match="expected one of cuda, triton, cpu, reference, got 'fast'"):
        ops.backend("fast").__enter__()
    x, c = torch.randn(3), random_coefficients(1, 1, 0)
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for, but the tensors are on cpu"):
        solver_step((x,), (x,), c)
    with ops.backend("reference"), ops.backend("cuda"):
        pass
    assert backends.choose(x.device) == ("reference" if COMPILED is None else "cpu")


@compiled
def test_a_gradient_runs_where_its_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = torch.randn(3, requires_grad=True), random_coefficients(1, 1, 0)
    with ops.backend("cpu"):
        (result,) = solver_step((x,), (x,), c)
    assert "solver_step" in result.grad_fn.name()
    with ops.backend("reference"):
        result.sum().backward()
    assert x.grad is not None


OUTPUTS = [None, (), (torch.float16,), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64)]


@compiled
@pytest.mark.parametrize("output_dtypes", OUTPUTS)
def test_the_transpose_is_the_references(output_dtypes: tuple[torch.dtype, ...] | None) -> None:
    c = random_coefficients(3, 2, 0)
    told = {"output_dtypes": output_dtypes, "guidance_scale": -2.3}
    for mask in (None, torch.rand(4, 1) < 0.5):
        for missing in (None, 0, 1):
            w = [None if k == missing else torch.randn(4, 33).clamp(-3, 3) for k in range(3)]
            with ops.backend("reference"):
                expected = solver_step_transpose(w, c, latent_mask=mask, **told)
            with ops.backend("cpu"):
                actual = solver_step_transpose(w, c, latent_mask=mask, **told)
            assert len(actual[1]) == len(expected[1]) == (1 if output_dtypes is None else len(output_dtypes))
            for mine, theirs in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
                assert (mine is None) == (theirs is None)
                # Near ties aside, which hardly any of 132 elements is, the same float32, and so the same guidance.
                assert mine is None or (mine.dtype == theirs.dtype and (mine != theirs).sum() <= 1)


@compiled
@pytest.mark.parametrize("scale", [4.0, 0.3, 0.0, -1.7])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_guidance_has_the_bits_of_plain_torch(dtype: torch.dtype, lifted: bool, backend: str, scale: float) -> None:
    # 131 elements: torch's vectorised loop and its scalar tail; the strided ones take another loop of torch's.
    c = StepCoefficients(((0.9, 0.1), (0.0, 0.0)), (-0.3, 2.0), ((), ()))
    x, h, g = torch.randn(3, 5, 131)
    plain = [torch.randn(5, 131).to(dtype).requires_grad_() for _ in range(2)]
    fused = [torch.stack([m.detach()] * 2, -1)[..., 0].requires_grad_() for m in plain]
    conditional, unconditional = (m.float() if lifted else m for m in plain)
    combined = unconditional + scale * (conditional - unconditional)
    with ops.backend(backend):
        expected = solver_step((x, h), (combined,), c)
        actual = solver_step(
            (x, h), tuple(fused), c, guidance_scale=scale, guidance_dtype=torch.float32 if lifted else None
        )
    wanted = torch.autograd.grad(expected, plain, (g, h))
    gradients = torch.autograd.grad(actual, fused, (g, h))
    for mine, theirs in zip((*actual, *gradients), (*expected, *wanted), strict=True):
        assert mine.dtype == theirs.dtype and mine.equal(theirs)
