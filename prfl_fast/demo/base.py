"""The demo's base model: a small Wan transformer that has learned the mixture of good and broken clips.

The package carries a checkpoint, which this module made (some 40 minutes on one core):
``python -m prfl_fast.demo.base --output prfl_fast/demo/base.safetensors``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from prfl_fast.demo.clips import make_clips
from prfl_fast.demo.codec import PatchCodec
from prfl_fast.demo.judges import judge
from prfl_fast.demo.net import CHANNELS, CONFIG, TRAIN_TIMESTEPS, add_noise, draw_noise, make_net, prompt
from prfl_fast.demo.sample import sample_latents

CHECKPOINT = "base.safetensors"
SIGMA_SHIFT = 5.0  # of the noise levels that training draws, as Wan's


@dataclass
class Curve:
    """Loss against updates, thinned to one point per ``every`` updates (their mean)."""

    every: int
    updates: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    _sum: float = 0.0

    def add(self, update: int, loss: float) -> None:
        """Note the loss of one update, counted from 1."""
        self._sum += loss
        if update % self.every == 0:
            self.updates.append(update)
            self.loss.append(self._sum / self.every)
            self._sum = 0.0


def draw_sigmas(count: int, generator: torch.Generator, shift: float = SIGMA_SHIFT) -> Tensor:
    """Noise levels ``[count]``: uniform, then shifted towards noise by ``s u / (1 + (s - 1) u)`` (arXiv 2403.03206)."""
    uniform = torch.rand(count, generator=generator)
    return shift * uniform / (1 + (shift - 1) * uniform)


def flow_matching_loss(net: nn.Module, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at random noise levels (arXiv 2210.02747)."""
    sigmas = draw_sigmas(len(latents), generator)
    noisy, velocity = add_noise(latents, sigmas, generator)
    predicted = net(noisy, sigmas * TRAIN_TIMESTEPS, **prompt(len(latents)), return_dict=False)[0]
    loss: Tensor = (predicted - velocity).square().mean()
    return loss


def train_base(
    net: nn.Module,
    latents: Tensor,
    *,
    updates: int,
    generator: torch.Generator,
    batch: int = 64,
    peak_rate: float = 2e-3,
    watch: Callable[[int, nn.Module], None] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Curve]:
    """Flow matching on ``latents`` [N, C, F, H, W] by AdamW with warm-up and cosine; returns the averaged weights.

    ``watch(update, averaged)`` is called every tenth of the way.
    """
    averaged = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    curve = Curve(max(1, updates // 100))
    warm_up = min(500, max(1, updates // 10))
    net.train()
    for update in tqdm(range(1, updates + 1), desc="base model", unit="update", disable=not progress):
        done = (update - warm_up) / max(1, updates - warm_up)
        rate = update / warm_up if update < warm_up else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * rate
        rows = torch.randint(len(latents), (batch,), generator=generator)
        loss = flow_matching_loss(net, latents[rows], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + update) / (10 + update))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), 1 - decay)
        curve.add(update, float(loss.detach()))
        if watch is not None and update % max(1, updates // 10) == 0:
            watch(update, averaged)
    return averaged.eval(), curve


def save_base(path: str | Path, net: nn.Module, codec: PatchCodec, curve: Curve) -> None:
    """Write model, codec and the curve of its training to one file; weights in float16 to keep it small."""
    tensors = {f"net.{name}": value.detach().to(torch.float16).contiguous() for name, value in net.state_dict().items()}
    tensors |= {name: value.contiguous() for name, value in codec.state().items()}
    config: Any = net.config
    changes = {key: config[key] for key in CONFIG}
    notes = {"config": json.dumps(changes), "updates": json.dumps(curve.updates), "loss": json.dumps(curve.loss)}
    save_file(tensors, path, notes)


def load_base(path: str | Path | None = None) -> tuple[nn.Module, PatchCodec, Curve]:
    """Model (float32, eval mode), codec and training curve of a file of :func:`save_base`; None: the package's own."""
    source = str(files("prfl_fast.demo") / CHECKPOINT) if path is None else str(path)
    if not Path(source).is_file():
        raise FileNotFoundError(f"base model: no file {source}; prfl-fast demo --from-scratch trains one")
    with safe_open(source, framework="pt") as archive:
        notes = archive.metadata()
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    net = make_net(0, **json.loads(notes["config"]))
    net.load_state_dict({k.removeprefix("net."): v.float() for k, v in tensors.items() if k.startswith("net.")})
    updates, loss = json.loads(notes["updates"]), json.loads(notes["loss"])
    codec = PatchCodec.from_state({k: v for k, v in tensors.items() if k.startswith("codec.")})
    return net.eval(), codec, Curve(1, updates, loss)


def main(arguments: list[str] | None = None) -> int:
    """Make the checkpoint that the package carries."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--updates", type=int, default=11000, help="of one round")
    parser.add_argument("--rounds", type=int, default=2, help="each starts from the last's average, at half its rate")
    parser.add_argument("--start", help="a checkpoint to go on from, as after its first round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--clips", type=int, default=65536)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    generator = torch.Generator().manual_seed(options.seed)
    parts = [make_clips(4096, generator).videos for _ in range(max(1, options.clips // 4096))]
    codec = PatchCodec.fit(parts[0], CHANNELS)
    latents = torch.cat([codec.encode(part) for part in parts])
    real = judge(codec.decode(latents[:1024]))
    print(f"mixture: motion {real.motion_error.mean():.3f}, structure {real.structure_error.mean():.3f}")

    def watch(update: int, averaged: nn.Module) -> None:
        seen = judge(codec.decode(sample_latents(averaged, draw_noise(256, 12345))))
        print(
            f"update {update}: motion {seen.motion_error.mean():.3f}, structure {seen.structure_error.mean():.3f}, "
            f"net move {seen.net_move.mean():.2f}, mass {seen.mass.mean():.1f}",
            flush=True,
        )

    net, curve = (make_net(options.seed), Curve(1)) if options.start is None else load_base(options.start)[::2]
    for done in range(0 if options.start is None else 1, options.rounds):
        net, more = train_base(
            net.requires_grad_(True),
            latents,
            updates=options.updates,
            batch=options.batch,
            generator=generator,
            peak_rate=2e-3 / 2**done,
            watch=watch,
        )
        curve.updates += [done * options.updates + update for update in more.updates]
        curve.loss += more.loss
        save_base(options.output, net, codec, curve)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
