"""qk_norm_rope in plain torch: the formulas that the kernels are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from plainerror import assert_as_exact, assert_same_formula
from qkcases import BF16, F32, F64, HALF, VARIANTS, Case, angles_of, in_float64, leaves_of, ours, plain, run
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from prfl_fast.ops import qk_norm_rope
from prfl_fast.ops.qk_norm_rope.op import can_undo


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_by_finite_differences(name: str) -> None:
    case = replace(VARIANTS[name], dtype=F64, layout="plain", batch=VARIANTS[name].angles_batch, length=4, rope=None)
    leaves = leaves_of(case)

    def call(*tensors: Tensor) -> Tensor:
        return ours(case, dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_torchs_functions_in_float64(name: str) -> None:
    case = replace(VARIANTS[name], dtype=F64)
    leaves = leaves_of(case)
    actual, expected = run(case, leaves, ours), run(case, leaves, plain)
    # Divided by a weight, roundings grow by its inverse; below 1e-3 the input is kept and nothing is divided.
    grow = 1 / min(1.0, case.least) if case.least >= 1e-3 else 1.0
    for key, value in actual.items():
        assert_same_formula(value / grow, expected[key] / grow, key)


@pytest.mark.parametrize("dtype", [F32, BF16, HALF])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_further_from_float64_than_plain_torch(name: str, dtype: torch.dtype) -> None:
    case = replace(VARIANTS[name], dtype=dtype)
    leaves = leaves_of(case)
    actual, expected, exact = run(case, leaves, ours), run(case, leaves, plain), in_float64(case, leaves)
    for key, value in actual.items():
        assert_as_exact(value, expected[key], exact[key], key)


@pytest.mark.parametrize("spread", [1, 8, 100, 1000])
@pytest.mark.parametrize("rotated", [True, False])
def test_weights_of_different_sizes(spread: float, rotated: bool) -> None:
    """A small weight beside a large one in a rotated pair: the rounding of the pair is that of the large one."""
    case = Case(length=150, heads=4, dim=32, dtype=BF16, tables=int(rotated))
    leaves = leaves_of(case)
    leaves["weight"] = (0.9 * spread ** -torch.rand(128)).to(BF16).requires_grad_()
    actual, expected, exact = run(case, leaves, ours), run(case, leaves, plain), in_float64(case, leaves)
    for key, value in actual.items():
        assert_as_exact(value, expected[key], exact[key], key)


def saved(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ours(case, leaves)
    return out, kept


def test_the_result_is_kept_and_not_the_input() -> None:
    case = Case(kind="layer", biased=True)
    leaves = leaves_of(case)
    out, kept = saved(case, leaves)
    large = [tensor for tensor in kept if tensor.shape == out.shape]
    assert [tensor.data_ptr() for tensor in large] == [out.data_ptr()]
    small = leaves_of(replace(case, least=0.0005))
    small["weight"].data[3] = 0.0005
    out, kept = saved(case, small)
    large = [tensor for tensor in kept if tensor.shape == out.shape]
    assert [tensor.data_ptr() for tensor in large] == [small["x"].data_ptr()]


def test_when_the_result_can_be_undone() -> None:
    weight = torch.full((8,), 0.5)
    assert can_undo(None, None)
    assert can_undo(weight, None)
    assert can_undo(weight, torch.full((8,), 3.9))
    assert not can_undo(weight, torch.full((8,), 4.1))
    assert can_undo(None, torch.full((8,), 8.0))
    assert not can_undo(None, torch.full((8,), -8.1))
    for value in (0.0, 0.0009, -0.0009, float("nan")):
        other = weight.clone()
        other[3] = value
        assert not can_undo(other, None)
    # Beside each other in a pair; without a rotation each stands for itself.
    uneven = torch.tensor([0.5, 0.02, 0.5, 0.5])
    assert not can_undo(uneven, None)
    assert can_undo(uneven, None, pairs=0)
    assert not can_undo(uneven, None, pairs=2, dim=4, interleaved=False)
    assert can_undo(uneven[[2, 3, 0, 1]], None, pairs=1, dim=4)
    alike = torch.tensor([0.5, 0.02, 0.5, 0.02])
    assert can_undo(alike, None, pairs=2, dim=4, interleaved=False)
    assert not can_undo(alike, None, pairs=2, dim=4)
    assert not can_undo(torch.tensor([0.1, 0.8]), torch.tensor([0.0, 1.0]))


def test_a_weight_is_read_once_for_as_long_as_it_stays() -> None:
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    weight, bias = torch.full((8,), 0.5), torch.ones(8)
    with Reads():
        results = [can_undo(weight, bias) for _ in range(3)]
        assert results == [True] * 3 and Reads.count == 1
        bias.fill_(5.0)
        assert not can_undo(weight, bias) and Reads.count == 2
        bias.data = torch.ones(8)
        assert can_undo(weight, bias)
        assert can_undo(weight, None)
        weight.mul_(1e-4)
        assert not can_undo(weight, None)


def test_queries_and_keys_of_their_own_lengths() -> None:
    q, k = torch.randn(2, 5, 4, 8, dtype=F64), torch.randn(2, 3, 2, 8, dtype=F64)
    q_weight, k_weight, k_bias = torch.rand(32) + 1, torch.rand(16) + 1, torch.rand(16)
    both = qk_norm_rope(q, k, q_weight, k_weight, None, k_bias)
    assert torch.equal(both[0], qk_norm_rope(q, None, q_weight))
    assert torch.equal(both[1], qk_norm_rope(k, None, k_weight, None, k_bias))
    narrow = qk_norm_rope(q.to(BF16), k.float())
    assert (narrow[0].dtype, narrow[1].dtype) == (BF16, F32)
    assert both[0].is_contiguous() and both[1].is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4)])
def test_no_tokens(shape: tuple[int, int, int, int]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    angles = torch.ones(1, shape[1], 1, 2)
    out = qk_norm_rope(x, None, weight, cos=angles, sin=angles)
    into_x, into_weight = torch.autograd.grad(out.sum(), [x, weight])
    assert out.shape == into_x.shape == shape
    assert not into_weight.any()


def angles(*shape: int, **options: Any) -> dict[str, Tensor]:
    return {"cos": torch.ones(*shape, **options), "sin": torch.ones(*shape, **options)}


WRONG: list[tuple[str, type[Exception], Callable[[Tensor], object]]] = [
    ("kind: expected 'rms'", ValueError, lambda x: qk_norm_rope(x, kind="none")),  # type: ignore[call-overload]
    ("eps: expected a finite", ValueError, lambda x: qk_norm_rope(x, eps=-1.0)),
    ("cos, sin: expected both", ValueError, lambda x: qk_norm_rope(x, cos=x)),
    ("q: expected float32", TypeError, lambda x: qk_norm_rope(x.int())),
    (r"q: expected \[B, L, heads", ValueError, lambda x: qk_norm_rope(x[0])),
    ("q: .* even head dimension", ValueError, lambda x: qk_norm_rope(x[..., :3])),
    (r"k: expected \[B, L, heads", ValueError, lambda x: qk_norm_rope(x, x[0])),
    (r"q_weight: expected shape \(8,\)", ValueError, lambda x: qk_norm_rope(x, None, torch.ones(4))),
    (r"q_weight: expected shape \(4,\)", ValueError, lambda x: qk_norm_rope(x, None, x[0, 0], across_heads=False)),
    ("k_bias: expected shape", ValueError, lambda x: qk_norm_rope(x, x, k_bias=torch.ones(3))),
    ("k_weight: expected a float", TypeError, lambda x: qk_norm_rope(x, x, k_weight=torch.ones(8, dtype=torch.int64))),
    ("q_bias: expected shape", ValueError, lambda x: qk_norm_rope(x, q_bias=torch.ones(8, device="meta"))),
    (r"cos: expected \[1 or 2, 3,", ValueError, lambda x: qk_norm_rope(x, **angles(1, 4, 1, 2))),
    (r"cos: expected \[1 or 2, 2,", ValueError, lambda x: qk_norm_rope(x, **angles(1, 3, 1, 2), rope_tokens=(1, 3))),
    ("cos: expected .* at most 2", ValueError, lambda x: qk_norm_rope(x, **angles(1, 3, 1, 3))),
    ("cos: expected .* 1 or 2,", ValueError, lambda x: qk_norm_rope(x, **angles(1, 3, 3, 2))),
    ("cos: expected", ValueError, lambda x: qk_norm_rope(x, **angles(3, 2))),
    ("cos: expected a tensor without", ValueError, lambda x: qk_norm_rope(x, **angles(1, 3, 1, 2, requires_grad=True))),
    ("cos: expected a floating", TypeError, lambda x: qk_norm_rope(x, **angles(1, 3, 1, 2, dtype=torch.int32))),
    (
        "sin: expected the shape of cos", ValueError,
        lambda x: qk_norm_rope(x, cos=torch.ones(1, 3, 1, 2), sin=torch.ones(2, 3, 1, 2)),
    ),
    ("rope_tokens: expected 0 <= start", ValueError, lambda x: qk_norm_rope(x, rope_tokens=(2, 5))),
    ("rope_tokens: expected 0 <= start", ValueError, lambda x: qk_norm_rope(x, rope_tokens=(-1, 2))),
    (r"rope_tokens: .* \(k\)", ValueError, lambda x: qk_norm_rope(x, x[:, :2], rope_tokens=(0, 3))),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_wrong_arguments(index: int) -> None:
    message, kind, call = WRONG[index]
    with pytest.raises(kind, match=message):
        call(torch.randn(2, 3, 2, 4))


def test_differentiable_once() -> None:
    x = torch.randn(1, 2, 1, 4, requires_grad=True)
    (into,) = torch.autograd.grad(qk_norm_rope(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        into.sum().backward()


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("x", "weight", "bias")])
def test_no_dead_gradient_is_computed(wanted: tuple[str, ...]) -> None:
    asked: list[list[int]] = []

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.prfl_fast.qk_norm_rope_backward.default:
                asked.append([index for index, number in enumerate(args[13]) if number >= 0])
            return func(*args, **(kwargs or {}))

    case = Case(biased=True)
    leaves = leaves_of(case)
    everything = run(case, leaves, ours)
    some = {k: v.detach().requires_grad_(k in wanted) for k, v in leaves.items()}
    generator = torch.Generator().manual_seed(case.dim)
    out = ours(case, some)
    with Counter():
        cotangent = torch.randn(out.shape, generator=generator).to(BF16).float()
        gradients = torch.autograd.grad(out, [some[name] for name in wanted], cotangent)
    assert asked == [[index for index, name in enumerate(("x", "weight", "bias")) if name in wanted]]
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, everything[f"gradient of {name}"])


@pytest.mark.parametrize("kept_output", [True, False])
def test_opcheck(kept_output: bool) -> None:
    x = torch.randn(2, 3, 2, 4, requires_grad=True)
    own = (torch.rand(4) + 1).requires_grad_()
    angle = torch.rand(1, 2, 1, 2)
    forward = (x, own, own, angle, angle, 1e-6, False, False, True, 1, kept_output, "reference")
    torch.library.opcheck(torch.ops.prfl_fast.qk_norm_rope.default, forward)
    t, statistic = x.detach(), torch.rand(2, 3, 2)
    backward = (t, own.detach(), own.detach(), angle, angle, statistic, statistic, t, False, False, True, 1)
    for dtypes in ((0, 3, -1), (-1, -1, 0)):
        given = (*backward, kept_output, dtypes, "reference")
        torch.library.opcheck(torch.ops.prfl_fast.qk_norm_rope_backward.default, given)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.weight = torch.nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).unbind(2)
        q, k = qk_norm_rope(q, k, self.weight, self.weight, cos=cos, sin=sin)
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )


def test_compiled_whole() -> None:
    torch.manual_seed(0)
    block, counter = Attention(), CompileCounter()
    x = torch.randn(2, 6, 8, requires_grad=True)
    cos, sin = angles_of(Case(length=6, dim=4))
    wanted = [x, *block.parameters()]
    expected_out = block(x, cos, sin)
    expected = torch.autograd.grad(expected_out.square().sum(), wanted)
    torch._dynamo.reset()
    for backend in (counter, "aot_eager"):
        out = torch.compile(block, fullgraph=True, backend=backend)(x, cos, sin)
        gradients = torch.autograd.grad(out.square().sum(), wanted)
        assert torch.equal(out, expected_out)
        for gradient, right in zip(gradients, expected, strict=True):
            # Compiled, the backward starts from the input: other roundings.
            assert torch.allclose(gradient, right, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


# Laws, which need no reference.


@pytest.mark.parametrize("name", ["Wan", "LTX", "CogVideoX", "part of a head, half-split", "small weights"])
def test_directional_derivatives(name: str) -> None:
    case = replace(VARIANTS[name], dtype=F64)
    leaves = {k: v.detach() for k, v in leaves_of(case).items()}
    direction = {k: torch.randn_like(v) * (v.abs() if k == "weight" else 1) for k, v in leaves.items()}
    step = 1e-5  # the error of the third derivative is 1e-10, of rounding 1e-16 / 1e-5

    def value(at: float) -> float:
        moved = {k: v + at * direction[k] for k, v in leaves.items()}
        return float(ours(case, moved).sin().sum())

    fresh = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    ours(case, fresh).sin().sum().backward()
    along = sum(float((v.grad.nan_to_num() * direction[k].nan_to_num()).sum()) for k, v in fresh.items())
    assert (value(step) - value(-step)) / (2 * step) == pytest.approx(along, rel=1e-6, abs=1e-6)


def test_turning_back_undoes_the_rotation() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=F64)
    for interleaved in (True, False):
        cos, sin = (t.double() for t in angles_of(Case(rotated=6)) if t is not None)
        size = torch.sqrt(cos.square() + sin.square())
        cos, sin = cos / size, sin / size
        options: dict[str, Any] = {"eps": 0.0, "across_heads": False, "interleaved": interleaved}
        once = qk_norm_rope(x, cos=cos, sin=sin, **options)
        # A rotation keeps the mean square, so the second norm does nothing.
        back = qk_norm_rope(once, cos=cos, sin=-sin, **options)
        assert_same_formula(back, qk_norm_rope(x, **options))
        assert not torch.allclose(once, back)


def test_relative_positions_alone_matter() -> None:
    """The scores of rotated queries and keys depend on the distance of their tokens (arXiv 2104.09864, section 3.2)."""
    case = Case(batch=1, length=9, heads=1, dim=8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=F64).expand(2, 1, 9, 1, 8)
    angle = torch.arange(9.0, dtype=F64)[None, :, None, None] * torch.tensor([1.0, 0.5, 0.1, 0.02], dtype=F64)
    for interleaved in (True, False):
        turned = qk_norm_rope(q, k, cos=angle.cos(), sin=angle.sin(), interleaved=interleaved)
        scores = turned[0][0, :, 0] @ turned[1][0, :, 0].t()
        for distance in range(-case.length + 2, case.length - 1):
            line = scores.diagonal(distance)
            assert_same_formula(line, line[:1].expand_as(line))


def test_samples_and_tokens_do_not_know_each_other() -> None:
    case = Case(batch=3, tables=3, angles_batch=1, layout="packed")
    leaves = leaves_of(case)
    whole = ours(case, leaves)
    order = torch.randperm(3)
    moved = {**leaves, "x": leaves["x"].detach()[order]}
    assert torch.equal(ours(case, moved), whole[order])
    plain_case = replace(case, tables=0)
    whole = ours(plain_case, leaves)
    order = torch.randperm(5)
    moved = {**leaves, "x": leaves["x"].detach()[:, order]}
    assert torch.equal(ours(plain_case, moved), whole[:, order])
