"""The compiled loop: what is an input of it, what it keeps, what the network is shown."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.diffusion.denoiser import Denoiser, Known, NoiseStreams
from keras_sd.diffusion.samplers import SAMPLERS
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from tests.diffusion.toys import SHAPE, ToyUNet, last


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(ToyUNet(), NoiseSchedule(SchedulerConfig(prediction_type="v_prediction")))


def test_numbers_and_weights_are_inputs_of_one_program():
    unet = ToyUNet()
    denoiser = Denoiser(unet, NoiseSchedule(SchedulerConfig()))
    contexts = np.random.default_rng(0).standard_normal((4, 2, 5, 3)).astype("float32")
    results = []
    settings = """
        ddim    0 3 0 4 0 0 1
        ddim    0 5 0 4 0 0 1
        ddim    1 5 0 4 0 0 1
        ddim    1 5 1 4 0 0 1
        ddim    1 5 1 4 1 0 1
        ddim    1 5 1 9 1 0 1
        ddim    1 5 1 9 1 1 1
        ddim    1 5 1 9 1 1 2
        euler_a 1 5 1 9 0 1 2
        heun    1 5 1 9 0 1 2
        unipc   1 5 1 9 0 1 2
    """.strip().splitlines()
    for sampler, *numbers in map(str.split, settings):
        seed, scale, rescale, num_inference_steps, eta, positive, gain = map(int, numbers)
        unet.gain.assign(gain)
        streams = NoiseStreams([seed, seed + 1])
        options = {
            "guidance_scale": scale,
            "guidance_rescale": rescale,
            "num_inference_steps": num_inference_steps,
            "eta": eta,
        }
        steps = denoiser.steps(
            streams.draw(SHAPE), contexts[positive], contexts[3], sampler=sampler, streams=streams, **options
        )
        results.append(last(steps))
    assert unet.batches == [4]  # one trace, of the doubled batch
    for first, second in itertools.pairwise(results):
        assert np.abs(first - second).max() > 1e-3

    # Without guidance the batch is not doubled: another program.
    one = last(
        denoiser.steps(streams.draw(SHAPE), contexts[1], contexts[3], guidance_scale=1, num_inference_steps=2)
    )
    assert unet.batches == [4, 2] and one.shape == (2, *SHAPE)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_guidance_in_part_of_the_steps(sampler, denoiser):
    """As if the scale were changed between the steps; the rows of one step go together."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((2, *SHAPE)).astype("float32")
    context, negative = generator.standard_normal((2, 2, 5, 3)).astype("float32")
    asked = []
    program = denoiser._program

    def watched(*arguments):
        asked.append(arguments[4]["negative"] is not None)
        return program(*arguments)

    def drawn(**options):
        options = {"guidance_scale": 4.0, "sampler": sampler, "num_inference_steps": 5, **options}
        return last(denoiser.steps(noise, context, negative, **options))

    denoiser._program = watched
    part = drawn(guidance_interval=(0.2, 0.6))
    denoiser._program = program
    rows = [row.ends_step for row in SAMPLERS[sampler].tables(denoiser.schedule, 5).rows]
    steps = np.concatenate([[0], np.cumsum(rows)[:-1]])
    assert asked == [step in (1, 2) for step in steps]
    assert np.abs(part - drawn()).max() > 1e-3 and np.abs(part - drawn(guidance_scale=1.0)).max() > 1e-3
    np.testing.assert_array_equal(drawn(guidance_interval=(0.0, 1.0)), drawn())


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "heun", "dpm2", "euler_a"])
def test_whole_steps_are_counted_and_yielded(sampler, denoiser):
    streams = NoiseStreams([0, 1])
    noise = streams.draw(SHAPE)
    for first_step in (0, 2):
        options = {"sampler": sampler, "num_inference_steps": 5, "first_step": first_step, "streams": streams}
        steps = list(denoiser.steps(noise, **options))
        assert [denoised.step for denoised in steps] == list(range(1, 6 - first_step))
        assert all(denoised.latents.shape == (2, *SHAPE) for denoised in steps)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_noisy_latents_begin_where_the_step_does(sampler, denoiser):
    """The network is shown the right mixture also where a sampler scales what it begins with."""
    sample, noise = NoiseStreams([1]).draw(SHAPE), NoiseStreams([2]).draw(SHAPE)
    for first_step in (0, 3):
        grid = {"sampler": sampler, "num_inference_steps": 10, "first_step": first_step}
        start, rows, _ = SAMPLERS[sampler].tables(denoiser.schedule, 10, first_step=first_step)
        latents = denoiser.noisy(sample, noise, **grid)
        assert latents.dtype == np.float32
        expected = rows[0].level.signal_rate * sample + rows[0].level.noise_rate * noise
        np.testing.assert_allclose(start * latents, expected, atol=1e-6)


