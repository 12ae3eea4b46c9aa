"""Code in the manner of two Keras tutorials runs after its import line is changed, offline."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_sd import keras_cv
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.models.unet import UNet
from tests import tiny

# The calls of the guide "High-performance image generation using Stable Diffusion in KerasCV", at 64 pixels.
GUIDE = """
import keras
import keras_sd.keras_cv as keras_cv

model = keras_cv.models.StableDiffusion(img_width=64, img_height=64, jit_compile=False)
images = model.text_to_image("a red heart", batch_size=3)
print(images.shape, images.dtype)
keras.backend.clear_session()

keras.mixed_precision.set_global_policy("mixed_float16")
model = keras_cv.models.StableDiffusion(img_width=64, img_height=64, jit_compile=False)
print(model.diffusion_model.compute_dtype, model.diffusion_model.variable_dtype)
images = model.text_to_image("a blue heart with a halo", batch_size=3, num_steps=3)
print(images.shape)
keras.mixed_precision.set_global_policy("float32")
"""

# The calls of the example "A walk through latent space with Stable Diffusion", at 64 pixels.
WALKS = """
import math
import keras
from keras import ops
from PIL import Image
import keras_sd.keras_cv as keras_cv

model = keras_cv.models.StableDiffusion(img_width=64, img_height=64, jit_compile=True)
encoding_1 = ops.squeeze(model.encode_text("a woman running"))
encoding_2 = ops.squeeze(model.encode_text("a grinning face"))
interpolated = ops.linspace(encoding_1, encoding_2, 4)
noise = keras.random.normal((64 // 8, 64 // 8, 4), seed=12345)
frames = []
for encodings in ops.split(interpolated, 2):
    images = model.generate_image(encodings, batch_size=2, num_steps=3, diffusion_noise=noise)
    frames += [Image.fromarray(image) for image in images]
frames[0].save("walk.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)

encoding = ops.squeeze(model.encode_text("a flag"))
x, y = keras.random.normal(noise.shape, seed=1), keras.random.normal(noise.shape, seed=2)
angles = ops.linspace(0.0, 2 * math.pi, 4)
circle = ops.tensordot(ops.cos(angles), x, axes=0) + ops.tensordot(ops.sin(angles), y, axes=0)
for batch in ops.split(circle, 2):
    print(model.generate_image(encoding, batch_size=2, num_steps=3, diffusion_noise=batch).shape)
latents = model.image_encoder.predict_on_batch(ops.cast(images, "float32") / 127.5 - 1)
print(latents.shape, model.decoder.predict_on_batch(latents).shape)
"""


# The steps of the example "Fine-tuning Stable Diffusion", at 64 pixels, on the published names' constructors.
FINE_TUNING = """
import math, sys
import keras
import numpy as np
import tensorflow as tf
from keras_sd.keras_cv.models import StableDiffusion
from keras_sd.keras_cv.models.stable_diffusion.clip_tokenizer import SimpleTokenizer
from keras_sd.keras_cv.models.stable_diffusion.diffusion_model import DiffusionModel
from keras_sd.keras_cv.models.stable_diffusion.image_encoder import ImageEncoder
from keras_sd.keras_cv.models.stable_diffusion.noise_scheduler import NoiseScheduler
from keras_sd.keras_cv.models.stable_diffusion.text_encoder import TextEncoder

LENGTH, WIDTH, folder = 12, 8, sys.argv[1]
tokenizer = SimpleTokenizer()
tokens = tokenizer.encode("a cat")
print(tokens)
tokens = np.array([[min(token, 500) for token in tokens] + [499] * (LENGTH - len(tokens))] * 2)
text_encoder = TextEncoder(LENGTH)
encoded = text_encoder([tokens, np.arange(LENGTH)[None].repeat(2, 0)], training=False)
print(encoded.shape)


class Trainer(keras.Model):
    def __init__(self, diffusion_model, vae, noise_scheduler):
        super().__init__()
        self.diffusion_model, self.vae, self.noise_scheduler = diffusion_model, vae, noise_scheduler
        self.vae.trainable = False

    def train_step(self, inputs):
        images, encoded_text = inputs["images"], inputs["encoded_text"]
        with tf.GradientTape() as tape:
            mean, log_variance = tf.split(self.vae(images, training=False), 2, axis=-1)
            log_variance = tf.clip_by_value(log_variance, -30.0, 20.0)
            latents = (mean + tf.exp(0.5 * log_variance) * tf.random.normal(tf.shape(mean))) * 0.18215
            noise = tf.random.normal(tf.shape(latents))
            steps = self.noise_scheduler.train_timesteps
            timesteps = tf.random.uniform((tf.shape(latents)[0],), maxval=steps, dtype=tf.int32)
            noisy = self.noise_scheduler.add_noise(tf.cast(latents, noise.dtype), noise, timesteps)
            embedding = tf.map_fn(self.embed, timesteps, fn_output_signature=tf.float32)
            embedding = tf.squeeze(embedding, 1)
            predicted = self.diffusion_model([noisy, embedding, encoded_text], training=True)
            loss = self.compute_loss(y=noise, y_pred=predicted)
        variables = self.diffusion_model.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"loss": loss}

    def embed(self, timestep, dim=WIDTH, max_period=10000):
        half = dim // 2
        frequencies = tf.exp(-math.log(max_period) * tf.range(half, dtype=tf.float32) / half)
        angles = tf.cast(tf.reshape(timestep, (1,)), tf.float32) * frequencies
        return tf.reshape(tf.concat([tf.cos(angles), tf.sin(angles)], 0), [1, -1])


image_encoder = ImageEncoder()
trainer = Trainer(
    diffusion_model=DiffusionModel(64, 64, LENGTH),
    vae=keras.Model(image_encoder.input, image_encoder.layers[-2].output),
    noise_scheduler=NoiseScheduler(),
)
trainer.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse", jit_compile=False)
images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
history = trainer.fit({"images": images, "encoded_text": np.asarray(encoded)}, epochs=2, verbose=0)
print(len(history.history["loss"]), np.isfinite(history.history["loss"]).all())
trainer.diffusion_model.save_weights(folder + "/tuned.weights.h5")

model = StableDiffusion(img_height=64, img_width=64, jit_compile=False)
before = model.text_to_image("red heart", num_steps=2, seed=1)
model.diffusion_model.load_weights(folder + "/tuned.weights.h5")
after = model.text_to_image("red heart", num_steps=2, seed=1)
print((before != after).any(), after.shape)
"""

# The steps of the example "Teach StableDiffusion new concepts via Textual Inversion", on the emoji model.
TEXTUAL_INVERSION = """
import math
import keras
import numpy as np
import tensorflow as tf
import keras_sd.keras_cv as keras_cv
from keras_sd.keras_cv.models.stable_diffusion import NoiseScheduler

stable_diffusion = keras_cv.models.StableDiffusion(64, 64, model="emoji")
LENGTH, WIDTH, TOKEN = 32, 128, "<my-token>"
print(stable_diffusion.tokenizer.add_tokens(TOKEN), stable_diffusion.tokenizer.add_tokens([TOKEN]))
tokens = stable_diffusion.tokenizer.encode("a <my-token> face")
vocabulary = len(stable_diffusion.tokenizer.vocab)
print(tokens[0] == stable_diffusion.tokenizer.start_of_text, vocabulary - 1 in tokens)
padded = tokens + [stable_diffusion.tokenizer.end_of_text] * (LENGTH - len(tokens))

initializer = stable_diffusion.tokenizer.encode("heart")[1]
first = stable_diffusion.text_encoder.layers[2].token_embedding(tf.constant(initializer))
old_tokens = stable_diffusion.text_encoder.layers[2].token_embedding.weights[0]
old_positions = stable_diffusion.text_encoder.layers[2].position_embedding.weights
new_weights = np.concatenate([old_tokens, np.expand_dims(first, 0)], axis=0)

new_encoder = keras_cv.models.stable_diffusion.TextEncoder(
    LENGTH, vocab_size=vocabulary, download_weights=False, model="emoji"
)
for index, layer in enumerate(stable_diffusion.text_encoder.layers):
    if index != 2:
        new_encoder.layers[index].set_weights(layer.get_weights())
new_encoder.layers[2].token_embedding.set_weights([new_weights])
new_encoder.layers[2].position_embedding.set_weights(old_positions)
stable_diffusion._text_encoder = new_encoder
stable_diffusion._text_encoder.compile(jit_compile=True)
same = stable_diffusion.text_to_image("a heart face", num_steps=2, seed=1)
as_initial = stable_diffusion.text_to_image("a <my-token> face", num_steps=2, seed=1)
print(np.abs(same.astype(int) - as_initial).max() <= 1)

stable_diffusion.diffusion_model.trainable = False
stable_diffusion.decoder.trainable = False
stable_diffusion.text_encoder.trainable = True


def traverse(layer):
    if hasattr(layer, "layers"):
        yield from layer.layers
    for name in ("token_embedding", "position_embedding"):
        if hasattr(layer, name):
            yield getattr(layer, name)


for layer in traverse(stable_diffusion.text_encoder):
    layer.trainable = isinstance(layer, keras.layers.Embedding) or "clip_embedding" in layer.name
new_encoder.layers[2].position_embedding.trainable = False
models = [stable_diffusion.text_encoder, stable_diffusion.diffusion_model, stable_diffusion.decoder]
print([[tuple(weight.shape) for weight in model.trainable_weights] for model in models])
training_image_encoder = keras.Model(
    stable_diffusion.image_encoder.input, stable_diffusion.image_encoder.layers[-2].output
)
positions = tf.constant([list(range(LENGTH))], dtype=tf.int32)


def embed(timestep, half=WIDTH // 2):
    frequencies = tf.exp(-math.log(10000) * tf.range(half, dtype=tf.float32) / half)
    angles = tf.cast(tf.reshape(timestep, (1,)), tf.float32) * frequencies
    return tf.reshape(tf.concat([tf.cos(angles), tf.sin(angles)], 0), [1, -1])


class FineTuner(keras.Model):
    def __init__(self, stable_diffusion, noise_scheduler):
        super().__init__()
        self.stable_diffusion, self.noise_scheduler = stable_diffusion, noise_scheduler

    def train_step(self, data):
        images, embeddings = data
        with tf.GradientTape() as tape:
            mean, log_variance = tf.split(training_image_encoder(images), 2, axis=-1)
            latents = mean * 0.18215
            noise = tf.random.normal(tf.shape(latents))
            steps = self.noise_scheduler.train_timesteps
            timesteps = tf.random.uniform((tf.shape(latents)[0],), maxval=steps, dtype=tf.int64)
            noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
            hidden = self.stable_diffusion.text_encoder([embeddings, tf.repeat(positions, 2, 0)])
            time = tf.squeeze(tf.map_fn(embed, timesteps, fn_output_signature=tf.float32), 1)
            predicted = self.stable_diffusion.diffusion_model([noisy, time, hidden])
            loss = tf.reduce_mean((predicted - noise) ** 2)
        weights = self.stable_diffusion.text_encoder.trainable_weights
        (gradient,) = tape.gradient(loss, weights)
        condition = tf.expand_dims(gradient.indices == vocabulary - 1, -1)
        values = tf.where(condition, gradient.values, 0)
        gradient = tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        self.optimizer.apply_gradients(zip([gradient], weights))
        return {"loss": loss}


schedule = NoiseScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear")
trainer = FineTuner(stable_diffusion, schedule)
trainer.compile(optimizer=keras.optimizers.SGD(1000.0))
images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
trainer.fit(images, np.array([padded] * 2, "int32"), epochs=2, batch_size=2, verbose=0)
table = new_encoder.layers[2].token_embedding.get_weights()[0]
print((table[:-1] == new_weights[:-1]).all(), (table[-1] != new_weights[-1]).any())
learned = stable_diffusion.text_to_image("a <my-token> face", num_steps=2, seed=1)
print((learned != as_initial).any())
"""


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """The cache of the Hugging Face hub, as a download of Stable Diffusion 1.5 would leave it."""
    home = tmp_path_factory.mktemp("huggingface")
    repository = home / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    commit = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    model = tiny.pipeline(SchedulerConfig(), tiny.ONE_BLOCK_UNET, tiny.EIGHTFOLD_VAE)
    model.save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return home


def run_tutorial(code, hub_cache, folder):
    environment = {**os.environ, "HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_performance_guide_runs(hub_cache, tmp_path):
    lines = run_tutorial(GUIDE, hub_cache, tmp_path)
    assert lines == ["(3, 64, 64, 3) uint8", "float16 float32", "(3, 64, 64, 3)"]


@pytest.mark.slow
def test_the_random_walks_run(hub_cache, tmp_path):
    lines = run_tutorial(WALKS, hub_cache, tmp_path)
    assert lines == ["(2, 64, 64, 3)"] * 2 + ["(2, 8, 8, 4) (2, 64, 64, 3)"]
    with Image.open(tmp_path / "walk.gif") as walk:
        assert walk.n_frames == 4


def test_fine_tuning_runs(hub_cache, tmp_path):
    lines = run_tutorial(FINE_TUNING, hub_cache, tmp_path)
    assert lines == ["[49406, 320, 2368, 49407]", "(2, 12, 16)", "2 True", "True (1, 64, 64, 3)"]


@pytest.mark.slow
def test_textual_inversion_runs(hub_cache, tmp_path):
    lines = run_tutorial(TEXTUAL_INVERSION, hub_cache, tmp_path)
    assert lines == ["1 0", "True True", "True", "[[(2049, 128)], [], []]", "True True", "True"]


@pytest.fixture(scope="module")
def compatible():
    return keras_cv.models.StableDiffusion(16, 16, model=tiny.pipeline(SchedulerConfig(), jit_compile=False))


def test_the_names_do_what_ours_do(compatible):
    ours = compatible.model
    images = compatible.text_to_image("red heart", "flag", 2, 4, unconditional_guidance_scale=3.0, seed=5)
    expected = ours.text_to_image(
        "red heart", "flag", num_images=2, num_steps=4, guidance_scale=3.0, seed=5, progress=False
    )
    np.testing.assert_array_equal(images, expected)
    long = "red heart " * 9
    assert compatible.generate_image(compatible.encode_text(long), num_steps=1, seed=0).shape == (
        1,
        16,
        16,
        3,
    )
    encoded = keras.ops.convert_to_numpy(compatible.image_encoder(images.astype("float32") / 127.5 - 1))
    np.testing.assert_allclose(encoded, ours.encode_image(images), atol=1e-4)
    assert compatible.tokenizer.inner is ours.tokenizer and compatible.diffusion_model.unet is ours.unet
    unguided = [
        compatible.text_to_image("red heart", num_steps=2, unconditional_guidance_scale=scale, seed=1)
        for scale in (0, 1)
    ]
    np.testing.assert_array_equal(*unguided)
    first, second = (compatible.text_to_image("red heart", num_steps=1) for _ in range(2))
    assert (first != second).any()  # without a seed each call draws anew


def test_arrays_that_do_not_fit_end_in_one_line(compatible):
    context = compatible.encode_text("red heart")
    noise = np.zeros((4, 4, 4))
    with pytest.raises(UserError, match="batch_size 0: out of range"):
        compatible.text_to_image("red heart", batch_size=0)
    with pytest.raises(UserError, match="guidance_scale nan: out of range"):
        compatible.text_to_image("red heart", unconditional_guidance_scale=float("nan"))
    with pytest.raises(UserError, match="diffusion_noise and seed: both given"):
        compatible.generate_image(context, diffusion_noise=noise, seed=1)
    with pytest.raises(UserError, match=r"diffusion_noise: of shape \(3, 4, 4, 4\) for batch_size 2"):
        compatible.generate_image(context, batch_size=2, diffusion_noise=[noise] * 3)


def test_names_are_where_keras_cv_has_them():
    """Of KerasCV's own tables of exports, and the modules that its tutorials import from."""
    import keras_cv as theirs

    for name in ("StableDiffusion", "StableDiffusionV2"):
        assert hasattr(theirs.models, name) and hasattr(keras_cv.models, name)
    names = [name for name in dir(theirs.models.stable_diffusion) if name[0].isupper()]
    assert set(names) == {
        *("Decoder", "DiffusionModel", "ImageEncoder", "NoiseScheduler", "SimpleTokenizer"),
        *("TextEncoder", "TextEncoderV2"),
    }
    for name in names:
        original = getattr(theirs.models.stable_diffusion, name)
        ours = getattr(keras_cv.models.stable_diffusion, name)
        place = original.__module__.replace("keras_cv.src", "keras_sd.keras_cv")
        assert getattr(importlib.import_module(place), name) is ours
        wanted = list(inspect.signature(original).parameters)
        assert list(inspect.signature(ours).parameters)[: len(wanted)] == wanted


def test_the_tokenizer_is_keras_cvs():
    from keras_cv.models.stable_diffusion import SimpleTokenizer as Theirs

    folder = Path(keras_cv.__file__).parents[1] / "bundled" / "clip"
    theirs, ours = Theirs(str(folder / "merges.txt.gz")), keras_cv.models.stable_diffusion.SimpleTokenizer()
    for text in ("a cat", "A  photo of a CAT, 4k!", "caf\u00e9 &amp; \u6771\u4eac \U0001f600", "it's 12", ""):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.start_of_text, ours.end_of_text) == (theirs.start_of_text, theirs.end_of_text)
    assert ours.add_tokens("<my-cat>") == theirs.add_tokens("<my-cat>") == 1
    assert ours.vocab == theirs.vocab and ours.encoder == theirs.encoder
    assert ours.encode("a <my-cat> here") == theirs.encode("a <my-cat> here")
    with pytest.raises(UserError, match="bpe_path: not supported"):
        type(ours)("merges.txt.gz")


@pytest.mark.parametrize(
    "options", [{}, {"beta_schedule": "scaled_linear"}, {"variance_type": "fixed_large"}]
)
def test_the_noise_scheduler_is_keras_cvs(options):
    from keras_cv.models.stable_diffusion import NoiseScheduler as Theirs

    # KerasCV's own clipping calls a function that Keras 3 has not.
    theirs, ours = (
        kind(clip_sample=False, **options)
        for kind in (Theirs, keras_cv.models.stable_diffusion.NoiseScheduler)
    )
    assert len(ours) == len(theirs) == ours.train_timesteps
    generator = np.random.default_rng(0)
    sample, noise = generator.standard_normal((2, 3, 4, 4, 2)).astype("float32")[:2]
    timesteps = np.array([0, 10, 999])
    np.testing.assert_allclose(
        ours.add_noise(sample, noise, timesteps), theirs.add_noise(sample, noise, timesteps), atol=1e-6
    )
    for timestep in (999, 500, 0):
        for predicts_noise in (True, False):
            steps = [one.step(noise, timestep, sample, predicts_noise) for one in (ours, theirs)]
            np.testing.assert_allclose(*steps, atol=2e-4 if predicts_noise else 1e-5)
    with pytest.raises(UserError, match="variance_type 'learned': not supported"):
        type(ours)(variance_type="learned")


def test_logarithms_of_variances_are_the_same_noise():
    kind = keras_cv.models.stable_diffusion.NoiseScheduler
    arrays = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 3)).astype("float32")
    for name in ("fixed_small", "fixed_large"):
        steps = [kind(variance_type=one).step(arrays[0], 7, arrays[1]) for one in (name, f"{name}_log")]
        np.testing.assert_array_equal(*steps)
        assert np.isfinite(steps[1]).all()


