"""Attention kernels tried on one problem: which are right, and how fast each is.

Each candidate's result is held against float64 at some rows, the last ones among them, before its time counts. What a
kernel may miss, as the l2 norm over those rows: an element is a sum of terms, each rounded a few times to the dtype
(weights or score gradients, then the result; ROUNDINGS leaves room for two more) and computed in float32 (float64 for
float64) from products over the head dimension. Roundings are independent, so the norm of the error is at most
ROUNDINGS u of the norm of the root of the sum of squared terms, plus for the float32 part LAMBDA u' times the root of
the longest sum and the largest score, by which an exponent magnifies (Higham and Mary 2019).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from prfl_fast.ops.attention.provider import Problem, Provider
from prfl_fast.ops.rows.reference import compute_dtype

Stopwatch = Callable[[Callable[[], object]], float]

ROUNDINGS = 4.0
LAMBDA = 8.0
# Relative error of an exponential where inputs are halves: kernels approximate it well below bfloat16's unit of 2^-9.
EXPONENTIAL = 2.0**-14

# What a trial may cost: floating point operations of one forward, bytes of its tensors, seconds of timed runs.
MOST_OPERATIONS = 3e12
MOST_BYTES = 2**30
MOST_SECONDS = 1.0
ROUNDS = 7
# After the first round one that is so much slower has lost; two that are closer than that are equally fast.
HOPELESS = 2.0
EQUAL = 1.02
# Scores in float64 that the check holds at once, and the fewest and most rows of it.
_CHECKED_SCORES = 2**22
_ROWS = (16, 128)


@dataclass(frozen=True)
class Ranking:
    """What came out.

    Attributes:
        order: names of the right ones, fastest first; those that ran out of memory are in neither list.
        seconds: of one run, by name.
        wrong: name to what is wrong with it.
    """

    order: tuple[str, ...]
    seconds: dict[str, float]
    wrong: dict[str, str]


def rank(
    problem: Problem,
    candidates: Sequence[Provider],
    stopwatch: Stopwatch,
    *,
    forwards: Sequence[Provider] | None = None,
    most_bytes: int = MOST_BYTES,
) -> Ranking | None:
    """Try the candidates' forwards, or with ``forwards`` their backwards on what the first right one of those gives.

    Tensors are of the problem's own lengths and head dimension, with as many samples and heads as the bounds above
    allow. No mode sees the work, no random state moves, nothing is recorded for autograd.

    Args:
        problem: to choose for.
        candidates: that can run it, best guess first, which wins where two are equally fast.
        stopwatch: seconds of one call of what it is given.
        forwards: for a trial of backwards: providers to take output and log-sum-exp from.
        most_bytes: of all tensors.

    Returns:
        None where memory does not allow a trial, or no forward is right.
    """
    fits = shrink(problem, most_bytes)
    if fits is None:
        return None
    with torch.no_grad(), _disable_current_modes(), torch.autocast(problem.device.type, enabled=False):
        try:
            return _rank(fits, candidates, stopwatch, forwards)
        except torch.OutOfMemoryError:
            return None


def shrink(problem: Problem, most_bytes: int = MOST_BYTES) -> Problem | None:
    """The problem with as many of its samples and heads as may be tried; None where not one fits."""
    pairs = problem.batch * problem.heads
    operations = 4 * problem.queries * problem.keys * problem.head_dim
    # q, out, their gradients, a float32 sum; k, v, their gradients, two float32 sums.
    wide = max(4, problem.dtype.itemsize)
    one = problem.head_dim * (
        problem.queries * (4 * problem.dtype.itemsize + wide) + problem.keys * (4 * problem.dtype.itemsize + 2 * wide)
    )
    count = min(pairs, max(1, int(MOST_OPERATIONS // operations)), most_bytes // one)
    if count == pairs:
        return problem
    return replace(problem, batch=1, heads=count) if count else None


def _rank(
    problem: Problem, candidates: Sequence[Provider], stopwatch: Stopwatch, forwards: Sequence[Provider] | None
) -> Ranking | None:
    q, k, v, d_out = _draw(problem)
    scale = 1 / math.sqrt(problem.head_dim)
    work: dict[str, Callable[[], object]] = {}
    wrong: dict[str, str] = {}
    if forwards is None:
        for one in candidates:
            run = _bind(one.forward, q, k, v, scale)
            _admit(one.name, run, lambda made: forward_error(q, k, v, scale, *made), work, wrong)
    else:
        found = _first_right(forwards, q, k, v, scale)
        if found is None:
            return None
        out, lse = found
        for one in candidates:
            run = _bind(one.backward, d_out, q, k, v, out, lse, scale, None, problem.deterministic)
            _admit(one.name, run, lambda made: backward_error(d_out, q, k, v, out, lse, scale, made), work, wrong)
    seconds = _race(work, stopwatch)
    return Ranking(_order(seconds), seconds, wrong)


def _bind(run: Callable[..., tuple[Tensor, ...]], *arguments: object) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: run(*arguments)


def _draw(problem: Problem) -> list[Tensor]:
    generator = torch.Generator(problem.device).manual_seed(0)

    def draw(length: int) -> Tensor:
        shape = (problem.batch, length, problem.heads, problem.head_dim)
        return torch.randn(shape, dtype=problem.dtype, device=problem.device, generator=generator)

    return [draw(length) for length in (problem.queries, problem.keys, problem.keys, problem.queries)]


def _admit(
    name: str,
    run: Callable[[], tuple[Tensor, ...]],
    error_of: Callable[[tuple[Tensor, ...]], float],
    work: dict[str, Callable[[], object]],
    wrong: dict[str, str],
) -> None:
    """To ``work`` if it is right, to ``wrong`` if it isn't or fails; to neither if its memory isn't there."""
    try:
        made = run()
    except torch.OutOfMemoryError:
        return
    except (RuntimeError, TypeError, ImportError) as fault:
        # An installed package that this torch or this card can't run, or whose signature changed.
        wrong[name] = f"fails: {(str(fault).strip().splitlines() or [type(fault).__name__])[0]}"
        return
    error = error_of(made)
    if error <= 1:
        work[name] = run
    else:
        wrong[name] = f"is wrong: its error is {error:.3g} times the tolerance"


def _first_right(
    forwards: Sequence[Provider], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    for one in forwards:
        work: dict[str, Callable[[], object]] = {}
        made: list[tuple[Tensor, ...]] = []

        def error_of(result: tuple[Tensor, ...], made: list[tuple[Tensor, ...]] = made) -> float:
            made.append(result)
            return forward_error(q, k, v, scale, *result)

        _admit(one.name, _bind(one.forward, q, k, v, scale), error_of, work, {})
        if work:
            out, lse = made[0]
            return out.contiguous(), lse.contiguous()  # as the op hands them on
    return None


def _race(work: dict[str, Callable[[], object]], stopwatch: Stopwatch) -> dict[str, float]:
    """Median seconds; the candidates take turns, so that a clock that changes meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in work}
    running = list(work)
    spent = 0.0
    for _ in range(ROUNDS if len(work) > 1 else 1):
        for name in running:
            try:
                seconds = stopwatch(work[name])
            except torch.OutOfMemoryError:
                times.pop(name)
                continue
            times[name].append(seconds)
            spent += seconds
        running = [name for name in running if name in times]
        if spent > MOST_SECONDS or not running:
            break
        best = min(min(times[name]) for name in running)
        running = [name for name in running if min(times[name]) <= HOPELESS * best]
    return {name: statistics.median(taken) for name, taken in times.items()}


