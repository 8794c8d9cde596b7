"""What stands beside the figures, and files that are whole or not there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from prfl_fast.benchmarks import measure, record

CPU = torch.device("cpu")


def test_about_tells_machine_and_software() -> None:
    told = record.about(CPU)
    assert json.loads(json.dumps(told)) == told
    assert told["device"] == told["processor"] and told["threads"] == torch.get_num_threads()
    assert told["versions"]["torch"] == torch.__version__
    assert {"prfl_fast", "python", "cuda", "triton", "diffusers", "numpy"} <= told["versions"].keys()
    assert record.slug(CPU) == "cpu"


def test_the_card_in_a_file_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (SXM)")
    assert record.slug(torch.device("cuda")) == "nvidia_h200_sxm"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code(tmp_path: Path) -> None:
    file, other = tmp_path / "prfl_fast" / "code.py", tmp_path / "notes.txt"
    file.parent.mkdir()
    file.write_text("1\n")
    assert record.commit(file) is None  # no checkout
    git(tmp_path, "init", "-q")
    other.write_text("1\n")
    git(tmp_path, "add", "notes.txt")
    git(tmp_path, "commit", "-q", "-m", "notes")
    assert record.commit(file) is None  # somebody else's checkout, the package only lies in it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "code")
    head = git(tmp_path, "rev-parse", "HEAD")
    other.write_text("2\n")
    assert record.commit(file) == head
    file.write_text("2\n")
    assert record.commit(file) == head + "+"


@pytest.mark.parametrize(
    ("before", "now", "shared"), [(0.1, 1.2, False), (0.5, 1.0, True), (0.0, 2.0, True), (0.0, 0.3, False)]
)
def test_other_programs_are_told_and_this_one_is_not(
    before: float, now: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "load_now", lambda: now)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    told = record.load(before)
    assert (told["at_start"], told["now"], "note" in told) == (before, now, shared)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    record.write({"rows": [1]}, path)
    with pytest.raises(TypeError):
        record.write({"rows": [object()]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


def test_times_are_quantiles_of_the_runs() -> None:
    times = measure.Times.of([k * 1e-6 for k in range(1, 12)])  # 1 to 11 us
    assert (times.median_us, times.p20_us, times.p80_us, times.min_us, times.runs) == (6.0, 3.0, 9.0, 1.0, 11)


def test_work_runs_warm_and_often_enough() -> None:
    count = 0

    def work() -> None:
        nonlocal count
        count += 1

    times = measure.measure(work, CPU, 1e-9)
    assert times.runs == measure.LEAST_RUNS and count == measure.WARM_UPS + measure.LEAST_RUNS


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="stop"), measure.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError("stop")
    assert torch.get_num_threads() == before


class FakeEvent:
    """A clock of the device that runs one second per piece of work."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, stop: FakeEvent) -> float:
        return 1e3 * (stop.at - self.at)


class FakeBuffer:
    flushes = 0

    def zero_(self) -> None:
        FakeBuffer.flushes += 1


def test_a_run_on_a_gpu_counts_the_work_between_events_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: FakeBuffer())
    FakeBuffer.flushes = 0

    def zero_(self: FakeBuffer) -> None:
        FakeBuffer.flushes += 1
        FakeEvent.clock += 100.0  # time that must not be counted

    monkeypatch.setattr(FakeBuffer, "zero_", zero_)

    def work() -> None:
        FakeEvent.clock += 2.0

    times = measure.measure(work, torch.device("cuda"), 1e-9)
    assert (times.median_us, times.p80_us) == (2e6, 2e6)
    assert FakeBuffer.flushes >= measure.LEAST_RUNS  # before every run
