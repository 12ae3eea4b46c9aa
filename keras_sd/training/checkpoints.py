"""Training checkpoints that survive a kill at any moment.

A checkpoint is a folder `checkpoint-N` (N is the step) with one safetensors file per group of tensors,
`config.json`, `position.json` and `manifest.json`. It is written under a hidden name, and renamed when it is
complete and on disk. The manifest holds the size and the SHA-256 of every file and a digest of itself, so
later damage is detected. Where several processes hold tensors in slices, all of them write the checkpoint
(`training.slices`), on a file system that they share.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import ml_dtypes  # noqa: F401  (registers bfloat16 in NumPy, for safetensors)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from typing_extensions import TypedDict

from keras_sd.errors import FULL_DISK, UserError
from keras_sd.files.json_files import MIB, parse_json, read_bytes, read_json, shape_fault, shown
from keras_sd.files.writing import sync
from keras_sd.training import slices
from keras_sd.training.run_folder import children
from keras_sd.training.slices import Sliced, SlicedTensor

FORMAT_VERSION = 1
SLICED_VERSION = 2
"""The version of a checkpoint with slices, which earlier versions of this package cannot read."""
MANIFEST = "manifest.json"
CONFIG = "config.json"
POSITION = "position.json"
_LARGEST_FILE = 64 * MIB
_ANOTHER = "give another folder or 'latest'"
_VISIBLE_WITHIN = 30.0  # seconds after which a file of another process is there, on a shared file system


class _File(TypedDict):
    size: int
    sha256: str


class Manifest(TypedDict):
    """The schema of `manifest.json`: the files, each group's tensors in order, and those in slices."""

    version: int
    step: int
    files: dict[str, _File]
    tensors: dict[str, list[str]]
    slices: NotRequired[dict[str, dict[str, SlicedTensor]]]


@dataclass(frozen=True)
class TrainingState:
    """A loaded checkpoint: the step, arrays by group and name, the position in the data, the config."""

    step: int
    groups: dict[str, dict[str, np.ndarray]]
    position: dict
    config: dict


