"""Training of the KL autoencoder that turns pictures into latents."""

import dataclasses

import numpy as np
from keras import ops

from keras_sd.data.datasets import batches
from keras_sd.images import pictures_from_unit
from keras_sd.metrics.reconstruction import peak_signal_to_noise_ratio
from keras_sd.models.vae import AutoencoderKL
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


def train_autoencoder(settings, config, source, held_out, *, repeats=None, kl_weight=3e-4):
    """Trains an `AutoencoderKL` and writes it to `output_dir/model/vae`.

    Args:
        settings: `trainer.Settings`.
        config: `VAEConfig`; its scaling factor is measured at the end.
        source: examples with an `image` of `config.sample_size`.
        held_out: examples on which the reconstruction is measured.
        repeats: how often an epoch shows each example.
        kl_weight: weight of the divergence, per latent number.

    Returns:
        The trained model with its EMA weights, or None when it was stopped before the end.
    """
    settings.use_precision()
    vae = AutoencoderKL(config)
    trainer = Trainer(
        AutoencoderObjective(vae, kl_weight),
        settings,
        {"method": "vae", "model": config.to_dict(), "data": len(source), "kl_weight": kl_weight},
    )
    shape = latent_shape(config, config.sample_size)

    def draw(example, generator):
        image = example["image"]
        if generator.random() < 0.5:
            image = image[:, ::-1]
        return {"images": image, "noise": generator.standard_normal(shape, dtype="float32")}

    def make_batches(start):
        return batches(
            source,
            batch_size=settings.train_batch_size,
            seed=settings.seed,
            draw=draw,
            start=start,
            repeats=repeats,
        )

    held_out_images = np.stack([example["image"] for example in held_out])

    def evaluate(step):
        with trainer.ema.applied():
            psnr = peak_signal_to_noise_ratio(held_out_images, reconstruct(vae, held_out_images))
        trainer.log.log_scalars(step, {"reconstruction_psnr": psnr})

    if not trainer.run(make_batches, evaluate):
        return None
    with trainer.ema.applied():
        images = np.stack([source[index]["image"] for index in range(len(source))])
        config = dataclasses.replace(config, scaling_factor=measure_scale(vae, images))
        write_part(settings.output_dir / "model", "vae", config.to_dict(), torch_state(vae))
    return vae
