"""Training of the KL autoencoder (VAE) that maps images to latents."""

import dataclasses
import warnings

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.data.sources import fingerprint_of, framing_identity, image_batches, repeats_identity
from keras_sd.errors import UserError
from keras_sd.metrics.reconstruction import ReconstructionFigures
from keras_sd.models.pixels import images_from_unit, images_to_unit
from keras_sd.progress import Progress
from keras_sd.training.autoencoder_losses import AutoencoderLosses
from keras_sd.training.autoencoder_objective import AdversarialAutoencoderObjective, AutoencoderObjective
from keras_sd.training.lora import freeze
from keras_sd.training.trainer import Trainer
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.rules import torch_state

_SHOWN = 50  # number of training images to measure on if there are no held-out ones
_PIXELS = 4 * 512**2  # pixels per batch, as memory grows with them


def latent_shape(config, height, width):
    """Return the shape (height, width, channels) of the latents of an image of this size in pixels."""
    return height // config.downsampling, width // config.downsampling, config.latent_channels


def measure_reconstruction(vae, examples):
    """Return the figures of the reconstruction of examples (`ReconstructionFigures`)."""
    figures = ReconstructionFigures()
    for images in _image_batches(vae, examples):
        outputs = vae(images_to_unit(ops.convert_to_tensor(images)))
        figures.update(images, images_from_unit(ops.convert_to_numpy(outputs)))
    return figures.result()


def measure_scale(vae, examples):
    """Return the factor that gives the latents of the examples' images unit variance.

    Latents are centred over the data set first, as Rombach et al. (2022, appendix G) do.
    """
    count, total, squares = 0, 0.0, 0.0
    quiet = backend.process_index() != 0
    with Progress("measuring latents", len(examples), "images", delay=2.0, disable=quiet) as progress:
        for images in _image_batches(vae, examples):
            posterior = vae.encode(images_to_unit(ops.convert_to_tensor(images)))
            latents = ops.convert_to_numpy(posterior.mode()).astype("float64")
            count += latents.size
            total += latents.sum()
            squares += np.square(latents).sum()
            progress.update(len(images))
    return float(1.0 / np.sqrt(squares / count - (total / count) ** 2))


def _image_batches(vae, examples):
    """Return the images of examples, which have one size, in batches of a size that fits into memory."""
    height, width = examples[0]["image"].shape[:2]
    return image_batches(examples, min(50, max(1, _PIXELS // (height * width))))


def train_autoencoder(
    settings,
    vae,
    source,
    held_out,
    *,
    repeats=None,
    losses=None,
    image_encoder=None,
    crop_size=None,
    decoder_only=False,
):
    """Train an `AutoencoderKL` and write it to `output_dir/model/vae`.

    Args:
        settings: `trainer.Settings`.
        vae: the autoencoder; unless `decoder_only`, the scaling factor of its latents is measured at the end.
        source: examples with an `image`, of one size or of several in buckets. A `data.framing.FramedSource`
            crops and flips them at random.
        held_out: examples, of one size, on which the reconstruction is measured; without any, some training
            examples.
        repeats: how often an epoch shows each example.
        losses: `AutoencoderLosses`; None for their defaults.
        image_encoder: `models.image_encoder.ImageEncoder` of the perceptual distance, which is frozen; needed
            if `losses.perceptual_weight` is not 0.
        decoder_only: freeze the encoder, and train the decoder to decode the means of the latents, like the
            decoders published after Stable Diffusion 1.
        crop_size: side in pixels of random squares of the images to train on; None trains on whole images.

    Raises:
        UserError: `crop_size` is larger than the images, or no multiple of the downsampling factor; the
            perceptual distance has no image encoder.

    Returns:
        The trained model, or None if training was stopped before the end.
    """
    vae.check_encoder()
    losses = losses or AutoencoderLosses()
    if losses.perceptual_weight and image_encoder is None:
        raise UserError("perceptual_weight: the distance needs features; give an `image_encoder`")
    config = vae.config
    framing = getattr(source, "framing", None)
    side = framing.resolution if framing else config.sample_size
    if crop_size is not None and (not 0 < crop_size <= side or crop_size % config.downsampling):
        raise UserError(
            f"crop_size {crop_size}: does not fit; use a multiple of {config.downsampling} up to {side}"
        )
    squares = source.squares() if framing else source
    if decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            freeze(part)
    if image_encoder is not None:
        freeze(image_encoder)
    of_kind = AdversarialAutoencoderObjective if losses.adversarial_weight else AutoencoderObjective
    trainer = Trainer(
        of_kind(vae, losses, image_encoder),
        settings,
        {
            "method": "vae",
            "model": config.to_dict(),
            "data": fingerprint_of(source),
            **framing_identity(source),
            **repeats_identity(repeats),
            **losses.identity(),
            "random_crop": crop_size,
            "decoder_only": decoder_only,
        },
    )

    def draw(example, generator):
        image = example["image"]
        if crop_size:
            height, width = image.shape[:2]
            top, left = generator.integers((height - crop_size + 1, width - crop_size + 1))
            image = image[top : top + crop_size, left : left + crop_size]
        shape = latent_shape(config, *image.shape[:2])
        noise = generator.standard_normal(shape, dtype="float32")
        return {"images": image, "noise": np.zeros_like(noise) if decoder_only else noise}

    measured, suffix = held_out, ""
    if not len(held_out):
        indices = np.unique(np.linspace(0, len(source) - 1, min(_SHOWN, len(source))).astype(int))
        measured, suffix = [squares[index] for index in indices], "_train"
        if settings.evaluation_steps:
            warnings.warn(
                f"no held-out images: the reconstruction is measured on {len(measured)} training images; put "
                "others into a sub-folder `validation`",
                stacklevel=2,
            )

    def evaluate(step):
        with trainer.ema.applied():
            figures = measure_reconstruction(vae, measured)
        named = {f"reconstruction_{name}{suffix}": figure for name, figure in figures.items()}
        trainer.log_figures(step, named)

    scale = {}

    def prepare_export():
        if not decoder_only:
            scale["scaling_factor"] = measure_scale(vae, squares)

    def export(folder):
        write_part(folder, "vae", dataclasses.replace(config, **scale).to_dict(), torch_state(vae))

    finished = trainer.run(
        source,
        draw,
        repeats=repeats,
        make_evaluation=lambda trainer: evaluate,
        prepare_export=prepare_export,
        export=export,
    )
    return vae if finished else None