class InvalidCheckpoint(Exception):
    """The reason why a folder is not a complete checkpoint; used inside this module only."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_folder: holds the `checkpoint-N` folders; created at the first save.
        config: JSON values that identify the run; `resolve` rejects a checkpoint with another config.
        total_limit: number of checkpoints to keep, or None for all.
        may_change: names in the config whose values may differ.
    """

    def __init__(
        self, run_folder, config: dict, total_limit: int | None = None, may_change: Collection[str] = ()
    ):
        if total_limit is not None and total_limit < 1:
            raise UserError(f"checkpoints total limit {total_limit}: fewer than one; give 1 or more")
        self.run_folder = Path(run_folder)
        self.total_limit = total_limit
        self.may_change = may_change
        self._config_text = _json_text(config, sort_keys=True)
        self._resumed = None  # (step, folder) of the resumed checkpoint, until the first save

    def save(self, step: int, groups: Mapping[str, Mapping[str, np.ndarray]], position: dict) -> Path:
        """Write `checkpoint-{step}` atomically, then remove the oldest checkpoints beyond the limit.

        Args:
            step: number of steps taken.
            groups: file name (`weights`, `ema`, ...) → tensor name → array of any shape; bool, integer,
                float16, float32, float64 or bfloat16. Order is kept. Where there are `slices.Sliced` among
                them, all processes have to call this; otherwise only one may.
            position: JSON values from which the data pipeline resumes.

        Returns:
            The folder.

        Raises:
            UserError: no space is left or the folder is not writable. Older checkpoints stay unchanged.

        The first save after `resolve` renames checkpoints that are newer than the resumed one, so that
        `latest` does not return a checkpoint of the abandoned branch. They are not deleted.
        """
        target = self.run_folder / f"checkpoint-{step}"
        if slices.is_sliced(groups):
            self._save_together(target, step, groups, position)
            return target
        staging = self._staging(target)
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            self._recover()
            self._remove_leftovers()
            try:
                self._write(staging, target, step, groups, position)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                self._recover()
                raise
        except OSError as error:
            raise UserError(f"{disk_fault(target, error)}; {self._kept()}") from error
        self._resumed = None
        self._rotate(step)
        return target

    def _staging(self, target: Path) -> Path:
        return self.run_folder / f".{target.name}.staging-{os.getpid()}"

    def check_shared(self) -> None:
        """Raise UserError unless all processes, which have to call this, see what process 0 writes."""
        with self._shared_staging(self.run_folder / "checkpoint-0") as (_, round_of):
            round_of(lambda: None)

    def _save_together(self, target: Path, step: int, groups, position: dict) -> None:
        """Save with the other processes, in rounds that fail in all of them or in none."""
        from keras_sd import backend

        process, processes = backend.process_index(), backend.process_count()
        with self._shared_staging(target) as (staging, round_of):
            parts = round_of(lambda: self._write_part(staging, groups, process, processes))
            state = staging, target, step, groups, position, parts
            round_of(lambda: None if process else self._complete(*state))
        self._resumed = None

    @contextlib.contextmanager
    def _shared_staging(self, target: Path):
        """Yield the folder into which all processes write, and a function for what they do together.

        `round_of(function)` calls a function, returns what it returned in all processes, and raises UserError
        in all of them if it did in one.
        """
        from keras_sd import backend

        def round_of(function):
            try:
                own = {"result": function()}
            except (OSError, UserError) as error:
                fault = disk_fault(target, error) if isinstance(error, OSError) else str(error)
                own = {"fault": fault}
            told = list(map(json.loads, backend.exchanged_texts(json.dumps(own))))
            faults = [one["fault"] for one in told if "fault" in one]
            if faults:
                raise UserError(f"{faults[0]}; {self._kept()}")
            return [one["result"] for one in told]

        process = backend.process_index()
        own = self._staging(target)
        try:
            staging = self.run_folder / round_of(lambda: None if process else self._begin(own))[0]
            words = f"{self.run_folder}: process {process} does not see what process 0 wrote"
            round_of(lambda: _wait_until(staging.is_dir, words))
            yield staging, round_of
        finally:
            if not process:
                shutil.rmtree(own, ignore_errors=True)
                self._recover()

    def _kept(self) -> str:
        last = self.last_good()
        return f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"

    def _begin(self, staging: Path) -> str:
        """Make the folder into which all processes write; return its name."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self._recover()
        self._remove_leftovers()
        staging.mkdir()
        return staging.name

    def _write_part(self, staging: Path, groups, process: int, processes: int) -> dict:
        """Write this process' slices, and in process 0 what is whole; return what the manifest says of it."""
        files: dict[str, _File] = {}
        entries = {}
        for group, tensors in groups.items():
            sliced = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Sliced)}
            file = slices.file_of(group, process, processes)
            arrays, entries[group] = slices.listed(sliced, file)
            written = {file: arrays}
            if process == 0:
                whole = {name: tensor for name, tensor in tensors.items() if name not in sliced}
                written[_group_file(staging, group).name] = whole
            for name, content in written.items():
                (staging / name).touch()
                mode = (staging / name).stat().st_mode  # safetensors makes it readable for its owner only
                _write_group(staging / name, content)
                (staging / name).chmod(mode)
                sync(staging / name)
                files[name] = _described(staging / name)
        return {"files": files, "slices": entries}

    def _complete(self, staging: Path, target: Path, step: int, groups, position: dict, parts) -> None:
        """Write the manifest when all parts are there, and publish the checkpoint."""
        files: dict[str, _File] = {}
        for process, part in enumerate(parts):
            for name, described in part["files"].items():
                _wait_until(
                    lambda file=staging / name, size=described["size"]: (
                        file.is_file() and file.stat().st_size == size
                    ),
                    f"{self.run_folder}: process 0 does not see {name}, which process {process} wrote",
                )
                files[name] = described
        for name, text in ((CONFIG, self._config_text), (POSITION, _json_text(position))):
            (staging / name).write_text(text, encoding="utf-8")
            sync(staging / name)
            files[name] = _described(staging / name)
        manifest: Manifest = {
            "version": SLICED_VERSION,
            "step": step,
            "files": files,
            "tensors": {group: list(tensors) for group, tensors in groups.items()},
            "slices": slices.joined(part["slices"] for part in parts),
        }
        self._finish(staging, target, manifest)
        self._rotate(step)

    def last_good(self) -> Path | None:
        """Return this run's newest complete checkpoint; before its first save, the one it resumed from."""
        return self._resumed[1] if self._resumed else self.latest()

    def latest(self) -> Path | None:
        """Return the folder of the newest complete checkpoint; warn of each damaged newer one."""
        self._recover()
        for step, folder in reversed(self._folders()):
            try:
                if _verify(folder)["step"] != step:
                    raise InvalidCheckpoint("its manifest is of another step")
                return folder
            except InvalidCheckpoint as fault:
                warnings.warn(f"{folder}: skipped, not a valid checkpoint: {fault}", stacklevel=2)
        return None

    def load(self, path) -> TrainingState:
        """Read a checkpoint after verifying it.

        Raises:
            UserError: a file is missing, damaged or of an unsupported version.
        """
        folder = Path(path)
        manifest = _checked(_verify, folder)
        groups = {}
        for group, names in manifest["tensors"].items():
            tensors = _load_group(folder, group, manifest.get("slices", {}).get(group, {}))
            groups[group] = {name: tensors[name] for name in names}
        position, config = (read_json(folder / name, largest=_LARGEST_FILE) for name in (POSITION, CONFIG))
        return TrainingState(manifest["step"], groups, position, config)

    def check(self, path: Path) -> None:
        """Verify a checkpoint.

        Raises:
            UserError: a file is missing, damaged or of an unsupported version.
        """
        _checked(_verify, path)

    def resume_after(self, step: int, folder: Path) -> None:
        """Have the first save set aside what is newer than the step of a checkpoint that is resumed."""
        self._resumed = step, folder

    def resolve(self, request: str) -> Path:
        """Return the verified folder that `resume_from_checkpoint` means; it must have this run's config.

        Args:
            request: "latest", the path of a checkpoint, or its name in the run folder.

        Raises:
            UserError: there is no such valid checkpoint, or it belongs to another config.
        """
        if request == "latest":
            folder = self.latest()
            if folder is None:
                raise UserError(
                    f"{self.run_folder}: no valid checkpoint to resume from; "
                    "check the output folder or start without resuming"
                )
        else:
            folder = Path(request)
            if not folder.is_dir():
                folder = self.run_folder / request
            if not folder.is_dir():
                raise UserError(f"{request}: no such checkpoint folder; give its path or 'latest'")
            _checked(_verify, folder)
        self._check_config(folder)
        self._resumed = _read_manifest(folder)["step"], folder
        return folder

    def _check_config(self, folder: Path) -> None:
        there, here = read_json(folder / CONFIG, largest=_LARGEST_FILE), json.loads(self._config_text)
        for name, value in UNNAMED.items():
            if name in there or name in here:
                there.setdefault(name, value), here.setdefault(name, value)
        sides = [{"optimizer": side.get("optimizer", UNNAMED["optimizer"])} for side in (there, here)]
        if sides[0] != sides[1]:  # before its options, which differ too
            raise UserError(_another_run(folder, *sides))
        for name in self.may_change:
            there.pop(name, None), here.pop(name, None)
        unknown = here.keys() - there.keys()
        if unknown:  # not stored by earlier versions
            known = ", ".join(map(_words, sorted(unknown)))
            warnings.warn(f"{folder}: cannot be compared with this run in: {known}", stacklevel=2)
            here = {name: value for name, value in here.items() if name in there}
        if there != here:
            raise UserError(_another_run(folder, there, here))

    def _write(self, staging: Path, target: Path, step: int, groups, position: dict) -> None:
        staging.mkdir()
        (staging / CONFIG).write_text(self._config_text, encoding="utf-8")
        (staging / POSITION).write_text(_json_text(position), encoding="utf-8")
        for group, tensors in groups.items():
            _write_group(_group_file(staging, group), tensors)
            # safetensors makes its files readable only for their owner.
            shutil.copymode(staging / CONFIG, _group_file(staging, group))
        files = sorted(staging.iterdir())
        for file in files:
            sync(file)
        manifest: Manifest = {
            "version": FORMAT_VERSION,
            "step": step,
            "files": {file.name: _described(file) for file in files},
            # safetensors sorts the tensors of a file; the order is stored here.
            "tensors": {group: list(tensors) for group, tensors in groups.items()},
        }
        self._finish(staging, target, manifest)

    def _finish(self, staging: Path, target: Path, manifest: Manifest) -> None:
        """Write the manifest, and give the folder its name."""
        (staging / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8")
        sync(staging / MANIFEST)
        sync(staging)
        self._set_aside(staging, target)
        self._publish(staging, target)

    def _set_aside(self, staging: Path, target: Path) -> None:
        """Rename newer checkpoints of an abandoned branch, and a foreign folder with the new one's name."""
        for step, folder in self._folders():
            if folder == target and not (folder / MANIFEST).is_file():
                why = "is no checkpoint"
            elif self._resumed is None or step <= self._resumed[0] or not _is_valid(folder):
                continue  # damaged ones are skipped and replaced anyway
            elif folder == target and _same_checkpoint(staging, target):
                continue
            else:
                why = f"is newer than what was resumed, {self._resumed[1].name}"
            names = itertools.chain([""], (f"-{count}" for count in itertools.count(2)))
            places = (folder.with_name(f"abandoned-{folder.name}{ending}") for ending in names)
            kept = next(place for place in places if not os.path.lexists(place))
            folder.rename(kept)
            warnings.warn(f"{folder}: {why}; set aside as {kept.name}", stacklevel=2)

    def _publish(self, staging: Path, target: Path) -> None:
        """Rename the complete folder to its final name; replace an existing one unless it is identical."""
        replaced = None
        if target.exists():
            if _same_checkpoint(staging, target):
                shutil.rmtree(staging)
                return
            # A folder cannot be renamed onto another one. Between the two renames the old one has a name that
            # `_recover` restores.
            replaced = self.run_folder / f".{target.name}.replaced"
            target.rename(replaced)
        staging.rename(target)
        sync(self.run_folder)
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)

    def _rotate(self, written: int) -> None:
        # A folder without a manifest is not a checkpoint of ours.
        folders = [(step, folder) for step, folder in self._folders() if (folder / MANIFEST).is_file()]
        if self.total_limit is None or len(folders) <= self.total_limit:
            return
        keep = {written}
        # There are newer checkpoints if an older one was resumed by name. Keep the newest valid one, too.
        for step, folder in reversed(folders):
            if step == written or _is_valid(folder):
                keep.add(step)
                break
        surplus = len(folders) - self.total_limit
        for _, folder in [(step, folder) for step, folder in folders if step not in keep][:surplus]:
            hidden = self.run_folder / f".{folder.name}.removed"
            folder.rename(hidden)  # so that a half-removed folder does not look like a checkpoint
            shutil.rmtree(hidden, ignore_errors=True)

    def _folders(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of all checkpoints, the oldest first."""
        found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in children(self.run_folder)]
        return sorted((int(name[1]), path) for name, path in found if name)

    def _recover(self) -> None:
        for path in children(self.run_folder):
            name = re.fullmatch(r"\.(checkpoint-\d+)\.replaced", path.name)
            if name and not (self.run_folder / name[1]).exists():
                path.rename(self.run_folder / name[1])

    def _remove_leftovers(self) -> None:
        for path in children(self.run_folder):
            if re.fullmatch(r"\.checkpoint-\d+\.(staging-\d+|replaced|removed)", path.name):
                shutil.rmtree(path, ignore_errors=True)


def disk_fault(thing, error: OSError) -> str:
    """Return the message for a failed write: the thing, the fault and the remedy."""
    remedy = "free some space" if error.errno in FULL_DISK else "make the folder writable"
    return f"{thing}: cannot be saved: {error.strerror}; {remedy} or choose another folder"


def _write_group(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    # The library ignores the strides of an array, so make every array contiguous.
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        save_file(arrays, path, metadata={"format": "np"})
    except SafetensorError as error:
        # The library gives the operating system's error number in its text only.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _verify(folder: Path) -> dict:
    """Read the manifest and check every file against it; raises InvalidCheckpoint."""
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        file = folder / name
        try:
            if not file.is_file():
                raise InvalidCheckpoint(f"{name} is missing")
            size = file.stat().st_size
            if size != expected["size"]:
                raise InvalidCheckpoint(f"{name} has {size} bytes instead of {expected['size']}")
            if _sha256(file) != expected["sha256"]:
                raise InvalidCheckpoint(f"{name} is damaged (its SHA-256 differs)")
        except FileNotFoundError:
            raise InvalidCheckpoint(f"{name} is missing") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            fault = getattr(error, "strerror", None) or error
            raise InvalidCheckpoint(f"{name} cannot be read ({fault})") from None
    try:
        for name in (POSITION, CONFIG):
            read_json(folder / name, largest=_LARGEST_FILE)
        for group, names in manifest["tensors"].items():
            with safe_open(_group_file(folder, group), framework="np") as file:
                there = set(file.keys()) | manifest.get("slices", {}).get(group, {}).keys()
            if there != set(names):
                raise InvalidCheckpoint(f"{group} holds other tensors than {MANIFEST} says")
    except (UserError, SafetensorError, OSError) as error:  # the file was written like this
        raise InvalidCheckpoint(str(error)) from None
    return manifest


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    try:
        text = read_bytes(path, _LARGEST_FILE)
        manifest = parse_json(text, MANIFEST)
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{MANIFEST} is missing") from None
    except UserError as error:
        raise InvalidCheckpoint(f"{MANIFEST} is damaged ({error})") from None
    version = manifest.get("version")
    if version not in (FORMAT_VERSION, SLICED_VERSION):
        known = f"{FORMAT_VERSION} and {SLICED_VERSION}"
        raise InvalidCheckpoint(f"format version {shown(version)} is not supported, only {known}")
    digest = manifest.pop("digest", None)
    # Compared as text, so that no damage goes unnoticed.
    if digest is None or text != _manifest_text(manifest).encode():
        raise InvalidCheckpoint(f"{MANIFEST} is damaged (its digest differs)")
    fault = shape_fault(manifest, Manifest)
    if fault:
        raise InvalidCheckpoint(f"{MANIFEST} is damaged ({fault})")
    sliced = [entry for group in manifest.get("slices", {}).values() for entry in group.values()]
    unlisted = {one["file"] for entry in sliced for one in entry["slices"]} - manifest["files"].keys()
    if unlisted:
        raise InvalidCheckpoint(f"{MANIFEST} is damaged (it does not list {shown(min(unlisted))})")
    outside = [name for name in (*manifest["files"], *manifest["tensors"]) if Path(name).name != name]
    if outside:
        raise InvalidCheckpoint(f"{MANIFEST} names {shown(outside[0])}, which is not in its folder")
    return manifest


def _load_group(folder: Path, group: str, sliced: Mapping[str, SlicedTensor]) -> dict[str, np.ndarray]:
    try:
        return load_file(_group_file(folder, group)) | slices.read(folder, sliced)
    # TypeError for types unknown to NumPy
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        fault = shown(str(error))
        raise UserError(f"{_group_file(folder, group)}: cannot be read ({fault}); {_ANOTHER}") from error


def check_manifest(folder) -> None:
    """Raise a UserError if a folder has no valid manifest; its other files are not checked."""
    _checked(_read_manifest, Path(folder))


def steps_and_examples(folder) -> tuple[int, int]:
    """Return the step of a checkpoint and how many examples the run had seen.

    Raises:
        UserError: the folder has no valid manifest.
    """
    folder = Path(folder)
    manifest = _checked(_read_manifest, folder)
    config, position = (read_json(folder / name, largest=_LARGEST_FILE) for name in (CONFIG, POSITION))
    # Earlier versions stored only the number of batches.
    return manifest["step"], position.get("examples", position["batch"] * config.get("train_batch_size", 1))


def groups_of(folder) -> set[str]:
    """Return the names of a checkpoint's groups of tensors.

    Raises:
        UserError: the folder has no valid manifest.
    """
    return set(_checked(_read_manifest, Path(folder))["tensors"])


def _checked(check: Callable[[Path], dict], folder: Path) -> dict:
    """Return the manifest that `_verify` or `_read_manifest` returns, or raise a UserError."""
    try:
        return check(folder)
    except InvalidCheckpoint as fault:
        raise UserError(f"{folder}: not a valid checkpoint: {fault}; {_ANOTHER}") from None


def check_same_run(folder, values: Mapping) -> None:
    """Raise a UserError if one of these values differs from a checkpoint's config.

    Names that the config lacks are ignored; `Checkpoints.resolve` compares everything.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG, largest=_LARGEST_FILE)
    except UserError:
        return  # damaged; `Checkpoints` raises the error
    config = UNNAMED | config
    for name, value in json.loads(_json_text(values)).items():
        if config.get(name, value) != value:
            raise UserError(_another_run(folder, {name: config[name]}, {name: value}))


