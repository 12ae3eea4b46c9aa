"""Training of the KL autoencoder that turns pictures into latents."""

import dataclasses

import numpy as np
from keras import ops

from keras_sd.data.datasets import fingerprint_of
from keras_sd.errors import UserError
from keras_sd.images import pictures_from_unit
from keras_sd.metrics.reconstruction import peak_signal_to_noise_ratio
from keras_sd.training.lora import freeze
from keras_sd.training.losses import AutoencoderObjective, images_to_network
from keras_sd.training.trainer import Trainer
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.rules import torch_state


def latent_shape(config, image_size):
    """Shape (height, width, channels) of the latents of square pictures."""
    side = image_size // config.downsampling
    return side, side, config.latent_channels


def reconstruct(vae, images, batch_size=50):
    """Encodes and decodes uint8 pictures `(n, h, w, 3)`; the result is uint8 too."""
    outputs = [
        ops.convert_to_numpy(vae(images_to_network(images[start : start + batch_size])))
        for start in range(0, len(images), batch_size)
    ]
    return pictures_from_unit(np.concatenate(outputs))


def measure_scale(vae, images, batch_size=50):
    """The factor that gives the latents of these uint8 pictures unit variance.

    Latents are centred over the data set first, as Rombach et al. (2022, appendix G) do.
    """
    means = [
        ops.convert_to_numpy(vae.encode(images_to_network(images[start : start + batch_size])).mode())
        for start in range(0, len(images), batch_size)
    ]
    return float(1.0 / np.std(np.concatenate(means)))


def train_autoencoder(
    settings, vae, source, held_out, *, repeats=None, kl_weight=3e-4, random_crop=None, decoder_only=False
):
    """Trains an `AutoencoderKL` and writes it to `output_dir/model/vae`.

    Args:
        settings: `trainer.Settings`.
        vae: the autoencoder; the scaling factor of its latents is measured at the end, unless they stay as
            they are.
        source: examples with an `image` of `config.sample_size`.
        held_out: examples on which the reconstruction is measured.
        repeats: how often an epoch shows each example.
        kl_weight: weight of the divergence, per latent number.
        decoder_only: leaves the latents as they are and learns to decode their means more faithfully, as
            the decoders were that followed Stable Diffusion 1.
        random_crop: side of the squares, cut at random from the pictures, that are trained on; None trains
            on whole pictures.

    Raises:
        UserError: the squares are larger than the pictures, or no latents' size makes them.

    Returns:
        The trained model with its EMA weights, or None when it was stopped before the end.
    """
    config = vae.config
    crop = random_crop or config.sample_size
    if not 0 < crop <= config.sample_size or crop % config.downsampling:
        raise UserError(
            f"--random-crop {crop}: does not fit; use a multiple of {config.downsampling} up to "
            f"{config.sample_size}"
        )
    if decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            freeze(part)
    trainer = Trainer(
        AutoencoderObjective(vae, kl_weight),
        settings,
        {
            "method": "vae",
            "model": config.to_dict(),
            "data": fingerprint_of(source),
            "kl_weight": kl_weight,
            "random_crop": random_crop,
            "decoder_only": decoder_only,
        },
    )
    shape = latent_shape(config, crop)

    def draw(example, generator):
        image = example["image"]
        if crop < config.sample_size:
            top, left = generator.integers(config.sample_size - crop + 1, size=2)
            image = image[top : top + crop, left : left + crop]
        if generator.random() < 0.5:
            image = image[:, ::-1]
        noise = generator.standard_normal(shape, dtype="float32")
        return {"images": image, "noise": np.zeros_like(noise) if decoder_only else noise}

    held_out_images = np.stack([example["image"] for example in held_out])

    def evaluate(step):
        with trainer.ema.applied():
            psnr = peak_signal_to_noise_ratio(held_out_images, reconstruct(vae, held_out_images))
        trainer.log.log_scalars(step, {"reconstruction_psnr": psnr})

    if not trainer.run(source, draw, repeats=repeats, evaluate=evaluate):
        return None
    with trainer.ema.applied():
        if not decoder_only:
            images = np.stack([source[index]["image"] for index in range(len(source))])
            config = dataclasses.replace(config, scaling_factor=measure_scale(vae, images))
        if trainer.is_writer:
            write_part(settings.output_dir / "model", "vae", config.to_dict(), torch_state(vae))
    return vae
