"""Launches of the pooling kernels; arguments as the torch ops in `prfl_fast/ops/query_pool` have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from prfl_fast.kernels.columns import column_sum
from prfl_fast.kernels.configurations import Launch, shape_of
from prfl_fast.kernels.query_pool import (
    pool_backward_kernel,
    pool_d_tokens_kernel,
    pool_lse_kernel,
    pool_pieces_kernel,
    pool_scores_kernel,
    pool_sums_kernel,
)

# Numbers that a program splits, tiles that one merges at a time.
_PIECES_BLOCK = 1024
_TILES_BLOCK = 256
# Rows (heads times queries) of a program; more are a second group, which reads the tokens again.
_MOST_ROWS = 64
# Programs per multiprocessor of a weighted sum: fewer parts to write than with more, and 96 KiB of tokens on their way.
_PROGRAMS = 2


@dataclass(frozen=True)
class Tile:
    """``tokens`` times ``columns`` of x, warps of a program, stages of its copy pipeline."""

    tokens: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PoolLaunch:
    """How one pooling is laid over programs.

    Attributes:
        rows: of a program, a power of two.
        groups: programs that share out the rows.
        pieces: bfloat16 numbers that stand for a float32 one; 1 where products are not of bfloat16.
        products: tile of x times w (and times g).
        sums: tile of the weighted sums.
        fused: the gradient of x is made where ds is; else p and ds go through memory.
        gradient: tile of the gradient of x; its columns alone where it is fused.
        depth: rows of p and ds that are multiplied at a time where it is not.
    """

    rows: int
    groups: int
    pieces: int
    products: Tile
    sums: Tile
    fused: bool
    gradient: Tile
    depth: int


def launch_for(channels: int, rows: int, dtype: torch.dtype) -> PoolLaunch:
    """Whole tiles of columns where there are any, and no more registers or shared memory than every architecture has.

    The reward's one query of 8 heads is what the tiles are made for; more rows take smaller ones.
    """
    pieces = 2 if dtype == torch.bfloat16 else 1
    per_program = min(max(triton.next_power_of_2(rows), 16 // pieces), _MOST_ROWS)
    height = pieces * per_program

    def tile(tokens: int, columns: int, num_warps: int, num_stages: int) -> Tile:
        whole = [size for size in (256, 128, 64, 32) if size <= columns and channels % size == 0]
        least = min(columns, max(16, triton.next_power_of_2(channels)))
        return Tile(tokens, whole[0] if whole else least, num_warps, num_stages)

    if pieces == 2:
        products = tile(64, 128, 4, 4) if height <= 32 else tile(64, 64, 8, 3)
        sums = tile(32, {16: 256, 128: 64}.get(height, 128), 8 if height == 64 else 4, 4)
        gradient = tile(64, 128 if height == 16 else 64, 4, 1)
    else:
        products = tile(64, 32, 4 if height <= 32 else 8, 3)
        sums = tile(32, 64, 4 if height <= 32 else 8, 3)
        gradient = tile(64, 64, 4, 1) if dtype == torch.float16 else tile(32, 32, 4, 1)
    return PoolLaunch(
        rows=per_program,
        groups=triton.cdiv(rows, per_program),
        pieces=pieces,
        products=products,
        sums=sums,
        # Products in float32 run from registers, which two of them in one program would spill.
        fused=per_program <= 16 and dtype != torch.float32,
        gradient=gradient,
        depth=min(max(triton.next_power_of_2(2 * rows), 16), 32 if dtype != torch.float32 else 16),
    )


def forward(
    x: Tensor,
    folded: Tensor,
    lengths: Sequence[int] | None,
    splits: int | None = None,
    processors: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `prfl_fast.ops.query_pool.reference.forward`, for a folded query in float32.

    Args:
        x: ``[B, L, C]``, float32, bfloat16 or float16, any strides (copied where the last is not 1).
        folded: ``[R, C]`` in float32.
        lengths: tokens that count per sample.
        splits: runs of tokens that the weighted sums are taken over apart; by default as many as fill the device.
            Their sums differ in the last bits of float32 from those of another number.
        processors: multiprocessors to be filled, those of the device by default.
    """
    (batch, length, channels), rows = x.shape, folded.shape[0]
    scores = folded.new_empty(batch, rows, length)
    lse = folded.new_empty(batch, rows)
    if not x.numel():
        return folded.new_zeros(batch, rows, channels), lse.fill_(float("-inf")), scores
    x, folded, counts = _readable(x), folded.contiguous(), _counts(lengths, x)
    launch = launch_for(channels, rows, x.dtype)
    tiles = triton.cdiv(length, launch.products.tokens)
    tops, totals = folded.new_empty(batch, rows, tiles), folded.new_empty(batch, rows, tiles)
    with torch.cuda.device_of(x):
        pieces, stride = _pieces(folded, launch)
        pool_scores_kernel[(tiles, launch.groups, batch)](
            x, pieces, counts, scores, tops, totals, x.stride()[:2], stride, length, rows,
            C=channels, ROWS=launch.rows, **_shared(x, launch, launch.products), HAS_COUNTS=counts is not None,
        )  # fmt: skip
        pool_lse_kernel[(batch * rows,)](tops, totals, lse, tiles, BLOCK=_TILES_BLOCK, num_warps=1)
    parts = _weighted_sums(x, scores, lse, counts, rows, 0, launch, splits, processors)
    sums = column_sum(parts.flatten(2), (0, parts.shape[1]), torch.float32)
    return sums.reshape(batch, rows, channels), lse, scores


