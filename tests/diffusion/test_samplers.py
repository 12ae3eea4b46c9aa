"""DDIM against diffusers and against a Gaussian whose denoiser is known, and the compiled loop."""

import itertools
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.config import SchedulerConfig
from keras_sd.diffusion.samplers import SAMPLERS, Denoiser, NoiseStreams, find_sampler, spaced_timesteps
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from tests.reference import run_reference

SHAPE = (4, 3, 2)
SEEDS = (0, 7)

PLAIN = itertools.product(("epsilon", "v_prediction", "sample"), ("leading", "trailing"), (False,))
# With all signal gone at the last timestep the noise does not tell the sample.
ZERO_SNR = itertools.product(("v_prediction", "sample"), ("trailing",), (True,))
LINSPACE = [("v_prediction", "linspace", False)]
CONFIGS = {
    f"{kind} {spacing}{' zero terminal snr' if zero_snr else ''}": SchedulerConfig(
        prediction_type=kind, timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr
    )
    for kind, spacing, zero_snr in [*PLAIN, *ZERO_SNR, *LINSPACE]
}
CONFIGS["clipped to 1"] = SchedulerConfig(
    prediction_type="v_prediction", clip_sample=True, set_alpha_to_one=True, beta_schedule="squaredcos_cap_v2"
)
RUNS = {"20 steps": (20, 0.0), "20 steps, eta 0.5": (20, 0.5), "30 steps, eta 1": (30, 1.0)}

SCRIPT = """
    import json
    from diffusers import DDIMScheduler

    configs, runs = json.loads((folder / "configs.json").read_text())
    for name, config in configs.items():
        for run, (num_steps, eta) in runs.items():
            scheduler = DDIMScheduler.from_config(config)
            scheduler.set_timesteps(num_steps)
            latents = inputs["noise"].double()
            for index, timestep in enumerate(scheduler.timesteps):
                prediction = 0.4 * torch.sin(2 * latents) + 0.3 * latents - 0.2 * timestep / 1000
                latents = scheduler.step(
                    prediction, timestep, latents, eta=eta, variance_noise=inputs["random"][index].double()
                ).prev_sample
            outputs[f"{name}/{run}"] = latents

    for spacing in ("leading", "trailing", "linspace"):
        scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
        for num_steps in range(1, 1000):
            scheduler.set_timesteps(num_steps)
            outputs[f"timesteps/{spacing}/{num_steps}"] = scheduler.timesteps
"""


class ToyUNet(keras.layers.Layer):
    """A denoiser of no use, the same as in the script above; counts how often it is traced."""

    def __init__(self):
        super().__init__()
        self.gain = self.add_weight(shape=(), initializer="ones", name="gain")
        self.batches = []

    def call(self, inputs):
        latents, timesteps, *contexts = inputs
        self.batches.append(latents.shape[0])
        time = ops.reshape(timesteps, (-1, 1, 1, 1)) / 1000
        outputs = self.gain * (0.4 * ops.sin(2 * latents) + 0.3 * latents - 0.2 * time)
        for context in contexts:
            outputs = outputs + ops.mean(context, axis=(1, 2))[:, None, None, None]
        return outputs


def last(steps):
    *_, result = steps
    return ops.convert_to_numpy(result.latents)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    configs = {name: config.to_dict() for name, config in CONFIGS.items()}
    (folder / "configs.json").write_text(json.dumps([configs, RUNS]))
    streams = NoiseStreams(SEEDS)
    noise = streams.draw(SHAPE)
    random = np.stack([streams.draw(SHAPE) for _ in range(30)])
    return run_reference(SCRIPT, {"noise": noise, "random": random}, folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_ddim_ends_where_diffusers_ends(name, reference):
    unet = ToyUNet()
    denoiser = Denoiser(unet, NoiseSchedule(CONFIGS[name]))
    for run, (num_steps, eta) in RUNS.items():
        streams = NoiseStreams(SEEDS)
        latents = last(denoiser.steps(streams.draw(SHAPE), num_steps=num_steps, eta=eta, streams=streams))
        expected = reference[f"{name}/{run}"]
        assert np.abs(latents - expected).max() / expected.std() < 1e-4
    assert unet.batches == [2]  # traced once for all runs


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing, reference):
    config = SchedulerConfig(timestep_spacing=spacing)
    for num_steps in range(1, 1000):
        ours, theirs = spaced_timesteps(config, num_steps), reference[f"timesteps/{spacing}/{num_steps}"]
        assert len(ours) == num_steps
        # In diffusers, rounding makes some trailing ranges one step too long.
        np.testing.assert_array_equal(ours, theirs[:num_steps])


