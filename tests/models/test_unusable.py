"""Networks without a right gradient are refused with the reason; what only costs time or memory passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers
from tinyfamilies import make, plain_call

from prfl_fast.models import adapter_for, refuse_unusable

T = torch.tensor(637.25)


ATTENTION = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 100}
CACHES: dict[str, dict[str, Any]] = {
    "FirstBlockCacheConfig": {"threshold": 0.1},
    "PyramidAttentionBroadcastConfig": ATTENTION,
    "FasterCacheConfig": {**ATTENTION, "is_guidance_distilled": True},
    "MagCacheConfig": {"num_inference_steps": 3, "mag_ratios": [1.0, 1.0, 1.0]},
    "TaylorSeerCacheConfig": {"cache_identifiers": ["blocks.*attn1"]},
}


@pytest.mark.parametrize("name", CACHES)
def test_caches(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    config = getattr(diffusers, name)(**CACHES[name])
    net: Any = make("wan").net
    refuse_unusable(net)
    net.enable_cache(config)
    for network in (net, torch.compile(net, backend="eager")):
        with pytest.raises(ValueError, match="^transformer: .* has the hook .* no pure function .*disable_cache"):
            refuse_unusable(network)
    with pytest.raises(ValueError, match="no pure function"):
        adapter_for(net).trunk(1, copy=True)
    net.disable_cache()
    refuse_unusable(net)


def test_offload_by_accelerate_gives_no_gradients_and_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    twin = make("wan")
    offloaded: Any = accelerate.cpu_offload(twin.net, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="^transformer: .* offloaded by accelerate .*no gradients"):
        refuse_unusable(offloaded)
    # The reason: no weight gets a gradient, even in the plain call.
    plain_call(offloaded, twin.latents.requires_grad_(), T, twin.conditioning).sum().backward()
    assert all(p.grad is None for p in offloaded.parameters())
    accelerate.hooks.remove_hook_from_submodules(offloaded)
    refuse_unusable(offloaded)


def test_offload_inside_a_chain_of_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    net = nn.Sequential(nn.Linear(2, 2))
    hooks.add_hook_to_module(net[0], hooks.ModelHook())
    refuse_unusable(net)
    offload = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=dict(net[0].state_dict()))
    hooks.add_hook_to_module(net[0], offload, append=True)
    with pytest.raises(ValueError, match="'0' is offloaded"):
        refuse_unusable(net)


def test_what_keeps_its_gradients_passes() -> None:
    net: Any = make("wan").net
    net.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    refuse_unusable(net)
    refuse_unusable(lambda x, t: x)
    refuse_unusable(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("stateful", "name"), [(True, "something_new"), (False, "fbc_block"), (False, "new_cache_root")]
)
def test_caches_of_other_releases(stateful: bool, name: str) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Hook(ModelHook):
        _is_stateful = stateful

    net: Any = make("wan").net
    registry = HookRegistry.check_if_exists_or_initialize(net.blocks[1])
    registry.register_hook(ModelHook(), "harmless")
    refuse_unusable(net)
    registry.register_hook(Hook(), name)
    with pytest.raises(ValueError, match=rf"'blocks.1' has the hook '{name}' \(Hook\)"):
        refuse_unusable(net)
