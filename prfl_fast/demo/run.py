"""``prfl-fast demo``: every stage in order, what it measured written to one folder, and the report made of that."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.demo.align import Aligned, Arm, Rewards, Trail, align
from prfl_fast.demo.base import Curve
from prfl_fast.demo.data import Material, prepare
from prfl_fast.demo.evaluate import Verdict, summarise, verdict_of_latents, verdict_of_model
from prfl_fast.demo.gradients import gradient_table
from prfl_fast.demo.net import draw_noise
from prfl_fast.demo.report import write_report
from prfl_fast.demo.rewards import (
    PixelReward,
    latent_accuracy,
    make_latent_reward,
    pixel_accuracy,
    train_latent_reward,
    train_pixel_reward,
    trained,
)
from prfl_fast.demo.settings import ARMS, HEADLINE, DemoSettings
from prfl_fast.demo.stages import Stages

STUDY = "study.json"  # the committed long comparison, beside this file
JUDGED_SEED, WATCHED_SEED = 777, 778  # of initial noise that no training draws


def run_demo(settings: DemoSettings) -> Path:
    """Run the demo and return the path of its report.

    Finished stages lie in ``output/stages``: after an interruption the same command goes on from there.

    Raises:
        ImportError: diffusers (or, with ``clips``, PyAV) is missing.
        ValueError: no usable video, or a memory budget that no rollout fits.
    """
    if settings.study:
        from prfl_fast.demo.study import run_study

        return run_study(settings)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    stages = Stages(output / "stages", settings.deciding())
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    say("clips and base model")
    material = prepare(settings, stages)
    say("latent reward and pixel reward")
    rewards, reward_curve = _rewards(settings, material, stages)
    accuracy = latent_accuracy(rewards.latent, material.held_out)
    in_pixels = pixel_accuracy(rewards.pixel, material.codec, material.held_out)
    say(f"held-out accuracy: latent {accuracy['accuracy'][0]:.3f} at noise level 0, pixel {in_pixels:.3f}")

    noise = draw_noise(settings.sizes.seeds, JUDGED_SEED)
    labels = {"real": "Training mixture", "good": "Its good clips", "before": "Before"}
    labels |= {arm.key: arm.label for arm in ARMS}
    held_out = material.held_out.latents
    held_out_good = held_out[material.held_out.good > 0]
    verdicts = {
        "real": verdict_of_latents(held_out[: settings.sizes.seeds], material.codec, rewards.latent),
        "good": verdict_of_latents(held_out_good[: settings.sizes.seeds], material.codec, rewards.latent),
        "before": verdict_of_model(material.base, noise, material.codec, rewards.latent),
    }
    aligned: dict[str, Aligned] = {}
    for arm in ARMS:
        say(arm.label)
        aligned[arm.key] = _align(settings, arm, material, rewards, stages)
        verdicts[arm.key] = verdict_of_model(aligned[arm.key].net, noise, material.codec, rewards.latent)
        say(_line(verdicts[arm.key], aligned[arm.key]))
    say("table of gradient modes")
    trainable = copy.deepcopy(material.base).requires_grad_(True)
    table = gradient_table(trainable, rewards.latent, noise[: settings.sizes.table_batch])

    summary = summarise(verdicts, HEADLINE, accuracy["accuracy"][0])
    summary |= {"pixel_reward_accuracy": in_pixels, "memory_plan": aligned[HEADLINE].plan}
    summary |= {"seconds": time.perf_counter() - start, "settings": asdict(settings) | settings.deciding()}
    summary["environment"] = environment()
    details = {
        "arms": [verdicts[key].record(key, labels[key], **_effort(aligned.get(key))) for key in labels],
        "curves": _curves(aligned, material.base_curve, reward_curve),
        "reward_accuracy": accuracy,
        "gradient_norms": {key: arm.gradient_norms for key, arm in aligned.items() if arm.got_gradients},
        "gradient_table": table,
    }
    _write_json(output / "summary.json", summary)
    _write_json(output / "details.json", details)
    shown = {key: verdicts[key].shown for key in labels}
    np.savez_compressed(output / "clips.npz", **shown)  # type: ignore[arg-type]
    study = files("prfl_fast.demo") / STUDY
    if study.is_file():
        with as_file(study) as path:
            report = write_report(output, study=path)
    else:
        report = write_report(output)
    for target in summary["targets"]:
        say(("met      " if target["met"] else "NOT MET  ") + target["sentence"])
    low, high = summary["win_rate_interval"]
    say(f"latent over pixel reward: {summary['win_rate_latent_over_rgb']:.2f} of seeds ({low:.2f} to {high:.2f})")
    say(f"report: {report}")
    return report


def environment() -> dict[str, Any]:
    """Where a run was made."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "prfl_fast": prfl_fast.__version__,
    }


