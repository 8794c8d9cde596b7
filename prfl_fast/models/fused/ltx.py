"""LTX-Video: which op stands where in its blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prfl_fast.models.fused.attend import attend, norm_rope, pairs, projections, valid_lengths, why_unfused
from prfl_fast.models.fused.branches import gated_linear, gated_linear_norm, gated_norm
from prfl_fast.models.fused.feed_forward import feed_forward
from prfl_fast.models.fused.values import Value, modulated, norm_of
from prfl_fast.ops import gated_residual

PROCESSORS = ("diffusers.models.transformers.transformer_ltx.LTXVideoAttnProcessor",)
# What diffusers adds to the score of a key that does not count is -10000: its weight is zero in every dtype.
_OUT = -9000.0


def ltx_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """``LTXVideoTransformerBlock.forward``."""
    x = hidden_states
    table = block.scale_shift_table.to(temb.device)
    modulation = table[None, None] + temb.unflatten(2, (table.shape[0], -1))
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(2)

    attn, normed = block.attn1, modulated(x, norm_of(block.norm1), scale, shift)
    if why_unfused(attn, PROCESSORS) is None:
        q, k, v = projections(attn, normed)
        # Rotated before the heads are split: each head has angles of its own.
        angles = pairs(image_rotary_emb, lambda own: own.unflatten(2, (attn.heads, -1)))
        q, k = norm_rope(attn, q, k, angles, across_heads=True)
        x = gated_linear(x, Value(attend(attn.processor, q, k, v)), attn.to_out, gate)
    else:
        y = attn(hidden_states=normed.value, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
        x = gated_residual(x, y, gate)

    attn, norm = block.attn2, norm_of(block.norm2)
    lengths, masked = valid_lengths(encoder_attention_mask, _valid)
    if why_unfused(attn, PROCESSORS) is None and not masked:
        q, k, v = projections(attn, Value(x), Value(encoder_hidden_states))
        q, k = norm_rope(attn, q, k, across_heads=True)
        out = Value(attend(attn.processor, q, k, v, kv_lengths=lengths))
        x, normed = gated_linear_norm(x, out, attn.to_out, None, norm, ffn_scale, ffn_shift)
    else:
        y = attn(
            x,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=None,
            attention_mask=encoder_attention_mask,
        )
        x, normed = gated_norm(x, y, None, norm, ffn_scale, ffn_shift)
    return feed_forward(block.ff, x, normed, ffn_gate)


def _valid(mask: Tensor) -> Tensor | None:
    """True where a key counts; None for a mask of the caller's own that differs by query or weighs keys."""
    if mask.ndim != 3 or mask.shape[1] != 1:
        return None
    counts = mask[:, 0] == 0
    return counts if bool((counts | (mask[:, 0] <= _OUT)).all()) else None
