"""``prfl-fast demo --study``: the long comparison, an hour or two on two cores.

Several training seeds (rewards and alignment both), learning rate and flow-matching weight tuned for every arm, equal
compute time and equal updates, where along the chain the reward looks, and what the reward's pretrained backbone is
worth.

Every job is a process of one thread, two at a time; its training seconds are processor time, so that other work on
the machine does not change who wins. Finished jobs lie in ``output/study.jsonl`` and are not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from prfl_fast.demo.align import Arm, Rewards, align
from prfl_fast.demo.data import Material, prepare
from prfl_fast.demo.evaluate import total_error, verdict_of_latents, verdict_of_model
from prfl_fast.demo.net import draw_noise, make_net
from prfl_fast.demo.rewards import (
    PixelReward,
    latent_accuracy,
    make_latent_reward,
    pixel_accuracy,
    train_latent_reward,
    train_pixel_reward,
    trained,
)
from prfl_fast.demo.sample import STEPS
from prfl_fast.demo.settings import ARMS, DemoSettings
from prfl_fast.demo.stages import Stages
from prfl_fast.demo.study_tables import TINY_PLAN, Plan, as_text, make_tables

TUNING_SEED = 0
JUDGED_SEED, TUNING_NOISE = 779, 780  # of initial noise that no training draws
WORKERS = 2

_TAPS = {"early": (6,), "middle": (8,), "all three": (6, 8, STEPS)}


@dataclass(frozen=True)
class Job:
    """One alignment: which arm, which training seed, how long, on which backbone's reward, for tuning or judged."""

    arm: Arm
    seed: int
    seconds: float | None
    updates: int | None = None
    backbone: str = "pretrained"
    tuning: bool = False

    def key(self) -> str:
        """Identity of the job in the file of finished ones."""
        return json.dumps(asdict(self), sort_keys=True)


def run_study(settings: DemoSettings) -> Path:
    """Run what is not done yet and write ``output/study.json``, which is also what this returns."""
    plan = TINY_PLAN if settings.tiny else Plan(arm_seconds=settings.seconds)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    finished = _Finished(output / "study.jsonl")
    arms = {arm.key: arm for arm in ARMS}

    run = _Runner(settings, plan, finished)
    accuracies = run.rewards([TUNING_SEED, *plan.seeds])
    tuning = run.jobs(
        Job(replace(arm, rate=rate, flow_weight=weight), TUNING_SEED, plan.tuning_seconds, tuning=True)
        for arm in ARMS
        if arm.reward is not None
        for rate, weight in plan.grid(arm)
    )
    for key in [arm.key for arm in ARMS if arm.reward is not None]:
        best = min((row for row in tuning if row["job"]["arm"]["key"] == key), key=lambda row: row["total_error"])
        chosen = best["job"]["arm"]
        arms[key] = replace(arms[key], rate=chosen["rate"], flow_weight=chosen["flow_weight"])
    arms["flow_matching"] = replace(arms["flow_matching"], rate=arms["full"].rate)
    supervised: list[Arm] = [
        replace(arms["full"], key=f"full_{name}", label=f"Full chain, {name}", supervise=taps)
        for name, taps in _TAPS.items()
    ]
    timed, seeds = plan.arm_seconds, plan.seeds
    tables = {
        "equal time": [Job(arm, seed, timed) for seed in seeds for arm in arms.values()],
        "equal updates": [Job(arm, seed, None, plan.updates) for seed in seeds for arm in arms.values()],
        "supervised": [Job(arm, seed, timed) for seed in seeds for arm in (arms["full"], *supervised)],
        "backbone": [
            Job(arms["prfl"], seed, timed, backbone=backbone)
            for seed in seeds
            for backbone in ("pretrained", "random")
        ],
    }
    run.jobs(job for jobs in tables.values() for job in jobs)  # all in one pool; each table then finds its own
    done = {table: run.jobs(jobs) for table, jobs in tables.items()}
    references = run.references()
    content = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}",
        "commit": _commit(),
        "seconds": sum(row["wall_seconds"] for row in finished.rows.values()) / WORKERS,
        "plan": asdict(plan),
        "tables": make_tables(tuning, done, references, accuracies, plan),
        "runs": list(finished.rows.values()),
    }
    target = output / "study.json"
    target.write_text(json.dumps(content, indent=1), encoding="utf-8")
    for table in content["tables"]:
        print(as_text(table))
    print(f"written: {target}")
    return target


