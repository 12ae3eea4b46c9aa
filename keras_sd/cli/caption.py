"""The command that makes a data set out of a folder of images."""

import click

from keras_sd.captions import MODES, CaptionSettings, CleaningSettings, Vocabulary, workers
from keras_sd.captions.dataset import CaptionedFolder, caption_shard
from keras_sd.captions.vocabulary import KINDS
from keras_sd.cli.command import Command
from keras_sd.cli.outputs import check_output
from keras_sd.data.folders import METADATA
from keras_sd.data.images import check_image, read_square
from keras_sd.errors import UserError
from keras_sd.files.image_files import image_grid, save_png

_SHEET_IMAGES = 48
_SHEET_SIDE = 128


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("folder")
@click.option("--mode", default="best", type=click.Choice(MODES), help="From the slowest to the plainest.")
@click.option(
    "--clip",
    default="ViT-L-14/openai",
    help="open_clip model and weights, or a folder of its layout (keras-sd convert --open-clip).",
)
@click.option(
    "--captioner",
    default="Salesforce/blip-image-captioning-large",
    help="BLIP for the sentence: hub id, folder, or none.",
)
@click.option("--flavors", help="File of phrases, one a line. Without any file, clip-interrogator's lists.")
@click.option("--mediums", help="The same of media: an oil painting, an icon.")
@click.option("--movements", help="The same of movements: de stijl.")
@click.option("--artists", help="The same of artists' names.")
@click.option("--negative", help="The same of what is unwanted, for --mode negative.")
@click.option("--max-phrases", default=32, type=click.IntRange(1), help="Most phrases of a caption.")
@click.option("--batch-size", default=16, type=click.IntRange(1), help="Images at a time.")
@click.option("--low-memory", is_flag=True, help="Load the captioner and CLIP one after the other.")
@click.option(
    "--devices", default="auto", help="auto, all, or names with commas: cuda:0,cuda:1. One worker each."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of each worker on a CPU.")
@click.option("--num-shards", default=1, type=click.IntRange(1), help="Parts of the folder, one a machine.")
@click.option("--shard-index", default=0, type=int, help="Which of them this run does, from 0.")
@click.option("--remove-artists", is_flag=True, help="Take artists' names out of the captions.")
@click.option(
    "--remove", "patterns", multiple=True, metavar="REGEX", help="Take out what matches; may repeat."
)
@click.option("--product-type", help='Stands in every caption, such as "whisky".')
@click.option("--introductions", help="JSON lines with file_name and text, whose main words are added.")
@click.option("--keywords", default=5, type=click.IntRange(1), help="How many words of an introduction.")
@click.option("--max-tokens", type=click.IntRange(2), help="Longest caption in CLIP's tokens; cut at commas.")
@click.option("--txt", is_flag=True, help="Write a .txt beside each image too.")
@click.option("--contact-sheet", help="PNG file for images with their captions.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace captions of another model, mode or vocabulary, and your own.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def caption(
    folder, devices, threads, num_shards, shard_index, txt, contact_sheet, overwrite, dry_run, **options
):
    """Describe the images in FOLDER and write metadata.jsonl, which training takes as it is.

    A run that was killed goes on where it was when the same command is given again. Cleaning
    (--remove-artists to --max-tokens) can be changed afterwards without describing the images again.
    Captions that were there before or have been changed by hand stay, unless --overwrite is given.
    """
    if contact_sheet is not None:
        contact_sheet = check_output(contact_sheet, ".png", overwrite=overwrite, remedy="remove it")
    settings, cleaning = _caption_settings(options), _cleaning_settings(options)
    clean = cleaning.prepare()
    captioned = CaptionedFolder(folder, settings, overwrite)
    missing = captioned.missing(shard_index, num_shards)
    if txt:
        captioned.check_text_files()
    if dry_run:
        _tell_plan(captioned, missing, shard_index, num_shards)
        return
    if missing:
        names = workers.devices(devices)
        if len(names) > 1 and num_shards > 1:
            raise UserError(f"--devices {devices}: already splits the folder; leave out --num-shards")
        from tqdm import tqdm

        with tqdm(total=len(missing), desc="captions", unit="image") as bar:
            if len(names) > 1:
                workers.caption_by_workers(captioned, names, threads, bar.update)
            else:
                caption_shard(captioned, shard_index, num_shards, names[0], threads, bar.update)
    summary = captioned.write(clean, txt)
    if contact_sheet is not None and summary.captions:
        _write_sheet(captioned, summary, contact_sheet.free())
    _tell(captioned, summary)


def _caption_settings(options):
    captioner = options["captioner"]
    return CaptionSettings(
        mode=options["mode"],
        clip=options["clip"],
        captioner=None if captioner.lower() == "none" else captioner,
        vocabulary={kind: options[kind] for kind in KINDS if options[kind] is not None},
        maximum_phrases=options["max_phrases"],
        batch_size=options["batch_size"],
        low_memory=options["low_memory"],
    )


def _cleaning_settings(options):
    artists = _artists(options["artists"]) if options["remove_artists"] else None
    return CleaningSettings(
        artists=artists,
        patterns=options["patterns"],
        product_type=options["product_type"],
        introductions=options["introductions"],
        keywords=options["keywords"],
        maximum_tokens=options["max_tokens"],
    )


def _artists(path):
    """The names of a file, or clip-interrogator's where it is installed; `by` and a name are known anyway."""
    try:
        return Vocabulary.read(artists=path).artists
    except UserError:
        if path is not None:
            raise
        return ()


def _tell_plan(captioned, missing, shard_index, num_shards):
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


def _tell(captioned, summary):
    """The summary at the end, the file last."""
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
