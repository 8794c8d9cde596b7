"""``prfl-fast encode``: videos and their labels to shards of latents and text states."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prfl_fast.training.data.atomic import write_json
from prfl_fast.training.data.buckets import Bucket, best_shape, check_buckets, parse_bucket
from prfl_fast.training.data.conditioning import encode_prompt
from prfl_fast.training.data.entry import Source
from prfl_fast.training.data.findings import BadEntryError
from prfl_fast.training.data.frames import ENDINGS, UnreadableVideoError, probe, read_frames
from prfl_fast.training.data.index import LEFT_OUT, SETTINGS, read_settings
from prfl_fast.training.data.labels import Row, read_labels
from prfl_fast.training.data.latents import encode_frames, family_of
from prfl_fast.training.data.pipeline import default_fps, load_pipeline
from prfl_fast.training.data.tensors import check_finite
from prfl_fast.training.data.writer import ShardWriter

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EncodeSettings:
    """What ``prfl-fast encode`` is asked for.

    Attributes:
        videos: a folder, searched below too, or one file.
        labels: a CSV file, see :func:`prfl_fast.training.data.labels.read_labels`.
        model: folder or hub id of a Wan, HunyuanVideo, LTX or CogVideoX text-to-video pipeline.
        output: where shards and index go; a run goes on with what is there.
        buckets: HEIGHTxWIDTHxFRAMES each; none: the pipeline's default size and the same upright.
        fps: frames a second of the clips; None: what the model was trained at.
        clips: at most so many clips of each row, one after the other.
        clips_per_shard: an interrupted run encodes at most so many clips again.
        dtype: of text encoder and text states. vae_dtype: of VAE and latents.
        device: "auto" is the GPU if there is one.
        vae_tiling: encode in tiles, for less memory and slightly other latents.
        pipeline_options: further arguments of the pipeline's call, such as ``max_sequence_length``.
    """

    videos: str
    labels: str
    model: str
    output: str
    buckets: Sequence[str] = ()
    fps: float | None = None
    clips: int = 1
    clips_per_shard: int = 64
    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    device: str = "auto"
    vae_tiling: bool = False
    pipeline_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class EncodeReport:
    """What a run did: clips of the whole folder, those of this run, and per video left out the reason."""

    folder: Path
    total: int = 0
    encoded: int = 0
    left_out: list[dict[str, Any]] = field(default_factory=list)


def describe(report: EncodeReport) -> str:
    """What a run did, as lines: the clips, then every video left out with its reason."""
    lines = [f"{report.encoded} clips encoded, {report.total} in {report.folder}"]
    if report.left_out:
        lines.append(f"{len(report.left_out)} left out (also in {report.folder / LEFT_OUT}):")
        lines += [f"  {row['video']} from {row['start']:g} s: {row['reason']}" for row in report.left_out]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    pipe: Any
    root: Path
    buckets: list[Bucket]
    fps: Fraction
    clips: int
    options: dict[str, Any]


def encode(settings: EncodeSettings, *, progress: bool = True) -> EncodeReport:
    """Encode what is not yet in ``settings.output``. The list of what was left out is written there too.

    Killed at any moment, the next run goes on; what it loses is the shard that was not complete. KeyboardInterrupt
    keeps every clip that was. Labels that were changed in the CSV are changed in the index.

    Raises:
        ValueError, OSError, ImportError, TypeError: an argument does not fit (before any work), or the disk fails.
    """
    root, rows = _inputs(settings)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(settings.model, _DTYPES[settings.dtype], _DTYPES[settings.vae_dtype], device)
    if settings.vae_tiling:
        pipe.vae.enable_tiling()
    buckets = [parse_bucket(text) for text in settings.buckets] or _default_buckets(pipe)
    check_buckets(pipe, buckets)
    fps = default_fps(pipe) if settings.fps is None else settings.fps
    folder = Path(settings.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder, settings, pipe, buckets, fps)
    job = _Job(pipe, root, buckets, Fraction(str(fps)), settings.clips, settings.pipeline_options)
    report = EncodeReport(folder)
    _note_unlisted(root, rows, report)
    with ShardWriter(folder, settings.clips_per_shard) as writer:
        before = len(writer.entries)
        try:
            _encode_rows(job, rows, writer, report, progress)
        finally:
            write_json(folder / LEFT_OUT, report.left_out)
        writer.flush()
        report.total = len(writer.entries)
        report.encoded = report.total - before
    return report


def _inputs(settings: EncodeSettings) -> tuple[Path, list[Row]]:
    """Everything that can be checked before a model is loaded."""
    for name in ("dtype", "vae_dtype"):
        if getattr(settings, name) not in _DTYPES:
            raise ValueError(f"{name}: expected one of {', '.join(_DTYPES)}, got {getattr(settings, name)!r}")
    for name in ("clips", "clips_per_shard"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: expected a whole number from 1, got {getattr(settings, name)}")
    if settings.fps is not None and not 0 < settings.fps <= 1000:
        raise ValueError(f"fps: expected frames a second above 0 and up to 1000, got {settings.fps}")
    for text in settings.buckets:
        parse_bucket(text)
    root = Path(settings.videos).expanduser()
    if not root.exists():
        raise ValueError(f"videos: expected a folder or a file, got {root}, which is not there")
    output = Path(settings.output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder, got the file {output}")
    return root, read_labels(Path(settings.labels).expanduser())


def _default_buckets(pipe: Any) -> list[Bucket]:
    """The size that the pipeline's call has when none is given, lying and upright."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    height, width, frames = (parameters[name].default for name in ("height", "width", "num_frames"))
    if height is None:  # CogVideoX takes it from the config
        config, spatial = pipe.transformer.config, pipe.vae_scale_factor_spatial
        height, width, frames = config.sample_height * spatial, config.sample_width * spatial, config.sample_frames
    return list(dict.fromkeys([Bucket(height, width, frames), Bucket(width, height, frames)]))


