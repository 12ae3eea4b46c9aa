"""The command that fills a folder with the encodings of a data set, for `--cache-latents disk`."""

import platform
import sys
from pathlib import Path

import click

from keras_sd import interruption, presets
from keras_sd.cli.command import Command, decorated, refuse_unused
from keras_sd.cli.model_options import skipped_layers
from keras_sd.cli.option_types import COUNT
from keras_sd.cli.ray_cluster import RayCluster, check_ray, hide_accelerators, ray_options
from keras_sd.cli.train.caching import dtype_option
from keras_sd.cli.train.data_options import (
    apply_config,
    captions_of,
    configured_source,
    max_token_length_option,
    print_notes,
    reading_of,
    source_options,
)
from keras_sd.cli.train.fine_tuning import clip_skip_option, pretrained_option
from keras_sd.cli.train.framing import (
    check_framing,
    check_sides,
    framed,
    framing_of,
    framing_options,
    train_batch_size_of,
    train_batch_size_option,
)
from keras_sd.cli.train.masks import mask_options
from keras_sd.cli.train.options import max_train_samples_option, mixed_precision_option, seed_option
from keras_sd.errors import UserError, require
from keras_sd.progress import Progress

_SHARDS_OF_TASK = 4
_OF_CAPTIONS = ("caption_column", "caption_extension", "caption_lines", "max_token_length", "clip_skip")


@click.command(cls=Command)
@click.argument("dataset")
@click.argument("folder", type=click.Path(file_okay=False))
@pretrained_option
@source_options()
@max_train_samples_option
@seed_option
@mask_options
@max_token_length_option
@clip_skip_option
@click.option(
    "--images-only",
    is_flag=True,
    help="Encode no captions, as for textual inversion, DreamBooth and a text encoder that is trained.",
)
@decorated(*(option for _, option in framing_options(flips=False)))
@dtype_option
@mixed_precision_option
@click.option(
    "--batch-size",
    default=4,
    type=COUNT,
    help="Images per batch. Training encodes 4, and another number may round differently.",
)
@train_batch_size_option
@click.option("--jit-compile/--no-jit-compile", default=True, help="Compile with XLA.")
@ray_options
def encode(dataset, folder, **options):
    """Encode the images and captions of DATASET once, into FOLDER.

    DATASET is a folder of images, the name of a data set, or a .toml of several, as for training. A run with
    the same model, size, crops, batch size and precision and with --cache-latents disk --cache-dir FOLDER
    then encodes nothing. A run that was interrupted goes on where it was.

    \b
    keras-sd encode images encodings --pretrained-model-name-or-path sd-1.5 --resolution 512
    """
    if dataset.endswith(".toml"):
        options["dataset_config"] = dataset
    apply_config(options)
    captions_of(options)
    refuse_unused({"seed"}, options["max_train_samples"] is not None, "without --max-train-samples")
    refuse_unused(_OF_CAPTIONS, not options["images_only"], "with --images-only")
    check_ray(options)
    check_framing("encode", options)
    if not options["center_crop"]:
        raise UserError("--no-center-crop: another crop at each draw cannot be kept; leave it out")
    if Path(folder).exists() and Path(dataset).exists() and Path(folder).samefile(dataset):
        raise UserError(f"{folder}: holds the images; give another folder for the encodings")
    require("array_record", "grain")
    interruption.set_kept(f"the shards in {folder} stay")
    model = presets.find(options["pretrained_model_name_or_path"])
    options["train_batch_size"] = train_batch_size_of(options, model)
    if options["ray_address"] is None:
        parts = _open(dataset, folder, options)
        from keras_sd.training.stored_encodings import StoredSource

        stored = StoredSource(*parts.values(), options["cache_dtype"])
        encoded, count = stored.encoded, len(stored)
    else:
        encoded, count = _encode_on_ray(dataset, folder, options)
    if options["aspect_ratio_buckets"] > 1:
        batch = f"--train-batch-size {options['train_batch_size']}"
        print(f"buckets: merged as in training with {batch}; give it there, too", file=sys.stderr)
    print(f"{encoded} images encoded, {count} are in {folder}", file=sys.stderr, flush=True)


def _open(dataset, folder, options):
    """Return the first arguments of `StoredSource`."""
    from keras_sd.data.encoding_store import EncodingStore
    from keras_sd.data.images import MINIMUM_SIDE
    from keras_sd.data.sources import load_source

    if options.get("dataset_config"):
        source = configured_source(options, need_captions=True, is_reg="any")
        if not options["images_only"] and source.caption_rules() is not None:
            raise UserError(f"{dataset}: captions are drawn anew each time; encode --images-only")
    else:
        place = Path(dataset) if Path(dataset).is_dir() else dataset
        source = load_source(place, "train", MINIMUM_SIDE, not options["images_only"], **reading_of(options))
    print_notes(source, options)
    model = presets.find(options["pretrained_model_name_or_path"])
    store = EncodingStore(folder)
    return {**_encoder(source, model, options), "store": store}