def _rewards(settings: DemoSettings, material: Material, stages: Stages) -> tuple[Rewards, Curve]:
    sizes = settings.sizes
    done = stages.load("latent_reward")
    if done is None:
        latent, curve = train_latent_reward(
            material.base, material.train, seconds=sizes.latent_reward_seconds, seed=settings.seed
        )
        stages.save("latent_reward", latent.state_dict(), {"updates": curve.updates, "loss": curve.loss})
    else:
        latent = trained(make_latent_reward(material.base), done[0])
        curve = Curve(1, done[1]["updates"], done[1]["loss"])
    done = stages.load("pixel_reward")
    if done is None:
        pixel, _ = train_pixel_reward(
            material.base, material.codec, material.train, seconds=sizes.pixel_reward_seconds, seed=settings.seed
        )
        stages.save("pixel_reward", pixel.state_dict(), {})
    else:
        pixel = trained(PixelReward(), done[0])
    return Rewards(latent, pixel, material.codec), curve


def _align(settings: DemoSettings, arm: Arm, material: Material, rewards: Rewards, stages: Stages) -> Aligned:
    name = f"arm_{arm.key}"
    done = stages.load(name)
    if done is not None:
        notes = done[1]
        return Aligned(trained(copy.deepcopy(material.base), done[0]), Trail(**notes.pop("trail")), **notes)
    watched = draw_noise(settings.sizes.watched_seeds, WATCHED_SEED)

    def watch(net: nn.Module) -> float:
        return verdict_of_model(net, watched, material.codec, rewards.latent).mean("motion_error")

    aligned = align(
        material.base,
        arm,
        rewards,
        material.train.latents,
        seed=settings.seed,
        seconds=settings.arm_seconds,
        memory_budget=settings.memory_budget,
        watch=watch,
    )
    notes = {key: value for key, value in vars(aligned).items() if key not in {"net", "trail"}}
    stages.save(name, aligned.net.state_dict(), notes | {"trail": asdict(aligned.trail)})
    return aligned


def _effort(aligned: Aligned | None) -> dict[str, Any]:
    if aligned is None:
        return {}
    return {
        "updates": aligned.updates,
        "train_seconds": aligned.seconds,
        "network_calls": aligned.network_calls,
        "plan": aligned.plan,
    }


def _curves(aligned: dict[str, Aligned], base: Curve, reward: Curve) -> dict[str, Any]:
    curves: dict[str, Any] = {
        "base": {"updates": base.updates, "loss": base.loss},
        "reward_model": {"updates": reward.updates, "loss": reward.loss},
    }
    for key, outcome in aligned.items():
        trail = outcome.trail
        thin = slice(None, None, max(1, len(trail.seconds) // 150))
        curves[key] = {
            "seconds": trail.seconds[thin],
            "reward": _smooth(trail.reward)[thin],
            "loss": _smooth(trail.loss)[thin],
            "watched_seconds": trail.watched_seconds,
            "motion_error": trail.watched,
        }
    return curves


def _smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean of the last ``window`` values at each place; NaN stays NaN."""
    sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp_min(0)
    means: Tensor = (sums[ends] - sums[starts]) / (ends - starts)
    return [float(mean) for mean in means]


def _line(verdict: Verdict, aligned: Aligned) -> str:
    return (
        f"  {aligned.updates} updates in {aligned.seconds:.0f} s: motion error {verdict.mean('motion_error'):.3f},"
        f" structure error {verdict.mean('structure_error'):.3f}, net move {verdict.mean('net_move'):.2f},"
        f" diversity {verdict.diversity:.2f}, reward {verdict.mean('reward'):.2f}"
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(_finite(content), indent=1, default=str, allow_nan=False), encoding="utf-8")


def _finite(content: Any) -> Any:
    """NaN, which JSON doesn't know, as null."""
    if isinstance(content, float):
        return content if content == content and abs(content) != float("inf") else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
