"""The partial pooling and its backward as torch ops, with shapes without values and autograd.

Each op names its backend, so a gradient runs where its forward ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.ops.query_pool import reference

_library = torch.library.Library("prfl_fast", "FRAGMENT")  # noqa: TOR901 (it has to live as long as the process)

_library.define(
    "query_pool_partial(Tensor x, Tensor folded, int[]? lengths, str backend) -> (Tensor, Tensor, Tensor)"
)
# needed: the gradients of x and of folded that come back, in this order.
_library.define(
    "query_pool_backward(Tensor x, Tensor folded, Tensor sums, Tensor lse, Tensor scores, Tensor d_sums, "
    "Tensor? d_lse, int[]? lengths, bool[] needed, str backend) -> Tensor[]"
)


def partial(
    x: Tensor, folded: Tensor, lengths: Sequence[int] | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums, log-sum-exp and scores as :func:`prfl_fast.ops.query_pool.reference.forward` gives them."""
    if backend == "triton":
        from prfl_fast.kernels import query_pool_launch

        return query_pool_launch.forward(x, folded, lengths)
    return reference.forward(x, folded, lengths)


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
    backend: str,
) -> list[Tensor]:
    """The needed ones of the gradients of ``x`` and ``folded``."""
    made: tuple[Tensor | None, Tensor | None]
    if backend == "triton":
        from prfl_fast.kernels import query_pool_launch

        made = query_pool_launch.backward(x, folded, sums, lse, scores, d_sums, d_lse, lengths, needed)
    else:
        made = reference.backward(x, folded, sums, scores, d_sums, d_lse, lengths, needed)
    return [gradient for gradient in made if gradient is not None]


def _fake_partial(x: Tensor, folded: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, dim), rows = x.shape, folded.shape[0]
    return folded.new_empty(batch, rows, dim), folded.new_empty(batch, rows), folded.new_empty(batch, rows, tokens)


def _fake_backward(x: Tensor, folded: Tensor, *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, needed in zip((x, folded), rest[-2], strict=True) if needed]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, folded, ctx.lengths, ctx.backend = inputs
    sums, lse, scores = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(scores)
    ctx.save_for_backward(x, folded, sums, lse, scores)


def _derivative(ctx: Any, d_sums: Tensor | None, d_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:2])
    if (d_sums is None and d_lse is None) or not any(needed):
        return None, None, None, None
    x, folded, sums, lse, scores = ctx.saved_tensors
    d_sums = torch.zeros_like(sums) if d_sums is None else d_sums
    made = iter(
        torch.ops.prfl_fast.query_pool_backward(
            x, folded, sums, lse, scores, d_sums, d_lse, ctx.lengths, needed, ctx.backend
        )
    )
    into_x, into_folded = (next(made) if wanted else None for wanted in needed)
    return into_x, into_folded, None, None


def _no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError("query_pool is differentiable once: create_graph=True has no second derivative here")


for _name, _function, _fake in (
    ("query_pool_partial", partial, _fake_partial),
    ("query_pool_backward", backward, _fake_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prfl_fast::{_name}", _fake, lib=_library)
torch.library.register_autograd("prfl_fast::query_pool_partial", _derivative, setup_context=_set_up, lib=_library)
torch.library.register_autograd("prfl_fast::query_pool_backward", _no_second_derivative, lib=_library)
