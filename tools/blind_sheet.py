"""Draws the README's prompts as images without captions, for someone to name what each shows.

python tools/blind_sheet.py --output-dir blind

Names and files do not tell the prompts: 01.png, 02.png, ... are in an order of their own and hold no
parameters. `key.json` says which prompt each had.
"""

import click
import numpy as np

from keras_sd.arguments import LARGEST_SEED
from keras_sd.cli.command import HELP_SETTINGS
from keras_sd.cli.outputs import check_output_folder, overwrite_option
from keras_sd.cli.program import run_command

KEY = "key.json"
SEED = click.IntRange(0, LARGEST_SEED)


@click.command(context_settings=HELP_SETTINGS)
@click.option("--output-dir", show_default="blind, with a number if it exists", help="Folder to write.")
@overwrite_option
@click.option("--model", default="emoji", help="Preset, hub id, folder or file.")
@click.option("--seed", default=0, type=SEED, help="Of the images: prompt i uses this seed + i.")
@click.option("--order-seed", default=0, type=SEED, help="Of the order.")
@click.option("--scale", default=4, type=click.IntRange(1, 16), help="Enlarge each pixel to such a square.")
def blind_sheet(output_dir, overwrite, model, seed, order_seed, scale):
    """Draw the README's prompts, in an order that does not tell them."""
    folder = check_output_folder(
        output_dir, "blind", overwrite, is_own=lambda folder: (folder / KEY).is_file()
    )
    from keras_sd import StableDiffusion, save_png
    from keras_sd.cli.demo import PROMPTS
    from keras_sd.files.writing import write_json

    sd = StableDiffusion.from_preset(model)
    images = sd.text_to_image(list(PROMPTS), seed=seed)
    key = {}
    for number, index in enumerate(np.random.default_rng(order_seed).permutation(len(PROMPTS)), start=1):
        name = f"{number:02}.png"
        save_png(images[index].repeat(scale, axis=0).repeat(scale, axis=1), folder / name)
        key[name] = {"prompt": PROMPTS[index], "seed": seed + int(index)}
    write_json(folder / KEY, key)
    click.echo(folder)


if __name__ == "__main__":
    run_command(blind_sheet, "blind_sheet.py")
