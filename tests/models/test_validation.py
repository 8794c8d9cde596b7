"""Every wrong argument of a family is one error that names it, before any network call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from tinyfamilies import CONFIGS, TEXT, make

from prfl_fast.models import adapter_for
from prfl_fast.twin import Twin


def refused(
    twin: Twin, error: type[Exception], match: str, *, latents: Any = None, without: str = "", **extra: Any
) -> None:
    conditioning = {k: v for k, v in {**twin.conditioning, **extra}.items() if k != without}
    calls: list[int] = []
    handle = twin.net.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=match):
        adapter_for(twin.net).validate(twin.latents if latents is None else latents, conditioning, prepared=False)
    handle.remove()
    assert not calls


@pytest.mark.parametrize("name", CONFIGS)
def test_right_arguments_pass(name: str) -> None:
    twin = make(name)
    prepared = twin.prepare_input is not None
    adapter = adapter_for(twin.net)
    adapter.validate(twin.latents, twin.conditioning, prepared=prepared)
    # What is not needed may be given as None, as the pipelines do.
    adapter.validate(twin.latents, {**twin.conditioning, "attention_kwargs": None}, prepared=prepared)
    if prepared:
        with pytest.raises(ValueError, match="the others come from prepare_input"):
            adapter.validate(twin.latents, twin.conditioning, prepared=False)
        with pytest.raises(ValueError, match="latents: expected 16 channels"):
            adapter.validate(
                torch.cat([twin.latents] * 3, dim=2 if name.startswith("cog") else 1), twin.conditioning, prepared=True
            )
        adapter.validate(twin.latents, {}, prepared=True)  # its overrides may bring any keyword


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("wan", (2, 16, 4, 6), r"\[B, C, F, H, W\] for WanTransformer3DModel, got \(2, 16, 4, 6\)"),
        ("wan", (2, 12, 2, 4, 6), "expected 16 channels in .*, got 12"),
        ("wan", (2, 16, 2, 5, 6), "expected H of .* divisible by the patch 2"),
        ("wan", (2, 16, 2, 4, 7), "expected W of .* divisible by the patch 2"),
        ("hunyuan", (2, 2, 16, 4, 6), "expected 16 channels"),
        ("hunyuan", (2, 16, 2, 3, 6), "expected H"),
        ("ltx", (2, 128, 2, 2, 3), r"\[B, S, C\] for LTXVideoTransformer3DModel"),
        ("ltx", (2, 12, 64), "expected 128 channels"),
        ("ltx", (2, 11, 128), "num_frames x height x width = 2 x 2 x 3 tokens"),
        ("cogvideox", (2, 16, 2, 4, 6), "expected 16 channels in .B, F, C, H, W., got 2"),
        ("cogvideox", (2, 2, 16, 4, 5), "expected W"),
    ],
)
def test_latents(name: str, shape: tuple[int, ...], match: str) -> None:
    refused(make(name), ValueError, "^latents: .*" + match, latents=torch.randn(shape))


def test_frames_of_a_patch() -> None:
    twin = make("cogvideox-1.5")
    with pytest.raises(ValueError, match="expected F of .* divisible by the patch 2"):
        adapter_for(twin.net).validate(twin.latents[:, :3], twin.conditioning, prepared=True)


@pytest.mark.parametrize("name", TEXT)
def test_conditioning_of_every_family(name: str) -> None:
    twin = make(name)
    text = twin.conditioning["encoder_hidden_states"]
    key = "^conditioning: .*'encoder_hidden_states'"
    refused(twin, ValueError, "takes no keyword 'encoder_hiden_states'; did you mean 'encoder_hidden_states'",
            encoder_hiden_states=text)  # fmt: skip
    refused(twin, ValueError, "takes no keyword 'zzz'; it takes .*encoder_hidden_states", zzz=1)
    refused(twin, ValueError, "needs 'encoder_hidden_states'", without="encoder_hidden_states")
    refused(twin, ValueError, "needs 'encoder_hidden_states'", encoder_hidden_states=None)
    refused(twin, ValueError, key + ": expected a batch of 2 .*got .3, 5, 16", encoder_hidden_states=text[[0, 1, 1]])
    refused(twin, ValueError, key + ": expected a batch of 2", encoder_hidden_states=text[:1])
    refused(twin, ValueError, key + ": expected a batch of 2", encoder_hidden_states=torch.tensor(1.0))
    refused(twin, ValueError, key + r": expected \[2, tokens, 16\]", encoder_hidden_states=text[..., :7])
    refused(twin, ValueError, key + r": expected \[2, tokens, 16\]", encoder_hidden_states=text[:, 0])
    refused(
        twin,
        TypeError,
        key + ": expected a tensor of a float dtype, got torch.int64",
        encoder_hidden_states=text.long(),
    )
    refused(twin, TypeError, key + ": expected a tensor, got list", encoder_hidden_states=text.tolist())
    refused(
        twin, ValueError, key + " lies on meta, expected the latents' device cpu", encoder_hidden_states=text.to("meta")
    )
    spoiled = text.clone()
    spoiled[1, 2, 3] = float("nan")
    refused(twin, ValueError, key + " holds NaN", encoder_hidden_states=spoiled)
    for own in ("hidden_states", "timestep", "return_dict"):
        refused(twin, ValueError, f"'{own}' is given by the chain itself", **{own: twin.latents})


@pytest.mark.parametrize(
    ("name", "keyword"),
    [
        ("hunyuan", "encoder_attention_mask"),
        ("hunyuan", "pooled_projections"),
        ("hunyuan-distilled", "guidance"),
        ("ltx", "encoder_attention_mask"),
        ("cogvideox-rotary", "image_rotary_emb"),
    ],
)
def test_what_a_family_needs_besides(name: str, keyword: str) -> None:
    twin = make(name)
    refused(twin, ValueError, f"needs .*'{keyword}'", without=keyword)
    if keyword != "image_rotary_emb":
        refused(twin, ValueError, f"'{keyword}': expected a batch of 2", **{keyword: twin.conditioning[keyword][:1]})
    else:
        cos, sin = twin.conditioning[keyword]
        refused(twin, ValueError, "'image_rotary_emb' holds NaN", image_rotary_emb=(cos, sin * float("nan")))


def test_ltx_needs_the_tokens_places() -> None:
    twin = make("ltx")
    for name in ("num_frames", "height", "width"):
        refused(twin, ValueError, "needs 'num_frames', 'height', 'width'", without=name)
    refused(twin, ValueError, "whole numbers", height=2.0)
    coordinates = {k: v for k, v in twin.conditioning.items() if k not in ("num_frames", "height", "width")}
    adapter = adapter_for(twin.net)
    adapter.validate(twin.latents, {**coordinates, "video_coords": torch.rand(2, 3, 12)}, prepared=False)


def test_images_of_wan() -> None:
    twin = make("wan")
    refused(twin, ValueError, "this Wan has no image embedder", encoder_hidden_states_image=torch.randn(2, 5, 16))
    for name, images in (("wan-image", 2), ("wan-first-last", 4)):
        twin = make(name)
        given = twin.conditioning["encoder_hidden_states_image"]
        assert given.shape[0] == images
        with pytest.raises(ValueError, match=f"'encoder_hidden_states_image': expected a batch of {images}"):
            spoiled = {**twin.conditioning, "encoder_hidden_states_image": given[:1]}
            adapter_for(twin.net).validate(twin.latents, spoiled, prepared=True)


def test_infinite_masks_pass() -> None:
    twin = make("ltx")
    mask = torch.full((2, 1, 5), -float("inf"))
    adapter_for(twin.net).validate(twin.latents, {**twin.conditioning, "encoder_attention_mask": mask}, prepared=False)
