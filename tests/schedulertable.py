"""Every scheduler class that diffusers exports: the settings under which it is supported, or that it is refused.

``SUPPORTED`` holds configurations, class by class: *linear* ones, which become a table of coefficients, and *nonlinear*
ones, which keep their own step in the graph. ``REFUSED`` holds what a user reads. A class that a new version of
diffusers brings belongs here, in one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prfl_fast.solvers import NonFiniteSchedulerError

Settings = Mapping[str, Any]

EPSILON: Settings = {}
V: Settings = {"prediction_type": "v_prediction"}
SAMPLE: Settings = {"prediction_type": "sample"}
FLOW: Settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
KARRAS: Settings = {"use_karras_sigmas": True}
EXPONENTIAL: Settings = {"use_exponential_sigmas": True}
BETA: Settings = {"use_beta_sigmas": True}
SIGMA_MIN: Settings = {"final_sigmas_type": "sigma_min"}
ZERO_SNR: Settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}
UNCLIPPED: Settings = {"clip_sample": False}
SDE: Settings = {"algorithm_type": "sde-dpmsolver++"}
# Half of the elements are cut, so that the rest have a gradient.
THRESHOLD: Settings = {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 100.0}
BH1: Settings = {"solver_type": "bh1", **SIGMA_MIN}


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: class, its number in the list, settings in short.
        kind: class name.
        settings: for its constructor.
        options: for ``set_timesteps``, beside the number of steps.
        linear: False where its step stays in the graph.
        steps: numbers of steps that it takes; None is any.
    """

    name: str
    kind: str
    settings: Settings
    options: Settings = field(default_factory=dict)
    linear: bool = True
    steps: int | None = None

    def build(self) -> Any:
        import diffusers

        return getattr(diffusers.schedulers, self.kind)(**self.settings)

    def prepared(self, steps: int) -> tuple[Any, int | None]:
        """The scheduler and ``num_inference_steps``: None where ``set_timesteps`` needs more than a number."""
        scheduler = self.build()
        if not self.options:
            return scheduler, self.steps or steps
        scheduler.set_timesteps(self.steps or steps, **self.options)
        return scheduler, None


@dataclass(frozen=True)
class _Listed:
    linear: tuple[Settings, ...]
    nonlinear: tuple[Settings, ...] = ()
    options: Mapping[int, Settings] = field(default_factory=dict)  # by position among the linear ones
    steps: int | None = None


def _with(base: Settings, *settings: Settings) -> tuple[Settings, ...]:
    return tuple({**base, **more} for more in settings)


_DDIM = _Listed(
    _with(
        UNCLIPPED,
        EPSILON,
        V,
        SAMPLE,
        ZERO_SNR,
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2"},
    ),
    (EPSILON, {**THRESHOLD, **UNCLIPPED}),
)
_DDPM = _Listed(
    _with(
        UNCLIPPED,
        EPSILON,
        V,
        SAMPLE,
        ZERO_SNR,
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"timestep_spacing": "linspace"},
    ),
    (EPSILON, {**THRESHOLD, **UNCLIPPED}),
)
_K_DIFFUSION = (EPSILON, V, KARRAS, EXPONENTIAL, BETA, {"timestep_spacing": "trailing"}, {**V, **KARRAS})