def _another_run(folder: Path, there: dict, here: dict) -> str:
    options = folder.parent / "options.toml"
    which = f", those in {options}," if options.is_file() else ""
    remedy = f"resume with the same options{which} or choose another `output_dir`"
    return f"{folder}: {_difference(there, here)}; {remedy}"


def _is_valid(folder: Path) -> bool:
    try:
        _verify(folder)
        return True
    except InvalidCheckpoint:
        return False


def _same_checkpoint(staging: Path, target: Path) -> bool:
    return _is_valid(target) and (staging / MANIFEST).read_bytes() == (target / MANIFEST).read_bytes()


# What a run has whose config does not name it: the usual value, which is left out.
UNNAMED: dict[str, int | float | str | bool | dict | None] = {
    "optimizer": "adamw",
    "clip_skip": 1,
    "max_token_length": 75,
    "cache_dtype": "float32",
    "shuffle_caption": False,
    "keep_tokens": 0,
    "caption_separator": ",",
    "caption_tag_dropout_rate": 0.0,
    "debiased_estimation": False,
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "multires_noise_iterations": 0,
    "multires_noise_discount": None,
    "timestep_sampling": "uniform",
    "log_sigma_mean": None,
    "log_sigma_std": None,
    "alignment_weight": 0.0,
    "perceptual_weight": 0.0,
    "adversarial_weight": 0.0,
    "adversarial_start": 0,
    "discriminator_width": 64,
    "discriminator_depth": 3,
    "train_text_encoder": False,
    "adapter": "lora",
    "conv_rank": None,
    "conv_alpha": None,
    "lokr_factor": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_by_block": {},
    "alpha_by_block": {},
    "lora_weights": None,
}

