"""Steps on the deep features of earlier ones, against a UNet and a loop written out by hand."""

import dataclasses

import numpy as np
import pytest
from keras import ops

from keras_sd.diffusion.denoiser import Denoiser, NoiseStreams
from keras_sd.diffusion.samplers import SAMPLERS
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.unet import UNet
from tests import tiny
from tests.diffusion.toys import last

SHAPE = (5, 4, 4)
NUM_STEPS, SCALE = 5, 3.0


@pytest.fixture(scope="module")
def unet():
    return tiny.randomize(UNet(tiny.SD1_UNET), 2, 0.2)


@pytest.fixture(scope="module")
def denoiser(unet):
    schedule = NoiseSchedule(SchedulerConfig(prediction_type="v_prediction"))
    # Compiling by XLA, which the test of both backends does, would take longer than all that is done here.
    return Denoiser(unet, schedule, jit_compile=False)


@pytest.fixture(scope="module")
def inputs():
    """Noise and two text encodings."""
    generator = np.random.default_rng(0)
    return [
        NoiseStreams([0, 1]).draw(SHAPE),
        *(generator.standard_normal((2, 6, 16)).astype("float32") for _ in range(2)),
    ]


def by_parts(unet, latents, timestep, context, deep=None):
    """The prediction of the two-level `tiny.SD1_UNET`, and what entered its outermost block of the way up."""
    time = unet._embed_time(np.full(len(latents), timestep, "float32"), None)
    outer, inner = unet.down_blocks
    first = unet.conv_in(latents)
    second = outer.attentions[0](outer.resnets[0](first, time), context)
    if deep is None:
        third = outer.downsamplers[0](second)
        fourth = inner.resnets[0](third, time)
        deep = unet.mid_block(fourth, time, context)
        for resnet, skip in zip(unet.up_blocks[0].resnets, (fourth, third), strict=True):
            deep = resnet(ops.concatenate([deep, skip], axis=-1), time)
        deep = unet.up_blocks[0].upsamplers[0](deep, size=SHAPE[:2])
    hidden = deep
    block = unet.up_blocks[1]
    for resnet, attention, skip in zip(block.resnets, block.attentions, (second, first), strict=True):
        hidden = attention(resnet(ops.concatenate([hidden, skip], axis=-1), time), context)
    return ops.convert_to_numpy(unet.conv_out(unet.conv_norm_out(hidden))), deep


def ddim_by_parts(denoiser, latents, context, negative, guided, whole):
    """DDIM of velocities; `guided` and `whole` say for each step what it does."""
    rows = SAMPLERS["ddim"].tables(denoiser.schedule, NUM_STEPS).rows
    deep = {}
    for index, row in enumerate(rows):
        velocities = {}
        for name, encoding in {"context": context, "negative": negative}.items():
            if name == "context" or guided[index]:
                given = None if whole[index] else deep[name]
                velocities[name], deep[name] = by_parts(denoiser.unet, latents, row.timestep, encoding, given)
        velocity = velocities["context"]
        if guided[index]:
            velocity = velocities["negative"] + SCALE * (velocity - velocities["negative"])
        signal_rate, noise_rate = (np.float32(rate) for rate in row.level)
        sample = signal_rate * latents - noise_rate * velocity
        noise = noise_rate * latents + signal_rate * velocity
        latents = np.float32(row.end.signal_rate) * sample + np.float32(row.end.noise_rate) * noise
    return latents


@pytest.mark.parametrize(
    ("options", "guided", "whole"),
    [
        ({"guidance_scale": 1.0, "reuse_interval": 2}, [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]),
        ({"guidance_scale": SCALE, "reuse_interval": 2}, [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]),
        ({"guidance_scale": SCALE, "reuse_interval": 3}, [1, 1, 1, 1, 1], [1, 0, 0, 1, 0]),
        # Where guidance begins and ends the whole UNet is asked.
        (
            {"guidance_scale": SCALE, "reuse_interval": 3, "guidance_interval": (0.2, 0.8)},
            [0, 1, 1, 1, 0],
            [1, 1, 0, 0, 1],
        ),
    ],
)
def test_reuse_against_a_loop_through_the_parts(denoiser, inputs, options, guided, whole):
    expected = ddim_by_parts(denoiser, *inputs, guided, whole)
    found = last(denoiser.steps(*inputs, num_inference_steps=NUM_STEPS, **options))
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.std())
    without = last(denoiser.steps(*inputs, num_inference_steps=NUM_STEPS, **options | {"reuse_interval": 1}))
    assert np.abs(found - without).max() > 1e-3


def test_without_reuse_nothing_changes(denoiser, inputs, unet):
    options = {"guidance_scale": SCALE, "num_inference_steps": 3}
    plain = last(denoiser.steps(*inputs, **options))
    np.testing.assert_array_equal(last(denoiser.steps(*inputs, reuse_interval=1, **options)), plain)
    latents, context, _ = inputs
    whole = [latents, np.array([999.0, 999.0], "float32"), context]
    prediction, deep = unet(whole, returns_deep=True)
    np.testing.assert_array_equal(prediction, unet(whole))
    # Its own deep features lead to the same prediction.
    np.testing.assert_array_equal(unet(whole, deep=deep), prediction)


ONE_LEVEL = dataclasses.replace(tiny.ONE_BLOCK_UNET, mid_block_type="UNetMidBlock2D")


@pytest.mark.parametrize("config", [ONE_LEVEL, tiny.ONE_BLOCK_UNET, tiny.SD2_UNET, tiny.PIXEL_UNET])
def test_deep_features_of_other_unets(config):
    """Of one level, with and without a middle block, of three, and without text."""
    unet = tiny.randomize(UNet(config), 2, 0.2)
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((1, 6, 5, config.in_channels)).astype("float32")
    context = [generator.standard_normal((1, 6, 16)).astype("float32")] if config.cross_attention_dim else []
    inputs = [latents, np.array([500.0], "float32"), *context]
    prediction, deep = unet(inputs, returns_deep=True)
    np.testing.assert_array_equal(prediction, unet(inputs))
    np.testing.assert_array_equal(unet(inputs, deep=deep), prediction)
    assert deep.shape[:3] == (1, 6, 5)
    assert np.abs(ops.convert_to_numpy(unet(inputs, deep=0 * deep) - prediction)).max() > 1e-3


@pytest.mark.parametrize("sampler", ["heun", "pndm"])
def test_both_evaluations_of_a_step_go_together(sampler, denoiser, inputs, monkeypatch):
    asked = []
    for kind, name in {"storing": "_storing_program", "reusing": "_reusing_program"}.items():
        program = getattr(denoiser, name)

        def watched(*arguments, kind=kind, program=program):
            asked.append(kind)
            return program(*arguments)

        monkeypatch.setattr(denoiser, name, watched)
    steps = denoiser.steps(
        *inputs, guidance_scale=SCALE, sampler=sampler, num_inference_steps=5, reuse_interval=2
    )
    assert np.isfinite(last(steps)).all()
    rows = [row.ends_step for row in SAMPLERS[sampler].tables(denoiser.schedule, 5).rows]
    assert len(rows) > 5
    steps = np.concatenate([[0], np.cumsum(rows)[:-1]])
    assert asked == ["reusing" if step % 2 else "storing" for step in steps]


def test_bad_interval_ends_in_one_line(denoiser, inputs):
    for interval in (0, -1, 1.5):
        with pytest.raises(UserError, match=f"reuse_interval {interval}: out of range; use a whole number"):
            denoiser.steps(*inputs, reuse_interval=interval)
