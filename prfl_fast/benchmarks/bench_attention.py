"""Attention: each kernel that the op can take, the one that it takes, and torch's own function per backend.

Correct first: results and gradients are held against float64 at some rows (prfl_fast/ops/attention/trial.py), above 1
time the tolerance no time is reported. The last row is the op's own cost on the host, over torch's function.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prfl_fast.benchmarks.contest import AbsentError
from prfl_fast.benchmarks.measure import copy_speed, measure
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.ops import attention, attention_provider
from prfl_fast.ops.attention import choice, trial
from prfl_fast.ops.attention.provider import Problem

# Batch, queries, keys, heads, head dimension: one block at 81 frames; scaled down for a CPU.
SHAPES = {
    "cuda": {
        "Wan 1.3B 480p": (1, 32_760, 32_760, 12, 128),
        "Wan 1.3B 720p": (1, 75_600, 75_600, 12, 128),
        "Wan 14B 480p": (1, 32_760, 32_760, 40, 128),
        "Wan 14B 720p": (1, 75_600, 75_600, 40, 128),
        "Wan 1.3B 480p, text": (1, 32_760, 512, 12, 128),
        "Wan 1.3B 720p, text": (1, 75_600, 512, 12, 128),
        "Wan 14B 480p, text": (1, 32_760, 512, 40, 128),
        "Wan 14B 720p, text": (1, 75_600, 512, 40, 128),
        "head dimension 64": (1, 17_776, 17_776, 48, 64),
    },
    "cpu": {"a thirtieth of 480p": (1, 1_092, 1_092, 12, 128), "the same, text": (1, 1_092, 512, 12, 128)},
    "tiny": {"tiny": (2, 33, 21, 3, 16)},
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# In float32 and without fusion; larger problems would take minutes.
REFERENCE_OPERATIONS = 1e12
TARGET_US = 20.0
_CALLS = 2000

_SDPA = {
    "cuda": (
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}  # fmt: skip

# Output and its log-sum-exp, None where it isn't handed out.
Forward = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Case:
    """One problem and its tensors, ``[B, L, H, D]``."""

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor

    @property
    def scale(self) -> float:
        """The default one."""
        return 1 / math.sqrt(self.problem.head_dim)

    @property
    def operations(self) -> dict[str, int]:
        """Of the products: two forward, five backward."""
        p = self.problem
        product = 2 * p.batch * p.heads * p.queries * p.keys * p.head_dim
        return {"forward": 2 * product, "backward": 5 * product}

    @property
    def moved(self) -> dict[str, int]:
        """Bytes that cannot be avoided: forward reads q, k, v and writes the output; backward reads these and the
        output's gradient and writes three."""
        wide, narrow = self.q.numel() * self.q.element_size(), self.k.numel() * self.k.element_size()
        return {"forward": 2 * wide + 2 * narrow, "backward": 4 * wide + 4 * narrow}


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    cudnn = torch.backends.cudnn.version() if setting.kind == "cuda" else None
    return {"kernels": choice.installed(), "cudnn": cudnn, "seconds_per_measurement": setting.seconds}


def rows(setting: Setting) -> Iterator[Row]:
    """All contestants at one shape after the other, then the cost of dispatch."""
    device, dtype = torch.device(setting.device), DTYPES[setting.kind]
    for name, sizes in SHAPES["tiny" if setting.tiny else setting.kind].items():
        case = draw(sizes, dtype, device)
        labels = {"op": "attention", "shape": name, "sizes": list(sizes), "dtype": str(dtype).removeprefix("torch.")}
        yield from contest(case, labels, setting)
        del case
    yield dispatch(dtype, device, 50 if setting.tiny else _CALLS)