# The user's words for the keys of a run's config.
_WORDS = {
    "method": "training method",
    "model": "config of the network",
    "text_model": "config of the text encoder",
    "image_model": "config of the image encoder",
    "schedule": "noise schedule",
    "low_res_schedule": "noise schedule of the small image",
    "data": "images, masks or captions, or another part of them held out (names, sizes and times of change "
    "count)",
    "repeats": "repeats of the images",
    "class_images": "number of images of the class",
    "crop": "crop_size",
    "random_crop": "crop_size",
    "flip": "random_flip",
    "min_snr_gamma": "snr_gamma",
    "caption_dropout": "proportion_empty_prompts",
    "tokens": "placeholder_token and num_vectors",
    "frozen": "frozen weights",
    "unet": "weights of the UNet",
    "vae": "weights of the VAE",
    "text_encoder": "weights of the text encoder",
    "image_encoder": "weights of the alignment's image encoder",
}
_HASHES = {"frozen", "unet", "vae", "text_encoder", "image_encoder", "data", "repeats"}


def _words(key: str) -> str:
    """Return the user's words for a key of the config."""
    name, _, rest = key.partition(".")
    if name == "framing":  # its values have the names of arguments
        return rest or "size and crop of the images"
    words = _WORDS.get(name, name)
    return f"{words} ({rest})" if rest else words


