"""How attention kernels are chosen, on stand-ins for kernels, clock and device: nothing here needs a GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prfl_fast import _env, doctor, ops
from prfl_fast.ops.attention import aten, choice, choices_file, trial
from prfl_fast.ops.attention.provider import Problem, Provider
from prfl_fast.ops.attention.reference import Reference

REFERENCE = Reference()


class Kernel(Provider):
    """The reference's values at a price; ``spoil`` changes what the forward or the backward gives."""

    def __init__(self, name: str, cost: float, spoil: Callable[..., Any] | None = None, not_for: str | None = None):
        self.name, self.cost, self.spoil, self.not_for = name, cost, spoil, not_for
        self.calls: list[str] = []

    def why_not(self, problem: Problem, *, backward: bool) -> str | None:
        return self.not_for

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        self.calls.append("forward")
        CLOCK[0] += self.cost
        made = REFERENCE.forward(q, k, v, scale)
        return made if self.spoil is None else self.spoil(*made)

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("backward")
        CLOCK[0] += self.cost
        made = REFERENCE.backward(*arguments)
        return made if self.spoil is None else self.spoil(*made)


CLOCK = [0.0]


def stopwatch(work: Callable[[], object]) -> float:
    before = CLOCK[0]
    work()
    return CLOCK[0] - before


def asked(**changes: Any) -> Problem:
    sizes = {"batch": 2, "queries": 40, "keys": 70, "heads": 3, "head_dim": 16, "deterministic": False}
    return Problem(**{"device": torch.device("cpu"), "dtype": torch.float32, **sizes, **changes})


def raising(error: BaseException) -> Callable[..., Any]:
    def spoil(*made: Tensor) -> Any:
        raise error

    return spoil


# ----------------------------------------------------------------------------------------------------------- the trial


@pytest.mark.parametrize("backward", [False, True])
def test_the_fastest_comes_first(backward: bool) -> None:
    kernels = [Kernel("slow", 0.003), Kernel("fast", 0.001), Kernel("middle", 0.0015)]
    ranking = trial.rank(asked(), kernels, stopwatch, forwards=[REFERENCE] if backward else None)
    assert ranking is not None
    assert ranking.order == ("fast", "middle", "slow") and not ranking.wrong
    assert ranking.seconds == pytest.approx({"slow": 0.003, "fast": 0.001, "middle": 0.0015})
    # One that is twice as slow runs once for its check and once for its time.
    assert len(kernels[0].calls) == 2 and len(kernels[1].calls) == 1 + trial.ROUNDS
    assert {call for kernel in kernels for call in kernel.calls} == {"backward" if backward else "forward"}


def test_among_equals_the_best_guess_wins() -> None:
    ranking = trial.rank(asked(), [Kernel("guess", 0.00101), Kernel("noise", 0.001)], stopwatch)
    assert ranking is not None and ranking.order == ("guess", "noise")
    ranking = trial.rank(asked(), [Kernel("guess", 0.00103), Kernel("faster", 0.001)], stopwatch)
    assert ranking is not None and ranking.order == ("faster", "guess")


def test_medians_survive_a_hiccup() -> None:
    times = {"a": iter([0.5, *[0.001] * 9]), "b": iter([0.6, *[0.0015] * 9])}
    kernels = [Kernel("b", 0), Kernel("a", 0)]
    owner: list[str] = []

    def watch(work: Callable[[], object]) -> float:
        for kernel in kernels:
            kernel.calls.clear()
        work()
        owner[:] = [kernel.name for kernel in kernels if kernel.calls]
        return next(times[owner[0]])

    with mock.patch.object(trial, "MOST_SECONDS", 10.0):
        ranking = trial.rank(asked(), kernels, watch)
    assert ranking is not None and ranking.order == ("a", "b") and ranking.seconds["a"] == 0.001


def test_time_is_bounded() -> None:
    kernels = [Kernel("a", 0.4), Kernel("b", 0.3)]
    before = CLOCK[0]
    assert trial.rank(asked(), kernels, stopwatch) is not None
    # A check and a time each, a second round because the first stayed below the bound.
    assert CLOCK[0] - before == pytest.approx(3 * 0.7)


