"""The command line: what it hands on, its exit codes, and that a user's mistake shows no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prfl_fast
from prfl_fast import cli, doctor
from prfl_fast.exactness import Comparison, GradientCheck
from prfl_fast.ops import library
from prfl_fast.ops.library import CompiledOps


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["paint"], ["demo", "--seed", "many"], ["doctor", "--no-such-flag"]])
def test_what_the_parser_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: prfl-fast" in capsys.readouterr().err


def test_the_version_is_printed_without_torch() -> None:
    code = "import sys; sys.argv = ['prfl-fast', '--version']\nfrom prfl_fast.cli import main\ntry: main()\n" + (
        "except SystemExit: print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:2] == [f"prfl-fast {prfl_fast.__version__}", "False"]


def stub_demo(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[Any]:
    from prfl_fast.demo import run as demo

    seen: list[Any] = []

    def take(settings: Any) -> None:
        seen.append(settings)
        run()

    monkeypatch.setattr(demo, "run_demo", take)
    return seen


def test_flags_of_the_demo_reach_its_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prfl_fast.demo.settings import DemoSettings

    seen = stub_demo(monkeypatch, lambda: None)
    flags = ["--output", str(tmp_path), "--tiny", "--seed", "7", "--seconds", "2.5", "--from-scratch"]
    assert cli.main(["demo", *flags]) == 0
    assert cli.main(["demo"]) == 0
    settings, untouched = seen
    assert Path(settings.output) == tmp_path
    assert (settings.tiny, settings.seed, settings.seconds, settings.from_scratch) == (True, 7, 2.5, True)
    assert untouched == DemoSettings()  # no default of its own on the command line


def refuse() -> None:
    raise ValueError("clips: /nowhere holds no video")


def test_a_mistake_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stub_demo(monkeypatch, refuse)
    assert cli.main(["demo"]) == 2
    shown = capsys.readouterr()
    assert "prfl-fast demo: clips: /nowhere holds no video" in shown.err
    assert "Traceback" not in shown.err
    with pytest.raises(ValueError, match="nowhere"):
        cli.main(["demo", "--traceback"])


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down() -> None:
        raise RuntimeError("a bug")

    stub_demo(monkeypatch, break_down)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    stub_demo(monkeypatch, interrupt)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_doctor_names_versions_and_costs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_OPTIONAL", (("no-such-package", "no_such_package", "video", "nothing can be seen"),))
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert prfl_fast.__version__ in shown
    assert "missing: nothing can be seen; pip install 'prfl-fast[video]'" in shown
    assert "cpu" in shown


@pytest.mark.parametrize(
    ("compiled", "said"),
    [
        (None, ["CPU ops       not built", "CUDA kernels  not built; install a CUDA toolkit"]),
        (CompiledOps("", (), "no nvcc was found"), ["CPU ops       built", "not built (no nvcc was found); install"]),
        (CompiledOps("13.0", ("sm_80", "compute_80"), ""), ["CUDA kernels  for sm_80, compute_80 (nvcc 13.0)"]),
    ],
)
def test_doctor_tells_what_was_built(
    compiled: CompiledOps | None, said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_OPTIONAL", ())
    monkeypatch.setattr(library, "COMPILED", compiled)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in said), shown


def test_doctor_fails_on_a_broken_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken_package.py").write_text("raise ImportError('libmissing.so: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_OPTIONAL", (("broken-package", "broken_package", "", "-"),))
    assert cli.main(["doctor"]) == 1
    assert "libmissing.so: not found" in capsys.readouterr().out


def test_doctor_reports_warnings_of_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def check(model: Any) -> GradientCheck:
        warnings.warn_explicit("fell back to the slow road", UserWarning, str(Path(doctor.__file__)), 1)
        warnings.warn_explicit("somebody else's", UserWarning, "/elsewhere/module.py", 1)
        return GradientCheck("Net", "Scheduler", 1, [])

    monkeypatch.setattr(doctor, "_OPTIONAL", ())
    monkeypatch.setattr(doctor, "check_gradients", check)
    assert doctor.examine(gradients=True).notices == ["fell back to the slow road"]


def test_doctor_json_and_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = GradientCheck("Net", "Scheduler", 4, [Comparison("chain", "latents", 0.5, 1e-6)])
    monkeypatch.setattr(doctor, "_OPTIONAL", ())
    monkeypatch.setattr(doctor, "check_gradients", lambda model: outcome)
    assert cli.main(["doctor", "--gradients", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["healthy"] is False
    assert content["gradients"]["passed"] is False
    assert content["gradients"]["comparisons"][0]["error"] == 0.5


def test_model_without_gradients_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "somewhere"]) == 2
    assert "--gradients" in capsys.readouterr().err


def tiny_model(folder: Path) -> list[str]:
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12} | {
        "num_layers": 2, "ffn_dim": 48, "text_dim": 16, "freq_dim": 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return ["plan", "--model", str(folder), "--size", "64x32x5", "--steps", "2", "--reserve", "1MiB"]


def test_a_plan_as_text_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    words = [*tiny_model(tmp_path), "--reward-blocks", "1", "--device", "h100", "--budget", "0.5"]
    assert cli.main([*words, "--curve", str(tmp_path / "curve.svg")]) == 0
    shown = capsys.readouterr().out
    for part in ("held throughout", "run again", "Times are estimates for h100, not measurements", "budget  ", "####"):
        assert part in shown
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    assert cli.main([*words, "--json", "--gpus", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["budget_bytes"] == 40 * 10**9 and told["gpus"] == 2 and len(told["curve"]) == 12
    assert len(told["keeps"][0]) == len(told["blocks"]) == 2


def test_a_plan_that_can_not_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    words = [*tiny_model(tmp_path), "--reward-blocks", "0"]
    assert cli.main([*words, "--budget", "1024"]) == 1  # bytes
    shown = capsys.readouterr()
    assert "the least that would do is" in shown.err and shown.out == ""
    least = int(shown.err.split("would do is")[1].split("(")[1].split(" bytes")[0])
    assert cli.main([*words, "--budget", f"{least}B"]) == 0
    assert cli.main([*words, "--budget", f"{least - 1}B"]) == 1
    capsys.readouterr()
    for wrong, said in (
        (["plan", "--model", "wan2.1-14b"], "did you mean 'wan2.1-t2v-14b'?"),
        ([*words, "--size", "64x32x6"], "frames a multiple of 4 plus 1, such as 5 or 9, got 6"),
        ([*words, "--curve", str(tmp_path / "curve.png")], "ends in .svg"),
        ([*words, "--device", "tpu"], "device: expected one of"),
    ):
        assert cli.main(wrong) == 2
        assert said in capsys.readouterr().err
