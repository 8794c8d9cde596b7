"""Videos to frames: which pictures, cut how; shapes; the labels' file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encodeddata import greys, write_video

from prfl_fast.training.data.buckets import Bucket, best_shape, check_buckets, parse_bucket
from prfl_fast.training.data.frames import UnreadableVideoError, _fitted, probe, read_frames
from prfl_fast.training.data.labels import read_labels

REAL = Path(__file__).parents[3] / "shared" / "data"


def nearest(rate: int, count: int, start: float, fps: float, frames: int) -> list[int]:
    """Numbers of the pictures nearest in time, the later of two that are as near."""
    times = np.arange(count) / rate
    wanted = start + np.arange(frames) / fps
    distance = np.abs(times[None] - wanted[:, None]).round(9)
    return [int(np.flatnonzero(row == row.min())[-1]) for row in distance]


# 1/8 and 1/10 s are whole milliseconds, the clock of the container; 1/24 and 1/30 s are not.
@pytest.mark.parametrize("rate", [8, 10, 24, 30])
@pytest.mark.parametrize(("start", "fps"), [(0.0, 8.0), (0.5, 8.0), (0.3, 12.5), (0.0, 24.0), (0.7, 4.0)])
def test_the_frames_nearest_in_time(rate: int, start: float, fps: float, tmp_path: Path) -> None:
    count = 40
    write_video(tmp_path / "a.mkv", greys(count, 16, 16), rate)
    begin, speed = Fraction(str(start)), Fraction(str(fps))
    looked = probe(tmp_path / "a.mkv")
    assert (looked.height, looked.width) == (16, 16)
    # All frames whose time lies in the video, the last picture's half a display time included.
    there = looked.count(begin, None, speed)
    assert there == int((count / rate - start - 0.5 / rate) * fps + 1e-6) + 1
    bucket = Bucket(16, 16, min(there, 17))
    frames = read_frames(tmp_path / "a.mkv", begin, speed, bucket)
    assert frames.shape == (bucket.frames, 16, 16, 3)
    assert frames.dtype == torch.uint8
    shown = ((frames[:, 8, 8, 0].int() - 5) / 5).round().int().tolist()
    expected = nearest(rate, count, start, fps, bucket.frames)
    # The container rounds times to milliseconds: a wanted time in the middle of two pictures may fall to either.
    times = [start + k / fps for k in range(bucket.frames)]
    assert all(s == e or abs((s + e) / 2 / rate - t) <= 0.001 for s, e, t in zip(shown, expected, times, strict=True))
    if rate in (8, 10) and fps == rate:
        assert shown == expected


def test_a_stop_ends_the_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", greys(16, 16, 16), 8)
    looked = probe(tmp_path / "a.mkv")
    counts = [looked.count(Fraction(0), Fraction(stop), Fraction(8)) for stop in ("1", "0.5", "9")]
    assert counts == [8, 4, 16]
    assert looked.count(Fraction(5), None, Fraction(8)) == 0


def test_a_picture_covers_the_bucket_and_is_cut_in_its_middle(tmp_path: Path) -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 255  # what a square cut leaves
    picture[:10, 20:60, 1:] = 0  # red on top
    write_video(tmp_path / "a.mkv", [picture] * 2, 8)
    (frame,) = read_frames(tmp_path / "a.mkv", Fraction(0), Fraction(8), Bucket(32, 32, 1))
    inner = frame[:, 2:-2].int()  # bicubic reaches two pixels over an edge
    assert inner[12:].min() >= 250
    assert inner[:4, :, 0].min() >= 250
    assert inner[:4, :, 1:].max() <= 5
    tall = read_frames(tmp_path / "a.mkv", Fraction(0), Fraction(8), Bucket(48, 16, 1))
    assert tall.shape == (1, 48, 16, 3)


@pytest.mark.parametrize(("rotation", "turns"), [(0, 0), (90, 1), (-90, 3), (180, 2), (-180, 2)])
def test_a_telephone_that_filmed_sideways(rotation: int, turns: int) -> None:
    import av

    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 200
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    turned = SimpleNamespace(width=64, height=32, rotation=rotation, reformat=frame.reformat)
    upright = np.rot90(picture, turns)  # counter-clockwise, as the display matrix tells
    height, width = upright.shape[:2]
    assert torch.equal(_fitted(turned, Bucket(height, width, 1)), torch.from_numpy(upright.copy()))


def test_videos_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "whole.mkv", greys(40), 8)
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "empty.mp4", "nowhere.mp4"):
        with pytest.raises(UnreadableVideoError, match="can't be read"):
            probe(tmp_path / name)
    with pytest.raises(UnreadableVideoError, match="can't be read|frames can be decoded"):
        probe(tmp_path / "cut.mkv")
        read_frames(tmp_path / "cut.mkv", Fraction(0), Fraction(8), Bucket(16, 16, 40))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(UnreadableVideoError, match="no video stream"):
        probe(tmp_path / "a.mkv")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clip is not here")
def test_a_real_clip() -> None:
    (path,) = REAL.glob("*.mp4")
    looked = probe(path)
    assert (looked.height, looked.width, looked.rate, looked.seconds) == (704, 1280, 16, Fraction(81, 16))
    assert looked.count(Fraction(0), None, Fraction(16)) == 81
    frames = read_frames(path, Fraction(0), Fraction(16), Bucket(48, 80, 81))
    assert frames.shape == (81, 48, 80, 3)
    assert (frames[1:] != frames[:-1]).flatten(1).any(1).all()  # every picture is another one
    half = read_frames(path, Fraction(1), Fraction(8), Bucket(48, 80, 9))
    assert torch.equal(half, frames[16:33:2])


def pipe(spatial: int = 8, temporal: int = 4, patch: Any = (1, 2, 2)) -> Any:
    transformer = SimpleNamespace(config=SimpleNamespace(patch_size=patch))
    return SimpleNamespace(
        transformer=transformer, vae_scale_factor_spatial=spatial, vae_scale_factor_temporal=temporal
    )


def test_buckets_that_fit_and_those_that_do_not() -> None:
    check_buckets(pipe(), [Bucket(480, 832, 81), Bucket(16, 16, 1)])
    check_buckets(pipe(patch=2), [Bucket(480, 832, 81)])
    ltx = SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=1)),
        vae_spatial_compression_ratio=32,
        vae_temporal_compression_ratio=8,
    )
    check_buckets(ltx, [Bucket(512, 704, 161)])
    for wrong, nearest in (("480x840x81", "480x832x81"), ("7x16x81", "16x16x81"), ("16x16x80", "16x16x81")):
        with pytest.raises(ValueError, match=f"buckets: {wrong}: expected .* the nearest is {nearest}"):
            check_buckets(pipe(), [parse_bucket(wrong)])
    with pytest.raises(ValueError, match="multiples of 32, and a multiple of 8 plus 1"):
        check_buckets(ltx, [Bucket(480, 848, 81)])
    for text in ("480x832", "480 x 832 x 81", "0x832x81", "-1x2x3", "wide"):
        with pytest.raises(ValueError, match="buckets: expected HEIGHTxWIDTHxFRAMES"):
            parse_bucket(text)
    with pytest.raises(ValueError, match="at least one"):
        check_buckets(pipe(), [])
    with pytest.raises(ValueError, match="each once"):
        check_buckets(pipe(), [Bucket(16, 16, 1), Bucket(16, 16, 1)])


def test_the_bucket_nearest_in_proportion_then_in_size() -> None:
    wide, long, tall, small = Bucket(480, 832, 81), Bucket(480, 832, 121), Bucket(832, 480, 81), Bucket(240, 416, 81)
    buckets = [small, wide, tall, long]
    assert best_shape(buckets, 720, 1280) == [long, wide]
    assert best_shape(buckets, 1920, 1080) == [tall]
    assert best_shape(buckets, 240, 420) == [small]


def labels(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_numbers_good_or_poor(tmp_path: Path) -> None:
    text = (
        '\ufeffvideo, prompt, motion,sharp,start,stop\na.mp4,"a heron, ""big""",good,0.5,,\nb/ü.mp4,x,Poor,-1,1.5,2\n'
    )
    first, second = read_labels(labels(tmp_path / "l.csv", text))
    assert (first.video, first.prompt, first.start, first.stop) == ("a.mp4", 'a heron, "big"', 0.0, None)
    assert first.labels == {"motion": 1.0, "sharp": 0.5}
    assert (second.video, second.start, second.stop, second.labels) == (
        "b/ü.mp4", 1.5, 2.0, {"motion": 0.0, "sharp": -1.0},
    )  # fmt: skip
    assert first.problem is second.problem is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a.mp4,x,,,", "missing label motion"),
        ("a.mp4,x", "missing label motion"),
        ("a.mp4,,1,,", "missing prompt"),
        (",x,1,,", "no video named"),
        ("a.mp4,x,fine,,", "label motion: expected a finite number, good or poor, got 'fine'"),
        ("a.mp4,x,nan,,", "label motion: expected a finite number"),
        ("a.mp4,x,1,-1,", "start: expected seconds from 0, got '-1'"),
        ("a.mp4,x,1,soon,", "start: expected seconds from 0, got 'soon'"),
        ("a.mp4,x,1,2,1.5", "stop: expected seconds after start, got '1.5'"),
        ("a.mp4,x,1,2,inf", "stop: expected seconds after start"),
    ],
)
def test_lines_that_cannot_be_used_say_why(line: str, problem: str, tmp_path: Path) -> None:
    (row,) = read_labels(labels(tmp_path / "l.csv", f"video,prompt,motion,start,stop\n{line}\n"))
    assert problem in (row.problem or "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a column video and prompt"),
        ("video,motion\na,1\n", "expected a column prompt, got video, motion"),
        ("video,prompt,a,a\n", "a name of its own"),
        ("video,prompt\n", "no line below its first"),
        ("video,prompt\na.mp4,a heron, big\n", r"line 2: more fields than columns \(quote the commas\)"),
        ("video,prompt\na.mp4,x\na.mp4,y\n", "line 3: a.mp4 from 0 s is twice"),
    ],
)
def test_files_of_labels_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        read_labels(labels(tmp_path / "l.csv", text))