def _order(seconds: dict[str, float]) -> tuple[str, ...]:
    """Fastest first; among those as fast as it, the first that was given."""
    if not seconds:
        return ()
    best = min(seconds.values())
    first = next(name for name, taken in seconds.items() if taken <= EQUAL * best)
    return (first, *sorted((name for name in seconds if name != first), key=seconds.__getitem__))


def forward_error(q: Tensor, k: Tensor, v: Tensor, scale: float, *made: Tensor) -> float:
    """Error over tolerance of output and log-sum-exp, at some rows of the last head; infinity for what is not finite
    anywhere or has another shape."""
    out, lse = made
    if out.shape != q.shape or out.dtype != q.dtype or lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        return math.inf
    if not (torch.isfinite(out).all() and torch.isfinite(lse).all()):
        return math.inf
    rows = _some(q.shape[1], k.shape[1], q.device)
    queries, keys, values = q[-1, rows, -1].double(), k[-1, :, -1].double(), v[-1, :, -1].double()
    scores = queries @ keys.T * scale
    exact = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - exact[:, None])
    unit, fine = _units(q)
    reach = _reach(queries, keys, scale)
    sums = math.sqrt(k.shape[1])
    size = _norm((weights.square() @ values.square()).sqrt())
    tolerance = (ROUNDINGS * unit + LAMBDA * fine * (sums + reach)) * size
    approximate = EXPONENTIAL if unit > fine else 0.0
    lse_tolerance = approximate + LAMBDA * fine * (sums + reach + float(exact.abs().max()))
    of_lse = float((lse[-1, -1, rows].double() - exact).abs().max()) / lse_tolerance
    return max(of_lse, _norm(out[-1, rows, -1].double() - weights @ values) / tolerance)


