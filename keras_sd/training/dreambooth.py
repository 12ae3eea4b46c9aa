"""DreamBooth training (Ruiz et al., 2023): a model learns a subject from a few images."""

import functools
import warnings

import numpy as np
from tqdm import tqdm

from keras_sd import backend
from keras_sd.data.captions import Captions
from keras_sd.data.folders import FolderSource, count_images
from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.sources import own_repeats
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.files.image_files import save_png
from keras_sd.training.caption_tokenizer import CaptionTokenizer, DrawnCaptions
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.encodings import JoinedSource
from keras_sd.training.lora import freeze
from keras_sd.training.objectives import DiffusionObjective, PriorPreservationObjective
from keras_sd.training.stored_encodings import encoded_source
from keras_sd.training.text_to_image import diffusion_example, diffusion_identity
from keras_sd.training.trainer import Trainer
from keras_sd.training.validation import Validation, validation_maker


def read_images(folder, prompt, image_size, on_bad_sample="error", masks=None):
    """Return all images in a folder and its sub-folders, each with the prompt as its caption.

    Args:
        on_bad_sample: "error" names all faulty images; "skip" leaves them out and counts them.
        masks: `data.masks.MaskFiles`: where masks of the images are; None for none.

    Returns:
        A `FramedSource` of squares, which reads each image on access.

    Raises:
        UserError: there are no images, or one of them cannot be used for training.
    """
    source = FolderSource(folder, image_size, need_captions=False, on_bad_sample=on_bad_sample, masks=masks)
    return FramedSource(source.with_captions((prompt,)), Framing(image_size))


def generate_class_images(pipeline, folder, prompt, count, *, num_inference_steps, guidance_scale, seed):
    """Generate images of the class until a folder holds `count`, for prior preservation.

    Image i is generated from `seed` + i and written atomically as `class-i.png`, so a killed run can resume.
    All processes of a run generate together, as each has only a part of the devices. Each process writes the
    images that its folder lacks: the folder may be shared or separate for each host.

    Args:
        pipeline: the `StableDiffusion`, before training.
        folder: created if necessary; other images in it count too.
        prompt: the class prompt.
        num_inference_steps, guidance_scale: as in `text_to_image`.
    """

    def place(index):
        return folder / f"class-{index:05}.png"

    missing = max(count - count_images(folder), 0)
    # There are fewer than `count` images, so enough indices below it are free.
    free = [index for index in range(count) if not place(index).exists()][:missing]
    is_wanted = np.zeros(count, bool)
    is_wanted[free] = True
    # Determined before any process writes, so that all processes generate the same images.
    wanted = set(np.flatnonzero(backend.any_process(is_wanted)).tolist())
    sampling = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    is_silent = not wanted or backend.process_index() > 0
    with tqdm(total=len(wanted), desc="class images", unit="image", disable=is_silent) as bar:
        while wanted:
            first = min(wanted)
            # Always a whole batch, as each batch size would be compiled separately.
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


def dreambooth_example(example, generator, class_examples=(), class_repeats=None, **options):
    """Draw the arrays of one training example: an image of the subject and a random one of the class.

    Args:
        example: an encoded image of the subject (`encodings.EncodedSource`).
        class_examples: encoded images of the class; empty without prior preservation.
        class_repeats: how often each of them counts; once by default.
        options: noise and condition, as in `text_to_image.diffusion_example`.

    Returns:
        A dictionary of arrays. With class images each array is a pair `(2, ...)` of subject and class, whose
        latents, noise and timesteps are drawn independently.
    """
    subject = diffusion_example(example, generator, **options)
    if not len(class_examples):
        return subject
    prior = diffusion_example(drawn_example(class_examples, generator, class_repeats), generator, **options)
    return {name: np.stack([subject[name], prior[name]]) for name in subject}


def drawn_example(examples, generator, repeats=None):
    """Return any one of the examples, flipped or cropped at random if they are."""
    if repeats is None:
        index = int(generator.integers(len(examples)))
    else:
        ends = np.cumsum(repeats)
        index = int(np.searchsorted(ends, generator.integers(ends[-1]), side="right"))
    draw = getattr(examples, "draw_example", None)
    return draw(index, generator) if draw else examples[index]


