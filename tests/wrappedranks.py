"""The work of one rank for the tests of sharded and replicated networks; on two processes, over gloo.

Each rank has one sample of a global batch of two. Both wrappers average gradients over the ranks, so the local loss is
doubled to give the gradient of the summed loss of the whole batch.
"""

from __future__ import annotations

import warnings
from typing import Any

import familyloop
import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 2
GRAPHS = ("chain", "steps")
WRAPPERS = ("fsdp", "ddp")
RANDOM = ("random:2", "prfl")
SEED = 0  # of rank 0's generator; rank 1's follows


def case_of(lora: bool) -> familyloop.Case:
    """A guided Wan, trained in full, or frozen with LoRA at a scale."""
    case = familyloop.Case("wan", torch.float32, lora=lora, batch=RANKS)
    if lora:
        for name, parameter in case.net.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return case


def part_of(case: familyloop.Case, rank: int) -> familyloop.Case:
    """The rank's own sample."""

    def own(value: Tensor) -> Tensor:
        return value.detach()[rank : rank + 1].clone().requires_grad_()

    assert case.negative is not None
    case.latents, case.text, case.negative = own(case.latents), own(case.text), own(case.negative)
    case.conditioning["encoder_hidden_states"] = case.text
    case.weights = RANKS * case.weights[rank : rank + 1]
    return case


def wrapped(net: Any, kind: str) -> Any:
    """Blocks and root sharded by FSDP2, or the whole in DDP."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(grad: Any) -> Tensor:
    """A gradient, gathered where it is sharded."""
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def gradients(case: familyloop.Case, net: nn.Module) -> dict[str, Tensor]:
    """Whole gradients of the parameters, and the sample's own; ``.grad`` is taken away."""
    groups: dict[str, list[Tensor]] = {"latents": [], "weights": [], "lora": []}
    named = [("latents", case.latents), *net.named_parameters()]
    for name, leaf in named:
        if leaf.requires_grad:
            grad = torch.zeros(leaf.shape) if leaf.grad is None else whole(leaf.grad)
            group = "latents" if leaf is case.latents else "lora" if "lora_" in name else "weights"
            groups[group].append(grad / RANKS if leaf is case.latents else grad)
        leaf.grad = None
    return {k: torch.cat([t.detach().double().flatten() for t in v]) for k, v in groups.items() if v}


class Injected(RuntimeError):
    """A fault on every rank."""


def fault(case: familyloop.Case, net: nn.Module, graph: str) -> str:
    """A backward that fails in its second recomputation on every rank: what is left in ``.grad``."""
    sample = case.sample(graph=graph)
    kept = [torch.ones_like(p) if p.requires_grad else None for p in net.parameters()]
    for parameter, grad in zip(net.parameters(), kept, strict=True):
        parameter.grad = grad
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Injected

    handle = net.register_forward_pre_hook(fail)
    result = "no error"
    try:
        case.loss(sample.latents).backward()
        if graph == "steps":
            sample.backward()
    except Injected:
        same = all(p.grad is g for p, g in zip(net.parameters(), kept, strict=True))
        ones = all(bool(whole(g).eq(1).all()) for g in kept if g is not None)
        result = "as before" if same and ones else "changed"
    handle.remove()
    for leaf in (case.latents, *net.parameters()):
        leaf.grad = None
    return result


def one_kind(rank: int, kind: str, lora: bool) -> dict[str, Any]:
    """Everything about one wrapper around one network."""
    found: dict[str, Any] = {}
    case = part_of(case_of(lora), rank)
    inner = case.net
    case.net = wrapped(inner, kind)
    for graph in GRAPHS:
        case.backward(graph=graph)
        found[f"{kind} {lora} {graph}"] = gradients(case, inner)
    if not lora:
        for graph in GRAPHS:
            case.backward(graph=graph)
        return found | {f"{kind} twice": gradients(case, inner)}
    for mode in RANDOM:
        sample = case.sample(gradient=mode, generator=torch.Generator().manual_seed(SEED + rank))
        case.loss(sample.latents).backward()
        steps = sample.gradient_norms.isfinite().nonzero().flatten().tolist()
        found[f"{kind} {mode}"] = {"steps": steps, "step": sample.step, **gradients(case, inner)}
    for graph in GRAPHS:
        found[f"{kind} {graph} fault"] = fault(case, inner, graph)
        case.backward(graph=graph)
        found[f"{kind} {graph} after"] = gradients(case, inner)
    return found


def work(rank: int, folder: str) -> None:
    """Run every case and write what came to ``folder/<rank>.pt``."""
    torch.set_num_threads(1)
    # torch warns that the network returns a view; nothing is written into it.
    warnings.filterwarnings("ignore", ".*FSDP2-wrapped module")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for kind in WRAPPERS:
        for lora in (False, True):
            found |= one_kind(rank, kind, lora)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
