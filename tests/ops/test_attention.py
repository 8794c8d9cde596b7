"""Attention as users call it: values, gradients, lengths, modes, errors. CPU kernels and the reference.

Tolerances in float64 count roundings of the longest sum and of the largest exponent, times the size of the terms; in
other dtypes a result may be as far from float64 as torch's own (plainerror.py).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from plainerror import assert_as_exact
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from prfl_fast import ops
from prfl_fast.ops.attention import choice, registration
from prfl_fast.ops.attention.aten import CpuFlash
from prfl_fast.ops.attention.reference import Reference
from prfl_fast.ops.attention.trial import EXPONENTIAL

OP = sys.modules["prfl_fast.ops.attention.op"]
REFERENCE_FILE = sys.modules["prfl_fast.ops.attention.reference"]
CPU = ["aten_cpu", "reference"]
# batch, queries, keys, heads, head dimension
SHAPES = [(2, 7, 5, 3, 16), (1, 1, 1, 1, 8), (3, 33, 65, 2, 24), (1, 130, 1, 4, 5), (2, 1, 257, 1, 64)]


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradients of output and log-sum-exp; scores far from uniform."""
    batch, queries, keys, heads, dim = shape
    q = torch.randn(batch, queries, heads, dim)
    k, v = 2 * torch.randn(batch, keys, heads, dim), torch.randn(batch, keys, heads, dim)
    return [t.to(dtype) for t in (q, k, v, torch.randn_like(q), torch.randn(batch, heads, queries))]


def by_softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Independent of the reference: one matrix of scores, autograd."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
    return torch.einsum("bhlm,bmhd->blhd", torch.softmax(scores, -1), v), torch.logsumexp(scores, -1)