def _encoder(source, model, options):
    """Return the framed source, the encoder and the captions of a source."""
    import keras

    from keras_sd.pipeline.stable_diffusion import StableDiffusion
    from keras_sd.training.caption_tokenizer import CaptionTokenizer
    from keras_sd.training.clip_skip import skip_layers
    from keras_sd.training.conditioning import conditioning_of
    from keras_sd.training.encoder import CaptionIndex, Encoder
    from keras_sd.training.settings import PRECISIONS

    precision = options["mixed_precision"]
    if precision == "auto":
        precision = own_precision()
    keras.config.set_dtype_policy(PRECISIONS[precision])
    with interruption.phase(f"opening {options['pretrained_model_name_or_path']}"):
        pipeline = StableDiffusion.load(model, dtype=PRECISIONS[precision])
    skip_layers(pipeline.text_encoder, skipped_layers(pipeline.text_encoder, options["clip_skip"]))
    conditioning = conditioning_of(pipeline)
    if conditioning is not None:
        raise UserError(
            f"model {pipeline.name}: {conditioning.reason}, so encodings are of no use to training"
        )
    factor = pipeline.vae.config.downsampling
    framing = framing_of(options, pipeline.unet.config.sample_size * factor)
    check_sides(framing, factor)
    framed_source = framed(source, framing, options["train_batch_size"], options["on_bad_sample"])
    tokenizer = CaptionTokenizer(pipeline.tokenizer, int(options["max_token_length"]))
    text_encoder = None if options["images_only"] else pipeline.text_encoder
    captions = CaptionIndex(framed_source.captions(), tokenizer)
    if text_encoder is not None and tokenizer.cut_line():
        print(tokenizer.cut_line(), file=sys.stderr, flush=True)
    encoder = Encoder(pipeline.vae, text_encoder, tokenizer, options["batch_size"], options["jit_compile"])
    return {"source": framed_source, "encoder": encoder, "captions": captions}


def own_precision():
    """Return the precision of "auto" on this machine: of a Ray worker, on its own."""
    from keras_sd import backend

    return "bf16" if backend.multiplies_bfloat16() else "no"


def _encode_on_ray(dataset, folder, options):
    """Let a Ray cluster encode what the store lacks; return how many images that were, and of how many."""
    with RayCluster(options["ray_address"], options["ray_workers"]) as cluster:
        hide_accelerators()
        if options["mixed_precision"] == "auto":
            own = "keras_sd.cli.encode:own_precision"
            options["mixed_precision"] = cluster.call(own) if cluster.has_gpus else "no"
        parts = _open(dataset, folder, options)
        from keras_sd.training.stored_encodings import Filling

        filling = Filling(*parts.values(), options["cache_dtype"], show=True)
        store, jobs = parts["store"], filling.jobs()
        filling.tell(jobs)
        store.save_catalogue()  # which the workers read
        arguments = {"dataset": dataset, "folder": folder, "options": options}
        arguments["identity"] = filling.identity()
        # Several shards at a time keep a worker busy; few at the end let all end together.
        size = min(_SHARDS_OF_TASK, max(1, len(jobs) // (4 * cluster.workers)))
        tasks = [[job.to_dict() for job in jobs[at : at + size]] for at in range(0, len(jobs), size)]
        with Progress("encoding on Ray", len(jobs), "shards", disable=not jobs) as bar:
            for count in cluster.run("keras_sd.cli.encode:open_worker", arguments, tasks, store.folder):
                bar.update(count)
    store.refresh()
    store.save_catalogue()
    missing = filling.jobs()
    if missing:
        raise UserError(f"{folder}: {len(missing)} shards of the Ray workers are missing; start again")
    return sum(len(job.rows) for job in jobs if job.kind == "latents"), len(parts["source"])


def open_worker(arguments):
    """Return the function of a Ray worker that encodes a list of jobs, and returns their number."""
    options = arguments["options"]
    parts = _open(arguments["dataset"], arguments["folder"], options)
    from keras_sd.training.stored_encodings import Job, ShardEncoder

    store = parts["store"]
    shards = ShardEncoder(*parts.values(), options["cache_dtype"])
    for name, found in shards.identity().items():
        if found != arguments["identity"][name]:
            machine = platform.node()
            raise UserError(f"{name}: is another one on {machine}; use the same files on all machines")

    def run(task):
        jobs = [Job.from_dict(values) for values in task]
        # A worker that died may have written some.
        shards.encode([job for job in jobs if (store.find(job.keys) < 0).any()])
        return len(jobs)

    return run
