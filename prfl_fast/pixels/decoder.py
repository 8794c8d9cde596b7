"""``PixelDecoder``: latents of a chain to frames in 0..1, differentiable, in memory that holds one chunk's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prfl_fast.pixels.families import FAMILIES, Family, family_of

Decode = Callable[[Tensor], Tensor]


class PixelDecoder:
    """Decodes latents as the family's pipeline does, so that a reward on frames has a gradient to the latents.

    ``PixelDecoder(vae)(latents)`` gives ``(vae.decode(un-normalised latents) / 2 + 0.5).clamp(0, 1)``, the bits of the
    pipeline's ``output_type="pt"``, as ``[B, 3, T, H, W]`` in the VAE's dtype. Each chunk of the video is a checkpoint:
    the backward decodes it again and holds its graph alone. Wan and CogVideoX are decoded group of frames by group of
    frames, with the decoder's cache handed on and differentiated; HunyuanVideo and LTX call by call of their decoder
    (``vae.enable_tiling()`` makes the calls smaller there).

    The clamps have the gradient of ``torch.clamp``: 1 inside and on the bounds, 0 outside; a pixel that is over-exposed
    gives nothing. A parameter of the VAE gets a gradient only where it requires one: freeze it by
    ``vae.requires_grad_(False)``.

    Args:
        vae: an AutoencoderKLWan, AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo or AutoencoderKLCogVideoX.
        latent_frames: which latent frames to decode, a slice of step 1 over time: ``slice(1)`` for the first frame
            alone. They are decoded as a video of their own; for Wan the first ones give the first frames of the whole.
        latent_shape: frames, height and width of packed latents ``[B, S, C]`` (LTX).

    Raises:
        TypeError, ValueError: a VAE of another class (pass a function ``latents -> frames`` instead), or an argument
            that does not fit it.

    Example:
        >>> decode = PixelDecoder(pipe.vae.requires_grad_(False), latent_frames=slice(1))
        >>> loss = -reward(decode(sample.latents)).mean()
    """

    def __init__(
        self, vae: Any, *, latent_frames: slice | None = None, latent_shape: tuple[int, int, int] | None = None
    ) -> None:
        family = family_of(vae)
        if family is None:
            raise TypeError(
                f"vae: expected one of {', '.join(FAMILIES)}, got {type(vae).__name__}; for another decoder pass a "
                "function of the latents that gives frames [B, C, T, H, W] in 0..1"
            )
        _check_slice(latent_frames)
        _check_shape(latent_shape, family, type(vae).__name__)
        self.vae = vae
        self.latent_frames = latent_frames
        self.latent_shape = latent_shape
        self._family: Family = family

    def count_latent_frames(self, latents: Tensor) -> int:
        """Latent frames in the latents, those that ``latent_frames`` leaves out too.

        Raises ValueError where the latents can't be decoded.
        """
        channels = int(getattr(self.vae.config, self._family.channels))
        if self.latent_shape is not None:
            frames, height, width = self.latent_shape
            expected: tuple[Any, ...] = (latents.shape[0] if latents.ndim else "B", frames * height * width, channels)
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"latents: expected packed ones [B, S, C] of shape {expected} (latent_shape={self.latent_shape}), "
                    f"got {tuple(latents.shape)}"
                )
            return frames
        channel_dim = 3 - self._family.time_dim
        if latents.ndim != 5 or latents.shape[channel_dim] != channels:
            layout = "[B, C, F, H, W]" if channel_dim == 1 else "[B, F, C, H, W]"
            packed = "; for packed ones give latent_shape=(F, H, W)" if self._family.packed else ""
            raise ValueError(
                f"latents: expected {layout} with {channels} channels for {type(self.vae).__name__}, "
                f"got {tuple(latents.shape)}{packed}"
            )
        return int(latents.shape[self._family.time_dim])

    def check(self, latents: Tensor) -> None:
        """Raises ValueError where these latents can't be decoded."""
        count = self.count_latent_frames(latents)
        if self.latent_frames is not None and not range(count)[self.latent_frames]:
            raise ValueError(f"latent_frames: {self.latent_frames} takes none of {count} latent frames")

    def __call__(self, latents: Tensor) -> Tensor:
        """Frames ``[B, 3, T, H, W]`` in 0..1 of latents in the layout of the family's pipeline."""
        self.check(latents)
        if self.latent_shape is not None:
            latents = latents.unflatten(1, self.latent_shape).movedim(-1, 1)
        elif self._family.time_dim == 1:
            latents = latents.transpose(1, 2)
        if self.latent_frames is not None:
            latents = latents[:, :, self.latent_frames]
        device = next(self.vae.parameters()).device
        frames = self._family.decode(self.vae, self._family.unnormalise(self.vae, latents.to(device)))
        return (frames * 0.5 + 0.5).clamp(0, 1)


def _check_slice(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, slice):
        raise TypeError(f"latent_frames: expected a slice, such as slice(1) for the first, got {type(value).__name__}")
    if value.step not in (None, 1):
        raise ValueError(f"latent_frames: expected a slice of step 1, got {value}")


def _check_shape(value: Any, family: Family, name: str) -> None:
    if value is None:
        return
    if not family.packed:
        raise ValueError(f"latent_shape: expected None, for the latents of {name} are not packed; got {value!r}")
    whole = isinstance(value, tuple) and len(value) == 3
    if not whole or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value):
        raise ValueError(f"latent_shape: expected (frames, height, width) in latents, got {value!r}")


def decoder_for(decode: Any, latents: Tensor) -> Decode:
    """What ``decode=`` means: a :class:`PixelDecoder` as it is, one around a VAE, or the caller's own function.

    Raises:
        TypeError, ValueError: neither of these, or latents that it can't decode.
    """
    if isinstance(decode, nn.Module) and hasattr(decode, "decode"):
        decode = PixelDecoder(decode)
    if isinstance(decode, PixelDecoder):
        decode.check(latents)
    elif not callable(decode):
        raise TypeError(f"decode: expected a VAE, a PixelDecoder or a function, got {type(decode).__name__}")
    checked: Decode = decode
    return checked


def module_of(decode: Decode) -> nn.Module | None:
    """The module that decodes, None for a plain function."""
    module = decode.vae if isinstance(decode, PixelDecoder) else decode
    return module if isinstance(module, nn.Module) else None
