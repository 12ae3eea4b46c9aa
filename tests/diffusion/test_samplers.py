"""Every sampler against diffusers, against a Gaussian whose ODE is solved, and on both backends."""

import json
import subprocess
import sys

import numpy as np
import pytest

from keras_sd.diffusion.denoiser import Denoiser, NoiseStreams
from keras_sd.diffusion.guidance import guided_prediction
from keras_sd.diffusion.samplers import SAMPLERS, find_sampler
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.diffusion.spacing import karras_sigmas, sigma_to_timestep, spaced_timesteps, training_sigmas
from keras_sd.errors import UserError
from tests.diffusion.toys import (
    SEEDS,
    SHAPE,
    GaussianUNet,
    ToyUNet,
    last,
    ode_end,
    of_every_sampler,
    of_reuse,
)
from tests.programs import run_python
from tests.reference import run_reference

KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# The class of diffusers that each sampler is compared with, and its options.
DIFFUSERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lms_karras": ("LMSDiscreteScheduler", KARRAS),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun_karras": ("HeunDiscreteScheduler", KARRAS),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_karras": ("KDPM2DiscreteScheduler", KARRAS),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", SDE | KARRAS),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
NO_ZERO_SNR = {"pndm", "lms", "lms_karras", "heun", "heun_karras", "dpm2", "dpm2_karras"}  # in diffusers
NO_SAMPLE_PREDICTION = {"pndm", "euler_a", "dpm2", "dpm2_karras"}
# Of diffusers' others none clips; on the cosine schedule Heun's first step is of first order here alone.
CLIPPING = {"clipped": ("ddim", "ddpm", "heun", "heun_karras", "lcm"), "clipped cosine": ("ddim", "ddpm")}

