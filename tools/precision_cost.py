"""Measures what lower precisions cost in quality; docs/results.md has the result.

The bundled `emoji` model makes the same images in each precision, from the held-out prompts and the same
seeds. Both encoders of CLIP that measure them stay in float32.
"""

import gc

import click
import numpy as np
from tqdm import tqdm

from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.program import run_command
from keras_sd.data.emoji.evaluation import IMAGE_SIZE, generate_batch, kid_and_floor
from keras_sd.data.emoji.source import load_emoji
from keras_sd.files.writing import write_json
from keras_sd.metrics.clip_score import ClipScore
from keras_sd.metrics.features import ClipFeatures
from keras_sd.models.batches import equal_batches
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from machine import description

PRECISIONS = {
    "float32": {},
    "float32, int8 kernels": {"quantize": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8 kernels": {"dtype": "bfloat16", "quantize": "int8"},
}
BATCH_SIZE = 40
COLUMNS = ("precision", "kernels", "KID", "CLIP score", "mean difference of a pixel from float32")


def kernel_bytes(pipeline):
    """Return the memory of the weights of UNet and text encoder."""
    variables = [*pipeline.unet.variables, *pipeline.text_encoder.variables]
    return sum(int(np.prod(each.shape)) * np.dtype(_storage(each.dtype)).itemsize for each in variables)


def _storage(dtype):
    return "float16" if dtype == "bfloat16" else dtype


def images_of(pipeline, prompts, seed):
    """Return an image of each prompt, uint8."""
    batches = tqdm(equal_batches(len(prompts), BATCH_SIZE), desc="images")
    made = [generate_batch(pipeline, prompts, batch, seed, {}) for batch in batches]
    return np.concatenate(made)[: len(prompts)]


@click.command()
@click.option("--seed", default=0, show_default=True, help="Image i is drawn from seed + i.")
@output_option("precisions.json", "JSON file to write.")
def precision_cost(seed, output, overwrite):
    """Compare the images of `emoji` in lower precisions with those in float32."""
    output = check_output(output, ".json", default="precisions.json", overwrite=overwrite)
    emoji = load_emoji()
    images = np.stack([one.load(IMAGE_SIZE) for one in emoji])
    held_out = np.array([index for index, one in enumerate(emoji) if one.split == "validation"])
    prompts = [emoji[index].captions[0] for index in held_out]
    reference = StableDiffusion.from_preset("emoji")
    score, features = ClipScore(reference, {"held out": prompts}), ClipFeatures(reference.image_encoder)
    rows, exact = [], None
    for name, options in PRECISIONS.items():
        pipeline = StableDiffusion.from_preset("emoji", **options)
        made = images_of(pipeline, prompts, seed)
        exact = made if exact is None else exact
        kid = kid_and_floor(emoji, images, held_out, made, features)
        rows.append(
            {
                "precision": name,
                "weight_bytes": kernel_bytes(pipeline),
                "kid": kid["kid"],
                "kid_floor": kid["kid_floor"],
                "clip_score": score("held out", made),
                "mean_difference": float(np.abs(made.astype(int) - exact).mean()),
            }
        )
        del pipeline
        gc.collect()
    click.echo("\n".join(table(rows)))
    path = output.free()
    packages = description(("keras_sd", "keras", "tensorflow", "jax"))
    write_json(path, packages | {"images": len(prompts), "seed": seed, "rows": rows})
    click.echo(path)


def table(rows):
    """Return the lines of a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        megabytes = f"{row['weight_bytes'] / 1e6:.1f} MB"
        figures = f"{row['kid']:.4f}", f"{row['clip_score']:.2f}", f"{row['mean_difference']:.2f} of 255"
        lines.append((row["precision"], megabytes, *figures))
    return ["| " + " | ".join(cells) + " |" for cells in lines]


if __name__ == "__main__":
    run_command(precision_cost, "precision_cost.py")
