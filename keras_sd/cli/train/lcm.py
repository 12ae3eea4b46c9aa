"""The command that distils a model to a few sampling steps: a latent consistency model's LoRA (LCM-LoRA)."""

import click

from keras_sd.cli.command import Command
from keras_sd.cli.option_types import POSITIVE
from keras_sd.cli.train.fine_tuning import (
    encoded_examples,
    part_fingerprints,
    pretrained_option,
    validation_option,
)
from keras_sd.cli.train.lora import low_rank_identity, low_rank_options, open_with_loras
from keras_sd.cli.train.options import evaluation_options, model_option, refuse_unused, run_options
from keras_sd.cli.train.preparation import prepare


@click.command(cls=Command)
@run_options("lcm", output_dir="runs/lcm")
@pretrained_option
@low_rank_options(rank=16, layers="all")
@model_option("lcm", "guidance_scale", "Guidance of the teacher, which is distilled in.")
@click.option(
    "--num-ddim-timesteps",
    default=10,
    show_default=True,
    type=click.IntRange(1, 50),
    help="Steps of DDIM by which the teacher gets from noise to an image.",
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
    type=POSITIVE,
    help="Where the pseudo-Huber loss turns from squared to absolute error.",
)
@validation_option
@evaluation_options(num_inference_steps=4)
def lcm(**options):
    """Distil a model to a few steps of the sampler `lcm`, as a LoRA."""
    is_huber = options["loss_type"] == "huber"
    refuse_unused(["huber_c"], is_huber, "with --loss-type l2")
    identity = low_rank_identity(options, ["unet"])
    run = prepare("lcm", options, used=["guidance_scale"], identity=identity)
    from keras_sd.training.consistency import train_consistency
    from keras_sd.training.lora import save_lora

    pipeline, alpha, identity = open_with_loras(run, ["unet"])
    encoded, repeats, make_evaluation = encoded_examples(
        run, pipeline, pipeline.text_encoder, sampler="lcm", guidance_scale=1.0
    )
    train_consistency(
        run.settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded,
        num_ddim_timesteps=options["num_ddim_timesteps"],
        guidance_scale=options["guidance_scale"],
        huber_c=options["huber_c"] if is_huber else None,
        identity=part_fingerprints(pipeline, "vae", "text_encoder") | identity,
        repeats=repeats,
        make_evaluation=make_evaluation,
        export=lambda folder: save_lora(folder, {"unet": pipeline.unet}, alpha),
    )
