"""The doctor's gradient check: every family's twin passes, and a wrong gradient does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from prfl_fast import exactness, twin

WAN, HUNYUAN = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"
LTX, COGVIDEOX = "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"

# The switches that published checkpoints of each family have set.
CONFIGS: dict[str, dict[str, Any]] = {
    "wan": {"_class_name": WAN, "num_attention_heads": 40, "num_layers": 40},
    "wan-image": {
        "_class_name": WAN, "in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120,
    },
    "wan-first-last": {
        "_class_name": WAN, "in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120,
        "pos_embed_seq_len": 514,
    },
    "hunyuan": {"_class_name": HUNYUAN, "guidance_embeds": True},
    "hunyuan-image": {
        "_class_name": HUNYUAN, "guidance_embeds": False, "in_channels": 33, "image_condition_type": "latent_concat",
    },
    "ltx": {"_class_name": LTX, "num_layers": 28},
    "cogvideox-2b": {"_class_name": COGVIDEOX},
    "cogvideox-5b": {"_class_name": COGVIDEOX, "use_rotary_positional_embeddings": True},
    "cogvideox-1.5-image": {
        "_class_name": COGVIDEOX, "use_rotary_positional_embeddings": True, "in_channels": 32, "patch_size_t": 2,
        "ofs_embed_dim": 512, "patch_bias": False,
    },
}  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_exact(name: str, tmp_path: Path) -> None:
    check = exactness.check_gradients(write(tmp_path, CONFIGS[name]))
    assert check.passed, check.render()
    groups = {c.group for c in check.comparisons}
    assert {"latents", "text embeddings", "weights"} <= groups
    # The bound must separate: a dropped guidance branch or step changes a gradient by far more than a thousandth.
    assert max(c.bound for c in check.comparisons) < 1e-3


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = exactness.unrolled_sample

    def forgets_the_first_step(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs, gradient="last:3")

    monkeypatch.setattr(exactness, "unrolled_sample", forgets_the_first_step)
    check = exactness.check_gradients()
    assert not check.passed
    assert "NOT EXACT" in check.render()


def test_not_a_number_does_not_pass() -> None:
    check = exactness.GradientCheck("Net", "Scheduler", 1, [exactness.Comparison("f", "g", float("nan"), 1.0)])
    assert not check.passed


def test_a_pipeline_folder_brings_its_scheduler(tmp_path: Path) -> None:
    write(tmp_path / "transformer", CONFIGS["wan"])
    (tmp_path / "scheduler").mkdir()
    settings = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    for place in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / "config.json"):
        _, scheduler = twin.read_config(place)
        assert scheduler == settings
    check = exactness.check_gradients(tmp_path)
    assert check.passed, check.render()
    assert check.scheduler == "FlowMatchEulerDiscreteScheduler"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no config.json at"):
        twin.read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        twin.read_config(tmp_path)
    write(tmp_path, {"_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match="UNet2DConditionModel.*WanTransformer3DModel"):
        twin.read_config(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_twins_are_small_and_keep_the_configs_switches(name: str) -> None:
    config = CONFIGS[name]
    made = twin.make_twin(config, *[twin.read_config(None)[1]], num_inference_steps=2)
    assert sum(p.numel() for p in made.net.parameters()) < 200_000
    for key in ("in_channels", "image_condition_type", "guidance_embeds", "patch_size_t"):
        if key in config:
            assert made.net.config[key] == config[key]
    assert {p.dtype for p in made.net.parameters()} == {torch.float64}