def draw(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """Random tensors."""
    batch, queries, keys, heads, dim = sizes
    generator = torch.Generator(device).manual_seed(0)

    def tensor(length: int) -> Tensor:
        return torch.randn((batch, length, heads, dim), dtype=dtype, device=device, generator=generator)

    q, k, v, d_out = (tensor(length) for length in (queries, keys, keys, queries))
    problem = Problem.of(q, k, False)
    return Case(problem, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out)


def contest(case: Case, labels: Row, setting: Setting) -> Iterator[Row]:
    """Two rows per contestant, forward and backward, or one that says why there are none."""
    device = case.q.device
    copies = {name: copy_speed(device, moved, setting.seconds) for name, moved in case.moved.items()}
    may = choice.may_measure(case.problem)
    taken = [choice.choose(case.problem, backward=backward, measure=may) for backward in (False, True)]
    contestants: list[tuple[Row, Callable[[], Forward]]] = [
        ({"backend": f"chosen: {taken[0]}, backward {taken[1]}"}, partial(ours, case, taken[0], taken[1]))
    ]
    contestants += [({"backend": name}, partial(ours, case, name, name)) for name in choice.PROVIDERS]
    contestants += [
        ({"peer": f"scaled_dot_product_attention, {backend.name}"}, partial(sdpa, case, backend))
        for backend in _SDPA[device.type]
    ]
    for who, prepare in contestants:
        try:
            for row in _rows_of(case, prepare(), copies, setting):
                yield labels | who | row
        except AbsentError as reason:
            yield labels | who | {"absent": str(reason)}
        except torch.OutOfMemoryError as error:
            yield labels | who | {"absent": f"out of memory: {str(error).splitlines()[0]}"}


def ours(case: Case, forward: str, backward: str) -> Forward:
    """The op on named kernels."""
    for name, back in ((forward, False), (backward, True)):
        provider = choice.PROVIDERS[name]
        reason = provider.missing() or provider.why_not(case.problem, backward=back)
        if reason is None and name == "reference" and case.operations["forward"] > REFERENCE_OPERATIONS:
            reason = "left out: too slow at this size"
        if reason is not None:
            raise AbsentError(reason)

    def run() -> tuple[Tensor, Tensor]:
        with attention_provider(forward, backward):
            return attention(case.q, case.k, case.v, return_lse=True)

    return run


def sdpa(case: Case, backend: SDPBackend) -> Forward:
    """torch's function on one of its backends."""
    if backend == SDPBackend.MATH and case.operations["forward"] > REFERENCE_OPERATIONS:
        raise AbsentError("left out: its scores take too much memory at this size")

    def run() -> tuple[Tensor, None]:
        q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise AbsentError(f"not for this problem: {str(error).splitlines()[0]}") from None
    return run


def _rows_of(case: Case, forward: Forward, copies: dict[str, float], setting: Setting) -> Iterator[Row]:
    out, lse = forward()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [case.q, case.k, case.v], case.d_out, retain_graph=True)

    wrong = error(case, out, lse, gradients())
    if not wrong <= 1:
        yield {"wrong": f"error is {wrong:.3g} times the tolerance"}
        return
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        with torch.set_grad_enabled(backward):
            times = measure(gradients if backward else forward, case.q.device, setting.seconds)
        seconds, moved = times.median_us / 1e6, case.moved[direction]
        yield {
            "direction": direction,
            **vars(times),
            "operations": case.operations[direction],
            "operations_per_second": round(case.operations[direction] / seconds),
            "bytes": moved,
            "copy_bytes_per_second": round(copies[direction]),
            "share_of_copy_speed": round(moved / seconds / copies[direction], 4),
            "error_over_tolerance": float(f"{wrong:.3g}"),
        }


@torch.no_grad()
def error(case: Case, out: Tensor, lse: Tensor | None, gradients: tuple[Tensor, ...]) -> float:
    """Largest error over its tolerance. Who hands out no log-sum-exp is judged with that of the op."""
    q, k, v = (t.detach() for t in (case.q, case.k, case.v))
    if lse is None:
        lse = attention(q, k, v, return_lse=True)[1]
    return max(
        trial.forward_error(q, k, v, case.scale, out, lse),
        trial.backward_error(case.d_out, q, k, v, out, lse, case.scale, gradients),
    )


def dispatch(dtype: torch.dtype, device: torch.device, calls: int) -> Row:
    """Host time of the op on a problem that is next to nothing, over that of torch's own function."""
    case = draw((1, 16, 16, 1, 64), dtype, device)
    name = choice.choose(case.problem, backward=False)
    provider, (q, k, v) = choice.PROVIDERS[name], (t.detach() for t in (case.q, case.k, case.v))
    ways: dict[str, Callable[[], object]] = {
        "provider": lambda: provider.forward(q, k, v, case.scale),
        "ours": lambda: attention(q, k, v),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(calls + 10):
        for way, work in ways.items():
            start = time.perf_counter()
            work()
            if turn >= 10:
                times[way].append(time.perf_counter() - start)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    medians = {way: round(1e6 * statistics.median(taken), 2) for way, taken in times.items()}
    return {
        "op": "attention",
        "way": f"dispatch to {name}",
        "host_us": medians,
        "overhead_us": round(medians["ours"] - medians["scaled_dot_product_attention"], 2),
        "target_us": TARGET_US,
    }
