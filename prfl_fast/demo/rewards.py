"""The demo's two rewards, trained on the same labelled clips: one reads noisy latents, the other decoded pixels."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prfl_fast.demo.base import Curve
from prfl_fast.demo.codec import PatchCodec
from prfl_fast.demo.net import TRAIN_TIMESTEPS, add_noise, prompt
from prfl_fast.reward import LatentRewardModel, reward_bce_loss

NUM_BLOCKS, NUM_HEADS = 2, 4  # of the latent reward
Reward = TypeVar("Reward", bound=nn.Module)
ACCURACY_SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)


@dataclass(frozen=True)
class Labelled:
    """Latents ``[N, C, F, H, W]`` of clips and their labels ``[N]``, 1 for a good clip."""

    latents: Tensor
    good: Tensor


class PixelReward(nn.Module):
    """A small convolutional network over decoded clips ``[B, T, S, S]`` -> logits ``[B]``, as RGB ReFL would use."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: tuple[int, int, int]) -> list[nn.Module]:
            convolution = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)
            return [convolution, nn.GroupNorm(4, outputs), nn.SiLU()]

        self.features = nn.Sequential(
            *stage(3, width, (1, 2, 2)),
            *stage(width, 2 * width, (1, 2, 2)),
            *stage(2 * width, 4 * width, (1, 2, 2)),
            *stage(4 * width, 4 * width, (2, 2, 2)),
        )
        self.head = nn.Sequential(nn.Linear(4 * width * 4 * 2 * 2, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, clips: Tensor) -> Tensor:
        batch, frames, height, width = clips.shape
        # Where things are, beside what is there: a convolution alone can't tell a body that jumped from one that moved.
        rows = torch.linspace(-1, 1, height).reshape(1, 1, height, 1).expand(batch, frames, height, width)
        columns = torch.linspace(-1, 1, width).reshape(1, 1, 1, width).expand(batch, frames, height, width)
        seen = self.features(torch.stack([clips, rows, columns], 1))
        logits: Tensor = self.head(seen.flatten(1))[:, 0]
        return logits


def make_latent_reward(base: nn.Module, seed: int = 0) -> LatentRewardModel:
    """PAVRM (arXiv 2511.21541) on a copy of the first ``NUM_BLOCKS`` blocks of ``base``, with a new head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatentRewardModel.from_transformer(base, num_blocks=NUM_BLOCKS, num_heads=NUM_HEADS)


def trained(reward: Reward, weights: Mapping[str, Tensor]) -> Reward:
    """``reward`` with these weights, frozen: as training leaves it."""
    reward.load_state_dict(weights)
    return reward.eval().requires_grad_(False)


def latent_logits(reward: nn.Module, latents: Tensor, timestep: Tensor) -> Tensor:
    """Logits ``[B]`` of the latent reward at ``timestep`` (0-dimensional or ``[B]``)."""
    logits: Tensor = reward(latents, timestep, **prompt(len(latents)))
    return logits


def train_latent_reward(
    base: nn.Module,
    labelled: Labelled,
    *,
    seconds: float,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> tuple[LatentRewardModel, Curve]:
    """:func:`make_latent_reward`, trained at every noise level."""
    reward = make_latent_reward(base, seed)

    def logits(latents: Tensor, generator: torch.Generator) -> Tensor:
        sigmas = torch.rand(len(latents), generator=generator)
        noisy, _ = add_noise(latents, sigmas, generator)
        return latent_logits(reward, noisy, sigmas * TRAIN_TIMESTEPS)

    curve = _train(reward, labelled, logits, seconds=seconds, seed=seed, clock=clock, progress=progress)
    return reward, curve


def train_pixel_reward(
    base: nn.Module,
    codec: PatchCodec,
    labelled: Labelled,
    *,
    seconds: float,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> tuple[PixelReward, Curve]:
    """A pixel reward for the baseline, trained with the care that ours has.

    Half of its clips are what the base model makes of the labelled ones (noise added, then predicted away), so that it
    knows what generated clips look like; and all get a little pixel noise, without which it is fooled by patterns that
    nobody sees.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reward = PixelReward()

    def logits(latents: Tensor, generator: torch.Generator) -> Tensor:
        sigmas = 0.4 * torch.rand(len(latents), generator=generator) * (torch.rand(1, generator=generator) < 0.5)
        noisy, _ = add_noise(latents, sigmas, generator)
        with torch.no_grad():
            velocity = base(noisy, sigmas * TRAIN_TIMESTEPS, **prompt(len(noisy)), return_dict=False)[0]
            clips = codec.decode(noisy - sigmas.reshape(-1, 1, 1, 1, 1) * velocity)
        strength = 0.1 * torch.rand(len(clips), 1, 1, 1, generator=generator)
        result: Tensor = reward(clips + strength * torch.randn(clips.shape, generator=generator))
        return result

    curve = _train(reward, labelled, logits, seconds=seconds, seed=seed, clock=clock, progress=progress)
    return reward, curve


def _train(
    reward: nn.Module,
    labelled: Labelled,
    logits: Callable[[Tensor, torch.Generator], Tensor],
    *,
    seconds: float,
    seed: int,
    clock: Callable[[], float],
    progress: bool,
) -> Curve:
    """Binary cross-entropy by AdamW for so many seconds, the learning rate falling linearly with the time left."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reward.parameters(), 1e-3, weight_decay=0.01)
    averaged = copy.deepcopy(reward)
    curve = Curve(20)
    reward.train()
    start, update, left = clock(), 0, 1.0
    with tqdm(total=round(seconds), desc=type(reward).__name__, unit="s", disable=not progress) as bar:
        while left > 0 or update == 0:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (update + 1) / 50) * max(left, 0.02)
            rows = torch.randint(len(labelled.good), (64,), generator=generator)
            loss = reward_bce_loss(logits(labelled.latents[rows], generator), labelled.good[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(reward.parameters(), 1.0)
            optimizer.step()
            update += 1
            decay = min(0.99, update / (10 + update))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(reward.parameters()), 1 - decay)
            curve.add(update, float(loss.detach()))
            left = 1 - (clock() - start) / seconds
            bar.n = min(round(seconds), round((1 - left) * seconds))
            if update % 20 == 0:
                bar.refresh()
    trained(reward, averaged.state_dict())
    return curve


def latent_accuracy(reward: nn.Module, held_out: Labelled, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy on held-out clips at each of ``ACCURACY_SIGMAS``: ``{"sigma", "accuracy", "count"}``."""
    accuracies = []
    for sigma in ACCURACY_SIGMAS:
        generator = torch.Generator().manual_seed(seed)
        sigmas = torch.full((len(held_out.good),), sigma)
        noisy, _ = add_noise(held_out.latents, sigmas, generator)
        with torch.no_grad():
            chosen = latent_logits(reward, noisy, sigmas * TRAIN_TIMESTEPS) > 0
        accuracies.append(float((chosen == (held_out.good > 0)).float().mean()))
    return {"sigma": list(ACCURACY_SIGMAS), "accuracy": accuracies, "count": len(held_out.good)}


def pixel_accuracy(reward: nn.Module, codec: PatchCodec, held_out: Labelled) -> float:
    """Accuracy of the pixel reward on decoded held-out clips."""
    with torch.no_grad():
        chosen = reward(codec.decode(held_out.latents)) > 0
    return float((chosen == (held_out.good > 0)).float().mean())