def train_dreambooth(
    settings,
    pipeline,
    instances,
    class_images=(),
    *,
    train_text_encoder=False,
    prior_loss_weight=1.0,
    identity=None,
    diffusion=None,
    captions=None,
    caching=None,
    make_evaluation=None,
    validation_examples=None,
    export=None,
):
    """Train the trainable weights of a model's UNet, and of its text encoder, on a subject.

    Args:
        settings: `trainer.Settings`; a batch holds `train_batch_size` images of the subject and, with prior
            preservation, as many of the class.
        pipeline: the `StableDiffusion`, with or without low-rank updates (`training.lora`).
        instances: examples of the subject, from `read_images`; an epoch shows each as often as it says.
        class_images: examples of the class for prior preservation; empty for none.
        train_text_encoder: whether to train the text encoder, too.
        prior_loss_weight: the weight of the class in the loss, lambda in equation 2.
        identity: further JSON values that a checkpoint must share with the run that resumes it.
        diffusion: `DiffusionSettings`; None for their defaults.
        captions: how captions of the subject and of the class are drawn: None, or a pair of lists with
            `data.captions.Captions` for each example, or of None for captions that are fixed.
        caching: `caching.Caching`: where encodings are kept.
        make_evaluation: `make_evaluation(trainer)` returns a function of the step, called at each evaluation.
        validation_examples: number of training examples that the validation loss is measured on; None for
            no validation.
        export: called at the end with the folder `output_dir/model`, while the EMA weights are swapped in.

    Returns:
        Whether training reached its end.
    """
    images = JoinedSource(instances, class_images)
    if len(class_images) and len(images.bucket_sizes) > 1:
        raise UserError(
            "aspect_ratio_buckets: an image of the subject and one of its class are trained together, and "
            "need one size; leave it out, or train without prior preservation"
        )
    has_drawn = any(rules is not None for rules in captions or ())
    if has_drawn and not train_text_encoder:
        freeze(pipeline.text_encoder)  # it becomes a part of the objective
    text_encoder = pipeline.text_encoder if train_text_encoder or has_drawn else None
    tokenizer = pipeline.tokenizer if captions is None else CaptionTokenizer(pipeline.tokenizer)
    encoded = encoded_source(
        images,
        pipeline.vae,
        None if text_encoder is not None else pipeline.text_encoder,
        tokenizer,
        caching,
        jit_compile=settings.jit_compile,
    )
    if captions is not None and tokenizer.cut_line():
        warnings.warn(tokenizer.cut_line(), stacklevel=2)
    subject, others = encoded.split(len(instances))
    if has_drawn:
        subject, others = (
            DrawnCaptions(part, source.captions(), rules or Captions(), tokenizer) if len(part) else part
            for part, source, rules in zip(
                (subject, others), (instances, class_images), captions, strict=True
            )
        )
    repeats, class_repeats = own_repeats(instances), own_repeats(class_images)
    schedule = NoiseSchedule(pipeline.scheduler_config)
    diffusion = diffusion or DiffusionSettings()
    parts = (pipeline.unet, schedule, diffusion, text_encoder)
    if len(others):
        objective = PriorPreservationObjective(*parts, prior_loss_weight=prior_loss_weight)
    else:
        objective = DiffusionObjective(*parts)
    trainer = Trainer(
        objective,
        settings,
        diffusion_identity(
            "dreambooth",
            pipeline.unet,
            pipeline.scheduler_config,
            encoded,
            repeats,
            diffusion,
            class_images=len(others),
            prompts=[images[0]["captions"] for images in (instances, class_images) if len(images)],
            prior_loss_weight=prior_loss_weight if len(others) else None,
            train_text_encoder=train_text_encoder,
        )
        | (identity or {}),
    )
    noise = NoiseDrawing(diffusion, schedule)
    validation = Validation({"train": subject}, validation_examples) if validation_examples else None
    draw = functools.partial(
        dreambooth_example,
        class_examples=others,
        class_repeats=class_repeats,
        noise=noise,
        condition=encoded.condition,
    )
    return trainer.run(
        subject,
        draw,
        repeats=repeats,
        make_evaluation=make_evaluation,
        make_validation=validation_maker(validation, draw, noise),
        export=export,
    )
