"""The samplers by name, and the sampler that a model's own file describes.

A sampler is a scheduler class of diffusers with its options: those that the name fixes, and otherwise those
of the model's file. Its function yields rows of weights, one for each evaluation of the network (`rows`; the
functions are in `ddim`, `k_diffusion` and `dpm_solver`).

This module needs no backend.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from keras_sd.arguments import share, shown, whole_number
from keras_sd.diffusion import ddim, dpm_solver, k_diffusion, spacing
from keras_sd.diffusion.rows import Row, SamplingRun, check_rows, listed
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.scheduler_options import OPTIONS, check_own, complete
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.diffusion.spacing import Step
from keras_sd.errors import UserError


class Method(NamedTuple):
    """The computation behind a scheduler class of diffusers.

    Attributes:
        steps: function of the noise schedule, the number of steps and the options; returns a list of
            `spacing.Step`.
        rows: function of those steps and a `rows.SamplingRun`; yields `rows.Row` objects.
        starts_at_sigma: whether the initial latents are `sigma * noise`, without a share of signal.
        takes_eta: whether `rows` uses `SamplingRun.eta`.
        clips, thresholds: whether the predicted sample may be clipped, or thresholded dynamically.
        more: options of `steps` that are not in a model's file.
    """

    steps: Callable[[NoiseSchedule, int, dict[str, Any]], list[Step]]
    rows: Callable[[list[Step], SamplingRun], Iterable[Row]]
    starts_at_sigma: bool = False
    takes_eta: bool = False
    clips: bool = False
    thresholds: bool = False
    more: dict[str, Any] = {}


def _k_diffusion(rows: Callable, rounds_karras_timesteps: bool = False, **limits: bool) -> Method:
    more = {"rounds_karras_timesteps": rounds_karras_timesteps}
    return Method(spacing.k_diffusion_steps, rows, starts_at_sigma=True, more=more, **limits)


def _solver(rows: Callable, **more: Any) -> Method:
    more = {"keeps_cosine_timesteps": False, "ends_at_last_sigma": False} | more
    return Method(spacing.solver_steps, rows, thresholds=True, more=more)


METHODS = {
    "DDIMScheduler": Method(spacing.ddim_steps, ddim.ddim, takes_eta=True, clips=True, thresholds=True),
    "DDPMScheduler": Method(spacing.ddpm_steps, ddim.ddpm, clips=True, thresholds=True),
    "PNDMScheduler": Method(spacing.ddim_steps, ddim.pndm),
    "LCMScheduler": Method(spacing.lcm_steps, ddim.lcm, clips=True, thresholds=True),
    "TCDScheduler": Method(spacing.lcm_steps, ddim.tcd, takes_eta=True),
    "LMSDiscreteScheduler": _k_diffusion(k_diffusion.lms),
    "EulerDiscreteScheduler": _k_diffusion(k_diffusion.euler),
    "EulerAncestralDiscreteScheduler": _k_diffusion(k_diffusion.euler_ancestral),
    "HeunDiscreteScheduler": _k_diffusion(k_diffusion.heun, clips=True),
    "KDPM2DiscreteScheduler": _k_diffusion(k_diffusion.dpm2, rounds_karras_timesteps=True),
    "KDPM2AncestralDiscreteScheduler": _k_diffusion(k_diffusion.dpm2_ancestral, rounds_karras_timesteps=True),
    "DPMSolverSDEScheduler": _k_diffusion(k_diffusion.dpm_sde),
    "DPMSolverMultistepScheduler": _solver(dpm_solver.dpm_multistep, keeps_cosine_timesteps=True),
    "DPMSolverSinglestepScheduler": _solver(dpm_solver.dpm_singlestep),
    "DEISMultistepScheduler": _solver(
        dpm_solver.deis_multistep, ends_at_last_sigma=True, final_sigmas_type="sigma_min"
    ),
    "UniPCMultistepScheduler": _solver(dpm_solver.unipc, ends_at_last_sigma=True),
}


class Tables(NamedTuple):
    """The inputs of the compiled step for one sampling run.

    Attributes:
        start: factor of the initial standard-normal noise.
        rows: list of `rows.Row`.
        limits: limits of the predicted samples, keyword arguments of `limits.limited`.
    """

    start: float
    rows: list[Row]
    limits: dict[str, float]


@dataclass(frozen=True)
class Sampler:
    """A sampling method. One of your own is given to the tasks as `sampler=`, in place of a name.

    Attributes:
        name: as in A1111's web UI and in the parameters of a PNG.
        purpose: what it is for, in one line.
        scheduler: the scheduler class in diffusers, whose options the sampler has.
        fixed: dictionary of options that override those of the model's file. Options of the noise schedule,
            such as prediction_type, are the model's own.
        method: the `Method` that it computes; by default that of the scheduler class.

    Raises:
        UserError: the scheduler class is unknown, `fixed` has an option that it does not have, or a value is
            not supported.

    Example:
        ```python
        def rows(steps, run):  # DDIM without fresh noise (Song et al., 2021, equation 12)
            for timestep, level, end in steps:
                yield Row(timestep, level, end, end.signal_rate * SAMPLE + end.noise_rate * NOISE)


        mine = Sampler("Mine", "for the example", method=METHODS["DDIMScheduler"]._replace(rows=rows))
        sd.text_to_image("red heart", sampler=mine)
        ```
    """

    name: str
    purpose: str
    scheduler: str = "DDIMScheduler"
    fixed: dict[str, Any] = field(default_factory=dict, hash=False)
    method: Method | None = field(default=None, hash=False)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"sampler {shown(self.name)}: no name; give a text")
        if not isinstance(self.scheduler, str) or self.scheduler not in OPTIONS:
            raise UserError(
                f"sampler {self.name}: scheduler {shown(self.scheduler)} is unknown; use one of "
                f"{', '.join(OPTIONS)}"
            )
        if not isinstance(self.fixed, dict):
            raise UserError(f"sampler {self.name}: fixed {shown(self.fixed)} is no dictionary; give options")
        check_own(self.scheduler, self.fixed, f"sampler {self.name}")
        method = self._method
        is_method = isinstance(method, Method) and callable(method.steps) and callable(method.rows)
        if not is_method or not isinstance(method.more, dict):
            raise UserError(
                f"sampler {self.name}: method {shown(self.method)} is none; give a keras_sd.Method with the "
                "functions `steps` and `rows`"
            )

    @property
    def _method(self) -> Method:
        return self.method or METHODS[self.scheduler]

    @property
    def takes_eta(self) -> bool:
        """Whether the sampler has a parameter eta, the share of fresh noise."""
        return self._method.takes_eta

    def options(self, config: SchedulerConfig) -> dict[str, Any]:
        """Return all options of the scheduler class, for a model with that `SchedulerConfig`.

        Raises:
            UserError: the model's file has a value that is not supported.
        """
        place = "scheduler_config.json" + (f" with the options of {self.name}" if self.fixed else "")
        return complete(self.scheduler, config.options() | self.fixed, place)

    def tables(
        self, schedule: NoiseSchedule, num_inference_steps: int, eta: float = 0.0, first_step: int = 0
    ) -> Tables:
        """Return the `Tables` of a sampling run.

        Args:
            schedule: the `NoiseSchedule` that the network was trained on.
            num_inference_steps: number of steps from pure noise to the sample; a step has one or more rows.
            eta: from 0 to 1, the share of fresh noise in DDIM and TCD.
            first_step: number of steps to skip at the beginning.

        Raises:
            UserError: a number is out of range, or as `options`; or steps or rows of the method are missing,
                or cannot be computed.
        """
        method = self._method
        eta = share("eta", eta, "0 (deterministic) to 1")
        if eta and not method.takes_eta:
            raise UserError(f"eta {eta:g}: {self.name} takes none; use 0, or the sampler ddim")
        options = self.options(schedule.config) | method.more
        steps = listed(method.steps(schedule, num_inference_steps, options), Step, f"sampler {self.name}")
        if len(steps) != num_inference_steps:
            raise UserError(
                f"sampler {self.name}: its method makes {len(steps)} steps of {num_inference_steps}; return "
                "one for each"
            )
        steps = steps[whole_number("first_step", first_step, 0, num_inference_steps - 1) :]
        run = SamplingRun(schedule, options, num_inference_steps, first_step, eta)
        rows = listed(method.rows(steps, run), Row, f"sampler {self.name}")
        check_rows(rows, len(steps), schedule.num_train_timesteps, f"sampler {self.name}")
        starts_at_sigma = method.starts_at_sigma and options["timestep_spacing"] != "leading"
        start = steps[0].level.noise_rate if starts_at_sigma and first_step == 0 else 1.0
        return Tables(float(start), rows, _limits(method, options))


def _limits(method: Method, options: dict[str, Any]) -> dict[str, float]:
    if method.thresholds and options["thresholding"] and options.get("predict_x0", True):
        return {"ratio": options["dynamic_thresholding_ratio"], "largest": options["sample_max_value"]}
    if method.clips and options["clip_sample"]:
        return {"clip_range": options["clip_sample_range"]}
    return {}


_PLAIN: dict[str, Any] = {"use_karras_sigmas": False}
_KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_EVEN_LATE = "the same with more of the steps where little noise is left"
_2M: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_2M_SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}

SAMPLERS = {
    "ddim": Sampler("DDIM", "plain and deterministic, 30 to 50 steps", "DDIMScheduler"),
    "ddpm": Sampler("DDPM", "fresh noise each step as in the theory, 100 to 1000 steps", "DDPMScheduler"),
    "pndm": Sampler(
        "PLMS",
        "what Stable Diffusion 1 was published with, 30 to 50 steps",
        "PNDMScheduler",
        {"skip_prk_steps": True},
    ),
    "lms": Sampler(
        "LMS", "multistep as PLMS is, at other timesteps, 30 to 50 steps", "LMSDiscreteScheduler", _PLAIN
    ),
    "lms_karras": Sampler("LMS Karras", _EVEN_LATE, "LMSDiscreteScheduler", _KARRAS),
    "heun": Sampler(
        "Heun", "accurate, at twice the work a step, 15 to 30 steps", "HeunDiscreteScheduler", _PLAIN
    ),
    "heun_karras": Sampler("Heun Karras", _EVEN_LATE, "HeunDiscreteScheduler", _KARRAS),
    "euler": Sampler("Euler", "the simplest that is good, 20 to 40 steps", "EulerDiscreteScheduler"),
    "euler_a": Sampler(
        "Euler a",
        "fresh noise each step: varied, never settles, 20 to 40 steps",
        "EulerAncestralDiscreteScheduler",
    ),
    "dpm2": Sampler(
        "DPM2", "accurate, at twice the work a step, 15 to 30 steps", "KDPM2DiscreteScheduler", _PLAIN
    ),
    "dpm2_karras": Sampler("DPM2 Karras", _EVEN_LATE, "KDPM2DiscreteScheduler", _KARRAS),
    "dpmpp_2m": Sampler(
        "DPM++ 2M",
        "the best for few evaluations, 15 to 25 steps",
        "DPMSolverMultistepScheduler",
        _2M | _PLAIN,
    ),
    "dpmpp_2m_karras": Sampler("DPM++ 2M Karras", _EVEN_LATE, "DPMSolverMultistepScheduler", _2M | _KARRAS),
    "dpmpp_2m_sde": Sampler(
        "DPM++ 2M SDE",
        "fresh noise each step: rich in detail, 25 to 40 steps",
        "DPMSolverMultistepScheduler",
        _2M_SDE | _PLAIN,
    ),
    "dpmpp_2m_sde_karras": Sampler(
        "DPM++ 2M SDE Karras", _EVEN_LATE, "DPMSolverMultistepScheduler", _2M_SDE | _KARRAS
    ),
    "unipc": Sampler(
        "UniPC", "corrects each step by the next prediction, 8 to 20 steps", "UniPCMultistepScheduler"
    ),
    "lcm": Sampler("LCM", "only for models distilled for it, 2 to 8 steps", "LCMScheduler"),
}


# Suffix of the name of a sampler that only a model's own file describes.
OF_THE_MODEL = " of the model"


def find_sampler(name: str | Sampler | None, config: SchedulerConfig | None = None) -> Sampler:
    """Return the sampler with this name; None means the one of the model's own file.

    Args:
        name: a key of `SAMPLERS`, the name that A1111's web UI has for one, a `Sampler`, or None.
        config: the model's `SchedulerConfig`, for its own sampler.

    Raises:
        UserError: the name is unknown, or the model's file has a value that is not supported.
    """
    if isinstance(name, Sampler):
        return name
    if name is None:
        return _own_sampler(config)
    key = sampler_key(name) if isinstance(name, str) else None
    if key not in SAMPLERS:
        raise UserError(f"sampler {shown(name)}: unknown; use one of {', '.join(SAMPLERS)}")
    return SAMPLERS[key]


# A1111's names in lower case, and those of its interface for programs -> ours.
_BY_TITLE = {sampler.name.lower(): key for key, sampler in SAMPLERS.items()}
_BY_TITLE |= {f"k_{key}": key for key in SAMPLERS}
_BY_TITLE |= {"euler_ancestral": "euler_a", "k_euler_ancestral": "euler_a"}


def sampler_key(name: str) -> str:
    """Return the key of `SAMPLERS` for a name of A1111's; a name that is no such one as it is."""
    return _BY_TITLE.get(name.lower(), name)


def _own_sampler(config: SchedulerConfig) -> Sampler:
    """Return the sampler that a model's file describes: a named one, if it is equivalent."""
    class_name = config.class_name
    own = Sampler(class_name + OF_THE_MODEL, "what the model's file describes", class_name)
    options = own.options(config)
    named = (sampler for sampler in SAMPLERS.values() if sampler.scheduler == class_name)
    same = (
        sampler for sampler in named if all(options.get(key) == sampler.fixed[key] for key in sampler.fixed)
    )
    return next(same, own)
