"""The command that captions a folder of images."""

import dataclasses
import platform

import click

from keras_sd.captions import MODES, CaptionSettings, CleaningSettings, Vocabulary, workers
from keras_sd.captions.dataset import CaptionedFolder, caption_shard
from keras_sd.captions.shards import ShardCaptioner
from keras_sd.captions.vocabulary import KINDS
from keras_sd.cli.command import Command, refuse_unused
from keras_sd.cli.outputs import check_output
from keras_sd.cli.ray_cluster import RayCluster, check_ray, ray_options
from keras_sd.data.folders import METADATA
from keras_sd.data.images import check_image, read_square
from keras_sd.errors import UserError
from keras_sd.files.image_files import image_grid, save_png

_PARTS = 256  # journals of a run on Ray, at most
_BATCHES_OF_PART = 4  # ... at least

_SHEET_IMAGES = 48
_SHEET_SIDE = 128


@click.command(cls=Command)
@click.argument("folder")
@click.option(
    "--mode",
    default="best",
    type=click.Choice(MODES),
    help="How captions are made: `best` searches longest, `caption` is the captioner's sentence alone.",
)
@click.option(
    "--clip",
    default="ViT-L-14/openai",
    help="open_clip MODEL/WEIGHTS that ranks phrases, or a folder (of keras-sd convert --open-clip).",
)
@click.option(
    "--captioner",
    default="Salesforce/blip-image-captioning-large",
    help="BLIP model for the sentence: hub id or folder; `none`: no sentence.",
)
@click.option(
    "--flavors",
    help="Text file of style phrases, one a line. Without any list file, clip-interrogator's lists.",
)
@click.option("--mediums", help="Text file of media, such as `an oil painting`.")
@click.option("--movements", help="Text file of art movements, such as `de stijl`.")
@click.option("--artists", help="Text file of artists' names, also for --remove-artists.")
@click.option("--negative", help="Text file of unwanted things, for --mode negative.")
@click.option(
    "--max-phrases", "maximum_phrases", default=32, type=click.IntRange(1), help="Most phrases in a caption."
)
@click.option("--batch-size", default=16, type=click.IntRange(1), help="Images per batch.")
@click.option("--low-memory", is_flag=True, help="Load the captioner and CLIP one after the other.")
@click.option(
    "--devices", default="auto", help="`auto`, `all`, or a list such as cuda:0,cuda:1; one worker for each."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each worker.")
@click.option(
    "--num-shards", default=1, type=click.IntRange(1), help="Number of parts (machines) of the folder."
)
@click.option("--shard-index", default=0, type=int, help="Shard of this run, from 0.")
@click.option("--remove-artists", is_flag=True, help="Remove artists' names from captions.")
@click.option(
    "--remove", "patterns", multiple=True, metavar="REGEX", help="Remove every match; may be repeated."
)
@click.option("--product-type", help='Word that every caption gets if it lacks it, such as "whisky".')
@click.option(
    "--introductions", help="JSON Lines file (file_name, text) whose keywords are added to the captions."
)
@click.option("--keywords", default=5, type=click.IntRange(1), help="Keywords added from an introduction.")
@click.option(
    "--max-tokens", "maximum_tokens", type=click.IntRange(2), help="Cut captions to this many CLIP tokens."
)
@click.option("--txt", is_flag=True, help="Also write a .txt file beside each image.")
@click.option("--contact-sheet", help="PNG file to write, with images and their captions.")
@click.option(
    "--overwrite", is_flag=True, help="Replace captions of another model, mode or vocabulary, and your own."
)
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@ray_options
def caption(folder, threads, num_shards, shard_index, txt, contact_sheet, overwrite, dry_run, **options):
    """Caption the images in FOLDER and write metadata.jsonl, which training reads.

    An interrupted run continues when the same command is given again. Cleaning (--remove-artists to
    --max-tokens) can be changed afterwards without captioning again. Captions that existed before the first
    run or were changed by hand are kept, unless --overwrite is given.

    \b
    keras-sd caption images --mode fast
    """
    if contact_sheet is not None:
        contact_sheet = check_output(contact_sheet, ".png", overwrite=overwrite, remedy="remove it")
    _refuse_unused(options)
    check_ray(options)
    settings, cleaning = _settings(options)
    clean = cleaning.prepare()
    captioned = CaptionedFolder(folder, settings, overwrite)
    missing = captioned.missing(shard_index, num_shards)
    if txt:
        captioned.check_text_files()
    if dry_run:
        _print_plan(captioned, missing, shard_index, num_shards)
        return
    if missing and options["ray_address"] is not None:
        _caption_on_ray(captioned, missing, threads, options)
    elif missing:
        names = workers.devices(options["devices"])
        if len(names) > 1 and num_shards > 1:
            raise UserError(
                f"--devices {options['devices']}: already splits the folder; leave out --num-shards"
            )
        with _bar(missing) as bar:
            if len(names) > 1:
                workers.caption_by_workers(captioned, names, threads, bar.update)
            else:
                caption_shard(captioned, shard_index, num_shards, names[0], threads, bar.update)
    summary = captioned.write(clean, txt)
    if contact_sheet is not None and summary.captions:
        _write_sheet(captioned, summary, contact_sheet.free())
    _print_summary(captioned, summary)


def _bar(missing):
    from tqdm import tqdm

    return tqdm(total=len(missing), desc="captions", unit="image")


def _caption_on_ray(captioned, missing, threads, options):
    """Caption images on a Ray cluster, in parts of whole batches, as one process would make them."""
    settings = captioned.settings
    with RayCluster(options["ray_address"], options["ray_workers"]) as cluster:
        captioned.begin()
        batches = -(-len(missing) // settings.batch_size)
        # With --low-memory each part opens both models.
        size = -(-batches // (cluster.workers if settings.low_memory else _PARTS))
        size = settings.batch_size * (size if settings.low_memory else max(_BATCHES_OF_PART, size))
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]
        tasks = [{"names": part, "index": index, "count": len(parts)} for index, part in enumerate(parts)]
        arguments = {"folder": str(captioned.folder), "settings": dataclasses.asdict(settings)}
        arguments |= {"overwrite": captioned.overwrite, "threads": threads, "identity": settings.identity()}
        with _bar(missing) as bar:
            for count in cluster.run(
                "keras_sd.cli.caption:open_worker", arguments, tasks, captioned.journals
            ):
                bar.update(count)


def open_worker(arguments):
    """Return the function of a Ray worker that captions a part of the folder, and returns the number."""
    settings = CaptionSettings(**arguments["settings"])
    for name, found in settings.identity().items():
        if found != arguments["identity"][name]:
            raise UserError(
                f"{name}: is another one on {platform.node()}; use the same files on all machines"
            )
    captioned = CaptionedFolder(arguments["folder"], settings, arguments["overwrite"])
    captioner = ShardCaptioner(captioned, workers.devices()[0], arguments["threads"])

    def run(part):
        captioner.caption_part(part["names"], part["index"], part["count"])
        return len(part["names"])

    return run


def _refuse_unused(options):
    """Raise UserError for an option that has no effect in the mode, or without another option."""
    mode = options["mode"]
    reason = f"with --mode {mode}"
    of_phrases = {"clip", "flavors", "mediums", "movements", "low_memory"}
    refuse_unused(of_phrases, mode != "caption", reason)
    refuse_unused({"artists"}, mode != "caption" or options["remove_artists"], reason)
    refuse_unused({"maximum_phrases"}, mode not in ("caption", "classic"), reason)
    refuse_unused({"negative"}, mode == "negative", reason)
    of_machine = {"devices", "num_shards", "shard_index"}
    refuse_unused(of_machine, options["ray_address"] is None, "with --ray, which divides the folder itself")
    refuse_unused({"keywords"}, options["introductions"] is not None, "without --introductions")


def _settings(options):
    """Return `CaptionSettings` and `CleaningSettings`, whose fields have the names of the options."""
    is_none = options["captioner"].lower() == "none"
    values = options | {
        "captioner": None if is_none else options["captioner"],
        "vocabulary": {kind: options[kind] for kind in KINDS if options[kind] is not None},
        "artists": _artists(options["artists"]) if options["remove_artists"] else None,
    }
    return [
        kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
        for kind in (CaptionSettings, CleaningSettings)
    ]


def _artists(path):
    """Return the names in a file, or clip-interrogator's if it is installed.

    Without any names, those that follow "by" are removed all the same.
    """
    try:
        return Vocabulary.read(artists=path).artists
    except UserError:
        if path is not None:
            raise
        return ()


def _print_plan(captioned, missing, shard_index, num_shards):
    faults = dict(captioned.outside)
    for name in missing:
        try:
            check_image(captioned.folder / name)
        except UserError as error:
            faults[name] = str(error)
    click.echo(f"{captioned.folder}: {len(captioned.names)} images")
    click.echo(f"shard {shard_index} of {num_shards}: {len(missing)} to describe, {len(faults)} unreadable")
    for fault in faults.values():
        click.echo(f"  {fault}")
    click.echo(f"{len(captioned.by_hand.names)} captions of your own are kept")
    for name, value in captioned.settings.identity().items():
        click.echo(f"{name.replace('_', ' ')}: {value}")


def _print_summary(captioned, summary):
    """Print the summary of a run, and last the written file."""
    for fault in summary.passed_over.values():
        click.echo(f"passed over: {fault}", err=True)
    if summary.missing:
        click.echo(f"{summary.missing} of {summary.images} images are left to other shards")
        return
    removed = sum(summary.artists.values())
    click.echo(f"{len(summary.captions)} captioned, {len(summary.passed_over)} passed over")
    if removed:
        common = ", ".join(f"{name} ({count})" for name, count in summary.artists.most_common(3))
        click.echo(f"{removed} artists removed: {common}{' …' if len(summary.artists) > 3 else ''}")
    if summary.cut:
        click.echo(f"{summary.cut} phrases left out for the sake of length")
    if summary.kept or summary.removed:
        kept = f"{summary.kept} captions of your own kept"
        removed = f", {summary.removed} that you took out left out" if summary.removed else ""
        click.echo(f"{kept}{removed}; replace them with --overwrite")
    if captioned.by_hand.others:
        number, first = len(captioned.by_hand.others), min(captioned.by_hand.others)
        click.echo(f"{number} captions of your own are of images that are not there, such as {first!r}")
    if not summary.captions:
        raise UserError(f"{captioned.folder}: no image could be captioned; see the lines above")
    click.echo(captioned.folder / METADATA)


def _write_sheet(captioned, summary, path):
    names = list(summary.captions)
    names = names[:: max(1, len(names) // _SHEET_IMAGES)][:_SHEET_IMAGES]
    images = [read_square(captioned.folder / name, _SHEET_SIDE) for name in names]
    save_png(image_grid(images, [summary.captions[name] for name in names]), path)
    click.echo(path)
