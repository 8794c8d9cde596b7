"""Process reward: a model that scores a noisy latent at any noise level, its pooling, and the losses around it."""

from __future__ import annotations

from prfl_fast.reward.losses import bradley_terry_loss, reward_bce_loss, reward_feedback_loss
from prfl_fast.reward.model import LatentRewardModel
from prfl_fast.reward.pool import QueryAttentionPool

__all__ = [
    "LatentRewardModel",
    "QueryAttentionPool",
    "bradley_terry_loss",
    "reward_bce_loss",
    "reward_feedback_loss",
]
