"""Several data sets in one TOML file, as kohya's scripts read it (`dataset_config`).

`[general]` holds defaults for all data sets, each `[[datasets]]` those of its subsets, and each
`[[datasets.subsets]]` one folder or data set. A key is honoured or refused by name.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from keras_sd.data.caption_files import METADATA, TABLE, CaptionFiles
from keras_sd.data.captions import Captions
from keras_sd.data.masks import MaskFiles
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_text, shown

# Keys of a subset, which a data set or [general] may hold as defaults, and their types.
_OF_SUBSETS: dict[str, tuple[type, ...]] = {
    "num_repeats": (int,),
    "caption_extension": (str,),
    "shuffle_caption": (bool,),
    "keep_tokens": (int,),
    "caption_separator": (str,),
    "caption_tag_dropout_rate": (int, float),
    "image_column": (str,),
    "caption_column": (str,),
    "alpha_mask": (bool,),
    "unmasked_weight": (int, float),
}
_OF_ONE: dict[str, tuple[type, ...]] = {
    "image_dir": (str,),
    "conditioning_data_dir": (str,),
    "dataset_name": (str,),
    "dataset_config_name": (str,),
    "class_tokens": (str,),
    "weight": (int, float),
    "is_reg": (bool,),
}
_OF_CAPTIONS = (
    *("caption_extension", "shuffle_caption", "keep_tokens", "caption_separator"),
    *("caption_tag_dropout_rate", "caption_column", "class_tokens"),
)
# Keys of a whole run, the option that they set, and their types.
_OF_RUN: dict[str, tuple[str, tuple[type, ...]]] = {
    "resolution": ("resolution", (int, list)),
    "batch_size": ("train_batch_size", (int,)),
    "enable_bucket": ("enable_bucket", (bool,)),
    "bucket_no_upscale": ("bucket_upscale", (bool,)),
    "flip_aug": ("random_flip", (bool,)),
    "random_crop": ("center_crop", (bool,)),
    "validation_split": ("validation_split", (int, float)),
}
_NEGATED = ("bucket_no_upscale", "random_crop")
# Other keys of kohya's scripts, and what there is in their place.
_REMEDIES = {
    "caption_dropout_rate": "give `proportion_empty_prompts`, for all data sets",
    **dict.fromkeys(
        ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"), "give `aspect_ratio_buckets`"
    ),
    "validation_seed": "the images are chosen by `seed`",
}
_RULES = ("shuffle_caption", "keep_tokens", "caption_separator", "caption_tag_dropout_rate")
_LARGEST_RATIO = 1000


@dataclasses.dataclass(frozen=True)
class Subset:
    """A folder or a data set in the file.

    Attributes:
        place: the folder, or the name of a data set as `load_source` takes it.
        num_repeats: how often an epoch shows each of its images.
        weight: share of the draws, relative to the other subsets' weights; None: by the repeats.
        caption_files: where its captions are.
        captions: how they are drawn.
        config_name: the configuration of a data set on the hub.
        is_reg: whether it holds images of the class for DreamBooth's prior preservation.
        caption_keys: the keys that say something of captions.
        masks: where the masks of its images are.
    """

    place: str | Path
    num_repeats: int
    weight: float | None
    caption_files: CaptionFiles
    captions: Captions
    config_name: str | None = None
    is_reg: bool = False
    caption_keys: tuple[str, ...] = ()
    masks: MaskFiles = MaskFiles()

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that a run shares with the run that resumes it."""
        return {"num_repeats": self.num_repeats, "weight": self.weight, **self.captions.identity()}


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The content of a file.

    Attributes:
        subsets: the folders and data sets, in order.
        options: options of the whole run that the file sets: name -> value.
    """

    subsets: tuple[Subset, ...]
    options: dict[str, Any]

    def part(self, is_reg: bool) -> "DatasetConfig":
        """Return the subsets of the class for DreamBooth, or the others."""
        return DatasetConfig(tuple(one for one in self.subsets if one.is_reg == is_reg), self.options)

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that a run shares with the run that resumes it."""
        return {"dataset_config": [subset.identity() for subset in self.subsets]}


def read_dataset_config(path: Path) -> DatasetConfig:
    """Read a file of data sets.

    Raises:
        UserError: the file is missing or no TOML, a key is unknown or refused, or a value does not fit.
    """
    try:
        content = tomllib.loads(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; check its name") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML ({error}); correct it") from error
    _check_keys(path, "the file", content, {"general": (dict,), "datasets": (list,)})
    general = content.get("general", {})
    of_all = _OF_SUBSETS | {key: kinds for key, (_, kinds) in _OF_RUN.items()}
    _check_keys(path, "[general]", general, of_all)
    subsets, of_runs = [], []
    for number, dataset in enumerate(_tables(path, "datasets", content.get("datasets")), start=1):
        where = f"[[datasets]] {number}"
        _check_keys(path, where, dataset, of_all | {"subsets": (list,)})
        of_runs.append(_run_options(path, where, general | dataset))
        for index, subset in enumerate(_tables(path, f"{where}: subsets", dataset.get("subsets")), start=1):
            place = f"{where}, subset {index}"
            _check_keys(path, place, subset, _OF_SUBSETS | _OF_ONE)
            subsets.append(_subset(path, place, general | dataset | subset))
    if any(options != of_runs[0] for options in of_runs):
        keys = sorted({key for options in of_runs for key in options})
        names = [key for key in keys if len({repr(options.get(key)) for options in of_runs}) > 1]
        raise UserError(f"{path}: {', '.join(names)} differs between data sets; give all the same")
    weights = [subset.weight for subset in subsets]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise UserError(f"{path}: some subsets have a weight and others none; give all one, or none")
    return DatasetConfig(tuple(subsets), of_runs[0])


