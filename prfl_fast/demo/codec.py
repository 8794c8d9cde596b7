"""A closed-form codec: principal components of 8 x 8 patches stand in for the VAE.

``encode`` maps clips ``[N, T, S, S]`` in 0..1 to latents ``[N, C, T, S/8, S/8]``, ``decode`` maps back; both are
linear, so the pixel arm of the demo gets an exact gradient through its decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATCH = 8


def _to_patches(videos: Tensor) -> Tensor:
    n, t, h, w = videos.shape
    grid = videos.reshape(n, t, h // PATCH, PATCH, w // PATCH, PATCH)
    return grid.permute(0, 1, 2, 4, 3, 5).reshape(n, t, h // PATCH, w // PATCH, PATCH * PATCH)


@dataclass(frozen=True)
class PatchCodec:
    """``mean`` [64], ``basis`` [C, 64] orthonormal rows, ``scale`` [C] (standard deviation that whitens channel c)."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, videos: Tensor, channels: int = 6, whiten: float = 0.5) -> PatchCodec:
        """Principal components of the patches of ``videos`` [N, T, S, S].

        Args:
            videos: clips in 0..1.
            channels: latent channels kept.
            whiten: exponent in 0..1; 0 keeps the variances' ratios, 1 makes every channel's variance equal. The
                latents' overall variance is 1 in every case, which is what flow matching expects.
        """
        patches = _to_patches(videos).reshape(-1, PATCH * PATCH).double()
        mean = patches.mean(0)
        centred = patches - mean
        variance, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
        basis = vectors.flip(1)[:, :channels].T
        deviation = variance.flip(0)[:channels].clamp_min(1e-12).sqrt()
        # Signs of eigenvectors are arbitrary: fix them, so that the same clips give the same codec everywhere.
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        partly = deviation**whiten
        scale = partly * ((deviation / partly) ** 2).mean().sqrt()
        return cls(mean.float(), basis.float(), scale.float())

    def encode(self, videos: Tensor) -> Tensor:
        """[N, T, S, S] in 0..1 -> latents [N, C, T, S/8, S/8]."""
        latents = (_to_patches(videos) - self.mean) @ self.basis.T / self.scale
        return latents.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, T, h, w] -> clips [N, T, 8h, 8w], not clamped (clamping would cut gradients)."""
        n, _, t, h, w = latents.shape
        patches = (latents.permute(0, 2, 3, 4, 1) * self.scale) @ self.basis + self.mean
        grid = patches.reshape(n, t, h, w, PATCH, PATCH).permute(0, 1, 2, 4, 3, 5)
        return grid.reshape(n, t, h * PATCH, w * PATCH)

    def state(self) -> dict[str, Tensor]:
        """Tensors to save beside a model."""
        return {"codec.mean": self.mean, "codec.basis": self.basis, "codec.scale": self.scale}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> PatchCodec:
        """The inverse of :meth:`state`."""
        return cls(*(state[f"codec.{name}"].float() for name in ("mean", "basis", "scale")))
