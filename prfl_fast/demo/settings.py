"""Settings of a demo run: what a user can choose, and the sizes that follow from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prfl_fast.demo.align import Arm

# Learning rates and flow-matching weights are those that the study's tuning chose for each arm.
ARMS = (
    Arm("flow_matching", "Flow matching only", reward=None, rate=1e-4, flow_weight=3.0),
    Arm("pixel", "RGB ReFL, last step", reward="pixel", gradient="last:1", rate=2e-5, flow_weight=3.0),
    Arm("prfl", "PRFL, one random step", reward="latent", gradient="one", rate=5e-5, flow_weight=1.0),
    Arm("full", "Full chain", reward="latent", gradient="full", rate=1e-4, flow_weight=3.0),
)
HEADLINE = "prfl"  # the arm that "after" means in summary.json, chosen before any run


@dataclass(frozen=True)
class DemoSettings:
    """What ``prfl-fast demo`` takes.

    Attributes:
        output: folder of the report.
        clips: folder of videos to take the moving pictures from; None: made on the fly.
        from_scratch: train the base model instead of loading the shipped one.
        study: the long comparison instead of the demo.
        tiny: every stage with next to no work.
        seed: of everything that is drawn.
        seconds: training time of each arm.
        memory_budget: of each differentiable rollout (weights, gradients and graphs): "256MiB", bytes, ...
    """

    output: str = "out"
    clips: str | None = None
    from_scratch: bool = False
    study: bool = False
    tiny: bool = False
    seed: int = 0
    seconds: float = 60.0
    memory_budget: str = "64MiB"

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds: expected a positive number, got {self.seconds!r}")
        if self.study and (self.clips is not None or self.from_scratch):
            raise ValueError("study: is made on the embedded clips and the shipped base; got clips or from_scratch")

    @property
    def sizes(self) -> Sizes:
        """Amounts of data and work."""
        return TINY if self.tiny else Sizes()

    @property
    def arm_seconds(self) -> float:
        """Training seconds of an arm."""
        return min(self.seconds, TINY_SECONDS) if self.tiny else self.seconds

    def deciding(self) -> dict[str, Any]:
        """Everything that decides the outcome: all but where it is written."""
        chosen = asdict(self)
        del chosen["output"]
        return {**chosen, "sizes": asdict(self.sizes), "arms": [arm.to_dict() for arm in ARMS], "headline": HEADLINE}


@dataclass(frozen=True)
class Sizes:
    """Amounts: clips to train on and held-out ones, seeds to judge, seconds of the rewards, updates of a base model."""

    clips: int = 8192
    held_out: int = 1024
    seeds: int = 128
    watched_seeds: int = 32
    latent_reward_seconds: float = 75.0
    pixel_reward_seconds: float = 45.0
    base_updates: int = 8000
    own_clips_updates: int = 2500  # fine-tuning of the shipped base on a user's videos
    table_batch: int = 16


TINY_SECONDS = 1.0
TINY = Sizes(
    clips=256,
    held_out=64,
    seeds=8,
    watched_seeds=8,
    latent_reward_seconds=TINY_SECONDS,
    pixel_reward_seconds=TINY_SECONDS,
    base_updates=10,
    own_clips_updates=10,
    table_batch=2,
)
