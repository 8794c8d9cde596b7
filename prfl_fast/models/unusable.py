"""Networks whose gradient is wrong or missing whatever the chain does: refused, with the reason."""

from __future__ import annotations

from typing import Any

from torch import nn

from prfl_fast.models.base import unwrap

# Names under which diffusers registers hooks that reuse an earlier call's result.
_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast")


def refuse_unusable(network: Any) -> None:
    """Raise ValueError for accelerate's CPU offload (no gradients) and for cache hooks (no pure function).

    Group offload and layerwise casting keep the gradients and pass.
    """
    inner = unwrap(network)
    if not isinstance(inner, nn.Module):
        return
    for name, module in inner.named_modules():
        where = f"transformer: {name or type(inner).__name__!r}"
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ()))):
            raise ValueError(
                f"{where} is offloaded by accelerate (cpu_offload, disk_offload, enable_sequential_cpu_offload), which "
                "gives its weights no gradients, even in a plain loop; remove it by "
                "accelerate.hooks.remove_hook_from_submodules, or use diffusers' enable_group_offload"
            )
        registry = getattr(module, "_diffusers_hook", None)
        for registered, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False) or any(cache in registered for cache in _CACHES):
                raise ValueError(
                    f"{where} has the hook {registered!r} ({type(hook).__name__}), which reuses results of earlier "
                    "calls: the network is no pure function of its inputs and has no gradient to speak of; call "
                    "transformer.disable_cache()"
                )
