"""The alignment with an image encoder against NumPy, its targets, and what it trains."""

import functools

import numpy as np
import pytest

from keras_sd.data.folders import FolderSource
from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.sources import batches
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.unet import UNet
from keras_sd.training.alignment import AlignedObjective, Alignment
from keras_sd.training.caching import Caching
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.stored_encodings import encoded_source
from keras_sd.training.text_to_image import diffusion_example
from tests import tiny
from tests.programs import run_python
from tests.training.test_stored_encodings import write_images

DOWNSAMPLING = 4

AGAINST_NUMPY = """
import numpy as np
from keras import ops
from keras_sd.training.objectives import DiffusionObjective
from tests import tiny
from tests.training.test_alignment import SCHEDULE, batch_of, objective_of

objective, batch = objective_of(tiny.SD1_UNET, weight=0.7), batch_of(tiny.SD1_UNET)
tiny.randomize(objective.alignment_projection, 5, 0.3)
rates = [table[batch["timesteps"]].reshape(2, 1, 1, 1) for table in
         (SCHEDULE.signal_rates, SCHEDULE.noise_rates)]
noisy = (rates[0] * batch["samples"] + rates[1] * batch["noise"]).astype("float32")
plain = objective.unet([noisy, batch["timesteps"], batch["context"]])
predicted, hidden = objective.unet([noisy, batch["timesteps"], batch["context"]], returns_bottleneck=True)
np.testing.assert_array_equal(plain, predicted)
hidden = ops.convert_to_numpy(hidden)
assert hidden.shape == (2, 2, 2, 16)
for index, layer in enumerate(objective.alignment_projection.layers):
    hidden = hidden @ np.asarray(layer.kernel) + np.asarray(layer.bias)
    if index < 2:
        hidden = hidden / (1 + np.exp(-hidden))
target = batch["alignment_target"]
lengths = np.linalg.norm(hidden, axis=-1) * np.linalg.norm(target, axis=-1)
cosines = (hidden * target).sum(axis=-1) / lengths
errors = np.square(ops.convert_to_numpy(predicted) - batch["noise"])
mask = np.random.default_rng(3).random((2, 4, 4, 1), dtype="float32")
# From 4 x 4 to 2 x 2 by a triangle of weights 1 3 3 1, cut at the edge, and divided by their sum.
rows = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
small = np.einsum("ph,qw,nhw->npq", rows, rows, mask[..., 0])
for one, weights, positions in ((batch, 1, 1), (batch | {"mask": mask}, mask, small)):
    found = objective(one)
    losses = np.mean(weights * errors, axis=(1, 2, 3))
    similarities = np.mean(positions * cosines, axis=(1, 2))
    np.testing.assert_allclose(ops.convert_to_numpy(found["loss"]), losses, rtol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(found["alignment"]), similarities, rtol=1e-4, atol=1e-6)
    loss = objective.compute_loss(y_pred=found)
    np.testing.assert_allclose(loss, losses.mean() - 0.7 * similarities.mean(), rtol=1e-5)
# Without targets it is the loss of a run without alignment.
batch.pop("alignment_target")
expected = DiffusionObjective(objective.unet, SCHEDULE)(batch)
np.testing.assert_array_equal(ops.convert_to_numpy(objective(batch)), ops.convert_to_numpy(expected))
"""
SCHEDULE = NoiseSchedule(SchedulerConfig())


def alignment_of(unet, weight=0.5):
    encoder = tiny.randomize(ImageEncoder(tiny.IMAGE_ENCODER), 4, 0.3)
    return Alignment(encoder, unet, DOWNSAMPLING, weight)


def objective_of(config, weight=0.5):
    unet = tiny.randomize(UNet(config), 2, 0.2)
    return AlignedObjective(unet, SCHEDULE, alignment=alignment_of(unet, weight))


def batch_of(config):
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape, dtype="float32")

    side = 4 // 2 ** (len(config.block_out_channels) - 1)
    return {
        "samples": normal(2, 4, 4, 4),
        "noise": normal(2, 4, 4, 4),
        "timesteps": np.array([1, 900], "int32"),
        "context": normal(2, 12, 16),
        "alignment_target": normal(2, side, side, 16),
    }


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_against_numpy(backend):
    run_python(["-c", AGAINST_NUMPY], backend)


def gradients(objective, batch, loss_of):
    """The gradients of a loss by the weights' names; of those that it does not reach there are none."""
    import tensorflow as tf

    parameters = parameter_paths(objective)
    with tf.GradientTape() as tape:
        loss = loss_of(objective(batch))
    found = tape.gradient(loss, [one.variable.value for one in parameters])
    names = [one.name for one in parameters]
    return {name: each for name, each in zip(names, found, strict=True) if each is not None}


def test_the_similarity_trains_the_layers_up_to_the_mid_block():
    objective = objective_of(tiny.SD1_UNET)
    found = gradients(objective, batch_of(tiny.SD1_UNET), lambda found: sum(found["alignment"]))
    names = {parameter.name for parameter in parameter_paths(objective)}
    after = ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")
    assert names - found.keys() == {name for name in names if name.startswith(after)}
    for name, gradient in found.items():
        assert np.abs(gradient).max() > 1e-9, name


