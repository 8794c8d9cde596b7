"""CogVideoX: which op stands where in its blocks; text and video are one sequence, text first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_fast.models.fused.attend import attend, norm_rope, pairs, projections, splits, why_unfused
from prfl_fast.models.fused.branches import gated_linear_norm, gated_norm
from prfl_fast.models.fused.feed_forward import feed_forward
from prfl_fast.models.fused.values import Value, modulated, norm_of

_MODULE = "diffusers.models.attention_processor"
_ONE_PROJECTION = f"{_MODULE}.FusedCogVideoXAttnProcessor2_0"
PROCESSORS = (f"{_MODULE}.CogVideoXAttnProcessor2_0", _ONE_PROJECTION)


def cogvideox_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``CogVideoXBlock.forward``."""
    attn, length = block.attn1, encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    runs = (length, hidden_states.shape[1])
    shift, scale, gate = _modulation(block.norm1, temb)
    ffn_shift, ffn_scale, ffn_gate = _modulation(block.norm2, temb)

    normed = modulated(x, norm_of(block.norm1.norm), scale, shift, runs)
    norm = norm_of(block.norm2.norm)
    # Keywords of the caller's own are for the processor.
    if why_unfused(attn, PROCESSORS) is None and not attention_kwargs:
        q, k, v = projections(attn, normed, fused=_one_projection(attn))
        angles = pairs(image_rotary_emb, lambda table: table[None, :, None])
        q, k = norm_rope(attn, q, k, angles, across_heads=False, rope_tokens=(length, x.shape[1]))
        out = Value(attend(attn.processor, q, k, v))
        x, normed = gated_linear_norm(x, out, attn.to_out, gate, norm, ffn_scale, ffn_shift, runs)
    else:
        y, text_y = attn(
            hidden_states=normed.value[:, length:],
            encoder_hidden_states=normed.value[:, :length],
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )
        x, normed = gated_norm(x, torch.cat([text_y, y], dim=1), gate, norm, ffn_scale, ffn_shift, runs)
    x = feed_forward(block.ff, x, normed, ffn_gate, runs)
    return x[:, length:], x[:, :length]


def last_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`cogvideox_block` with the streams apart: the text that leaves a network's last block is read by no one,
    and then has no gradient to compute."""
    attn = block.attn1
    if why_unfused(attn, PROCESSORS) is not None or splits(attn) or attention_kwargs:
        return cogvideox_block(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
    first = block.norm1.linear(block.norm1.silu(temb)).chunk(6, dim=1)
    second = block.norm2.linear(block.norm2.silu(temb)).chunk(6, dim=1)
    streams = (encoder_hidden_states, first[3:], second[3:], None), (
        hidden_states, first[:3], second[:3], pairs(image_rotary_emb, lambda table: table[None, :, None])
    )  # fmt: skip
    norm, made = norm_of(block.norm1.norm), []
    for x, (shift, scale, _), _, angles in streams:
        q, k, v = projections(attn, modulated(x, norm, scale, shift), fused=_one_projection(attn))
        made.append((*norm_rope(attn, q, k, angles, across_heads=False), v))
    keys, values = (torch.cat([made[0][i], made[1][i]], dim=1) for i in (1, 2))
    norm, results = norm_of(block.norm2.norm), []
    for (x, (_, _, gate), (shift, scale, ffn_gate), _), (q, _, _) in zip(streams, made, strict=True):
        out = Value(attend(attn.processor, q, keys, values))
        x, normed = gated_linear_norm(x, out, attn.to_out, gate, norm, scale, shift)
        results.append(feed_forward(block.ff, x, normed, ffn_gate))
    return results[1], results[0]


def _one_projection(attn: Any) -> bool:
    return type(attn.processor).__name__ == _ONE_PROJECTION.rpartition(".")[2]


def _modulation(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate, each ``[B, 2, C]``: text's, video's."""
    made = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    return tuple(torch.stack([made[i + 3], made[i]], dim=1) for i in range(3))