def _difference(there: dict, here: dict) -> str:
    """Return the first difference between two configs, for a message."""
    key, *values = _first_difference(there, here)
    if key.partition(".")[0] in _HASHES:
        remedy = ""
        if "weights" in _words(key):
            remedy = " (of another base model, VAE or encoder, or of blocks with a learning rate of 0?)"
        return f"made with other {_words(key)}{remedy}"
    return "made with another {} ({} there and {} here)".format(_words(key), *values)


def _first_difference(there: dict, here: dict, prefix: str = "") -> tuple[str, str, str]:
    """Return the dotted name of the first key that differs, and both values as JSON."""
    absent = object()
    sides = there, here
    key = min(k for k in there.keys() | here.keys() if there.get(k, absent) != here.get(k, absent))
    if all(isinstance(side.get(key), dict) for side in sides):
        return _first_difference(there[key], here[key], f"{prefix}{key}.")
    return f"{prefix}{key}", *(json.dumps(side[key]) if key in side else "absent" for side in sides)


def _manifest_text(manifest: dict) -> str:
    digest = hashlib.sha256(_json_text(manifest).encode()).hexdigest()
    return _json_text({**manifest, "digest": digest})


def _json_text(value, **options) -> str:
    return json.dumps(value, indent=1, **options) + "\n"


def _group_file(folder: Path, group: str) -> Path:
    return folder / f"{group}.safetensors"


def _wait_until(is_there: Callable[[], bool], fault: str) -> None:
    """Wait for what another process has written; some shared file systems show it seconds later."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not is_there():
        if time.monotonic() > deadline:
            raise UserError(f"{fault}; choose an `output_dir` on a file system that all processes share")
        time.sleep(0.1)


def _described(path: Path) -> _File:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
