"""Losses on the logits of a reward model, each the mean over the batch, in float32 at least."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def reward_feedback_loss(
    logits: Tensor, *, margin: float = 2.0, weight: float = 0.1, on: Literal["sigmoid", "logits"] = "sigmoid"
) -> Tensor:
    """Reward feedback for the generator: ``weight * mean(relu(margin - r))``, ``r = sigmoid(logits)``.

    The form of ReFL (ImageReward, arXiv 2304.05977); margin 2 and weight 0.1 are PRFL's published values. With
    ``on="sigmoid"`` a margin of 1 or more never clips: r stays below it. ``on="logits"`` takes ``r = logits``, whose
    gradient does not fade where the reward is sure of itself; there the margin is what stops.

    Args:
        logits: ``[B]``, B >= 1, any float dtype.
        margin: finite; the reward at which the loss ends.
        weight: finite, not negative.
        on: what the margin is compared with.

    Returns:
        A scalar, differentiable.

    Raises:
        ValueError: another shape, a margin, weight or ``on`` out of range.
        TypeError: logits of no float dtype.
    """
    logits = _checked("logits", logits)
    if not math.isfinite(margin):
        raise ValueError(f"margin: expected a finite number, got {margin}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight: expected a finite number that is not negative, got {weight}")
    if on not in ("sigmoid", "logits"):
        raise ValueError(f"on: expected 'sigmoid' or 'logits', got {on!r}")
    reward = torch.sigmoid(logits) if on == "sigmoid" else logits
    return weight * functional.relu(margin - reward).mean()


def reward_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Training of the reward model on labels: ``mean(-y log sigmoid(s) - (1 - y) log(1 - sigmoid(s)))``.

    Computed as ``softplus(s) - y s``, which does not overflow. PRFL trains its reward model so, on good (1) and poor
    (0) clips at a random noise level.

    Args:
        logits: ``[B]``, B >= 1, any float dtype.
        labels: ``[B]``, within 0..1 (soft labels too), any float, integer or bool dtype.

    Returns:
        A scalar, differentiable.

    Raises:
        ValueError: other shapes, labels that are not finite or not within 0..1 (read on the host).
        TypeError: logits of no float dtype.
    """
    logits = _checked("logits", logits)
    if labels.shape != logits.shape:
        raise ValueError(f"labels: expected the shape of logits, {tuple(logits.shape)}, got {tuple(labels.shape)}")
    labels = labels.to(device=logits.device, dtype=logits.dtype)
    inside = (labels >= 0) & (labels <= 1)  # false for NaN
    if not bool(inside.all()):
        raise ValueError(f"labels: expected finite values within 0..1, got {labels[~inside].tolist()[:4]}")
    return functional.binary_cross_entropy_with_logits(logits, labels)


def bradley_terry_loss(preferred_logits: Tensor, rejected_logits: Tensor) -> Tensor:
    """Training of the reward model on pairs: ``mean(-log sigmoid(s_preferred - s_rejected))``.

    Bradley and Terry 1952: the probability that one of a pair is preferred is the sigmoid of the difference of their
    scores. Computed as ``softplus(s_rejected - s_preferred)``, which does not overflow.

    Args:
        preferred_logits: ``[B]``, B >= 1, any float dtype.
        rejected_logits: ``[B]``, one for each of the preferred.

    Returns:
        A scalar, differentiable.

    Raises:
        ValueError: other shapes.
        TypeError: logits of no float dtype.
    """
    preferred, rejected = _checked("preferred_logits", preferred_logits), _checked("rejected_logits", rejected_logits)
    if preferred.shape != rejected.shape:
        raise ValueError(
            "rejected_logits: expected the shape of preferred_logits, "
            f"{tuple(preferred.shape)}, got {tuple(rejected.shape)}"
        )
    return functional.softplus(rejected - preferred).mean()


def _checked(name: str, logits: Tensor) -> Tensor:
    if logits.ndim != 1 or not logits.shape[0]:
        raise ValueError(f"{name}: expected [B] with B >= 1, got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {logits.dtype}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
