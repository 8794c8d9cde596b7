"""PRFL's published files: written here with their names in a tiny size, read, and used; their counts on meta."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import rewardnets
import torch
from accelerate import init_empty_weights
from rewardnets import HEADS, assert_same_model, twin, wake
from safetensors.torch import save_file
from torch import Tensor

from prfl_fast import LatentRewardModel
from prfl_fast.models import trunk_from_config
from prfl_fast.reward import published
from prfl_fast.twin import Twin, make_twin

pytest.importorskip("diffusers")

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}


def original_names(depth: int, image: bool) -> list[str]:
    """Every tensor of the published backbone, from its description rather than from the table under test."""
    names = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    names += ["time_projection.1"] + ([f"img_emb.proj.{i}" for i in (0, 1, 3, 4)] if image else [])
    result = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    for index in range(depth):
        block = f"blocks.{index}"
        for attention in ("self_attn", "cross_attn"):
            linears = ["q", "k", "v", "o"] + (["k_img", "v_img"] if image and attention == "cross_attn" else [])
            norms = ["norm_q", "norm_k"] + (["norm_k_img"] if image and attention == "cross_attn" else [])
            result += [f"{block}.{attention}.{linear}.{kind}" for linear in linears for kind in ("weight", "bias")]
            result += [f"{block}.{attention}.{norm}.weight" for norm in norms]
        result += [f"{block}.{part}.{kind}" for part in ("norm3", "ffn.0", "ffn.2") for kind in ("weight", "bias")]
        result.append(f"{block}.modulation")
    return result


def image_twin() -> Twin:
    config = rewardnets.WAN | {"in_channels": 36, "out_channels": 16, "image_dim": 1, "added_kv_proj_dim": 1}
    return make_twin(config, {"_class_name": "FlowMatchEulerDiscreteScheduler"})


def as_published(model: LatentRewardModel, image: bool) -> dict[str, Tensor]:
    """The trunk's tensors under the original names, told apart by diffusers' own converter, not by our table."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = original_names(model.num_blocks, image)
    tags = {name: torch.tensor(float(index)) for index, name in enumerate(names)}
    converted = convert_wan_transformer_to_diffusers(dict(tags))
    state = model.trunk.state_dict()
    assert set(state) == {f"body.{name}" for name in converted}
    return {names[int(tag)]: state[f"body.{name}"] for name, tag in converted.items()}


def write(folder: Path, model: LatentRewardModel, image: bool = False, files: int = 2) -> dict[str, Any]:
    tensors = as_published(model, image)
    (folder / "backbone").mkdir()
    for index in range(files):
        part = {name: tensor.contiguous() for name, tensor in list(tensors.items())[index::files]}
        suffix = "" if files == 1 else f"-{index + 1:05d}-of-{files:05d}"
        save_file(part, folder / "backbone" / f"diffusion_pytorch_model{suffix}.safetensors")
    torch.save(model.query_attention.state_dict(), folder / "query_attention_step_500.ckpt")
    torch.save(model.mlp.state_dict(), folder / "mlp_step_500.ckpt")
    return {
        "backbone": folder / "backbone",
        "query_attention": folder / "query_attention_step_500.ckpt",
        "mlp": folder / "mlp_step_500.ckpt",
        "allow_pickle": True,
        "num_heads": HEADS,
        "attention_head_dim": 12,
    }


def make(image: bool = False, depth: int = 2) -> tuple[Twin, LatentRewardModel]:
    source = image_twin() if image else twin()
    return source, wake(LatentRewardModel.from_transformer(source.net, depth, HEADS))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_published_files_load(depth: int, image: bool, files: int, tmp_path: Path) -> None:
    source, model = make(image, depth)
    arguments = write(tmp_path, model, image, files)
    loaded = LatentRewardModel.from_published(**arguments)
    assert loaded.num_blocks == depth  # read from the keys
    x = source.latents
    if image:
        x = torch.cat([x, torch.randn(x.shape[0], 20, *x.shape[2:], dtype=x.dtype)], dim=1)
    # A published model was not cast: its tables are as the class makes them.
    model.trunk.body.rope = loaded.trunk.body.rope
    arguments = {"latents": x, "timestep": torch.tensor(500), **source.conditioning}
    assert_same_model(model, loaded, **arguments)
    loaded.save_pretrained(tmp_path / "converted")
    assert_same_model(model, LatentRewardModel.from_pretrained(tmp_path / "converted"), **arguments)


def test_every_name_of_the_table_is_diffusers_own() -> None:
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(original_names(3, True))}
    ours = published.renamed(tensors, Path("somewhere"))
    theirs = convert_wan_transformer_to_diffusers(dict(tensors))
    assert {name: float(tag) for name, tag in ours.items()} == {name: float(tag) for name, tag in theirs.items()}
    # First and last frame: the converter lacks this one; the class has it.
    (name,) = published.renamed({"img_emb.emb_pos": torch.zeros(1, 514, 1280)}, Path("somewhere"))
    with init_empty_weights():
        net = WanTransformer3DModel(num_layers=1, image_dim=1280, pos_embed_seq_len=514)
    assert net.get_parameter(name).shape == (1, 514, 1280)


