"""Schedulers of diffusers that no reward gradient can go through, or whose steps are no function of latents and output.

They are refused by name and by reason, before anything is probed, encoded or sampled. What stands in no list is
decided by the probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOKENS = "it samples discrete tokens, through which no gradient flows"

REFUSED: dict[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DDPMWuerstchenScheduler": "its step takes one timestep per sample, and its latents are those of an image prior",
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "HeliosDMDScheduler": "its step re-noises with tensors that Helios' pipeline makes for each chunk of frames",
    "KarrasVeScheduler": "the network is called on latents that it has already moved to another noise level, and its "
    "second evaluation is another method (step_correct)",
    "PiflowScheduler": "its network predicts a policy of n_grid outputs per latent, integrated inside its step",
    "RFD4ProteinaScheduler": "its step needs the mask of the atoms to be designed",
    "RePaintScheduler": "its step needs the image and the mask to be painted",
    "ScoreSdeVeScheduler": "it has a predictor and a corrector (step_pred, step_correct) instead of a step",
    "ScoreSdeVpScheduler": "it has a predictor (step_pred) instead of a step",
    "VQDiffusionScheduler": _TOKENS,
}


def refuse_unsupported(scheduler: Any) -> None:
    """Raises for a scheduler that stands in ``REFUSED``, or that is set up for a network of another output.

    A subclass with a ``step`` of its own is another scheduler.

    Raises:
        TypeError: the scheduler's class is refused; its settings ask for a network output that is not shaped like the
            latents, or for latents that change their size on the way; or the seed of its noise is left open.
    """
    for kind in type(scheduler).__mro__:
        if kind.__name__ in REFUSED:
            raise TypeError(f"scheduler: {type(scheduler).__name__} is not supported: {REFUSED[kind.__name__]}")
        if "step" in vars(kind):
            break
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        return  # no scheduler; who goes on with it says so
    variance = config.get("variance_type")
    if isinstance(variance, str) and variance.startswith("learned"):
        raise TypeError(
            f"scheduler: {type(scheduler).__name__} with variance_type={variance!r} is not supported: its network "
            "predicts variances in further channels; expected an output shaped like the latents"
        )
    if getattr(scheduler, "noise_sampler_seed", 0) is None:
        raise TypeError(
            f"scheduler: {type(scheduler).__name__} without a noise_sampler_seed is not supported: its first step "
            "would draw one; expected noise_sampler_seed=... when it is made"
        )
    if config.get("stages", 1) != 1:
        raise TypeError(
            f"scheduler: {type(scheduler).__name__} with stages={config['stages']} is not supported: the latents grow "
            "between its stages; expected stages=1"
        )


def refuse_missing_seed(scheduler: Any, generator: Any) -> None:
    """Raises ValueError for a scheduler that reads the seed of its noise off a generator, where there is none."""
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    if generator is None and "CosineDPMSolverMultistepScheduler" in names:
        raise ValueError(
            f"generator: {type(scheduler).__name__} takes the seed of its Brownian tree from it; expected a "
            "torch.Generator or one per sample, got None"
        )
