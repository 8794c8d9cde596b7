"""Linears on a value that is computed again in the backward.

An autograd function with written formulas: no nested autograd, so that FSDP2 sees every gradient. It stands in for
plain ``nn.Linear`` and for peft's plain LoRA on one; any other module (quantised, hooked, sharded by itself) is called
as a module, and autograd keeps what it always keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from prfl_fast.models.fused.values import Value, class_path

_PLAIN = (nn.Parameter, Tensor, FakeTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LORA = "peft.tuners.lora.layer.Linear"


def hooked(module: nn.Module) -> bool:
    """True where something runs when this very module is called, beside its class's forward."""
    attributes = module.__dict__
    return "forward" in attributes or any(attributes.get(name) for name in _HOOKS)


def is_plain(module: nn.Module, value: Tensor) -> bool:
    """True where calling the module is one product in the value's dtype, and its backward is ours to write."""
    return (
        _is_product(module)
        and module.weight.dtype == value.dtype
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(value.device.type)
    )


def _is_product(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not hooked(module) and type(module.weight) in _PLAIN


def _adapters(module: Any, value: Tensor) -> list[tuple[nn.Linear, nn.Module, float]] | None:
    """(A, B, scaling) of each active adapter of a LoRA layer whose forward is ``W v + b + sum scaling B A v``."""
    if class_path(type(module)) != _LORA or hooked(module) or not is_plain(module.base_layer, value):
        return None
    if module.disable_adapters or module.merged or not getattr(module, "cast_input_dtype_enabled", True):
        return None
    found = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        a, dropout = module.lora_A[name], module.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
        if drops or not isinstance(dropout, (nn.Identity, nn.Dropout)) or not _is_product(a):
            return None
        if name in getattr(module, "lora_variant", (name,)):  # DoRA and its like
            return None
        found.append((a, module.lora_B[name], module.scaling[name]))
    return found


def _itself(value: Tensor) -> Tensor:
    return value


def linears(source: Value, *modules: nn.Module) -> list[Tensor]:
    """The outputs ``[B, L, out]`` of several linears on one value, which is computed once more in the backward."""
    value = source.value
    lora: dict[int, list[tuple[nn.Linear, nn.Module, float]]] = {}
    for module in modules:
        adapters = _adapters(module, value)
        if adapters is not None:
            lora[id(module)] = adapters
    formula, sources = source.formula, source.sources
    if formula is None:
        if not lora:
            return [module(value) for module in modules]
        # The value is kept by whoever made it; peft's copies of it in the adapters' dtype need not be.
        formula, sources = _itself, (value,)
    products: list[nn.Module] = []
    for module in modules:
        if id(module) in lora:
            products += [getattr(module, "base_layer"), *(a for a, _, _ in lora[id(module)])]  # noqa: B009 (typed Any)
        elif is_plain(module, value):
            products.append(module)
    if not products:
        return [module(value) for module in modules]
    parameters = [parameter for module in products for parameter in (module.weight, module.bias)]
    apply: Any = _Linears.apply
    detached = [None if t is None else t.detach() for t in sources]
    made = iter(apply(formula, len(detached), value, *detached, *parameters))
    outputs: list[Tensor] = []
    for module in modules:
        if id(module) in lora:
            base: Tensor = next(made)
            result = base
            for _, b, scaling in lora[id(module)]:
                result = result + b(next(made)) * scaling
            outputs.append(result.to(base.dtype))
        else:
            outputs.append(next(made) if any(module is product for product in products) else module(value))
    return outputs


class _Linears(torch.autograd.Function):
    """``value W_i^T + b_i`` for each i, in the weight's dtype; keeps the sources of the value where a weight wants its
    gradient."""

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], count: int, value: Tensor, *tensors: Any) -> Any:
        sources, parameters = tensors[:count], tensors[count:]
        weights, biases = parameters[::2], parameters[1::2]
        ctx.set_materialize_grads(False)
        ctx.formula, ctx.count, ctx.dtype = formula, count, value.dtype
        needs_value = any(ctx.needs_input_grad[3 + count :: 2])
        ctx.save_for_backward(*(sources if needs_value else [None] * count), *weights)
        return tuple(F.linear(value.to(w.dtype), w, b) for w, b in zip(weights, biases, strict=True))

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
                value = ctx.formula(*sources).flatten(0, -2)
            into.append(rows.mT @ value.to(weight.dtype) if wants_weight and value is not None else None)
            into.append(rows.sum(0) if wants_bias else None)
            if needed[2]:
                if into_value is None or weight.dtype != ctx.dtype:
                    share = (rows @ weight).to(ctx.dtype)
                    into_value = share if into_value is None else into_value + share
                else:
                    into_value = torch.addmm(into_value, rows, weight)
        if into_value is not None:
            shape = next(d.shape for d in gradients if d is not None)
            into_value = into_value.reshape(*shape[:-1], -1)
        return (None, None, into_value, *([None] * ctx.count), *into)
