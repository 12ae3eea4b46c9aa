"""Training of the text-to-image UNet on latents (Rombach et al., 2022): all weights, or LoRA."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_sd.data.sources import fingerprint_of, framing_identity, repeats_identity
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.training.alignment import AlignedObjective, Alignment
from keras_sd.training.conditioning import Inpainting, Upscaling
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.encodings import EncodedSource
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.settings import Settings
from keras_sd.training.trainer import Trainer
from keras_sd.training.validation import Validation, validation_maker


def diffusion_example(
    example,
    generator,
    *,
    noise,
    caption_dropout=0.0,
    condition="context",
    conditioning=None,
):
    """Draw the arrays of one training example: latents, noise, timestep and the encoding of a caption.

    Half of the draws take the first caption, the canonical one; the others take any caption. The share
    `caption_dropout` of all takes the empty caption, for classifier-free guidance (Ho and Salimans, 2022).

    Args:
        example: an example of an `encodings.EncodedSource`. One of an `UnencodedSource` gives its image and
            the noise of its posterior, from which `encode_batches` makes the latents.
        noise: `NoiseDrawing`.
        caption_dropout: the share of empty captions, 0 to 1.
        condition: the source's `condition`, the key of the encoding.
        conditioning: of `training.conditioning`: what the UNet gets beside latents, made of the image.
    """
    contexts = example["contexts"]
    choice = generator.integers(len(contexts)) if generator.random() < 0.5 else 0
    dropped = generator.random() < caption_dropout
    shape = example["mean"].shape if "mean" in example else example["latent_shape"]

    def normal(*shape):
        return generator.standard_normal(shape, dtype="float32")

    if "mean" in example:
        drawn = {"samples": example["mean"] + example["standard_deviation"] * normal(*shape)}
    else:
        drawn = {"image": example["image"], "posterior_noise": normal(*shape)}
    for name in ("mask", "alignment_target"):
        if name in example:
            drawn[name] = example[name]
    context = example["empty_context"] if dropped else contexts[choice]
    drawn |= {**noise.draw(generator, shape), condition: context}
    return drawn if conditioning is None else drawn | conditioning.draw(example["image"], generator)


def diffusion_identity(method, unet, scheduler_config, source, repeats=None, diffusion=None, **values):
    """Return the JSON values that a run of a diffusion model shares with the run that resumes it.

    Args:
        method: the training method's name.
        unet, scheduler_config, source, repeats, diffusion: as in `train_text_to_image`.
        values: the method's own values.
    """
    cache_dtype = getattr(source, "cache_dtype", "float32")  # of a source that holds encodings
    return {
        "method": method,
        "model": unet.config.to_dict(),
        "schedule": scheduler_config.noise_schedule(),
        "data": fingerprint_of(source),
        **({"cache_dtype": cache_dtype} if cache_dtype != "float32" else {}),
        **framing_identity(source),
        **repeats_identity(repeats),
        **(diffusion.identity() if diffusion else {}),
        **values,
    }


def train_text_to_image(
    settings: Settings,
    unet: UNet,
    scheduler_config: SchedulerConfig,
    source: EncodedSource,
    *,
    text_encoder: TextEncoder | None = None,
    identity: dict[str, Any] | None = None,
    repeats: int | None = None,
    diffusion: DiffusionSettings | None = None,
    caption_dropout: float = 0.0,
    conditioning: Inpainting | Upscaling | None = None,
    alignment: Alignment | None = None,
    make_evaluation: Callable[[Trainer], Callable[[int], object]] | None = None,
    validation: Validation | None = None,
    export: Callable[[Path], object] | None = None,
) -> bool:
    """Train the trainable weights of a UNet, and of a text encoder, on encoded examples.

    Args:
        settings: `trainer.Settings`.
        unet: the network: a new or a loaded one, with or without low-rank updates (`training.lora`).
        scheduler_config: `SchedulerConfig`: noise schedule and prediction type.
        source: `encodings.EncodedSource`, without a text encoder if one is trained.
        text_encoder: the text encoder to train, too, or None.
        identity: further JSON values that a checkpoint must share with the run that resumes it.
        repeats: how often an epoch shows each example.
        diffusion: `DiffusionSettings`; None for their defaults.
        caption_dropout, conditioning: as in `diffusion_example`.
        alignment: `alignment.Alignment`, which the source has the targets of; None for none.
        make_evaluation: `make_evaluation(trainer)` returns a function of the step, called at each evaluation.
        validation: `validation.Validation`: encoded examples of the validation loss, or None for none.
        export: called at the end with the folder `output_dir/model`, while the EMA weights are swapped in.

    Returns:
        Whether training reached its end.
    """
    schedule, diffusion = NoiseSchedule(scheduler_config), diffusion or DiffusionSettings()
    if alignment is None:
        objective = DiffusionObjective(unet, schedule, diffusion, text_encoder)
    else:
        objective = AlignedObjective(unet, schedule, diffusion, text_encoder, alignment=alignment)
    trainer = Trainer(
        objective,
        settings,
        diffusion_identity(
            "text-to-image",
            unet,
            scheduler_config,
            source,
            repeats,
            diffusion,
            caption_dropout=caption_dropout,
        )
        | (alignment.identity() if alignment else {})
        | (identity or {}),
    )
    noise = NoiseDrawing(diffusion, schedule)
    draw = functools.partial(
        diffusion_example, noise=noise, condition=source.condition, conditioning=conditioning
    )
    return trainer.run(
        source,
        functools.partial(draw, caption_dropout=caption_dropout),
        repeats=repeats,
        make_evaluation=make_evaluation,
        make_validation=validation_maker(validation, draw, noise),
        export=export,
    )
