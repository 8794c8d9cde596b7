"""Wan 2.1 and 2.2: which op stands where in its blocks (text, image, per-token timesteps; VACE's control blocks)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_fast.models.fused.attend import attend, heads, norm_rope, pairs, projections, why_unfused
from prfl_fast.models.fused.branches import gated_linear, gated_linear_norm, gated_norm
from prfl_fast.models.fused.feed_forward import feed_forward
from prfl_fast.models.fused.values import Norm, Value, added, is_norm, modulated, norm_of
from prfl_fast.ops import gated_residual, qk_norm_rope

PROCESSORS = ("diffusers.models.transformers.transformer_wan.WanAttnProcessor",)
# Text comes last, after the image's tokens.
_TEXT_TOKENS = 512


def wan_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """``WanTransformerBlock.forward``."""
    table = block.scale_shift_table
    return _block(block, hidden_states, encoder_hidden_states, table.to(temb.device), temb, rotary_emb)


def wan_vace_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor | None, Tensor]:
    """``WanVACETransformerBlock.forward``."""
    if block.proj_in is not None:
        control_hidden_states = block.proj_in(control_hidden_states) + hidden_states
    table = block.scale_shift_table.to(temb.device)
    control = _block(block, control_hidden_states, encoder_hidden_states, table, temb, rotary_emb)
    return (None if block.proj_out is None else block.proj_out(control)), control


def _block(
    block: Any, x: Tensor, text: Tensor, table: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    wide = temb.to(torch.promote_types(temb.dtype, torch.float32))
    if temb.ndim == 4:  # per token: [B, L, 6, C]
        modulation = (table.unsqueeze(0) + wide).unbind(2)
    else:
        modulation = (table + wide).chunk(6, dim=1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation

    normed = modulated(x, norm_of(block.norm1), scale, shift)
    norm = norm_of(block.norm2) if is_norm(block.norm2) else None
    if why_unfused(block.attn1, PROCESSORS) is None:
        out = Value(_self_attention(block.attn1, normed, rotary_emb))
        layers = block.attn1.to_out
        if norm is None:
            x = gated_linear(x, out, layers, gate)
            normed = Value(x)
        else:
            x, normed = gated_linear_norm(x, out, layers, gate, norm)
    else:
        y = block.attn1(normed.value, None, None, rotary_emb)
        x, normed = _unfused(x, y, gate, norm)

    norm = norm_of(block.norm3)
    if why_unfused(block.attn2, PROCESSORS) is None:
        out = _cross_attention(block.attn2, normed, text)
        x, normed = gated_linear_norm(x, out, block.attn2.to_out, None, norm, ffn_scale, ffn_shift)
    else:
        y = block.attn2(normed.value, text, None, None)
        x, normed = gated_norm(x, y, None, norm, ffn_scale, ffn_shift)
    return feed_forward(block.ffn, x, normed, ffn_gate)


def _unfused(x: Tensor, y: Tensor, gate: Tensor, norm: Norm | None) -> tuple[Tensor, Value]:
    if norm is not None:
        return gated_norm(x, y, gate, norm)
    x = gated_residual(x, y, gate)
    return x, Value(x)


def _self_attention(attn: Any, normed: Value, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    q, k, v = projections(attn, normed, fused=_fused(attn))
    q, k = norm_rope(attn, q, k, pairs(rotary_emb, lambda table: table), across_heads=True)
    return attend(attn.processor, q, k, v)


def _fused(attn: Any) -> bool:
    return bool(getattr(attn, "fused_projections", False))


def _cross_attention(attn: Any, normed: Value, text: Tensor) -> Value:
    image = None
    if attn.add_k_proj is not None:
        images = text.shape[1] - _TEXT_TOKENS
        image, text = text[:, :images], text[:, images:]
    q, k, v = projections(attn, normed, Value(text), fused=_fused(attn))
    q, k = norm_rope(attn, q, k, across_heads=True)
    out = attend(attn.processor, q, k, v, parallel=False)
    if image is None:
        return Value(out)
    if _fused(attn):
        k, v = (heads(attn, part) for part in attn.to_added_kv(image).chunk(2, dim=-1))
    else:
        k, v = heads(attn, attn.add_k_proj(image)), heads(attn, attn.add_v_proj(image))
    added_norm = norm_of(attn.norm_added_k)
    k = qk_norm_rope(k, None, added_norm.weight, eps=added_norm.eps)
    return added(out, attend(attn.processor, q, k, v, parallel=False))
