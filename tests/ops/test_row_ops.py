"""modulated_norm, gated_residual, gated_residual_norm in plain torch: the formulas that the kernels are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from plainerror import assert_as_exact, assert_same_formula
from rowcases import BF16, F32, F64, HALF, MODULATIONS, OPS, Case, in_float64, leaves_of, ours, plain, run, views
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from prfl_fast import ops
from prfl_fast.ops import gated_residual, gated_residual_norm, modulated_norm


def double(case: Case, **changes: Any) -> Case:
    return replace(case, dtype=F64, modulation=F64, **changes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["none", "flat", "token", "runs", "many runs", "shared runs", "rms affine", "no gate"])
def test_gradients_by_finite_differences(op: str, name: str) -> None:
    base = MODULATIONS[name]
    case = double(base, op=op, channels=3)
    leaves = leaves_of(replace(case, sliced=False))
    used = {k: v for k, v in leaves.items() if k != "mods"}
    arguments = [*used.values()]
    if "mods" in leaves:
        arguments.append(leaves["mods"].detach()[:, :, :3].clone().requires_grad_())

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(used, tensors, strict=False))
        if "mods" in leaves:
            given["mods"] = tensors[-1]
        return tuple(ours(case, views(case, given)))

    assert torch.autograd.gradcheck(call, tuple(arguments), fast_mode=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", MODULATIONS)
def test_equal_to_torchs_functions_in_float64(op: str, name: str) -> None:
    case = double(MODULATIONS[name], op=op)
    leaves = leaves_of(case)
    actual, expected = run(case, leaves, ours), run(case, leaves, plain)
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert_same_formula(value, expected[key], key)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "modulation"), [(F32, F32), (BF16, F32), (BF16, BF16), (HALF, HALF), (F32, BF16), (F64, F32)]
)
def test_no_further_from_float64_than_plain_torch(op: str, dtype: torch.dtype, modulation: torch.dtype) -> None:
    for name in ("sample", "runs", "token", "rms affine", "affine", "sliced"):
        case = replace(MODULATIONS[name], op=op, dtype=dtype, modulation=modulation, channels=67)
        leaves = leaves_of(case)
        actual, expected, exact = run(case, leaves, ours), run(case, leaves, plain), in_float64(case, leaves)
        assert actual.keys() == exact.keys()
        for key, value in actual.items():
            assert_as_exact(value, expected[key], exact[key], f"{name}, {key}")


def test_a_term_too_few_would_be_seen() -> None:
    case = replace(MODULATIONS["runs"], dtype=BF16, channels=67)
    leaves = leaves_of(case)
    expected, exact = run(case, leaves, plain), in_float64(case, leaves)
    wrong = run(case, {**leaves, "mods": leaves["mods"].detach().roll(1, dims=1)}, ours)
    with pytest.raises(AssertionError):
        assert_as_exact(wrong["output 1"], expected["output 1"], exact["output 1"])


def test_the_norm_is_of_the_rounded_stream() -> None:
    case = replace(MODULATIONS["sample"], dtype=BF16, channels=64, sliced=True)
    a = views(case, leaves_of(case))
    stream, normed = ours(case, a)
    assert torch.equal(normed, modulated_norm(stream, a["scale"], a["shift"]))
    assert torch.equal(stream, gated_residual(a["x"], a["y"], a["gate"]))


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("op", OPS)
def test_no_tokens_and_one_token(op: str, shape: tuple[int, int, int]) -> None:
    batch, length, channels = shape
    case = replace(double(MODULATIONS["affine"]), op=op, batch=batch, length=length, channels=channels)
    leaves = leaves_of(case)
    actual, expected = run(case, leaves, ours), run(case, leaves, plain)
    for key, value in actual.items():
        assert value.shape == expected[key].shape
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-12)


def test_any_strides() -> None:
    x = torch.randn(5, 4, 3, dtype=F64).permute(2, 1, 0)  # the last stride is not 1
    scale = torch.randn(5, 3, dtype=F64).t()
    weight = torch.randn(10, dtype=F64)[::2]
    assert torch.equal(modulated_norm(x, scale, weight=weight), modulated_norm(x.contiguous(), scale, weight=weight))
    expanded = torch.randn(1, 1, 5, dtype=F64).expand(3, 4, 5).requires_grad_()
    (into,) = torch.autograd.grad(modulated_norm(expanded, scale).square().sum(), expanded)
    assert into.shape == expanded.shape
    # A cotangent that is one number everywhere, as a sum gives.
    y = torch.randn(3, 4, 5, dtype=F64, requires_grad=True)
    (into,) = torch.autograd.grad(gated_residual(x, y, scale).sum(), y)
    assert torch.equal(into, scale.unsqueeze(1).expand_as(y))


WRONG: list[tuple[str, type[Exception], Callable[[Tensor], object]]] = [
    ("x: expected tokens", ValueError, lambda x: modulated_norm(x[0])),
    ("x: expected tokens", ValueError, lambda x: modulated_norm(x[..., :0])),
    ("x: expected float32", TypeError, lambda x: modulated_norm(x.long())),
    ("residual: expected tokens", ValueError, lambda x: gated_residual(x[0], x)),
    ("residual: expected tokens", ValueError, lambda x: gated_residual_norm(x[0], x)),
    ("y: expected the shape", ValueError, lambda x: gated_residual(x, x[:, :2])),
    ("y: expected float32", TypeError, lambda x: gated_residual(x, x.bool())),
    ("kind: expected 'layer'", ValueError, lambda x: modulated_norm(x, kind="batch")),  # type: ignore[arg-type]
    ("eps: expected a finite", ValueError, lambda x: modulated_norm(x, eps=-1.0)),
    ("eps: expected a finite", ValueError, lambda x: modulated_norm(x, eps=float("nan"))),
    ("weight: expected shape", ValueError, lambda x: modulated_norm(x, weight=x[0, 0, :2])),
    ("weight: expected a floating", TypeError, lambda x: modulated_norm(x, weight=torch.ones(4, dtype=torch.int32))),
    ("bias: expected shape", ValueError, lambda x: modulated_norm(x, bias=x[0])),
    ("bias: expected shape", ValueError, lambda x: modulated_norm(x, bias=torch.ones(4, device="meta"))),
    ("scale: expected shape", ValueError, lambda x: modulated_norm(x, x[:, :2])),
    ("scale: expected shape", ValueError, lambda x: modulated_norm(x, torch.ones(3, 4))),
    ("scale: expected a floating", TypeError, lambda x: modulated_norm(x, torch.ones(2, 4, dtype=torch.bool))),
    ("shift: expected the device", ValueError, lambda x: modulated_norm(x, None, torch.ones(2, 4, device="meta"))),
    ("gate: expected shape", ValueError, lambda x: gated_residual(x, x, x[0, 0])),
    ("gate: .* with 2 segments", ValueError, lambda x: gated_residual(x, x, torch.ones(2, 5, 4), segments=(1, 2))),
    ("segments: expected positive", ValueError, lambda x: modulated_norm(x, segments=(1, 1))),
    ("segments: expected positive", ValueError, lambda x: gated_residual_norm(x, x, segments=(0, 3))),
    ("segments: expected positive", ValueError, lambda x: gated_residual(x, x, segments=())),
    ("segments: expected positive", ValueError, lambda x: gated_residual(x, x, segments=(1.0, 2.0))),  # type: ignore
    ("backend: 'triton'", RuntimeError, lambda x: with_triton(lambda: modulated_norm(x))),
]


def with_triton(call: Callable[[], object]) -> object:
    with ops.backend("triton"):
        return call()


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_wrong_arguments(index: int) -> None:
    message, kind, call = WRONG[index]
    if "triton" in message and ops.backends.triton_interprets():
        pytest.skip("Triton runs here")
    with pytest.raises(kind, match=message):
        call(torch.randn(2, 3, 4))


def test_differentiable_once() -> None:
    x = torch.randn(1, 2, 3, requires_grad=True)
    (into,) = torch.autograd.grad(modulated_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        into.sum().backward()


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what the backward op was asked for: numbers of wanted gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prfl_fast.row_backward.default:
            self.wanted.append([index for index, number in enumerate(args[12]) if number >= 0])
        return func(*args, **(kwargs or {}))


def arguments_wanting(*names: str) -> dict[str, Tensor]:
    shapes = {"x": (2, 5, 4), "y": (2, 5, 4), "gate": (2, 4), "scale": (2, 4), "shift": (2, 4), "weight": (4,)}
    shapes["bias"] = (4,)
    return {name: torch.randn(shape, requires_grad=name in names) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("wanted", "computed", "kept"),
    [
        # Indices of x, y, gate, scale, shift, weight, bias; how many tensors of token size are kept.
        (("x",), [0], 1),
        (("x", "y"), [0, 1], 1),
        (("y",), [1], 1),
        (("gate",), [2], 2),
        (("scale",), [3], 1),
        (("shift",), [4], 1),
        (("weight",), [5], 1),
        (("bias",), [6], 1),
        (("x", "y", "gate", "scale", "shift", "weight", "bias"), [0, 1, 2, 3, 4, 5, 6], 2),
    ],
)
def test_no_dead_gradient_is_computed_and_no_dead_tensor_kept(
    wanted: tuple[str, ...], computed: list[int], kept: int
) -> None:
    a = arguments_wanting(*wanted)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        stream, normed = gated_residual_norm(a["x"], a["y"], a["gate"], a["scale"], a["shift"], a["weight"], a["bias"])
    assert sizes.count(40) == kept
    with Counter() as counter:
        gradients = torch.autograd.grad((stream.sum() + normed.square().sum()), [a[name] for name in wanted])
    assert counter.wanted == [computed]
    everything = arguments_wanting(*a)
    for name, tensor in a.items():
        everything[name] = tensor.detach().requires_grad_()
    both = gated_residual_norm(*everything.values())
    expected = torch.autograd.grad(both[0].sum() + both[1].square().sum(), [everything[name] for name in wanted])
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


def test_without_a_gate_the_branch_takes_the_streams_gradient() -> None:
    x, y = torch.randn(2, 2, 5, 4, requires_grad=True).unbind(0)
    with Counter() as counter:
        stream = gated_residual(x, y)
        one, other = torch.autograd.grad(stream, [x, y], torch.randn(2, 5, 4))
    assert counter.wanted == []  # nothing is computed or copied
    assert one.data_ptr() == other.data_ptr()
    with Counter() as counter:
        stream, normed = gated_residual_norm(x, y)
        one, other = torch.autograd.grad(stream.sum() + normed.sum(), [x, y])
    assert counter.wanted == [[0]]
    assert torch.equal(one, other)
    # Another dtype of the branch has its own.
    narrow = y.detach().to(BF16).requires_grad_()
    (into,) = torch.autograd.grad(gated_residual(x, narrow).sum(), narrow)
    assert into.dtype == BF16


def test_one_output_alone() -> None:
    a = arguments_wanting("x", "y", "gate", "scale")
    names = ("x", "y", "gate")
    stream, _ = gated_residual_norm(a["x"], a["y"], a["gate"], a["scale"])
    with Counter() as counter:
        alone = torch.autograd.grad(stream.square().sum(), [a[name] for name in names])
    assert counter.wanted == [[1, 2]]
    expected = torch.autograd.grad(
        gated_residual(a["x"], a["y"], a["gate"]).square().sum(), [a[name] for name in names]
    )
    assert all(torch.equal(g, e) for g, e in zip(alone, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    x = torch.randn(2, 5, 4, requires_grad=True)
    mod = torch.randn(2, 2, 4, requires_grad=True)
    own = torch.randn(4, requires_grad=True)
    norm = (mod, mod, own, own, (2, 3), 1e-6, False, "reference")
    arguments = {
        "modulated_norm": (x, *norm),
        "gated_residual": (x, x, mod, (2, 3), "reference"),
        "gated_residual_norm": (x, x, mod, *norm),
    }[op]
    torch.library.opcheck(getattr(torch.ops.prfl_fast, op).default, arguments)
    if op == "gated_residual_norm":
        statistic = torch.randn(2, 5)
        t = x.detach()
        given = (t, t, mod.detach(), mod.detach(), 2, own.detach(), own.detach(), statistic, statistic, t, t, (2, 3))
        torch.library.opcheck(torch.ops.prfl_fast.row_backward.default, (*given, (0, 0, 3, 0, 0, 0, 0), "reference"))


class Block(torch.nn.Module):
    """The norms of a DiT block around one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.table = torch.nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift, scale, gate, last = (self.table + emb).chunk(4, dim=1)
        y = self.linear(modulated_norm(x, scale, shift))
        stream, normed = gated_residual_norm(x, y, gate, scale, kind="rms")
        return gated_residual(stream, self.linear(normed), last)


