"""Linears on a value that is computed again in the backward.

An autograd function with written formulas: no nested autograd, so that FSDP2 sees every gradient. It stands in for
plain ``nn.Linear`` only; any other module (LoRA, quantised, hooked, sharded by itself) is called as a module, and
autograd keeps what it always keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from prfl_fast.models.fused.values import Value

_PLAIN = (nn.Parameter, Tensor, FakeTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """True where something runs when this very module is called, beside its class's forward."""
    attributes = module.__dict__
    return "forward" in attributes or any(attributes.get(name) for name in _HOOKS)


def is_plain(module: nn.Module, value: Tensor) -> bool:
    """True where calling the module is one product in the value's dtype, and its backward is ours to write."""
    if type(module) is not nn.Linear or hooked(module):
        return False
    weight = module.weight
    return (
        type(weight) in _PLAIN
        and weight.dtype == value.dtype
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(value.device.type)
    )


def linears(source: Value, *modules: nn.Module) -> list[Tensor]:
    """The outputs ``[B, L, out]`` of several linears on one value, which is computed once more in the backward."""
    plain = [module for module in modules if is_plain(module, source.value)]
    if source.formula is None or not plain:
        return [module(source.value) for module in modules]
    parameters = [p for module in plain for p in (module.weight, module.bias)]
    sources = [None if t is None else t.detach() for t in source.sources]
    apply: Any = _Linears.apply
    made = iter(apply(source.formula, len(sources), source.value, *sources, *parameters))
    return [next(made) if module in plain else module(source.value) for module in modules]


class _Linears(torch.autograd.Function):
    """``value W_i^T + b_i`` for each i; keeps the sources of the value where a weight wants its gradient."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], count: int, value: Tensor, *tensors: Any) -> Any:
        sources, parameters = tensors[:count], tensors[count:]
        pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
        ctx.set_materialize_grads(False)
        ctx.formula, ctx.count = formula, count
        needs_value = any(ctx.needs_input_grad[3 + count :: 2])
        ctx.save_for_backward(*(sources if needs_value else [None] * count), *parameters[::2])
        return tuple(F.linear(value, weight, bias) for weight, bias in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad
        sources, weights = saved[: ctx.count], saved[ctx.count :]
        into_value: Tensor | None = None
        value: Tensor | None = None
        into: list[Tensor | None] = []
        for index, (d, weight) in enumerate(zip(gradients, weights, strict=True)):
            wants_weight, wants_bias = needed[3 + ctx.count + 2 * index : 5 + ctx.count + 2 * index]
            if d is None:
                into += [None, None]
                continue
            rows = d.reshape(-1, d.shape[-1])
            if wants_weight and value is None:
                made: Tensor = ctx.formula(*sources)
                value = made.reshape(-1, made.shape[-1])
            into.append(rows.mT @ value if wants_weight and value is not None else None)
            into.append(rows.sum(0) if wants_bias else None)
            if needed[2]:
                if into_value is None:
                    into_value = rows @ weight
                else:
                    into_value = torch.addmm(into_value, rows, weight)
        if into_value is not None:
            shape = next(d.shape for d in gradients if d is not None)
            into_value = into_value.reshape(*shape[:-1], -1)
        return (None, None, into_value, *([None] * ctx.count), *into)
