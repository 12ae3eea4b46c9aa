"""DreamBooth: a few images of one subject teach a model a word for it (Ruiz et al., 2023)."""

import numpy as np
from tqdm import tqdm

from keras_sd import backend
from keras_sd.data.folders import FolderSource, count_images
from keras_sd.data.sources import fingerprint_of
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.files.image_files import save_png
from keras_sd.training.encodings import EncodedSource, JoinedSource
from keras_sd.training.losses import DiffusionObjective, PriorPreservationObjective
from keras_sd.training.text_to_image import diffusion_example
from keras_sd.training.trainer import Trainer


def read_images(folder, prompt, image_size):
    """Return all images below a folder, with one prompt as the caption of each.

    Returns:
        A `FolderSource`, which reads an image when it is asked for.

    Raises:
        UserError: there are none, or one of them cannot be trained on.
    """
    return FolderSource(folder, image_size, need_captions=False).with_captions((prompt,))


def generate_class_images(pipeline, folder, prompt, count, *, num_inference_steps, guidance_scale, seed):
    """Draw images of a class until a folder holds `count`; training shall not forget what they show.

    Image i is drawn from `seed` + i and stands whole in `class-i.png` or not at all, so that a run that was
    killed goes on with those that are there. Several processes of a run draw together, as each has a part of
    the devices only, and each writes what its folder lacks: the folder may be the same for all, or be each
    host's own.

    Args:
        pipeline: the `StableDiffusion` that is to be trained, before that.
        folder: made if there is none; other images in it count too.
        prompt: the class prompt.
        num_inference_steps, guidance_scale: as in `text_to_image`.
    """

    def place(index):
        return folder / f"class-{index:05}.png"

    missing = max(count - count_images(folder), 0)
    # There are fewer than `count` images, so that these are below it.
    free = [index for index in range(count) if not place(index).exists()][:missing]
    is_wanted = np.zeros(count, bool)
    is_wanted[free] = True
    # Before anyone has written: all draw the same ones.
    wanted = set(np.flatnonzero(backend.any_process(is_wanted)).tolist())
    sampling = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    is_silent = not wanted or backend.process_index() > 0
    with tqdm(total=len(wanted), desc="class images", unit="image", disable=is_silent) as bar:
        while wanted:
            first = min(wanted)
            # Always a whole batch, as each size is compiled for itself.
            images = pipeline.text_to_image(
                prompt, num_images=pipeline.batch_size, seed=seed + first, progress=False, **sampling
            )
            for index, image in enumerate(images, start=first):
                if index not in wanted:
                    continue
                wanted.remove(index)
                bar.update()
                if is_wanted[index] and not place(index).exists():
                    size = image.shape[:2]
                    parameters = pipeline.parameters(prompt, seed=seed + index, size=size, **sampling)
                    save_png(image, place(index), parameters)


def dreambooth_example(example, generator, class_examples=(), **options):
    """Draw what one training example needs: for an image of the subject, and for any one of its class.

    Args:
        example: an image of the subject, encoded (`encodings.EncodedSource`).
        class_examples: such images of the class, of which one is drawn; none without prior preservation.
        options: num_train_timesteps and condition, as `text_to_image.diffusion_example` takes them.

    Returns:
        A dictionary of arrays; with a class each is a pair `(2, ...)` of subject and class, whose latents,
        noise and timesteps are drawn independently.
    """
    subject = diffusion_example(example, generator, **options)
    if not len(class_examples):
        return subject
    chosen = class_examples[generator.integers(len(class_examples))]
    prior = diffusion_example(chosen, generator, **options)
    return {name: np.stack([subject[name], prior[name]]) for name in subject}


def train_dreambooth(
    settings,
    pipeline,
    instances,
    class_images=(),
    *,
    train_text_encoder=False,
    prior_loss_weight=1.0,
    identity=None,
    min_snr_gamma=None,
    make_evaluation=None,
    export=None,
):
    """Train what is trainable of a model's UNet, and of its text encoder, on a subject.

    Args:
        settings: `trainer.Settings`; a batch holds `train_batch_size` images of the subject and, with prior
            preservation, as many of its class.
        pipeline: the `StableDiffusion`, its networks loaded or with low-rank updates (`training.lora`).
        instances: examples of the subject, as `read_images` gives them.
        class_images: those of its class; with any, its prior is preserved.
        train_text_encoder: whether the text encoder is trained along.
        prior_loss_weight: the weight of the class in the loss, lambda in equation 2.
        identity: JSON values that, beside those of this function, must be a checkpoint's too.
        min_snr_gamma: gamma of min-SNR weighting, or None for equal weights.
        make_evaluation: `make_evaluation(trainer)` gives what is called with the step at each evaluation.
        export: called at the end with the folder `output_dir/model`, while the EMA weights are in.

    Returns:
        Whether training got to its end.
    """
    encoded = EncodedSource(
        JoinedSource(instances, class_images),
        pipeline.vae,
        None if train_text_encoder else pipeline.text_encoder,
        pipeline.tokenizer,
        jit_compile=settings.jit_compile,
    )
    examples = [encoded[index] for index in range(len(encoded))]
    subject, others = examples[: len(instances)], examples[len(instances) :]
    schedule = NoiseSchedule(pipeline.scheduler_config)
    parts = (pipeline.unet, schedule, min_snr_gamma, pipeline.text_encoder if train_text_encoder else None)
    if others:
        objective = PriorPreservationObjective(*parts, prior_loss_weight=prior_loss_weight)
    else:
        objective = DiffusionObjective(*parts)
    trainer = Trainer(
        objective,
        settings,
        {
            "method": "dreambooth",
            "model": pipeline.unet.config.to_dict(),
            "schedule": pipeline.scheduler_config.noise_schedule(),
            "data": fingerprint_of(encoded),
            "class_images": len(others),
            "prompts": [images[0]["captions"] for images in (instances, class_images) if len(images)],
            "prior_loss_weight": prior_loss_weight if others else None,
            "train_text_encoder": train_text_encoder,
            "min_snr_gamma": min_snr_gamma,
            **(identity or {}),
        },
    )

    def draw(example, generator):
        return dreambooth_example(
            example,
            generator,
            others,
            num_train_timesteps=schedule.num_train_timesteps,
            condition=encoded.condition,
        )

    return trainer.run(subject, draw, make_evaluation=make_evaluation, export=export)
