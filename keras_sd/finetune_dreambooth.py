"""The command that teaches a model one subject: DreamBooth, by all weights or by low-rank updates."""

import functools
import warnings
from pathlib import Path

import click

from keras_sd.errors import UserError
from keras_sd.train_options import open_pipeline, run_options, settings_of


def dreambooth_options(command):
    """The options that are DreamBooth's own."""
    options = [
        click.option(
            "--pretrained-model-name-or-path",
            default="emoji",
            show_default=True,
            help="Preset, hub id, folder or file.",
        ),
        click.option("--instance-data-dir", required=True, help="Folder with pictures of the subject."),
        click.option("--instance-prompt", required=True, help="Its prompt, with a rare word: `a sks toy`."),
        click.option("--with-prior-preservation", is_flag=True, help="Keep what the model knows of a class."),
        click.option("--class-prompt", help="Prompt of the class: `a toy`."),
        click.option(
            "--class-data-dir",
            help="Folder with pictures of the class; `class-images` in the run folder by default.",
        ),
        click.option(
            "--num-class-images",
            default=100,
            show_default=True,
            type=click.IntRange(1),
            help="Pictures of the class; the model draws those that are missing.",
        ),
        click.option(
            "--prior-loss-weight", default=1.0, show_default=True, help="Weight of the class in the loss."
        ),
        click.option("--train-text-encoder", is_flag=True, help="Train the text encoder too."),
        click.option("--lora", is_flag=True, help="Train low-rank updates in place of all weights."),
        click.option("--rank", type=click.IntRange(1), help="Rank of these updates; 8 by default."),
        click.option(
            "--lora-alpha", type=float, help="Updates are scaled by alpha / rank; the rank by default."
        ),
        click.option(
            "--snr-gamma", type=float, help="Gamma of min-SNR weighting; 5 is usual. Off by default."
        ),
        click.option(
            "--sample-batch-size",
            default=4,
            show_default=True,
            type=click.IntRange(1),
            help="Pictures drawn or encoded at a time.",
        ),
        click.option(
            "--validation-prompts",
            multiple=True,
            help="A prompt of the sample grid; may be repeated. The instance prompt by default.",
        ),
        click.option(
            "--num-validation-images",
            default=4,
            show_default=True,
            type=click.IntRange(1),
            help="Samples for each of these prompts.",
        ),
        click.option(
            "--num-inference-steps",
            default=30,
            show_default=True,
            type=click.IntRange(1),
            help="Sampling steps of class images and samples.",
        ),
        click.option(
            "--guidance-scale", default=5.0, show_default=True, help="Guidance of class images and samples."
        ),
    ]
    return functools.reduce(lambda decorated, add: add(decorated), reversed(options), command)


@click.command()
@run_options(
    without=("dataset_name", "train_data_dir"),
    output_dir="runs/dreambooth",
    max_train_steps=400,
    train_batch_size=4,
    learning_rate=5e-5,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    ema_decay=0.99,
    evaluation_steps=100,
)
@dreambooth_options
def dreambooth(lora, rank, lora_alpha, **options):
    """Teach a model one subject from a few pictures of it (DreamBooth)."""
    if not lora and (rank is not None or lora_alpha is not None):
        raise UserError("--rank and --lora-alpha: belong to low-rank updates; add --lora or leave them out")
    class_folder = _class_folder(options)
    _check_pictures(Path(options["instance_data_dir"]), class_folder)
    settings = settings_of(options)
    settings.use_precision()
    from keras_sd.training.dreambooth import train_dreambooth
    from keras_sd.training.lora import add_lora, save_lora

    trained = ("unet", "text_encoder") if options["train_text_encoder"] else ("unet",)
    rank = rank or 8
    alpha = rank if lora_alpha is None else lora_alpha

    def add_loras(parts):
        for name in trained:
            add_lora(parts[name], rank, alpha)

    pipeline = open_pipeline(options, add_loras if lora else None)
    pipeline.batch_size = options["sample_batch_size"]
    models = {name: getattr(pipeline, name) for name in trained}
    instances, class_pictures = _pictures(pipeline, options, class_folder)
    train_dreambooth(
        settings,
        pipeline,
        instances,
        class_pictures,
        train_text_encoder=options["train_text_encoder"],
        prior_loss_weight=options["prior_loss_weight"],
        identity={"rank": rank, "alpha": alpha} if lora else None,
        min_snr_gamma=options["snr_gamma"],
        make_evaluation=functools.partial(_make_evaluation, pipeline, options),
        export=(lambda folder: save_lora(folder, models, alpha)) if lora else pipeline.save,
    )


def _class_folder(options):
    """Where the pictures of the class are, or are to be; None without prior preservation."""
    if not options["with_prior_preservation"]:
        if options["class_prompt"] or options["class_data_dir"]:
            warnings.warn("the class is not used; add --with-prior-preservation to keep it", stacklevel=2)
        return None
    if not options["class_prompt"]:
        raise UserError("--with-prior-preservation: no prompt of the class; give --class-prompt")
    return Path(options["class_data_dir"] or Path(options["output_dir"]) / "class-images")


def _check_pictures(instance_folder, class_folder):
    """Refuses pictures that cannot be trained on, before any long work."""
    from keras_sd.data.folders import FolderSource
    from keras_sd.data.images import MINIMUM_SIDE

    FolderSource(instance_folder, MINIMUM_SIDE, need_captions=False)
    if class_folder is None:
        return
    from keras_sd.training.dreambooth import count_pictures

    count_pictures(class_folder)
    places = instance_folder.resolve(), class_folder.resolve()
    if any(place.is_relative_to(other) for place, other in (places, places[::-1])):
        raise UserError(
            f"{class_folder}: pictures of the class and of the subject {instance_folder} in one folder; "
            "keep them apart"
        )


def _pictures(pipeline, options, class_folder):
    """Examples of the subject and of its class, whose missing pictures are drawn first."""
    from keras_sd.training.dreambooth import generate_class_images, read_pictures

    image_size = pipeline.unet.config.sample_size * pipeline.vae.config.downsampling
    instances = read_pictures(options["instance_data_dir"], options["instance_prompt"], image_size)
    if class_folder is None:
        return instances, []
    prompt = options["class_prompt"]
    # Low-rank updates begin at zero: with them the model still draws what it drew before.
    generate_class_images(
        pipeline,
        class_folder,
        prompt,
        options["num_class_images"],
        num_steps=options["num_inference_steps"],
        guidance_scale=options["guidance_scale"],
        seed=options["seed"],
    )
    return instances, read_pictures(class_folder, prompt, image_size)


def _make_evaluation(pipeline, options, trainer):
    """The evaluation that draws the validation prompts."""
    from keras_sd.images import image_grid
    from keras_sd.training.evaluation import SampleEvaluation

    prompts = options["validation_prompts"] or [options["instance_prompt"]]
    labels = [prompt for prompt in prompts for _ in range(options["num_validation_images"])]

    def grid():
        images = pipeline.text_to_image(
            labels,
            num_steps=options["num_inference_steps"],
            guidance_scale=options["guidance_scale"],
            seed=options["seed"],
            progress=False,
        )
        return image_grid(images, columns=options["num_validation_images"], labels=labels, scale=2)

    return SampleEvaluation(trainer, grid)
