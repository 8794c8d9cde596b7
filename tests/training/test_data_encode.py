"""``prfl-fast encode`` on tiny checkpoints in diffusers' layout: what comes out is what the pipeline starts from."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinypipes
import torch
from encodeddata import greys, write_labels, write_video

import prfl_fast
from prfl_fast import cli
from prfl_fast.pixels.families import FAMILIES
from prfl_fast.training.data import LatentDataset, LatentLoader
from prfl_fast.training.data import encode as encode_module
from prfl_fast.training.data.buckets import Bucket
from prfl_fast.training.data.encode import EncodeSettings, describe, encode
from prfl_fast.training.data.frames import read_frames
from prfl_fast.training.data.index import read_index
from prfl_fast.training.data.latents import encode_frames
from prfl_fast.training.data.pipeline import default_fps, load_pipeline
from prfl_fast.training.data.validate import validate

REAL = Path(__file__).parents[3] / "shared" / "data"
FAMILY_NAMES = ("wan", "hunyuan", "ltx", "cogvideox")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints of the four families, five videos of which the last is upright, labels."""
    root = tmp_path_factory.mktemp("world")
    videos = root / "videos"
    (videos / "more").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name in FAMILY_NAMES:
            pipe = getattr(tinypipes, name)(torch.float32)
            if name == "ltx":  # whose defaults would hide what is done with them
                pipe.vae.latents_mean.copy_(torch.randn(4))
                pipe.vae.latents_std.copy_(0.5 + torch.rand(4))
                pipe.vae.register_to_config(scaling_factor=0.7)
            pipe.save_pretrained(root / name)
    noise = torch.Generator().manual_seed(3)
    rows = []
    for number in range(5):
        height, width = (70, 44) if number == 4 else (44, 70)
        pictures = [
            torch.randint(0, 256, (height, width, 3), generator=noise).to(torch.uint8).numpy() for _ in range(12)
        ]
        name = f"more/{number}.mkv" if number == 3 else f"{number}.mkv"
        write_video(videos / name, pictures, 8)
        rows.append({"video": name, "prompt": tinypipes.PROMPT if number < 3 else "a cat jumps", "motion": number % 2})
    write_labels(root / "labels.csv", rows)
    yield root
    shutil.rmtree(root)


def bucket_of(name: str) -> Bucket:
    sizes = tinypipes.SIZES[name]
    return Bucket(sizes["height"], sizes["width"], sizes["num_frames"])


def settings(world: Path, name: str, output: Path, **changes: Any) -> EncodeSettings:
    bucket = bucket_of(name)
    options = {k: v for k, v in tinypipes.SIZES[name].items() if k in ("max_sequence_length", "prompt_template")}
    given: dict[str, Any] = {
        "videos": str(world / "videos"),
        "labels": str(world / "labels.csv"),
        "model": str(world / name),
        "output": str(output),
        "buckets": [str(bucket), f"{bucket.width}x{bucket.height}x{bucket.frames}"],
        "fps": 8.0,
        "dtype": "float32",
        "clips_per_shard": 2,
        "pipeline_options": options,
    }
    return EncodeSettings(**given | changes)


def run(*arguments: Any, **keywords: Any) -> Any:
    return encode(settings(*arguments, **keywords), progress=False)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_latents_and_conditioning_are_those_of_the_pipeline(name: str, world: Path, tmp_path: Path) -> None:
    import diffusers

    report = run(world, name, tmp_path / "data")
    assert (report.total, report.encoded, report.left_out) == (5, 5, [])
    assert not validate(tmp_path / "data", progress=False).findings

    pipe = diffusers.DiffusionPipeline.from_pretrained(world / name)
    bucket = bucket_of(name)
    dataset = LatentDataset(tmp_path / "data")
    assert dataset.label_names == ("motion",)
    assert sorted(map(len, dataset.buckets.values())) == [1, 4]
    sample = dataset[1]
    inputs = prfl_fast.pipeline_inputs(
        pipe,
        tinypipes.PROMPT,
        **tinypipes.SIZES[name],
        **({} if name == "hunyuan" else {"guidance_scale": 1.0}),
        **({"frame_rate": 8.0} if name == "ltx" else {}),
    )
    # As if the pipeline had drawn them: same shape and dtype.
    latents = sample.content.latents
    assert latents.shape == inputs["latents"].shape
    assert latents.dtype == inputs["latents"].dtype
    assert sample.content.conditioning.keys() == inputs["conditioning"].keys()
    for key, value in sample.content.conditioning.items():
        expected = inputs["conditioning"][key]
        pairs = zip(value, expected, strict=True) if isinstance(value, tuple) else [(value, expected)]
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs

    # Un-normalised as before decoding they are the VAE's mode of the pipeline's own pixels.
    frames = read_frames(world / "videos" / "1.mkv", 0, 8, bucket)  # type: ignore[arg-type]
    pixels = pipe.video_processor.preprocess_video(frames.numpy()[None].astype(np.float32) / 255.0)
    with torch.no_grad():
        mode = pipe.vae.encode(pixels).latent_dist.mode()
    family = FAMILIES[type(pipe.vae).__name__]
    if family.packed:
        shape = [inputs["conditioning"][key] for key in ("num_frames", "height", "width")]
        latents = latents.unflatten(1, shape).movedim(-1, 1)
    elif family.time_dim == 1:
        latents = latents.transpose(1, 2)
    back = family.unnormalise(pipe.vae, latents)
    # The mode is the same bits: the same call on the same pixels. Six roundings on the way there and back (mean, its
    # difference, std or factor, their product; the inverse product, the sum), of numbers no larger than this.
    largest = float(mode.abs().max()) + float(torch.as_tensor(mean(pipe.vae)).abs().max())
    assert float((back - mode).abs().max()) <= 6 * torch.finfo(torch.float32).eps * largest
    assert float(mode.std()) > 1e-3


