"""The demonstration: images of the bundled model, upscaled, and before and after fine-tuning on grey ones."""

import json
import shutil
import time

import numpy as np
from PIL import Image

from keras_sd.data.emoji.source import load_emoji
from keras_sd.data.folders import METADATA
from keras_sd.data.sources import batches, load_source
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.files.image_files import image_grid, save_png
from keras_sd.files.writing import write_json, write_text
from keras_sd.metrics.features import ClipFeatures, extract
from keras_sd.metrics.kid import paired_kernel_inception_distance
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.pipeline.upscaler import Upscaler
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.encodings import EncodedSource
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.text_to_image import diffusion_example, train_text_to_image
from keras_sd.training.trainer import Settings

PROMPTS = (
    "red heart",
    "grinning face",
    "pizza",
    "flag of Japan",
    "rocket",
    "cat face",
    "tulip",
    "sun",
    "red apple",
    "soccer ball",
    "snowman",
    "blue circle",
)
IMAGE_SIZE = 64
UPSCALED = 4  # of the prompts
DRAWS = 4  # noise samples for each held-out image; the loss is their mean


def run_demo(
    folder,
    say=print,
    max_train_steps=200,
    training_images=600,
    held_out_images=48,
    num_inference_steps=20,
    jit_compile=True,
):
    """Generate, fine-tune on grey emoji images, and compare loss and KID on held-out ones.

    Args:
        folder: output folder; created if necessary.
        say: called with each line of the report.
        max_train_steps: optimizer updates.
        training_images, held_out_images: sizes of the two sets of grey images.
        num_inference_steps: denoising steps of each image.
        jit_compile: whether XLA compiles on TensorFlow.

    Returns:
        Dictionary with the figures "before" and "after", each with "loss" and "kid", also written as
        `results.json`.
    """
    start = time.perf_counter()
    # With one batch size, sampling is compiled once.
    pipeline = StableDiffusion.from_preset("emoji", batch_size=len(PROMPTS), jit_compile=jit_compile)
    drawn = save_grid(pipeline, folder / "before.png", num_inference_steps)
    say(f"{folder / 'before.png'}: {len(PROMPTS)} prompts, as the bundled model draws them")
    save_upscaled(drawn[:UPSCALED], folder / "upscaled.png")
    say(f"{folder / 'upscaled.png'}: {UPSCALED} of them at {IMAGE_SIZE} pixels, and upscaled beside")

    images = folder / "images"
    write_grey_images(images, training_images, held_out_images)
    say(f"{images}: {training_images} grey images with captions to learn from, {held_out_images} held out")
    held_out, training = (examples_of(images, split) for split in ("validation", "train"))
    # Encoded together, they need one compilation.
    encoded_held_out, encoded_training = EncodedSource(
        [*held_out, *training],
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.tokenizer,
        jit_compile=jit_compile,
    ).split(len(held_out))
    measure = Measurement(pipeline, held_out, encoded_held_out, jit_compile)
    figures = {"before": measure(num_inference_steps)}

    def make_evaluation(trainer):
        def evaluate(step):
            with trainer.ema.applied():
                figures["after"] = measure(num_inference_steps)
                save_grid(pipeline, folder / "after.png", num_inference_steps)

        return evaluate

    shutil.rmtree(folder / "run", ignore_errors=True)  # of an earlier demonstration
    settings = Settings(
        output_dir=folder / "run",
        max_train_steps=max_train_steps,
        train_batch_size=32,
        learning_rate=3e-4,
        lr_warmup_steps=max_train_steps // 10,
        evaluation_steps=max_train_steps,
        checkpointing_steps=max_train_steps,
        checkpoints_total_limit=1,
        jit_compile=jit_compile,
    )
    train_text_to_image(
        settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded_training,
        make_evaluation=make_evaluation,
        export=pipeline.save,
    )
    if "after" not in figures:
        return figures  # interrupted by the user
    write_json(folder / "results.json", figures)
    report(folder, figures, time.perf_counter() - start, say)
    return figures


