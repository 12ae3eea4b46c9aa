"""Trains the bundled models, all stages one after the other, by the commands that anyone has.

python tools/train_emoji.py --output-dir runs/emoji

A stage that is finished is left out, and one that was ended goes on from its last checkpoint: the same
command resumes. `--list` prints the commands and runs none.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import click

from keras_sd.cli.command import HELP_SETTINGS
from keras_sd.cli.program import run_command
from keras_sd.errors import UserError

# Stage -> method and options; {folder} is that of the runs. Each writes {folder}/STAGE/model.
STAGES = {
    "vae": (
        "vae --max-train-steps 11500 --train-batch-size 8 --learning-rate 1.5e-3 --ema-decay 0.999 "
        "--mixed-precision bf16"
    ),
    # The decoder against a discriminator, for edges.
    "vae-edges": (
        "vae --pretrained-vae {folder}/vae/model --decoder-only --max-train-steps 1600 --train-batch-size 8 "
        "--learning-rate 3e-4 --lr-warmup-steps 50 --ema-decay 0.998 --adversarial-weight 0.4 "
        "--adversarial-start 200 --discriminator-width 32 --discriminator-depth 2 --mixed-precision bf16"
    ),
    "clip": "clip --max-train-steps 1500 --train-batch-size 128 --learning-rate 1.5e-3 --ema-decay 0.998",
    # A smaller image encoder for the same text encoder.
    "clip-image": (
        "clip --frozen-text-encoder {folder}/clip/model --max-train-steps 1200 --train-batch-size 128 "
        "--learning-rate 1.5e-3 --ema-decay 0.998"
    ),
    "text-to-image": (
        "text-to-image --from-scratch --pretrained-vae {folder}/vae-edges/model "
        "--pretrained-clip {folder}/clip-image/model --max-train-steps 15000 --train-batch-size 64 "
        "--learning-rate 1e-3 --lr-warmup-steps 200 --ema-decay 0.999 --mixed-precision bf16 "
        "--alignment-weight 0.5"
    ),
    "upscaler": (
        "super-resolution --max-train-steps 2000 --learning-rate 1.5e-3 --ema-decay 0.998 "
        "--evaluation-steps 500 --mixed-precision bf16"
    ),
}
# What is kept of them, in half precision: name -> stage.
MODELS = {"emoji": "text-to-image", "emoji_upscaler": "upscaler"}


@click.command(context_settings=HELP_SETTINGS)
@click.option("--output-dir", default="runs/emoji", show_default=True, help="Folder of the runs.")
@click.option(
    "--stages", default=",".join(STAGES), show_default=True, help="Those to train, divided by commas."
)
@click.option(
    "--steps-factor",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Multiplies the number of steps of each stage.",
)
@click.option("--list", "only_list", is_flag=True, help="Print the commands, and run none.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def train_emoji(output_dir, stages, steps_factor, only_list, options):
    """Train the bundled models.

    OPTIONS after `--` are added to each command, such as `-- --no-jit-compile`.
    """
    folder = Path(output_dir)
    chosen = stages.split(",")
    for stage in chosen:
        if stage not in STAGES:
            raise UserError(f"--stages {stage}: no such stage; choose from {', '.join(STAGES)}")
    for stage in chosen:
        arguments = command(stage, folder, steps_factor, options)
        if only_list:
            click.echo(shlex.join(["python", "-m", "keras_sd.train", *arguments]))
            continue
        if (folder / stage / "model").exists():
            click.echo(f"{stage}: finished, {folder / stage / 'model'}")
            continue
        if any((folder / stage).glob("checkpoint-*")):
            arguments += ["--resume-from-checkpoint", "latest"]
        click.echo(f"{stage}: {shlex.join(arguments)}")
        code = subprocess.run([sys.executable, "-m", "keras_sd.train", *arguments], check=False).returncode
        if code:
            sys.exit(code)  # the command has said why, and how to go on
    if not only_list:
        for name, stage in MODELS.items():
            if stage in chosen:
                save_half(folder / stage / "model", folder / name)
                click.echo(folder / name)


def command(stage, folder, steps_factor, options):
    """Return the arguments of a stage's training command."""
    arguments = STAGES[stage].format(folder=shlex.quote(str(folder)))
    arguments = shlex.split(arguments) + ["--output-dir", str(folder / stage)]
    place = arguments.index("--max-train-steps") + 1
    arguments[place] = str(max(2, round(int(arguments[place]) * steps_factor)))
    return [*arguments, *options]


def save_half(model, path):
    """Save a trained model in half precision."""
    from keras_sd import StableDiffusion, Upscaler
    from keras_sd.weights.diffusers_folder import holds_pixel_upscaler

    kind = Upscaler if holds_pixel_upscaler(model) else StableDiffusion
    kind.load(model).save(path, dtype="float16")


if __name__ == "__main__":
    run_command(train_emoji, "train_emoji.py")
