"""Opens data sets of the `datasets` library: the hub's, and files of parquet, arrow and WebDataset's tars."""

import contextlib
import functools
import glob
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_sd.data.faults import first_line
from keras_sd.data.folders import digest
from keras_sd.data.listing import holds_images
from keras_sd.errors import UserError, require
from keras_sd.files.json_files import shown

BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
"""The library's reader of each suffix of data files; beside tars, parquet files hold their metadata."""

_SAVED = ("dataset_dict.json", "state.json")
_TAR_END = 1024  # two blocks of zeros
_PROBE_SECONDS = 4.0
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ProxyError", "OfflineModeIsEnabled"}
_SPLITS = {
    "validation": re.compile(r"(^|[-_./])(validation|valid|val|dev)([-_./0-9]|$)"),
    "test": re.compile(r"(^|[-_./])(test|eval)([-_./0-9]|$)"),
}


def is_data_files(name: str | Path) -> bool:
    """Return whether a name means data files of this library: a file, a pattern, or a folder of them.

    A folder with images is a folder of images, whatever lies beside them.
    """
    path = Path(name)
    if not path.is_dir():
        return path.suffix in BUILDERS and bool(path.is_file() or glob.glob(str(name)))
    return _is_saved(path) or (bool(_data_files(path)) and not holds_images(path))


def _is_saved(folder: Path) -> bool:
    return any((folder / saved).is_file() for saved in _SAVED)


def _data_files(folder: Path) -> list[Path]:
    """Return the data files in a folder and the folders in it, all of one kind."""
    files = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file())
    for suffix in BUILDERS:
        found = [path for path in files if path.suffix == suffix]
        if found:
            return found
    return []


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[str]]:
    """Return data files by the split that their name or folder says; others are for training."""
    splits: dict[str, list[str]] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        split = next((split for split, pattern in _SPLITS.items() if pattern.search(name)), "train")
        splits.setdefault(split, []).append(str(path))
    return splits


@functools.lru_cache(maxsize=4)
def open_dataset(name: str, config_name: str | None = None) -> dict[str, Any]:
    """Return the splits of a data set: name -> table of the `datasets` library, memory-mapped.

    Raises:
        UserError: the library is missing, or the data set cannot be found, read or downloaded.
    """
    require("datasets", instead="give a folder of images")
    library = importlib.import_module("datasets")
    with _faults_in_one_line(name, config_name), _quiet(library, name):
        if _is_saved(Path(name)):
            found = library.load_from_disk(name)
        else:
            with _offline_without_connection(name):
                found = library.load_dataset(**_arguments(name, config_name))
    return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


@functools.lru_cache(maxsize=4)
def open_streams(name: str, config_name: str | None = None) -> dict[str, Any]:
    """Return the splits of a data set: name -> `IterableDataset` of the library; nothing is downloaded.

    Raises:
        UserError: as `open_dataset`; or the data set was saved by the library, and is there as a whole.
    """
    require("datasets", instead="give a folder of images")
    if _is_saved(Path(name)):
        raise UserError(f"streaming: has no effect on {name}, which is on this disk; leave it out")
    with _faults_in_one_line(name, config_name), _offline_without_connection(name):
        return _streams(name, config_name)


def _streams(name: str, config_name: str | None, columns: list[str] | None = None) -> dict[str, Any]:
    library = importlib.import_module("datasets")
    builder = library.load_dataset_builder(**_arguments(name, config_name))
    if columns is not None and hasattr(builder.config, "columns"):
        builder.config.columns = columns  # of parquet files, the others are not even fetched
    return dict(builder.as_streaming_dataset())


def keep_stream(
    name: str, config_name: str | None, split: str, columns: list[str], most: int | None, features: Any
) -> Any:
    """Return a table of two columns of a data set's examples, which are fetched one by one and kept.

    The table is in the library's cache, from which a second call takes it.

    Args:
        columns: of the images, and of the captions if they are read.
        most: take only so many, the first ones; None takes all.
        features: the library's type of each of the columns.

    Raises:
        UserError: an example cannot be fetched.
    """
    library = importlib.import_module("datasets")
    arguments = {"name": name, "config_name": config_name, "split": split, "columns": tuple(columns)}
    with _faults_in_one_line(name, config_name):
        return library.Dataset.from_generator(
            _examples,
            features=features,
            cache_dir=str(library.config.HF_DATASETS_CACHE),
            gen_kwargs=arguments | {"most": most, "state": _state(name)},
        )


