"""The command that distils a model to a few sampling steps: a latent consistency model's LoRA (LCM-LoRA)."""

import click

from keras_sd.finetune import (
    add_loras,
    encoded_examples,
    low_rank_options,
    pretrained_option,
    validation_option,
)
from keras_sd.train_options import evaluation_options, open_pipeline, run_options, settings_of


@click.command()
@run_options(
    output_dir="runs/lcm",
    train_batch_size=64,
    learning_rate=1e-3,
    ema_decay=0.99,
)
@pretrained_option
@low_rank_options(rank=16, layers="all")
@click.option(
    "--guidance-scale", default=5.0, show_default=True, help="Guidance of the teacher, which is distilled in."
)
@click.option(
    "--num-ddim-timesteps",
    default=10,
    show_default=True,
    type=click.IntRange(1, 50),
    help="Steps of DDIM by which the teacher gets from noise to a picture.",
)
@click.option(
    "--loss-type",
    default="huber",
    show_default=True,
    type=click.Choice(["l2", "huber"]),
    help="Squared error or pseudo-Huber loss.",
)
@click.option(
    "--huber-c",
    default=0.001,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Where the pseudo-Huber loss turns from squared to absolute error.",
)
@validation_option
@evaluation_options(num_inference_steps=4)
def lcm(rank, lora_alpha, lora_layers, num_ddim_timesteps, loss_type, huber_c, **options):
    """Distil a model to a few steps of the sampler `lcm`, as a LoRA."""
    settings = settings_of(options)
    settings.use_precision()
    from keras_sd.training.consistency import train_consistency
    from keras_sd.training.lora import save_lora

    alpha = rank if lora_alpha is None else lora_alpha
    pipeline = open_pipeline(
        options, lambda parts: add_loras(parts, ["unet"], rank, alpha, everywhere=lora_layers == "all")
    )
    encoded, repeats, make_evaluation = encoded_examples(
        settings, options, pipeline, pipeline.text_encoder, sampler="lcm", guidance_scale=1.0
    )
    train_consistency(
        settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded,
        num_ddim_timesteps=num_ddim_timesteps,
        guidance_scale=options["guidance_scale"],
        huber_c=huber_c if loss_type == "huber" else None,
        identity={"rank": rank, "alpha": alpha},
        repeats=repeats,
        make_evaluation=make_evaluation,
        export=lambda folder: save_lora(folder, {"unet": pipeline.unet}, alpha),
    )
