"""The published layout: a ``.list`` of meta files and ``.npy`` arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prfl_fast import cli
from prfl_fast.training.data import BadDataWarning, LatentDataset, LatentLoader, PublishedOptions
from prfl_fast.training.data.validate import validate

REAL = Path(__file__).parents[3] / "shared" / "data"
COUNT = 6
LABELS = [("good", 1), (1, "poor"), (0, 0), (1.0, 1), ("good", "good"), (1, 0)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six clips of which the last is upright; absolute and relative paths; the last line without an end."""
    draw = np.random.default_rng(0)
    (tmp_path / "latents").mkdir()
    metas = []
    for number in range(COUNT):
        size = (3, 2) if number == 5 else (2, 3)
        arrays = {
            "vae_latent_path": draw.standard_normal((1, 16, 2, *size), np.float32),
            "f1_black_path": draw.standard_normal((1, 20, 2, *size), np.float32),
            "imgclip_path": draw.standard_normal((1, 4, 6), np.float32),
            "textshort_path": draw.standard_normal((1, 2 + number, 8), np.float32),
            "textlong_path": draw.standard_normal((1, 7 + number, 8), np.float32),
        }
        meta: dict[str, Any] = {"short_caption": f"short {number}", "long_caption": f"long {number}"}
        for name, array in arrays.items():
            path = tmp_path / "latents" / f"{number}_{name}.npy"
            np.save(path, array)
            meta[name] = str(path) if number % 2 else str(path.relative_to(tmp_path))
        meta["physics_quality"], meta["human_quality"] = LABELS[number]
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(meta))
        metas.append(str(path) if number % 2 else path.name)
    (tmp_path / "clips.list").write_text("\n\n".join(metas))
    return tmp_path / "clips.list"


def change(data: Path, number: int, function: Callable[[Any], Any]) -> None:
    path = data.parent / f"{number}.json"
    meta = json.loads(path.read_text())
    function(meta)
    path.write_text(json.dumps(meta))


def array(data: Path, number: int, name: str) -> Path:
    return data.parent / "latents" / f"{number}_{name}.npy"


def test_arrays_captions_and_labels(data: Path) -> None:
    change(data, 4, lambda meta: meta.update(physics_quality=None))
    dataset = LatentDataset(data, published=PublishedOptions(text_length=16))
    assert len(dataset) == COUNT
    assert dataset.label_names == ("human_quality",)  # the others lack for one clip
    assert sorted(map(len, dataset.buckets.values())) == [1, 5]
    for number in range(COUNT):
        sample = dataset[number]
        text = np.load(array(data, number, "textshort_path"))
        states = sample.content.conditioning["encoder_hidden_states"]
        assert states.shape == (1, 16, 8)
        assert torch.equal(states[:, : 2 + number], torch.from_numpy(text))
        assert not states[:, 2 + number :].any()
        assert torch.equal(sample.content.latents, torch.from_numpy(np.load(array(data, number, "vae_latent_path"))))
        assert sample.prompt == f"short {number}"
        assert sample.content.condition is None
    change(data, 4, lambda meta: meta.update(physics_quality="good"))
    dataset = LatentDataset(data, published=PublishedOptions(text_length=16, caption="long"))
    assert dataset[3].prompt == "long 3"
    assert dataset[3].content.conditioning["encoder_hidden_states"][0, 9].any()
    # Motion is good where physics and people are.
    assert [item.labels["motion_quality"] for item in dataset.items] == [1, 0, 0, 1, 1, 0]


def test_image_to_video(data: Path) -> None:
    dataset = LatentDataset(data, published=PublishedOptions(image=True))
    batch = next(b for b in LatentLoader(dataset, 5).forever() if len(b) == 5)
    assert batch.condition is not None
    assert batch.condition.shape == (5, 20, 2, 2, 3)
    first = batch.indices[0]
    assert torch.equal(batch.condition[:1], torch.from_numpy(np.load(array(data, first, "f1_black_path"))))
    states = batch.conditioning["encoder_hidden_states_image"]
    assert torch.equal(states[:1], torch.from_numpy(np.load(array(data, first, "imgclip_path"))))
    assert batch.conditioning["encoder_hidden_states"].shape == (5, 512, 8)


def found(data: Path, **options: Any) -> set[tuple[str, str]]:
    root = data.parent
    report = validate(data, progress=False, **options)
    return {(f.kind, Path(f.entry).name) for f in report.findings if Path(f.file).is_relative_to(root) or f.entry}


def test_a_list_that_is_whole(data: Path) -> None:
    report = validate(data, progress=False)
    assert (report.entries, report.findings) == (COUNT, [])
    assert report.shapes == {"1x16x2x2x3": 5, "1x16x2x3x2": 1}
    assert found(data, image=True, caption="long") == set()


def test_a_clip_that_lacks_a_label_that_others_have(data: Path) -> None:
    change(data, 4, lambda meta: meta.pop("physics_quality"))
    assert found(data) == {("missing", "4.json")}


