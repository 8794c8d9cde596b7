"""The numbers of one solver step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCoefficients:
    """Coefficients of one step, float64.

    Attributes:
        A: ``[n_out][n_in]``, from the state before the step to the state after it.
        B: ``[n_out]``, from the network's output.
        C: ``[n_out][n_noise]``, from the noise draws.
    """

    A: tuple[tuple[float, ...], ...]
    B: tuple[float, ...]
    C: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.A or not len(self.A) == len(self.B) == len(self.C):
            raise ValueError(
                "coefficients: expected A, B and C with one row per output entry, "
                f"got {len(self.A)}, {len(self.B)} and {len(self.C)} rows"
            )
        if len({len(row) for row in self.A}) != 1 or len({len(row) for row in self.C}) != 1:
            raise ValueError("coefficients: expected rows of one length in A and in C")

    @property
    def num_outputs(self) -> int:
        """Entries of the state after the step."""
        return len(self.A)

    @property
    def num_inputs(self) -> int:
        """Entries of the state before the step."""
        return len(self.A[0])

    @property
    def num_noise(self) -> int:
        """Noise draws of the step."""
        return len(self.C[0])
