"""Finished stages: found again under the same settings, redone under others, never half written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prfl_fast.demo import stages as module
from prfl_fast.demo.stages import Stages


def test_a_stage_is_found_again_under_the_same_settings_only(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "deep" / "er", {"seed": 1, "seconds": 2.5})
    assert stages.load("reward") is None
    shared = torch.randn(3, 4)
    stages.save("reward", {"a": shared, "b": shared.T}, {"updates": [1, 2], "norm": float("nan")})
    found = Stages(tmp_path / "deep" / "er", {"seconds": 2.5, "seed": 1}).load("reward")
    assert found is not None
    tensors, notes = found
    assert torch.equal(tensors["a"], shared) and torch.equal(tensors["b"], shared.T)
    assert notes["updates"] == [1, 2] and notes["norm"] != notes["norm"]
    assert Stages(tmp_path / "deep" / "er", {"seed": 2, "seconds": 2.5}).load("reward") is None


def test_an_interrupted_write_is_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path, {})

    def interrupted(content: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.save("arm", {"a": torch.zeros(1)}, {})
    assert stages.load("arm") is None