def _examples(name, config_name, split, columns, most, state):
    """Yield examples of a stream, images as bytes; the library calls it, and hashes its arguments."""
    del state
    features = importlib.import_module("datasets")
    stream = _streams(name, config_name, list(columns))[split].select_columns(list(columns))
    stream = stream.cast_column(columns[0], features.Image(decode=False))
    for example in stream if most is None else stream.take(most):
        image = example[columns[0]]
        if image is not None and image["bytes"] is None and image["path"]:
            with importlib.import_module("fsspec").open(image["path"], "rb") as file:
                image = {"bytes": file.read(), "path": None}
        yield example | {columns[0]: image}


def _state(name: str) -> str:
    """Return what changes with the content of a data set: a commit, or files with their times of change."""
    if not is_data_files(name):
        return str(importlib.import_module("huggingface_hub").HfApi().dataset_info(name).sha)
    path = Path(name)
    found = _data_files(path) if path.is_dir() else sorted(map(Path, glob.glob(name)))
    states = [(path, path.stat()) for path in found]
    return digest([[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in states])


def _arguments(name: str, config_name: str | None) -> dict[str, Any]:
    """Return the arguments by which the library loads a data set."""
    path = Path(name)
    if path.is_dir():
        files = _data_files(path)
        _check_tars(files)
        return {"path": BUILDERS[files[0].suffix], "data_files": _by_split(path, files)}
    if is_data_files(name):
        _check_tars([path] if path.is_file() else sorted(map(Path, glob.glob(name))))
        return {"path": BUILDERS[path.suffix], "data_files": name}
    return {"path": name, "name": config_name}


@contextlib.contextmanager
def _quiet(library: Any, name: str) -> Iterator[None]:
    """Hide the library's log lines, whose fault is in its exception, and its bars, except of a download."""
    logging, hides_bars = library.utils.logging, is_data_files(name)
    verbosity, had_bars = logging.get_verbosity(), not library.utils.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    if hides_bars:
        library.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hides_bars and had_bars:
            library.enable_progress_bars()


def _check_tars(paths: list[Path]) -> None:
    """Raise UserError for a tar that was cut short: the library would leave out the rest without a word."""
    for path in paths:
        if path.suffix != ".tar" or not path.is_file():
            continue
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAR_END))
            if file.read() != bytes(_TAR_END):
                raise UserError(f"{path}: a tar without its end, so it was cut short; fetch it again")


@contextlib.contextmanager
def _faults_in_one_line(name: str, config_name: str | None) -> Iterator[None]:
    is_local = is_data_files(name)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_fault(name, config_name, error, is_local)) from error
    if config_name is not None and is_local:
        raise UserError(f"dataset_config_name: has no effect on the files of {name}; leave it out")


@contextlib.contextmanager
def _offline_without_connection(name: str) -> Iterator[None]:
    """Let the library use what it has kept if the hub cannot be reached.

    On its own it tries again and again, for half a minute. Here one request tells, in a few seconds.
    """
    hub = importlib.import_module("huggingface_hub")
    if is_data_files(name):
        yield
        return
    try:
        hub.HfApi().dataset_info(name, timeout=_PROBE_SECONDS)
    except Exception as error:  # the classes are of a package that changes with the hub's versions
        is_reached = _NO_CONNECTION.isdisjoint(kind.__name__ for kind in type(error).__mro__)
    else:
        is_reached = True
    if is_reached:
        yield
        return
    places = importlib.import_module("datasets").config, hub.constants
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _fault(name: str, config_name: str | None, error: Exception, is_local: bool) -> str:
    cause = error.__cause__ or error.__context__
    line = first_line(cause if type(error).__name__ == "DatasetGenerationError" and cause else error)
    if is_local and "BatchSize must be greater than 0" in line:  # of a parquet file without rows
        return f"data set {name}: holds no examples; give files with images"
    if is_local:
        return f"data set {name}: cannot be read ({line}); fetch its files again"
    if "config" in line.lower():
        known = re.findall(r"'([^']+)'", str(error))
        return (
            f"dataset_config_name {shown(config_name or 'missing')}: data set {name} has others "
            f"({', '.join(known)[:200]}); choose one"
        )
    if isinstance(error, ConnectionError):
        return (
            f"data set {name}: no such folder, and the hub cannot be reached ({line}); connect to the "
            "network, or give a folder"
        )
    return f"data set {name}: cannot be loaded ({line}); check its name, and log in if it is private"
