"""The sample images of evaluations, as one grid."""

import numpy as np

from keras_sd.cli.train.opening import SMALL_IMAGE, image_size_of
from keras_sd.cli.train.prompts import prompts_of
from keras_sd.errors import UserError


def sampling(run, pipeline, conditioning=None, **options):
    """Return `sample(texts, examples)`, which generates a square of each text for an evaluation.

    With a conditioning (`training.conditioning`), which makes the model's further inputs of images, they are
    those of the examples. Further arguments of `sample` are those of the model's task.
    """
    side = run.resolution(image_size_of(pipeline))
    common = {"num_inference_steps": run.options["num_inference_steps"], "seed": run.settings.seed}
    common |= {"progress": False, **options}

    def sample(texts, examples=(), **own):
        if conditioning is None:
            return pipeline.text_to_image(texts, **{"height": side, "width": side, **common, **own})
        images = np.stack([examples[index % len(examples)]["image"] for index in range(len(texts))])
        return conditioning.generate(pipeline, images, list(texts), **common)

    return sample


def sample_grid(run, pipeline, texts, *, columns=None, conditioning=None, images=None, **options):
    """Return `grid()`, which samples the prompts of a run as one image.

    Args:
        run: the result of `preparation.prepare`.
        pipeline: the model.
        texts: returns the prompts if the options give none.
        columns: images of each prompt, in a row of their own; None for one image of each.
        conditioning, images: of a model with further inputs: what makes them, and `images(count)`, which
            returns so many examples to make them of.
        options: of sampling, such as guidance_scale and sampler.

    Raises:
        UserError: the model cannot make an image that a line of the file asks for; at once.
    """
    from keras_sd.files.image_files import image_grid

    scale = 2 if run.resolution(image_size_of(pipeline)) <= SMALL_IMAGE else 1
    sample, prompts = sampling(run, pipeline, conditioning, **options), prompts_of(run.options)
    if prompts is None:

        def grid():
            labels = [
                text for text in run.options["validation_prompts"] or texts() for _ in range(columns or 1)
            ]
            examples = images(len(labels)) if conditioning else ()
            return image_grid(sample(labels, examples), columns=columns, labels=labels, scale=scale)

        return grid
    if conditioning is not None:
        flag = "--validation-prompts-file"
        raise UserError(f"{flag}: {conditioning.reason}, of an image; give --validation-prompts")
    for prompt in prompts:
        _check(pipeline, prompt, options["guidance_scale"])

    def grid_of_file():
        from keras_sd.training.evaluation import on_one_size

        made = []
        for index, prompt in enumerate(prompts):
            own = {"seed": run.settings.seed + index * (columns or 1), **prompt.options()}
            made += list(sample(prompt.prompt, num_images=columns or 1, **own))
        labels = [_label(prompt) for prompt in prompts for _ in range(columns or 1)]
        return image_grid(on_one_size(made), columns=columns, labels=labels, scale=scale)

    return grid_of_file


def _label(prompt):
    """Return the text of a line's image: the options of its own that no one sees, then the prompt."""
    options = prompt.options()
    titles = {"seed": "seed", "num_inference_steps": "steps", "guidance_scale": "guidance"}
    shown = [f"{title} {options[name]}" for name, title in titles.items() if name in options]
    shown = [text.removesuffix(".0") for text in shown]
    if prompt.negative_prompt:
        shown.append(f"without {prompt.negative_prompt}")
    return f"{prompt.prompt} ({', '.join(shown)})" if shown else prompt.prompt


def _check(pipeline, prompt, guidance_scale):
    """Raise UserError unless the model can make the image of a line."""
    scale = guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale
    most = pipeline.scheduler_config.num_train_timesteps
    try:
        pipeline.latent_shape(prompt.height, prompt.width)
    except UserError as error:
        raise UserError(f"{prompt.place}: {error}") from error
    if (prompt.num_inference_steps or 1) > most:
        raise UserError(
            f"{prompt.place}: {prompt.num_inference_steps} steps: the model has {most} timesteps; give fewer"
        )
    if prompt.negative_prompt and scale <= 1:
        raise UserError(
            f"{prompt.place}: a negative prompt has no effect with the guidance scale {scale:g}; leave it "
            "out, or give a larger scale"
        )
