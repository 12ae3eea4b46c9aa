"""The command that distils a model for sampling in a few steps: LCM-LoRA (Luo et al., 2023)."""

import click

from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.option_types import POSITIVE
from keras_sd.cli.train.caching import caching_options
from keras_sd.cli.train.data_options import clip_skip_identity, dataset_config_option, source_options
from keras_sd.cli.train.fine_tuning import (
    clip_skip_option,
    encoded_examples,
    part_fingerprints,
    pretrained_option,
)
from keras_sd.cli.train.lora import lora_export, low_rank_identity, low_rank_options, open_with_loras
from keras_sd.cli.train.lora_ranks import take_ranks_of_file
from keras_sd.cli.train.optimizer import block_rates_option
from keras_sd.cli.train.options import evaluation_options, model_option, run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.cli.train.prompts import sample_options

_FEW_STEPS = ("--sampler", "lcm", "--num-inference-steps", "4", "--guidance-scale", "1")


@click.command(cls=Command)
@run_options("lcm", output_dir="runs/lcm")
@source_options()
@dataset_config_option
@pretrained_option
@low_rank_options(rank=16, layers="all")
@block_rates_option
@clip_skip_option
@model_option("lcm", "guidance_scale", "Guidance scale of the teacher; the student learns its result.")
@click.option(
    "--num-ddim-timesteps",
    default=10,
    type=click.IntRange(1, 50),
    help="DDIM steps of the teacher's sampling.",
)
@click.option(
    "--loss-type", default="huber", type=click.Choice(["l2", "huber"]), help="Squared or pseudo-Huber error."
)
@click.option(
    "--huber-c", default=0.001, type=POSITIVE, help="Error at which the pseudo-Huber loss becomes linear."
)
@caching_options
@sample_options("some of the captions")
@evaluation_options(num_inference_steps=4)
def lcm(**options):
    """Distil a model for sampling in 2 to 8 steps (sampler `lcm`), saved as a LoRA.

    \b
    python -m keras_sd.train lcm --pretrained-model-name-or-path sd-1.5 --train-data-dir images
    """
    is_huber = options["loss_type"] == "huber"
    refuse_unused(["huber_c"], is_huber, "with --loss-type l2")
    take_ranks_of_file(options)
    identity = low_rank_identity(options, ["unet"])
    identity |= {"num_ddim_timesteps": options["num_ddim_timesteps"]}
    identity |= {"huber_c": options["huber_c"] if is_huber else None}
    run = prepare("lcm", options, used=["guidance_scale"], identity=identity)
    from keras_sd.training.conditioning import refuse_conditioning
    from keras_sd.training.consistency import train_consistency

    pipeline, identity = open_with_loras(run, ["unet"])
    refuse_conditioning(pipeline, "lcm")
    encoded, repeats, make_evaluation, _ = encoded_examples(
        run, pipeline, pipeline.text_encoder, sampler="lcm", guidance_scale=1.0
    )
    finished = train_consistency(
        run.settings,
        pipeline.unet,
        pipeline.scheduler_config,
        encoded,
        num_ddim_timesteps=options["num_ddim_timesteps"],
        guidance_scale=options["guidance_scale"],
        huber_c=options["huber_c"] if is_huber else None,
        identity=part_fingerprints(pipeline, "vae", "text_encoder") | clip_skip_identity(options) | identity,
        repeats=repeats,
        make_evaluation=make_evaluation,
        export=lora_export(run, pipeline, ("unet",), [run.source]),
    )
    if finished:
        run.print_next_command("--lora", more=_FEW_STEPS)
