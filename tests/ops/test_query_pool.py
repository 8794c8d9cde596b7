"""The folded pooling against nn.MultiheadAttention, against the laws of a weighted mean, and against its promises.

The bound, to first order and for independent roundings (Higham and Mary 2019): a sum of n products is off by at most
LAMBDA sqrt(n) u times the sum of the absolute products. The chain holds the query projection (n = C), the fold (C / H),
the scores (C), the softmax and the weighted sum (L each), the value and the output projection (C each). An error ds of
a score changes its weight by a factor of 1 + 2 ds at most. With S the largest score computed from absolute values and A
the result computed from absolute values, an element is off by LAMBDA u A (1 + 2 S) (sum of the sqrt(n)).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import poolranks
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prfl_fast.ops import backends, query_pool
from prfl_fast.ops.query_pool import fold_query, merge_pools, partial_pool, registration

MODULE = sys.modules["prfl_fast.ops.query_pool.reference"]
LAMBDA = 6.0
# batch, tokens, channels, heads, queries
SHAPES = [(3, 7, 12, 3, 2), (1, 1, 8, 2, 1), (2, 33, 40, 5, 3), (4, 2, 6, 1, 1), (1, 19, 5, 5, 4)]
NAMES = ["x", "queries", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias"]


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (a strided view), queries and parameters; scores of a size that makes the softmax far from uniform."""
    batch, tokens, dim, _, queries = shape
    x = torch.randn(tokens, 2 * dim, batch, dtype=torch.float64).permute(2, 0, 1)[..., ::2]
    parameters = [
        torch.randn(queries, dim),
        1.5 * torch.randn(3 * dim, dim) / math.sqrt(dim),
        torch.randn(3 * dim),
        torch.randn(dim, dim) / math.sqrt(dim),
        torch.randn(dim),
    ]
    return [tensor.to(dtype) for tensor in [x, *parameters]]


def with_module(tensors: list[Tensor], heads: int, padding: Tensor | None = None) -> Tensor:
    """The same by torch's own module, in float64, with all keys and values."""
    x, queries, *parameters = [tensor.double() for tensor in tensors]
    module = nn.MultiheadAttention(x.shape[2], heads, batch_first=True, dtype=torch.float64)
    names = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    query = queries.expand(x.shape[0], -1, -1)
    call = {"key_padding_mask": padding, "need_weights": False}
    state = dict(zip(names, parameters, strict=True))
    result: Tensor = torch.func.functional_call(module, state, (query, x, x), call)[0]
    return result


def error_bound(tensors: list[Tensor], heads: int, dtype: torch.dtype) -> Tensor:
    """The bound of the docstring, elementwise, for a computation in ``dtype``."""
    x, queries, in_weight, in_bias, out_weight, out_bias = [tensor.double().abs() for tensor in tensors]
    dim, tokens = x.shape[2], x.shape[1]
    wq, wk, wv = in_weight.chunk(3)
    bq, _, bv = in_bias.chunk(3)
    q = (queries @ wq.T + bq).unflatten(1, (heads, -1))
    score = torch.einsum("blc,hdc,qhd->bhql", x, wk.unflatten(0, (heads, -1)), q).amax() / math.sqrt(dim / heads)
    value = (x @ wv.T + bv).amax(1)  # no mean of them is larger
    size = (value @ out_weight.T + out_bias)[:, None]
    roundings = 4 * math.sqrt(dim) + math.sqrt(dim / heads) + 2 * math.sqrt(tokens)
    return LAMBDA * unit(dtype) * size * (1 + 2 * score) * roundings


def gradients(result: Tensor, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((result * weights).sum(), tensors))


