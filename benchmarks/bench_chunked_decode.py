"""Peak memory and time of forward and backward through a video decoder: plain ``vae.decode`` against ``PixelDecoder``.

    python benchmarks/bench_chunked_decode.py --output benchmarks/results/chunked_decode_cpu.json

An AutoencoderKLWan with the published layout (four levels, two doublings of time, two residual blocks a level) and a
twelfth of its width, random weights, latents of 6 x 8. Bytes are those of all live tensors above the start, counted
storage by storage. No figure is written unless frames and gradient are those of the plain decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor

import prfl_fast
from prfl_fast.memory.trace import LiveBytes


def small_vae() -> Any:
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)


def plain(vae: Any) -> Callable[[Tensor], Tensor]:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

    def decode(latents: Tensor) -> Tensor:
        frames: Tensor = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return (frames * 0.5 + 0.5).clamp(0, 1)

    return decode


def run(decode: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
    leaf = latents.clone().requires_grad_()
    frames = decode(leaf)
    (gradient,) = torch.autograd.grad(frames.square().mean(), leaf)
    return frames.detach(), gradient


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--latent-frames", type=int, nargs="+", default=[1, 6, 11, 21])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    vae, about, rows = small_vae(), record.about(), []
    ways = {"vae.decode": plain(vae), "PixelDecoder": prfl_fast.PixelDecoder(vae)}
    for count in args.latent_frames:
        latents = torch.randn(1, vae.config.z_dim, count, 6, 8, generator=torch.Generator().manual_seed(count))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, decode in ways.items():
                start = time.process_time()
                run(decode, latents)
                seconds[name].append(time.process_time() - start)
        first: tuple[Tensor, Tensor] | None = None
        for name, decode in ways.items():
            with LiveBytes() as live:
                frames, gradient = run(decode, latents)
            first = first or (frames, gradient)
            difference = float((gradient - first[1]).norm() / first[1].norm())
            if not torch.equal(frames, first[0]) or difference > 1e-6:
                raise SystemExit(f"{name}, {count} latent frames: differs by {difference:.1e}; nothing is reported")
            rows.append(
                {
                    "way": name,
                    "latent_frames": count,
                    "frames": frames.shape[2],
                    "peak_bytes": live.peak,
                    "processor_seconds": round(statistics.median(seconds[name]), 3),
                    "relative_difference": difference,
                }
            )
    record.write({"model": "AutoencoderKLWan, base_dim 8", "about": about, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