def test_what_is_known_stays(denoiser):
    streams = NoiseStreams([0, 1])
    noise, sample = streams.draw(SHAPE), NoiseStreams([5, 6]).draw(SHAPE)
    mask = np.zeros((1, *SHAPE[:2], 1), "float32")
    mask[:, :2] = 1
    known = Known(mask, sample, noise)
    for sampler in ("ddim", "heun", "euler_a", "unipc"):
        rows = SAMPLERS[sampler].tables(denoiser.schedule, 4).rows
        ends = [row.end for row in rows if row.ends_step]
        options = {"sampler": sampler, "num_inference_steps": 4, "streams": streams}
        steps = [np.asarray(denoised.latents) for denoised in denoiser.steps(noise, known=known, **options)]
        for latents, end in zip(steps[:-1], ends[:-1], strict=True):
            kept = end.signal_rate * sample + end.noise_rate * noise
            np.testing.assert_allclose(latents[:, 2:], kept[:, 2:], atol=1e-6)
            assert np.abs(latents - kept)[:, :2].max() > 1e-2
        np.testing.assert_allclose(steps[-1][:, 2:], sample[:, 2:], atol=1e-6)
        # A mask that keeps nothing changes nothing.
        options = {"sampler": sampler, "num_inference_steps": 4}
        nothing = Known(np.ones_like(mask), sample, noise)
        with_mask, without = (
            last(denoiser.steps(noise, known=known, streams=NoiseStreams([8, 9]), **options))
            for known in (nothing, None)
        )
        np.testing.assert_allclose(with_mask, without, atol=1e-6)


class ShownUNet(keras.layers.Layer):
    """Predicts no noise in the latents but what it is shown beside them."""

    def call(self, inputs, class_labels=None):
        latents, timesteps, *contexts = inputs
        assert latents.shape[-1] == SHAPE[-1] + 1
        shown = latents[..., -1:] + ops.cast(class_labels, "float32")[:, None, None, None]
        for context in contexts:
            shown = shown + ops.mean(context, axis=(1, 2))[:, None, None, None]
        return ops.broadcast_to(shown, (*latents.shape[:-1], SHAPE[-1]))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_network_is_shown_channels_and_class_labels(scale):
    schedule = NoiseSchedule(SchedulerConfig(prediction_type="sample", set_alpha_to_one=True))
    denoiser = Denoiser(ShownUNet(), schedule)
    channels = NoiseStreams([3, 4]).draw((*SHAPE[:2], 1))
    labels = np.array([2, 5], "int32")
    context, negative = np.full((2, 5, 3), 0.25, "float32"), np.full((2, 5, 3), -0.5, "float32")
    noise = NoiseStreams([0, 1]).draw(SHAPE)
    found = last(
        denoiser.steps(
            noise,
            context,
            negative,
            guidance_scale=scale,
            sampler="euler",
            num_inference_steps=3,
            channels=channels,
            class_labels=labels,
        )
    )
    guided = -0.5 + scale * 0.75
    expected = np.broadcast_to(channels + labels[:, None, None, None] + guided, found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_guidance_of_a_network_that_still_predicts_nothing():
    """A freshly made UNet's last layer is zero: there is no deviation to rescale by."""
    unet = ToyUNet()
    unet.gain.assign(0.0)
    denoiser = Denoiser(unet, NoiseSchedule(SchedulerConfig(prediction_type="v_prediction")))
    context = np.zeros((1, 5, 3), "float32")
    for rescale in (0.0, 0.7):
        options = {"guidance_scale": 5.0, "guidance_rescale": rescale, "num_inference_steps": 2}
        found = last(denoiser.steps(NoiseStreams([0]).draw(SHAPE), context, context, **options))
        assert np.isfinite(found).all()


def test_noise_depends_on_its_own_seed_alone():
    streams, second = NoiseStreams([4, 5, 6]), NoiseStreams([5])
    for _ in range(3):
        drawn = streams.draw(SHAPE)
        assert drawn.shape == (3, *SHAPE) and drawn.dtype == np.float32
        np.testing.assert_array_equal(drawn[1:2], second.draw(SHAPE))
    many = NoiseStreams([0]).draw((100_000,))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    # Images made today are to be made again tomorrow.
    np.testing.assert_allclose(many[0, :3], [0.05991104, 0.01555963, -1.1644385], rtol=1e-6)


def test_noise_is_drawn_once_for_each_row_that_uses_it(denoiser):
    for sampler, draws in [("euler_a", 4), ("ddpm", 4), ("dpmpp_2m_sde", 4), ("lcm", 4), ("heun", 0)]:
        streams, beside = NoiseStreams([0]), NoiseStreams([0])
        last(
            denoiser.steps(
                np.zeros((1, *SHAPE), "float32"), sampler=sampler, num_inference_steps=5, streams=streams
            )
        )
        for _ in range(draws):
            beside.draw(SHAPE)
        np.testing.assert_array_equal(streams.draw(SHAPE), beside.draw(SHAPE))


def test_bad_settings_end_in_one_line_before_the_first_step(denoiser):
    noise = np.zeros((1, *SHAPE), "float32")
    for options, line in [
        ({"sampler": "euler_z"}, "sampler 'euler_z': unknown; use one of ddim"),
        (
            {"num_inference_steps": 0},
            "num_inference_steps 0: out of range; use a whole number from 1 to 1000",
        ),
        (
            {"num_inference_steps": 5, "first_step": 5},
            "first_step 5: out of range; use a whole number from 0 to 4",
        ),
        ({"eta": 1.5}, "eta 1.5: out of range"),
        ({"sampler": "heun", "eta": 0.5}, "eta 0.5: Heun takes none"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5: out of range; use 0 .none. to 1"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval .0.5, 0.5.: not a part of the steps"),
    ]:
        with pytest.raises(UserError, match=line):
            denoiser.steps(noise, **options)
    for options in ({"sampler": "euler_a"}, {"eta": 0.5}):
        with pytest.raises(ValueError, match="draws noise; give streams"):
            denoiser.steps(noise, **options)