def assert_close(actual: Tensor, expected: Tensor, relative: float, name: str = "") -> None:
    error = (actual.double() - expected.double()).norm()
    assert error <= relative * expected.double().norm(), (name, float(error / expected.double().norm()))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_module_in_float64(shape: tuple[int, ...]) -> None:
    tensors = [tensor.requires_grad_() for tensor in problem(shape)]
    heads = shape[3]
    expected, actual = with_module(tensors, heads), query_pool(*tensors, heads)
    assert actual.shape == (shape[0], shape[4], shape[2])
    # Both sides round.
    assert ((actual - expected).abs() <= 2 * error_bound(tensors, heads, torch.float64)).all()
    weights = torch.randn_like(expected)
    # Gradients repeat the products once in reverse: 1e3 roundings of 1e-16 with a condition of 1e2 at the most.
    key_bias = slice(shape[2], 2 * shape[2])
    for name, ours, theirs in zip(
        NAMES, gradients(actual, tensors, weights), gradients(expected, tensors, weights), strict=True
    ):
        if name == "in_proj_bias":
            assert not ours[key_bias].any()  # the module's is rounding noise
            theirs[key_bias] = 0
        if shape[1] == 1 and name == "queries":
            # One token: its weight is 1 whatever the query, a cancellation that leaves noise of eps.
            assert ours.abs().max() < 1e-13 and theirs.abs().max() < 1e-13
            continue
        assert_close(ours, theirs, 1e-11, name)


def test_without_biases() -> None:
    x, queries, in_weight, in_bias, out_weight, out_bias = problem((2, 5, 12, 3, 2))
    expected = query_pool(x, queries, in_weight, 0 * in_bias, out_weight, 0 * out_bias, 3)
    assert torch.equal(query_pool(x, queries, in_weight, None, out_weight, None, 3), expected)


def test_gradcheck() -> None:
    tensors = [tensor.requires_grad_() for tensor in problem((2, 4, 6, 2, 2))]
    assert torch.autograd.gradcheck(lambda *args: query_pool(*args, 2, lengths=[4, 2]), tensors)


def test_gradcheck_of_a_partial_state() -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    folded = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, folded: partial_pool(x, folded, [3, 4]), (x, folded))


def test_a_second_derivative_is_refused() -> None:
    tensors = [tensor.requires_grad_() for tensor in problem((1, 3, 4, 2, 1))]
    (gradient,) = torch.autograd.grad(query_pool(*tensors, 2).sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("as_tensor", [True, False])
def test_padding_is_never_read(as_tensor: bool) -> None:
    shape = (3, 9, 12, 3, 2)
    counts = [9, 1, 4]
    padding = torch.arange(9) >= torch.tensor(counts)[:, None]
    tensors = [tensor.contiguous().requires_grad_() for tensor in problem(shape)]
    weights = torch.randn(3, 2, 12, dtype=torch.float64)
    expected = with_module(tensors, 3, padding)
    expected_gradients = gradients(expected, tensors, weights)
    poisoned = tensors[0].detach().masked_fill(padding[..., None], math.nan).requires_grad_()
    tensors = [poisoned, *tensors[1:]]
    actual = query_pool(*tensors, 3, lengths=torch.tensor(counts) if as_tensor else counts)
    assert_close(actual, expected, 1e-12)
    expected_gradients[3][12:24] = 0
    for name, ours, theirs in zip(NAMES, gradients(actual, tensors, weights), expected_gradients, strict=True):
        assert_close(ours, theirs, 1e-11, name)
        if name == "x":
            assert not ours[padding].any()


def test_the_order_of_the_tokens_does_not_matter() -> None:
    x, *parameters = problem((2, 9, 12, 3, 2))
    x.requires_grad_()
    order = torch.randperm(9)
    weights = torch.randn(2, 2, 12, dtype=torch.float64)
    one, other = query_pool(x, *parameters, 3), query_pool(x[:, order], *parameters, 3)
    # The same terms added in another order: 1e2 roundings of 1e-16.
    assert_close(other, one, 1e-13)
    assert_close(*[gradients(result, [x], weights)[0] for result in (one, other)], 1e-12)


def test_a_batch_is_its_samples() -> None:
    x, *parameters = problem((4, 6, 12, 3, 2))
    together = query_pool(x, *parameters, 3)
    for index in range(4):
        assert_close(query_pool(x[index : index + 1], *parameters, 3)[0], together[index], 1e-13)
    assert not torch.allclose(together[0], together[1])
    assert query_pool(x[:0], *parameters, 3).shape == (0, 2, 12)


def test_tokens_said_twice_count_the_same() -> None:
    x, *parameters = problem((2, 6, 12, 3, 2))
    assert_close(query_pool(torch.cat([x, x], dim=1), *parameters, 3), query_pool(x, *parameters, 3), 1e-13)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 5, 1), (0, 7), (2, 0, 5)])
