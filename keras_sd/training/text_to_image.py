"""Training of the text-to-image UNet on latents (Rombach et al., 2022): whole, or by low-rank updates."""

import numpy as np

from keras_sd.data.sources import fingerprint_of
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.training.losses import DiffusionObjective
from keras_sd.training.trainer import Trainer


def diffusion_example(
    example,
    generator,
    *,
    num_train_timesteps,
    caption_dropout=0.0,
    condition="context",
    noise_offset=0.0,
    input_perturbation=0.0,
):
    """Draw what one training example needs: latents, noise, timestep and the encoding of a caption.

    Half of the draws take the first caption, which is the canonical one, the others any of them;
    `caption_dropout` of all take the empty one, for classifier-free guidance (Ho and Salimans, 2022).

    Args:
        example: of an `encodings.EncodedSource`, whose `condition` is to be given too.
        num_train_timesteps: timesteps are drawn from 0 up to it.
        noise_offset: how much noise is added that is the same all over a channel, which lets a model change
            the brightness of whole images.
        input_perturbation: how much more noise goes onto the latents than is the target (Ning et al., 2023).
    """
    contexts = example["contexts"]
    choice = generator.integers(len(contexts)) if generator.random() < 0.5 else 0
    dropped = generator.random() < caption_dropout
    mean = example["mean"]

    def normal(*shape):
        return generator.standard_normal(shape, dtype="float32")

    drawn = {
        "samples": mean + example["deviation"] * normal(*mean.shape),
        "noise": normal(*mean.shape),
        "timesteps": np.int32(generator.integers(num_train_timesteps)),
        condition: example["empty_context"] if dropped else contexts[choice],
    }
    if noise_offset:
        drawn["noise"] += np.float32(noise_offset) * normal(1, 1, mean.shape[-1])
    if input_perturbation:
        drawn["input_noise"] = drawn["noise"] + np.float32(input_perturbation) * normal(*mean.shape)
    return drawn


def train_text_to_image(
    settings,
    unet,
    scheduler_config,
    source,
    *,
    text_encoder=None,
    identity=None,
    repeats=None,
    min_snr_gamma=None,
    make_evaluation=None,
    export=None,
    **drawing,
):
    """Train what is trainable of a UNet, and of a text encoder, on encoded examples.

    Args:
        settings: `trainer.Settings`.
        unet: the network, freshly made or loaded, or with low-rank updates (`training.lora`).
        scheduler_config: `SchedulerConfig`: noise schedule and prediction type.
        source: `encodings.EncodedSource`, without a text encoder if one is trained.
        text_encoder: the one that is trained along, or None.
        identity: JSON values that, beside those of this function, must be a checkpoint's too.
        repeats: how often an epoch shows each example.
        min_snr_gamma: gamma of min-SNR weighting, or None for equal weights.
        make_evaluation: `make_evaluation(trainer)` gives what is called with the step at each evaluation.
        export: called at the end with the folder `output_dir/model`, while the EMA weights are in.
        drawing: caption_dropout, noise_offset and input_perturbation, as in `diffusion_example`.

    Returns:
        Whether training got to its end.
    """
    schedule = NoiseSchedule(scheduler_config)
    trainer = Trainer(
        DiffusionObjective(unet, schedule, min_snr_gamma, text_encoder),
        settings,
        {
            "method": "text-to-image",
            "model": unet.config.to_dict(),
            "schedule": scheduler_config.noise_schedule(),
            "data": fingerprint_of(source),
            "min_snr_gamma": min_snr_gamma,
            **drawing,
            **(identity or {}),
        },
    )

    def draw(example, generator):
        return diffusion_example(
            example,
            generator,
            num_train_timesteps=schedule.num_train_timesteps,
            condition=source.condition,
            **drawing,
        )

    return trainer.run(source, draw, repeats=repeats, make_evaluation=make_evaluation, export=export)
