"""The pooling kernels in Triton's interpreter: values, laws, bounds and bytes of the launches that the op makes.

Workspaces and results start as NaN, what lies between the rows of the tokens and in their padding is NaN, and every
address is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from plainerror import assert_as_exact, errors
from torch import Tensor
from tritononcpu import Watch, poisoned, watched

from prfl_fast import ops
from prfl_fast.ops.query_pool import merge_pools, partial_pool

pytestmark = pytest.mark.interpreter

HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EPS = torch.finfo(F32).eps


@dataclass(frozen=True)
class Case:
    batch: int = 2
    length: int = 31
    channels: int = 40
    rows: int = 8  # heads times queries
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = F32


# Tiles are 64 tokens for scores, 32 for sums.
CASES = {
    "one token": Case(1, 1, 40, 3),
    "two tokens": Case(2, 2, 257, 24, (1, 2)),
    "one head": Case(3, 31, 257, 1, (31, 0, 2)),
    "eight heads": Case(2, 31, 40, 8),
    "twelve heads, three queries": Case(2, 257, 40, 36, (257, 3)),
    "several tiles": Case(1, 257, 24, 12),
    "many rows": Case(2, 65, 24, 70, (65, 64)),
}


def launches() -> Any:
    from prfl_fast.kernels import query_pool_launch

    return query_pool_launch


def problem(case: Case) -> dict[str, Tensor]:
    """Tokens as rows of a wider tensor; what is not theirs is NaN, padding too."""
    room = torch.full((case.batch, 2, case.length + 1, case.channels + 8), math.nan, dtype=case.dtype)
    x = room[:, 1, 1:, : case.channels]
    x.copy_(torch.randn(x.shape))
    for sample, count in enumerate(case.lengths or ()):
        x[sample, count:] = math.nan
    shape = (case.batch, case.rows)
    return {
        "x": x,
        "folded": 2 * torch.randn(case.rows, case.channels) / math.sqrt(case.channels),
        "d_sums": torch.randn(*shape, case.channels),
        "d_lse": torch.randn(shape),
    }


def run(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    x, folded = (given[name].detach().requires_grad_() for name in ("x", "folded"))
    sums, lse = partial_pool(x, folded, case.lengths)
    d_x, d_folded = torch.autograd.grad([sums, lse], [x, folded], [given["d_sums"], given["d_lse"]])
    return {"sums": sums.detach(), "lse": lse.detach(), "d_x": d_x, "d_folded": d_folded}


def in_triton(case: Case, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], Watch]:
    with ops.backend("triton"), poisoned(), watched() as watch:
        return run(case, given), watch


def counted(case: Case) -> Tensor:
    """``[B, 1, L]``: true where a token counts."""
    counts = torch.tensor(case.lengths or (case.length,) * case.batch)
    return (torch.arange(case.length) < counts[:, None]).unsqueeze(1)


def exact(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, by autograd, sample by sample: the softmax written out."""
    x = given["x"].double().masked_fill(~counted(case).mT, 0).requires_grad_()
    folded = given["folded"].double().requires_grad_()
    sums, lse = [], []
    for sample, count in enumerate(case.lengths or (case.length,) * case.batch):
        scores = folded @ x[sample, :count].mT
        sums.append(scores.softmax(-1) @ x[sample, :count])
        lse.append(scores.logsumexp(-1))
    outputs = [torch.stack(sums), torch.stack(lse)]
    # A sample without tokens has a log-sum-exp of minus infinity, whatever the query.
    d_lse = given["d_lse"].double().masked_fill(outputs[1].isinf(), 0)
    d_x, d_folded = torch.autograd.grad(outputs, [x, folded], [given["d_sums"].double(), d_lse])
    return {"sums": outputs[0].detach(), "lse": outputs[1].detach(), "d_x": d_x, "d_folded": d_folded}