def everything(function: Any, tensors: list[Tensor], **arguments: Any) -> list[Tensor]:
    """Output, log-sum-exp and the three gradients through both."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    out, lse = function(*leaves, **arguments)
    gradients = torch.autograd.grad([out, lse], leaves, [tensors[3], tensors[4].to(lse.dtype)])
    return [out.detach(), lse.detach(), *gradients]


def attend(*tensors: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return ops.attention(*tensors, return_lse=True, **arguments)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notice that another backward takes the gradient of the log-sum-exp."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reaches the log-sum-exp")
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", CPU)
@pytest.mark.parametrize("forward", CPU)
def test_equals_softmax_in_float64(forward: str, backward: str, shape: tuple[int, ...]) -> None:
    tensors = problem(shape)
    scale = 0.3
    with ops.attention_provider(forward, backward), quiet():
        made = everything(attend, tensors, scale=scale)
    right = everything(by_softmax, tensors, scale=scale)
    # Sums of at most 257 terms of a softmax whose scores are below 60: 2^-53 (257 + 4 x 60) of absolute terms, which
    # are below 30 here.
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), made, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-53 * 500 * 30, msg=name)


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_equals_torch_in_its_dtype(name: str, dtype: torch.dtype) -> None:
    tensors = problem((2, 67, 41, 3, 32), dtype)[:4]
    tensors.append(torch.zeros(2, 3, 67))  # its gradient is tested above: torch's own has no log-sum-exp

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        made = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        lse = by_softmax(*(t.detach().float() for t in (q, k, v)), 32**-0.5)[1]
        return made, lse + 0 * made.sum()

    with ops.attention_provider(name), quiet():
        made = everything(attend, tensors)
    plain = everything(torchs, tensors)
    exact = everything(by_softmax, [t.double() for t in tensors], scale=32**-0.5)
    for label, ours, near, right in zip(("out", "lse", "dq", "dk", "dv"), made, plain, exact, strict=True):
        if label == "lse" and dtype != torch.float32:
            # An approximate exponential, and eight roundings of scores and sums whose size is that of the result.
            assert (ours.double() - right).abs().max() <= EXPONENTIAL + 8 * 2**-24 * right.abs().max()
            continue
        assert_as_exact(ours, near, right, label)


@pytest.mark.parametrize("name", CPU)
def test_gradcheck(name: str) -> None:
    leaves = [t.requires_grad_() for t in problem((2, 5, 4, 2, 6))[:3]]
    with ops.attention_provider(name), quiet():
        assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, scale=0.4), leaves)
        assert torch.autograd.gradcheck(lambda *t: attend(*t, scale=-0.4), leaves)
        assert torch.autograd.gradcheck(lambda *t: attend(*t, kv_lengths=[3, 4]), leaves)


def test_reference_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = problem((2, 23, 9, 3, 8))
    with ops.backend("reference"):
        whole = everything(attend, tensors)
        monkeypatch.setattr(REFERENCE_FILE, "_SCORES", 2 * 3 * 9 * 5)  # five queries at a time
        parts = everything(attend, tensors)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2**-53 * 23 * 100)


@pytest.mark.parametrize("name", CPU)
def test_slices_of_one_projection(name: str) -> None:
    packed = torch.randn(2, 19, 3, 4, 16, dtype=torch.float64)  # [B, L, q k v, H, D]
    tensors = [*packed.unbind(2), *problem((2, 19, 19, 4, 16))[3:]]
    tensors[3] = tensors[3].transpose(1, 2).contiguous().transpose(1, 2)  # a gradient with heads first
    with ops.attention_provider(name), quiet():
        made = everything(attend, tensors)
        copies = everything(attend, [t.contiguous() for t in tensors])
    for ours, theirs in zip(made, copies, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-53 * 500)


def test_the_default_scale() -> None:
    q, k, v = problem((1, 4, 6, 2, 16))[:3]
    torch.testing.assert_close(ops.attention(q, k, v), ops.attention(q, k, v, scale=0.25), rtol=0, atol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 1, 9], [9, 9, 9]], ids=str)
@pytest.mark.parametrize("name", CPU)
def test_keys_behind_the_length_are_never_read(name: str, lengths: list[int], as_tensor: bool) -> None:
    tensors = problem((3, 7, 9, 2, 16))
    for i, count in enumerate(lengths):
        tensors[1][i, count:] = float("nan")
        tensors[2][i, count:] = float("inf")
    with ops.attention_provider(name), quiet():
        made = everything(attend, tensors, kv_lengths=torch.tensor(lengths) if as_tensor else lengths)
        for i, count in enumerate(lengths):
            alone = [t[i : i + 1] for t in tensors]
            alone[1:3] = [t[:, :count] for t in alone[1:3]]
            right = everything(attend, alone)
            for j, (ours, theirs) in enumerate(zip(made, right, strict=True)):
                mine = ours[i : i + 1]
                if j > 2:
                    assert not mine[:, count:].any()
                    mine = mine[:, :count]
                torch.testing.assert_close(mine, theirs, rtol=0, atol=2**-53 * 500)


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 8), (2, 0, 4, 2, 8), (0, 0, 4, 2, 8), (2, 3, 4, 0, 8)], ids=str)
@pytest.mark.parametrize("lengths", [False, True])
def test_nothing_to_attend(shape: tuple[int, ...], lengths: bool) -> None:
    tensors = problem(shape)
    for context in (quiet(), ops.attention_provider("aten_cpu")):
        with context:
            made = everything(attend, tensors, kv_lengths=[3] * shape[0] if lengths else None)
    expected = [tensors[0], tensors[4], *tensors[:3]]
    assert [t.shape for t in made] == [t.shape for t in expected]
    assert not any(t.any() for t in made[2:])


def test_log_sum_exp_merges_parts_of_the_keys() -> None:
    q, k, v = problem((2, 5, 12, 3, 16))[:3]
    (a, lse_a), (b, lse_b) = (attend(q, k[:, part], v[:, part]) for part in (slice(0, 7), slice(7, 12)))
    whole, lse = attend(q, k, v)
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse, rtol=0, atol=2**-53 * 100)
    shares = [torch.exp(part - lse).transpose(1, 2)[..., None] for part in (lse_a, lse_b)]
    torch.testing.assert_close(shares[0] * a + shares[1] * b, whole, rtol=0, atol=2**-53 * 500)


def test_samples_do_not_meet() -> None:
    tensors = problem((3, 9, 14, 2, 16), torch.float32)
    whole = ops.attention(*tensors[:3])
    for i in range(3):
        assert torch.equal(whole[i : i + 1], ops.attention(*(t[i : i + 1] for t in tensors[:3])))


def test_a_gradient_of_the_log_sum_exp_goes_to_the_first_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_announced", set())
    q, k, v, _, d_lse = problem((2, 5, 7, 2, 8))
    leaves = [q.requires_grad_(), k.requires_grad_()]

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(attend(*leaves, v)[1], leaves, d_lse))

    with pytest.warns(UserWarning, match="the backward of aten_cpu does not take: reference runs instead, and may be"):
        made = run()
    run()  # announced once: a second warning would be an error
    right = torch.autograd.grad(by_softmax(*leaves, v, 8**-0.5)[1], leaves, d_lse)
    for ours, theirs in zip(made, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-53 * 500)


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("lengths", [None, [3, 6]], ids=str)
def test_only_wanted_gradients_are_made(name: str, wanted: tuple[int, ...], lengths: list[int] | None) -> None:
    tensors = problem((2, 5, 6, 2, 8))[:4]
    products = []
    real = torch.matmul

    def count(*arguments: Any) -> Tensor:
        products.append(1)
        return real(*arguments)

    with ops.attention_provider(name):
        full = [t.detach().requires_grad_() for t in tensors[:3]]
        right = torch.autograd.grad(ops.attention(*full, kv_lengths=lengths), full, tensors[3])
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors[:3])]
        out = ops.attention(*some, kv_lengths=lengths)
        with mock.patch.object(REFERENCE_FILE.torch, "matmul", count):
            made = torch.autograd.grad(out, [some[i] for i in wanted], tensors[3])
        # A leaf that has a gradient which this call does not ask for costs nothing either.
        asked = torch.autograd.grad(ops.attention(*full, kv_lengths=lengths), [full[i] for i in wanted], tensors[3])
    for i, ours, again in zip(wanted, made, asked, strict=True):
        assert torch.equal(ours, right[i]) and torch.equal(again, right[i])
    if name == "reference":
        # Scores; score gradients where dq or dk needs them; one product for each that is wanted. Per sample.
        per_sample = 1 + (0 in wanted or 1 in wanted) + len(wanted)
        assert len(products) == per_sample * (1 if lengths is None else 2)


def test_differentiable_once() -> None:
    leaves = [t.requires_grad_() for t in problem((1, 3, 4, 1, 8))[:3]]
    (dq,) = torch.autograd.grad(ops.attention(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="attention is differentiable once"):
        dq.sum().backward()


@pytest.mark.parametrize("lengths", [None, [3, 6]], ids=str)
@pytest.mark.parametrize("name", [*CPU, choice.UNDECIDED])
def test_opcheck(name: str, lengths: list[int] | None) -> None:
    q, k, v = (t.requires_grad_() for t in problem((2, 5, 6, 2, 8), torch.float32)[:3])
    arguments = (q, k, v, 0.3, lengths, False, name, name)
    torch.library.opcheck(torch.ops.prfl_fast.attention.default, arguments)
    detached = [t.detach() for t in (q, k, v)]
    out, lse = torch.ops.prfl_fast.attention(*detached, *arguments[3:])
    for needed in ([True, True, True], [False, True, False]):
        arguments = (torch.randn_like(out), None, *detached, out, lse, 0.3, lengths, False, needed, name)
        utils = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.prfl_fast.attention_backward.default, arguments, test_utils=utils)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: ops.attention(2 * q, k, v, return_lse=True),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for keys in (6, 11):
        tensors = [*problem((2, 5, keys, 2, 8))[:4], torch.zeros(2, 2, 5)]
        with quiet():
            made = everything(compiled, tensors)
            right = everything(lambda q, k, v: attend(2 * q, k, v), tensors)
        for ours, theirs in zip(made, right, strict=True):
            assert torch.equal(ours, theirs)
    with mock.patch.object(CpuFlash, "forward", side_effect=AssertionError("not asked for")), quiet():
        with ops.attention_provider("reference"):
            everything(compiled, tensors)
        with ops.backend("reference"):
            everything(compiled, tensors)


def test_fake_tensors_run_no_kernel() -> None:
    refuse = mock.patch.object(CpuFlash, "forward", side_effect=AssertionError("a kernel ran"))
    # Nothing is chosen either, and so nothing measured: fake tensors may pass for those of a GPU.
    unchosen = mock.patch.object(choice, "choose", side_effect=AssertionError("chosen"))
    with FakeTensorMode(), refuse, unchosen:
        q, k = torch.empty(2, 70000, 3, 64, requires_grad=True), torch.empty(2, 512, 3, 64)
        out, lse = attend(q, k, k, kv_lengths=[3, 512])
        out.sum().backward()
        assert isinstance(out, FakeTensor) and out.shape == q.shape and lse.shape == (2, 3, 70000)
        assert q.grad is not None and q.grad.shape == q.shape


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("branches", [1, 2])
def test_a_kept_attention_is_not_run_again(name: str, branches: int) -> None:
    """Selective checkpointing that keeps the op: one forward over forward and backward, the same bits."""
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    weight = torch.randn(24, 72, dtype=torch.float64, requires_grad=True)
    provider = choice.PROVIDERS[name]

    def block(x: Tensor) -> Tensor:
        q, k, v = torch.tanh(x @ weight).unflatten(-1, (3, 3, 8)).unbind(2)
        return x + ops.attention(q, k, v).flatten(2)

    def network(x: Tensor, keep: bool) -> Tensor:
        def policy(context: Any, op: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
            kept = op is torch.ops.prfl_fast.attention.default
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        if not keep:
            return block(block(x))
        for _ in range(2):
            x = checkpoint(
                block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
            )
        return x

    def run(keep: bool) -> tuple[int, Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with (
            ops.attention_provider(name),
            mock.patch.object(provider, "forward", wraps=provider.forward) as forward,
        ):
            made = [network((1 + i) * leaf, keep) for i in range(branches)]
            guided = made[0] if branches == 1 else made[1] + 5.0 * (made[0] - made[1])
            gradients = torch.autograd.grad(guided.square().sum(), [leaf, weight])
        return forward.call_count, *gradients

    (calls, *kept), (plain_calls, *plain) = run(True), run(False)
    assert calls == plain_calls == 2 * branches
    for ours, theirs in zip(kept, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_casts_as_torchs_own() -> None:
    q, k, v = problem((2, 5, 7, 2, 16), torch.float32)[:3]
    with torch.autocast("cpu", torch.bfloat16):
        for mixed in ((q, k, v), (q, k, v.bfloat16())):
            assert torch.equal(ops.attention(*mixed), ops.attention(*(t.bfloat16() for t in mixed)))
        assert ops.attention(q.double(), k.double(), v.double()).dtype == torch.float64
    # The reference's float32 is not lowered by it.
    reference = choice.PROVIDERS["reference"]
    right = reference.forward(q, k, v, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        made = reference.forward(q, k, v, 0.25)
    assert all(map(torch.equal, made, right))


def test_global_determinism_is_heard() -> None:
    seen = []

    def names(q: Tensor, k: Tensor, deterministic: bool) -> tuple[str, str]:
        seen.append(deterministic)
        return "reference", "reference"

    q, k, v = problem((1, 2, 3, 1, 8))[:3]
    with mock.patch.object(OP, "names", names):
        ops.attention(q, k, v)
        ops.attention(q, k, v, deterministic=True)
        torch.use_deterministic_algorithms(True)
        try:
            ops.attention(q, k, v)
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, True, True]


def cases() -> list[tuple[Any, type[Exception], str]]:
    def base() -> dict[str, Any]:
        q, k, v = problem((2, 3, 4, 2, 8), torch.float32)[:3]
        return {"q": q, "k": k, "v": v}

    q, k, v = base().values()
    return [
        ({"q": q[0]}, ValueError, r"q: expected \[B, L, heads, head dimension\], got shape \(3, 2, 8\)"),
        ({"q": q[..., :0]}, ValueError, r"q: expected \[B, L, heads, head dimension\], got shape \(2, 3, 2, 0\)"),
        ({"q": q.int()}, TypeError, "q: expected one dtype of float32, float64, float16 and bfloat16 for q, k and v"),
        ({"k": k.double()}, TypeError, r"k: expected one dtype .* got torch.float64 beside torch.float32"),
        ({"v": v.to("meta")}, ValueError, "v: expected the device of q, cpu, got meta"),
        ({"k": k[:1]}, ValueError, r"k: expected \[2, at least 1, 2, 8\], got shape \(1, 4, 2, 8\)"),
        ({"k": k[:, :0], "v": v[:, :0]}, ValueError, r"k: expected \[2, at least 1, 2, 8\], got shape \(2, 0, 2, 8\)"),
        ({"k": k[:, :, :1]}, ValueError, r"k: expected \[2, at least 1, 2, 8\], got shape \(2, 4, 1, 8\)"),
        ({"v": v[:, :3]}, ValueError, r"v: expected the shape of k, \(2, 4, 2, 8\), got \(2, 3, 2, 8\)"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": True}, ValueError, "scale: expected a finite number, got True"),
        ({"scale": "1"}, ValueError, "scale: expected a finite number, got '1'"),
        ({"kv_lengths": [4]}, ValueError, r"kv_lengths: expected one per sample \(2\), got \[4\]"),
        ({"kv_lengths": torch.tensor(4)}, ValueError, r"kv_lengths: expected one per sample \(2\), got 4"),
        ({"kv_lengths": [4, 5]}, ValueError, r"kv_lengths: expected integers in 1..4, got \[4, 5\]"),
        ({"kv_lengths": [0, 4]}, ValueError, r"kv_lengths: expected integers in 1..4, got \[0, 4\]"),
        ({"kv_lengths": [2.0, 4]}, ValueError, r"kv_lengths: expected integers in 1..4, got \[2.0, 4\]"),
        ({"kv_lengths": torch.tensor([1.0, 2.0])}, TypeError, "kv_lengths: expected integers, got torch.float32"),
        ({"kv_lengths": torch.tensor([True, True])}, TypeError, "kv_lengths: expected integers, got torch.bool"),
    ]


@pytest.mark.parametrize("index", range(len(cases())))
def test_wrong_arguments(index: int) -> None:
    changes, kind, message = cases()[index]
    q, k, v = problem((2, 3, 4, 2, 8), torch.float32)[:3]
    with (
        pytest.raises(kind, match=message),
        mock.patch.object(Reference, "forward", side_effect=AssertionError("work was done")),
        mock.patch.object(CpuFlash, "forward", side_effect=AssertionError("work was done")),
    ):
        ops.attention(**{"q": q, "k": k, "v": v, **changes})


def test_naming_kernels() -> None:
    leaves = [t.requires_grad_() for t in problem((1, 3, 4, 1, 8))[:3]]
    with (
        mock.patch.object(CpuFlash, "backward", side_effect=AssertionError("another was named")),
        ops.backend("reference"),  # the weaker of the two
        mock.patch.object(Reference, "forward", side_effect=AssertionError("another was named")),
    ):
        with ops.attention_provider("aten_cpu", "reference"):
            out = ops.attention(*leaves)
        out.sum().backward()
    with pytest.raises(ValueError, match="forward: expected one of aten_cudnn, .*reference, got 'fast'"):
        ops.attention_provider("fast").__enter__()
    with pytest.raises(ValueError, match="backward: expected one of aten_cudnn, .*reference, got 'fast'"):
        ops.attention_provider("reference", "fast").__enter__()
    without = "attention_provider: 'aten_flash' was asked for, but this torch is built without CUDA"
    if torch.version.cuda is None:
        with pytest.raises(RuntimeError, match=without), ops.attention_provider("aten_flash"):
            ops.attention(*leaves)
    with pytest.raises(RuntimeError, match="'triton' was asked for, but"), ops.backend("triton"):
        ops.attention(*leaves)  # float64, on a CPU
    assert choice._asked is None


def test_overhead_has_no_second_check() -> None:
    """A shape that was seen goes straight to its kernels."""
    q, k, v = problem((1, 3, 4, 1, 8))[:3]
    ops.attention(q, k, v)
    with mock.patch.object(choice, "choose", side_effect=AssertionError("chosen again")):
        ops.attention(q, k, v)
    assert math.isfinite(float(ops.attention(q, k, v).sum()))


@pytest.mark.interpreter
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_triton_by_name_launches_what_is_wanted(wanted: tuple[int, ...]) -> None:
    from tritononcpu import watched

    tensors = problem((2, 9, 14, 2, 16), torch.float32)[:4]
    full = [t.detach().requires_grad_() for t in tensors[:3]]
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors[:3])]
    with ops.backend("triton"):
        right = torch.autograd.grad(ops.attention(*full), full, tensors[3])
        out = ops.attention(*some)
        with watched() as watch:
            made = torch.autograd.grad(out, [some[i] for i in wanted], tensors[3])
    for i, ours in zip(wanted, made, strict=True):
        assert torch.equal(ours, right[i])
    assert ("attention_dq_kernel" in watch.launches) == (0 in wanted)
    assert ("attention_dkdv_kernel" in watch.launches) == (1 in wanted or 2 in wanted)