def test_every_kind_of_damage(data: Path) -> None:
    latents = array(data, 0, "vae_latent_path")
    whole = latents.read_bytes()
    for content, kind in (
        (b"", "broken"),
        (whole[:-4], "broken"),
        (whole[:20], "broken"),
        (None, "missing"),
    ):
        latents.unlink()
        if content is not None:
            latents.write_bytes(content)
        assert found(data) == {(kind, "0.json")}
        latents.write_bytes(whole)
    for wrong, kind in (
        (np.full((1, 16, 2, 2, 3), np.nan, np.float32), "non-finite"),
        (np.zeros((16, 2, 2, 3), np.float32), "mis-shaped"),
        (np.zeros((2, 16, 2, 2, 3), np.float32), "mis-shaped"),
        (np.zeros((1, 16, 0, 2, 3), np.float32), "mis-shaped"),
        (np.zeros((1, 16, 2, 2, 3), np.int32), "broken"),
        (np.array([{"a": 1}], object), "broken"),  # a pickle: never loaded
    ):
        np.save(latents, wrong)
        assert found(data) == {(kind, "0.json")}
    latents.write_bytes(whole)
    np.save(array(data, 1, "textshort_path"), np.zeros((1, 513, 8), np.float32))
    np.save(array(data, 2, "f1_black_path"), np.zeros((1, 20, 3, 2, 3), np.float32))
    assert found(data) == {("mis-shaped", "1.json")}
    assert found(data, caption="long", image=True) == {("mis-shaped", "2.json")}


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda meta: meta.pop("vae_latent_path"), "missing"),
        (lambda meta: meta.pop("short_caption"), "missing"),
        (lambda meta: meta.update(textshort_path="../outside.npy"), "broken"),
        (lambda meta: meta.update(vae_latent_path="/etc/passwd"), "broken"),
        (lambda meta: meta.update(human_quality="fine"), "broken"),
        (lambda meta: meta.update(human_quality=True), "broken"),
    ],
)
def test_meta_files_that_are_refused(function: Callable[[Any], Any], kind: str, data: Path) -> None:
    change(data, 3, function)
    assert found(data) == {(kind, "3.json")}
    with pytest.raises(ValueError, match=r"3.json: .*prfl-fast validate lists"):
        LatentDataset(data)


def test_lists_that_are_refused(data: Path, tmp_path: Path) -> None:
    text = data.read_text()
    data.write_text(f"{text}\n0.json\nnowhere.json\n../outside.json\nlatents\n")
    assert found(data) == {
        ("broken", "0.json"), ("missing", "nowhere.json"), ("broken", "outside.json"), ("broken", "latents"),
    }  # fmt: skip
    (tmp_path / "empty.list").write_text("\n")
    assert len(validate(tmp_path / "empty.list", progress=False).findings) == 1
    data.write_text(text)
    moved = tmp_path / "lists" / "clips.list"
    moved.parent.mkdir()
    moved.write_text(text)
    assert len(validate(moved, progress=False).findings) == COUNT
    assert not validate(moved, root=tmp_path, progress=False).findings


def test_the_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", str(data), "--image", "--root", str(data.parent), "--caption", "long"]) == 0
    array(data, 0, "imgclip_path").unlink()
    assert cli.main(["validate", str(data)]) == 0
    capsys.readouterr()
    assert cli.main(["validate", str(data), "--image", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["findings"]
    assert (row["kind"], row["entry"], row["detail"]) == ("missing", "0.json", "no such file")


def test_a_file_that_turns_bad_mid_run(data: Path) -> None:
    loader = LatentLoader(LatentDataset(data), 5)
    stream = loader.forever()
    next(stream)
    np.save(array(data, 1, "vae_latent_path"), np.zeros((1, 16, 3, 2, 3), np.float32))
    with pytest.warns(BadDataWarning, match=r"1.json is left out from now on: .*expected \[1, 16, 2, 2, 3\]") as told:
        batches = [next(stream) for _ in range(4)]
    assert len(told) == 1
    assert all(1 not in batch.indices for batch in batches)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real arrays are not here")
@pytest.mark.parametrize(("name", "tokens"), [("null", 1), ("uncond", 126)])
def test_real_text_states(name: str, tokens: int, data: Path) -> None:
    change(data, 0, lambda meta: meta.update(textshort_path=str(REAL / f"{name}.npy")))
    options = PublishedOptions(root=Path("/"))
    change(data, 0, lambda meta: meta.update(vae_latent_path=str(array(data, 0, "vae_latent_path"))))
    (data.parent / "one.list").write_text(f"{data.parent / '0.json'}\n")
    states = LatentDataset(data.parent / "one.list", published=options)[0].content.conditioning["encoder_hidden_states"]
    assert states.shape == (1, 512, 4096)
    assert states[0, tokens - 1].any()
    assert not states[0, tokens:].any()
    assert torch.equal(states[:, :tokens], torch.from_numpy(np.load(REAL / f"{name}.npy")))
