"""Networks whose gradient is wrong or missing whatever the chain does: refused, with the reason."""

from __future__ import annotations

from typing import Any

from torch import nn

from prfl_fast.models.base import unwrap

# Names under which diffusers registers hooks that reuse an earlier call's result.
_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast")

# Wrappers that do not survive a call inside a backward, by the name of their class.
_WRAPPERS = {
    "DataParallel": (
        "nn.DataParallel copies the network anew in every call, so that a recomputed call is another network's; use "
        "DistributedDataParallel, one process per device"
    ),
    "FullyShardedDataParallel": (
        "FullyShardedDataParallel, FSDP's first form, has taken the parameters out of their layers when the network is "
        "recomputed inside a backward; use torch.distributed.fsdp.fully_shard"
    ),
}


def refuse_unusable(network: Any) -> None:
    """Raise ValueError for what gives no gradient, or not the network's own, whatever the chain does: wrappers that a
    recomputation breaks, accelerate's CPU offload, torch's quantised layers, cache hooks.

    Group offload and layerwise casting keep the gradients and pass; see :func:`refuse_rounded_gradients`.
    """
    inner = unwrap(network)
    if not isinstance(inner, nn.Module):
        return
    for outer in network.modules():
        for cls in type(outer).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise ValueError(f"transformer: {_WRAPPERS[cls.__name__]}")
    for name, module in inner.named_modules():
        where = f"transformer: {name or type(inner).__name__!r}"
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ()))):
            raise ValueError(
                f"{where} is offloaded by accelerate (cpu_offload, disk_offload, enable_sequential_cpu_offload), which "
                "gives its weights no gradients, even in a plain loop; remove it by "
                "accelerate.hooks.remove_hook_from_submodules, or use diffusers' enable_group_offload"
            )
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(
                f"{where} is a quantised layer of torch ({type(module).__name__}), which has no derivative: the "
                "gradient ends there, in a plain loop too; quantise by a library that trains LoRA on "
                "top (bitsandbytes, torchao)"
            )
        registry = getattr(module, "_diffusers_hook", None)
        for registered, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False) or any(cache in registered for cache in _CACHES):
                raise ValueError(
                    f"{where} has the hook {registered!r} ({type(hook).__name__}), which reuses results of earlier "
                    "calls: the network is no pure function of its inputs and has no gradient to speak of; call "
                    "transformer.disable_cache()"
                )


def refuse_rounded_gradients(network: Any) -> None:
    """Raise ValueError for a trainable parameter under diffusers' layerwise casting.

    Its hook calls ``module.to(storage_dtype)`` when a layer's forward is left, and that casts ``.grad`` along: what a
    backward has accumulated is rounded, to float8 for instance, by every call that follows.
    """
    inner = unwrap(network)
    if not isinstance(inner, nn.Module):
        return
    for name, module in inner.named_modules():
        hook = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get("layerwise_casting")
        if hook is None or hook.storage_dtype == hook.compute_dtype:
            continue
        for own, parameter in module.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"transformer: {f'{name}.{own}'!r} is trainable under layerwise casting, which rounds its .grad to "
                    f"{hook.storage_dtype} in every call; freeze the cast layers and train LoRA, or switch it off"
                )
