"""Measures how exactly the validation loss compares two models; docs/training-guide.md has the result.

The difference of two models' losses on held-out emoji is measured for many seeds: with the same noise and
timesteps for both, as validation does, and with fresh ones for each, drawn as in training. Its standard
deviation over the seeds is what noise adds to it.
"""

import functools

import click
import numpy as np
from tqdm import tqdm

from keras_sd import backend
from keras_sd.cli.outputs import check_output, output_option
from keras_sd.cli.program import run_command
from keras_sd.data.sources import evenly, load_source
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.files.writing import write_json
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.stored_encodings import encoded_source
from keras_sd.training.text_to_image import diffusion_example
from keras_sd.training.validation import fixed_examples
from machine import description


def fresh_examples(source, examples, seed, draw):
    """Return a batch of all examples, with noise and timesteps as training draws them."""
    generators = (np.random.default_rng((seed, index)) for index in range(examples))
    drawn = [draw(source[index], generator) for index, generator in enumerate(generators)]
    return {name: np.stack([arrays[name] for arrays in drawn]) for name in drawn[0]}


def losses_of(model, dataset, examples, seeds, first_fresh):
    """Return the losses of a model for each seed, `(seeds, 2)`: of validation, and with fresh noise."""
    pipeline = StableDiffusion.load(model, jit_compile=False)
    schedule = NoiseSchedule(pipeline.scheduler_config)
    images = load_source(dataset, "validation", 64)
    parts = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    source = encoded_source(evenly(images, examples), *parts, jit_compile=False, progress=False)
    noise = NoiseDrawing(DiffusionSettings(), schedule)
    draw = functools.partial(diffusion_example, noise=noise)
    objective = DiffusionObjective(pipeline.unet, schedule)
    step = backend.jit(lambda batch: objective.call(batch), objective.variables, False)

    def losses(seed):
        batches = (
            fixed_examples(source, examples, seed, draw, noise),
            fresh_examples(source, examples, first_fresh + seed, draw),
        )
        return [backend.to_numpy(step(batch)).mean() for batch in batches]

    return np.array([losses(seed) for seed in tqdm(range(seeds), desc=str(model))])


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--dataset-name", default="openmoji", type=click.Choice(["emoji", "openmoji"]))
@click.option("--examples", default=64, help="Examples of a validation.")
@click.option("--seeds", default=40, help="Validations of each model.")
@output_option("validation-noise.json", "JSON file to write.")
def main(first, second, dataset_name, examples, seeds, output, overwrite):
    """Compare the models FIRST and SECOND, two exported checkpoints of a run."""
    place = check_output(output, ".json", default="validation-noise.json", overwrite=overwrite)
    losses = [
        losses_of(model, dataset_name, examples, seeds, index * seeds)
        for index, model in enumerate((first, second))
    ]
    deviations = np.std(losses[1] - losses[0], axis=0, ddof=1)
    results = {
        **description(("keras_sd", "keras", "tensorflow", "jax")),
        "dataset": dataset_name,
        "examples": examples,
        "seeds": seeds,
        "losses": [float(one[:, 0].mean()) for one in losses],
        "standard_deviation_fixed": float(deviations[0]),
        "standard_deviation_fresh": float(deviations[1]),
        "ratio": float(deviations[0] / deviations[1]),
    }
    write_json(place.free(), results)
    click.echo(results)


if __name__ == "__main__":
    run_command(main, "validation_noise.py")
