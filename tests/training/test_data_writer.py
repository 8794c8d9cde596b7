"""Shards and index: the bits come back, and a kill at any moment loses nothing that was complete."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encodeddata import clip, write_folder
from safetensors.torch import load_file

from prfl_fast.training.data import atomic
from prfl_fast.training.data.entry import Source, entry_from_line
from prfl_fast.training.data.findings import BadEntryError
from prfl_fast.training.data.index import read_index
from prfl_fast.training.data.items import EncodedItem
from prfl_fast.training.data.tensors import DTYPES, read_tensor, reference
from prfl_fast.training.data.writer import ShardWriter


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_every_tensor_label_and_text_comes_back(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 11)
    entries, findings = read_index(folder)
    assert not findings
    assert [entry.id for entry in entries] == [f"{number}.mkv@0.000" for number in range(11)]
    for number, entry in enumerate(entries):
        given, loaded = clip(number), EncodedItem(folder, entry).load()
        assert same(loaded.latents, given["latents"])
        assert loaded.conditioning.keys() == given["conditioning"].keys()
        assert all(same(value, given["conditioning"][name]) for name, value in loaded.conditioning.items())
        for name in ("prompt", "labels", "bucket", "source"):
            assert getattr(entry, name) == given[name]
    # The library of the format reads the same.
    shard = load_file(folder / entries[0].latents.shard)
    assert same(shard[entries[0].latents.key], clip(0)["latents"])


def test_what_clips_share_is_stored_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 9)
    keys = [key for shard in sorted(folder.glob("*.safetensors")) for key in load_file(shard)]
    assert len(keys) == len(set(keys))
    assert sum(key.startswith("latents/") for key in keys) == 9
    assert sum(key.startswith("encoder_hidden_states/") for key in keys) == 5  # prompts
    assert sum(key.startswith("image_rotary_emb/") for key in keys) == 2 * 2  # cosine and sine, two shapes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 3)], ids=str)
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    atomic.write_shard(tmp_path / "a.safetensors", {"x": tensor}, 1)
    assert same(read_tensor(tmp_path, reference(tensor, "a.safetensors", "x")), tensor)


def test_strided_latents_and_views_of_one_storage(tmp_path: Path) -> None:
    base = torch.randn(2, 3, 2, 2, 4, 1).transpose(1, 5)
    with ShardWriter(tmp_path, 4) as writer:
        for number, latents in enumerate((base[0], base[1])):
            text = {"a": base[0, 0], "b": base[0, 0, :, :1]}
            writer.add(**{**clip(number), "latents": latents, "conditioning": text})
    entries, _ = read_index(tmp_path)
    assert [same(EncodedItem(tmp_path, e).load().latents, base[i]) for i, e in enumerate(entries)] == [True, True]


class Killer:
    """Ends the process at its k-th write to the disk, or in the middle of it."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.tick()
            result = function(*arguments, **keywords)
            self.tick()
            return result

        return call

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def write_until_killed(folder: Path, moment: int) -> None:
    import safetensors.torch

    killer = Killer(moment)
    os.replace = killer.wrap(os.replace)
    os.fsync = killer.wrap(os.fsync)
    os.ftruncate = killer.wrap(os.ftruncate)
    save_file = safetensors.torch.save_file

    def half_a_shard(tensors: Any, path: Path, **keywords: Any) -> None:
        save_file(tensors, path, **keywords)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        killer.tick()
        path.write_bytes(whole)

    safetensors.torch.save_file = half_a_shard

    class Halving(ShardWriter):
        """Whose lines reach the disk in three parts: within a line, and between two."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            inner = self._index

            class Torn:
                def write(self, lines: bytes) -> int:
                    between = lines.find(b"\n") + 1
                    for part in (lines[: between // 2], lines[between // 2 : between], lines[between:]):
                        inner.write(part)
                        killer.tick()
                    return len(lines)

                def __getattr__(self, name: str) -> Any:
                    return getattr(inner, name)

            self._index = Torn()  # type: ignore[assignment]

    with Halving(folder, 3) as writer:
        for number in range(7):
            if writer.find(f"{number}.mkv@0.000") is None:
                writer.add(**clip(number))


def test_killed_at_every_moment_and_started_again_the_folder_is_that_of_an_unbroken_run(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_folder(whole, 7, clips_per_shard=3)
    (whole / "dataset.json").unlink()
    context = multiprocessing.get_context("fork")
    moment, kills = 1, 0
    while True:
        folder = tmp_path / str(moment)
        folder.mkdir()
        child = context.Process(target=write_until_killed, args=(folder, moment))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        complete = len(read_index(folder)[0])
        with ShardWriter(folder, 3) as writer:
            assert len(writer.entries) == complete // 3 * 3 or complete == 7
            assert not list(folder.glob("*.partial"))
            for number in range(7):
                if writer.find(f"{number}.mkv@0.000") is None:
                    writer.add(**clip(number))
        assert content(folder) == content(whole), moment
        moment += 1
    assert kills >= 3 * 10  # three shards, more than ten moments each


def test_an_interruption_keeps_what_is_complete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 3) as writer:
        for number in range(5):
            writer.add(**clip(number))
        raise KeyboardInterrupt
    assert len(read_index(tmp_path)[0]) == 5


@pytest.mark.parametrize("moment", range(1, 9))
def test_an_interruption_amid_a_flush(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = moment

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal left
            result = function(*arguments)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return result

        return call

    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 3) as writer:
        for name in ("replace", "fsync", "ftruncate"):
            monkeypatch.setattr(os, name, interrupted(getattr(os, name)))
        for number in range(8):
            writer.add(**clip(number))
    monkeypatch.undo()
    entries, findings = read_index(tmp_path)
    assert not findings
    assert [entry.id for entry in entries] == [f"{number}.mkv@0.000" for number in range(len(entries))]
    assert len(entries) == (3 if moment <= 5 else 6)  # five calls a shard; the shard in hand is finished


def test_writes_that_the_system_takes_in_parts(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / ".", 2) as writer:
        inner = writer._index

        class Short:
            def write(self, lines: bytes) -> int:
                return inner.write(lines[:100])

            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

        writer._index = Short()  # type: ignore[assignment]
        for number in range(4):
            writer.add(**clip(number))
    entries, findings = read_index(tmp_path)
    assert (len(entries), findings) == (4, [])


def test_a_full_disk_is_an_error_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path, 2) as writer:
        for number in range(3):
            writer.add(**clip(number))
        monkeypatch.setattr("safetensors.torch.save_file", full)
        writer.add(**clip(3))
    monkeypatch.undo()
    assert len(read_index(tmp_path)[0]) == 2
    write_folder(tmp_path, 4, clips_per_shard=2)
    assert len(read_index(tmp_path)[0]) == 4


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 3), pytest.raises(ValueError, match="output: another process is writing into"):
        ShardWriter(tmp_path, 3)
    with ShardWriter(tmp_path, 3):
        pass


def test_other_labels_change_the_index_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 5)
    before = content(folder)
    with ShardWriter(folder, 4) as writer:
        writer.relabel({"3.mkv@0.000": {"motion": 7.0, "sharp": 0.0}})
        with pytest.raises(ValueError, match="another process"):  # the lock goes over to the new file
            ShardWriter(folder, 4)
        writer.add(**clip(5))
    entries, findings = read_index(folder)
    assert not findings
    assert [entry.labels["motion"] for entry in entries] == [0.0, 1.0, 0.0, 7.0, 0.0, 1.0]
    after = content(folder)
    assert {name for name in before if before[name] != after[name]} == {"index.jsonl"}


def test_a_damaged_index_is_not_written_on(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 5)
    index = folder / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines[:1], "{}\n", *lines[2:]]))
    before = content(folder)
    with pytest.raises(ValueError, match=r"index.jsonl: line 2: lacks bucket.*prfl-fast validate"):
        ShardWriter(folder, 4)
    index.write_text("".join(lines))
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors: missing or damaged"):
        ShardWriter(folder, 4)
    assert before.keys() - content(folder).keys() == {"shard-00001.safetensors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("prompt"), "lacks prompt"),
        (lambda e: e.update(id=3), "id: expected text, got 3"),
        (lambda e: e.update(labels={"motion": "good"}), "labels: expected finite numbers"),
        (lambda e: e.update(labels={"motion": True}), "labels: expected finite numbers"),
        (lambda e: e.update(bucket=[16, 24]), "bucket: expected height, width and frames"),
        (lambda e: e["source"].pop("fps"), "source: expected"),
        (lambda e: e["latents"].update(shard="../a.safetensors"), "latents: expected the plain name"),
        (lambda e: e["latents"].update(shard="/a.safetensors"), "latents: expected the plain name"),
        (lambda e: e["latents"].update(shape=[1, -2]), "latents: expected a shape"),
        (lambda e: e["latents"].update(dtype="F8"), "latents: damaged key, dtype or sha256"),
        (lambda e: e["latents"].update(sha256="0"), "latents: damaged key, dtype or sha256"),
        (lambda e: e["conditioning"].update(num_frames="2"), "num_frames: expected tensors and finite numbers"),
        (lambda e: e["conditioning"]["image_rotary_emb"][0].update(shard="x/y.safetensors"), "plain name"),
    ],
)
def test_lines_that_are_refused(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    line = (write_folder(tmp_path / "data", 1) / "index.jsonl").read_text()
    entry_from_line(line)
    content = json.loads(line)
    change(content)
    with pytest.raises(BadEntryError, match=message):
        entry_from_line(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", "[" * 100_000], ids=lambda text: text[:5])
def test_lines_that_are_no_entry(text: str) -> None:
    with pytest.raises(BadEntryError):
        entry_from_line(text)


def test_numbers_of_a_source_are_kept(tmp_path: Path) -> None:
    given = {**clip(0), "source": Source("a/ü.mkv", 1 / 3, 2 / 3, 29.97, 2**40)}
    with ShardWriter(tmp_path, 1) as writer:
        writer.add(**given)
    assert read_index(tmp_path)[0][0].source == given["source"]
