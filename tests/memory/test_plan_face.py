"""``plan_memory``: published models without weights, the plan of a whole iteration, what it prints and refuses."""

from __future__ import annotations

import inspect
import itertools
import json
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import prfl_fast
from prfl_fast.memory.block_cost import BlockCost
from prfl_fast.memory.call_cost import CallCost, Piece
from prfl_fast.memory.iteration_plan import IterationPlan
from prfl_fast.memory.keeps import ALL, NOTHING
from prfl_fast.memory.outlook import Iteration, least_bytes, most_bytes, plan_iteration, same_for_all
from prfl_fast.memory.roofline import Device, Work, device_named
from prfl_fast.memory.trace import LiveBytes, storage_bytes
from prfl_fast.models import adapter_for
from prfl_fast.models.published import CLASSES, PUBLISHED, VideoModel, parse_size, video_model
from prfl_fast.sampling.plan_picture import terminal_curve, write_curve
from prfl_fast.sampling.planning import Forecast, forecast, plan_memory

H200 = device_named("h200")
# Parameters of the published checkpoints, and the shape of the latents at their own size.
FACTS = {
    "wan2.1-t2v-1.3b": (1_418_996_800, (1, 16, 21, 60, 104)),
    "wan2.1-t2v-14b": (14_288_491_584, (1, 16, 21, 90, 160)),
    "wan2.2-ti2v-5b": (4_999_787_712, (1, 48, 31, 44, 80)),
    "hunyuan-video": (12_821_012_544, (1, 16, 33, 90, 160)),
    "ltx-video": (1_923_385_472, (1, 21 * 15 * 22, 128)),
    "cogvideox-2b": (1_693_783_872, (1, 13, 16, 60, 90)),
    "cogvideox-5b": (5_570_283_072, (1, 13, 16, 60, 90)),
}
TINY: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 5,
    "ffn_dim": 48, "text_dim": 16, "freq_dim": 16,
}  # fmt: skip
SIZE = "96x64x9"


def config_file(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return config_file(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="module")
def traced(tiny: str) -> Forecast:
    return forecast(tiny, SIZE, num_inference_steps=3, reward_blocks=2, reserve=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_what_was_published(name: str) -> None:
    import diffusers

    model, (parameters, shape) = PUBLISHED[name], FACTS[name]
    net: Any = model.build()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert model.latents_shape(*model.size) == shape
    known = inspect.signature(getattr(diffusers, model.class_name).__init__).parameters
    assert set(model.config) <= set(known)
    # What the class keeps in float32 stays there, all else is bfloat16.
    kept = set(net._keep_in_fp32_modules or ())
    for key, parameter in net.named_parameters():
        assert parameter.dtype == (torch.float32 if kept & set(key.split(".")) else torch.bfloat16), key
    batch = 2
    latents = torch.zeros(model.latents_shape(*model.size, batch))
    adapter_for(net).validate(latents, model.conditioning(*model.size, batch), prepared=False)


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "hunyuan-video", "ltx-video", "cogvideox-2b"])
def test_the_first_of_each_family_is_the_class_without_arguments(name: str) -> None:
    import diffusers

    model = PUBLISHED[name]
    known = inspect.signature(getattr(diffusers, model.class_name).__init__).parameters
    for key, value in model.config.items():
        default = known[key].default
        assert value == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("wan2.1-t2v-14b", (1280, 720, 80), "frames a multiple of 4 plus 1, such as 77 or 81, got 80"),
        ("wan2.1-t2v-14b", (1288, 720, 81), "width a multiple of 16, such as 1280 or 1296, got 1288"),
        ("wan2.2-ti2v-5b", (1280, 720, 121), "height a multiple of 32, such as 704 or 736, got 720"),
        ("ltx-video", (704, 8, 161), "height a multiple of 32, such as 32, got 8"),
        ("ltx-video", (704, 480, 158), "frames a multiple of 8 plus 1"),
    ],
)
def test_sizes_that_the_factors_do_not_divide(name: str, size: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match="size: expected") as caught:
        PUBLISHED[name].latents_shape(*size)
    assert words in str(caught.value)


