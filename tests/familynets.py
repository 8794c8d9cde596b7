"""A tiny random network of every family that the chain knows, the arguments of its calls, and one call of each written
out as the family's pipeline writes it, free of the package under test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tinyfamilies
import torch
from torch import Tensor, nn

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
BATCH, TOKENS, TEXT = 2, 5, 16
SCALE = {"scale": 0.5}

Call = Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass
class Family:
    """``call(net, x, t, keywords)`` gives the prediction of one branch; ``t`` is 0-dimensional, as the scheduler's.

    Attributes:
        keywords: of the conditional branch; ``negative`` replaces some of them.
        more: further arguments of ``unrolled_sample`` (prepare_input, latent_mask, two experts).
        scale: name of the keyword that carries the LoRA scale, None where the family has none.
        other: the second expert, called below the timestep ``boundary``.
        mask: elements that the solver updates.
        dtype: float64 where the family runs in it.
        coarse: the network rounds to bfloat16 inside, whatever its dtype.
    """

    net: Any
    latents: Tensor
    keywords: dict[str, Any]
    negative: dict[str, Any]
    call: Call
    more: dict[str, Any] = field(default_factory=dict)
    scale: str | None = "attention_kwargs"
    scheduler: str = "unipc"
    lora: tuple[str, ...] = ("to_q", "to_v")
    other: Any = None
    boundary: float = -math.inf
    mask: Tensor | None = None
    dtype: torch.dtype = torch.float64
    coarse: bool = False


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def text(width: int = TEXT) -> Tensor:
    return randn(BATCH, TOKENS, width)


def mask(dtype: torch.dtype = torch.bool) -> Tensor:
    """The second prompt is shorter."""
    seen = torch.ones(BATCH, TOKENS, dtype=dtype)
    seen[1, 3:] = 0
    return seen


def build(name: str, **sizes: Any) -> nn.Module:
    import diffusers

    net: nn.Module = getattr(diffusers, name)(**sizes).eval()
    for parameter in net.parameters():
        # Parts that start at zero would hide what flows through them.
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return net


def angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    turned = randn(tokens, width // 2).repeat_interleave(2, dim=1)
    return turned.cos(), turned.sin()


def given(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
    """Timesteps as the scheduler gives them, one per sample."""
    output: Tensor = net(hidden_states=x, timestep=t.expand(x.shape[0]), return_dict=False, **keywords)[0]
    return output


def in_float32(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
    return given(net, x, t, keywords).float()


def rounded(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
    """Timesteps in the latents' dtype, which is the network's."""
    return given(net, x, t.to(x.dtype), keywords)


def thousandth(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
    timestep = t.expand(x.shape[0]).to(x.dtype)
    output: Tensor = net(hidden_states=x, timestep=timestep / 1000, return_dict=False, **keywords)[0]
    return output


def joined(condition: Tensor, call: Call, dim: int = 1) -> tuple[Call, dict[str, Any]]:
    """A condition beside the latents' channels, in the written out call and as ``prepare_input``."""

    def shown(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
        return call(net, torch.cat([x, condition.to(x)], dim=dim), t, keywords)

    def prepare(x: Tensor, timestep: Tensor, step: int) -> dict[str, Any]:
        return {"hidden_states": torch.cat([x, condition.to(x)], dim=dim)}

    return shown, {"prepare_input": prepare}


def of_twin(name: str, call: Call, scheduler: str = "unipc") -> Family:
    twin = tinyfamilies.make(name)
    more: dict[str, Any] = {}
    if twin.prepare_input is not None:
        condition = twin.prepare_input(twin.latents, torch.tensor(1.0), 0)["hidden_states"][:, twin.latents.shape[1] :]
        call, more = joined(condition, call)
    # Distilled guidance is embedded, so that the twin has no negative text; the pipeline's true guidance has.
    negative = {"encoder_hidden_states": randn(*twin.conditioning["encoder_hidden_states"].shape)}
    return Family(twin.net, twin.latents, twin.conditioning, negative, call, more, scheduler=scheduler)


def wan() -> Family:
    return of_twin("wan", given)


def wan_image() -> Family:
    return of_twin("wan-image", given)


def wan_experts() -> Family:
    family = of_twin("wan", given)
    family.other, family.boundary = tinyfamilies.make("wan", seed=1).net, 800.0
    family.more = {"transformer_2": family.other, "boundary_ratio": 0.8, "guidance_scale_2": 3.0}
    return family


def wan_tokens() -> Family:
    """Wan 2.2 5B from an image: the first frame is known, at timestep 0."""
    family = of_twin("wan", given)
    known = torch.ones(1, 1, *family.latents.shape[2:])
    known[:, :, 0] = 0
    tokens = known[0, 0, :, ::2, ::2].flatten()

    def call(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
        timestep = (tokens * t).unsqueeze(0).expand(x.shape[0], -1)
        output: Tensor = net(hidden_states=x, timestep=timestep, return_dict=False, **keywords)[0]
        return output

    def prepare(x: Tensor, timestep: Tensor, step: int) -> dict[str, Any]:
        return {"timestep": (tokens * timestep).unsqueeze(0).expand(x.shape[0], -1)}

    family.call, family.mask = call, known.bool()
    family.more = {"prepare_input": prepare, "latent_mask": family.mask}
    return family


def wan_vace() -> Family:
    net = build(
        "WanVACETransformer3DModel", **HEADS, num_layers=3, ffn_dim=32, text_dim=TEXT, freq_dim=16, in_channels=4,
        out_channels=4, vace_layers=[0, 2], vace_in_channels=6,
    )  # fmt: skip
    # Two frames of control for three of latents: the network pads them.
    keywords = {
        "encoder_hidden_states": text(), "control_hidden_states": randn(BATCH, 6, 2, 4, 6),
        "control_hidden_states_scale": torch.tensor([0.7, 1.3]),
    }  # fmt: skip
    return Family(net, randn(BATCH, 4, 3, 4, 6), keywords, {"encoder_hidden_states": text()}, given)


def skyreels() -> Family:
    net = build(
        "SkyReelsV2Transformer3DModel", **HEADS, num_layers=2, ffn_dim=32, text_dim=TEXT, freq_dim=16, in_channels=8,
        out_channels=4, image_dim=8, added_kv_proj_dim=24, inject_sample_info=True,
    )  # fmt: skip
    keywords = {"encoder_hidden_states": text(), "encoder_hidden_states_image": randn(BATCH, 3, 8), "fps": [1, 0]}
    call, more = joined(randn(BATCH, 4, 2, 4, 6), given)
    return Family(net, randn(BATCH, 4, 2, 4, 6), keywords, {"encoder_hidden_states": text()}, call, more)


def skyreels_forcing() -> Family:
    """Diffusion forcing with all frames at one noise level, blocks of two frames seeing the earlier ones only."""
    net = build(
        "SkyReelsV2Transformer3DModel", **HEADS, num_layers=2, ffn_dim=32, text_dim=TEXT, freq_dim=16, in_channels=4,
        out_channels=4, num_frame_per_block=2,
    )  # fmt: skip
    keywords = {"encoder_hidden_states": text(), "enable_diffusion_forcing": True}

    def call(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
        timestep = t.expand(x.shape[0]).unsqueeze(1).repeat(1, x.shape[2])
        output: Tensor = net(hidden_states=x, timestep=timestep, return_dict=False, **keywords)[0]
        return output

    def prepare(x: Tensor, timestep: Tensor, step: int) -> dict[str, Any]:
        return {"timestep": timestep.expand(x.shape[0], x.shape[2])}

    more = {"prepare_input": prepare}
    return Family(net, randn(BATCH, 4, 4, 2, 4), keywords, {"encoder_hidden_states": text()}, call, more)


def hunyuan() -> Family:
    return of_twin("hunyuan-distilled", lambda net, x, t, keywords: given(net, x, t.to(x.dtype), keywords))


def hunyuan15() -> Family:
    from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection

    net = build(
        "HunyuanVideo15Transformer3DModel", **HEADS, in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=TEXT, text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip

    # Its own is 2048 wide, which is most of a tiny network.
    net.context_embedder_2 = HunyuanVideo15ByT5TextProjection(8, 16, 24)

    def branch() -> dict[str, Any]:
        return {
            "encoder_hidden_states": text(), "encoder_attention_mask": mask(),
            "encoder_hidden_states_2": text(8), "encoder_attention_mask_2": mask().flip(0),
        }  # fmt: skip

    call, more = joined(randn(BATCH, 5, 2, 3, 5), rounded)
    keywords = {**branch(), "image_embeds": randn(BATCH, 3, 8)}
    return Family(net, randn(BATCH, 4, 2, 3, 5), keywords, branch(), call, more)


def ltx() -> Family:
    return of_twin("ltx", in_float32, "euler")


def ltx2() -> Family:
    """Six video tokens and three of audio; both are sampled."""
    net = build(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, **HEADS, cross_attention_dim=24,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=TEXT, vae_scale_factors=(8, 32, 32),
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        seen = mask(torch.int64)
        return {
            "encoder_hidden_states": text(), "audio_encoder_hidden_states": text(), "encoder_attention_mask": seen,
            "audio_encoder_attention_mask": seen,
        }  # fmt: skip

    def call(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
        timestep = t.expand(x.shape[0])
        video, audio = net(
            hidden_states=x[:, :6], audio_hidden_states=x[:, 6:], timestep=timestep, sigma=timestep, return_dict=False,
            **keywords,
        )  # fmt: skip
        return torch.cat([video.float(), audio.float()], dim=1)

    sizes = {"num_frames": 2, "height": 1, "width": 3, "audio_num_frames": 3, "fps": 25.0}
    return Family(net, randn(BATCH, 9, 4), {**branch(), **sizes}, branch(), call, scheduler="euler")


def cogvideox() -> Family:
    return of_twin("cogvideox-rotary", in_float32, "ddim")


def consisid() -> Family:
    net = build(
        "ConsisIDTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=4,
        time_embed_dim=16, text_embed_dim=TEXT, num_layers=2, sample_width=6, sample_height=4, sample_frames=5,
        max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=1,
        cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=8, LFE_vit_dim=8, LFE_depth=2, LFE_dim_head=4,
        LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=16, LFE_ff_mult=1, LFE_num_scale=2,
    )  # fmt: skip
    keywords = {
        "encoder_hidden_states": text(), "image_rotary_emb": angles(2 * 2 * 3, 12), "id_cond": randn(BATCH, 8),
        "id_vit_hidden": [randn(BATCH, 4, 8), randn(BATCH, 4, 8)],
    }  # fmt: skip
    call, more = joined(randn(BATCH, 2, 4, 4, 6), in_float32, dim=2)
    negative = {"encoder_hidden_states": text()}
    return Family(net, randn(BATCH, 2, 4, 4, 6), keywords, negative, call, more, scheduler="ddim")


def mochi() -> Family:
    net = build(
        "MochiTransformer3DModel", **HEADS, num_layers=2, pooled_projection_dim=TEXT, in_channels=4,
        text_embed_dim=TEXT, time_embed_dim=4, max_sequence_length=TOKENS,
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        return {"encoder_hidden_states": text(), "encoder_attention_mask": mask()}

    return Family(
        net, randn(BATCH, 4, 2, 4, 6), branch(), branch(), lambda *given: rounded(*given).float(), scheduler="inverted"
    )


def allegro() -> Family:
    net = build(
        "AllegroTransformer3DModel", **HEADS, num_layers=2, cross_attention_dim=24, sample_height=4, sample_width=6,
        sample_frames=2, caption_channels=TEXT,
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        return {"encoder_hidden_states": text(), "encoder_attention_mask": mask(torch.int64)}

    tables = tuple(tuple(torch.stack([a.cos(), a.sin()])) for a in (randn(n, 2).repeat(1, 2) for n in (2, 2, 3)))
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 3))).T.reshape(3, 1, -1).contiguous()
    keywords = {**branch(), "image_rotary_emb": (tables, tuple(grid))}
    return Family(
        net, randn(BATCH, 4, 2, 4, 6), keywords, branch(), given, scale=None, scheduler="ancestral"
    )


def cosmos() -> Family:
    net = build(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, **HEADS, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=TEXT, adaln_lora_dim=4, max_size=(4, 6, 6), concat_padding_mask=False,
    )  # fmt: skip
    keywords = {"encoder_hidden_states": text(), "fps": 30}
    negative = {"encoder_hidden_states": text()}
    return Family(
        net, randn(BATCH, 4, 2, 4, 6), keywords, negative, rounded, scale=None, scheduler="edm", dtype=torch.float32
    )


def easyanimate() -> Family:
    net = build(
        "EasyAnimateTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=9, out_channels=4,
        patch_size=2, num_layers=2, mmdit_layers=1, time_embed_dim=16, text_embed_dim=TEXT, add_norm_text_encoder=True,
    )  # fmt: skip
    keywords = {"encoder_hidden_states": text(), "inpaint_latents": randn(BATCH, 5, 2, 4, 6)}
    return Family(net, randn(BATCH, 4, 2, 4, 6), keywords, {"encoder_hidden_states": text()}, rounded, scale=None)


def kandinsky5() -> Family:
    net = build(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=TEXT, in_text_dim2=8, time_dim=8,
        out_visual_dim=4, model_dim=24, ff_dim=16, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4),
        visual_cond=True,
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        return {"encoder_hidden_states": text(), "pooled_projections": randn(BATCH, 8)}

    def bare(net: Any, x: Tensor, t: Tensor, keywords: dict[str, Any]) -> Tensor:
        timestep = t.unsqueeze(0).repeat(x.shape[0]).to(x.dtype)
        output: Tensor = net(hidden_states=x, timestep=timestep, return_dict=True, **keywords).sample
        return output

    places = {"visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(3)], "text_rope_pos": torch.arange(5)}
    call, more = joined(randn(BATCH, 2, 4, 6, 5), bare, dim=-1)
    return Family(
        net, randn(BATCH, 2, 4, 6, 4), {**branch(), **places}, branch(), call, more, scale=None,
        lora=("to_query", "to_value"), dtype=torch.float32, coarse=True,
    )  # fmt: skip


def sana_video() -> Family:
    """With a learned variance, which the pipeline leaves out."""
    net = build(
        "SanaVideoTransformer3DModel", in_channels=4, out_channels=8, **HEADS, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=TEXT,
        sample_size=6,
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        return {"encoder_hidden_states": text(), "encoder_attention_mask": mask(torch.int64)}

    def half(*arguments: Any) -> Tensor:
        return in_float32(*arguments).chunk(2, dim=1)[0]

    return Family(net, randn(BATCH, 4, 2, 4, 6), branch(), branch(), half)


def sd3() -> Family:
    net = build(
        "SD3Transformer2DModel", sample_size=8, in_channels=4, out_channels=4, num_layers=2, **HEADS,
        joint_attention_dim=TEXT, caption_projection_dim=24, pooled_projection_dim=8, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        return {"encoder_hidden_states": text(), "pooled_projections": randn(BATCH, 8)}

    return Family(net, randn(BATCH, 4, 4, 6), branch(), branch(), given, scale="joint_attention_kwargs")


def flux() -> Family:
    net = build(
        "FluxTransformer2DModel", in_channels=4, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=TEXT,
        pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        return {"encoder_hidden_states": text(), "pooled_projections": randn(BATCH, 8)}

    fixed = {
        "guidance": torch.tensor([3.5, 1.5]), "txt_ids": torch.zeros(TOKENS, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)),
    }  # fmt: skip
    return Family(
        net, randn(BATCH, 6, 4), {**branch(), **fixed}, branch(), thousandth, scale="joint_attention_kwargs"
    )


def qwen_image() -> Family:
    net = build(
        "QwenImageTransformer2DModel", in_channels=8, out_channels=2, num_layers=2, **HEADS, joint_attention_dim=TEXT,
        axes_dims_rope=(4, 4, 4),
    )  # fmt: skip

    def branch() -> dict[str, Any]:
        return {"encoder_hidden_states": text(), "encoder_hidden_states_mask": mask()}

    keywords = {**branch(), "img_shapes": [[(1, 2, 3)]] * BATCH}
    return Family(net, randn(BATCH, 6, 8), keywords, branch(), thousandth)


FAMILIES: dict[str, Callable[[], Family]] = {
    make.__name__: make
    for make in (
        wan, wan_image, wan_experts, wan_tokens, wan_vace, skyreels, skyreels_forcing, hunyuan, hunyuan15, ltx, ltx2,
        cogvideox, consisid, mochi, allegro, cosmos, easyanimate, kandinsky5, sana_video, sd3, flux, qwen_image,
    )
}  # fmt: skip


def scheduler(name: str) -> Any:
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "inverted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        "ddim": lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
        "edm": lambda: diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
    }[name]()