def mean(vae: Any) -> Any:
    """What is subtracted from the mode; Wan and LTX have one, LTX as a buffer."""
    return (
        getattr(vae, "latents_mean", None)
        if "latents_mean" in dict(vae.named_buffers())
        else (vae.config.get("latents_mean") or [0.0])
    )


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_batch_goes_through_the_transformer(name: str, world: Path, tmp_path: Path) -> None:
    import diffusers

    run(world, name, tmp_path / "data")
    pipe = diffusers.DiffusionPipeline.from_pretrained(world / name)
    dataset = LatentDataset(tmp_path / "data")
    batch = next(b for b in LatentLoader(dataset, 4).forever() if len(b) == 4)
    assert [batch.prompts[i] for i in range(4)] == [dataset.items[n].prompt for n in batch.indices]
    timestep = torch.full((4,), 500)
    with torch.no_grad():
        whole = pipe.transformer(batch.latents, timestep=timestep, **batch.conditioning, return_dict=False)[0]
        for place, number in enumerate(batch.indices):
            content = dataset[number].content
            alone = pipe.transformer(content.latents, timestep=timestep[:1], **content.conditioning, return_dict=False)[
                0
            ]
            # Sums of up to 64 terms a layer, two layers of four products, may run in another order in a batch.
            bound = 64 * 2 * 4 * torch.finfo(torch.float32).eps * float(alone.abs().max())
            assert float((whole[place] - alone[0]).abs().max()) <= bound


