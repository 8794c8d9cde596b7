"""Whole diffusers pipelines, tiny and with random weights, made without a network: every part from its config.

``make(name, dtype)`` gives one; ``NAMES`` lists them. Random numbers come from torch's global generator, which the
tests seed by their names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PROMPT = "a heron takes off"
NEGATIVE = "blurry , a cat"
_WORDS = "<pad> </s> <unk> <s> a heron takes off over the lake cat jumps blurry describe video : ,".split()
_TEXT_DIM = 16
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}

# What every pipeline here is called with: two latent frames of 2 x 3 patches.
SIZES: dict[str, dict[str, Any]] = {
    "wan": {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 8},
    "hunyuan": {
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "max_sequence_length": 6,
        "prompt_template": {"template": "describe video : {}", "crop_start": 3},
    },
    "ltx": {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 8},
    "cogvideox": {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 8},
}


def tokenizer(max_length: int = 32) -> Any:
    """Words split at blanks; the end token follows, as in T5 and CLIP."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def scheduler(name: str) -> Any:
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "euler_dynamic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        "ddim": lambda: diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        ),
    }[name]()


def _t5(kind: str) -> nn.Module:
    import transformers

    sizes = {"d_model": _TEXT_DIM, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(_WORDS)}
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, eos_token_id=1)
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(_WORDS),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    return CLIPTextModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    # The pipeline takes the third hidden state from the end.
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=_TEXT_DIM,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaModel(config)


def _clip_image() -> tuple[Any, nn.Module]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=_TEXT_DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return processor, CLIPVisionModel(config)


def _ready(pipe: Any, dtype: torch.dtype) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()
            # from_pretrained keeps these parameters in float32.
            kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
            for name, parameter in module.named_parameters():
                # Parts that start at zero would hide what flows through them.
                parameter.data.add_(0.05 * torch.randn_like(parameter))
                if not kept & set(name.split(".")):
                    parameter.data = parameter.data.to(dtype)
    return pipe


def _wan_vae() -> nn.Module:
    import diffusers

    return diffusers.AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def _wan_transformer(**sizes: Any) -> nn.Module:
    import diffusers

    small = {"num_layers": 2, "ffn_dim": 32, "text_dim": _TEXT_DIM, "freq_dim": 16, "in_channels": 16}
    return diffusers.WanTransformer3DModel(**{**_HEADS, **small, **sizes})


def wan(dtype: torch.dtype, solver: str = "unipc", *, experts: int = 1, expand_timesteps: bool = False) -> Any:
    """WanPipeline; with two experts that of Wan 2.2, with ``expand_timesteps`` that of its 5B model."""
    import diffusers

    transformers = [_wan_transformer() for _ in range(experts)]
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5("UMT5"),
        vae=_wan_vae(),
        scheduler=scheduler(solver),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=0.85 if experts == 2 else None,
        expand_timesteps=expand_timesteps,
    )
    return _ready(pipe, dtype)


def wan_image(dtype: torch.dtype, solver: str = "unipc", *, kind: str = "clip") -> Any:
    """WanImageToVideoPipeline. kind: "clip" (Wan 2.1), "first_last" (its first-and-last-frame model), "experts"
    (Wan 2.2) or "expand" (Wan 2.2 5B)."""
    import diffusers

    processor, encoder = _clip_image() if kind in ("clip", "first_last") else (None, None)
    # Channels: latents, mask of the four frames that one latent frame stands for, condition.
    channels = {"in_channels": 16 if kind == "expand" else 16 + 4 + 16, "out_channels": 16}
    image = {"image_dim": _TEXT_DIM, "added_kv_proj_dim": 24} if encoder is not None else {}
    if kind == "first_last":
        image["pos_embed_seq_len"] = 2 * 5  # (8 / 4)^2 patches and a class token, two images
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5("UMT5"),
        vae=_wan_vae(),
        scheduler=scheduler(solver),
        image_processor=processor,
        image_encoder=encoder,
        transformer=_wan_transformer(**channels, **image),
        transformer_2=_wan_transformer(**channels) if kind == "experts" else None,
        boundary_ratio=0.85 if kind == "experts" else None,
        expand_timesteps=kind == "expand",
    )
    return _ready(pipe, dtype)


