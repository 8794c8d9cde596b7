"""Which kernels an attention runs on.

On a GPU the kernels that are installed are tried on the first problem of a bucket (trial.py) and the fastest right one
is taken from then on, the forward's and the backward's apart. A bucket is the device's name, the versions, dtype, head
dimension, and the powers of two of queries, keys and heads in all; its ranking is kept in memory and on disk
(choices_file.py), where the next process finds it.

Nothing is measured, and a ranking from the disk or else the order of ``PROVIDERS`` decides, where a measurement can't
run (on a CPU, under torch.compile, under a fake tensor mode, while a CUDA graph is captured) and where more than one
rank of torch.distributed is there: ranks that measure apart may differ, and a result that ranks compute alike (a
replicated text stream, say) would then differ in its last bits, while no collective may be hidden in an op that not
every rank has to reach. Ranks that read one file agree. One process that runs the shapes beforehand fills it.

What has once been decided for a bucket holds until the process ends, so that recomputation gives the bits of the
forward.
"""

from __future__ import annotations

import importlib.metadata
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from prfl_fast.ops import backends
from prfl_fast.ops.attention import choices_file, trial
from prfl_fast.ops.attention.aten import CpuFlash, Cudnn, Efficient, Flash
from prfl_fast.ops.attention.peers import FlashAttention2, FlashAttention3, FlashAttention4, Xformers
from prfl_fast.ops.attention.provider import Problem, Provider
from prfl_fast.ops.attention.reference import Reference
from prfl_fast.ops.attention.triton_provider import Triton

# In the order in which they are taken where nothing was measured.
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Cudnn(), Flash(), FlashAttention3(), FlashAttention4(), FlashAttention2(), Xformers(), Efficient(), Triton(),
        CpuFlash(), Reference(),
    )
}  # fmt: skip

# The op resolves this name when it runs.
UNDECIDED = ""

# Plain module state, not a context variable: torch.compile guards on it.
_asked: tuple[str, str] | None = None

_lock = threading.RLock()
_known: dict[str, dict[str, Any]] | None = None  # rankings by bucket: of the disk, then of this process
_unmeasured: dict[str, str] = {}
# Of the very shape: what eager calls look at first.
_settled: dict[tuple[Any, ...], tuple[str, str]] = {}
_MOST_SETTLED = 4096


@contextmanager
def attention_provider(forward: str, backward: str | None = None) -> Iterator[None]:
    """Attention inside runs on the named kernels, for tests and comparisons; without it on the fastest that are there.

    A gradient runs on what was named at its forward, wherever the backward is called. Stronger than
    :func:`prfl_fast.ops.backend`. The choice holds for all threads of the process.

    Args:
        forward: one of ``PROVIDERS``, as ``prfl-fast doctor`` lists them.
        backward: the same for gradients, ``forward`` by default: any backward takes any forward's results.

    Raises:
        ValueError: another name.
        RuntimeError: from an attention that is called inside: the kernels are not there, or not for its tensors.
    """
    names = (forward, forward if backward is None else backward)
    for argument, name in zip(("forward", "backward"), names, strict=True):
        if name not in PROVIDERS:
            raise ValueError(f"{argument}: expected one of {', '.join(PROVIDERS)}, got {name!r}")
    global _asked
    before, _asked = _asked, names
    try:
        yield
    finally:
        _asked = before


def names(q: Tensor, k: Tensor, deterministic: bool) -> tuple[str, str]:
    """Providers of forward and backward; ``UNDECIDED`` where the op has to choose when it runs.

    Raises:
        RuntimeError: what was asked for can't run this.
    """
    asked, how = _asked, "attention_provider"
    if asked is None and backends.chosen() in ("reference", "triton"):
        name = backends.choose(q.device, ("triton", "reference"))
        asked, how = (name, name), "backend"
    if torch.compiler.is_compiling() or isinstance(q, FakeTensor):
        return (UNDECIDED, UNDECIDED) if asked is None else asked
    if asked is not None:
        problem = Problem.of(q, k, deterministic)
        for name, backward in zip(asked, (False, True), strict=True):
            reason = PROVIDERS[name].missing() or PROVIDERS[name].why_not(problem, backward=backward)
            if reason is not None and not problem.empty:
                raise RuntimeError(f"{how}: {name!r} was asked for, but {reason}")
        return ("reference", "reference") if problem.empty else asked
    key = (q.device, q.dtype, q.shape, k.shape[1], deterministic)
    found = _settled.get(key)
    if found is None:
        problem = Problem.of(q, k, deterministic)
        measured = may_measure(problem)
        found = (
            choose(problem, backward=False, measure=measured),
            choose(problem, backward=True, measure=measured),
        )
        if len(_settled) >= _MOST_SETTLED:
            _settled.clear()
        _settled[key] = found
    return found


def candidates(problem: Problem, *, backward: bool) -> list[Provider]:
    """Those that can run the problem, best guess first."""
    able = [p for p in PROVIDERS.values() if p.missing() is None and p.why_not(problem, backward=backward) is None]
    if problem.device.type == "cuda" and torch.cuda.get_device_capability(problem.device) < (9, 0):
        # cuDNN's kernels are written for Hopper and later; before that FlashAttention 2 is the best guess.
        able.sort(key=lambda provider: provider.name == "aten_cudnn")
    # The interpreter is for tests, and runs on CPU tensors only.
    return [p for p in able if p.name != "triton" or problem.device.type != "cpu"]


