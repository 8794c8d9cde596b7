"""How far each shortcut's gradient is from the exact one, noise level by noise level, and what its noise costs.

    python benchmarks/study_gradients.py --output benchmarks/results/gradient_study.json \\
        --plot benchmarks/results/gradient_study.svg

On the demo's model with the demo's latent reward (trained here, 600 updates). For every k the chain ends after k of its
10 steps, at noise level sigma_k, and the objective is the mean reward logit of the latents there; the exact gradient is
that of the full chain to that point. A process reward may be asked at any of these levels, so each is a column:

* ``cosine``, ``norm_ratio``: against the exact gradient of the same batch of initial noise, so the batch's own noise
  does not count; mean over seeds with a bootstrap interval of 95 %.
* ``cosine_to_end``: against the exact gradient of the reward at the end of the whole chain.
* ``variance_per_call``: variance of the gradient over seeds (initial noise and the mode's draws), relative to the
  squared norm of its mean, times the network calls of one estimate: what averaging costs, whatever the learning rate.
  Interval: jackknife over seeds. None where the mean does not stand out of the noise.

``supervise-3`` rewards three evenly spaced latents on the way to step k instead of the last alone.

``--from benchmarks/results/gradient_study.json`` draws the picture of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prfl_fast
from prfl_fast.benchmarks import record
from prfl_fast.charts import TONES, Mark, Series, line_chart, picture
from prfl_fast.demo.base import load_base
from prfl_fast.demo.clips import make_clips
from prfl_fast.demo.judges import bootstrap_interval
from prfl_fast.demo.net import draw_noise, prompt
from prfl_fast.demo.rewards import Labelled, latent_accuracy, latent_logits, train_latent_reward
from prfl_fast.demo.sample import STEPS, make_scheduler

REWARD_UPDATES, CLIPS = 600, 8192


@dataclass(frozen=True)
class Way:
    """One estimate of the gradient: a mode, and how many taps on the way share the reward."""

    name: str
    gradient: str
    least: int = 1  # steps that the chain must have
    taps: int = 1


WAYS = (
    Way("full", "full"),
    Way("last:1", "last:1"),
    Way("last:2", "last:2", 2),
    Way("last:4", "last:4", 4),
    Way("one random step", "random:1"),
    Way("random K (AlignProp)", "random"),
    Way("drtune:2", "drtune:2", 2),
    Way("drtune:4", "drtune:4", 4),
    Way("supervise-3, last:1", "last:1", 3, 3),
    Way("supervise-3, full", "full", 3, 3),
)


def train_reward(seed: int, updates: int) -> tuple[Any, Any, dict[str, Any]]:
    """The demo's latent reward; a clock that counts updates makes it the same on every machine."""
    base, codec, _ = load_base()
    base.requires_grad_(False)

    def labelled(count: int, number: int) -> Labelled:
        clips = make_clips(count, torch.Generator().manual_seed(number))
        return Labelled(codec.encode(clips.videos), clips.good)

    ticks = iter(range(updates + 2))
    reward, _ = train_latent_reward(
        base, labelled(CLIPS, 10 * seed + 1), seconds=float(updates), seed=seed, clock=lambda: float(next(ticks)),
        progress=False,
    )  # fmt: skip
    return base, reward, latent_accuracy(reward, labelled(1024, 10 * seed + 2))


