"""The options of methods that train on latents: where encodings are kept."""

from pathlib import Path

import click

from keras_sd.cli.command import decorated
from keras_sd.data.encoding_store import DTYPES
from keras_sd.errors import UserError
from keras_sd.training.caching import MODES, Caching

dtype_option = click.option(
    "--cache-dtype",
    default="float32",
    type=click.Choice(DTYPES),
    help="Precision in which encodings are kept; half precision takes half the space.",
)

caching_options = decorated(
    click.option(
        "--cache-latents",
        type=click.Choice(MODES),
        is_flag=False,
        flag_value="memory",
        show_default="memory up to 1 GiB, else disk; off with random crops",
        help="Where latents and encodings of captions are kept. `off`: the next batch is encoded while a "
        "step runs. Without a value: `memory`.",
    ),
    click.option(
        "--cache-dir",
        help="Folder of `--cache-latents disk`, such as one that `keras-sd encode` has filled. Runs may "
        "share one. By default `encodings` in the cache folder.",
    ),
    dtype_option,
)


def caching_of(options):
    """Return the `Caching` of a command's options.

    Raises:
        UserError: an option has no effect, or there is no place for encodings.
    """
    caching = Caching(options["cache_latents"], options["cache_dir"], options["cache_dtype"])
    if caching.cache_dir is not None and Path(caching.cache_dir).exists():
        if not Path(caching.cache_dir).is_dir():
            raise UserError(f"--cache-dir {caching.cache_dir}: not a folder; choose another place")
    if caching.cache_latents == "disk":
        caching.folder()
    return caching if options["center_crop"] else caching.with_random_crops()
