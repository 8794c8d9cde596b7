"""HunyuanVideo: which op stands where in its blocks of two streams and of one, first frames replaced or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_fast.models.fused.attend import (
    attend,
    heads,
    norm_rope,
    pairs,
    projections,
    splits,
    valid_lengths,
    why_unfused,
)
from prfl_fast.models.fused.branches import gated_linear, gated_linear_norm, gated_norm
from prfl_fast.models.fused.feed_forward import feed_forward
from prfl_fast.models.fused.joint import joint_norm_rope
from prfl_fast.models.fused.linears import linears
from prfl_fast.models.fused.values import Value, beside_gelu, modulated, norm_of

PROCESSORS = ("diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0",)
_Tables = tuple[Tensor, Tensor] | None


def double_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: _Tables = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``HunyuanVideoTransformerBlock.forward`` and that of its token-replace form."""
    x, text = hidden_states, encoder_hidden_states
    (shift, scale, gate, ffn_shift, ffn_scale, ffn_gate), runs = _modulation(
        block.norm1, 6, temb, token_replace_emb, num_tokens, x.shape[1]
    )
    own = block.norm1_context.linear(block.norm1_context.silu(temb)).chunk(6, dim=1)
    text_shift, text_scale, text_gate, text_ffn_shift, text_ffn_scale, text_ffn_gate = own

    normed = modulated(x, norm_of(block.norm1.norm), scale, shift, runs)
    text_normed = modulated(text, norm_of(block.norm1_context.norm), text_scale, text_shift)
    attn, norm, text_norm = block.attn, norm_of(block.norm2), norm_of(block.norm2_context)
    if why_unfused(attn, PROCESSORS) is None:
        out, text_out = _joint_attention(attn, normed, text_normed, attention_mask, freqs_cis)
        x, normed = gated_linear_norm(x, Value(out), attn.to_out, gate, norm, ffn_scale, ffn_shift, runs)
        text, text_normed = gated_linear_norm(
            text, Value(text_out), [attn.to_add_out], text_gate, text_norm, text_ffn_scale, text_ffn_shift
        )
    else:
        y, text_y = attn(
            hidden_states=normed.value,
            encoder_hidden_states=text_normed.value,
            attention_mask=attention_mask,
            image_rotary_emb=freqs_cis,
        )
        x, normed = gated_norm(x, y, gate, norm, ffn_scale, ffn_shift, runs)
        text, text_normed = gated_norm(text, text_y, text_gate, text_norm, text_ffn_scale, text_ffn_shift)
    x = feed_forward(block.ff, x, normed, ffn_gate, runs)
    return x, feed_forward(block.ff_context, text, text_normed, text_ffn_gate)


def single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: _Tables = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``HunyuanVideoSingleTransformerBlock.forward`` and that of its token-replace form."""
    length, attn = hidden_states.shape[1], block.attn
    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    (shift, scale, gate), runs = _modulation(block.norm, 3, temb, token_replace_emb, num_tokens, x.shape[1])
    normed = modulated(x, norm_of(block.norm.norm), scale, shift, runs)
    if why_unfused(attn, PROCESSORS) is None:
        q, k, v, pre = linears(normed, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        q, k = norm_rope(
            attn, heads(attn, q), heads(attn, k), _angles(image_rotary_emb), across_heads=False,
            rope_tokens=(0, length),
        )  # fmt: skip
        out = _attention(attn, q, k, heads(attn, v), attention_mask)
    else:
        (pre,) = linears(normed, block.proj_mlp)
        parts = attn(
            hidden_states=normed.value[:, :length],
            encoder_hidden_states=normed.value[:, length:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        out = torch.cat(parts, dim=1)
    x = gated_linear(x, beside_gelu(out, pre, block.act_mlp.approximate), [block.proj_out], gate, runs)
    return x[:, :length], x[:, length:]


def last_single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: _Tables = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`single_block` with the streams apart: the text that leaves a network's last block is read by no one, and
    then has no gradient to compute."""
    attn, x, text = block.attn, hidden_states, encoder_hidden_states
    if why_unfused(attn, PROCESSORS) is not None or splits(attn):
        return single_block(
            block, x, text, temb, attention_mask, image_rotary_emb, token_replace_emb, num_tokens
        )  # fmt: skip
    (shift, scale, gate), runs = _modulation(block.norm, 3, temb, token_replace_emb, num_tokens, x.shape[1])
    text_shift, text_scale, text_gate = _modulation(block.norm, 3, temb, None, None, 0)[0]
    norm, layers = norm_of(block.norm.norm), (attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
    q, k, v, pre = linears(modulated(x, norm, scale, shift, runs), *layers)
    text_q, text_k, text_v, text_pre = linears(modulated(text, norm, text_scale, text_shift), *layers)
    q, k = norm_rope(attn, heads(attn, q), heads(attn, k), _angles(image_rotary_emb), across_heads=False)
    text_q, text_k = norm_rope(attn, heads(attn, text_q), heads(attn, text_k), across_heads=False)
    keys, values = torch.cat([k, text_k], dim=1), torch.cat([heads(attn, v), heads(attn, text_v)], dim=1)
    approximate, out = block.act_mlp.approximate, (block.proj_out,)
    value = beside_gelu(_attention(attn, q, keys, values, attention_mask), pre, approximate)
    text_value = beside_gelu(_attention(attn, text_q, keys, values, attention_mask), text_pre, approximate)
    return gated_linear(x, value, out, gate, runs), gated_linear(text, text_value, out, text_gate)


def _modulation(
    norm: Any, count: int, temb: Tensor, replaced: Tensor | None, tokens: int | None, length: int
) -> tuple[tuple[Tensor, ...], tuple[int, int] | None]:
    """Shifts, scales and gates of a video stream ``[B, C]``, or ``[B, 2, C]`` with the runs that they stand for."""
    own = norm.linear(norm.silu(temb)).chunk(count, dim=1)
    if "TokenReplace" not in type(norm).__name__ or replaced is None or tokens is None:
        return own, None
    first = norm.linear(norm.silu(replaced)).chunk(count, dim=1)
    if tokens >= length:
        return first, None
    return tuple(torch.stack(pair, dim=1) for pair in zip(first, own, strict=True)), (tokens, length - tokens)


def _angles(tables: _Tables) -> _Tables:
    return pairs(tables, lambda table: table[None, :, None])


def _attention(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # The text's padding comes last.
    lengths, masked = valid_lengths(mask, _valid)
    return attend(attn.processor, q, k, v, mask=mask if masked else None, kv_lengths=lengths)


def _valid(mask: Tensor) -> Tensor | None:
    return mask[:, 0, 0] if mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) else None


def _joint_attention(
    attn: Any, normed: Value, text: Value, mask: Tensor | None, tables: _Tables
) -> tuple[Tensor, Tensor]:
    q, k, v = projections(attn, normed)
    own = [heads(attn, part) for part in linears(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
    angles = _angles(tables)
    q = joint_norm_rope(q, own[0], (norm_of(attn.norm_q), norm_of(attn.norm_added_q)), angles)
    k = joint_norm_rope(k, own[1], (norm_of(attn.norm_k), norm_of(attn.norm_added_k)), angles)
    out = _attention(attn, q, k, torch.cat([v, own[2]], dim=1), mask)
    length = normed.value.shape[1]
    return out[:, :length], out[:, length:]
