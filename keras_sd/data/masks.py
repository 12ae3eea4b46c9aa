"""Masks of training images: which parts of an image count in the loss.

White counts, black does not, and grey counts in part, as in kohya's scripts. A mask is the alpha channel of
its image, or an image of the same name in another folder.
"""

import concurrent.futures
import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from keras_sd.data.catalogue import content_hashes, examine_images
from keras_sd.data.framing import Frame, frame_of
from keras_sd.data.images import Examined, has_transparency, read_frame
from keras_sd.data.listing import list_folder
from keras_sd.errors import UserError

_NAMED = 3  # an error names so many masks
_EXAMINED = 64  # so many masks are looked at before a run begins

OnFault = Callable[[Path, UserError], None]


@dataclasses.dataclass(frozen=True)
class MaskFiles:
    """Where the masks of a folder's images are.

    Attributes:
        alpha_mask: the alpha channel of an image is its mask; images without one count as a whole.
        mask_data_dir: folder of the masks. A mask has the name of its image, with any suffix of an image, in
            the same sub-folder, and the same size in pixels.
        unmasked_weight: weight of black parts, from 0 to 1; None is 0.

    Raises:
        UserError: both are given, or a value is out of range or has no effect.
    """

    alpha_mask: bool = False
    mask_data_dir: Path | None = None
    unmasked_weight: float | None = None

    def __post_init__(self) -> None:
        if self.alpha_mask and self.mask_data_dir is not None:
            raise UserError(
                f"mask_data_dir {self.mask_data_dir}: `alpha_mask=True` is given too; leave one out"
            )
        weight = self.unmasked_weight
        if weight is not None and not 0 <= weight < 1:
            raise UserError(
                f"unmasked_weight {weight:g}: out of range; use 0 to below 1, where masks have no effect"
            )
        if weight is not None and not self:
            raise UserError(
                f"unmasked_weight {weight}: has no effect without `alpha_mask` or `mask_data_dir`"
            )

    def __bool__(self) -> bool:
        return self.alpha_mask or self.mask_data_dir is not None