def estimate(net: Any, reward: Any, noise: Tensor, way: Way, stop: int, seed: int) -> tuple[Tensor, int]:
    """The parameters' gradient, flat, and the network calls that it took."""
    taps = tuple(round(stop * (j + 1) / way.taps) for j in range(way.taps))
    sample = prfl_fast.unrolled_sample(
        net, make_scheduler(), noise, STEPS, supervise=taps, conditioning=prompt(len(noise)), gradient=way.gradient,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    values = [latent_logits(reward, tap.latents, tap.timestep).mean() for tap in sample.taps]
    gradients = torch.autograd.grad(torch.stack(values).mean(), list(net.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients]), sample.network_calls


def products(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of [S, P] in float64, a slice of P at a time."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for left, right in zip(a.split(2**18, 1), b.split(2**18, 1), strict=True):
        total += left.double() @ right.double().T
    return total


def relative_variance(gram: Tensor) -> float:
    """Variance over the squared norm of the mean, from the products of S estimates with each other; nan where the
    unbiased estimate of that norm is not positive."""
    count = len(gram)
    mean_square = float(gram.sum()) / count**2
    variance = (float(gram.trace()) - count * mean_square) / (count - 1)
    signal = mean_square - variance / count
    return variance / signal if signal > 0 else math.nan


def with_jackknife(gram: Tensor) -> tuple[float, float, float]:
    value, count = relative_variance(gram), len(gram)
    left_out = [
        relative_variance(gram[rows][:, rows]) for rows in ([j for j in range(count) if j != i] for i in range(count))
    ]
    mean = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((v - mean) ** 2 for v in left_out))
    return value, value - 1.96 * error, value + 1.96 * error


def interval(values: Tensor) -> list[float]:
    return [round(v, 4) for v in (float(values.mean()), *bootstrap_interval(values))]


def none_if_nan(values: list[float]) -> list[float] | None:
    return None if any(math.isnan(v) for v in values) else values


def compare(own: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and norm ratio, row by row of [S, P]."""
    dot = torch.stack([a.double() @ b.double() for a, b in zip(own, exact, strict=True)])
    sizes = [torch.stack([row.double().norm() for row in rows]) for rows in (own, exact)]
    return dot / (sizes[0] * sizes[1]).clamp_min(1e-300), sizes[0] / sizes[1]


def study(net: Any, reward: Any, seeds: int, batch: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    noises = [draw_noise(batch, 7000 + seed) for seed in range(seeds)]

    def run(way: Way, stop: int) -> tuple[Tensor, float]:
        done = [estimate(net, reward, noises[s], way, stop, 100 * s + stop) for s in range(seeds)]
        return torch.stack([g for g, _ in done]), sum(calls for _, calls in done) / seeds

    scheduler = make_scheduler()
    scheduler.set_timesteps(STEPS)
    end, _ = run(WAYS[0], STEPS)
    rows = []
    for stop in range(1, STEPS + 1):
        exact = end
        for way in WAYS:
            if stop < way.least:
                continue
            own, calls = run(way, stop)
            if way.name == "full":
                exact = own
            cosine, ratio = compare(own, exact)
            variance = [calls * v for v in with_jackknife(products(own, own))]
            rows.append(
                {
                    "mode": way.name,
                    "stop_step": stop,
                    "sigma": round(float(scheduler.sigmas[stop]), 4),
                    "network_calls": round(calls, 2),
                    "cosine": interval(cosine),
                    "norm_ratio": interval(ratio),
                    "cosine_to_end": interval(compare(own, end)[0]),
                    "variance_per_call": none_if_nan([float(f"{v:.4g}") for v in variance]),
                }
            )
        say(f"after {stop} steps, sigma {rows[-1]['sigma']}")
    return rows


def draw(rows: list[dict[str, Any]]) -> str:
    """Four panels over the noise level, a line a mode, bands for the intervals."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))

    def lines(key: str) -> list[Series]:
        series = []
        for number, mode in enumerate(modes):
            own = [row for row in rows if row["mode"] == mode and row[key] is not None]
            x, y, low, high = [row["sigma"] for row in own], *([row[key][i] for row in own] for i in range(3))
            dashed, tone = number >= len(TONES), TONES[number % len(TONES)]
            series.append(Series(mode, tone, x, y, low, high, dashed))
        return series

    def panel(key: str, label: str, **options: Any) -> str:
        x_label = "noise level at which the chain ends"
        return line_chart(
            lines(key), title=label, x_label=x_label, y_label=label, points=True, legend=False, **options
        )

    exact = [Mark(1.0, "exact")]
    variance = [row for row in rows if row["variance_per_call"] is not None and row["variance_per_call"][1] <= 0]
    for row in variance:  # nothing below zero on a logarithmic axis
        row["variance_per_call"][1] = row["variance_per_call"][0]
    return picture(
        [
            ("Cosine to the exact gradient of the same reward", panel("cosine", "cosine", marks=exact)),
            ("Norm over that of the exact gradient", panel("norm_ratio", "norm ratio", marks=exact)),
            ("Cosine to the exact gradient at the chain's end", panel("cosine_to_end", "cosine")),
            ("Relative variance times network calls", panel("variance_per_call", "variance per call", log_y=True)),
        ],
        lines("cosine"),
        columns=2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the JSON to this file")
    parser.add_argument("--plot", type=Path, help="write the picture (SVG) to this file")
    parser.add_argument("--from", dest="earlier", type=Path, help="draw this JSON instead of measuring")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--reward-updates", type=int, default=REWARD_UPDATES)
    args = parser.parse_args()
    if args.seeds < 3:
        parser.error(f"--seeds: expected at least 3 for an interval of the variance, got {args.seeds}")
    if args.earlier is not None:
        if args.plot is None:
            parser.error("--from: expected together with --plot")
        args.plot.write_text(draw(json.loads(args.earlier.read_text())["rows"]))
        return
    start, about = time.perf_counter(), record.about(torch.device("cpu"))

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {text}", flush=True)

    net, reward, accuracy = train_reward(0, args.reward_updates)
    say(f"reward trained, accuracy {accuracy['accuracy']}")
    net.requires_grad_(True)
    rows = study(net, reward, args.seeds, args.batch, say)
    figures = {
        "seeds": args.seeds,
        "batch": args.batch,
        "steps": STEPS,
        "parameters": sum(p.numel() for p in net.parameters()),
        "reward_accuracy": accuracy,
        "seconds": round(time.perf_counter() - start, 1),
        "about": about,
        "rows": rows,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot is not None:
        args.plot.write_text(draw(rows))


if __name__ == "__main__":
    main()
