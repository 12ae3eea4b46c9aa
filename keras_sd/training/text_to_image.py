"""Training of the text-to-image UNet on latents (Rombach et al., 2022)."""

import numpy as np

from keras_sd.data.datasets import batches
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.training.losses import DiffusionObjective
from keras_sd.training.trainer import Trainer


def diffusion_example(example, generator, *, num_train_timesteps, caption_dropout):
    """Draws what one training example needs: latents, noise, timestep and the encoding of a caption.

    Half of the draws take the first caption, which is the canonical one, the others any of them;
    `caption_dropout` of all take the empty one, for classifier-free guidance (Ho and Salimans, 2022).
    """
    contexts = example["contexts"]
    choice = generator.integers(len(contexts)) if generator.random() < 0.5 else 0
    dropped = generator.random() < caption_dropout
    mean = example["mean"]
    spread = generator.standard_normal(mean.shape, dtype="float32")
    return {
        "samples": mean + example["deviation"] * spread,
        "noise": generator.standard_normal(mean.shape, dtype="float32"),
        "timesteps": np.int32(generator.integers(num_train_timesteps)),
        "context": example["empty_context"] if dropped else contexts[choice],
    }


def train_text_to_image(
    settings,
    unet,
    scheduler_config,
    source,
    *,
    repeats=None,
    caption_dropout=0.1,
    min_snr_gamma=None,
    make_evaluation=None,
    export=None,
):
    """Trains a UNet on encoded examples.

    Args:
        settings: `trainer.Settings`.
        unet: the network, freshly made or loaded.
        scheduler_config: `SchedulerConfig`: noise schedule and prediction type.
        source: `encodings.EncodedSource`.
        repeats: how often an epoch shows each example.
        caption_dropout: share of examples that see the empty caption.
        min_snr_gamma: gamma of min-SNR weighting, or None for equal weights.
        make_evaluation: `make_evaluation(trainer)` gives what is called with the step at each evaluation.
        export: called at the end with the folder `output_dir/model`, while the EMA weights are in.

    Returns:
        Whether training got to its end.
    """
    schedule = NoiseSchedule(scheduler_config)
    trainer = Trainer(
        DiffusionObjective(unet, schedule, min_snr_gamma),
        settings,
        {
            "method": "text-to-image",
            "model": unet.config.to_dict(),
            "schedule": scheduler_config.to_dict(),
            "data": len(source),
            "caption_dropout": caption_dropout,
            "min_snr_gamma": min_snr_gamma,
        },
    )

    def draw(example, generator):
        return diffusion_example(
            example,
            generator,
            num_train_timesteps=schedule.num_train_timesteps,
            caption_dropout=caption_dropout,
        )

    def make_batches(start):
        return batches(
            source,
            batch_size=settings.train_batch_size,
            seed=settings.seed,
            draw=draw,
            start=start,
            repeats=repeats,
        )

    finished = trainer.run(make_batches, make_evaluation(trainer) if make_evaluation else None)
    if finished and export:
        with trainer.ema.applied():
            export(settings.output_dir / "model")
    return finished
