"""The command that teaches a model one subject: DreamBooth (Ruiz et al., 2023), of all weights or by LoRA."""

from pathlib import Path

import click

from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.option_types import POSITIVE
from keras_sd.cli.train.caching import caching_of, caching_options
from keras_sd.cli.train.data_options import (
    caption_identity,
    configured_source,
    dataset_config_option,
    on_bad_sample_option,
    print_notes,
)
from keras_sd.cli.train.diffusion import diffusion_of, diffusion_options
from keras_sd.cli.train.epochs import images_of_epoch
from keras_sd.cli.train.fine_tuning import (
    clip_skip_option,
    part_fingerprints,
    pretrained_option,
    subject_evaluation,
    subject_options,
    text_encoder_options,
    trained_parts,
    zero_snr_option,
)
from keras_sd.cli.train.lora import (
    OF_LORA,
    lora_export,
    low_rank_identity,
    open_with_loras,
    rank_options,
)
from keras_sd.cli.train.lora_ranks import take_ranks_of_file
from keras_sd.cli.train.masks import mask_options, masks_of
from keras_sd.cli.train.opening import image_size_of, open_pipeline
from keras_sd.cli.train.optimizer import block_rates_option
from keras_sd.cli.train.options import COUNT, run_options
from keras_sd.cli.train.preparation import prepare
from keras_sd.cli.train.validation import validated_examples
from keras_sd.errors import UserError

_OF_FOLDERS = ("instance_data_dir", "instance_prompt", "with_prior_preservation")
_CLASS_OPTIONS = ("class_prompt", "class_data_dir", "num_class_images", "prior_loss_weight")


@click.command(cls=Command)
@run_options(
    "dreambooth",
    without=("dataset_name", "train_data_dir", "max_train_samples"),
    output_dir="runs/dreambooth",
    evaluation_steps=100,
)
@pretrained_option
@click.option("--instance-data-dir", help="Folder with images of the subject.")
@click.option("--instance-prompt", help="Prompt of the subject with a rare word, such as `a sks toy`.")
@dataset_config_option
@on_bad_sample_option
@mask_options
@click.option(
    "--with-prior-preservation",
    is_flag=True,
    help="Also train on images of the subject's class, so that the model does not forget it.",
)
@click.option("--class-prompt", help="Prompt of the class, such as `a toy`.")
@click.option(
    "--class-data-dir", help="Folder with images of the class. By default `class-images` in the run folder."
)
@click.option(
    "--num-class-images", default=100, type=COUNT, help="Images of the class; missing ones are generated."
)
@click.option(
    "--prior-loss-weight", default=1.0, type=POSITIVE, help="Weight of the class images in the loss."
)
@text_encoder_options("Train the text encoder too.")
@block_rates_option
@zero_snr_option
@clip_skip_option
@click.option("--lora", is_flag=True, help="Train LoRA weights instead of all weights.")
@rank_options(8)
@diffusion_options
@caching_options
@click.option("--sample-batch-size", default=4, type=COUNT, help="Images per batch when sampling.")
@subject_options("dreambooth", "the instance prompt")
def dreambooth(**options):
    """Teach a model one subject from a few images of it (DreamBooth).

    \b
    python -m keras_sd.train dreambooth --instance-data-dir dog --instance-prompt "a photo of a sks dog"
    """
    refuse_unused(OF_LORA, options["lora"], "without --lora")
    refuse_unused(
        ["rescale_betas_zero_snr"], not options["lora"], "on a LoRA, whose file has no noise schedule"
    )
    take_ranks_of_file(options)
    sources, class_folder = _config_sources(options), None
    if sources is None:
        class_folder, count = _check_folders(options)
    else:
        count = images_of_epoch(sources[0], sources[0].repeats())
    of_class = ["num_inference_steps", "guidance_scale"] if class_folder else []
    trained = trained_parts(options)
    run = prepare(
        "dreambooth",
        options,
        variant="lora" if options["lora"] else None,
        used=of_class,
        identity=_identity(options, trained),
        images=count,
    )
    from keras_sd.training.conditioning import refuse_conditioning
    from keras_sd.training.dreambooth import train_dreambooth

    if options["lora"]:
        pipeline, identity = open_with_loras(run, trained)
    else:
        pipeline = open_pipeline(run)
        identity = part_fingerprints(pipeline, *trained)
    refuse_conditioning(pipeline, "dreambooth")
    pipeline.batch_size = options["sample_batch_size"]
    if sources is None:
        instances, class_images = _images(run, pipeline, class_folder)
    else:
        sizes = image_size_of(pipeline), pipeline.vae.config.downsampling
        instances, class_images = (run.framed(one, *sizes) if one else [] for one in sources)
    run.count_epochs(instances, instances.repeats())
    prompt = options["instance_prompt"] or instances.captions()[0][0]
    frozen = ["vae", *(["text_encoder"] if "text_encoder" not in trained else [])]
    finished = train_dreambooth(
        run.settings,
        pipeline,
        instances,
        class_images,
        train_text_encoder=options["train_text_encoder"],
        prior_loss_weight=options["prior_loss_weight"],
        identity=part_fingerprints(pipeline, *frozen) | caption_identity(options) | identity,
        diffusion=diffusion_of(options),
        captions=_caption_rules(instances, class_images) if sources else None,
        caching=caching_of(options),
        make_evaluation=subject_evaluation(run, pipeline, prompt),
        validation_examples=validated_examples(run),
        export=lora_export(run, pipeline, trained, [instances.source]) if options["lora"] else pipeline.save,
    )
    if finished:
        run.print_next_command("--lora" if options["lora"] else None, prompt=prompt)