def test_out_of_memory_is_no_fault() -> None:
    full = Kernel("full", 0.001, raising(torch.OutOfMemoryError("no room")))
    ranking = trial.rank(asked(), [full, Kernel("small", 0.01)], stopwatch)
    assert ranking is not None and ranking.order == ("small",) and not ranking.wrong
    with mock.patch.object(trial, "_draw", side_effect=torch.OutOfMemoryError("no room")):
        assert trial.rank(asked(), [Kernel("small", 0.01)], stopwatch) is None


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor it"), TypeError("signature"), ImportError("symbol")])
def test_a_kernel_that_fails_is_named(error: Exception) -> None:
    ranking = trial.rank(asked(), [Kernel("broken", 0.001, raising(error)), Kernel("good", 0.01)], stopwatch)
    assert ranking is not None and ranking.order == ("good",)
    assert ranking.wrong == {"broken": f"fails: {str(error).splitlines()[0]}"}


def drop_tile(index: int) -> Callable[..., Any]:
    """The last query's or key's row of one result is not written."""

    def spoil(*made: Tensor) -> tuple[Tensor, ...]:
        made[index][:, -1] = 0
        return made

    return spoil


def scaled(index: int, factor: float) -> Callable[..., Any]:
    return lambda *made: tuple(t * factor if i == index else t for i, t in enumerate(made))


WRONG_FORWARD = {
    "the last row is missing": drop_tile(0),
    "NaN far from the rows looked at": lambda out, lse: (out.index_fill(1, torch.tensor([1]), math.nan), lse),
    "base 2": lambda out, lse: (out, lse / math.log(2)),
    "heads first": lambda out, lse: (out.transpose(1, 2), lse),
    "tokens first": lambda out, lse: (out, lse.transpose(1, 2)),
    "another dtype": lambda out, lse: (out.double(), lse),
    "one row of keys too many": lambda out, lse: (out, torch.logaddexp(lse, torch.zeros(()))),
    "heads swapped": lambda out, lse: (out.flip(2), lse),
}
WRONG_BACKWARD = {
    "dq: the last row": drop_tile(0),
    "dk: the last row": drop_tile(1),
    "dv: the last row": drop_tile(2),
    "dk without the scale": scaled(1, 4.0),
    "dv and dk swapped": lambda dq, dk, dv: (dq, dv, dk),
    "infinite": lambda dq, dk, dv: (dq, dk / 0, dv),
    "too few heads": lambda dq, dk, dv: (dq[:, :, :1], dk, dv),
    "dq a thousandth off": scaled(0, 1.001),
}


FAULTS = [
    (fault, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for fault in (*WRONG_FORWARD, *WRONG_BACKWARD)
    if fault != "dq a thousandth off" or dtype == torch.float32  # below the rounding of halves
]


@pytest.mark.parametrize(("fault", "dtype"), FAULTS, ids=str)
def test_a_wrong_kernel_is_never_chosen(fault: str, dtype: torch.dtype) -> None:
    backward = fault in WRONG_BACKWARD
    spoil = WRONG_BACKWARD[fault] if backward else WRONG_FORWARD[fault]
    forwards = [Kernel("another", 1, WRONG_FORWARD["base 2"]), REFERENCE] if backward else None
    kernels = [Kernel("wrong", 1e-9, spoil), Kernel("right", 1)]
    ranking = trial.rank(asked(dtype=dtype, queries=200, keys=300), kernels, stopwatch, forwards=forwards)
    assert ranking is not None and ranking.order == ("right",)
    assert "times the tolerance" in ranking.wrong["wrong"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 8), (2, 300, 70, 3, 64), (1, 33, 1500, 2, 128)], ids=str)