def test_states_of_the_parts_merge_to_the_whole(sizes: tuple[int, ...]) -> None:
    x, queries, weight, bias, *_ = problem((2, 7, 12, 3, 2))
    x.requires_grad_()
    # Scores of hundreds: merging must not overflow where one part outweighs another.
    folded = fold_query(100 * queries, weight, bias, 3, torch.float64)
    whole, _ = partial_pool(x, folded)
    sums, lse = zip(*[partial_pool(part, folded) for part in x.split(list(sizes), dim=1)], strict=True)
    merged = merge_pools(torch.stack(sums), torch.stack(lse))
    # Scores of 1e3 have roundings of 1e-13, which are relative errors of the weights.
    assert_close(merged, whole, 1e-11)
    weights = torch.randn_like(whole)
    ours, theirs = [gradients(result, [x], weights)[0] for result in (merged, whole)]
    assert_close(ours, theirs, 1e-9)  # differences of weighted sums, times scores of 1e3


def test_two_ranks_are_one_device(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(poolranks.work, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (sizes, counts) in poolranks.CASES.items():
        x, parameters, weights = poolranks.problem()
        leaves = [tensor.requires_grad_() for tensor in (x, *parameters)]
        padding = None
        if counts[0] is not None and counts[1] is not None:
            parts = [torch.arange(size) >= torch.tensor(c)[:, None] for size, c in zip(sizes, counts, strict=True)]
            padding = torch.cat(parts, dim=1)
        expected = with_module(leaves, poolranks.HEADS, padding)
        shards, *wanted = gradients(expected, leaves, weights)
        wanted[2][poolranks.DIM : 2 * poolranks.DIM] = 0
        for rank in range(2):
            result, shard, *others = found[rank][name]
            assert_close(result, expected, 1e-12, name)
            assert (shard - shards.split(list(sizes), dim=1)[rank]).norm() <= 1e-11 * shards.norm(), name
            for ours, theirs in zip(others, wanted, strict=True):
                assert_close(ours, theirs, 1e-11, name)
        assert torch.equal(found[0][name][0], found[1][name][0])
    assert all("at least one token" in found[rank]["error"][0] for rank in range(2))


@pytest.mark.parametrize("slice_elements", [None, 100])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(
    dtype: torch.dtype, x_dtype: torch.dtype, slice_elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slice_elements is not None:
        monkeypatch.setattr(MODULE, "_SLICE_ELEMENTS", slice_elements)
    shape = (3, 37, 16, 2, 2)
    x, *parameters = problem(shape, dtype)
    tensors = [x.to(x_dtype).requires_grad_(), *[parameter.requires_grad_() for parameter in parameters]]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected, actual = with_module(exact, 2), query_pool(*tensors, 2)
    assert actual.dtype == dtype
    bound = error_bound(tensors, 2, torch.float32)
    if dtype != torch.float32:
        bound = bound + unit(dtype) * expected.abs()  # the only rounding to the narrow dtype
    assert ((actual.double() - expected).abs() <= bound).all()
    # Narrow x, wide parameters: no rounding to the narrow dtype anywhere on the way to the result.
    assert (actual.double() - expected).norm() < 2e-6 * expected.norm() + unit(dtype) * expected.norm()
    weights = torch.randn_like(expected).to(dtype)
    theirs = gradients(expected, exact, weights.double())
    theirs[3][16:32] = 0
    for name, ours, wanted in zip(NAMES, gradients(actual, tensors, weights), theirs, strict=True):
        # float32 inside: 3e2 roundings at a condition of 10, at random sqrt(3e2) * 10 * 6e-8 = 1e-5; one rounding of
        # the gradient to the leaf's dtype, and for narrow parameters one of each half's gradient before they are added.
        own = x_dtype if name == "x" else dtype
        assert ours.dtype == own
        assert_close(ours, wanted, 1e-5 + 3 * unit(own), name)


def test_scores_of_thousands_do_not_overflow() -> None:
    x, queries, *parameters = problem((2, 11, 12, 3, 2), torch.float32)
    tensors = [x, 3000 * queries, *parameters]
    result = query_pool(*tensors, 3)
    assert result.isfinite().all()
    # A softmax this sharp takes one token: float64 agrees unless two scores tie.
    assert_close(result, with_module(tensors, 3), 1e-3)


def test_autocast_stays_outside() -> None:
    tensors = problem((2, 11, 12, 3, 2), torch.float32)
    tensors[0] = tensors[0].bfloat16()
    expected = query_pool(*tensors, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(query_pool(*tensors, 3), expected)


OPS = {
    torch.ops.prfl_fast.query_pool_partial.default: registration.partial,
    torch.ops.prfl_fast.query_pool_backward.default: registration.backward,
}


class Allocations(TorchDispatchMode):
    """Elements of the largest new storage among the results of every operation, inside our own ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in OPS:
            with self:
                return OPS[func](*args)
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.seen.append((str(func), tensor.untyped_storage().nbytes() // tensor.element_size()))
        return result


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, [640, 600]])
def test_nothing_of_the_size_of_the_tokens_is_made(
    lengths: list[int] | None, x_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, tokens, dim, heads, queries = shape = (2, 640, 32, 2, 2)
    monkeypatch.setattr(MODULE, "_SLICE_ELEMENTS", 4096)
    x, *parameters = problem(shape, torch.float32)
    tensors = [x.to(x_dtype).requires_grad_(), *[parameter.requires_grad_() for parameter in parameters]]
    saved: list[Tensor] = []
    with Allocations() as forward, torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):  # fmt: skip
        result = query_pool(*tensors, heads, lengths=lengths)
    scores = batch * heads * queries * tokens
    assert max(size for _, size in forward.seen) == scores < batch * tokens * dim / 7
    held = {t.untyped_storage().data_ptr(): t for t in saved}
    for tensor in tensors:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    # Beside the inputs: the scores, and matrices of parameters' and queries' size.
    assert sum(t.numel() for t in held.values()) <= scores + 4 * batch * heads * queries * dim + 4 * dim * dim
    with Allocations() as backward:
        torch.autograd.grad(result.sum(), tensors)
    large = [name for name, size in backward.seen if size >= batch * tokens * dim / 2]
    assert large == ["aten.empty_like.default" if lengths is None else "aten.zeros_like.default"]  # the gradient of x


WRONG = {
    "rank": ({"x": torch.zeros(3, 4)}, ValueError, r"x: expected tokens \[B, L, C\], got shape \(3, 4\)"),
    "no tokens": ({"x": torch.zeros(2, 0, 12)}, ValueError, "x: expected at least one token"),
    "queries": ({"queries": torch.zeros(2, 11)}, ValueError, r"queries: expected \[Q, 12\] with Q >= 1, got \(2, 11\)"),
    "no query": ({"queries": torch.zeros(0, 12)}, ValueError, r"queries: .* got \(0, 12\)"),
    "heads": ({"num_heads": 5}, ValueError, "num_heads: expected a divisor of the 12 channels, got 5"),
    "zero heads": ({"num_heads": 0}, ValueError, "num_heads: .* got 0"),
    "weight": ({"in_proj_weight": torch.zeros(12, 12)}, ValueError, r"in_proj_weight: expected shape \(36, 12\)"),
    "bias": ({"out_proj_bias": torch.zeros(11)}, ValueError, r"out_proj_bias: expected shape \(12,\), got \(11,\)"),
    "dtype": ({"out_proj_weight": torch.zeros(12, 12).half()}, TypeError, "out_proj_weight: expected the dtype of q"),
    "integers": ({"x": torch.zeros(2, 5, 12, dtype=torch.int64)}, TypeError, "x: expected a floating point dtype"),
    "device": ({"queries": torch.zeros(2, 12, device="meta")}, ValueError, "queries: expected the device of x, cpu"),
    "too few lengths": ({"lengths": [3]}, ValueError, r"lengths: expected one per sample \(2\), got \[3\]"),
    "zero length": ({"lengths": [3, 0]}, ValueError, r"lengths: expected integers in 1..5, got \[3, 0\]"),
    "too long": ({"lengths": torch.tensor([3, 6])}, ValueError, r"lengths: expected integers in 1..5, got \[3, 6\]"),
    "float lengths": ({"lengths": torch.tensor([3.0, 5.0])}, TypeError, "lengths: expected integers, got torch.float"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    change, error, message = WRONG[case]
    arguments = dict(zip(NAMES, problem((2, 5, 12, 3, 2), torch.float32), strict=True)) | {"num_heads": 3}
    with pytest.raises(error, match=message):
        query_pool(**(arguments | change))


def test_opcheck() -> None:
    x, folded = torch.randn(2, 5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for lengths in (None, [5, 2]):
        torch.library.opcheck(torch.ops.prfl_fast.query_pool_partial.default, (x, folded, lengths, "reference"))
    with torch.no_grad():
        kept = torch.ops.prfl_fast.query_pool_partial(x, folded, None, "reference")
    given = (x.detach(), folded.detach(), *kept, torch.randn(2, 3, 4))
    for needed in ([True, True], [False, True], [True, False]):
        for d_lse in (None, torch.randn(2, 3)):
            arguments = (*given, d_lse, None, needed, "reference")
            torch.library.opcheck(torch.ops.prfl_fast.query_pool_backward.default, arguments)


def test_compiled_whole() -> None:
    tensors = [tensor.requires_grad_() for tensor in problem((2, 9, 12, 3, 2), torch.float32)]

    def pool(*leaves: Tensor) -> Tensor:
        return query_pool(*leaves, 3, lengths=[9, 4])

    expected = pool(*tensors)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    counter = CompileCounter()
    for backend in (counter, "aot_eager"):
        actual = torch.compile(pool, fullgraph=True, backend=backend)(*tensors)
        assert torch.equal(actual, expected)
        for gradient, right in zip(torch.autograd.grad(actual.square().sum(), tensors), wanted, strict=True):
            # The compiler may add the gradients of one tensor's parts in another order.
            assert torch.allclose(gradient, right, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("wanted", [("x",), ("folded",)])
def test_no_dead_gradient_is_computed(wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = MODULE.backward

    def noted(*arguments: Any) -> Any:
        asked.append(list(arguments[-1]))
        return original(*arguments)

    monkeypatch.setattr(MODULE, "backward", noted)
    x = torch.randn(2, 5, 4, requires_grad="x" in wanted)
    folded = torch.randn(3, 4, requires_grad="folded" in wanted)
    sums, lse = partial_pool(x, folded)
    leaf = x if "x" in wanted else folded
    (alone,) = torch.autograd.grad([sums, lse], leaf, [torch.ones_like(sums), torch.ones_like(lse)])
    assert asked == [["x" in wanted, "folded" in wanted]]
    both = [t.detach().requires_grad_() for t in (x, folded)]
    sums, lse = partial_pool(*both)
    expected = torch.autograd.grad([sums, lse], both, [torch.ones_like(sums), torch.ones_like(lse)])
    assert torch.equal(alone, expected["x" not in wanted])


def test_triton_is_refused_on_the_cpu() -> None:
    if backends.triton_interprets():
        pytest.skip("Triton runs here")
    tensors = problem((2, 5, 12, 3, 2), torch.float32)
    with backends.backend("triton"), pytest.raises(RuntimeError, match="backend: 'triton'"):
        query_pool(*tensors, 3)
