"""A tiny random network of every published variant of each family, with the arguments of one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.twin import Twin, make_twin

WAN, HUNYUAN = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"
LTX, COGVIDEOX = "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"
IMAGE = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}

CONFIGS: dict[str, dict[str, Any]] = {
    "wan": {"_class_name": WAN},
    "wan-image": {"_class_name": WAN, **IMAGE},
    "wan-first-last": {"_class_name": WAN, **IMAGE, "pos_embed_seq_len": 514},
    "hunyuan": {"_class_name": HUNYUAN, "guidance_embeds": False},
    "hunyuan-distilled": {"_class_name": HUNYUAN, "guidance_embeds": True},
    "hunyuan-concat": {
        "_class_name": HUNYUAN, "guidance_embeds": False, "in_channels": 33, "image_condition_type": "latent_concat",
    },
    "hunyuan-replace": {"_class_name": HUNYUAN, "guidance_embeds": True, "image_condition_type": "token_replace"},
    "ltx": {"_class_name": LTX},
    "cogvideox": {"_class_name": COGVIDEOX},
    "cogvideox-rotary": {"_class_name": COGVIDEOX, "use_rotary_positional_embeddings": True},
    "cogvideox-1.5": {
        "_class_name": COGVIDEOX, "use_rotary_positional_embeddings": True, "in_channels": 32, "patch_size_t": 2,
        "ofs_embed_dim": 512, "patch_bias": False,
    },
}  # fmt: skip
TEXT = ["wan", "hunyuan-distilled", "ltx", "cogvideox-rotary"]


def make(name: str, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 0) -> Twin:
    """Weights in ``dtype`` as ``from_pretrained`` leaves them: some parts of Wan stay float32. Latents are float32."""
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    twin = make_twin(CONFIGS[name], euler, num_inference_steps=3, batch=batch, dtype=torch.float32, seed=seed)
    net: Any = twin.net
    kept = net._keep_in_fp32_modules or []
    for key, parameter in net.named_parameters():
        if not any(part in key.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return twin


def overrides(twin: Twin, x: Tensor, t: Tensor) -> dict[str, Any] | None:
    return None if twin.prepare_input is None else twin.prepare_input(x, t, 0)


def plain_call(net: Any, x: Tensor, t: Tensor, conditioning: dict[str, Any], shown: Tensor | None = None) -> Tensor:
    """One call written out as the pipelines write it."""
    keywords = dict(conditioning)
    for name in ("encoder_hidden_states", "encoder_hidden_states_image", "pooled_projections", "guidance"):
        if name in keywords:
            keywords[name] = keywords[name].to(net.dtype)
    timestep = t.expand(x.shape[0]) if t.ndim == 0 else t
    family = next(c.__name__ for c in type(net).__mro__ if c.__name__ in (WAN, HUNYUAN, LTX, COGVIDEOX))
    if family == HUNYUAN:
        timestep = timestep.to(x.dtype)
    hidden = (x if shown is None else shown).to(net.dtype)
    output: Tensor = net(hidden_states=hidden, timestep=timestep, return_dict=False, **keywords)[0]
    return output.float() if family in (LTX, COGVIDEOX) else output


def add_lora(net: Any) -> None:
    """Random LoRA weights on the attention's queries and values; everything is trainable."""
    from peft import LoraConfig

    net.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    net.requires_grad_(True)


def leaves(conditioning: dict[str, Any]) -> dict[str, Any]:
    """The same conditioning with every float tensor a fresh leaf that wants a gradient."""
    return {
        k: v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in conditioning.items()
    }


def gradients(net: nn.Module, output: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    """Of a random projection of the output (the same for outputs of one shape), for parameters and ``tensors``."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    wanted = [p for p in net.parameters() if p.requires_grad] + list(tensors)
    return list(torch.autograd.grad((output.float() * weights).sum(), wanted, allow_unused=True))


def assert_equal(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Bit for bit, and not all of it zero."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or e is None or torch.equal(a, e)
    assert sum(int(e is not None and bool(e.abs().max() > 0)) for e in expected) > len(expected) / 2
