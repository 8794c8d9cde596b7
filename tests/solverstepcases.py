"""Solver steps that every backend has to get right, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prfl_fast import ops
from prfl_fast.ops import StepCoefficients, solver_step

Layout = Callable[[Tensor], Tensor]


def aligned(tensor: Tensor) -> Tensor:
    return tensor


def unaligned(tensor: Tensor) -> Tensor:
    """The same values, one element behind an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    """The same values, the dimensions in memory the other way round."""
    return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))


@dataclass(frozen=True)
class Case:
    """``sizes``: entries out, entries in, noise draws. ``mask``: shape of a random one, or None."""

    shape: tuple[int, ...] = (3, 5, 7)
    sizes: tuple[int, int, int] = (3, 2, 1)
    dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype = torch.float32
    noise_dtype: torch.dtype = torch.float32
    guided: bool = False
    second_dtype: torch.dtype | None = None  # of the unconditional output, where it is another
    guidance_dtype: torch.dtype | None = None
    mask: tuple[int, ...] | None = None
    copy: torch.dtype | None = None
    layout: Layout = aligned
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True)  # state, output, unconditional output, noise


HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

CASES = {
    "plain": Case(),
    "one of each": Case(sizes=(1, 1, 0)),
    "many": Case(sizes=(6, 7, 3), shape=(2, 37)),
    "as many as fit": Case(sizes=(16, 13, 2), shape=(261,)),
    "more than fit": Case(sizes=(3, 15, 2), shape=(5,)),
    "float64": Case(dtype=F64, output_dtype=F64, noise_dtype=F64, guided=True, mask=(3, 1, 7)),
    "float64 of narrower outputs": Case(dtype=F64, output_dtype=F32, guided=True, copy=F32),
    "half outputs": Case(output_dtype=HALF, guided=True, copy=HALF),
    "double outputs": Case(output_dtype=F64, noise_dtype=HALF, copy=F64),
    "guided": Case(guided=True, mask=(3, 5, 7)),
    "half outputs guided in float32": Case(output_dtype=HALF, guided=True, guidance_dtype=F32, mask=(3, 5, 7)),
    "float32 outputs guided in half": Case(guided=True, guidance_dtype=HALF, copy=HALF),
    "double outputs guided in half": Case(output_dtype=F64, guided=True, guidance_dtype=HALF),
    "half outputs guided in double": Case(dtype=F64, output_dtype=HALF, guided=True, guidance_dtype=F64),
    "outputs of two dtypes": Case(output_dtype=HALF, guided=True, second_dtype=F32, layout=unaligned, mask=(3, 1, 7)),
    # Plain torch runs it, on every backend.
    "outputs of two dtypes, one double": Case(output_dtype=F64, guided=True, second_dtype=HALF),
    "float64 of half outputs": Case(dtype=F64, output_dtype=HALF, guided=True, sizes=(5, 2, 1)),
    "masked": Case(mask=(3, 1, 7), sizes=(2, 3, 0)),
    "mask of one row": Case(mask=(7,), guided=True, copy=HALF),
    "mask of five strides": Case(shape=(2, 3, 2, 3, 2, 3), mask=(2, 1, 2, 1, 2, 1), sizes=(2, 2, 0)),
    "unaligned": Case(shape=(2, 1027), layout=unaligned, guided=True, mask=(2, 1), copy=HALF),
    "with gaps": Case(layout=strided, guided=True, mask=(3, 5, 7)),
    "transposed": Case(layout=transposed, mask=(3, 5, 1)),
    "one element": Case(shape=(1,), guided=True, mask=(1,)),
    "empty": Case(shape=(0, 4), guided=True, mask=(1, 4), copy=HALF),
    "several blocks": Case(shape=(3, 1025), sizes=(2, 2, 0)),
    "only the output": Case(needs=(False, True, False, False), guided=True, mask=(3, 1, 1)),
    "only the unconditional output": Case(needs=(False, False, True, False), guided=True),
    "only the state": Case(needs=(True, False, False, False), guided=True, mask=(3, 1, 1)),
}
# bfloat16 is left out of the list above: Triton's interpreter gets it wrong.
BFLOAT16_CASES = {
    "bfloat16 outputs": Case(output_dtype=BF16, noise_dtype=BF16, guided=True, mask=(3, 5, 7), copy=BF16),
    "bfloat16 and float16 outputs": Case(output_dtype=BF16, guided=True, second_dtype=HALF),
    "bfloat16 outputs guided in float32": Case(output_dtype=BF16, guided=True, guidance_dtype=F32),
    "float64 of bfloat16 outputs": Case(dtype=F64, output_dtype=BF16, guided=True, shape=(2, 263)),
    "bfloat16 unaligned": Case(output_dtype=BF16, layout=unaligned, shape=(517,), copy=BF16),
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out holds NaN: an element that nobody writes can't pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def random_coefficients(n_out: int, n_in: int, n_noise: int) -> StepCoefficients:
    """Dense but for a few zeros, which the kernels skip."""
    matrix = torch.randn(n_out, n_in + 1 + n_noise, dtype=torch.float64).clamp(-2, 2)
    matrix[torch.rand_like(matrix) < 0.15] = 0.0
    matrix[0, [0, n_in]] = torch.tensor([0.75, -1.1], dtype=torch.float64)
    rows = matrix.tolist()
    return StepCoefficients(
        tuple(tuple(r[:n_in]) for r in rows), tuple(r[n_in] for r in rows), tuple(tuple(r[n_in + 1 :]) for r in rows)
    )


@dataclass
class Problem:
    """Inputs of a case, drawn once and used on every backend."""

    case: Case
    coefficients: StepCoefficients
    tensors: list[Tensor]  # state, output, unconditional output, noise
    mask: Tensor | None
    cotangents: list[Tensor]
    guidance: float = 3.7

    @classmethod
    def draw(cls, case: Case, device: str = "cpu") -> Problem:
        n_out, n_in, n_noise = case.sizes
        outputs = [case.output_dtype, case.second_dtype or case.output_dtype][: 1 + case.guided]
        dtypes = [case.dtype] * n_in + outputs + [case.noise_dtype] * n_noise
        kinds = [0] * n_in + [1] + [2] * case.guided + [3] * n_noise
        # Clamped, so that the bound below can be stated.
        tensors = [
            case.layout(torch.randn(case.shape).clamp(-3, 3).to(device, dtype)).requires_grad_(case.needs[kind])
            for dtype, kind in zip(dtypes, kinds, strict=True)
        ]
        mask = None if case.mask is None else torch.rand(case.mask, device=device) < 0.5
        results = [case.dtype] * n_out + ([] if case.copy is None else [case.copy])
        cotangents = [torch.randn(case.shape).clamp(-3, 3).to(device, dtype) for dtype in results]
        return cls(case, random_coefficients(*case.sizes), tensors, mask, cotangents)

    @property
    def guidance_dtype(self) -> torch.dtype:
        """Of the case's arithmetic; the state's where there is no guidance."""
        if not self.case.guided:
            return self.case.dtype
        second = self.case.second_dtype or self.case.output_dtype
        return self.case.guidance_dtype or torch.promote_types(self.case.output_dtype, second)

    @property
    def bound(self) -> float:
        """Largest sum of absolute terms, in any result or gradient: guidance lets 3 grow to (2 s + 1) 3 < 26."""
        return 26.0 * 2.0 * max(sum(self.case.sizes) + 1, self.case.sizes[0] + 2)

    def run(self, backend: str | None) -> tuple[Tensor, ...]:
        n_in = self.case.sizes[1]
        outputs = n_in + 1 + self.case.guided
        arguments = (tuple(self.tensors[:n_in]), tuple(self.tensors[n_in:outputs]), self.coefficients)
        keywords = {
            "guidance_scale": self.guidance,
            "guidance_dtype": self.case.guidance_dtype,
            "noise": tuple(self.tensors[outputs:]),
            "latent_mask": self.mask,
            "model_dtype": self.case.copy,
        }
        if backend is None:
            return solver_step(*arguments, **keywords)
        with ops.backend(backend):
            return solver_step(*arguments, **keywords)

    def gradients(self, results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        wanted = [tensor for tensor in self.tensors if tensor.requires_grad]
        pairs = [(r, g) for r, g in zip(results, self.cotangents, strict=True) if r.requires_grad]
        ends, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(ends, wanted, cotangents, allow_unused=True)


def check(case: Case, backend: str | None, device: str = "cpu") -> None:
    """Results and gradients on ``backend`` are the reference's, up to roundings."""
    problem = Problem.draw(case, device)
    expected = problem.run("reference")
    expected_gradients = problem.gradients(expected)
    with poisoned():
        actual = problem.run(backend)
        gradients = problem.gradients(actual)
    pairs = [*zip((*actual, *gradients), (*expected, *expected_gradients), strict=True)]
    guided_in = problem.guidance_dtype
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None:
            continue
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.device == theirs.device
        # Three roundings to guidance's dtype, the sum's own (float64) and the result's: each at most half an eps of
        # what has been added up, on both sides.
        narrowest = max(torch.finfo(dtype).eps for dtype in (mine.dtype, case.dtype, guided_in))
        assert torch.allclose(mine.double(), theirs.double(), rtol=0, atol=5 * narrowest * problem.bound)
        assert not mine.isnan().any()
    # The bound above is for the worst case. Guidance has the same roundings on every backend, and float64 sums, which
    # differ in their last bit, round to the same float32 but for near ties: hardly any element may differ at all.
    if case.dtype == torch.float32:
        told = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        different = sum(int((mine != theirs).sum()) for mine, theirs in told)
        assert different <= 0.01 * sum(mine.numel() for mine, _ in told)