def backward_error(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, made: tuple[Tensor, ...]
) -> float:
    """Error over tolerance of the gradients, at some rows of the last head, for this output and log-sum-exp."""
    for gradient, of in zip(made, (q, k, v), strict=True):
        if gradient.shape != of.shape or gradient.dtype != of.dtype or not torch.isfinite(gradient).all():
            return math.inf
    d, queries, keys, values, result = (t[-1, :, -1] for t in (d_out, q, k, v, out))
    delta = (d.double() * result.double()).sum(-1)
    level = lse[-1, -1].double()
    unit, fine = _units(q)
    reach = _reach(queries.double(), keys.double(), scale)
    share = ROUNDINGS * unit + LAMBDA * fine * (math.sqrt(max(q.shape[1], k.shape[1])) + reach)

    def scores_of(rows: Tensor | slice, columns: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, gradients of the scores, and the sizes of what the latter add up."""
        weights = torch.exp(queries[rows].double() @ keys[columns].double().T * scale - level[rows, None])
        d_weights = d[rows].double() @ values[columns].double().T
        return (
            weights,
            weights * (d_weights - delta[rows, None]),
            weights * (d_weights.abs() + delta[rows, None].abs()),
        )

    def error(gradient: Tensor, exact: Tensor, squared: Tensor) -> float:
        return _norm(gradient.double() - exact) / (share * _norm(squared.sqrt()))

    rows = _some(q.shape[1], k.shape[1], q.device)
    _, d_scores, sizes = scores_of(rows, slice(None))
    wide = keys.double() * scale
    errors = [error(made[0][-1, rows, -1], d_scores @ wide, sizes.square() @ wide.square())]
    columns = _some(k.shape[1], q.shape[1], q.device)
    weights, d_scores, sizes = scores_of(slice(None), columns)
    wide = queries.double() * scale
    errors.append(error(made[1][-1, columns, -1], d_scores.T @ wide, sizes.T.square() @ wide.square()))
    wide = d.double()
    errors.append(error(made[2][-1, columns, -1], weights.T @ wide, weights.T.square() @ wide.square()))
    return max(errors)


def _some(length: int, other: int, device: torch.device) -> Tensor:
    """Rows to look at: half of them at the end, where tiles are cut, the rest all over."""
    count = min(_ROWS[1], max(_ROWS[0], _CHECKED_SCORES // other))
    if length <= count:
        return torch.arange(length, device=device)
    tail = torch.arange(length - count // 2, length)
    return torch.cat([torch.linspace(0, length - count // 2 - 1, count - count // 2).long(), tail]).to(device)


def _units(q: Tensor) -> tuple[float, float]:
    return torch.finfo(q.dtype).eps / 2, torch.finfo(compute_dtype(q)).eps / 2


def _reach(queries: Tensor, keys: Tensor, scale: float) -> float:
    """No score is larger."""
    longest = [float(torch.linalg.vector_norm(tokens, dim=-1).max()) for tokens in (queries, keys)]
    return abs(scale) * longest[0] * longest[1]


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
