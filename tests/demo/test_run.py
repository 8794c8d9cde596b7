"""The demo as a whole, in its tiny setting: interrupted, gone on with, its files, its page; the study's bookkeeping."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from prfl_fast.demo import run as module
from prfl_fast.demo.report import main as report_main
from prfl_fast.demo.run import run_demo
from prfl_fast.demo.settings import ARMS, HEADLINE, DemoSettings
from prfl_fast.demo.study import _Finished
from prfl_fast.demo.study_tables import TINY_PLAN, as_text, make_tables

PROMISED = {
    "reward_accuracy", "reward_before", "reward_after", "motion_error_before", "motion_error_after",
    "motion_error_after_high", "structure_error_before", "structure_error_after", "win_rate_latent_over_rgb",
    "win_rate_interval", "net_move_before", "net_move_after", "seconds",
}  # fmt: skip


class Page(HTMLParser):
    """Balance of tags, and everything that the page would fetch."""

    VOID = {"meta", "link", "input", "img", "br", "rect", "line", "circle", "polyline", "polygon"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is interrupted in its third arm and then gone on with."""
    output = tmp_path_factory.mktemp("demo")
    settings = DemoSettings(output=str(output), tiny=True)
    real, called = module.align, []

    def interrupted(base: Any, arm: Any, *rest: Any, **more: Any) -> Any:
        called.append(arm.key)
        if arm.key == ARMS[2].key and len(called) == 3:
            raise KeyboardInterrupt
        return real(base, arm, *rest, **more)

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(module, "align", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(settings)
        assert not (output / "summary.json").exists()
        run_demo(settings)
        # What was finished before is not done again, what was cut off is.
        assert called == [arm.key for arm in ARMS[:3]] + [arm.key for arm in ARMS[2:]]
        before = len(called)
        run_demo(settings)
        assert len(called) == before
    return output


def test_summary_holds_what_is_promised(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= PROMISED
    assert summary["headline_arm"] == HEADLINE and summary["settings"]["tiny"] is True
    low, high = summary["win_rate_interval"]
    assert 0 <= low <= summary["win_rate_latent_over_rgb"] <= high <= 1
    assert summary["motion_error_after_high"] >= summary["motion_error_after"]
    assert "budget 64.00 MiB" in summary["memory_plan"]


def test_details_agree_with_the_summary(folder: Path) -> None:
    summary, details = (json.loads((folder / name).read_text()) for name in ("summary.json", "details.json"))
    arms = {arm["key"]: arm for arm in details["arms"]}
    assert list(arms) == ["real", "good", "before", *(arm.key for arm in ARMS)]
    after = arms[HEADLINE]["per_seed"]["motion_error"]
    assert abs(sum(after) / len(after) - summary["motion_error_after"]) < 1e-5
    table = details["gradient_table"]
    calls = {row["mode"]: row["calls"] for row in table}
    one = {"last step": 10, "one step (number 5)": 10}
    assert calls == {"full chain": 19, "last 4 steps": 13, **one, "plain autograd": 10}
    exact, plain = table[0], table[-1]
    # Float32 on both sides, some 1e3 roundings of 2^-24 deep.
    for agreement in (exact["cosine"], plain["cosine"], plain["norm_ratio"]):
        assert agreement == pytest.approx(1, abs=1e-4)
    assert exact["peak_bytes"] < plain["peak_bytes"]


def test_the_page_stands_alone(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert all(address.startswith("data:") for address in page.fetched) and len(page.fetched) > len(ARMS)
    written = re.sub(r"data:[^\"]*", "", text)
    assert not re.search(r"\$[a-z]|\bNaN\b|\bnan\b|undefined|None</", written)
    for heading in ("Targets", "same seeds", "judges say", "Learning curves", "noise level", "exact gradient costs"):
        assert heading in text
    assert "tiny setting" in text


def test_the_page_can_be_written_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "index.html").read_text()
    assert "The long comparison" in before
    assert report_main([str(folder), str(Path(module.__file__).parent / module.STUDY)]) == 0
    assert (folder / "index.html").read_text() == before
    assert report_main([str(folder)]) == 0
    assert "The long comparison" not in (folder / "index.html").read_text()
    assert report_main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"seconds": 0}, "seconds: expected a positive"), ({"study": True, "from_scratch": True}, "study: ")],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DemoSettings(**arguments)


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    first = _Finished(tmp_path / "study.jsonl")
    first.add({"key": "a", "value": 1.5})
    first.add({"key": "b", "value": 2.5})
    with (tmp_path / "study.jsonl").open("a") as file:
        file.write('{"key": "c", "val')  # killed while writing
    again = _Finished(tmp_path / "study.jsonl")
    assert again.rows == first.rows
    again.add({"key": "c", "value": 3.5})
    assert list(_Finished(tmp_path / "study.jsonl").rows) == ["a", "b", "c"]


MEANS = ("motion_error", "structure_error", "net_move", "diversity", "reward")


def row(key: str, seed: int, errors: list[float], **more: Any) -> dict[str, Any]:
    arm = next(arm for arm in ARMS if arm.key == key).to_dict() | {"rate": 1e-4, "flow_weight": 1.0}
    means = dict.fromkeys(MEANS, 1.0)
    job = {"arm": arm, "seed": seed, "backbone": "pretrained"}
    return {"job": job, "updates": 10, "errors": errors, "total_error": sum(errors), **means, **more}


def test_tables_of_a_study() -> None:
    done = [row("pixel", 1, [1.0, 2.0]), row("prfl", 1, [0.5, 3.0])]
    done += [row("pixel", 2, [1.0, 1.0]), row("prfl", 2, [1.0, 0.0])]
    levels = {"sigma": [0.0], "accuracy": [0.75]}
    accuracies = [{"kind": kind, "accuracy": levels} for kind in ("latent", "random")]
    accuracies.append({"kind": "pixel", "accuracy": 0.5})
    references = {"Before": dict.fromkeys(MEANS, 2.0)}
    groups = dict.fromkeys(("equal time", "equal updates", "supervised", "backbone"), done)
    tables = {t["title"]: t for t in make_tables(done, groups, references, accuracies, TINY_PLAN)}
    rows = {cells[0]: cells for cells in tables["Equal time"]["rows"]}
    # Seed 1: one win of two; seed 2: a tie and a win, 0.75.
    assert rows["PRFL, one random step"][-1] == "0.625 ± 0.18" and rows["RGB ReFL, last step"][-1] == ""
    assert rows["Before"][2] == "2"
    assert "0.625" in as_text(tables["Equal time"])