def may_measure(problem: Problem) -> bool:
    """True where kernels may be tried now."""
    if problem.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_world_size() == 1


def choose(problem: Problem, *, backward: bool, measure: bool = False) -> str:
    """Name of the provider for the problem: by its bucket's ranking, else by the order of ``PROVIDERS``.

    Args:
        problem: what is to be run.
        backward: choose for the backward.
        measure: where there is no ranking, make one.
    """
    able = candidates(problem, backward=backward)
    if problem.device.type == "cpu" or len(able) == 1:
        return able[0].name
    key = bucket(problem, backward=backward)
    with _lock:
        if not measure and key in _unmeasured:
            return _first(_unmeasured[key], able)
        ranking = _rankings().get(key)
        if ranking is None and measure:
            ranking = _measure(key, problem, able, backward)
        if ranking is None:
            name = able[0].name
        else:
            wrong = ranking["wrong"]
            usable = {p.name for p in able if p.name not in wrong}
            name = next((name for name in (*ranking["order"], *PROVIDERS) if name in usable), "reference")
        if not measure:
            _unmeasured[key] = name
        return name


def first_for_d_lse(problem: Problem) -> str:
    """Name of the first provider whose backward takes a gradient of the log-sum-exp."""
    return next(p.name for p in candidates(problem, backward=True) if p.takes_d_lse)


def _first(name: str, able: list[Provider]) -> str:
    """The name, where it is able: within a bucket lengths differ."""
    return name if any(p.name == name for p in able) else able[0].name


def bucket(problem: Problem, *, backward: bool) -> str:
    """What a ranking is known by."""
    # One beyond 2^n - 1 starts the next.
    sizes = (problem.queries, problem.keys, problem.batch * problem.heads)
    queries, keys, heads = (size.bit_length() - 1 for size in sizes)
    device = torch.cuda.get_device_name(problem.device) if problem.device.type == "cuda" else problem.device.type
    direction = "backward" if backward else "forward"
    if problem.deterministic:
        direction += " deterministic"
    return (
        f"{device} | {_versions()} | {str(problem.dtype).removeprefix('torch.')}, head dimension {problem.head_dim}, "
        f"queries 2^{queries}, keys 2^{keys}, heads 2^{heads} | {direction}"
    )


_stated: str | None = None


def _versions() -> str:
    """Of all that is installed: with any of them the fastest may change."""
    global _stated
    if _stated is None:
        try:
            own = importlib.metadata.version("prfl-fast")
        except importlib.metadata.PackageNotFoundError:
            own = "unknown"
        stated = [f"{p.name} {p.version()}" for p in PROVIDERS.values() if p.missing() is None]
        _stated = "; ".join([f"prfl_fast {own}", f"torch {torch.__version__}", *stated])
    return _stated


def _rankings() -> dict[str, dict[str, Any]]:
    global _known
    if _known is None:
        _known = choices_file.read(choices_file.path())
    return _known


def _measure(key: str, problem: Problem, able: list[Provider], backward: bool) -> dict[str, Any] | None:
    # The reference is there for what no kernel can run; it is never the fastest.
    kernels = [p for p in able if p.name != "reference"]
    forwards = candidates(problem, backward=False) if backward else None
    ranking = trial.rank(
        problem, kernels, _stopwatch(problem.device), forwards=forwards, most_bytes=_bytes_to_try(problem.device)
    )
    if ranking is None:
        return None
    for name, reason in ranking.wrong.items():
        warnings.warn(f"attention: {name} is not used for {key.rpartition(' | ')[0]}: it {reason}", stacklevel=2)
    entry = {
        "order": list(ranking.order),
        "microseconds": {name: round(1e6 * seconds, 1) for name, seconds in ranking.seconds.items()},
        "wrong": ranking.wrong,
    }
    _rankings()[key] = entry
    choices_file.add(choices_file.path(), {key: entry})
    return entry


def _bytes_to_try(device: torch.device) -> int:
    """A quarter of what is free, within the trial's own bound."""
    if device.type != "cuda":
        return trial.MOST_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(trial.MOST_BYTES, (torch.cuda.mem_get_info(device)[0] + cached) // 4)


_RUNS = 3  # in a row, so that launches of the later ones are hidden behind the first


def _stopwatch(device: torch.device) -> trial.Stopwatch:
    def seconds(work: Any) -> float:
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_RUNS):
                work()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3 / _RUNS

    return seconds


def installed() -> dict[str, str]:
    """Every provider: its version, or why it is missing."""
    return {name: (f"missing: {p.missing()}" if p.missing() else p.version()) for name, p in PROVIDERS.items()}


def rankings() -> dict[str, dict[str, Any]]:
    """What was measured on the devices that are here, with the versions that are here: by bucket without the versions.

    Each with ``order`` (fastest first), ``microseconds`` and ``wrong`` by name.
    """
    devices = {"cpu"}
    if torch.cuda.is_available():
        devices |= {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    with _lock:
        known = dict(_rankings())
    told = {}
    for key, entry in known.items():
        device, _, rest = key.partition(" | ")
        versions, _, rest = rest.partition(" | ")
        if device in devices and versions == _versions():
            told[f"{device} | {rest}"] = entry
    return told