class Masks:
    """The masks of checked images.

    Args:
        files: where they are.
        folder: the folder of the images.
        names: the images' paths relative to it.
        sizes: the images' upright sizes, or None for one that is faulty.
        on_fault: called with the path and the UserError of each image whose mask is faulty.
        notes: gets a line on images without an alpha channel.

    Raises:
        UserError: the folder of masks is missing, or no image has an alpha channel.
    """

    def __init__(
        self,
        files: MaskFiles,
        folder: Path,
        names: Sequence[str],
        sizes: Sequence[Examined | None],
        on_fault: OnFault,
        notes: list[str],
    ) -> None:
        self._weight = files.unmasked_weight or 0.0
        self._is_alpha, self._has_warned = files.alpha_mask, False
        self._paths: dict[str, Path] = {}
        if files.mask_data_dir is None:
            self._paths = {name: folder / name for name in names}
            self._find_transparency(folder, names, sizes, notes)
            self._check_values(folder, [name for name, size in zip(names, sizes, strict=True) if size])
            return
        if files.mask_data_dir.exists() and files.mask_data_dir.samefile(folder):
            raise UserError(f"{folder}: is the folder of the images; give the folder of their masks")
        found = _masks_in(files.mask_data_dir, on_fault)
        for name, size in zip(names, sizes, strict=True):
            paths = found.get(os.path.splitext(name)[0], [])
            if size is None:
                continue
            if len(paths) == 1:
                self._paths[name] = paths[0]
            else:
                on_fault(folder / name, _not_one(folder, name, files.mask_data_dir, paths))
        sizes_of = {name: size for name, size in zip(names, sizes, strict=True) if size}
        for name, error in self._faults(folder, sizes_of).items():
            del self._paths[name]
            on_fault(folder / name, error)
        self._check_values(files.mask_data_dir, list(self._paths))
        notes.append(f"{files.mask_data_dir}: masks of {len(self._paths)} of {len(names)} images")
        unused = {path for paths in found.values() for path in paths} - set(self._paths.values())
        if unused:
            first = str(min(unused).relative_to(files.mask_data_dir))
            notes.append(
                f"{files.mask_data_dir}: {len(unused)} masks are of no image that is used, the first is "
                f"{first!r}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def _faults(self, folder: Path, sizes: dict[str, Examined]) -> dict[str, UserError]:
        """Return the fault of each image whose mask cannot be read or has another size."""
        damaged: dict[Path, UserError] = {}
        paths = sorted(set(self._paths.values()))  # two images may share one
        found = dict(zip(paths, examine_images(paths, damaged.__setitem__), strict=True))
        faults = {}
        for name, path in self._paths.items():
            mask, image = found[path], sizes[name]
            if mask is None:
                faults[name] = damaged[path]
            elif mask[:2] != image[:2]:
                faults[name] = UserError(
                    f"{path}: mask of {mask.width} x {mask.height} pixels, but {folder / name} has "
                    f"{image.width} x {image.height}; make both the same size"
                )
        return faults

    def _check_values(self, folder: Path, names: Sequence[str]) -> None:
        """Raise a UserError if all masks, of many the first ones at equal distances, count nothing."""
        names = [names[index] for index in np.arange(0, len(names), -(-len(names) // _EXAMINED) or 1)]
        if not names or self._weight:
            return
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            largest = max(pool.map(self._largest_value, names))
        if largest > 1:
            return
        what = "opaque" if self._is_alpha else "white"
        fault = "all masks are black" if not largest else "masks have no value above 1 of 255"
        if self._is_alpha:
            fault = "all images are transparent"
        raise UserError(f"{folder}: {fault}, so nothing would be learned; make {what} what is to be learned")

    def _largest_value(self, name: str) -> int:
        path = self._paths[name]
        found = examine_images([path], lambda path, error: None)[0]
        if found is None:  # a fault that is told elsewhere
            return 0
        frame = frame_of(found[:2], found[:2], "box")
        return int(read_frame(path, frame, of=self._kind).max())

    @property
    def _kind(self) -> str:
        return "alpha" if self._is_alpha else "brightness"

    def _find_transparency(self, folder, names, sizes, notes):
        sound = [name for name, size in zip(names, sizes, strict=True) if size]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            found = list(pool.map(lambda name: has_transparency(folder / name), sound))
        if sound and not any(found):
            raise UserError(f"alpha_mask: no image in {folder} has an alpha channel; leave it out")
        if not all(found):
            first = sound[found.index(False)]
            notes.append(
                f"{folder}: {found.count(False)} of {len(found)} images have no alpha channel and count as a "
                f"whole, the first is {first!r}"
            )
        notes.append(f"{folder}: the alpha channel of {found.count(True)} images is their mask")

    def read(self, name: str, frame: Frame) -> npt.NDArray[np.uint8]:
        """Return what a frame takes of the mask of an image, uint8 (height, width), of 255 the weight.

        Raises:
            UserError: the file is missing or damaged, or was replaced by one of another size.
        """
        frame = dataclasses.replace(frame, interpolation="box")
        mask = read_frame(self._paths[name], frame, of=self._kind)
        if not mask.any() and not self._weight and not self._has_warned:
            self._has_warned = True
            fault, remedy = ("transparent", "opaque") if self._is_alpha else ("black", "white")
            warnings.warn(
                f"{self._paths[name]}: is {fault} where it is cropped, so nothing is learned from this "
                f"image, and perhaps from others; make {remedy} what is to be learned",
                stacklevel=2,
            )
        return np.maximum(mask, np.uint8(round(255 * self._weight)))

    def keys(self, names: Sequence[str]) -> list[str]:
        """Return a text for each image that names its mask's content."""
        kind = f"{self._kind} from {round(255 * self._weight)}"
        return [f"{kind} of {found}" for found in content_hashes([self._paths[name] for name in names])]

    def described(self, name: str) -> list[object]:
        """Return JSON values that name a mask as a source's fingerprint names images."""
        values: list[object] = ["mask", self._is_alpha, self._weight]
        if not self._is_alpha:
            state = os.stat(self._paths[name])
            values += [state.st_size, state.st_mtime_ns]
        return values


def _masks_in(folder: Path, on_fault: OnFault) -> dict[str, list[Path]]:
    """Return the images of a folder of masks by their relative paths without suffixes."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of masks; correct its name")
    found: dict[str, list[Path]] = {}
    try:
        names = list_folder(folder, on_fault).images
    except UserError as error:
        raise UserError(f"masks: {error}") from error
    for name in names:
        found.setdefault(os.path.splitext(name)[0], []).append(folder / name)
    return found


def _not_one(images: Path, name: str, folder: Path, masks: list[Path]) -> UserError:
    """Return the error for an image that has no mask, or several."""
    path = images / name
    if not masks:
        return UserError(f"{path}: has no mask; add {folder / os.path.splitext(name)[0]}.png")
    named = ", ".join(one.name for one in masks[:_NAMED])
    return UserError(f"{path}: has {len(masks)} masks in {folder} ({named}); remove the others")


def read_mask(source: object, index: int, frame: Frame) -> npt.NDArray[np.uint8]:
    """Return what a frame takes of a mask, uint8 (height, width); white for a source without masks."""
    if getattr(source, "has_masks", False):
        return source.read_mask(index, frame)
    return np.full(frame.size, 255, np.uint8)


def mask_keys(source: object) -> list[str]:
    """Return a text that names the content of each mask of a source, with or without masks."""
    if getattr(source, "has_masks", False):
        return source.mask_keys()
    return ["white"] * len(source)