def test_two_latent_frames_to_a_token(tmp_path: Path) -> None:
    config = {"_class_name": CLASSES[3], "patch_size": 2, "patch_size_t": 2, "use_rotary_positional_embeddings": True}
    model = video_model(config_file(tmp_path, config))
    assert model.latents_shape(32, 16, 13) == (1, 4, 16, 2, 4)  # (13 - 1) / 4 + 1 = 4 frames, two tokens
    cos, sin = model.conditioning(32, 16, 13)["image_rotary_emb"]
    assert cos.shape == sin.shape == (2 * 1 * 2, 64)
    with pytest.raises(ValueError, match="frames a multiple of 8 minus 3"):
        model.latents_shape(32, 16, 9)


@pytest.mark.parametrize("text", ["1280x720", "1280x720x81x2", "0x16x5", "ax2x3", "", "-16x16x5"])
def test_a_size_is_three_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="size: expected WIDTHxHEIGHTxFRAMES"):
        parse_size(text)
    assert parse_size(" 1280X720x81 ") == (1280, 720, 81)


def test_models_by_name_and_by_file(tmp_path: Path) -> None:
    named = video_model("WAN2.1-T2V-14B")
    assert named is PUBLISHED["wan2.1-t2v-14b"]
    written = {"_class_name": named.class_name, "_diffusers_version": "0.33.0", **named.config}
    (tmp_path / "transformer").mkdir()
    config_file(tmp_path / "transformer", written)
    for place in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / "config.json"):
        read = video_model(place)
        assert dict(read.config) == dict(named.config)
        assert read.latents_shape(1280, 720, 81) == named.latents_shape(1280, 720, 81)
    with pytest.raises(ValueError, match="did you mean 'wan2.1-t2v-14b'"):
        video_model("wan2.1-14b")
    with pytest.raises(ValueError, match="expected a path to a config.json or one of") as caught:
        video_model("zzz")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no config.json at"):
        video_model(str(tmp_path / "nowhere" / "config.json"))
    for text, words in (("{", "is not JSON"), ("[]", "holds a list"), ('{"_class_name": "UNet"}', "got 'UNet'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            video_model(tmp_path / "config.json")
    refused = config_file(tmp_path, {**TINY, "no_such_key": 3})
    with pytest.raises(ValueError, match="refuses this config.*no_such_key"):
        video_model(refused).build()


def bytes_of(model: VideoModel, lora: int | None = None) -> tuple[int, int]:
    net = model.build(lora=lora)
    held = {id(t): t for t in (*net.parameters(), *net.buffers())}.values()
    trained = [p for p in net.parameters() if p.requires_grad]
    return tuple(sum(t.numel() * t.element_size() for t in some) for some in (held, trained))  # type: ignore[return-value]


def test_what_is_held_throughout(tiny: str) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "reserve": "1MiB", "reward_blocks": 0}
    weights, trained = bytes_of(video_model(tiny))
    held = forecast(tiny, SIZE, **options).iteration.held
    assert held["weights"] == weights and held["gradients"] == trained
    assert held["optimiser's state"] == 2 * trained and held["reserve"] == 2**20
    assert "reward" not in held and "two blocks' gathered weights" not in held
    # Adapters of rank 2 on 4 projections of 2 attentions in 5 blocks, each from 24 to 24; bfloat16.
    weights, trained = bytes_of(video_model(tiny), lora=2)
    assert trained == 5 * 2 * 4 * 2 * (2 * 24) * 2
    held = forecast(tiny, SIZE, lora=2, optimizer="sgd", **options).iteration.held
    assert held["weights"] == weights and held["gradients"] == trained and "optimiser's state" not in held
    weights, trained = bytes_of(video_model(tiny))
    sharded = forecast(tiny, SIZE, gpus=4, **options).iteration.held
    assert sharded["weights"] == -(-weights // 4) and sharded["gradients"] == -(-trained // 4)
    block: Any = video_model(tiny).build()
    gathered = sum(p.numel() * p.element_size() for p in block.blocks[0].parameters())
    assert sharded["two blocks' gathered weights"] == 2 * gathered


@pytest.mark.parametrize(
    ("gradient", "steps", "guidance", "branches", "counts"),
    [
        ("full", 5, True, "both", (10, 10, False)),
        ("full", 5, False, "both", (5, 5, False)),
        ("full", 5, True, "conditional", (10, 5, True)),
        ("last:2", 5, True, "both", (10, 4, False)),
        ("step:1", 5, False, "both", (5, 1, True)),
        ("prfl", 5, False, "both", (5, 1, False)),
        ("random", 5, False, "both", (5, 5, False)),
        ("random:3", 5, False, "both", (5, 3, False)),
        ("none", 5, True, "both", (10, 0, False)),
    ],
)
def test_calls_that_are_counted(
    tiny: str, gradient: str, steps: int, guidance: bool, branches: str, counts: tuple[int, int, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from prfl_fast.sampling import planning

    monkeypatch.setattr(planning, "_traced_call", lambda *a, **k: CallCost((), 0, Work()))
    found = forecast(
        tiny, SIZE, num_inference_steps=steps, gradient=gradient, guidance=guidance, guidance_gradient=branches,
        reward_blocks=0,
    )  # fmt: skip
    assert (found.iteration.calls, found.iteration.differentiated, found.iteration.beside) == counts


def test_plans_of_a_tiny_model(traced: Forecast) -> None:
    low, high = least_bytes(traced.iteration, H200), most_bytes(traced.iteration, H200)
    assert low < high
    with pytest.raises(prfl_fast.InfeasibleBudget, match="memory_budget") as caught:
        traced.plan(low - 1, H200)
    assert caught.value.least_bytes == low
    before = None
    for share in range(9):
        budget = low + (high - low) * share // 8
        plan = traced.plan(budget, H200)
        assert plan.predicted_peak_bytes is not None and plan.predicted_peak_bytes <= budget
        assert plan.recompute_all_ns is not None and plan.total_ns <= plan.recompute_all_ns
        assert before is None or plan.total_ns <= before
        assert plan.total_ns <= min(seconds_of(traced, budget, keep) for keep in (ALL, NOTHING, "attention"))
        before = plan.total_ns
    assert {block.keep for block in plan.blocks} == {ALL} and plan.least_bytes == low and plan.most_bytes == high
    assert [block.name for block in plan.blocks] == [f"blocks.{i}" for i in range(5)]


def seconds_of(traced: Forecast, budget: int, keep: str) -> float:
    try:
        return plan_iteration(traced.iteration, budget, H200, same_for_all(keep)).total_ns
    except prfl_fast.InfeasibleBudget:
        return float("inf")


def test_more_of_everything_needs_more(tiny: str, traced: Forecast) -> None:
    small = least_bytes(traced.iteration, H200)
    options: dict[str, Any] = {"num_inference_steps": 3, "reward_blocks": 2, "reserve": 0}
    assert least_bytes(forecast(tiny, "96x64x13", **options).iteration, H200) > small
    assert least_bytes(forecast(tiny, SIZE, batch=2, **options).iteration, H200) > small
    assert least_bytes(forecast(tiny, SIZE, lora=2, **options).iteration, H200) < small


def test_a_network_of_the_callers_own(tiny: str) -> None:
    model = video_model(tiny)
    shape = model.latents_shape(96, 64, 9)
    named = plan_memory(tiny, SIZE, memory_budget="4GiB", num_inference_steps=2, reward_blocks=1)
    text = torch.Size((1, 512, 16))
    net = model.build()
    before = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    own = prfl_fast.plan_memory(
        net, shape, memory_budget="4GiB", num_inference_steps=2, guidance=True, reward_blocks=1,
        conditioning={"encoder_hidden_states": text},
    )  # fmt: skip
    assert {name: (id(p), p.requires_grad) for name, p in net.named_parameters()} == before
    assert (own.predicted_peak_bytes, own.total_ns, own.keeps) == (
        named.predicted_peak_bytes, named.total_ns, named.keeps
    )  # fmt: skip


def test_text_json_and_pictures(traced: Forecast, tmp_path: Path) -> None:
    low, high = least_bytes(traced.iteration, H200), most_bytes(traced.iteration, H200)
    plan = traced.plan((low + high) // 2, H200, curve=12)
    assert isinstance(plan, prfl_fast.MemoryPlan)
    assert IterationPlan.from_json(plan.to_json()) == plan
    for text in ("{", "[]", "{}", prfl_fast.MemoryPlan().to_json()):
        with pytest.raises(ValueError, match="text: expected the JSON of an iteration's plan"):
            IterationPlan.from_json(text)
    shown = str(plan)
    for words in ("weights", "gradients", "reward", "run again", "estimates for h200, not measurements", "together"):
        assert words in shown
    assert [point.budget_bytes for point in plan.curve][:: len(plan.curve) - 1] == [low, high]
    times = [point.total_ns for point in plan.curve]
    assert times == sorted(times, reverse=True) and len(times) == 12
    assert all(point.peak_bytes <= point.budget_bytes for point in plan.curve)
    assert len(terminal_curve(plan).splitlines()) == 13
    write_curve(plan, tmp_path / "curve.svg")
    root = ElementTree.fromstring((tmp_path / "curve.svg").read_text())
    assert root.tag.endswith("svg") and len([e for e in root.iter() if e.tag.endswith("circle")]) == 12
    with pytest.raises(ValueError, match="ends in .svg"):
        write_curve(plan, tmp_path / "curve.png")
    without = traced.plan(high, H200)
    assert terminal_curve(without) == ""
    with pytest.raises(ValueError, match="got one without"):
        write_curve(without, tmp_path / "none.svg")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "tpu"}, "device: expected one of"),
        ({"memory_budget": 1.5}, "memory_budget: expected a fraction"),
        ({"memory_budget": "much"}, "memory_budget: expected a size"),
        ({"memory_budget": None, "device": "cpu"}, "memory_budget: how much memory cpu has"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number from 1, got 0"),
        ({"gradient": "first"}, "gradient"),
        ({"guidance_gradient": "none"}, "guidance_gradient: expected 'both' or 'conditional'"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, sgd, none, got 'lion'"),
        ({"gpus": 0}, "gpus: expected a whole number from 1"),
        ({"batch": True}, "batch: expected a whole number from 1, got True"),
        ({"lora": 0}, "lora: expected a whole number from 1"),
        ({"reward_blocks": 6}, "num_blocks"),
        ({"reward_blocks": -1}, "reward_blocks: expected a whole number from 0"),
        ({"curve": -1}, "curve: expected a whole number from 0"),
        ({"conditioning": {}}, "conditioning: a model by name brings its own"),
        ({"latents_shape": "96x64x10"}, "size: expected frames a multiple of 4 plus 1"),
        ({"latents_shape": (1, 16, 3, 8, 12)}, "of a model by name expected a size"),
    ],
)
def test_bad_input_is_named(tiny: str, traced: Forecast, changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"latents_shape": SIZE, "memory_budget": "4GiB", **changes}
    with pytest.raises((ValueError, TypeError), match=words):
        plan_memory(tiny, **given)


def test_bad_input_beside_a_network(tiny: str) -> None:
    net = video_model(tiny).build()
    for shape in (None, "96x64x9", (1, 16, 0, 8, 12), (1, 16, 3.0, 8, 12), ()):
        with pytest.raises(TypeError, match="latents_shape: expected whole numbers above 0"):
            plan_memory(net, shape, memory_budget="4GiB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora: a network brings its own adapters"):
        plan_memory(net, (1, 16, 3, 8, 12), memory_budget="4GiB", lora=4)


@pytest.mark.parametrize(("gradient", "share"), [("full", 0.0), ("full", 0.6), ("last:1", 0.3)])
def test_a_chain_that_runs_under_the_plan(gradient: str, share: float) -> None:
    """Of the iteration without reward and optimiser: what a run needs is never above the plan, and not far below."""
    import diffusers

    torch.manual_seed(0)
    # Wide beside its latents, of which a plan counts more than this solver needs.
    config = {key: value for key, value in TINY.items() if key != "_class_name"}
    config |= {"num_attention_heads": 8, "ffn_dim": 256, "num_layers": 4}
    net = diffusers.WanTransformer3DModel(**config)
    text = torch.randn(1, 64, 16)
    shape, steps = (1, 16, 3, 16, 24), 3
    options: dict[str, Any] = {
        "num_inference_steps": steps, "gradient": gradient, "guidance": True, "optimizer": "none", "reward_blocks": 0,
        "reserve": 0, "conditioning": {"encoder_hidden_states": text},
    }  # fmt: skip
    found = forecast(net, shape, **options)
    low, high = least_bytes(found.iteration, H200), most_bytes(found.iteration, H200)
    plan = found.plan(low + int((high - low) * share), H200)
    weights = sum(storage_bytes(t) for t in (*net.parameters(), *net.buffers()))
    latents = torch.randn(shape, requires_grad=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    run: dict[str, Any] = {
        "num_inference_steps": steps, "gradient": gradient, "guidance_scale": 3.0,
        "conditioning": {"encoder_hidden_states": text}, "negative_conditioning": {"encoder_hidden_states": -text},
    }  # fmt: skip

    def gradients(plan: prfl_fast.MemoryPlan | None) -> list[torch.Tensor | None]:
        net.zero_grad()
        latents.grad = None
        prfl_fast.unrolled_sample(net, scheduler, latents, plan=plan, **run).latents.square().sum().backward()
        return [p.grad for p in (latents, *net.parameters())]

    gradients(None)  # tables that the model and the solver make once
    net.zero_grad()
    with LiveBytes() as live:
        planned = gradients(plan)
    measured, predicted = weights + live.peak, plan.predicted_peak_bytes or 0
    assert measured <= predicted
    assert measured >= 0.8 * predicted
    for one, other in zip(planned, gradients(None), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


# The planner of the iteration against enumeration: every keep-set of every block, walked event by event.

PLAIN = Device("plain", 1e9, 1e9, 1e9, 1e9, 0, "one unit of work is one nanosecond")


def random_piece(rng: random.Random, block: int | None, names: tuple[str, ...]) -> Piece:
    costs = []
    for keep in names:
        kept = rng.randint(0, 30)
        costs.append(
            BlockCost(
                keep, kept, kept + rng.randint(0, 20), rng.randint(0, 30), 0, rng.randint(0, 5),
                Work(product=3), Work(product=rng.randint(1, 20)),
            )
        )  # fmt: skip
    return Piece(block, tuple(costs))


def random_call(rng: random.Random, blocks: int) -> CallCost:
    pieces = [random_piece(rng, None, (ALL,))]
    for block in range(blocks):
        pieces.append(random_piece(rng, block, (ALL, NOTHING, "attention")))
        pieces.append(random_piece(rng, None, (ALL,)))
    return CallCost(tuple(pieces), rng.choice((20, 60, 160)), Work(product=rng.randint(1, 9)))


def walked(costs: tuple[BlockCost, ...], live: int, *, stays: bool, between: int = 0) -> int:
    """Peak of a forward, of what comes ``between``, and of its backward."""
    peak = live
    for cost in costs:
        peak = max(peak, live + cost.forward_peak)
        live += cost.kept
    peak = max(peak, live + between)
    for cost in reversed(costs):
        peak = max(peak, live + cost.backward + (cost.stays if stays else 0))
        live -= cost.kept
    return peak


def every(call: CallCost | None) -> list[tuple[BlockCost, ...]]:
    return [()] if call is None else list(itertools.product(*(piece.costs for piece in call.pieces)))


def enumerated(it: Iteration, budget: int) -> tuple[int | None, int]:
    """Least time within the budget, and the least budget, by trying everything."""
    forward, held = it.call.forward.product, it.held_bytes
    fixed = it.calls * forward + (0 if it.reward is None else it.reward.forward.product)
    rollout = held + it.call.plain_peak
    calls = [(walked(c, held, stays=False), sum(x.walked.product for x in c)) for c in every(it.call)]
    best: list[tuple[int, int]] = []  # peak, time
    for reward in every(it.reward):
        own = sum(x.walked.product for x in reward)
        alone = max(walked(reward, held, stays=False), rollout)
        for peak, time in calls:
            best.append((max(peak, alone), fixed + own + it.differentiated * (time + forward)))
        inside = walked(reward, 0, stays=False)
        beside = max(inside, it.call.plain_peak if it.beside else 0)
        for last in every(it.call):
            peak = max(walked(last, held, stays=True, between=beside), rollout)
            time = fixed + own + sum(x.walked.product for x in last)
            if it.differentiated == 1:
                best.append((peak, time))
            else:
                best += [(max(peak, p), time + (it.differentiated - 1) * (t + forward)) for p, t in calls]
    return min((time for peak, time in best if peak <= budget), default=None), min(peak for peak, _ in best)


@pytest.mark.parametrize("seed", range(40))
def test_the_fastest_of_all_plans(seed: int) -> None:
    rng = random.Random(seed)
    it = Iteration(
        call=random_call(rng, 2),
        reward=random_call(rng, 1) if seed % 3 else None,
        calls=5,
        differentiated=(1, 2, 5)[seed % 3],
        held={"weights": rng.randint(0, 50)},
        beside=seed % 2 == 1,
    )
    low = enumerated(it, 0)[1]
    assert least_bytes(it, PLAIN) == low
    for budget in (low, low + 3, low + 11, low + 30, low + 500):
        outcome = plan_iteration(it, budget, PLAIN)
        assert outcome.peak_bytes <= budget
        assert outcome.total_ns == enumerated(it, budget)[0]
        assert enumerated(it, outcome.peak_bytes)[0] == outcome.total_ns  # and its peak is no understatement
    with pytest.raises(prfl_fast.InfeasibleBudget):
        plan_iteration(it, low - 1, PLAIN)