def backward(
    x: Tensor,
    folded: Tensor,
    sums: Tensor,
    lse: Tensor,
    scores: Tensor,
    d_sums: Tensor,
    d_lse: Tensor | None,
    lengths: Sequence[int] | None,
    needed: Sequence[bool],
    splits: int | None = None,
    processors: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` (contiguous) and ``folded``, None where not ``needed``; the same bits in every run.

    Tokens are read once, and a second time where the gradient of the folded query is needed.
    """
    (batch, length, channels), rows = x.shape, folded.shape[0]
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed[0] else None
    if not x.numel():
        return d_x, torch.zeros_like(folded) if needed[1] else None
    x, folded, d_sums, counts = _readable(x), folded.contiguous(), d_sums.contiguous(), _counts(lengths, x)
    launch = launch_for(channels, rows, x.dtype)
    shift = -(d_sums * sums).sum(-1)
    if d_lse is not None:
        shift = shift + d_lse
    apart = needed[0] and not launch.fused
    shared = 2 if apart else 1 if needed[1] else 0
    shares = folded.new_empty(batch, shared * rows, length)
    counted = counts is not None
    with torch.cuda.device_of(x):
        pieces, stride = _pieces(d_sums, launch)
        pool_backward_kernel[(triton.cdiv(length, launch.products.tokens), launch.groups, batch)](
            x, pieces, counts, scores, lse, shift, d_sums, folded, d_x, shares, x.stride()[:2], stride, length, rows,
            C=channels, ROWS=launch.rows, BLOCK_D=launch.gradient.columns, **_shared(x, launch, launch.products),
            HAS_COUNTS=counted, NEED_X=d_x is not None and not apart, SHARES=shared,
        )  # fmt: skip
        if d_x is not None and apart:
            tile = launch.gradient
            grid = (triton.cdiv(length, tile.tokens) * triton.cdiv(channels, tile.columns), batch)
            pool_d_tokens_kernel[grid](
                shares, d_sums, folded, counts, d_x, length, rows,
                C=channels, BLOCK_K=launch.depth, **_shared(x, launch, tile), HAS_COUNTS=counted,
            )  # fmt: skip
    if not needed[1]:
        return d_x, None
    first_row = rows if apart else 0
    parts = _weighted_sums(x, shares, None, counts, rows, first_row, launch, splits, processors)
    added = column_sum(parts.view(1, -1, rows * channels), (0, batch * parts.shape[1]), torch.float32)
    return d_x, added.reshape(rows, channels)


def _weighted_sums(
    x: Tensor,
    weights: Tensor,
    lse: Tensor | None,
    counts: Tensor | None,
    rows: int,
    first_row: int,
    launch: PoolLaunch,
    splits: int | None,
    processors: int | None,
) -> Tensor:
    """Sums over runs of tokens, ``[B, splits, R, C]``."""
    batch, length, channels = x.shape
    tile = launch.sums
    chunks, tiles = triton.cdiv(channels, tile.columns), triton.cdiv(length, tile.tokens)
    if splits is None:
        # Whatever the batch: a sample's result is the same bits in any batch.
        splits = triton.cdiv(_PROGRAMS * (processors or _processors(x.device)), chunks * launch.groups)
    per_split = triton.cdiv(tiles, min(splits, tiles)) * tile.tokens
    splits = triton.cdiv(length, per_split)
    parts = torch.empty(batch, splits, rows, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        pool_sums_kernel[(chunks * splits, launch.groups, batch)](
            x, weights, lse, counts, parts, x.stride()[:2], length, rows, first_row, weights.shape[1], splits,
            per_split, C=channels, ROWS=launch.rows, **_shared(x, launch, tile), HAS_COUNTS=counts is not None,
            FROM_SCORES=lse is not None,
        )  # fmt: skip
    return parts


def _pieces(numbers: Tensor, launch: PoolLaunch) -> tuple[Tensor, int]:
    """``[pieces, ...]`` and the stride of its first axis."""
    size = numbers.numel()
    if launch.pieces == 1:
        return numbers, size
    pieces = torch.empty(2, *numbers.shape, dtype=torch.bfloat16, device=numbers.device)
    pool_pieces_kernel[(triton.cdiv(size, _PIECES_BLOCK),)](numbers, pieces, size, BLOCK=_PIECES_BLOCK, num_warps=4)
    return pieces, size


def _shared(x: Tensor, launch: PoolLaunch, tile: Tile) -> dict[str, Any]:
    """Constants that the kernels over tokens have in common."""
    split = launch.pieces == 2
    return {
        "PIECES": launch.pieces,
        "BLOCK_L": tile.tokens,
        "BLOCK_C": tile.columns,
        # The interpreter does not multiply bfloat16: the same numbers are multiplied as float32 there.
        "OPERAND": tl.bfloat16 if split and not knobs.runtime.interpret else tl.float32,
        "PRECISION": "ieee" if x.dtype != torch.float16 else "tf32x3",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _counts(lengths: Sequence[int] | None, x: Tensor) -> Tensor | None:
    """On the device, without waiting for it."""
    return None if lengths is None else torch.tensor(lengths, dtype=torch.int32).to(x.device, non_blocking=True)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class _Model:
    """A trunk that is pooled by one query of 8 heads, as published."""

    name: str
    channels: int


_MODELS = (
    _Model("Wan 1.3B", 1536),
    _Model("LTX-Video", 2048),
    _Model("HunyuanVideo", 3072),
    _Model("Wan 14B", 5120),
)
_PROCESSORS = {80: 108, 90: 132, 100: 148}


def production(architecture: int) -> Iterator[Launch]:
    """The reward's pooling, forward; backward of a trained reward, and of a frozen one that trains a generator."""
    length, rows, chip = 32760, 8, _PROCESSORS[architecture]
    for model in _MODELS:
        x, folded = shape_of(1, length, model.channels), shape_of(rows, model.channels, dtype=torch.float32)
        sums, lse = (shape_of(1, rows, *more, dtype=torch.float32) for more in ((model.channels,), ()))
        scores = shape_of(1, rows, length, dtype=torch.float32)
        label = f"{model.name} {model.channels}"
        yield Launch("query_pool", f"{label} forward", partial(forward, x, folded, None, None, chip))
        for name, needed in (("backward", (True, True)), ("backward frozen", (True, False))):
            run = partial(backward, x, folded, sums, lse, scores, sums, None, None, needed, None, chip)
            yield Launch("query_pool", f"{label} {name}", run)