def _settle(folder: Path, settings: EncodeSettings, pipe: Any, buckets: list[Bucket], fps: float) -> None:
    """``dataset.json``: written by the first run, equal to it in every later one."""
    now = {
        "format": 1,
        "model": settings.model,
        "pipeline": family_of(pipe),
        "vae": type(pipe.vae).__name__,
        "buckets": [str(bucket) for bucket in buckets],
        "fps": fps,
        "clips": settings.clips,
        "dtype": settings.dtype,
        "vae_dtype": settings.vae_dtype,
        "vae_tiling": settings.vae_tiling,
        "pipeline_options": settings.pipeline_options,
    }
    then = read_settings(folder)
    if then is None:
        if any(folder.glob("shard-*")):
            raise ValueError(f"output: {folder} holds shards but no {SETTINGS}; expected an empty folder")
        write_json(folder / SETTINGS, {**now, "diffusers": importlib.metadata.version("diffusers")})
        return
    for name, value in now.items():
        if then.get(name) != value:
            raise ValueError(
                f"output: {folder} was encoded with {name}={then.get(name)!r}, now it is {value!r}; expected the same, "
                "or another folder"
            )


def _note_unlisted(root: Path, rows: list[Row], report: EncodeReport) -> None:
    """Videos that no row names."""
    if root.is_dir():
        named = {(root / row.video).resolve() for row in rows}
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() in ENDINGS and path.resolve() not in named:
                _leave_out(report, str(path.relative_to(root)), 0.0, "no row in the labels names it")


def _leave_out(report: EncodeReport, video: str, start: float, reason: str) -> None:
    report.left_out.append({"video": video, "start": start, "reason": reason})


def _encode_rows(job: _Job, rows: list[Row], writer: ShardWriter, report: EncodeReport, progress: bool) -> None:
    relabelled: dict[str, dict[str, float]] = {}
    prompts: dict[tuple[str, Bucket], dict[str, Any]] = {}
    with tqdm(total=len(rows), unit="video", disable=not progress, dynamic_ncols=True) as bar:
        frames = clips = 0
        for row in rows:
            try:
                for id, source, bucket, pixels in _clips(job, row, writer, relabelled):
                    latents = encode_frames(job.pipe, pixels)
                    check_finite(latents, row.video, "latents")
                    if (row.prompt, bucket) not in prompts:
                        # One prompt's clips stand one after the other; more than the last is not worth its memory.
                        text = encode_prompt(job.pipe, row.prompt, bucket, float(job.fps), job.options)
                        prompts = {(row.prompt, bucket): text}
                    conditioning = prompts[row.prompt, bucket]
                    _check_conditioning(conditioning, row.video)
                    writer.add(
                        id,
                        prompt=row.prompt,
                        labels=row.labels,
                        bucket=(bucket.height, bucket.width, bucket.frames),
                        source=source,
                        latents=latents,
                        conditioning=conditioning,
                    )
                    frames, clips = frames + bucket.frames, clips + 1
                    seconds = max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(
                        f"{clips} clips, {frames / seconds:.1f} frames/s, {len(report.left_out)} left out"
                    )
            except UnreadableVideoError as error:
                _leave_out(report, row.video, row.start, str(error))
            except BadEntryError as error:
                _leave_out(report, row.video, row.start, f"the model gives {error.detail}")
            bar.update()
    writer.relabel(relabelled)


def _check_conditioning(conditioning: dict[str, Any], video: str) -> None:
    for name, value in conditioning.items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Tensor):
                check_finite(part, video, name)


def _clips(
    job: _Job, row: Row, writer: ShardWriter, relabelled: dict[str, dict[str, float]]
) -> Iterator[tuple[str, Source, Bucket, Tensor]]:
    """Clips of a row that are not encoded yet. Raises UnreadableVideoError for what can't be used."""
    if row.problem is not None:
        raise UnreadableVideoError(row.problem)
    path = _path(job.root, row.video)
    size = path.stat().st_size
    looked = None
    bucket: Bucket | None = None
    for number in range(job.clips):
        start = Fraction(str(row.start)) + number * (Fraction(bucket.frames) / job.fps if bucket else 0)
        id = f"{row.video}@{float(start):.3f}"
        known = writer.find(id)
        if known is not None:
            if known.prompt != row.prompt or known.source.bytes != size:
                what = "prompt" if known.prompt != row.prompt else "video"
                raise UnreadableVideoError(f"its {what} changed since it was encoded; encode it into another folder")
            if known.labels != row.labels:
                relabelled[id] = row.labels
            bucket = Bucket(*known.bucket)
            continue
        looked = looked or probe(path)
        stop = None if row.stop is None else Fraction(str(row.stop))
        count = looked.count(start, stop, job.fps)
        if bucket is None:
            shapes = best_shape(job.buckets, looked.height, looked.width)
            bucket = next((b for b in shapes if b.frames <= count), None)
            if bucket is None:
                raise UnreadableVideoError(
                    f"too short: {count} frames at {float(job.fps):g} a second, expected {shapes[-1].frames}"
                )
        elif count < bucket.frames:
            return
        end = float(start + Fraction(bucket.frames) / job.fps)
        source = Source(row.video, float(start), end, float(job.fps), size)
        yield id, source, bucket, read_frames(path, start, job.fps, bucket)


def _path(root: Path, video: str) -> Path:
    folder = root if root.is_dir() else root.parent
    path = (folder / video).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UnreadableVideoError("lies outside the folder of videos")
    if not path.is_file() or (root.is_file() and path != root.resolve()):
        raise UnreadableVideoError("no such file")
    return path
