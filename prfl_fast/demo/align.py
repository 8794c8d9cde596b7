"""Alignment of the demo's base model: every arm is the same loop with another gradient or another reward."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import prfl_fast
from prfl_fast.demo.base import flow_matching_loss
from prfl_fast.demo.codec import PatchCodec
from prfl_fast.demo.net import CHANNELS, COLUMNS, FRAMES, ROWS, prompt
from prfl_fast.demo.rewards import latent_logits
from prfl_fast.demo.sample import STEPS, make_scheduler


@dataclass(frozen=True)
class Arm:
    """One way to align.

    Attributes:
        key, label: name in the files, name in the report.
        reward: ``"latent"``, ``"pixel"``, or None for flow matching alone.
        gradient: mode of ``unrolled_sample``; ``"one"`` draws a step I from ``first_step`` on, differentiates it and
            ends the chain there (PRFL, arXiv 2511.21541, with a bound: at higher noise the reward knows little).
        supervise: numbers of steps after which the reward looks at the latents (None: at the end only).
        rate: AdamW's learning rate.
        margin: the loss is ``relu(margin - logit)``.
        flow_weight: weight of the flow-matching loss on the mixture, in every update.
        first_step: see ``gradient``.
        batch: clips of a rollout, and of the flow-matching loss.
    """

    key: str
    label: str
    reward: str | None
    gradient: str = "full"
    supervise: tuple[int, ...] | None = None
    rate: float = 2e-4
    margin: float = 2.0
    flow_weight: float = 3.0
    first_step: int = 4
    batch: int = 16

    def to_dict(self) -> dict[str, Any]:
        """All settings, for the report."""
        return asdict(self)


@dataclass(frozen=True)
class Rewards:
    """What an arm may be rewarded by. ``pixel`` sees ``codec.decode(latents)``."""

    latent: nn.Module
    pixel: nn.Module
    codec: PatchCodec


@dataclass
class Trail:
    """Curves of one arm: training seconds, mean reward of the drawn samples, total loss; and what ``watch`` gave."""

    seconds: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    watched_seconds: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Aligned:
    """An arm's outcome. ``gradient_norms`` [STEPS]: root mean square over the updates that reached a step, NaN for
    none; ``plan``: the memory plan of the rollouts as text."""

    net: nn.Module
    trail: Trail
    updates: int
    seconds: float
    network_calls: int
    gradient_norms: list[float]
    plan: str

    @property
    def got_gradients(self) -> bool:
        """True where a reward's gradient reached some step."""
        return any(norm == norm for norm in self.gradient_norms)


def align(
    base: nn.Module,
    arm: Arm,
    rewards: Rewards,
    latents: Tensor,
    *,
    seed: int,
    seconds: float | None = None,
    updates: int | None = None,
    memory_budget: str | int | None = None,
    watch: Callable[[nn.Module], float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> Aligned:
    """Trains a copy of ``base`` for so many ``seconds`` or ``updates`` (exactly one of them).

    ``latents`` [N, C, F, H, W] is the mixture that the flow-matching loss draws from. ``watch(net)`` is called eight
    times on the way; its time does not count.

    Raises ValueError unless exactly one of ``seconds`` and ``updates`` is given.
    """
    if (seconds is None) == (updates is None):
        raise ValueError(f"seconds, updates: expected exactly one, got {seconds!r} and {updates!r}")
    net = copy.deepcopy(base).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), arm.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    trail, squares = Trail(), torch.zeros(STEPS, dtype=torch.float64)
    reached = torch.zeros(STEPS, dtype=torch.int64)
    total = seconds if seconds is not None else float(updates or 0)
    spent, count, calls, next_watch = 0.0, 0, 0, 0.0
    plan: prfl_fast.MemoryPlan | None = None
    unit = "s" if updates is None else "update"
    with tqdm(total=round(total), desc=arm.label, unit=unit, disable=not progress) as bar:
        while (done := spent if updates is None else float(count)) < total or count == 0:
            if watch is not None and done >= next_watch:
                trail.watched_seconds.append(spent)
                trail.watched.append(watch(net))
                next_watch += total / 8
            start = clock()
            loss = arm.flow_weight * flow_matching_loss(
                net, latents[torch.randint(len(latents), (arm.batch,), generator=generator)], generator
            )
            value = float("nan")
            if arm.reward is not None:
                sample, logits = _rollout(net, arm, rewards, generator, memory_budget, plan)
                loss = loss + prfl_fast.reward_feedback_loss(logits, margin=arm.margin, weight=1.0, on="logits")
                value = float(logits.detach().mean())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            count += 1
            if arm.reward is not None:
                norms = sample.gradient_norms
                reached += torch.isfinite(norms)
                squares += norms.nan_to_num().square()
                calls += sample.network_calls
                plan = sample.plan  # planned once: every rollout of an arm has the same shapes
            spent += clock() - start
            trail.seconds.append(spent)
            trail.reward.append(value)
            trail.loss.append(float(loss.detach()))
            bar.n = min(round(total), round(spent if updates is None else count))
            if count % 5 == 0:
                bar.refresh()
    if watch is not None:
        trail.watched_seconds.append(spent)
        trail.watched.append(watch(net))
    mean = (squares / reached).sqrt()  # 0 / 0 is NaN: no gradient ever reached that step
    return Aligned(net.eval().requires_grad_(False), trail, count, spent, calls, mean.tolist(), str(plan or ""))


def _rollout(
    net: nn.Module,
    arm: Arm,
    rewards: Rewards,
    generator: torch.Generator,
    memory_budget: str | int | None,
    plan: prfl_fast.MemoryPlan | None,
) -> tuple[prfl_fast.Sample, Tensor]:
    """One differentiable rollout and the logits of its taps, ``[taps * batch]``."""
    shape = (arm.batch, CHANNELS, FRAMES, ROWS, COLUMNS)
    gradient, stop_step = arm.gradient, None
    if gradient == "one":
        step = int(torch.randint(arm.first_step, STEPS, (1,), generator=generator))
        gradient, stop_step = f"step:{step}", step + 1
    sample = prfl_fast.unrolled_sample(
        net,
        make_scheduler(),
        torch.randn(shape, generator=generator),
        STEPS,
        stop_step=stop_step,
        supervise=arm.supervise,
        conditioning=prompt(arm.batch),
        gradient=gradient,
        memory_budget=memory_budget if plan is None else None,
        plan=plan,
    )
    if arm.reward == "latent":
        logits = [latent_logits(rewards.latent, tap.latents, tap.timestep) for tap in sample.taps]
    else:
        logits = [rewards.pixel(rewards.codec.decode(tap.latents)) for tap in sample.taps]
    return sample, torch.cat(logits)