CONFIGS = {
    "epsilon leading": {"prediction_type": "epsilon"},
    "v leading": {"prediction_type": "v_prediction"},
    "sample leading": {"prediction_type": "sample"},
    "v trailing": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "v linspace": {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    # With all signal gone at the last timestep the noise does not tell the sample.
    "v zero terminal snr": {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
    "sample zero terminal snr": {
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
    "clipped": {"prediction_type": "v_prediction", "clip_sample": True},
    "clipped cosine": {
        "prediction_type": "v_prediction",
        "clip_sample": True,
        "set_alpha_to_one": True,
        "beta_schedule": "squaredcos_cap_v2",
    },
}
CONFIGS = {name: SchedulerConfig(**values) for name, values in CONFIGS.items()}
FEW_STEPS = (1, 2, 3, 5)


def cases(config_name):
    """What is compared under a config: (sampler, num_inference_steps, first_step, eta)."""
    config = CONFIGS[config_name]
    if config.clip_sample:
        return [("ddim", 20, 0, 0.5), *((name, 20, 0, 0.0) for name in CLIPPING[config_name])]
    names = set(SAMPLERS)
    names -= NO_ZERO_SNR if config.rescale_betas_zero_snr else set()
    names -= NO_SAMPLE_PREDICTION if config.prediction_type == "sample" else set()
    found = [(name, 20, 0, 0.0) for name in SAMPLERS if name in names]
    found += [("ddim", 20, 0, 0.5)]
    # In diffusers, rounding leaves the root of a negative number at zero terminal SNR.
    found += [] if config.rescale_betas_zero_snr else [("ddim", 30, 0, 1.0)]
    if config_name == "v leading":
        found += [(name, 20, 7, 0.0) for name in SAMPLERS]
    if config_name == "v linspace":
        found += [("euler", 999, 0, 0.0), ("dpmpp_2m", 999, 0, 0.0)]
    if config_name == "v trailing":
        found += [
            (name, num_inference_steps, 0, 0.0) for name in SAMPLERS for num_inference_steps in FEW_STEPS
        ]
    return found


def reference_cases():
    for config_name, config in CONFIGS.items():
        for sampler, *numbers in cases(config_name):
            class_name, options = DIFFUSERS[sampler]
            yield f"{config_name}/{sampler}/{numbers}", class_name, config.to_dict() | options, *numbers


SCRIPT = """
    import functools
    import json
    import diffusers
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    diffusers.logging.set_verbosity_error()

    def begin_at(scheduler, first_step):
        if isinstance(scheduler, diffusers.PNDMScheduler):
            # It knows no beginning: as if the steps left out had never been.
            steps = scheduler._timesteps[::-1][first_step:]
            return torch.tensor([steps[0], steps[1], *steps[1:]])
        first_row = first_step * scheduler.order
        if isinstance(scheduler, diffusers.LMSDiscreteScheduler):
            # Its coefficients would count on predictions that were not made.
            scheduler.sigmas = scheduler.sigmas[first_row:]
            scheduler.timesteps, first_row = scheduler.timesteps[first_row:], 0
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_row)
        return scheduler.timesteps[first_row:]

    @functools.cache
    def made(class_name, config):
        return getattr(diffusers, class_name).from_config(json.loads(config))

    cases = json.loads((folder / "cases.json").read_text())
    for name, class_name, config, num_inference_steps, first_step, eta in cases:
        draws = iter(inputs["random"].double())
        scheduler = made(class_name, json.dumps(config))
        sys.modules[type(scheduler).__module__].randn_tensor = lambda shape, **options: next(draws)
        scheduler.set_timesteps(num_inference_steps)
        timesteps, noise = scheduler.timesteps, inputs["noise"].double()
        if first_step:
            timesteps = begin_at(scheduler, first_step)
            latents = scheduler.add_noise(inputs["sample"].double(), noise, timesteps[:1])
        else:
            latents = noise * scheduler.init_noise_sigma
        options = {"eta": eta} if eta else {}
        for timestep in timesteps:
            seen = scheduler.scale_model_input(latents, timestep)
            prediction = 0.4 * torch.sin(2 * seen) + 0.3 * seen - 0.2 * timestep / 1000
            latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        outputs[name] = latents

    for spacing in ("leading", "trailing", "linspace"):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
        for num_inference_steps in range(1, 1000):
            scheduler.set_timesteps(num_inference_steps)
            outputs[f"timesteps/{spacing}/{num_inference_steps}"] = scheduler.timesteps

    guided, conditional = inputs["noise"], inputs["sample"]
    outputs["rescaled"] = rescale_noise_cfg(guided, conditional, 0.7)
"""


@pytest.fixture(scope="module")
def arrays():
    streams = NoiseStreams(SEEDS)
    noise = streams.draw(SHAPE)
    random = np.stack([streams.draw(SHAPE) for _ in range(30)])
    sample = NoiseStreams((3, 4)).draw(SHAPE)
    return {"noise": noise, "random": random, "sample": sample}


@pytest.fixture(scope="module")
def reference(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "cases.json").write_text(json.dumps(list(reference_cases())))
    return run_reference(SCRIPT, arrays, folder)


@pytest.mark.parametrize("config_name", CONFIGS)
def test_samplers_end_where_those_of_diffusers_end(config_name, reference, arrays):
    unet = ToyUNet()
    denoiser = Denoiser(unet, NoiseSchedule(CONFIGS[config_name]))
    distances = {}
    for sampler, num_inference_steps, first_step, eta in cases(config_name):
        grid = {"sampler": sampler, "num_inference_steps": num_inference_steps, "first_step": first_step}
        streams = NoiseStreams(SEEDS)
        latents = streams.draw(SHAPE)
        if first_step:
            latents = denoiser.noisy(arrays["sample"], latents, **grid)
        latents = last(denoiser.steps(latents, eta=eta, streams=streams, **grid))
        expected = reference[f"{config_name}/{sampler}/{[num_inference_steps, first_step, eta]}"]
        distances[sampler, num_inference_steps, first_step, eta] = (
            np.abs(latents - expected).max() / expected.std()
        )
    too_far = {case: distance for case, distance in distances.items() if not distance < 1e-4}
    assert not too_far
    assert unet.batches == [2]  # traced once for all samplers and numbers of steps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing, reference):
    options = vars(SchedulerConfig(timestep_spacing=spacing))
    for num_inference_steps in range(1, 1000):
        ours, theirs = (
            spaced_timesteps(options, num_inference_steps),
            reference[f"timesteps/{spacing}/{num_inference_steps}"],
        )
        assert len(ours) == num_inference_steps
        if spacing == "linspace" and num_inference_steps == 1:
            assert ours == [999]  # there it is 0, where noise is taken for an image
            continue
        # In diffusers, rounding makes some trailing ranges one step too long.
        np.testing.assert_array_equal(ours, theirs[:num_inference_steps])


def test_guidance_is_rescaled_as_in_diffusers(reference, arrays):
    guided, conditional = arrays["noise"], arrays["sample"]

    def unet(inputs):
        """Predicts what makes the guided prediction, of scale 2, the given one."""
        return np.concatenate([2 * conditional - guided, conditional])

    context = np.zeros((2, 5, 3), "float32")
    options = {"context": context, "negative": context, "scale": 2.0}
    found = guided_prediction(unet, guided, np.zeros(2, "float32"), **options, rescale=0.7)
    np.testing.assert_allclose(found, reference["rescaled"], atol=1e-6)
    found = guided_prediction(unet, guided, np.zeros(2, "float32"), **options)
    np.testing.assert_allclose(found, guided, atol=1e-6)


MEAN, DEVIATION = 0.7, 0.25
NUMBERS_OF_STEPS = (10, 40, 160)
DRAWING = [name for name in SAMPLERS if name in ("ddpm", "euler_a") or "sde" in name]
SOLVING = [name for name in SAMPLERS if name not in (*DRAWING, "lcm")]


def gaussian_config(name):
    """The usual spacing of a sampler."""
    spacing = "leading" if name in ("ddim", "ddpm", "pndm") else "linspace"
    return SchedulerConfig(prediction_type="sample", set_alpha_to_one=True, timestep_spacing=spacing)


@pytest.fixture(scope="module")
def gaussians():
    """By the spacing, which the compiled step does not know."""
    schedules = [NoiseSchedule(gaussian_config(name)) for name in ("ddim", "euler")]
    unet = GaussianUNet(schedules[0], MEAN, DEVIATION)
    return {schedule.config.timestep_spacing: Denoiser(unet, schedule) for schedule in schedules}


@pytest.mark.parametrize("name", SOLVING)
def test_deterministic_samplers_solve_the_ode(name, gaussians):
    gaussian = gaussians[gaussian_config(name).timestep_spacing]
    noise = NoiseStreams([3]).draw((8, 8, 4))
    errors = []
    for num_inference_steps in NUMBERS_OF_STEPS:
        start, rows, _ = SAMPLERS[name].tables(gaussian.schedule, num_inference_steps)
        exact = ode_end(noise * start, rows[0].level.sigma, MEAN, DEVIATION)
        found = last(gaussian.steps(noise, sampler=name, num_inference_steps=num_inference_steps))
        errors.append(np.abs(found - exact).max())
    # The last step is of first order, from a sigma that need not fall further: 0.008 off at best.
    assert errors[1] < errors[0] / 2.5 and errors[2] < max(errors[1] / 2.5, 0.01)


@pytest.mark.parametrize("name", DRAWING)
def test_samplers_that_draw_noise_draw_from_the_gaussian(name, gaussians):
    gaussian = gaussians[gaussian_config(name).timestep_spacing]
    errors = []
    for num_inference_steps in NUMBERS_OF_STEPS:
        streams = NoiseStreams([3])
        noise = streams.draw((64, 64, 4))
        samples = last(
            gaussian.steps(noise, sampler=name, num_inference_steps=num_inference_steps, streams=streams)
        )
        assert abs(samples.mean() - MEAN) < 0.01
        errors.append(abs(samples.std() / DEVIATION - 1))
    assert errors[2] < 0.1 and errors[2] < max(errors[0] / 4, 0.02)


def test_lcm_draws_from_the_gaussian_by_its_consistency_function():
    schedule = NoiseSchedule(gaussian_config("lcm"))
    denoiser = Denoiser(GaussianUNet(schedule, MEAN, DEVIATION, is_consistency=True), schedule)
    for num_inference_steps in (1, 4, 50):
        streams = NoiseStreams([3])
        noise = streams.draw((64, 64, 4))
        samples = last(
            denoiser.steps(noise, sampler="lcm", num_inference_steps=num_inference_steps, streams=streams)
        )
        # One step begins from noise without the little signal that is left there.
        assert abs(samples.mean() - MEAN) < 0.02 and abs(samples.std() / DEVIATION - 1) < 0.02


def test_backends_agree(tmp_path):
    run_python(["-m", "tests.diffusion.toys", tmp_path / "jax.npz"])
    theirs = np.load(tmp_path / "jax.npz")
    assert theirs["backend"] == "jax"
    for name, ours in {"reuse": of_reuse(), **of_every_sampler()}.items():
        assert np.abs(ours - theirs[name]).max() / ours.std() < 1e-5, name


@pytest.mark.parametrize("config_name", ["v linspace", "v zero terminal snr", "clipped cosine"])
def test_any_number_of_steps_makes_sound_tables(config_name):
    schedule = NoiseSchedule(CONFIGS[config_name])
    is_leading = schedule.config.timestep_spacing == "leading"  # by which few samplers have 999
    for name, sampler in SAMPLERS.items():
        for num_inference_steps in (*FEW_STEPS, 14, 50, *([] if name == "lcm" or is_leading else [999])):
            for first_step in {0, num_inference_steps // 2, num_inference_steps - 1}:
                start, rows, _ = sampler.tables(schedule, num_inference_steps, first_step=first_step)
                assert 0 < start <= 1
                assert (
                    sum(row.ends_step for row in rows) == num_inference_steps - first_step
                    and rows[-1].ends_step
                )
                assert all(np.isfinite(row.weights).all() for row in rows)
                timesteps = np.array([row.timestep for row in rows])
                # Falling, up to the rounding of some.
                assert np.all(np.diff(timesteps) <= 0.5) and timesteps[-1] >= 0
                assert timesteps[0] < schedule.num_train_timesteps


def test_zero_terminal_snr_is_met_where_nothing_but_noise_is_left():
    schedule = NoiseSchedule(CONFIGS["v zero terminal snr"])
    for sampler in SAMPLERS.values():
        first = sampler.tables(schedule, 10).rows[0]
        assert first.timestep == 999 and first.level.signal_rate < 3e-4


def test_only_some_samplers_clip():
    """As in diffusers, where Euler, LMS, DPM++ and UniPC never do."""
    schedule = NoiseSchedule(CONFIGS["clipped"])
    limits = {name: sampler.tables(schedule, 5).limits for name, sampler in SAMPLERS.items()}
    clipping = {name for name, values in limits.items() if values == {"clip_range": 1.0}}
    assert clipping == {"ddim", "ddpm", "heun", "heun_karras", "lcm"}
    assert all(values == {} for name, values in limits.items() if name not in clipping)


def test_a_model_has_a_sampler_of_its_own():
    def own(class_name, **values):
        config = SchedulerConfig.from_dict({"_class_name": class_name} | values)
        return find_sampler(None, config)

    assert find_sampler(None, SchedulerConfig()) is SAMPLERS["ddim"]
    assert own("PNDMScheduler", skip_prk_steps=True) is SAMPLERS["pndm"]
    assert own("DPMSolverMultistepScheduler", use_karras_sigmas=True) is SAMPLERS["dpmpp_2m_karras"]
    assert own("EulerDiscreteScheduler", timestep_spacing="trailing") is SAMPLERS["euler"]
    assert own("PNDMScheduler").name == "PNDMScheduler of the model"
    assert own("DEISMultistepScheduler").name == "DEISMultistepScheduler of the model"
    with pytest.raises(UserError, match="solver_order 4 of UniPCMultistepScheduler is not supported"):
        own("UniPCMultistepScheduler", solver_order=4)


def test_a_named_sampler_takes_the_options_of_the_file():
    """But for what its name says."""
    values = {"use_karras_sigmas": True, "solver_order": 3, "timestep_spacing": "leading", "steps_offset": 3}
    config = SchedulerConfig.from_dict({"_class_name": "UniPCMultistepScheduler"} | values)
    schedule = NoiseSchedule(config)
    assert SAMPLERS["euler"].tables(schedule, 10).rows[-1].end.sigma == 0
    assert SAMPLERS["euler"].options(config)["use_karras_sigmas"]
    assert SAMPLERS["dpmpp_2m"].options(config)["solver_order"] == 2
    assert not SAMPLERS["dpmpp_2m"].options(config)["use_karras_sigmas"]
    assert [row.timestep for row in SAMPLERS["ddim"].tables(schedule, 2).rows] == [503, 3]
    config = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", "steps_offset": -1})
    with pytest.raises(UserError, match="steps_offset -1: below 0"):
        SAMPLERS["ddim"].tables(NoiseSchedule(config), 2)


def test_karras_sigmas_are_those_of_the_paper():
    sigmas = karras_sigmas(80.0, 0.002, 18)
    np.testing.assert_allclose(sigmas[[0, 1, 2, -1]], [80, 57.586, 40.786, 0.002], rtol=1e-4)
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7)), (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17)


def test_timesteps_are_found_by_their_sigma():
    schedule = NoiseSchedule(SchedulerConfig())
    sigmas = training_sigmas(schedule)
    np.testing.assert_allclose(sigma_to_timestep(schedule, sigmas[[0, 10, 999]]), [0, 10, 999], atol=1e-9)
    np.testing.assert_allclose(sigma_to_timestep(schedule, np.sqrt(sigmas[10] * sigmas[11])), 10.5)


def test_samplers_are_named_as_people_know_them():
    assert {name: find_sampler(name) for name in SAMPLERS} == SAMPLERS
    names = [sampler.name for sampler in SAMPLERS.values()]
    assert len(set(names)) == len(names)
    assert find_sampler("dpmpp_2m_karras").name == "DPM++ 2M Karras"
    assert find_sampler("euler_a").name == "Euler a" and find_sampler("pndm").name == "PLMS"
    assert all(sampler.purpose for sampler in SAMPLERS.values())


def test_samplers_are_listed_without_a_backend():
    code = "import sys, keras_sd.diffusion.samplers; print('keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_bad_numbers_end_in_one_line():
    schedule = NoiseSchedule(SchedulerConfig())
    for name, arguments, line in [
        ("ddim", {"num_inference_steps": 0}, "num_inference_steps 0: out of range; use 1 to 1000"),
        ("ddim", {"num_inference_steps": 1001}, "num_inference_steps 1001: out of range; use 1 to 1000"),
        ("ddim", {"num_inference_steps": 1000}, "starts beyond timestep 999; use fewer steps"),
        ("euler", {"num_inference_steps": 1001}, "num_inference_steps 1001: out of range; use 1 to 1000"),
        ("unipc", {"num_inference_steps": 1000}, "num_inference_steps 1000: out of range; use 1 to 999"),
        ("lcm", {"num_inference_steps": 51}, "num_inference_steps 51: out of range; use 1 to 50"),
        ("ddim", {"num_inference_steps": 5, "eta": 1.5}, "eta 1.5: out of range"),
        ("ddim", {"num_inference_steps": 5, "eta": -0.1}, "eta -0.1: out of range"),
        (
            "euler_a",
            {"num_inference_steps": 5, "eta": 0.5},
            "eta 0.5: Euler a takes none; use 0, or the sampler ddim",
        ),
        (
            "heun",
            {"num_inference_steps": 5, "first_step": 5},
            "first_step 5: out of range; use a whole number from 0",
        ),
        (
            "heun",
            {"num_inference_steps": 5, "first_step": -1},
            "first_step -1: out of range; use a whole number from 0",
        ),
    ]:
        with pytest.raises(UserError, match=line):
            SAMPLERS[name].tables(schedule, **arguments)
    with pytest.raises(UserError, match="timestep_spacing 'even': unknown; use leading"):
        spaced_timesteps(vars(SchedulerConfig(timestep_spacing="even")), 10)
    with pytest.raises(UserError, match="sampler 'euler_z': unknown; use one of ddim, ddpm, "):
        find_sampler("euler_z")


@pytest.mark.parametrize(
    ("class_name", "changes", "line"),
    [
        ("DEISMultistepScheduler", {"beta_start": 0}, "no noise .beta_start., where DEIS is not defined"),
        ("LCMScheduler", {"timestep_scaling": 2**64}, "timestep_scaling 18446744073709551616 of LCM"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "x" * 70_000}, "timestep_spacing 'xxx"),
        ("DDIMScheduler", {"beta_schedule": "x" * 70_000}, "beta_schedule 'xxx"),
    ],
)
def test_absurd_options_of_a_file_are_one_short_line(class_name, changes, line):
    with pytest.raises(UserError, match=line) as raised, np.errstate(divide="ignore"):
        config = SchedulerConfig.from_dict({"_class_name": class_name} | changes)
        find_sampler(None, config).tables(NoiseSchedule(config), 7)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.parametrize(
    "name, key",
    [
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("euler a", "euler_a"),
        ("PLMS", "pndm"),
        ("k_euler_a", "euler_a"),
        ("euler_ancestral", "euler_a"),
    ],
)
def test_names_of_other_programs_are_understood(name, key):
    assert find_sampler(name, SchedulerConfig()) is SAMPLERS[key]