SUPPORTED: dict[str, _Listed] = {
    "CMStochasticIterativeScheduler": _Listed(({"clip_denoised": False},), (EPSILON,)),
    "CogVideoXDDIMScheduler": _Listed(
        (EPSILON, V, SAMPLE, ZERO_SNR, {"timestep_spacing": "linspace"}, {"set_alpha_to_one": False, "steps_offset": 1})
    ),
    "CogVideoXDPMScheduler": _Listed((EPSILON, V, SAMPLE, ZERO_SNR, {"timestep_spacing": "linspace"})),
    "ConsistencyDecoderScheduler": _Listed((EPSILON,), steps=2),
    "CosineDPMSolverMultistepScheduler": _Listed(
        (EPSILON, V, {"solver_order": 1}, {"solver_type": "heun"}, {"sigma_schedule": "karras", "rho": 7.0})
    ),
    "DDIMInverseScheduler": _Listed(_with(UNCLIPPED, EPSILON, V), (EPSILON,)),
    "DDIMParallelScheduler": _DDIM,
    "DDIMScheduler": _DDIM,
    "DDPMParallelScheduler": _DDPM,
    "DDPMScheduler": _DDPM,
    "DEISMultistepScheduler": _Listed(
        (
            *({"solver_order": order} for order in (1, 2, 3)),
            V,
            SAMPLE,
            KARRAS,
            EXPONENTIAL,
            BETA,
            {"lower_order_final": False, "solver_order": 3},
            FLOW,
        ),
        (THRESHOLD,),
    ),
    "DPMSolverMultistepInverseScheduler": _Listed(
        (*({"solver_order": order} for order in (1, 2, 3)), V, SAMPLE, {"solver_type": "heun"}, KARRAS, EXPONENTIAL),
        (THRESHOLD,),
    ),
    "DPMSolverMultistepScheduler": _Listed(
        (
            *({"solver_order": order} for order in (1, 2, 3)),
            *({"solver_order": order, **FLOW} for order in (1, 2, 3)),
            {"solver_type": "heun"},
            V,
            SAMPLE,
            *({"algorithm_type": "dpmsolver", "solver_order": k, **SIGMA_MIN} for k in (1, 2, 3)),
            {"algorithm_type": "dpmsolver", "solver_type": "heun", **SIGMA_MIN},
            *({**SDE, "solver_order": order} for order in (1, 2, 3)),
            {**SDE, "solver_type": "heun", **FLOW},
            {"algorithm_type": "sde-dpmsolver", "solver_order": 1, **SIGMA_MIN},
            {"algorithm_type": "sde-dpmsolver", "solver_type": "heun", **SIGMA_MIN},
            {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN},
            KARRAS,
            EXPONENTIAL,
            BETA,
            {"use_lu_lambdas": True},
            {"euler_at_final": True},
            {"lower_order_final": False, "solver_order": 3, **SIGMA_MIN},
            {"timestep_spacing": "trailing", **SIGMA_MIN},
            {**FLOW, "use_dynamic_shifting": True},
        ),
        (THRESHOLD,),
        {27: {"mu": 0.9}},
    ),
    "DPMSolverSDEScheduler": _Listed(_with({"noise_sampler_seed": 3}, EPSILON, V, KARRAS, EXPONENTIAL, BETA)),
    "DPMSolverSinglestepScheduler": _Listed(
        (
            *({"solver_order": order} for order in (1, 2, 3)),
            {"solver_type": "heun"},
            V,
            SAMPLE,
            *({"algorithm_type": "dpmsolver", "solver_order": k, **SIGMA_MIN} for k in (1, 2, 3)),
            SDE,
            KARRAS,
            EXPONENTIAL,
            BETA,
            FLOW,
            {**FLOW, "use_dynamic_shifting": True},
        ),
        (THRESHOLD,),
        {14: {"mu": 0.9}},
    ),
    "EDMDPMSolverMultistepScheduler": _Listed(
        (
            *({"solver_order": order} for order in (1, 2, 3)),
            V,
            {"solver_type": "heun"},
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
            {"sigma_schedule": "exponential", **SIGMA_MIN},
            {"euler_at_final": True},
        ),
        (THRESHOLD,),
    ),
    "EDMEulerScheduler": _Listed((EPSILON, V, {"sigma_schedule": "exponential"}, SIGMA_MIN)),
    "EulerAncestralDiscreteScheduler": _Listed((EPSILON, V, ZERO_SNR, {"timestep_spacing": "leading"})),
    "EulerDiscreteScheduler": _Listed(
        (
            *_K_DIFFUSION,
            SIGMA_MIN,
            ZERO_SNR,
            SAMPLE,
            {"interpolation_type": "log_linear"},
            {"timestep_type": "continuous", "sigma_min": 0.01, "sigma_max": 80.0, **V, **KARRAS},
        )
    ),
    "FlowMapEulerDiscreteScheduler": _Listed((EPSILON, {"shift": 3.0})),
    "FlowMatchEulerDiscreteScheduler": _Listed(
        (
            EPSILON,
            {"shift": 3.0},
            KARRAS,
            EXPONENTIAL,
            BETA,
            {"shift_terminal": 0.1},
            {"invert_sigmas": True},
            {"stochastic_sampling": True, "shift": 3.0},
            {"use_dynamic_shifting": True},
            {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
            {"use_dynamic_shifting": True, "stochastic_sampling": True},
        ),
        options={8: {"mu": 0.9}, 9: {"mu": 1.7}, 10: {"mu": 0.9}},
    ),
    "FlowMatchHeunDiscreteScheduler": _Listed((EPSILON, {"shift": 3.0})),
    "FlowMatchLCMScheduler": _Listed(
        (EPSILON, {"shift": 3.0}, KARRAS, {"use_dynamic_shifting": True}), options={3: {"mu": 0.9}}
    ),
    "HeliosScheduler": _Listed(_with({"stages": 1}, EPSILON, {"shift": 3.0}, {"scheduler_type": "euler"})),
    "HeunDiscreteScheduler": _Listed(_K_DIFFUSION, ({"clip_sample": True, "clip_sample_range": 20.0},)),
    "IPNDMScheduler": _Listed((EPSILON,)),
    "KDPM2AncestralDiscreteScheduler": _Listed(_K_DIFFUSION),
    "KDPM2DiscreteScheduler": _Listed(_K_DIFFUSION),
    "LCMScheduler": _Listed((EPSILON, V, SAMPLE, ZERO_SNR), ({"clip_sample": True}, THRESHOLD)),
    "LMSDiscreteScheduler": _Listed(_K_DIFFUSION),
    "LTXEulerAncestralRFScheduler": _Listed((EPSILON, {"eta": 0.0}, {"eta": 0.5, "s_noise": 0.7})),
    "MiniMaxH3Scheduler": _Listed((EPSILON,)),
    "PNDMScheduler": _Listed(
        (EPSILON, V, {"skip_prk_steps": True}, {"skip_prk_steps": True, **V, "set_alpha_to_one": True})
    ),
    "SASolverScheduler": _Listed(
        (
            EPSILON,
            V,
            SAMPLE,
            {"predictor_order": 3, "corrector_order": 3},
            {"predictor_order": 1, "corrector_order": 1},
            {"algorithm_type": "noise_prediction"},
            {"tau_func": None},
            KARRAS,
            FLOW,
        ),
        (THRESHOLD,),
    ),
    "SCMScheduler": _Listed((EPSILON, EPSILON), options={1: {"intermediate_timesteps": None}}, steps=2),
    # It has these two settings and reads neither.
    "TCDScheduler": _Listed((EPSILON, V, SAMPLE, {"clip_sample": True}, THRESHOLD)),
    "UnCLIPScheduler": _Listed(_with(UNCLIPPED, EPSILON, SAMPLE), (EPSILON,)),
    "UniPCMultistepScheduler": _Listed(
        (
            *({"solver_order": order} for order in (1, 2, 3)),
            *({"solver_order": order, **FLOW} for order in (1, 2, 3)),
            *({"solver_order": order, **BH1, **FLOW} for order in (1, 2, 3)),
            {"solver_order": 3, **BH1},
            {"predict_x0": False, **SIGMA_MIN},
            {"disable_corrector": [0, 1]},
            V,
            SAMPLE,
            KARRAS,
            EXPONENTIAL,
            BETA,
            {"lower_order_final": False, "solver_order": 3, **SIGMA_MIN},
            {"use_dynamic_shifting": True, **FLOW},
            ZERO_SNR,
        ),
        (THRESHOLD,),
        {18: {"mu": 0.9}},
    ),
}


def _named(kind: str, number: int, settings: Settings) -> str:
    short = ",".join(f"{k}={v}" for k, v in settings.items() if k not in ("flow_shift", "use_flow_sigmas"))
    return f"{kind.removesuffix('Scheduler')}-{number}[{short}]"


def cases() -> Iterator[Case]:
    for kind, listed in SUPPORTED.items():
        for k, settings in enumerate(listed.linear):
            options = listed.options.get(k, {})
            yield Case(_named(kind, k, settings), kind, settings, options, True, listed.steps)
        for k, settings in enumerate(listed.nonlinear, len(listed.linear)):
            yield Case(_named(kind, k, settings), kind, settings, {}, False, listed.steps)


CASES: dict[str, Case] = {case.name: case for case in cases()}

# The version whose classes are all listed.
MADE_FOR = "0.42."

_TOKENS = "samples discrete tokens"

# class -> what its constructor needs, the reason that a user reads
REFUSED: dict[str, tuple[Settings, str]] = {
    "AmusedScheduler": ({"mask_token_id": 1}, _TOKENS),
    "BlockRefinementScheduler": ({}, _TOKENS),
    "DDPMWuerstchenScheduler": ({}, "one timestep per sample"),
    "DiscreteDDIMScheduler": ({}, _TOKENS),
    "EntropyBoundScheduler": ({}, _TOKENS),
    "HeliosDMDScheduler": ({}, "pipeline makes for each chunk"),
    "KarrasVeScheduler": ({}, "already moved to another noise level"),
    "PiflowScheduler": ({}, "predicts a policy"),
    "RFD4ProteinaScheduler": (
        {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
        "mask of the atoms",
    ),
    "RePaintScheduler": ({}, "image and the mask to be painted"),
    "ScoreSdeVeScheduler": ({}, "step_pred, step_correct"),
    "ScoreSdeVpScheduler": ({}, "step_pred"),
    "VQDiffusionScheduler": ({"num_vec_classes": 8}, _TOKENS),
}

_NAN = "gives NaN or infinity in step"

# class, settings, error, message
UNUSABLE: list[tuple[str, Settings, type[Exception], str]] = [
    ("DDPMScheduler", {"variance_type": "learned_range"}, TypeError, "variance_type='learned_range' is not supported"),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, TypeError, "variance_type='learned' is not supp"),
    ("UnCLIPScheduler", {"variance_type": "learned_range"}, TypeError, "predicts variances in further channels"),
    ("HeliosScheduler", {}, TypeError, "HeliosScheduler with stages=3 is not supported: the latents grow"),
    *(
        ("UniPCMultistepScheduler", {"solver_type": "bh1", "solver_order": k, **FLOW}, NonFiniteSchedulerError, _NAN)
        for k in (1, 2, 3)
    ),
    ("DDIMInverseScheduler", {**UNCLIPPED, **SAMPLE}, NonFiniteSchedulerError, f"DDIMInverseScheduler {_NAN} 0"),
    (
        "DDPMScheduler",
        {**UNCLIPPED, "variance_type": "fixed_large_log", "timestep_spacing": "linspace"},
        NonFiniteSchedulerError,
        _NAN,
    ),
    ("DPMSolverMultistepInverseScheduler", SDE, NonFiniteSchedulerError, _NAN),
    (
        "EDMDPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        ValueError,
        "EDMDPMSolverMultistepScheduler fails in step 2 of 6 with these settings: UnboundLocalError",
    ),
    ("SASolverScheduler", {"corrector_order": 0}, ValueError, "SASolverScheduler fails in step"),
    ("HeunDiscreteScheduler", {"prediction_type": "v"}, ValueError, "prediction_type given as v must be one of"),
    ("LMSDiscreteScheduler", {"prediction_type": "v"}, ValueError, "prediction_type given as v must be one of"),
    ("KDPM2DiscreteScheduler", SAMPLE, ValueError, "KDPM2DiscreteScheduler fails in step 0 .*not implemented yet"),
    ("DPMSolverSDEScheduler", {}, TypeError, "without a noise_sampler_seed is not supported"),
    ("CosineDPMSolverMultistepScheduler", {}, ValueError, "generator: .* takes the seed of its Brownian tree from it"),
    ("CosineDPMSolverMultistepScheduler", SIGMA_MIN, NonFiniteSchedulerError, "Cosine.* gives NaN .* in step 5 of 6"),
    ("SCMScheduler", {}, ValueError, "num_inference_steps=6: SCMScheduler.set_timesteps refused it"),
    ("ConsistencyDecoderScheduler", {}, ValueError, "ConsistencyDecoderScheduler.set_timesteps refused it"),
]