def test_right_kernels_are_well_within_the_tolerance(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, queries, keys, heads, dim = sizes
    problem = asked(batch=batch, queries=queries, keys=keys, heads=heads, head_dim=dim, dtype=dtype)
    q, k, v, d_out = trial._draw(problem)
    for one in (REFERENCE, choice.PROVIDERS["aten_cpu"]):
        out, lse = one.forward(q, k, v, 0.1)
        assert trial.forward_error(q, k, v, 0.1, out, lse) < 0.6
        made = one.backward(d_out, q, k, v, out.contiguous(), lse.contiguous(), 0.1, None, False)
        assert trial.backward_error(d_out, q, k, v, out, lse, 0.1, made) < 0.6


def test_without_a_right_forward_there_is_no_backward_to_try() -> None:
    wrong = Kernel("wrong", 1, WRONG_FORWARD["base 2"])
    assert trial.rank(asked(), [Kernel("right", 1)], stopwatch, forwards=[wrong]) is None


@pytest.mark.parametrize(
    ("changes", "batch", "heads"),
    [
        ({}, 2, 3),
        ({"queries": 75600, "keys": 75600, "heads": 40, "head_dim": 128, "batch": 1, "dtype": torch.bfloat16}, 1, 1),
        ({"queries": 32760, "keys": 32760, "heads": 12, "head_dim": 128, "batch": 1, "dtype": torch.bfloat16}, 1, 5),
        ({"queries": 32760, "keys": 512, "heads": 40, "head_dim": 128, "batch": 1, "dtype": torch.bfloat16}, 1, 20),
    ],
    ids=str,
)
def test_what_is_tried_is_bounded(changes: dict[str, Any], batch: int, heads: int) -> None:
    problem = asked(**changes)
    fits = trial.shrink(problem)
    assert fits is not None and (fits.batch, fits.heads) == (batch, heads)
    assert (fits.queries, fits.keys, fits.head_dim) == (problem.queries, problem.keys, problem.head_dim)
    assert trial.shrink(problem, 1000) is None
    assert trial.rank(problem, [], stopwatch, most_bytes=1000) is None


def test_a_trial_leaves_no_trace() -> None:
    seen: list[Any] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    state = torch.get_rng_state()
    with Mode(), torch.autocast("cpu", torch.bfloat16):
        ranking = trial.rank(asked(), [REFERENCE, Kernel("a", 1)], stopwatch)
    assert ranking is not None and not ranking.wrong
    assert not seen and torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new process with this cache folder, as far as choices go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process(monkeypatch)
    yield tmp_path / "prfl_fast" / choices_file.NAME


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_known", None)
    monkeypatch.setattr(choice, "_unmeasured", {})
    monkeypatch.setattr(choice, "_settled", {})
    monkeypatch.setattr(choice, "_stated", None)


class Device:
    """Passes for a device that is no CPU."""

    type = "pretended"


def install(monkeypatch: pytest.MonkeyPatch, *kernels: Provider) -> None:
    monkeypatch.setattr(choice, "PROVIDERS", {kernel.name: kernel for kernel in (*kernels, REFERENCE)})
    monkeypatch.setattr(choice, "_stopwatch", lambda device: stopwatch)
    real = trial.rank

    def on_the_cpu(problem: Problem, *arguments: Any, **named: Any) -> trial.Ranking | None:
        named["most_bytes"] = trial.MOST_BYTES
        return real(asked(queries=problem.queries, keys=problem.keys), *arguments, **named)

    monkeypatch.setattr(trial, "rank", on_the_cpu)


def pretended(**changes: Any) -> Problem:
    return asked(device=Device(), **changes)


def test_measured_once_and_kept_on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Kernel("slow", 0.003), Kernel("fast", 0.001)
    install(monkeypatch, slow, fast)
    assert choice.choose(pretended(), backward=False, measure=True) == "fast"
    calls = len(fast.calls)
    assert choice.choose(pretended(), backward=False, measure=True) == "fast"
    # The same powers of two.
    assert choice.choose(pretended(queries=63, keys=127, heads=2), backward=False, measure=True) == "fast"
    assert len(fast.calls) == calls
    new_process(monkeypatch)
    slow.cost, fast.cost = fast.cost, slow.cost
    assert choice.choose(pretended(), backward=False, measure=True) == "fast"
    assert len(fast.calls) == calls
    # What is another bucket: the direction, a power of two, the dtype, the head dimension, determinism.
    others = [{"queries": 64}, {"keys": 128}, {"heads": 4}, {"dtype": torch.float64}, {"head_dim": 8}]
    for changes in (*others, {"deterministic": True}):
        assert choice.choose(pretended(**changes), backward=False, measure=True) == "slow", changes
    assert choice.choose(pretended(), backward=True, measure=True) == "slow"
    assert len(json.loads(cache.read_text())) == 2 + len(others) + 1
    assert list(cache.parent.iterdir()) == [cache]


def test_another_version_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Kernel("slow", 0.003), Kernel("fast", 0.001)]
    install(monkeypatch, *kernels)
    assert choice.choose(pretended(), backward=False, measure=True) == "fast"
    new_process(monkeypatch)
    kernels[0].cost = 0.0001
    monkeypatch.setattr(Kernel, "version", lambda self: "2")
    assert choice.choose(pretended(), backward=False, measure=True) == "slow"


