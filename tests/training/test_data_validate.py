"""``prfl-fast validate``: each kind of damage is found, named once, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encodeddata import clip, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prfl_fast import cli
from prfl_fast.training.data import LatentDataset
from prfl_fast.training.data.tensors import reference
from prfl_fast.training.data.validate import describe, validate

COUNT = 7  # shards of four and of three clips


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", COUNT)


def found(path: Path, **options: Any) -> set[tuple[str, str, str]]:
    report = validate(path, progress=False, **options)
    return {(f.kind, f.entry, f.file) for f in report.findings}


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def change_line(folder: Path, number: int, change: Callable[[Any], None]) -> None:
    entries = lines(folder)
    change(entries[number])
    (folder / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def change_shard(folder: Path, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a shard again with other tensors."""
    path = folder / f"shard-{number:05d}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def test_nothing_is_wrong_with_what_was_written(folder: Path) -> None:
    report = validate(folder, progress=False)
    assert (report.entries, report.findings) == (COUNT, [])
    assert report.shapes == {"16x24x5": 5, "24x16x5": 2}
    assert "nothing is wrong" in describe(report)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "shard-00001.safetensors").unlink()
    expected = {("missing", f"{n}.mkv@0.000", "shard-00001.safetensors") for n in (4, 5, 6)}
    assert found(folder) == expected


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 0.5])
def test_a_shard_that_is_cut_short(keep: float, folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole) if keep == 0.5 else keep)])
    wrong = found(folder)
    assert {kind for kind, _, _ in wrong} == {"broken"}
    assert {file for _, _, file in wrong} == {"shard-00001.safetensors"}
    assert {entry for _, entry, _ in wrong} <= {f"{n}.mkv@0.000" for n in (4, 5, 6)}
    assert wrong
    details = {finding.detail for finding in validate(folder, progress=False).findings}
    expected = "bytes, expected" if keep == 0.5 else "cut short in its header"
    assert all(expected in detail for detail in details)


def test_a_bit_that_flipped(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    key = "latents/5.mkv@0.000"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    place = 8 + int.from_bytes(data[:8], "little") + header[key]["data_offsets"][0]
    data[place] ^= 1  # the last bit of a number: finite, and no other check can see it
    path.write_bytes(data)
    assert found(folder) == {("broken", "5.mkv@0.000", "shard-00001.safetensors")}


def set_infinite(tensors: dict[str, Any]) -> None:
    tensors["latents/1.mkv@0.000"][0, 0, 0, 0, 0] = torch.inf


def test_numbers_that_are_not_finite(folder: Path) -> None:
    change_shard(folder, 0, set_infinite)
    tensor = load_file(folder / "shard-00000.safetensors")["latents/1.mkv@0.000"]
    # As if it had been written so: the hash is right.
    sha = reference(tensor, "", "").sha256
    change_line(folder, 1, lambda entry: entry["latents"].update(sha256=sha))
    assert found(folder) == {("non-finite", "1.mkv@0.000", "shard-00000.safetensors")}
    (finding,) = validate(folder, progress=False).findings
    assert finding.detail == "latents/1.mkv@0.000: 1 of 48 elements are not finite"


def test_another_shape_or_dtype_and_a_key_that_is_gone(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["latents/0.mkv@0.000"] = tensors["latents/0.mkv@0.000"].flatten()
        tensors["latents/1.mkv@0.000"] = tensors["latents/1.mkv@0.000"].half()
        del tensors["latents/3.mkv@0.000"]

    change_shard(folder, 0, change)
    assert found(folder) == {
        ("mis-shaped", "0.mkv@0.000", "shard-00000.safetensors"),
        ("mis-shaped", "1.mkv@0.000", "shard-00000.safetensors"),
        ("missing", "3.mkv@0.000", "shard-00000.safetensors"),
    }


def test_text_that_several_clips_share(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        (key,) = (key for key, value in tensors.items() if torch.equal(value, text))
        tensors[key] = tensors[key] + 1

    text = clip(2)["conditioning"]["encoder_hidden_states"]
    change_shard(folder, 0, change)
    assert found(folder) == {("broken", f"{n}.mkv@0.000", "shard-00000.safetensors") for n in (2, 3)}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda e: e.update(bucket=[16, 16, 5]), "mis-shaped"),
        (lambda e: e.update(bucket=[24, 16, 5]), "mis-shaped"),
        (lambda e: e["labels"].pop("motion"), "missing"),
        (lambda e: e["conditioning"].pop("num_frames"), "missing"),
    ],
)
def test_an_entry_that_does_not_fit_the_rest(change: Callable[[Any], None], kind: str, folder: Path) -> None:
    change_line(folder, 4, change)
    assert {row[:2] for row in found(folder)} == {(kind, "4.mkv@0.000")}


def test_lines_of_the_index(folder: Path) -> None:
    text = (folder / "index.jsonl").read_text().splitlines(keepends=True)
    damaged = [*text[:2], "no json\n", text[3], text[3], b"\xff\n".decode("latin1"), *text[5:], text[4][:50]]
    (folder / "index.jsonl").write_bytes("".join(damaged).encode("latin1"))
    assert found(folder) == {
        ("broken", "line 3", "index.jsonl"),
        ("broken", "3.mkv@0.000", "index.jsonl"),
        ("broken", "line 6", "index.jsonl"),
        ("broken", "line 9", "index.jsonl"),
    }
    with pytest.raises(ValueError, match=r"line 3: not JSON.* and 3 more; prfl-fast validate"):
        LatentDataset(folder)


def test_files_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "dataset.json").write_text("{")
    assert found(folder) == {("broken", "", "dataset.json")}
    (folder / "dataset.json").write_text('{"pipeline": "WanPipeline"}')
    assert found(folder) == {("broken", "", "dataset.json")}
    (folder / "dataset.json").unlink()
    assert found(folder) == {("missing", "", "dataset.json")}
    (tmp_path / "empty").mkdir()
    assert ("missing", "", "index.jsonl") in found(tmp_path / "empty")
    write_folder(tmp_path / "none", 0)
    assert found(tmp_path / "none") == {("missing", "", "index.jsonl")}


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", str(folder)]) == 0
    assert f"{COUNT} entries in {folder}: 5 of 16x24x5, 2 of 24x16x5" in capsys.readouterr().out
    (folder / "shard-00000.safetensors").unlink()
    assert cli.main(["validate", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {row["entry"] for row in report["findings"]} == {f"{n}.mkv@0.000" for n in (0, 1, 2, 3)} | shared(folder)
    assert report["entries"] == COUNT
    assert cli.main(["validate", str(folder)]) == 1
    header, first, *_ = capsys.readouterr().out.splitlines()[1:]
    assert header.split() == ["kind", "entry", "file", "what"]
    assert first.split(maxsplit=3) == ["missing", "0.mkv@0.000", "shard-00000.safetensors", "no such file"]
    assert cli.main(["validate", str(folder / "nowhere")]) == 2
    assert "path: expected a folder of prfl-fast encode or a .list file" in capsys.readouterr().err
    assert cli.main(["validate", str(folder), "--caption", "long"]) == 2
    assert "published: expected None for a folder" in capsys.readouterr().err


def shared(folder: Path) -> set[str]:
    """Clips of the second shard whose text or tables lie in the first."""
    return {entry["id"] for entry in lines(folder)[4:] if "shard-00000" in json.dumps(entry["conditioning"])}