@pytest.mark.parametrize("config", [tiny.SD1_UNET, tiny.SD2_UNET, tiny.ONE_BLOCK_UNET, tiny.PIXEL_UNET])
@pytest.mark.parametrize("size", [(4, 4), (7, 9)])
def test_the_bottleneck_has_the_shape_that_is_told(config, size):
    unet = UNet(config)
    inputs = [np.zeros((1, *size, config.in_channels), "float32"), np.array([5])]
    inputs += [np.zeros((1, 12, 16), "float32")] if config.cross_attention_dim else []
    outputs, deep, bottleneck = unet(inputs, returns_deep=True, returns_bottleneck=True)
    assert tuple(bottleneck.shape) == (1, *unet.bottleneck_shape(*size))
    assert tuple(outputs.shape) == (1, *size, config.out_channels)
    with pytest.raises(
        UserError, match="returns_bottleneck True: `deep` leaves the bottleneck out; leave one"
    ):
        unet(inputs, deep=deep, returns_bottleneck=True)


def test_targets_are_patches_at_the_places_of_the_bottleneck():
    image_size = tiny.IMAGE_ENCODER.image_size  # two patches a side
    images = np.random.default_rng(0).integers(0, 256, (3, image_size, image_size, 3), "uint8")
    fine, coarse = (alignment_of(UNet(config)) for config in (tiny.SD1_UNET, tiny.SD2_UNET))
    patches = np.asarray(fine.image_encoder.patch_features(images / np.float32(127.5) - 1))
    assert fine.shape(image_size, image_size) == (2, 2, 16)
    np.testing.assert_allclose(fine.targets(images), patches, atol=1e-5)
    assert coarse.shape(image_size, image_size) == (1, 1, 16)
    mean = patches.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(coarse.targets(images), mean, atol=1e-5)
    # Images of rows of one colour are the same at any width; the target has more columns then.
    images = np.repeat(images[:, :, :1], 2 * image_size, axis=2)
    patches = np.asarray(fine.image_encoder.patch_features(images[:, :, :image_size] / np.float32(127.5) - 1))
    wide = fine.targets(images)
    assert wide.shape[1:] == fine.shape(image_size, 2 * image_size) == (2, 4, 16)
    columns = np.array([[4, 0], [3, 1], [1, 3], [0, 4]]) / 4
    np.testing.assert_allclose(wide, np.einsum("qw,nhwc->nhqc", columns, patches), atol=1e-5)


def test_targets_are_of_the_drawn_flip_wherever_they_are_kept(tmp_path):
    sd = tiny.pipeline(jit_compile=False)
    alignment = Alignment(sd.image_encoder, sd.unet, sd.vae.config.downsampling)
    buckets = {"aspect_ratio_buckets": 3, "bucket_upscale": True, "random_flip": True}
    source = FramedSource(FolderSource(write_images(tmp_path / "images", 6), 16), Framing(16, **buckets))
    noise = NoiseDrawing(DiffusionSettings(), SCHEDULE)
    drawn = {}
    for mode in ("memory", "off"):
        encoded = encoded_source(
            *(source, sd.vae, None, sd.tokenizer, Caching(mode)),
            jit_compile=False,
            progress=False,
            alignment=alignment,
        )
        draw = functools.partial(diffusion_example, noise=noise, condition="token_ids")
        run = batches(encoded, batch_size=2, seed=0, draw=draw, buckets=encoded.buckets)
        run = encoded.encode_batches(run) if mode == "off" else run
        iterator = iter(run)
        drawn[mode] = [next(iterator) for _ in range(6)]
        # Of the images as they are, to see below that some were flipped.
        still = [encoded[index].get("alignment_target") for index in range(6)]
        drawn[mode, "still"] = still
    shapes = set()
    for kept, fresh in zip(drawn["memory"], drawn["off"], strict=True):
        shapes.add(kept["alignment_target"].shape)
        for name in ("samples", "alignment_target"):
            np.testing.assert_allclose(kept[name], fresh[name], atol=1e-5, err_msg=name)
    assert len(shapes) == 3
    still = drawn["memory", "still"]
    for index, expected in enumerate(still):
        image = source[index]["image"][None]
        np.testing.assert_allclose(expected, alignment.targets(image)[0], atol=1e-5)
    mirrored = [alignment.targets(source.flipped()[index]["image"][None])[0] for index in range(6)]
    counts = [sum(_is_among(one, some) for one in _targets(drawn["memory"])) for some in (still, mirrored)]
    assert min(counts) > 0 and sum(counts) == 12


def _targets(drawn):
    return [target for batch in drawn for target in batch["alignment_target"]]


def _is_among(target, others):
    return any(target.shape == other.shape and np.allclose(target, other, atol=1e-5) for other in others)


def test_refused():
    unet = UNet(tiny.ONE_BLOCK_UNET)
    with pytest.raises(UserError, match="^image_encoder .*: not an ImageEncoder; give one"):
        Alignment(unet, unet, DOWNSAMPLING)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="^alignment_weight .*: out of range; use a number above 0"):
            alignment_of(unet, weight)
    for caching in (Caching("disk"), Caching(None, "folder")):
        with pytest.raises(UserError, match="the targets of an alignment are not kept on disk"):
            encoded_source([1], None, None, None, caching, alignment=alignment_of(unet))