def test_patches_over_time_are_filled_up_in_front(world: Path) -> None:
    pipe = tinypipes.cogvideox(torch.float32, version="1.5")
    for frames, latent_frames in ((5, 2), (9, 4), (1, 2)):
        pixels = torch.randint(0, 256, (frames, 32, 48, 3)).to(torch.uint8)
        latents = encode_frames(pipe, pixels)
        assert latents.shape[1] == latent_frames
        extra = latent_frames - ((frames - 1) // 4 + 1)
        assert all(torch.equal(latents[:, i], latents[:, extra]) for i in range(extra))
    assert default_fps(pipe) == 16.0


def test_no_weight_of_a_transformer_is_read(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "wan", model)
    for weights in (model / "transformer").glob("*.safetensors"):
        weights.write_bytes(b"")
    pipe = load_pipeline(str(model), torch.float32, torch.float32, "cpu")
    assert not isinstance(pipe.transformer, torch.nn.Module)
    assert tuple(pipe.transformer.config.patch_size) == (1, 2, 2)
    half = load_pipeline(str(model), torch.bfloat16, torch.float32, "cpu")
    assert (half.vae.dtype, half.text_encoder.dtype) == (torch.float32, torch.bfloat16)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encode_until_killed(given: EncodeSettings, clip: int) -> None:
    count = 0

    def counted(pipe: Any, frames: Any) -> Any:
        nonlocal count
        count += 1
        if count == clip:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_frames(pipe, frames)

    encode_module.encode_frames = counted
    encode(given, progress=False)


def test_killed_and_started_again(world: Path, tmp_path: Path) -> None:
    run(world, "wan", tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    for clip in (1, 2, 4, 5):
        folder = tmp_path / str(clip)
        child = context.Process(target=encode_until_killed, args=(settings(world, "wan", folder), clip))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        kept = len(read_index(folder)[0])
        assert kept == (clip - 1) // 2 * 2  # whole shards of two
        report = run(world, "wan", folder)
        assert (report.encoded, report.total) == (5 - kept, 5)
        assert content(folder) == content(tmp_path / "whole")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_130_and_the_same_command_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupted(pipe: Any, frames: Any) -> Any:
        calls.append(frames)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return encode_frames(pipe, frames)

    folder = tmp_path / "data"
    arguments = ["encode", str(world / "videos"), "--labels", str(world / "labels.csv"), "--model", str(world / "wan")]
    arguments += ["--output", str(folder), "--buckets", "32x48x5", "48x32x5", "--fps", "8", "--dtype", "float32"]
    arguments += ["--max-sequence-length", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "encode_frames", interrupted)
        assert cli.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(read_index(folder)[0]) == 3  # the clips that were complete, though their shard was not full
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"2 clips encoded, 5 in {folder}" in printed.out
    assert "frames/s" in printed.err
    assert "5/5" in printed.err
    assert not validate(folder, progress=False).findings
    assert cli.main(["validate", str(folder)]) == 0
    assert "5 entries" in capsys.readouterr().out


def test_what_is_left_out_is_told_with_its_reason(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    good = world / "videos" / "0.mkv"
    shutil.copy(good, videos / "good.mkv")
    shutil.copy(good, videos / "unnamed.mkv")
    shutil.copy(good, tmp_path / "outside.mkv")
    (videos / "text.mp4").write_text("not a video")
    whole = good.read_bytes()
    (videos / "cut.mkv").write_bytes(whole[: len(whole) // 3])
    write_video(videos / "short.mkv", greys(4), 8)
    names = ("good.mkv", "text.mp4", "cut.mkv", "short.mkv", "nowhere.mkv", "../outside.mkv")
    rows = [{"video": name, "prompt": "a cat", "motion": "good", "start": ""} for name in names]
    rows.append({"video": "good.mkv", "prompt": "a cat", "motion": "", "start": "0.5"})
    rows.append({"video": "good.mkv", "prompt": "a cat", "motion": "poor", "start": "1.25"})
    write_labels(tmp_path / "labels.csv", rows)
    changes = {"videos": str(videos), "labels": str(tmp_path / "labels.csv")}
    report = run(world, "wan", tmp_path / "data", **changes)
    assert (report.total, report.encoded) == (1, 1)
    expected = [
        ("unnamed.mkv", 0.0, "no row in the labels names it"),
        ("text.mp4", 0.0, "can't be read"),
        ("cut.mkv", 0.0, ""),
        ("short.mkv", 0.0, "too short: 4 frames at 8 a second, expected 5"),
        ("nowhere.mkv", 0.0, "no such file"),
        ("../outside.mkv", 0.0, "lies outside the folder of videos"),
        ("good.mkv", 0.5, "missing label motion"),
        ("good.mkv", 1.25, "too short: 2 frames at 8 a second, expected 5"),
    ]
    written = json.loads((tmp_path / "data" / "left_out.json").read_text())
    assert written == report.left_out
    assert [(row["video"], row["start"]) for row in written] == [row[:2] for row in expected]
    for row, (_, _, reason) in zip(written, expected, strict=True):
        assert reason in row["reason"]
        assert f"{row['video']} from {row['start']:g} s: {row['reason']}" in describe(report)
    # Mended and run again, the clip comes in and the list gets shorter.
    write_video(videos / "short.mkv", greys(5), 8)
    again = run(world, "wan", tmp_path / "data", **changes)
    assert (again.total, again.encoded, len(again.left_out)) == (2, 1, 7)


def test_clips_of_one_video_and_labels_that_change(world: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mkv", greys(18), 8)
    rows = [{"video": "a.mkv", "prompt": "a cat", "motion": 1, "start": 0, "stop": 2}]
    changes: dict[str, Any] = {"videos": str(videos), "labels": str(tmp_path / "l.csv"), "clips": 9}
    write_labels(tmp_path / "l.csv", rows)
    assert run(world, "wan", tmp_path / "data", **changes).total == 3  # 16 frames up to second 2
    entries, _ = read_index(tmp_path / "data")
    assert [entry.id for entry in entries] == ["a.mkv@0.000", "a.mkv@0.625", "a.mkv@1.250"]
    assert [(e.source.start, e.source.stop) for e in entries] == [(0.0, 0.625), (0.625, 1.25), (1.25, 1.875)]
    expected = read_frames(videos / "a.mkv", 0, 8, Bucket(32, 48, 15))[5:10]  # type: ignore[arg-type]
    pipe = load_pipeline(str(world / "wan"), torch.float32, torch.float32, "cpu")
    assert torch.equal(LatentDataset(tmp_path / "data")[1].content.latents, encode_frames(pipe, expected))

    before = content(tmp_path / "data")
    write_labels(tmp_path / "l.csv", [{**rows[0], "motion": 0}])
    assert run(world, "wan", tmp_path / "data", **changes).encoded == 0
    assert [entry.labels for entry in read_index(tmp_path / "data")[0]] == [{"motion": 0.0}] * 3
    assert {name for name, data in content(tmp_path / "data").items() if before[name] != data} == {"index.jsonl"}

    write_labels(tmp_path / "l.csv", [{**rows[0], "prompt": "a heron"}])
    (row,) = run(world, "wan", tmp_path / "data", **changes).left_out
    assert "its prompt changed since it was encoded" in row["reason"]
    write_labels(tmp_path / "l.csv", rows)
    write_video(videos / "a.mkv", greys(19), 8)
    (row,) = run(world, "wan", tmp_path / "data", **changes).left_out
    assert "its video changed since it was encoded" in row["reason"]


def test_a_model_that_gives_no_finite_latents(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "encode_frames", lambda pipe, frames: torch.full((1, 16, 2, 4, 6), torch.nan))
    report = run(world, "wan", tmp_path / "data")
    assert report.total == 0
    assert {row["reason"] for row in report.left_out} == {"the model gives latents: 768 of 768 elements are not finite"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": "/no/such"}, "videos: expected a folder or a file"),
        ({"buckets": ["32x40x5"]}, "buckets: 32x40x5: expected .* multiples of 16"),
        ({"buckets": ["wide"]}, "buckets: expected HEIGHTxWIDTHxFRAMES"),
        ({"fps": 0.0}, "fps: expected frames a second above 0"),
        ({"clips": 0}, "clips: expected a whole number from 1"),
        ({"clips_per_shard": 0}, "clips_per_shard: expected a whole number from 1"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
    ],
)
def test_arguments_that_are_refused(changes: dict[str, Any], message: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(world, "wan", tmp_path / "data", **changes)
    assert not (tmp_path / "data").exists()


def test_a_folder_of_other_settings_is_not_written_into(world: Path, tmp_path: Path) -> None:
    run(world, "wan", tmp_path / "data")
    before = content(tmp_path / "data")
    with pytest.raises(ValueError, match=r"output: .* was encoded with fps=8.0, now it is 4.0"):
        run(world, "wan", tmp_path / "data", fps=4.0)
    (tmp_path / "data" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"holds shards but no dataset.json"):
        run(world, "wan", tmp_path / "data")
    assert before.keys() - content(tmp_path / "data").keys() == {"dataset.json"}
    with pytest.raises(ValueError, match="output: expected a folder, got the file"):
        run(world, "wan", world / "labels.csv")


def test_the_pipelines_own_size_is_the_default(world: Path) -> None:
    sizes = {}
    for name in FAMILY_NAMES:
        pipe = load_pipeline(str(world / name), torch.float32, torch.float32, "cpu")
        sizes[name] = [str(bucket) for bucket in encode_module._default_buckets(pipe)]
    assert sizes == {
        "wan": ["480x832x81", "832x480x81"],
        "hunyuan": ["720x1280x129", "1280x720x129"],
        "ltx": ["512x704x161", "704x512x161"],
        "cogvideox": ["32x48x5", "48x32x5"],
    }


def test_a_pipeline_of_another_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="model: .*expected a pipeline of WanPipeline.*got FluxPipeline"):
        load_pipeline(str(tmp_path), torch.float32, torch.float32, "cpu")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clip is not here")
def test_a_real_clip(world: Path, tmp_path: Path) -> None:
    (clip,) = REAL.glob("*.mp4")
    write_labels(tmp_path / "labels.csv", [{"video": clip.name, "prompt": "a cat", "motion": "good"}])
    changes = {"videos": str(clip), "labels": str(tmp_path / "labels.csv"), "fps": None, "buckets": ["32x48x81"]}
    report = run(world, "wan", tmp_path / "data", **changes)
    assert (report.total, report.left_out) == (1, [])
    sample = LatentDataset(tmp_path / "data")[0]
    assert sample.content.latents.shape == (1, 16, 21, 4, 6)
    assert sample.labels == {"motion": 1.0}