class GaussianUNet(keras.layers.Layer):
    """The exact denoiser of data that is normal with this mean and deviation: it predicts the sample."""

    def __init__(self, schedule, mean, deviation):
        super().__init__()
        self.schedule, self.mean, self.deviation = schedule, mean, deviation

    def call(self, inputs):
        latents, timesteps = inputs
        at = ops.cast(timesteps, "int32")
        signal = ops.reshape(ops.take(self.schedule.signal_rates, at), (-1, 1, 1, 1))
        noise = ops.reshape(ops.take(self.schedule.noise_rates, at), (-1, 1, 1, 1))
        signal_variance = (signal * self.deviation) ** 2
        gain = signal * self.deviation**2 / (signal_variance + noise**2)
        return self.mean + gain * (latents - signal * self.mean)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_samples_a_gaussian(eta):
    mean, deviation = 0.7, 0.25
    schedule = NoiseSchedule(
        SchedulerConfig(
            prediction_type="sample",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
        )
    )
    denoiser = Denoiser(GaussianUNet(schedule, mean, deviation), schedule)
    errors = []
    for num_steps in (40, 200, 1000):
        streams = NoiseStreams([3])
        noise = streams.draw((64, 64, 4))
        samples = last(denoiser.steps(noise, num_steps=num_steps, eta=eta, streams=streams))
        errors.append(abs(samples.std() / deviation - 1))
        assert abs(samples.mean() - mean) < 0.01
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.035  # 0.013 and 0.027 in theory


def test_numbers_and_weights_are_inputs_of_one_program():
    unet = ToyUNet()
    denoiser = Denoiser(unet, NoiseSchedule(SchedulerConfig()))
    contexts = np.random.default_rng(0).standard_normal((4, 2, 5, 3)).astype("float32")
    results = []
    settings = """
        0 3 4 0 0 1
        0 5 4 0 0 1
        1 5 4 0 0 1
        1 5 4 1 0 1
        1 5 9 1 0 1
        1 5 9 1 1 1
        1 5 9 1 1 2
    """.strip().splitlines()
    for seed, scale, num_steps, eta, positive, gain in (map(int, row.split()) for row in settings):
        unet.gain.assign(gain)
        streams = NoiseStreams([seed, seed + 1])
        options = {"guidance_scale": scale, "num_steps": num_steps, "eta": eta, "streams": streams}
        results.append(last(denoiser.steps(streams.draw(SHAPE), contexts[positive], contexts[3], **options)))
    assert unet.batches == [4]  # one trace, of the doubled batch
    for first, second in itertools.pairwise(results):
        assert np.abs(first - second).max() > 1e-3

    # Without guidance the batch is not doubled: another program.
    one = last(denoiser.steps(streams.draw(SHAPE), contexts[1], contexts[3], guidance_scale=1, num_steps=2))
    assert unet.batches == [4, 2] and one.shape == (2, *SHAPE)


def test_steps_are_counted_and_yielded():
    denoiser = Denoiser(ToyUNet(), NoiseSchedule(SchedulerConfig()))
    noise = NoiseStreams([0]).draw(SHAPE)
    steps = list(denoiser.steps(noise, num_steps=3))
    assert [denoised.step for denoised in steps] == [1, 2, 3]
    assert all(denoised.latents.shape == (1, *SHAPE) for denoised in steps)


def test_noise_depends_on_its_own_seed_alone():
    streams, second = NoiseStreams([4, 5, 6]), NoiseStreams([5])
    for _ in range(3):
        drawn = streams.draw(SHAPE)
        assert drawn.shape == (3, *SHAPE) and drawn.dtype == np.float32
        np.testing.assert_array_equal(drawn[1:2], second.draw(SHAPE))
    many = NoiseStreams([0]).draw((100_000,))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    # Pictures made today are to be made again tomorrow.
    np.testing.assert_allclose(many[0, :3], [0.05991104, 0.01555963, -1.1644385], rtol=1e-6)


def test_bad_settings_end_in_one_line_before_the_first_step():
    denoiser = Denoiser(ToyUNet(), NoiseSchedule(SchedulerConfig()))
    noise = np.zeros((1, *SHAPE), "float32")
    for options, line in [
        ({"sampler": "euler_z"}, "sampler 'euler_z': unknown; use one of ddim"),
        ({"num_steps": 0}, "num_steps 0: out of range; use 1 to 1000"),
        ({"num_steps": 1001}, "num_steps 1001: out of range"),
        ({"num_steps": 1000}, "starts beyond timestep 999; use fewer steps"),
        ({"eta": 1.5}, "eta 1.5: out of range"),
        ({"eta": -0.1}, "eta -0.1: out of range"),
    ]:
        with pytest.raises(UserError, match=line):
            denoiser.steps(noise, **options)
    with pytest.raises(UserError, match="timestep_spacing 'even': unknown; use leading"):
        spaced_timesteps(SchedulerConfig(timestep_spacing="even"), 10)
    assert {name: find_sampler(name) for name in SAMPLERS} == SAMPLERS
