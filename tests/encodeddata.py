"""Videos, labels and folders of encoded clips for the tests of the data room."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prfl_fast.training.data.atomic import write_json
from prfl_fast.training.data.entry import Source
from prfl_fast.training.data.writer import ShardWriter

BUCKETS = {(16, 24, 5): (1, 4, 2, 2, 3), (24, 16, 5): (1, 4, 2, 3, 2)}


def write_video(path: Path, pictures: Sequence[Any], rate: int) -> None:
    """Pictures uint8 [H, W, 3] without loss, a constant number a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def greys(count: int, height: int = 40, width: int = 60) -> list[Any]:
    """Picture i is plain grey of value 5 i + 5."""
    return [np.full((height, width, 3), 5 * i + 5, np.uint8) for i in range(count)]


def write_labels(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def clip(number: int) -> dict[str, Any]:
    """What ``ShardWriter.add`` takes: every third clip is upright, every two share a prompt."""
    bucket = (24, 16, 5) if number % 3 == 2 else (16, 24, 5)
    generator = torch.Generator().manual_seed(number)
    text = torch.Generator().manual_seed(1000 + number // 2)
    table = torch.arange(12.0).view(4, 3) * bucket[0]
    return {
        "id": f"{number}.mkv@0.000",
        "prompt": f"prompt {number // 2}",
        "labels": {"motion": float(number % 2), "sharp": number / 10},
        "bucket": bucket,
        "source": Source(f"{number}.mkv", 0.0, 0.625, 8.0, 100 + number),
        "latents": torch.randn(BUCKETS[bucket], generator=generator),
        "conditioning": {
            "encoder_hidden_states": torch.randn(1, 3, 8, generator=text).bfloat16(),
            "image_rotary_emb": (table.cos(), table.sin()),
            "num_frames": 2,
        },
    }


def write_folder(folder: Path, count: int, *, clips_per_shard: int = 4) -> Path:
    """A folder as ``prfl-fast encode`` leaves it."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "dataset.json", {"pipeline": "WanPipeline", "buckets": ["16x24x5", "24x16x5"]})
    with ShardWriter(folder, clips_per_shard) as writer:
        for number in range(count):
            content = clip(number)
            if writer.find(content["id"]) is None:
                writer.add(**content)
    return folder