def test_compiled_whole() -> None:
    torch.manual_seed(0)
    block, counter = Block(), CompileCounter()
    x, emb = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    wanted = [x, emb, *block.parameters()]
    expected_out = block(x, emb)
    expected = torch.autograd.grad(expected_out.square().sum(), wanted)
    torch._dynamo.reset()
    for backend in (counter, "aot_eager"):
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        out = compiled(x, emb)
        gradients = torch.autograd.grad(out.square().sum(), wanted)
        assert torch.equal(out, expected_out)
        for gradient, right in zip(gradients, expected, strict=True):
            # The compiler may add the two gradients of one tensor in another order.
            assert torch.allclose(gradient, right, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


# Laws, which need no reference.


def directional(op: str, name: str) -> None:
    """The derivative along a random direction, by central differences, against the backward."""
    case = double(MODULATIONS[name], op=op, channels=11)
    leaves = {k: v.detach() for k, v in leaves_of(case).items()}
    direction = {k: torch.randn_like(v) for k, v in leaves.items()}
    step = 1e-5  # the error of the third derivative is 1e-10, of rounding 1e-16 / 1e-5

    def value(at: float) -> Tensor:
        moved = {k: v + at * direction[k] for k, v in leaves.items()}
        return sum((o.sin().sum() for o in ours(case, views(case, moved))), torch.zeros((), dtype=F64))

    fresh = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    total = sum((o.sin().sum() for o in ours(case, views(case, fresh))), torch.zeros((), dtype=F64))
    total.backward()
    along = sum(
        float((v.grad.nan_to_num() * direction[k].nan_to_num()).sum()) for k, v in fresh.items() if v.grad is not None
    )
    slope = float(value(step) - value(-step)) / (2 * step)
    assert slope == pytest.approx(along, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["sample", "token", "runs", "rms affine", "many runs"])
def test_directional_derivatives(op: str, name: str) -> None:
    directional(op, name)


@pytest.mark.parametrize("op", OPS)
def test_samples_do_not_know_each_other(op: str) -> None:
    case = replace(MODULATIONS["runs"], op=op, batch=3)
    leaves = leaves_of(case)
    whole = run(case, leaves, ours)
    generator = torch.Generator().manual_seed(case.channels)
    shapes = [value.shape for key, value in whole.items() if key.startswith("output")]
    cotangents = [torch.randn(shape, generator=generator).to(BF16).float() for shape in shapes]
    for sample in range(3):
        one = {k: v.detach()[sample : sample + 1].clone().requires_grad_() for k, v in leaves.items()}
        outputs = ours(replace(case, batch=1), views(case, one))
        gradients = torch.autograd.grad(outputs, list(one.values()), [c[sample : sample + 1] for c in cotangents])
        for index, output in enumerate(outputs):
            assert torch.equal(output[0], whole[f"output {index}"][sample])
        for key, gradient in zip(one, gradients, strict=True):
            assert torch.equal(gradient[0], whole[f"gradient of {key}"][sample])


@pytest.mark.parametrize("op", OPS)
def test_tokens_do_not_know_each_other(op: str) -> None:
    case = replace(MODULATIONS["token"], op=op, length=6)
    order = torch.randperm(6)
    a = {k: v.detach() if v is not None else None for k, v in views(case, leaves_of(case)).items()}
    moved = {k: v[:, order] if v is not None and v.ndim == 3 else v for k, v in a.items()}
    for output, other in zip(ours(case, a), ours(case, moved), strict=True):
        assert torch.equal(output[:, order], other)


def test_a_gate_of_zero_leaves_the_stream() -> None:
    case = replace(MODULATIONS["sliced"], dtype=BF16)
    a = views(case, leaves_of(case))
    stream = gated_residual(a["x"], a["y"], torch.zeros(2, 20))
    assert torch.equal(stream, a["x"])
    _, normed = gated_residual_norm(a["x"], a["y"], torch.zeros(2, 20), a["scale"], segments=case.segments)
    assert torch.equal(normed, modulated_norm(a["x"], a["scale"], segments=case.segments))
    scale = torch.full((2, 20), -1.0)
    assert torch.equal(modulated_norm(a["x"], scale, a["shift"][:, 0]), a["shift"][:, :1].to(BF16).expand(2, 7, 20))
