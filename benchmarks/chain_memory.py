"""Peak memory of forward and backward of the full chain by the number of steps, on a small Wan.

    python benchmarks/chain_memory.py --output benchmarks/results/chain_memory_cpu.json

Three ways to one gradient: everything in one autograd graph; each network call a checkpoint, written by hand around the
scheduler's own steps; ``unrolled_sample``. Bytes are those of all live tensors above the start (weights and latents
are there before), counted storage by storage; so they are exact and depend on no load and no allocator. Seconds are
medians of runs in turn (one of each way, then again), without the counting, which costs time itself.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import prfl_fast
from prfl_fast.memory.trace import LiveBytes


def small_wan() -> tuple[Any, Tensor, dict[str, Tensor]]:
    import diffusers

    torch.manual_seed(0)
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, num_layers=4, ffn_dim=256, text_dim=64, freq_dim=64
    )
    latents = torch.randn(1, 16, 3, 16, 16)
    return net, latents, {"encoder_hidden_states": torch.randn(1, 16, 64)}


def plain(net: Any, scheduler: Any, latents: Tensor, text: dict[str, Tensor], steps: int, recompute: bool) -> int:
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    calls = 0

    def call(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        prediction: Tensor = net(hidden_states=x, timestep=t.expand(x.shape[0]), return_dict=False, **text)[0]
        return prediction

    x = latents
    for t in own.timesteps:
        m = checkpoint(call, x, t, use_reentrant=False) if recompute else call(x, t)
        x = own.step(m, t, x, return_dict=False)[0]
    x.square().mean().backward()
    return calls


def unrolled(net: Any, scheduler: Any, latents: Tensor, text: dict[str, Tensor], steps: int, graph: str) -> int:
    sample = prfl_fast.unrolled_sample(net, scheduler, latents, steps, conditioning=text, graph=graph)
    sample.latents.square().mean().backward()
    if graph == "steps":
        sample.backward()
    return sample.network_calls


def count(net: Any, work: Callable[[], int]) -> tuple[dict[str, Any], Tensor]:
    net.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        calls = work()
    peak = live.peak
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    return {"peak_bytes": peak, "network_calls": calls}, gradient


def median_seconds(net: Any, ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            net.zero_grad(set_to_none=True)
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def main() -> None:
    import diffusers

    parser = record.parser(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 10, 20, 40])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    net, latents, text = small_wan()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    about, rows = record.about(), []
    for steps in args.steps:
        # The solver's probe is paid by the first chain of a schedule; its bytes are no part of a chain.
        unrolled(net, scheduler, latents, text, steps, "chain")
        ways: dict[str, Callable[[], int]] = {
            "plain autograd": lambda n=steps: plain(net, scheduler, latents, text, n, False),
            "checkpoint by hand": lambda n=steps: plain(net, scheduler, latents, text, n, True),
            "unrolled_sample, chain": lambda n=steps: unrolled(net, scheduler, latents, text, n, "chain"),
            "unrolled_sample, steps": lambda n=steps: unrolled(net, scheduler, latents, text, n, "steps"),
        }
        seconds = median_seconds(net, ways, args.repeats)
        exact: Tensor | None = None
        for name, work in ways.items():
            row, gradient = count(net, work)
            exact = gradient if exact is None else exact
            difference = float((gradient - exact).norm() / exact.norm())
            # float32 twice, another order of additions: no figure from a run whose gradient is not that of autograd.
            if difference > 1e-4:
                raise SystemExit(f"{name}, {steps} steps: gradient differs by {difference:.1e}; nothing is reported")
            row |= {"seconds": seconds[name], "relative_difference": float(f"{difference:.2e}")}
            rows.append({"way": name, "steps": steps, **row})
    sizes = {
        "latent_bytes": latents.numel() * 4,
        "gradient_bytes": sum(p.numel() * p.element_size() for p in net.parameters()),
    }
    figures = {"model": "WanTransformer3DModel, 4 blocks of width 96", **sizes, "about": about, "rows": rows}
    record.write(figures, args.output)


if __name__ == "__main__":
    main()