def test_parts_by_themselves(compatible, tmp_path):
    parts = keras_cv.models.stable_diffusion
    compatible.model.save(tmp_path / "model")
    name = str(tmp_path / "model")
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype("float32")
    np.testing.assert_allclose(
        parts.ImageEncoder(model=name)(images), compatible.image_encoder(images), atol=1e-5
    )
    latents = np.random.default_rng(1).standard_normal((1, 4, 4, 4)).astype("float32")
    np.testing.assert_allclose(
        parts.Decoder(16, 16, model=name)(latents), compatible.decoder(latents), atol=1e-5
    )
    with pytest.raises(UserError, match="download_weights=False"):
        parts.TextEncoder(12, vocab_size=600, model=name)
    untrained = parts.DiffusionModel(16, 16, 12, download_weights=False, model=name)
    assert [w.shape for w in untrained.weights] == [w.shape for w in compatible.diffusion_model.weights]


def test_a_diffusion_model_put_in_its_place_draws():
    model = keras_cv.models.StableDiffusion(16, 16, model=tiny.pipeline(SchedulerConfig(), jit_compile=False))
    before = model.text_to_image("red heart", num_steps=2, seed=1)
    other = tiny.randomize(UNet(tiny.SD1_UNET), 9, 0.2)
    model._diffusion_model = keras_cv.models.stable_diffusion.DiffusionModel(16, 16, 12, part=other)
    assert (model.text_to_image("red heart", num_steps=2, seed=1) != before).any()
    model._diffusion_model = keras.Sequential()
    with pytest.raises(UserError, match="diffusion_model: a Sequential, not a DiffusionModel"):
        model.text_to_image("red heart", num_steps=2, seed=1)
