"""Draws what every sampler makes of the same noise in few and in many steps: the README's table of samplers.

python tools/sampler_grid.py --output docs/images/samplers.png
"""

import click
import numpy as np
from PIL import Image

from keras_sd import SAMPLERS
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.program import run_command


@click.command(context_settings={"show_default": True})
@output_option("docs/images/samplers.png")
@click.option("--model", default="emoji", help="Preset, hub id, folder or file.")
@click.option("--prompt", default="face with sunglasses", help="Text of all images.")
@click.option("--steps", default=(3, 5, 10, 20, 50), multiple=True, type=int, help="Numbers of steps.")
@click.option("--guidance-scale", default=2.0)
@click.option("--seed", default=0)
def sampler_grid(output, overwrite, model, prompt, steps, guidance_scale, seed):
    """One row for each sampler, one column for each number of steps."""
    output = check_output(output, ".png", default="docs/images/samplers.png", overwrite=overwrite)
    from keras_sd import StableDiffusion, image_grid, save_png

    pipeline = StableDiffusion.from_preset(model)
    images, labels = [], []
    for name, sampler in SAMPLERS.items():
        for num_inference_steps in steps:
            image = pipeline.text_to_image(
                prompt,
                num_inference_steps=num_inference_steps,
                sampler=name,
                guidance_scale=guidance_scale,
                seed=seed,
                progress=False,
            )[0]
            # Enlarged, as a label needs more room than 64 pixels give it.
            images.append(np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.LANCZOS)))
            labels.append(f"{sampler.name}, {num_inference_steps}")
        click.echo(name)
    path = output.free()
    save_png(image_grid(images, labels, columns=len(steps)), path)
    click.echo(path)


if __name__ == "__main__":
    run_command(sampler_grid, "sampler_grid")
