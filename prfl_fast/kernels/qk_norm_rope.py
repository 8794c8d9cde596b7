"""Norm and rotary embedding of queries or keys, forward and backward, one token a program.

Per token, over all heads or head by head, in float32 (float64 for float64 tokens):

    y = (x - mean) rstd weight + bias      RMSNorm without the mean
    out = rotate(y)                        pairs (a, b) -> (a cos - b sin, a sin + b cos)

A row is held as two tiles, the first and the second member of each pair, ``[heads, pairs]``. The backward starts
from ``out`` (which attention keeps anyway): it turns back to y and divides by the weight; or from ``x`` where a weight
is too small to divide by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from prfl_fast.kernels.columns import column_sum
from prfl_fast.kernels.configurations import Launch, shape_of

_PROGRAMS = 2
_ROWS = 4


@triton.jit
def _pair_columns(pair, R: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of both members of a pair. Half-split: (p, p + R / 2); what is not rotated is paired up behind."""
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    if R == D:
        return pair, pair + D // 2
    behind = pair >= R // 2
    first = tl.where(behind, pair + R // 2, pair)
    return first, first + tl.where(behind, (D - R) // 2, R // 2)


@triton.jit
def _read_pairs(pointer, at, head, pair, inside, stride, R: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Both members of all pairs; ``stride``: from head to head. Interleaved ones are read as they lie, then split."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        mask = inside & (column < D)
        whole = tl.load(pointer + at + head * stride + column, mask=mask, other=0.0).to(T)
        return tl.split(tl.reshape(whole, (HEADS, PAIRS, 2)))
    else:
        first, second = _pair_columns(pair, R, D, INTERLEAVED)
        mask = inside & (pair < D // 2)
        a = tl.load(pointer + at + head * stride + first, mask=mask, other=0.0).to(T)
        b = tl.load(pointer + at + head * stride + second, mask=mask, other=0.0).to(T)
        return a, b


@triton.jit
def _write_pairs(pointer, at, head, pair, inside, stride, a, b, R: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                 PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    kind: tl.constexpr = pointer.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        whole = tl.reshape(tl.join(a, b), (HEADS, 2 * PAIRS)).to(kind)
        tl.store(pointer + at + head * stride + column, whole, mask=inside & (column < D))
    else:
        first, second = _pair_columns(pair, R, D, INTERLEAVED)
        mask = inside & (pair < D // 2)
        tl.store(pointer + at + head * stride + first, a.to(kind), mask=mask)
        tl.store(pointer + at + head * stride + second, b.to(kind), mask=mask)


@triton.jit
def _read_angles(cos, sin, b, row, head, pair, inside, strides, start, stop, R: tl.constexpr, T: tl.constexpr):
    """Cosine and sine of each pair; 1 and 0 where nothing is rotated."""
    mask = inside & (pair < R // 2) & (row >= start) & (row < stop)
    at = b * strides[0] + (row - start) * strides[1] + head * strides[2] + pair
    return tl.load(cos + at, mask=mask, other=1.0).to(T), tl.load(sin + at, mask=mask, other=0.0).to(T)


@triton.jit
def qk_norm_rope_forward_kernel(
    x, weight, bias, cos, sin, out, mean, rstd, x_strides, angle_strides, length, start, stop, eps: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
    T: tl.constexpr, RMS: tl.constexpr, ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One token. Statistics: one per token (``ACROSS``) or ``[B, L, H]``."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    count: tl.constexpr = H * D if ACROSS else D
    x_at = b * x_strides[0] + row * x_strides[1]
    flat = (b * length + row) * (H * D)
    firsts = ()
    seconds = ()
    for k in tl.static_range(CHUNKS):
        head = k * HEADS + tl.arange(0, HEADS)[:, None]
        first, second = _read_pairs(x, x_at, head, pair, head < H, x_strides[2], R, D, HEADS, PAIRS, INTERLEAVED, T)
        firsts = firsts + (first,)
        seconds = seconds + (second,)
    center = tl.zeros((), T)
    inverse = tl.zeros((), T)
    if ACROSS:
        if not RMS:
            total = tl.zeros((HEADS, PAIRS), T)
            for k in tl.static_range(CHUNKS):
                total += firsts[k] + seconds[k]
            center = tl.sum(tl.sum(total, axis=1), axis=0) / count
            tl.store(mean + b * length + row, center)
        squares = tl.zeros((HEADS, PAIRS), T)
        for k in tl.static_range(CHUNKS):
            inside = (k * HEADS + tl.arange(0, HEADS)[:, None] < H) & (pair < D // 2)
            u = tl.where(inside, firsts[k] - center, 0.0)
            v = tl.where(inside, seconds[k] - center, 0.0)
            squares += u * u + v * v
        inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / count + eps)
        tl.store(rstd + b * length + row, inverse)
    for k in tl.static_range(CHUNKS):
        heads = k * HEADS + tl.arange(0, HEADS)
        head = heads[:, None]
        inside = head < H
        first = firsts[k]
        second = seconds[k]
        if ACROSS:
            first = (first - center) * inverse
            second = (second - center) * inverse
        else:
            at = (b * length + row) * H + heads
            if not RMS:
                own = tl.sum(first + second, axis=1) / count
                tl.store(mean + at, own, mask=heads < H)
                first = tl.where(pair < D // 2, first - own[:, None], 0.0)
                second = tl.where(pair < D // 2, second - own[:, None], 0.0)
            own_inverse = 1.0 / tl.sqrt(tl.sum(first * first + second * second, axis=1) / count + eps)
            tl.store(rstd + at, own_inverse, mask=heads < H)
            first = first * own_inverse[:, None]
            second = second * own_inverse[:, None]
        if HAS_WEIGHT:
            u, v = _read_pairs(weight, 0, head, pair, inside, D if ACROSS else 0, R, D, HEADS, PAIRS, INTERLEAVED, T)
            first = first * u
            second = second * v
        if HAS_BIAS:
            u, v = _read_pairs(bias, 0, head, pair, inside, D if ACROSS else 0, R, D, HEADS, PAIRS, INTERLEAVED, T)
            first = first + u
            second = second + v
        if ROTATE:
            c, s = _read_angles(cos, sin, b, row, head, pair, inside, angle_strides, start, stop, R, T)
            turned = first * c - second * s
            second = first * s + second * c
            first = turned
        _write_pairs(out, flat, head, pair, inside, D, first, second, R, D, HEADS, PAIRS, INTERLEAVED)


@triton.jit
def qk_norm_rope_backward_kernel(
    kept, weight, bias, cos, sin, mean, rstd, d_out, d_x, d_weight, d_bias, kept_strides, d_out_strides, angle_strides,
    length, start, stop, rows_per_program,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr,
    T: tl.constexpr, RMS: tl.constexpr, ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, KEPT_OUT: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
):  # fmt: skip
    """A run of tokens. ``kept`` is the rotated result (``KEPT_OUT``) or x; partial sums are ``[B, P, H, D]``."""
    b = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    pair = tl.arange(0, PAIRS)[None, :]
    count: tl.constexpr = H * D if ACROSS else D
    stride: tl.constexpr = D if ACROSS else 0
    weight_a = ()
    weight_b = ()
    bias_a = ()
    bias_b = ()
    for _ in tl.static_range(CHUNKS):
        weight_a = weight_a + (tl.zeros((HEADS, PAIRS), T),)
        weight_b = weight_b + (tl.zeros((HEADS, PAIRS), T),)
        bias_a = bias_a + (tl.zeros((HEADS, PAIRS), T),)
        bias_b = bias_b + (tl.zeros((HEADS, PAIRS), T),)
    begin = program * rows_per_program
    for r in range(begin, tl.minimum(begin + rows_per_program, length)):
        row = tl.full((), 0, tl.int64) + r  # a plain number in the interpreter
        kept_at = b * kept_strides[0] + row * kept_strides[1]
        d_at = b * d_out_strides[0] + row * d_out_strides[1]
        normed_a = ()
        normed_b = ()
        inner_a = ()
        inner_b = ()
        inverses = ()
        products = tl.zeros((HEADS, PAIRS), T)
        plain = tl.zeros((HEADS, PAIRS), T)
        new_weight_a = ()
        new_weight_b = ()
        new_bias_a = ()
        new_bias_b = ()
        for k in tl.static_range(CHUNKS):
            heads = k * HEADS + tl.arange(0, HEADS)
            head = heads[:, None]
            inside = head < H
            there = inside & (pair < D // 2)
            a, e = _read_pairs(kept, kept_at, head, pair, inside, kept_strides[2], R, D, HEADS, PAIRS, INTERLEAVED, T)
            da, de = _read_pairs(d_out, d_at, head, pair, inside, d_out_strides[2], R, D, HEADS, PAIRS, INTERLEAVED, T)
            if ROTATE:
                c, s = _read_angles(cos, sin, b, row, head, pair, inside, angle_strides, start, stop, R, T)
                turned = da * c + de * s
                de = de * c - da * s
                da = turned
                if KEPT_OUT:
                    # cos and sin are rounded numbers, whose squares do not sum to 1.
                    size = c * c + s * s
                    turned = (a * c + e * s) / size
                    e = (e * c - a * s) / size
                    a = turned
            wa = tl.full((HEADS, PAIRS), 1.0, T)
            we = tl.full((HEADS, PAIRS), 1.0, T)
            if HAS_WEIGHT:
                wa, we = _read_pairs(weight, 0, head, pair, inside, stride, R, D, HEADS, PAIRS, INTERLEAVED, T)
            if ACROSS:
                inverse = tl.full((HEADS,), 0.0, T) + tl.load(rstd + b * length + row).to(T)
            else:
                inverse = tl.load(rstd + (b * length + row) * H + heads, mask=heads < H, other=0.0).to(T)
            if KEPT_OUT:
                if HAS_BIAS:
                    u, v = _read_pairs(bias, 0, head, pair, inside, stride, R, D, HEADS, PAIRS, INTERLEAVED, T)
                    a = a - u
                    e = e - v
                if HAS_WEIGHT:
                    a = a / tl.where(there, wa, 1.0)
                    e = e / tl.where(there, we, 1.0)
            else:
                if not RMS:
                    if ACROSS:
                        center = tl.full((HEADS,), 0.0, T) + tl.load(mean + b * length + row).to(T)
                    else:
                        center = tl.load(mean + (b * length + row) * H + heads, mask=heads < H, other=0.0).to(T)
                    a = tl.where(there, a - center[:, None], 0.0)
                    e = tl.where(there, e - center[:, None], 0.0)
                a = a * inverse[:, None]
                e = e * inverse[:, None]
            if NEED_WEIGHT:
                new_weight_a = new_weight_a + (weight_a[k] + da * a,)
                new_weight_b = new_weight_b + (weight_b[k] + de * e,)
            if NEED_BIAS:
                new_bias_a = new_bias_a + (bias_a[k] + da,)
                new_bias_b = new_bias_b + (bias_b[k] + de,)
            if HAS_WEIGHT:
                da = da * wa
                de = de * we
            if ACROSS:
                products += da * a + de * e
                plain += da + de
            normed_a = normed_a + (a,)
            normed_b = normed_b + (e,)
            inner_a = inner_a + (da,)
            inner_b = inner_b + (de,)
            inverses = inverses + (inverse,)
        if NEED_WEIGHT:
            weight_a = new_weight_a
            weight_b = new_weight_b
        if NEED_BIAS:
            bias_a = new_bias_a
            bias_b = new_bias_b
        if NEED_X:
            along = tl.zeros((), T)
            level = tl.zeros((), T)
            if ACROSS:
                along = tl.sum(tl.sum(products, axis=1), axis=0) / count
                if not RMS:
                    level = tl.sum(tl.sum(plain, axis=1), axis=0) / count
            for k in tl.static_range(CHUNKS):
                head = k * HEADS + tl.arange(0, HEADS)[:, None]
                a = normed_a[k]
                e = normed_b[k]
                da = inner_a[k]
                de = inner_b[k]
                if ACROSS:
                    da = da - level - a * along
                    de = de - level - e * along
                else:
                    own = (tl.sum(da * a + de * e, axis=1) / count)[:, None]
                    own_level = tl.zeros((HEADS, 1), T)
                    if not RMS:
                        own_level = (tl.sum(da + de, axis=1) / count)[:, None]
                    da = da - own_level - a * own
                    de = de - own_level - e * own
                da = da * inverses[k][:, None]
                de = de * inverses[k][:, None]
                at = (b * length + row) * (H * D)
                _write_pairs(d_x, at, head, pair, head < H, D, da, de, R, D, HEADS, PAIRS, INTERLEAVED)
    part = (b * tl.num_programs(0) + program) * (H * D)
    for k in tl.static_range(CHUNKS):
        head = k * HEADS + tl.arange(0, HEADS)[:, None]
        if NEED_WEIGHT:
            _write_pairs(d_weight, part, head, pair, head < H, D, weight_a[k], weight_b[k], R, D, HEADS, PAIRS,
                         INTERLEAVED)  # fmt: skip
        if NEED_BIAS:
            _write_pairs(d_bias, part, head, pair, head < H, D, bias_a[k], bias_b[k], R, D, HEADS, PAIRS, INTERLEAVED)


def _layout(heads: int, head_dim: int, *, backward: bool) -> dict[str, int]:
    """Heads and pairs of a piece (at most 1,024 values of a row), pieces, warps."""
    pairs = max(triton.next_power_of_2(head_dim // 2), 8)
    most = max(1, min(triton.next_power_of_2(heads), 512 // pairs))
    block = min((size for size in (most, most // 2, most // 4) if size), key=lambda s: (triton.cdiv(heads, s) * s, -s))
    warps = max(1, (block * pairs * 2) // 256)
    return {
        "HEADS": block,
        "PAIRS": pairs,
        "CHUNKS": triton.cdiv(heads, block),
        "num_warps": min(8, warps * 2 if backward else warps),
    }


def _angles(cos: Tensor | None) -> tuple[int, int, int]:
    """Strides of sample, token and head, 0 where one serves all."""
    if cos is None:
        return 0, 0, 0
    batch, _, heads, _ = cos.shape
    return cos.stride(0) if batch > 1 else 0, cos.stride(1), cos.stride(2) if heads > 1 else 0


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    rms: bool,
    across_heads: bool,
    interleaved: bool,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `prfl_fast.ops.qk_norm_rope.reference.forward`."""
    batch, length, heads, dim = x.shape
    dtype, T = (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((batch, length) if across_heads else (batch, length, heads), dtype=dtype, device=x.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    if x.numel():
        rotated = 0 if cos is None else 2 * cos.shape[3]
        with torch.cuda.device_of(x):
            qk_norm_rope_forward_kernel[(length, batch)](
                x, weight, bias, cos, sin, out, mean, rstd, x.stride()[:3], _angles(cos),
                length, start, start + (0 if cos is None else cos.shape[1]), eps,
                H=heads, D=dim, R=rotated, T=T, RMS=rms, ACROSS=across_heads, INTERLEAVED=interleaved or cos is None,
                ROTATE=cos is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
                **_layout(heads, dim, backward=False),
            )  # fmt: skip
    return out, mean, rstd


def backward(
    kept: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    d_out: Tensor,
    rms: bool,
    across_heads: bool,
    interleaved: bool,
    start: int,
    kept_output: bool,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """As `prfl_fast.ops.qk_norm_rope.reference.backward`: gradients of x, weight, bias in ``dtypes``."""
    batch, length, heads, dim = kept.shape
    dtype, T = (torch.float64, tl.float64) if kept.dtype == torch.float64 else (torch.float32, tl.float32)
    into_x, into_weight, into_bias = dtypes
    sums = into_weight is not None or into_bias is not None
    processors = torch.cuda.get_device_properties(kept.device).multi_processor_count if kept.is_cuda else 2
    per_program = max(1, -(-length // (_PROGRAMS * processors))) if sums else _ROWS
    programs = -(-length // per_program)
    d_x = None if into_x is None else torch.empty(kept.shape, dtype=into_x, device=kept.device)
    partials = [
        None if kind is None else torch.empty(batch, programs, heads, dim, dtype=dtype, device=kept.device)
        for kind in (into_weight, into_bias)
    ]
    if kept.numel():
        rotated = 0 if cos is None else 2 * cos.shape[3]
        with torch.cuda.device_of(kept):
            qk_norm_rope_backward_kernel[(programs, batch)](
                kept, weight, bias, cos, sin, mean, rstd, d_out, d_x, *partials,
                kept.stride()[:3], d_out.stride()[:3], _angles(cos),
                length, start, start + (0 if cos is None else cos.shape[1]), per_program,
                H=heads, D=dim, R=rotated, T=T, RMS=rms, ACROSS=across_heads, INTERLEAVED=interleaved or cos is None,
                ROTATE=cos is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, KEPT_OUT=kept_output,
                NEED_X=into_x is not None, NEED_WEIGHT=into_weight is not None, NEED_BIAS=into_bias is not None,
                **_layout(heads, dim, backward=True),
            )  # fmt: skip
    results = [d_x]
    for sums_of, kind in zip(partials, (into_weight, into_bias), strict=True):
        if sums_of is None or kind is None:
            results.append(None)
            continue
        columns = heads * dim if across_heads else dim
        rows = sums_of.reshape(1, -1, columns)
        results.append(column_sum(rows, (0, rows.shape[1]), kind).reshape(columns))
    return results


@dataclass(frozen=True)
class _Model:
    """How a family norms and rotates queries and keys. ``tables``: heads of cos and sin, 0 for no rotation."""

    name: str
    heads: int
    dim: int
    across_heads: bool
    rms: bool = True
    tables: int = 1
    interleaved: bool = True


_MODELS = (
    _Model("Wan 1.3B", 12, 128, True),
    _Model("Wan 14B", 40, 128, True),
    _Model("Wan 5B", 24, 128, True),
    _Model("Wan 1.3B cross", 12, 128, True, tables=0),
    _Model("Wan 14B cross", 40, 128, True, tables=0),
    _Model("Wan 5B cross", 24, 128, True, tables=0),
    _Model("HunyuanVideo", 24, 128, False),
    _Model("LTX-Video", 32, 64, True, tables=32),
    _Model("LTX-Video cross", 32, 64, True, tables=0),
    _Model("CogVideoX 2B", 30, 64, False, rms=False, tables=0),
    _Model("CogVideoX 5B", 48, 64, False, rms=False),
    _Model("half-split", 24, 128, False, interleaved=False),
)


def production(architecture: int) -> Iterator[Launch]:
    """Attention of the four families: forward, backward with every gradient, backward under LoRA (norms frozen)."""
    for model in _MODELS:
        length = 32760
        start = 226 if not model.across_heads else 0
        x = shape_of(1, length, model.heads, model.dim)
        weight = shape_of(model.heads * model.dim if model.across_heads else model.dim)
        bias = None if model.rms else weight
        angles = None
        if model.tables:
            angles = shape_of(1, length - start, model.tables, model.dim // 2, dtype=torch.float32)
        statistic = shape_of(*((1, length) if model.across_heads else (1, length, model.heads)), dtype=torch.float32)
        layout = (model.rms, model.across_heads, model.interleaved, start)
        name = f"{model.name} {model.heads}x{model.dim}"
        yield Launch(
            "qk_norm_rope", f"{name} forward", partial(forward, x, weight, bias, angles, angles, 1e-6, *layout)
        )
        for trained in (True, False):
            kind = x.dtype if trained else None
            yield Launch(
                "qk_norm_rope", f"{name} backward{'' if trained else ' frozen'}",
                partial(
                    backward, x, weight, bias, angles, angles, None if model.rms else statistic, statistic, x, *layout,
                    True, (x.dtype, kind, None if bias is None else kind),
                ),
            )  # fmt: skip
