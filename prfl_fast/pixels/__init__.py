"""From latents to frames with a gradient: the decoder of a diffusers VAE, chunk by chunk, each chunk a checkpoint."""

from prfl_fast.pixels.decoder import Decode, PixelDecoder, decoder_for, module_of

__all__ = ["Decode", "PixelDecoder", "decoder_for", "module_of"]
