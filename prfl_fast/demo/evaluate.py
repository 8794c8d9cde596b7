"""What became of a model: clips of held-out seeds before the judges, with intervals, and the targets set beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prfl_fast.demo.codec import PatchCodec
from prfl_fast.demo.judges import Judgement, bootstrap_interval, diversity, judge
from prfl_fast.demo.rewards import latent_logits
from prfl_fast.demo.sample import sample_latents

SHOWN = 8  # clips of each arm that the report plays
PER_SEED = ("motion_error", "structure_error", "net_move", "speed")


@dataclass(frozen=True)
class Verdict:
    """One arm's held-out clips: the judgement, the latent reward's logits [N] at noise level 0, and the first clips
    ``[SHOWN, T, S, S]`` uint8."""

    judgement: Judgement
    reward: Tensor
    shown: npt.NDArray[np.uint8]

    def mean(self, key: str) -> float:
        """Mean over seeds of one of the judges, or of ``"reward"``."""
        values: Tensor = self.reward if key == "reward" else getattr(self.judgement, key)
        return float(values.mean())

    @property
    def diversity(self) -> float:
        """Mean distance of two clips' paths in pixels."""
        return diversity(self.judgement)

    def record(self, key: str, label: str, **more: Any) -> dict[str, Any]:
        """This arm's entry in ``details.json``."""
        values = {name: getattr(self.judgement, name) for name in PER_SEED} | {"reward": self.reward}
        return {
            "key": key,
            "label": label,
            "per_seed": {name: [round(v, 5) for v in value.tolist()] for name, value in values.items()},
            "intervals": {name: [float(value.mean()), *bootstrap_interval(value)] for name, value in values.items()},
            "diversity": self.diversity,
            **more,
        }


def verdict_of_latents(latents: Tensor, codec: PatchCodec, reward: nn.Module) -> Verdict:
    """Judges decoded ``latents`` [N, C, F, H, W]."""
    clips = codec.decode(latents)
    with torch.no_grad():
        logits = latent_logits(reward, latents, torch.zeros(len(latents)))
    shown = (clips[:SHOWN].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Verdict(judge(clips), logits, shown)


def verdict_of_model(net: nn.Module, noise: Tensor, codec: PatchCodec, reward: nn.Module) -> Verdict:
    """Samples from ``noise`` [N, C, F, H, W] and judges."""
    return verdict_of_latents(sample_latents(net, noise), codec, reward)


def total_error(verdict: Verdict) -> Tensor:
    """[N] motion error plus structure error: what decides a duel. A blank or frozen clip has a large one."""
    return verdict.judgement.motion_error + verdict.judgement.structure_error


def win_rate(ours: Verdict, theirs: Verdict) -> tuple[float, tuple[float, float]]:
    """Share of seeds on which ours has the smaller total error (ties count half), with its bootstrap interval."""
    a, b = total_error(ours), total_error(theirs)
    wins = (a < b).float() + 0.5 * (a == b).float()
    return float(wins.mean()), bootstrap_interval(wins)


def summarise(verdicts: Mapping[str, Verdict], headline: str, reward_accuracy: float) -> dict[str, Any]:
    """Figures of ``summary.json``: "after" is the arm ``headline``. Needs "good", "before", "pixel"."""
    before, after = verdicts["before"], verdicts[headline]
    rate, interval = win_rate(after, verdicts["pixel"])
    _, high = bootstrap_interval(after.judgement.motion_error)
    summary: dict[str, Any] = {"headline_arm": headline, "reward_accuracy": reward_accuracy}
    for key in ("reward", "motion_error", "structure_error", "net_move", "speed"):
        summary |= {f"{key}_before": before.mean(key), f"{key}_after": after.mean(key)}
    summary |= {
        "motion_error_after_high": high,
        "motion_error_control": verdicts["flow_matching"].mean("motion_error"),
        "diversity_before": before.diversity,
        "diversity_after": after.diversity,
        "diversity_good": verdicts["good"].diversity,
        "win_rate_latent_over_rgb": rate,
        "win_rate_interval": list(interval),
        "num_seeds": len(before.reward),
    }
    summary["targets"] = _targets(summary)
    return summary


def _targets(s: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets, with the words that the report shows; none is left out when it is missed."""

    def target(met: bool, sentence: str) -> dict[str, Any]:
        return {"met": bool(met), "sentence": sentence}

    bound = 0.7 * s["motion_error_before"]
    return [
        target(
            s["motion_error_after_high"] <= bound and s["num_seeds"] >= 64,
            f"Motion error's upper 95 % bound {s['motion_error_after_high']:.3f} is at most 0.7 of before"
            f" ({bound:.3f}), on {s['num_seeds']} seeds",
        ),
        target(
            s["net_move_after"] >= 0.8 * s["net_move_before"],
            f"Net movement {s['net_move_after']:.2f} px is at least 0.8 of before ({s['net_move_before']:.2f} px)",
        ),
        target(
            s["structure_error_after"] <= s["structure_error_before"],
            f"Structure error {s['structure_error_after']:.3f} is not above before"
            f" ({s['structure_error_before']:.3f})",
        ),
        target(
            # Hard to meet: defects spread the paths too, so good clips alone have less than the mixture.
            s["diversity_after"] >= s["diversity_before"],
            f"Diversity {s['diversity_after']:.2f} px is not below before ({s['diversity_before']:.2f} px;"
            f" the mixture's good clips alone: {s['diversity_good']:.2f} px)",
        ),
        target(
            s["motion_error_after"] < s["motion_error_control"],
            f"Motion error {s['motion_error_after']:.3f} is below that of flow matching alone"
            f" ({s['motion_error_control']:.3f})",
        ),
    ]