def test_without_measuring_the_order_decides_and_holds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Kernel("first", 0.003), Kernel("fast", 0.001))
    assert choice.choose(pretended(), backward=False) == "first"
    assert not cache.exists()
    assert choice.choose(pretended(), backward=False, measure=True) == "fast"
    # A compiled forward ran on the first: its recomputation does too.
    assert choice.choose(pretended(), backward=False) == "first"
    new_process(monkeypatch)
    assert choice.choose(pretended(), backward=False) == "fast"  # from the disk


def test_a_wrong_kernel_is_announced_and_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Kernel("wrong", 1e-9, WRONG_FORWARD["base 2"]), Kernel("right", 1))
    with pytest.warns(UserWarning, match=r"attention: wrong is not used for pretended .*: it is wrong: its error is"):
        assert choice.choose(pretended(), backward=False, measure=True) == "right"
    new_process(monkeypatch)
    assert choice.choose(pretended(), backward=False) == "right"
    # Nothing right is left that can run it: the reference, which is never measured.
    choice.PROVIDERS["right"].not_for = "not now"  # type: ignore[attr-defined]
    new_process(monkeypatch)
    assert choice.choose(pretended(queries=41), backward=False) == "reference"


def test_within_a_bucket_the_fastest_that_can(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Kernel("slow", 0.003), Kernel("fast", 0.001), Kernel("middle", 0.002))
    assert choice.choose(pretended(), backward=False, measure=True) == "fast"
    choice.PROVIDERS["fast"].not_for = "odd lengths"  # type: ignore[attr-defined]
    assert choice.choose(pretended(queries=41), backward=False, measure=True) == "middle"


def test_no_memory_no_choice_on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Kernel("first", 0.003), Kernel("fast", 0.001))
    monkeypatch.setattr(trial, "rank", lambda *arguments, **named: None)
    assert choice.choose(pretended(), backward=False, measure=True) == "first"
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"a": 1}', '{"a": {"order": ["x"], "wrong": {}}}', '{"a": {"order": [1], "wrong": {}, '
     '"microseconds": {}}}', '{"a": {"order": [], "wrong": {}, "microseconds": {"x": "y"}}}', b"\xff\xfe\x00"],
)  # fmt: skip
def test_a_broken_or_foreign_file(content: str | bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    install(monkeypatch, Kernel("slow", 0.003), Kernel("fast", 0.001))
    with pytest.warns(UserWarning, match=f"attention: measured choices in .*{choices_file.NAME} are ignored") as caught:
        assert choice.choose(pretended(), backward=False, measure=True) == "fast"
        assert choice.choose(pretended(), backward=True, measure=True) == "fast"
    assert len(caught) == 1
    new_process(monkeypatch)
    assert choice.choose(pretended(), backward=True) == "fast"


def test_names_of_nobody_in_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Kernel("first", 0.003), Kernel("fast", 0.001))
    entry = {"order": ["nobody"], "microseconds": {}, "wrong": {"reference": "no"}}
    choices_file.add(cache, {choice.bucket(pretended(), backward=False): entry})
    assert choice.choose(pretended(), backward=False, measure=True) == "first"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # root may write anywhere else
    install(monkeypatch, Kernel("slow", 0.003), Kernel("fast", 0.001))
    with pytest.warns(UserWarning) as caught:
        assert choice.choose(pretended(), backward=False, measure=True) == "fast"
    assert any("are not kept for the next process" in str(w.message) for w in caught)
    assert choice.choose(pretended(), backward=False, measure=True) == "fast"


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _env.cache_directory() == Path.home() / ".cache" / "prfl_fast"
    with mock.patch.object(Path, "home", side_effect=RuntimeError("no home")):
        assert _env.cache_directory() is None and choices_file.path() is None
        install(monkeypatch, Kernel("slow", 0.003), Kernel("fast", 0.001))
        assert choice.choose(pretended(), backward=False, measure=True) == "fast"