@pytest.mark.parametrize(("image", "parameters"), [(False, 3_043_535_872), (True, 3_471_709_952)])
def test_published_counts(image: bool, parameters: int) -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 8}
    sizes |= {"ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256, "in_channels": 36 if image else 16}
    sizes |= {"image_dim": 1280, "added_kv_proj_dim": 5120} if image else {}
    with init_empty_weights(include_buffers=False):
        trunk = trunk_from_config({"class_name": "WanTransformer3DModel", "transformer": sizes})
    assert len(trunk.blocks()) == 8
    assert sum(parameter.numel() for parameter in trunk.parameters()) == parameters
    # Sizes are read back from names and shapes alone.
    shapes = {name.removeprefix("body."): parameter for name, parameter in trunk.named_parameters()}
    back = {ours: name for name, ours in zip(original_names(8, image), _ours(image), strict=True)}
    read = published.config_of({back[name]: tensor for name, tensor in shapes.items()}, 128, Path("somewhere"))
    described = trunk.config["transformer"]
    for key, value in read["transformer"].items():
        if key != "out_channels":
            assert described[key] == (list(value) if key == "patch_size" else value), key


def _ours(image: bool) -> list[str]:
    names = original_names(8, image)
    ours = published.renamed({name: torch.tensor(float(i)) for i, name in enumerate(names)}, Path("somewhere"))
    return sorted(ours, key=lambda name: float(ours[name]))


def test_pickles_need_permission(tmp_path: Path) -> None:
    _, model = make()
    arguments = write(tmp_path, model)
    with pytest.raises(ValueError, match="query_attention: .*query_attention_step_500.ckpt is a pickle.*allow_pickle"):
        LatentRewardModel.from_published(**arguments | {"allow_pickle": False})
    safe = {}
    for name in ("query_attention", "mlp"):
        safe[name] = tmp_path / f"{name}.safetensors"
        save_file(getattr(model, name).state_dict(), safe[name])
    LatentRewardModel.from_published(**arguments | safe | {"allow_pickle": False})


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    _, model = make()
    arguments = write(tmp_path, model)
    marker = tmp_path / "ran"
    torch.save({"fc1.weight": Malicious(marker)}, arguments["mlp"])
    with pytest.raises(ValueError, match="mlp: .*mlp_step_500.ckpt holds more than tensors"):
        LatentRewardModel.from_published(**arguments)
    assert not marker.exists()


def test_wrong_files_are_named(tmp_path: Path) -> None:
    _, model = make()
    arguments = write(tmp_path, model, files=1)

    def load(message: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            LatentRewardModel.from_published(**arguments | changes)

    load("backbone: no diffusion_pytorch_model", FileNotFoundError, backbone=tmp_path)
    load("mlp: no such file: .*gone.ckpt", FileNotFoundError, mlp=tmp_path / "gone.ckpt")
    load("attention_head_dim: expected a divisor of the width 24 .* got 7", attention_head_dim=7)
    load("mlp_step_500.ckpt: missing multihead_attn.*unexpected fc1", query_attention=arguments["mlp"])
    torch.save([1, 2], arguments["mlp"])
    load("mlp: .*mlp_step_500.ckpt: expected a dictionary of tensors, got list")
    arguments["mlp"].write_bytes(b"")
    load("mlp: .*mlp_step_500.ckpt holds more than tensors, or is damaged")
    torch.save(model.mlp.state_dict() | {"fc2.bias": torch.zeros(3)}, arguments["mlp"])
    load(r"mlp_step_500.ckpt: fc2.bias: shape \(3,\), expected \(512,\)")
    torch.save(model.mlp.state_dict(), arguments["mlp"])

    good = {name: tensor.contiguous() for name, tensor in as_published(model, False).items()}
    file = arguments["backbone"] / "diffusion_pytorch_model.safetensors"

    def write_backbone(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, file)

    write_backbone({name: tensor for name, tensor in good.items() if name != "blocks.1.modulation"})
    load("backbone: missing blocks.1.scale_shift_table")
    write_backbone({name: tensor for name, tensor in good.items() if name != "patch_embedding.weight"})
    load("missing patch_embedding.weight; expected the original Wan names")
    write_backbone(good | {"head.head.weight": torch.zeros(2)})
    load("unexpected head.head.weight")
    write_backbone({name.replace("blocks.1", "blocks.3"): tensor for name, tensor in good.items()})
    load(r"expected blocks numbered 0, 1, ..., got \[0, 3\]")
    write_backbone(good)
    save_file(
        {"time_embedding.0.bias": good["time_embedding.0.bias"]},
        file.with_name("diffusion_pytorch_model_2.safetensors"),
    )
    load("diffusion_pytorch_model_2.safetensors: time_embedding.0.bias is in another file")
