"""Peak memory of forward and backward of the full chain by the number of steps, on a small Wan.

Three ways to one gradient: everything in one autograd graph; each network call a checkpoint, written by hand around the
scheduler's own steps; ``unrolled_sample``. Bytes are those of all live tensors above the start (weights and latents
are there before), counted storage by storage; so they are exact and depend on no load and no allocator. Seconds are
medians of runs in turn (one of each way, then again), without the counting, which costs time itself.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import prfl_fast
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.memory.trace import LiveBytes

STEPS, TINY_STEPS = (4, 10, 20, 40), (2,)
REPEATS = 9
LARGEST_DIFFERENCE = 1e-4


def small_wan() -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A Wan of four blocks, latents and text."""
    import diffusers

    torch.manual_seed(0)
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, num_layers=4, ffn_dim=256, text_dim=64, freq_dim=64
    )
    latents = torch.randn(1, 16, 3, 16, 16)
    return net, latents, {"encoder_hidden_states": torch.randn(1, 16, 64)}


def plain(net: Any, scheduler: Any, latents: Tensor, text: dict[str, Tensor], steps: int, recompute: bool) -> int:
    """The gradient by plain autograd, or with a checkpoint around each call; returns the network calls."""
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
    """The gradient by ``unrolled_sample``; returns the network calls."""
    sample = prfl_fast.unrolled_sample(net, scheduler, latents, steps, conditioning=text, graph=graph)
    sample.latents.square().mean().backward()
    if graph == "steps":
        sample.backward()
    return sample.network_calls


def count(net: Any, work: Callable[[], int]) -> tuple[dict[str, Any], Tensor]:
    """Peak of live bytes and network calls, and the gradient."""
    net.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        calls = work()
    peak = live.peak
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    return {"peak_bytes": peak, "network_calls": calls}, gradient


def median_seconds(net: Any, ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Of each way, all run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            net.zero_grad(set_to_none=True)
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    net, latents, _ = small_wan()
    return {
        "model": "WanTransformer3DModel, 4 blocks of width 96",
        "latent_bytes": latents.numel() * latents.element_size(),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in net.parameters()),
    }


def rows(setting: Setting) -> Iterator[Row]:
    """One row per way and number of steps."""
    import diffusers

    net, latents, text = small_wan()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    for steps in TINY_STEPS if setting.tiny else STEPS:
        # The solver's probe is paid by the first chain of a schedule; its bytes are no part of a chain.
        unrolled(net, scheduler, latents, text, steps, "chain")
        ways: dict[str, Callable[[], int]] = {
            "plain autograd": partial(plain, net, scheduler, latents, text, steps, False),
            "checkpoint by hand": partial(plain, net, scheduler, latents, text, steps, True),
            "unrolled_sample, chain": partial(unrolled, net, scheduler, latents, text, steps, "chain"),
            "unrolled_sample, steps": partial(unrolled, net, scheduler, latents, text, steps, "steps"),
        }
        seconds = median_seconds(net, ways, 1 if setting.tiny else REPEATS)
        exact: Tensor | None = None
        for name, work in ways.items():
            row, gradient = count(net, work)
            exact = gradient if exact is None else exact
            difference = float((gradient - exact).norm() / exact.norm())
            # float32 twice, another order of additions: no figure from a run whose gradient is not that of autograd.
            if not difference <= LARGEST_DIFFERENCE:
                yield {"way": name, "steps": steps, "wrong": f"the gradient differs by {difference:.1e}"}
                continue
            row |= {"seconds": seconds[name], "relative_difference": float(f"{difference:.2e}")}
            yield {"way": name, "steps": steps, **row}
