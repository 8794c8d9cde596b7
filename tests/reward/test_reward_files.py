"""Saving and loading: the same bits back, on every family, and errors that name the file and the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rewardnets
import torch
from rewardnets import HEADS, assert_same_model, twin, wake
from safetensors.torch import load_file, save_file
from torch import nn

from prfl_fast import LatentRewardModel

pytest.importorskip("diffusers")
T = torch.tensor(500)


@pytest.mark.parametrize("family", rewardnets.FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    source = twin(family)
    model = wake(LatentRewardModel.from_transformer(source.net, 1, HEADS))
    model.save_pretrained(tmp_path / "new" / "folder")
    again = LatentRewardModel.from_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert_same_model(model, again, latents=source.latents, timestep=T, **source.conditioning)
    again.save_pretrained(tmp_path / "twice")
    assert LatentRewardModel.from_pretrained(str(tmp_path / "twice")).num_blocks == 1


def test_dtypes_come_back(tmp_path: Path) -> None:
    source = twin(dtype=torch.float32)
    nn.Module.to(source.net, torch.bfloat16)
    model = LatentRewardModel.from_transformer(source.net, 1, HEADS)
    model.save_pretrained(tmp_path)
    again = LatentRewardModel.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16, torch.float32}
    assert_same_model(model, again, latents=source.latents, timestep=T, **source.conditioning)


def test_a_shared_trunk_is_not_saved(tmp_path: Path) -> None:
    source = twin()
    model = wake(LatentRewardModel.from_transformer(source.net, 2, HEADS, copy=False))
    model.save_pretrained(tmp_path)
    assert all(name.startswith(("query_attention.", "mlp.")) for name in load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="transformer: .* saved without its trunk: give the transformer"):
        LatentRewardModel.from_pretrained(tmp_path)
    again = LatentRewardModel.from_pretrained(tmp_path, transformer=source.net)
    assert again.shared and again.num_blocks == 2
    assert_same_model(model, again, latents=source.latents, timestep=T, **source.conditioning)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    source = twin()
    LatentRewardModel.from_transformer(source.net, 1, HEADS).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    with pytest.raises(ValueError, match="saved with its trunk: give no transformer"):
        LatentRewardModel.from_pretrained(tmp_path, transformer=source.net)
    with pytest.raises(FileNotFoundError, match="nowhere/config.json: no such file"):
        LatentRewardModel.from_pretrained(tmp_path / "nowhere")

    tensors = load_file(weights)
    tensors["mlp.fc9.weight"] = tensors.pop("mlp.fc3.weight")
    tensors["query_attention.queries"] = torch.zeros(2, 24)
    save_file(tensors, weights)
    message = (
        r"model.safetensors: missing mlp.fc3.weight; unexpected mlp.fc9.weight; "
        r"query_attention.queries: shape \(2, 24\), expected \(1, 24\)"
    )
    with pytest.raises(ValueError, match=message):
        LatentRewardModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file"):
        LatentRewardModel.from_pretrained(tmp_path)

    content = json.loads(config.read_text())
    for text, wrong in {
        "{": "config.json: not JSON",
        "[]": "config.json: expected the config of a LatentRewardModel",
        json.dumps(content | {"_class_name": "Other"}): "expected the config of a LatentRewardModel",
        json.dumps(content | {"depth": 3}): "config.json: missing or unexpected: depth",
    }.items():
        config.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            LatentRewardModel.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = twin()
    model = LatentRewardModel.from_transformer(source.net, 1, HEADS)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def broken(tensors: object, path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        wake(model).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
