"""The command line: `keras-sd COMMAND`, or `python -m keras_sd COMMAND`."""

import json
import tempfile
from pathlib import Path

import click

# Whatever loads a backend is imported inside the commands, after their options have been checked.
from keras_sd import __version__, presets
from keras_sd.errors import UserError, run_command
from keras_sd.train import train

SAMPLERS = ("ddim",)  # the names in diffusion.samplers.SAMPLERS, which is slow to import


@click.group(context_settings={"show_default": True})
@click.version_option(__version__, prog_name="keras-sd")
def cli():
    """Stable Diffusion in Keras 3: train, fine-tune, generate and measure under XLA."""


cli.add_command(train)


def sampling_options(command):
    """Adds the options of every command that makes pictures."""
    for option in (
        click.option("--seed", default=0, type=click.IntRange(0), help="Image i uses seed + i."),
        click.option("--guidance-scale", default=5.0, help="1 switches guidance off."),
        click.option("--steps", default=30, type=click.IntRange(1), help="Denoising steps."),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("prompt")
@click.option("--output", default="image.png", help="PNG file to write.")
@click.option("--num-images", default=1, type=click.IntRange(1), help="Pictures to make.")
@click.option("--negative-prompt", help="What to stay away from.")
@sampling_options
@click.option("--sampler", default="ddim", type=click.Choice(SAMPLERS), help="Way of denoising.")
@click.option("--eta", default=0.0, type=click.FloatRange(0, 1), help="Fresh noise, 0 to 1.")
@click.option("--model", default="emoji", help="Preset, hub id or diffusers folder.")
@click.option("--batch-size", default=8, type=click.IntRange(1), help="Pictures made at a time.")
def generate(
    prompt, output, num_images, negative_prompt, seed, guidance_scale, steps, sampler, eta, model, batch_size
):
    """Make pictures of PROMPT.

    One picture goes to the file named by --output. Of several, heart.png shows all side by side,
    and heart-0.png, heart-1.png, ... are the single ones. Each file says how it was made.
    """
    output = check_output(output, ".png")
    pipeline = open_model(model)
    from keras_sd.images import image_grid, save_png

    pipeline.batch_size = batch_size
    images = pipeline.text_to_image(
        prompt,
        negative_prompt=negative_prompt,
        num_images=num_images,
        num_steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        seed=seed,
    )
    files = [(output, images[0] if num_images == 1 else image_grid(images), seed)]
    if num_images > 1:
        for index, image in enumerate(images):
            files.append((output.with_stem(f"{output.stem}-{index}"), image, seed + index))
    settings = {"num_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler, "eta": eta}
    for path, image, image_seed in files:
        size = image.shape[:2]
        save_png(
            image,
            path,
            pipeline.parameters(prompt, negative_prompt, seed=image_seed, size=size, **settings),
        )
        click.echo(path)


@cli.command()
@click.argument("model", default="emoji")
@click.option("--output", default="results.json", help="JSON file to write.")
@sampling_options
def evaluate(model, output, seed, guidance_scale, steps):
    """Measure MODEL, a preset or a folder trained on the emoji pictures, and print the table."""
    output = check_output(output, ".json")
    pipeline = open_model(model)
    from tqdm import tqdm

    from keras_sd.metrics.evaluation import evaluate_emoji, format_table

    results = evaluate_emoji(
        pipeline,
        num_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        progress=lambda iterable, description: tqdm(iterable, desc=description),
    )
    output.write_text(json.dumps({"model": model, **results}, indent=2) + "\n", encoding="utf-8")
    click.echo(format_table(results))
    click.echo(output)


@cli.command()
@click.option("--output-dir", default="demo", help="Folder to write to.")
def demo(output_dir):
    """Make pictures with the emoji model, fine-tune it for a minute or two, and compare."""
    folder = Path(output_dir)
    check_output(folder / "before.png", ".png")
    presets.find("emoji")
    from keras_sd.demo import run_demo

    run_demo(folder, say=click.echo)


@cli.command("presets")
def list_presets():
    """List the models that go by a name."""
    for name, preset in presets.PRESETS.items():
        source = "bundled" if isinstance(preset.source, Path) else preset.source
        click.echo(f"{name:<12}{preset.licence:<24}{source}")


def check_output(path, suffix):
    """Makes sure, before any long work, that a file can be written; makes its folder.

    Raises:
        UserError: another suffix, a folder of that name, or a place where nothing can be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a {suffix} file in it")
    if path.suffix.lower() != suffix:
        raise UserError(f"{path}: not a {suffix} file; name it {path.with_suffix(suffix)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    return path


def open_model(name):
    """Opens a preset, a hub id or a folder; an unknown name fails before a backend is loaded."""
    folder = presets.find(name)
    from keras_sd.pipeline import StableDiffusion

    pipeline = StableDiffusion.load(folder)
    pipeline.name = name
    return pipeline


def main():
    """Runs the command line as a program: exit code 0, 2 for bad input, 130 for Ctrl-C."""
    run_command(cli, "keras-sd")
