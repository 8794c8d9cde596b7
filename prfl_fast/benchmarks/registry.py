"""All benchmarks by name. Knows nothing of torch, so that listing them costs nothing."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Row = dict[str, Any]  # one line of the JSON: what was measured, and the figures, or why there are none


@dataclass(frozen=True)
class Setting:
    """How a benchmark runs.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        seconds: for each measurement of an op, after its warm-up.
        tiny: next to no work: shows that everything runs, its figures mean nothing.
    """

    device: str
    seconds: float = 1.0
    tiny: bool = False

    @property
    def kind(self) -> str:
        """The device without its index."""
        return self.device.partition(":")[0]


class BenchmarkModule(Protocol):
    """What a file ``bench_<name>.py`` holds."""

    def details(self, setting: Setting) -> dict[str, Any]:
        """What the figures depend on and every row has in common."""

    def rows(self, setting: Setting) -> Iterator[Row]:
        """One row after the other, as they are measured."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: of the op or the headline; its code is ``bench_<name>.py`` beside this file.
        measures: one sentence.
        devices: kinds that it runs on.
        needs: packages without which there is nothing to measure.
        one_thread: torch gets one thread meanwhile.
        on_host: tensors play no part, so its result carries no device in its name.
    """

    name: str
    measures: str
    devices: tuple[str, ...]
    needs: tuple[str, ...] = ()
    one_thread: bool = False
    on_host: bool = False

    def load(self) -> BenchmarkModule:
        """Its code."""
        module: Any = importlib.import_module(f"prfl_fast.benchmarks.bench_{self.name}")
        checked: BenchmarkModule = module
        return checked


_ALL = (
    Benchmark("solver_step", "one solver step with guidance, and its transpose", ("cpu", "cuda")),
    Benchmark("modulated_norm", "LayerNorm and AdaLN modulation, and their gradients", ("cpu", "cuda")),
    Benchmark("gated_residual_norm", "gated residual, then a modulated norm, and their gradients", ("cpu", "cuda")),
    Benchmark("qk_norm_rope", "norm of queries and keys and rotary embedding, and their gradients", ("cpu", "cuda")),
    Benchmark("attention", "attention by every kernel that is there, and its gradients", ("cpu", "cuda")),
    Benchmark("query_pool", "attention pooling of the reward, and its gradients", ("cpu", "cuda")),
    Benchmark(
        "chain_memory",
        "peak bytes and seconds of the full chain's gradient by the number of steps",
        ("cpu",),
        needs=("diffusers",),
        one_thread=True,
    ),
    Benchmark(
        "chain_overhead",
        "time that the chain itself takes per step, the network's own taken off",
        ("cpu",),
        needs=("diffusers",),
        one_thread=True,
    ),
    Benchmark(
        "chunked_decode",
        "peak bytes and time of a video decoder's gradient, chunk by chunk against whole",
        ("cpu",),
        needs=("diffusers",),
        one_thread=True,
    ),
    Benchmark(
        "memory_plan",
        "predicted time of an iteration by model, size and device, beside full recomputation, greedy and uniform plans",
        ("cpu",),
        needs=("diffusers", "peft"),
        one_thread=True,
        on_host=True,
    ),
    Benchmark(
        "solve_chain",
        "the planner: time, memory, gap, and its gain over greedy and uniform plans",
        ("cpu",),
        one_thread=True,
        on_host=True,
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def choose(names: Sequence[str], kind: str) -> list[Benchmark]:
    """The named benchmarks in the order given, each once; without names all that run on this kind of device.

    Raises:
        ValueError: a name that is not there (the nearest one is told), or one that does not run on ``kind``.
    """
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"names: expected some of {', '.join(BENCHMARKS)}, got {name!r}{hint}")
        if kind not in BENCHMARKS[name].devices:
            raise ValueError(f"device: {name} runs on {' and '.join(BENCHMARKS[name].devices)}, got {kind!r}")
    if names:
        return [BENCHMARKS[name] for name in dict.fromkeys(names)]
    return [benchmark for benchmark in _ALL if kind in benchmark.devices]