def test_processes_that_write_at_once(cache: Path) -> None:
    # The file alone, without torch.
    code = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('choices_file', {choices_file.__file__!r})\n"
        "choices_file = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(choices_file)\n"
        "file, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "for i in range(60):\n"
        "    choices_file.add(file, {f'{name} {i}': {'order': [name] * 50, 'microseconds': {}, 'wrong': {}}})\n"
        "    assert choices_file.read(file)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(cache)]
    children = [subprocess.Popen([*command, name]) for name in ("a", "b")]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert {"a 59", "b 59"} & set(choices_file.read(cache))
    assert list(cache.parent.iterdir()) == [cache]


# ------------------------------------------------------------------------------------------------- where it may happen


def test_a_cpu_never_measures(cache: Path) -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    with mock.patch.object(trial, "rank", side_effect=AssertionError("measured")):
        ops.attention(q[None, 0], k[None, 0], v[None, 0])
        assert not choice.may_measure(asked())
        assert choice.choose(asked(), backward=False, measure=True) == "aten_cpu"


@pytest.mark.parametrize(
    ("ranks", "capturing", "may"), [(0, False, True), (1, False, True), (2, False, False), (0, True, False)]
)
def test_where_a_gpu_measures(ranks: int, capturing: bool, may: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: ranks > 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    assert choice.may_measure(asked(device=torch.device("cuda"))) is may


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


@pytest.mark.parametrize(
    ("capability", "cudnn", "changes", "backward", "first"),
    [
        ((9, 0), 91501, {}, False, ["aten_cudnn", "aten_flash", "aten_efficient", "triton", "reference"]),
        ((8, 0), 91501, {}, False, ["aten_flash", "aten_efficient", "triton", "reference", "aten_cudnn"]),
        # cuDNN before 9.15.1 is right for whole tiles only.
        ((9, 0), 91300, {}, False, ["aten_flash", "aten_efficient"]),
        ((9, 0), 91300, {"queries": 256, "keys": 128}, False, ["aten_cudnn"]),
        ((9, 0), 91300, {"queries": 256, "keys": 129}, False, ["aten_flash"]),
        # Its backward has no deterministic road here.
        ((9, 0), 91501, {"deterministic": True}, False, ["aten_cudnn"]),
        ((9, 0), 91501, {"deterministic": True}, True, ["aten_flash", "aten_efficient", "triton", "reference"]),
        ((7, 5), 91501, {}, False, ["aten_efficient", "reference"]),
        ((9, 0), 91501, {"dtype": torch.float32}, False, ["aten_efficient", "triton", "reference"]),
        ((9, 0), 91501, {"dtype": torch.float64}, False, ["reference"]),
        ((9, 0), 91501, {"head_dim": 256}, False, ["aten_flash", "aten_efficient"]),
        ((9, 0), 91501, {"head_dim": 20}, False, ["reference"]),
        ((9, 0), 91501, {"heads": 0}, True, ["reference"]),
    ],
    ids=str,
)
def test_the_order_where_nothing_was_measured(
    capability: tuple[int, int], cudnn: int, changes: dict[str, Any], backward: bool, first: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("triton")
    on_a_gpu(monkeypatch, capability, cudnn)
    problem = asked(**{"device": torch.device("cuda", 0), "dtype": torch.bfloat16, **changes})
    found = [p.name for p in choice.candidates(problem, backward=backward)]
    assert found[: len(first)] == first


def test_who_takes_a_gradient_of_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    on_a_gpu(monkeypatch, (9, 0), 91501)
    problem = asked(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert choice.first_for_d_lse(problem) == "triton"
    assert choice.first_for_d_lse(asked()) == "reference"


# ------------------------------------------------------------------------------------------- torch's private operators

SCHEMAS = {
    "_scaled_dot_product_flash_attention_for_cpu": "(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
    "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, float? scale=None) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    "_scaled_dot_product_cudnn_attention": "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
    "bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, "
    "float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
    "SymInt max_k, Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)",
    "_scaled_dot_product_cudnn_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, "
    "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, *, float? scale=None) -> "
    "(Tensor, Tensor, Tensor)",
    "_scaled_dot_product_flash_attention": "(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
    "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, "
    "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor rng_state, Tensor unused, "
    "Tensor debug_attn_mask)",
    "_scaled_dot_product_flash_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    "_scaled_dot_product_efficient_attention": "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
    "bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, *, float? scale=None) -> "
    "(Tensor output, Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)",
    "_scaled_dot_product_efficient_attention_backward": "(Tensor grad_out_, Tensor query, Tensor key, Tensor value, "
    "Tensor attn_bias, Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, float dropout_p, "
    "bool[4] grad_input_mask, bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_torchs_private_operators_are_what_is_called(name: str) -> None:
    assert str(getattr(torch.ops.aten, name).default._schema) == f"aten::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", ["aten_cudnn", "aten_flash", "aten_efficient"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_torchs_cuda_operators_take_these_arguments(name: str, deterministic: bool) -> None:
    """Shapes alone, on tensors without values."""
    provider = choice.PROVIDERS[name]
    q, k, v, d_out = (torch.empty(2, n, 3, 64, dtype=torch.bfloat16, device="meta") for n in (33, 19, 19, 33))
    out, lse = provider.forward(q, k, v, 0.125)
    assert out.shape == q.shape and lse.shape == (2, 3, 33) and lse.dtype == torch.float32
    with mock.patch.object(torch, "use_deterministic_algorithms", wraps=torch.use_deterministic_algorithms) as used:
        made = provider.backward(d_out, q, k, v, out.contiguous(), lse.contiguous(), 0.125, None, deterministic)
    assert [t.shape for t in made] == [q.shape, k.shape, v.shape]
    assert used.called == (deterministic and name != "aten_cudnn")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("before", "warn_only"), [(False, False), (True, True), (True, False)])
def test_determinism_is_as_it_was_afterwards(before: bool, warn_only: bool) -> None:
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    try:
        with pytest.raises(KeyError), aten.reproducible(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        with aten.reproducible(False):
            assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------- the doctor


def test_doctor_shows_kernels_and_choices(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_OPTIONAL", ())
    entry = {"order": ["aten_flash", "triton"], "microseconds": {"aten_flash": 12.5}, "wrong": {"xformers": "fails: x"}}
    here = choice.bucket(asked(), backward=False)
    choices_file.add(cache, {here: entry, here.replace("torch 2", "torch 1"): entry, f"another {here}": entry})
    shown = doctor.render(doctor.examine())
    assert "aten_cpu        torch" in shown and "flash_attn_2    missing: flash-attn is not installed" in shown
    where = "cpu | float32, head dimension 16, queries 2^5, keys 2^6, heads 2^2 | forward"
    assert shown.count("head dimension 16") == 1
    assert f"  {where}: aten_flash 12.5 us, triton\n    xformers fails: x\n" in shown
    cache.write_text("broken")
    new_process(monkeypatch)
    findings = doctor.examine()
    assert any("are ignored" in notice for notice in findings.notices) and findings.healthy
    assert "attention kernels by measurement, fastest first\n  none\n" in doctor.render(findings)
    assert json.loads(doctor.to_json(findings))["attention"]["reference"].startswith("torch")