def chopped(number: Tensor) -> Tensor:
    """float32 to bfloat16 as the interpreter rounds: towards zero."""
    return (number.contiguous().view(torch.int32) & -65536).view(F32)


def two_pieces(number: Tensor) -> Tensor:
    """The sum of the two bfloat16 numbers that stand for it."""
    return chopped(number) + chopped(number - chopped(number))


def plain(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The formulas in float32, with the factors that are given to tensor cores."""
    factor: Callable[[Tensor], Tensor] = two_pieces if case.dtype == BF16 else lambda t: t
    inside = counted(case)
    x, w, g = given["x"].float().masked_fill(~inside.mT, 0), given["folded"], given["d_sums"]
    scores = (factor(w) @ x.mT).masked_fill(~inside, -math.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None])
    sums = factor(p) @ x
    ds = p * (factor(g) @ x.mT + (given["d_lse"] - (g * sums).sum(-1))[..., None])
    d_x = factor(p).mT @ factor(g) + factor(ds).mT @ factor(w)
    return {"sums": sums, "lse": lse, "d_x": d_x.to(case.dtype), "d_folded": (factor(ds) @ x).sum(0)}


def check(case: Case) -> Watch:
    given = problem(case)
    actual, watch = in_triton(case, given)
    right, measure = exact(case, given), plain(case, given)
    empty = right["lse"].isinf()
    assert torch.equal(actual["lse"].isinf(), empty)
    for results in (actual, right, measure):
        results["lse"] = results["lse"].masked_fill(empty, 0)
    for key, value in actual.items():
        assert_as_exact(value, measure[key], right[key], f"{case}: {key}")
    assert not actual["d_x"].masked_fill(counted(case).mT, 0).any()
    assert actual["d_x"].is_contiguous()
    return watch


@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, dtype: torch.dtype) -> None:
    watch = check(replace(CASES[name], dtype=dtype))
    assert {"pool_scores_kernel", "pool_lse_kernel", "pool_sums_kernel", "pool_backward_kernel"} <= set(watch.launches)
    # p and ds of many rows, and of float32, go through memory on their way to the gradient of the tokens.
    assert ("pool_d_tokens_kernel" in watch.launches) == (CASES[name].rows > 16 or dtype == F32)


@pytest.mark.parametrize("rows", [8, 24])
def test_the_gradient_of_the_tokens_is_rounded_once(rows: int) -> None:
    case = Case(1, 33, 64, rows, dtype=BF16)
    given = problem(case)
    actual, _ = in_triton(case, given)
    right = exact(case, given)["d_x"]
    # Of two thousand independent roundings the root mean square is known to 2 %; factors of 8 bits instead of 16 would
    # add as much error again as the rounding itself.
    once = errors(chopped(right.float()), right)[0]
    assert errors(actual["d_x"], right)[0] <= 1.1 * once


@pytest.mark.parametrize("dtype", [F32, HALF, BF16])
@pytest.mark.parametrize("channels", [1536, 1920, 5120])
def test_widths_of_models(channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = launches()
    launch = module.launch_for(channels, 8, dtype)
    # Fewer and wider tiles than on a GPU: a program costs milliseconds here.
    wide = {name: replace(getattr(launch, name), columns=1024) for name in ("products", "sums", "gradient")}
    monkeypatch.setattr(module, "launch_for", lambda *_: replace(launch, **wide))
    check(Case(1 if channels == 5120 else 2, 2, channels, 8, dtype=dtype))


def test_tiles_of_production() -> None:
    check(Case(1, 70, 384, 8, dtype=BF16))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_result_however_the_tokens_are_split(dtype: torch.dtype) -> None:
    case = Case(2, 161, 24, 8, (161, 97), dtype)
    given = problem(case)
    module = launches()
    size = given["x"].float().nan_to_num().abs().amax(1, keepdim=True)
    wanted = None
    for splits in (1, 2, 100):
        with poisoned(), watched():
            sums, lse, scores = module.forward(given["x"], given["folded"], case.lengths, splits)
            keep = (given["x"], given["folded"], sums, lse, scores, given["d_sums"], given["d_lse"], case.lengths)
            d_x, d_folded = module.backward(*keep, (True, True), splits)
        if wanted is None:
            wanted = sums, lse, scores, d_x, d_folded
            continue
        # Means of the same terms, added in another order: at most a rounding of the running sum for each token.
        assert ((sums - wanted[0]).abs() <= case.length * EPS * size).all()
        assert torch.equal(lse, wanted[1]) and torch.equal(scores, wanted[2])
        # ds is p times (g . x - g . sums + dlse), and p adds up to 1: sums of twice as many terms.
        most = (given["d_sums"].abs() * size).sum(-1, keepdim=True) * 2 + given["d_lse"].abs().unsqueeze(-1)
        assert ((d_folded - wanted[4]).abs() <= 3 * case.length * EPS * (most * size).sum(0)).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_order_of_the_tokens_does_not_matter(dtype: torch.dtype) -> None:
    case = Case(2, 70, 24, 8, dtype=dtype)
    given = problem(case)
    order = torch.randperm(case.length)
    one, _ = in_triton(case, given)
    other, _ = in_triton(case, {**given, "x": given["x"][:, order]})
    right, measure = exact(case, given), plain(case, given)
    other["d_x"] = other["d_x"][:, order.argsort()]
    for key, value in other.items():
        assert_as_exact(value, measure[key], right[key], key)
        assert torch.allclose(value, one[key], rtol=0.02, atol=0.02)
    assert not torch.equal(one["sums"], other["sums"])  # the order did change


def test_a_sample_is_the_same_bits_in_any_batch_and_run() -> None:
    case = Case(3, 97, 40, 8, (97, 5, 64), BF16)
    given = problem(case)
    whole, _ = in_triton(case, given)
    again, _ = in_triton(case, given)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    for sample in range(3):
        one = {k: v if k == "folded" else v[sample : sample + 1] for k, v in given.items()}
        alone, _ = in_triton(replace(case, batch=1, lengths=case.lengths[sample : sample + 1]), one)
        for key in ("sums", "lse", "d_x"):
            assert torch.equal(alone[key][0], whole[key][sample]), key


def test_states_of_the_parts_merge_to_the_whole() -> None:
    case = Case(2, 97, 24, 8, dtype=BF16)
    given = problem(case)
    sizes = (1, 64, 0, 32)
    with ops.backend("triton"), poisoned(), watched():
        parts = [partial_pool(part, given["folded"]) for part in given["x"].split(sizes, dim=1)]
    sums, lse = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    assert lse[2].isneginf().all() and not sums[2].any()
    right, measure = exact(case, given), plain(case, given)
    assert_as_exact(merge_pools(sums, lse), measure["sums"], right["sums"])
    assert_as_exact(lse.logsumexp(0), measure["lse"], right["lse"])


def test_scores_of_thousands_do_not_overflow() -> None:
    case = Case(1, 70, 24, 8)
    given = problem(case)
    given["folded"] = 1000 * given["folded"]
    actual, _ = in_triton(case, given)
    right, measure = exact(case, given), plain(case, given)
    for key, value in actual.items():
        assert_as_exact(value, measure[key], right[key], key)


@pytest.mark.parametrize("of", ["x", "folded"])
def test_finite_differences(of: str) -> None:
    case = Case(2, 33, 17, 8, (33, 20))
    given = {k: v.nan_to_num() for k, v in problem(case).items()}
    direction = torch.randn_like(given[of])

    def value(step: float) -> tuple[float, float]:
        moved = {**given, of: given[of] + step * direction}
        with ops.backend("triton"):
            outputs = partial_pool(moved["x"], moved["folded"], case.lengths)
        terms = [o.double() * d for o, d in zip(outputs, (given["d_sums"], given["d_lse"]), strict=True)]
        return sum(float(t.sum()) for t in terms), sum(float(t.square().sum()) for t in terms)

    slopes, step = [], 0.04
    for h in (step, step / 2):
        slopes.append((value(h)[0] - value(-h)[0]) / (2 * h))
    gradients, _ = in_triton(case, given)
    along = float((gradients[f"d_{of}"].double() * direction).sum())
    # The error of a central difference falls to a quarter with half the step, so what is left is a third of the change
    # (all of it is allowed); roundings of the outputs: independent, each of some ten of them.
    rounding = 10 * EPS * math.sqrt(value(0.0)[1]) / (step / 2)
    assert abs(along - slopes[1]) <= abs(slopes[0] - slopes[1]) + rounding
    assert abs(slopes[0] - slopes[1]) + rounding < 0.02 * abs(along)  # and that says something


def test_no_tokens_and_no_samples() -> None:
    for batch, length in ((0, 3), (2, 0)):
        case = Case(batch, length, 8, 3)
        actual, _ = in_triton(case, problem(case))
        assert not actual["sums"].any() and actual["lse"].isneginf().all() and not actual["d_folded"].any()
        assert actual["d_x"].shape == (batch, length, 8)


def test_the_public_op() -> None:
    dim, heads = 24, 4
    shapes = [(2, 33, dim), (3, dim), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    tensors = [torch.randn(shape) / math.sqrt(shape[-1]) for shape in shapes]
    results = []
    for name, dtype in (("triton", F32), ("reference", F32), ("reference", F64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with ops.backend(name):
            out = ops.query_pool(*leaves, heads, lengths=[33, 7])
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for index, (actual, measure, right) in enumerate(zip(*results, strict=True)):
        assert_as_exact(actual, measure, right, str(index))


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_bytes(needed: tuple[bool, bool]) -> None:
    batch, length, channels, rows = 2, 65, 512, 8
    case = Case(batch, length, channels, rows, dtype=BF16)
    given = problem(case)
    x, folded = (given[n].requires_grad_(flag) for n, flag in zip(("x", "folded"), needed, strict=True))
    with ops.backend("triton"), poisoned(), watched() as watch:
        sums, _ = partial_pool(x, folded)
        seen = len(watch.arguments)
        torch.autograd.grad(sums, [t for t in (x, folded) if t.requires_grad], given["d_sums"])
    unit = batch * length * channels * 2
    forward, backward = watch.arguments[:seen], watch.arguments[seen:]
    # Tokens: two passes forward; backward one read, one write where x wants a gradient, and one more read where the
    # folded query does. Each is to the byte: no element is read or written twice by a kernel.
    for part, units in ((forward, 2), (backward, 1 + sum(needed))):
        tokens = [a for a in part if a.name in ("x", "d_x") and a.given.sum() == batch * length * channels]
        assert sum(a.requested for a in tokens) == sum(a.distinct for a in tokens) == units * unit
        # The rest of a sample of 75,600 tokens on 132 multiprocessors at 1,536 channels, which is where it is largest.
        rest = extrapolated([a for a in part if not any(a is t for t in tokens)], case)
        assert rest <= 0.02 * units * 75600 * 1536 * 2
    assert watch.launches.count("pool_sums_kernel") == 1 + needed[1]


def extrapolated(rest: list[Any], case: Case) -> float:
    """Distinct bytes of one sample: what memory sees of scores, shares, states of tiles, parts and parameters."""
    splits = 2 * 132 // 6  # of tokens, for 6 chunks of 256 columns
    total = 0.0
    for a in rest:
        each = a.distinct / case.batch
        if a.name in ("scores", "weights", "shares"):
            total += each / case.length * 75600
        elif a.name in ("tops", "totals"):
            total += each / 2 * (75600 / 64)
        elif a.name in ("parts", "partials"):
            total += each * 1536 / case.channels / 3 * splits  # 3 runs of one tile each here
        else:
            total += each * 1536 / case.channels
    return total
