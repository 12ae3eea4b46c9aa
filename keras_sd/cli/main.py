"""The group of all commands: `keras-sd COMMAND`, or `python -m keras_sd COMMAND`."""

from pathlib import Path

import click

from keras_sd import __version__

# Whatever loads a backend is imported inside the commands, after their options have been checked.
from keras_sd.cli.command import HELP_SETTINGS, Command
from keras_sd.cli.lazy_commands import LazyCommands
from keras_sd.cli.outputs import check_output, check_output_folder, output_option
from keras_sd.cli.program import run_command
from keras_sd.cli.sampling_options import check_sampling, fill_sampling, sampling_options
from keras_sd.errors import require

_OF_IMAGES = ("generate", "image-to-image", "inpaint", "walk", "reconstruct")
_OTHERS = ("upscale", "convert", "caption", "dataset", "encode", "export", "ema", "lora", "plot")
_COMMANDS = LazyCommands(
    dict.fromkeys(_OF_IMAGES, "keras_sd.cli.generate")
    | {name: f"keras_sd.cli.{name}" for name in _OTHERS}
    | {"train": "keras_sd.cli.train.main"}
)


@click.group(context_settings=HELP_SETTINGS, commands=_COMMANDS)
@click.version_option(__version__, prog_name="keras-sd")
def cli():
    """Stable Diffusion in Keras 3: train, fine-tune, generate and measure under XLA."""


@cli.command(cls=Command)
@click.argument("model", default="emoji")
@output_option("results.json", "JSON file to write.")
@sampling_options
def evaluate(model, output, overwrite, **sampling):
    """Measure MODEL, a model of the emoji images: KID, retrieval and reconstruction.

    \b
    keras-sd evaluate emoji --output results.json
    """
    from keras_sd.data.emoji.source import PACKAGES
    from keras_sd.files.writing import write_json

    output = check_output(output, ".json", default="results.json", overwrite=overwrite)
    require(*PACKAGES)
    fill_sampling(model, sampling)
    check_sampling(model, sampling)
    from keras_sd.cli.model_options import open_model

    pipeline = open_model(model)
    from tqdm import tqdm

    from keras_sd.data.emoji.evaluation import evaluate_emoji, format_table

    results = evaluate_emoji(
        pipeline,
        **sampling,
        progress=lambda iterable, description: tqdm(iterable, desc=description),
    )
    click.echo(format_table(results))
    path = output.free()
    write_json(path, {"model": model, **results})
    click.echo(path)


@cli.command(cls=Command)
@output_option("demo", "Folder for images, data set, run and results.", "--output-dir")
def demo(output_dir, overwrite):
    """Generate images with the emoji model, upscale some, fine-tune it for a few minutes, and compare.

    \b
    keras-sd demo --output-dir demo
    """
    from keras_sd import presets
    from keras_sd.data.emoji.source import PACKAGES

    folder = check_output_folder(
        output_dir, "demo", overwrite, is_own=lambda folder: (folder / "before.png").is_file()
    )
    require("grain", "tensorboard", *PACKAGES)
    presets.find("emoji")
    from keras_sd.cli.demo import run_demo

    run_demo(folder, say=click.echo)


@cli.command("presets", cls=Command)
def list_presets():
    """List the presets: name, licence and source of each model.

    \b
    keras-sd presets
    """
    from keras_sd import presets

    for name, preset in presets.PRESETS.items():
        source = "bundled" if isinstance(preset.source, Path) else preset.source
        click.echo(f"{name:<16}{preset.licence:<24}{source}")


def main():
    """Run the command line as a program: exit code 0, 2 for bad input, 130 for Ctrl-C."""
    run_command(cli, "keras-sd")