def _identity(options, trained):
    """Return the JSON values of options that a checkpoint to resume must share."""
    has_class = options["with_prior_preservation"]
    values = low_rank_identity(options, trained) if options["lora"] else {}
    values["train_text_encoder"] = options["train_text_encoder"]
    values["prior_loss_weight"] = options["prior_loss_weight"] if has_class else None
    if options["instance_prompt"]:
        prompts = [options["instance_prompt"], *([options["class_prompt"]] if has_class else [])]
        values["prompts"] = [[prompt] for prompt in prompts]
    return values


def _config_sources(options):
    """Return the sources of the subject and of its class by --dataset-config; None without one."""
    if not options["dataset_config"]:
        return None
    from keras_sd.data.dataset_config import read_dataset_config

    said = (*_OF_FOLDERS, "class_prompt", "class_data_dir", "num_class_images")
    refuse_unused(said, False, "with --dataset-config, whose file says it")
    has_class = bool(read_dataset_config(Path(options["dataset_config"])).part(is_reg=True).subsets)
    refuse_unused(["prior_loss_weight"], has_class, "without images of the class (is_reg)")
    options["with_prior_preservation"] = has_class
    sources = [configured_source(options, True, is_reg) for is_reg in (False, *([True] if has_class else []))]
    for source in sources:
        print_notes(source, options)
    return sources[0], sources[1] if has_class else None


def _caption_rules(*parts):
    """Return how captions of the subject and of its class are drawn, as `train_dreambooth` takes it."""
    return [part.source.caption_rules() if part else None for part in parts]


def _check_folders(options):
    """Check the folders of the subject and of its class.

    Returns:
        The folder of the class, or None, and the number of images of the subject.
    """
    refuse_unused(_CLASS_OPTIONS, options["with_prior_preservation"], "without --with-prior-preservation")
    for name, title in (("instance_data_dir", "a folder of images"), ("instance_prompt", "a prompt")):
        if not options[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: missing; give {title} of the subject, or --dataset-config")
    class_folder = _class_folder(options)
    count = _check_images(Path(options["instance_data_dir"]), class_folder, options)
    return class_folder, count


def _class_folder(options):
    """Return the folder of the class images; None without prior preservation."""
    if not options["with_prior_preservation"]:
        return None
    if not options["class_prompt"]:
        raise UserError("--with-prior-preservation: no prompt of the class; give --class-prompt")
    return Path(options["class_data_dir"] or Path(options["output_dir"]) / "class-images")


def _check_images(instance_folder, class_folder, options):
    """Check images before any long work; return how many of the subject an epoch shows.

    Raises:
        UserError: some cannot be trained on.
    """
    from keras_sd.data.folders import FolderSource, count_images
    from keras_sd.data.images import MINIMUM_SIDE

    reading = {"on_bad_sample": options["on_bad_sample"], "masks": masks_of(options)}
    source = FolderSource(instance_folder, MINIMUM_SIDE, need_captions=False, **reading)
    if class_folder is None:
        return images_of_epoch(source, source.repeats())
    count_images(class_folder)
    places = instance_folder.resolve(), class_folder.resolve()
    if any(place.is_relative_to(other) for place, other in (places, places[::-1])):
        raise UserError(
            f"{class_folder}: images of the class and of the subject {instance_folder} in one folder; "
            "keep them apart"
        )
    return images_of_epoch(source, source.repeats())


def _images(run, pipeline, class_folder):
    """Return the examples of the subject and of its class, after generating missing class images."""
    from keras_sd.data.images import MINIMUM_SIDE
    from keras_sd.training.dreambooth import generate_class_images, read_images

    options, sizes = run.options, (image_size_of(pipeline), pipeline.vae.config.downsampling)

    def read(folder, prompt, masks=None):
        source = read_images(folder, prompt, MINIMUM_SIDE, options["on_bad_sample"], masks).source
        print_notes(source, options)
        return run.framed(source, *sizes)

    instances = read(options["instance_data_dir"], options["instance_prompt"], masks_of(options))
    if class_folder is None:
        return instances, []
    if options["plan"] is not None:  # what is not there yet has the same shapes
        return instances, instances
    prompt = options["class_prompt"]
    # Images of the model as training finds it: new updates have no effect yet.
    generate_class_images(
        pipeline,
        class_folder,
        prompt,
        options["num_class_images"],
        num_inference_steps=options["num_inference_steps"],
        guidance_scale=options["guidance_scale"],
        seed=options["seed"],
    )
    return instances, read(class_folder, prompt)
