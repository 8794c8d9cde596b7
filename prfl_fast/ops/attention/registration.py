"""Attention and its backward as torch ops, so that a checkpoint policy can keep output and log-sum-exp.

Forward and backward name their providers (choice.py). Samples with fewer keys are cut to their own length, so that no
kernel needs a mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.ops.attention.choice import PROVIDERS, UNDECIDED, choose, first_for_d_lse
from prfl_fast.ops.attention.provider import Problem
from prfl_fast.ops.rows.reference import compute_dtype

_library = torch.library.Library("prfl_fast", "FRAGMENT")  # noqa: TOR901 (it has to live as long as the process)

# Providers that are not named are chosen when the op runs. Of a gradient's op as many tensors come back as are needed.
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, int[]? kv_lengths, bool deterministic, str forward, "
    "str backward) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, int[]? kv_lengths, bool deterministic, bool[] needed, str backward) -> Tensor[]"
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    kv_lengths: Sequence[int] | None,
    deterministic: bool,
    forward: str,
    backward: str,
) -> tuple[Tensor, Tensor]:
    if forward == UNDECIDED:
        forward = choose(Problem.of(q, k, deterministic), backward=False)
    run = PROVIDERS[forward].forward
    if kv_lengths is None:
        out, lse = run(q, k, v, scale)
        return out.contiguous(), lse.contiguous()
    parts = [run(q[i : i + 1], k[i : i + 1, :count], v[i : i + 1, :count], scale) for i, count in enumerate(kv_lengths)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kv_lengths: Sequence[int] | None,
    deterministic: bool,
    needed: Sequence[bool],
    backward: str,
) -> list[Tensor]:
    problem = Problem.of(q, k, deterministic)
    if backward == UNDECIDED:
        backward = choose(problem, backward=True)
    if d_lse is not None and not PROVIDERS[backward].takes_d_lse:
        instead = first_for_d_lse(problem)
        _announce(backward, instead)
        backward = instead
    wanted = (needed[0], needed[1], needed[2])
    run = PROVIDERS[backward].some_gradients
    if kv_lengths is None:
        made = run(wanted, d_out, q, k, v, out, lse, scale, d_lse, deterministic)
        return [gradient.contiguous() for gradient in made if gradient is not None]
    # Keys behind a sample's own are not looked at: their gradients are zero.
    whole = [
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if flag else None
        for t, flag in zip((q, k, v), wanted, strict=True)
    ]
    for i, count in enumerate(kv_lengths):
        one = slice(i, i + 1)
        parts = run(
            wanted, d_out[one], q[one], k[one, :count], v[one, :count], out[one], lse[one], scale,
            None if d_lse is None else d_lse[one], deterministic,
        )  # fmt: skip
        for total, part in zip(whole, parts, strict=True):
            if total is not None and part is not None:
                total[one, : part.shape[1]] = part
    return [gradient for gradient in whole if gradient is not None]


_announced: set[tuple[str, str]] = set()


def _announce(chosen: str, instead: str) -> None:
    if (chosen, instead) not in _announced:
        _announced.add((chosen, instead))
        warnings.warn(
            f"attention: a gradient reaches the log-sum-exp, which the backward of {chosen} does not take: "
            f"{instead} runs instead, and may be slower",
            stacklevel=2,
        )


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    lse = torch.empty(batch, heads, queries, dtype=compute_dtype(q), device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _fake_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kv_lengths: Sequence[int] | None,
    deterministic: bool,
    needed: Sequence[bool],
    backward: str,
) -> list[Tensor]:
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, flag in zip((q, k, v), needed, strict=True) if flag
    ]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.kv_lengths, ctx.deterministic, _, ctx.backward_name = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _derivative(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    into: list[Tensor | None] = [None, None, None]
    if any(needed) and (d_out is not None or d_lse is not None):
        q, k, v, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        made = iter(
            torch.ops.prfl_fast.attention_backward(
                d_out, d_lse, q, k, v, out, lse, ctx.scale, ctx.kv_lengths, ctx.deterministic, needed,
                ctx.backward_name,
            )
        )  # fmt: skip
        into = [next(made) if flag else None for flag in needed]
    return (*into, None, None, None, None, None)


def _no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError("attention is differentiable once: create_graph=True has no second derivative here")


for _name, _function, _fake in (
    ("attention", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prfl_fast::{_name}", _fake, lib=_library)
torch.library.register_autograd("prfl_fast::attention", _derivative, setup_context=_set_up, lib=_library)
torch.library.register_autograd("prfl_fast::attention_backward", _no_second_derivative, lib=_library)