def wan_vace(dtype: torch.dtype, solver: str = "unipc", *, experts: int = 1) -> Any:
    """WanVACEPipeline, one of its two layers under control; with two experts that of Wan 2.2."""
    import diffusers

    def transformer() -> nn.Module:
        # Control channels: kept and new latents, 8 x 8 pixels of the mask.
        small = {"num_layers": 2, "ffn_dim": 32, "text_dim": _TEXT_DIM, "freq_dim": 16, "in_channels": 16}
        return diffusers.WanVACETransformer3DModel(**_HEADS, **small, vace_layers=[0], vace_in_channels=2 * 16 + 64)

    pipe = diffusers.WanVACEPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5("UMT5"),
        vae=_wan_vae(),
        scheduler=scheduler(solver),
        transformer=transformer(),
        transformer_2=transformer() if experts == 2 else None,
        boundary_ratio=0.85 if experts == 2 else None,
    )
    return _ready(pipe, dtype)


def hunyuan(dtype: torch.dtype, solver: str = "euler") -> Any:
    """HunyuanVideoPipeline with embedded guidance."""
    import diffusers

    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=_TEXT_DIM,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(2, 2, 2, 2), layers_per_block=1, norm_num_groups=1
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=_llama(),
        tokenizer=tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler(solver),
        text_encoder_2=_clip_text(),
        tokenizer_2=tokenizer(77),
    )
    return _ready(pipe, dtype)


def ltx(dtype: torch.dtype, solver: str = "euler_dynamic") -> Any:
    """LTXPipeline, its schedule shifted by the number of tokens."""
    return _ltx("LTXPipeline", dtype, solver)


def ltx_image(dtype: torch.dtype, solver: str = "euler_dynamic") -> Any:
    """LTXImageToVideoPipeline."""
    return _ltx("LTXImageToVideoPipeline", dtype, solver)


def _ltx(name: str, dtype: torch.dtype, solver: str) -> Any:
    import diffusers

    transformer = diffusers.LTXVideoTransformer3DModel(
        **_HEADS, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=24, caption_channels=_TEXT_DIM
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(2, 2, 2, 2),
        decoder_block_out_channels=(2, 2, 2, 2),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = getattr(diffusers, name)(
        scheduler=scheduler(solver),
        vae=vae,
        text_encoder=_t5("T5"),
        tokenizer=tokenizer(),
        transformer=transformer,
    )
    return _ready(pipe, dtype)


def cogvideox(dtype: torch.dtype, solver: str = "ddim", *, version: str = "5b") -> Any:
    """CogVideoXPipeline. version: "2b" (sine table), "5b" (rotary) or "1.5" (rotary, patches over time)."""
    import diffusers

    rotary = {"2b": {}, "5b": {"use_rotary_positional_embeddings": True}}
    rotary["1.5"] = {**rotary["5b"], "patch_size_t": 2, "patch_bias": False}
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=_TEXT_DIM,
        time_embed_dim=16,
        max_text_seq_length=8,
        sample_height=4,
        sample_width=6,
        sample_frames=5,
        **rotary[version],
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(2, 2, 2, 2), layers_per_block=1, norm_num_groups=1
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5("T5"),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler(solver),
    )
    return _ready(pipe, dtype)


def forbid_decoding(pipe: Any) -> Any:
    """A pipe whose decoder fails when it is called."""

    def decode(*arguments: Any, **keywords: Any) -> Tensor:
        raise AssertionError("the decoder was called")

    pipe.vae.decode = decode
    pipe.vae.decoder.forward = decode
    return pipe
