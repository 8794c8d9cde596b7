"""Wrong arguments of the families without a trunk: one error that names what came, before any call."""

from __future__ import annotations

from typing import Any

import familynets
import pytest
import torch

pytest.importorskip("diffusers")

from prfl_fast.models import adapter_for, trunk_from_config

KNOWN = [
    "wan_vace", "hunyuan15", "ltx2", "consisid", "mochi", "allegro", "cosmos", "easyanimate", "kandinsky5",
    "sana_video", "sd3", "flux", "qwen_image",
]  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_every_family(name: str) -> None:
    family = familynets.FAMILIES[name]()
    adapter: Any = adapter_for(family.net)
    x, words, prepared = family.latents, family.keywords, "prepare_input" in family.more
    adapter.validate(x, words, prepared=prepared)
    adapter.validate(x, {**words, **family.negative}, prepared=prepared)
    assert len(adapter.blocks()) == adapter.num_blocks > 1
    calls: list[int] = []
    family.net.register_forward_pre_hook(lambda *_: calls.append(1))

    def refused(match: str, latents: Any = x, **changed: Any) -> None:
        with pytest.raises(ValueError, match=match):
            adapter.validate(latents, {**words, **changed}, prepared=prepared)

    refused(r"^latents: expected \[B, .*\] for ", latents=x[0])
    channels = adapter.layout.index("C")
    refused(r"^latents: expected \d+ channels", latents=torch.cat([x, x], dim=channels))
    for letter, size in adapter.patch(family.net.config).items():
        if size > 1:
            wrong = x.narrow(adapter.layout.index(letter), 0, 1)
            refused(f"^latents: expected {letter} of .* divisible by the patch {size}", latents=wrong)
    refused("did you mean 'encoder_hidden_states'", encoder_hidden_stats=1)
    for key in adapter.batched:
        if words.get(key) is not None:
            refused(f"^conditioning: '{key}': expected a batch of 2", **{key: words[key][:1]})
    if prepared:
        with pytest.raises(ValueError, match="the others come from prepare_input"):
            adapter.validate(x, words, prepared=False)
    else:
        for key in adapter.needed(family.net.config):
            refused(f"^conditioning: .* needs .*'{key}'", **{key: None})
    for use in (lambda: adapter.trunk(1, copy=False), lambda: adapter.feature_dim):
        with pytest.raises(ValueError, match=f"features are known for Wan.* not for {type(family.net).__name__}"):
            use()
    with pytest.raises(ValueError, match=r"config: class_name: expected one of CogVideoX\w+, HunyuanVideoT\w+, LTXV"):
        trunk_from_config({"class_name": type(family.net).__name__, "transformer": {}})
    assert not calls


def test_control_of_vace() -> None:
    family = familynets.wan_vace()
    adapter, control = adapter_for(family.net), family.keywords["control_hidden_states"]
    names = [name for name, _ in adapter.blocks()]
    assert names == ["vace_blocks.0", "vace_blocks.1", "blocks.0", "blocks.1", "blocks.2"]  # in the order of execution
    for wrong in (control[:, :5], control.repeat(1, 1, 2, 1, 1), control[:, :, 0]):
        with pytest.raises(ValueError, match=r"'control_hidden_states': expected .2, 6, F, H, W. with no"):
            adapter.validate(family.latents, {**family.keywords, "control_hidden_states": wrong}, prepared=False)
    scaled = {**family.keywords, "control_hidden_states_scale": torch.ones(3)}
    with pytest.raises(ValueError, match=r"'control_hidden_states_scale': expected \[2\], one for each layer"):
        adapter.validate(family.latents, scaled, prepared=False)


def test_audio_of_ltx2() -> None:
    family = familynets.ltx2()
    adapter = adapter_for(family.net)
    for changed, match in (
        ({"audio_hidden_states": family.latents}, "'audio_hidden_states' are the last tokens of the latents"),
        ({"audio_num_frames": 4}, r"latents: expected .* = 2 x 1 x 3 \+ 4 tokens in .B, S \+ A, C., got .2, 9, 4."),
        ({"audio_num_frames": None}, "LTX-2 needs 'num_frames', 'height', 'width', 'audio_num_frames'"),
        ({"height": 1.0}, "whole numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            adapter.validate(family.latents, {**family.keywords, **changed}, prepared=False)
    # A timestep per video token leaves the audio's at the chain's own.
    t, tokens = torch.tensor(700.0), torch.rand(2, 6) * 1000
    got = adapter(family.latents, t, family.keywords, {"timestep": tokens})
    both = {"sigma": t.expand(2), "timestep": tokens, "audio_timestep": t.expand(2)}
    video, audio = family.net(
        hidden_states=family.latents[:, :6], audio_hidden_states=family.latents[:, 6:], return_dict=False,
        **both, **family.keywords,
    )  # fmt: skip
    assert torch.equal(got, torch.cat([video, audio], dim=1))
    family.net.register_to_config(audio_in_channels=3)
    with pytest.raises(ValueError, match="4 channels of video and 3 of audio can't .* callable"):
        adapter.validate(family.latents, family.keywords, prepared=False)


def test_later_generations_of_cosmos_need_their_timesteps() -> None:
    family = familynets.cosmos()
    family.net.register_to_config(extra_pos_embed_type=None)
    adapter = adapter_for(family.net)
    with pytest.raises(ValueError, match="^prepare_input: this Cosmos takes noise levels as timesteps"):
        adapter.validate(family.latents, family.keywords, prepared=False)
    adapter.validate(family.latents, family.keywords, prepared=True)
    # Text with an image's tokens comes as a pair.
    pair = (family.keywords["encoder_hidden_states"], None)
    adapter.validate(family.latents, {**family.keywords, "encoder_hidden_states": pair}, prepared=True)


def test_an_override_is_not_converted() -> None:
    family = familynets.flux()
    adapter, t = adapter_for(family.net), torch.tensor(700.0)
    plain = family.call(family.net, family.latents, t, family.keywords)
    assert torch.equal(adapter(family.latents, t, family.keywords, None), plain)
    overridden = adapter(family.latents, t, family.keywords, {"timestep": t.expand(2) / 1000})
    assert torch.equal(overridden, plain)


def test_speed_of_skyreels() -> None:
    family = familynets.skyreels()
    adapter = adapter_for(family.net)
    latents = torch.randn(2, 4, 2, 4, 6)
    assert family.net.config.inject_sample_info
    family.net.register_to_config(in_channels=4)
    words = {key: value for key, value in family.keywords.items() if key != "fps"}
    with pytest.raises(ValueError, match="SkyReelsV2Transformer3DModel needs 'fps'"):
        adapter.validate(latents, words, prepared=False)