def report(folder, figures, seconds, say):
    """Report the figures and the files."""
    say(f"\n{'held-out grey images':<24}{'before':>10}{'after':>10}")
    for name, title in (("loss", "loss"), ("kid", "KID (kid_emoji)")):
        say(f"{title:<24}{figures['before'][name]:>10.4f}{figures['after'][name]:>10.4f}")
    say(f"\nIn {seconds:.0f} s, these were written:")
    for name, what in (
        ("before.png", "the bundled model's images"),
        ("upscaled.png", "some of them upscaled: keras-sd generate heart --upscale"),
        ("after.png", "the same prompts and seeds, fine-tuned"),
        ("images/", "the data set"),
        ("run/logs/", "the loss of each step, for TensorBoard too"),
        ("run/model/", f"the fine-tuned model: keras-sd generate heart --model {folder / 'run/model'}"),
        ("results.json", "the figures above"),
    ):
        say(f"  {folder / name}  {what}")


class Measurement:
    """Loss and KID of a pipeline on captioned images, with the same noise at each call.

    Args:
        pipeline: a `StableDiffusion`.
        examples: the images with their captions.
        encoded: the same images as an `EncodedSource`.
        jit_compile: whether XLA compiles on TensorFlow.
    """

    def __init__(self, pipeline, examples, encoded, jit_compile=True):
        self.pipeline = pipeline
        self.prompts = [example["captions"][0] for example in examples]
        self.extractor = ClipFeatures(pipeline.image_encoder, jit_compile=jit_compile)
        self.real = extract(self.extractor, np.stack([example["image"] for example in examples]))
        self.schedule = NoiseSchedule(pipeline.scheduler_config)
        self.objective = DiffusionObjective(pipeline.unet, self.schedule)
        self.encoded = encoded

    def __call__(self, num_inference_steps):
        generated = self.pipeline.text_to_image(
            self.prompts, num_inference_steps=num_inference_steps, seed=0, progress=False
        )
        kid = paired_kernel_inception_distance(self.real, extract(self.extractor, generated))
        return {"loss": self.loss(), "kid": kid.mean}

    def loss(self):
        noise = NoiseDrawing(DiffusionSettings(), self.schedule)

        def draw(example, generator):
            return diffusion_example(example, generator, noise=noise, caption_dropout=0.0)

        batch_size = min(50, len(self.encoded))
        stream = iter(batches(self.encoded, batch_size=batch_size, seed=1, draw=draw))
        count = DRAWS * len(self.encoded) // batch_size
        return float(np.mean([np.mean(self.objective(next(stream))) for _ in range(count)]))


def examples_of(images, split):
    """Return one split of a folder of images as a list."""
    source = load_source(str(images), split, IMAGE_SIZE)
    return [source[index] for index in range(len(source))]


def save_grid(pipeline, path, num_inference_steps):
    """Write a grid with one image of each prompt; return the images."""
    images = pipeline.text_to_image(
        list(PROMPTS), num_inference_steps=num_inference_steps, seed=0, progress=False
    )
    save_png(image_grid(images, labels=PROMPTS, columns=4, scale=2), path)
    return images


def save_upscaled(images, path):
    """Write images of the first prompts, each enlarged pixel by pixel and beside it upscaled."""
    # So few images are faster without XLA.
    larger = Upscaler.load("emoji-upscaler", jit_compile=False).upscale(images, seed=0)
    enlarged = images.repeat(2, axis=1).repeat(2, axis=2)
    pairs = np.stack([enlarged, larger], axis=1).reshape(-1, *larger.shape[1:])
    sides = [each.shape[1] for each in (images, larger)]
    labels = [f"{prompt}, {side} px" for prompt in PROMPTS[: len(images)] for side in sides]
    save_png(image_grid(pairs, labels=labels, columns=4), path)


def write_grey_images(folder, training_images, held_out_images):
    """Write base emoji in grey with captions as a training folder, held-out ones in `validation`."""
    emoji = [one for one in load_emoji() if one.code == one.concept]
    order = np.random.default_rng(0).permutation(len(emoji))
    held_out, training = np.split(order[: training_images + held_out_images], [held_out_images])
    for part, indices in ((folder, training), (folder / "validation", held_out)):
        lines = []
        for one in (emoji[index] for index in indices):
            grey = np.asarray(Image.fromarray(one.load(IMAGE_SIZE)).convert("L"))
            save_png(grey, part / f"{one.code}.png")
            lines.append(json.dumps({"file_name": f"{one.code}.png", "text": one.captions[0]}) + "\n")
        write_text(part / METADATA, "".join(lines))