def _tables(path: Path, name: str, value: Any) -> list[dict]:
    if not value or not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{path}: no {name}; write [[datasets]] and in it [[datasets.subsets]]")
    return value


def _check_keys(path: Path, where: str, table: dict, known: dict[str, tuple[type, ...]]) -> None:
    """Raise a UserError for a key that is not honoured there, unless it turns something off, or its value."""
    for key, value in table.items():
        if key in known:
            is_bool = isinstance(value, bool)
            if not isinstance(value, known[key]) or (is_bool and bool not in known[key]):
                kinds = " or ".join(kind.__name__ for kind in known[key])
                raise UserError(f"{path}, {where}: {key} {shown(value)}: not of type {kinds}; correct it")
        elif value or key in _OF_ONE or key in _OF_SUBSETS or key in _OF_RUN:
            is_elsewhere = key in _OF_ONE or key in _OF_SUBSETS or key in _OF_RUN
            if is_elsewhere:
                place = "[general] or [[datasets]]" if key in _OF_RUN else "[[datasets.subsets]]"
                raise UserError(f"{path}, {where}: {key} has no place there; put it into {place}")
            remedy = _REMEDIES.get(key, "remove it")
            alike = [one for one in table if one not in known and table[one] and _REMEDIES.get(one) == remedy]
            names, verb = (", ".join(alike), "are") if len(alike) > 1 else (key, "is")
            raise UserError(f"{path}, {where}: {names} {verb} not supported; {remedy}")


def _run_options(path: Path, where: str, table: dict) -> dict[str, Any]:
    """Return the options of a run that a data set's table sets."""
    options = {}
    for key, (option, _) in _OF_RUN.items():
        if key not in table:
            continue
        value = table[key]
        if isinstance(value, list):
            if len(set(map(repr, value))) != 1 or not isinstance(value[0], int):
                raise UserError(
                    f"{path}, {where}: resolution {shown(value)}: not a square; give one number, and "
                    "enable_bucket for other ratios"
                )
            value = value[0]
        options[option] = not value if key in _NEGATED else value
    return options


# Of the order of an epoch, memory holds an entry for each repeat of each image.
_REPEATS, _WEIGHTS = (1, 1_000_000), (1e-6, 1_000_000)


def _subset(path: Path, where: str, table: dict) -> Subset:
    folder, name = table.get("image_dir"), table.get("dataset_name")
    if bool(folder) == bool(name):
        raise UserError(f"{path}, {where}: give image_dir, a folder, or dataset_name, and not both")
    repeats, weight = table.get("num_repeats", 1), table.get("weight")
    for key, value, (least, most) in (
        ("num_repeats", repeats, _REPEATS),
        ("weight", weight, _WEIGHTS),
    ):
        if value is not None and not least <= value <= most:
            raise UserError(
                f"{path}, {where}: {key} {shown(value)}: out of range; give {least:g} to {most:,}"
            )
    if weight is not None and "num_repeats" in table:
        raise UserError(f"{path}, {where}: num_repeats has no effect beside weight; remove one of them")
    try:
        files = CaptionFiles(
            table.get("caption_extension") if folder else None,
            _caption_lines(folder, path),
            table.get("image_column"),
            table.get("caption_column"),
            table.get("class_tokens"),
        )
        captions = Captions(**{key: table[key] for key in _RULES if key in table})
        masks = _masks(table, path)
    except UserError as error:
        raise UserError(f"{path}, {where}: {error}") from error
    place = _folder(folder, path) if folder else str(name)
    keys = tuple(key for key in _OF_CAPTIONS if table.get(key))
    name, is_reg = table.get("dataset_config_name"), table.get("is_reg", False)
    return Subset(place, repeats, weight, files, captions, name, is_reg, keys, masks)


def _masks(table: dict, path: Path) -> MaskFiles:
    """Return where masks are."""
    folder, alpha = table.get("conditioning_data_dir"), table.get("alpha_mask", False)
    if folder is not None and not folder.strip():
        raise UserError("conditioning_data_dir is empty; give a folder, or leave it out")
    if folder is not None and alpha:
        raise UserError("conditioning_data_dir and alpha_mask are both given; leave one out")
    if folder is None and not alpha and "unmasked_weight" in table:
        raise UserError(
            "unmasked_weight has no effect without alpha_mask or conditioning_data_dir; remove it"
        )
    return MaskFiles(alpha, None if folder is None else _folder(folder, path), table.get("unmasked_weight"))


def _folder(name: str, path: Path) -> Path:
    """Return a folder, as kohya's scripts do, from the current one; or else from that of the file."""
    folder = Path(name).expanduser()
    return folder if folder.exists() else path.parent / folder


def _caption_lines(name: str | None, path: Path) -> str | None:
    """Return "first", as in kohya's scripts, for a folder whose captions are in text files."""
    if not name or any((_folder(name, path) / metadata).is_file() for metadata in (METADATA, TABLE)):
        return None
    return "first"