class _Finished:
    """Rows of finished jobs, one JSON object a line: appended as they come, read again after an interruption."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole, _, torn = text.rpartition("\n")
            for line in whole.splitlines():
                row = json.loads(line)
                self.rows[row["key"]] = row
            if torn:  # a process that was killed while it wrote: that job is done again
                path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class _Runner:
    """Runs jobs in worker processes and keeps their rows."""

    def __init__(self, settings: DemoSettings, plan: Plan, finished: _Finished) -> None:
        self._settings, self._plan, self._finished = settings, plan, finished

    def rewards(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Trains the rewards of every seed; gives their accuracies."""
        kinds = ("latent", "pixel", "random")
        work = [(f"reward {kind} {seed}", (self._settings, kind, seed)) for seed in seeds for kind in kinds]
        return self._run(_train_reward, work)

    def jobs(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """Runs alignments."""
        return self._run(_run_job, [(job.key(), (self._settings, self._plan, job)) for job in jobs])

    def references(self) -> dict[str, dict[str, float]]:
        """The judges' means of the mixture and of the base model."""
        material = _material(self._settings)
        reward = _rewards(self._settings, material, self._plan.seeds[0], "pretrained").latent
        noise = draw_noise(self._plan.judged, JUDGED_SEED)
        real = verdict_of_latents(material.held_out.latents[: self._plan.judged], material.codec, reward)
        before = verdict_of_model(material.base, noise, material.codec, reward)
        return {"Training mixture": _means(real), "Before": _means(before)}

    def _run(self, function: Callable[[Any], dict[str, Any]], work: list[tuple[str, Any]]) -> list[dict[str, Any]]:
        # A key may stand twice (the same alignment in two tables): it is done once.
        missing = {key: arguments for key, arguments in work if key not in self._finished.rows}
        if missing:
            # Spawned: a forked torch with threads running may hang.
            context = multiprocessing.get_context("spawn")
            packed = [(function, key, arguments) for key, arguments in missing.items()]
            with context.Pool(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                rows = pool.imap_unordered(_keyed, packed)
                for row in tqdm(rows, total=len(packed), desc=function.__name__.strip("_")):
                    self._finished.add(row)
                pool.close()
                pool.join()
        return [self._finished.rows[key] for key, _ in work]


def _keyed(packed: tuple[Callable[[Any], dict[str, Any]], str, Any]) -> dict[str, Any]:
    function, key, arguments = packed
    start = time.perf_counter()
    row = function(arguments)
    return {"key": key, **row, "wall_seconds": time.perf_counter() - start}


def _stages(settings: DemoSettings) -> Stages:
    # The rewards depend on no arm's settings: tuning an arm again leaves them as they are.
    return Stages(Path(settings.output) / "stages", {"seed": settings.seed, "sizes": asdict(settings.sizes)})


def _material(settings: DemoSettings) -> Material:
    return prepare(settings, _stages(settings), progress=False)


def _train_reward(arguments: tuple[DemoSettings, str, int]) -> dict[str, Any]:
    settings, kind, seed = arguments
    material, sizes = _material(settings), settings.sizes
    reward: nn.Module
    if kind == "pixel":
        reward, _ = train_pixel_reward(
            material.base,
            material.codec,
            material.train,
            seconds=sizes.pixel_reward_seconds,
            seed=seed,
            clock=time.process_time,
            progress=False,
        )
        accuracy: Any = pixel_accuracy(reward, material.codec, material.held_out)
    else:
        trunk = material.base if kind == "latent" else make_net(1000 + seed)
        reward, _ = train_latent_reward(
            trunk,
            material.train,
            seconds=sizes.latent_reward_seconds,
            seed=seed,
            clock=time.process_time,
            progress=False,
        )
        accuracy = latent_accuracy(reward, material.held_out)
    _stages(settings).save(f"study_{kind}_{seed}", reward.state_dict(), {})
    return {"kind": kind, "seed": seed, "accuracy": accuracy}


def _rewards(settings: DemoSettings, material: Material, seed: int, backbone: str) -> Rewards:
    latent, pixel = make_latent_reward(material.base), PixelReward()
    for module, kind in ((latent, "latent" if backbone == "pretrained" else "random"), (pixel, "pixel")):
        done = _stages(settings).load(f"study_{kind}_{seed}")
        if done is None:
            raise ValueError(f"output: {settings.output}/stages lacks the {kind} reward of seed {seed}; start anew")
        trained(module, done[0])
    return Rewards(latent, pixel, material.codec)


def _run_job(arguments: tuple[DemoSettings, Plan, Job]) -> dict[str, Any]:
    settings, plan, job = arguments
    material = _material(settings)
    rewards = _rewards(settings, material, job.seed, job.backbone)
    aligned = align(
        material.base,
        job.arm,
        rewards,
        material.train.latents,
        seed=job.seed,
        seconds=job.seconds,
        updates=job.updates,
        memory_budget=settings.memory_budget,
        clock=time.process_time,
        progress=False,
    )
    noise = draw_noise(plan.judged, TUNING_NOISE if job.tuning else JUDGED_SEED)
    verdict = verdict_of_model(aligned.net, noise, material.codec, rewards.latent)
    errors = total_error(verdict)
    return {
        "job": asdict(job),
        "updates": aligned.updates,
        "seconds": aligned.seconds,
        **_means(verdict),
        "total_error": float(errors.mean()),
        "errors": [round(value, 4) for value in errors.tolist()],
    }


def _means(verdict: Any) -> dict[str, float]:
    keys = ("motion_error", "structure_error", "net_move", "reward")
    return {key: verdict.mean(key) for key in keys} | {"diversity": verdict.diversity}


def _commit() -> str:
    """The commit that ran, where the package lies in a git checkout; otherwise its version."""
    import prfl_fast

    folder = Path(__file__).parent
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else f"version {prfl_fast.__version__}"
