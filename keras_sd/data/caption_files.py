"""Reads the captions of a folder of images: `metadata.jsonl`, `metadata.csv`, or a text file per image."""

import collections
import csv
import dataclasses
import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from keras_sd.data.faults import warn_once
from keras_sd.data.listing import Listing, inside
from keras_sd.errors import UserError
from keras_sd.files import json_files
from keras_sd.files.json_files import shown

METADATA = "metadata.jsonl"
TABLE = "metadata.csv"
EXTENSIONS = (".txt", ".caption")
"""Suffixes of caption files, the first one first."""

Fault = Callable[[UserError], None]
_REPEATED = re.compile(r"(\d{1,6})_(.*)", re.DOTALL)
_YEARS = range(1900, 2101)
# Opening a pipe must not wait for its other end, and Windows must not change line ends.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_SMALL = 65536  # bytes of a caption file that are read at once


@dataclasses.dataclass(frozen=True)
class CaptionFiles:
    """Where the captions of a folder are.

    Attributes:
        caption_extension: suffix of the text files, with or without its dot. By default `.txt`, and
            `.caption` for images without one.
        caption_lines: "each": each line of a text file is a caption; "first": the first line is the caption.
            None is "each" with a note where it matters, as kohya's scripts read the first line.
        image_column, caption_column: keys in `metadata.jsonl`, or columns in `metadata.csv`; by default
            `file_name` and `text`.
        class_tokens: the caption of images without a caption file, in place of the words of their folder.

    Raises:
        UserError: a value is unknown or empty.
    """

    caption_extension: str | None = None
    caption_lines: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    class_tokens: str | None = None

    def __post_init__(self) -> None:
        extension = self.caption_extension
        if extension is not None and not re.fullmatch(r"\.?[^./\\\0]+", extension):
            raise UserError(f"caption_extension {shown(extension)}: not a suffix; give one such as .caption")
        if self.caption_lines not in (None, "each", "first"):
            raise UserError(f"caption_lines {shown(self.caption_lines)}: unknown; use each or first")

    @property
    def extensions(self) -> tuple[str, ...]:
        """The suffixes to look for, with their dots."""
        if self.caption_extension is None:
            return EXTENSIONS
        return ("." + self.caption_extension.removeprefix("."),)


def repeats_of(name: str) -> tuple[int, str] | None:
    """Return repeats and words of an image's relative path in a folder `10_words`, as kohya's scripts do.

    A year, as in `2019_italy`, is no number of repeats.

    Raises:
        UserError: the number is 0, so that the folder would not be seen.
    """
    first, separator, _ = name.partition(os.sep)
    match = _REPEATED.fullmatch(first) if separator else None
    if match is None or (len(match[1]) == 4 and int(match[1]) in _YEARS):
        return None
    if not int(match[1]):
        raise UserError(f"{first}: 0 repeats, so no image is shown; rename the folder, or take it away")
    return int(match[1]), match[2].replace("_", " ").strip()


def read_captions(
    listing: Listing, files: CaptionFiles, on_fault: Fault, notes: list[str]
) -> dict[str, tuple[str, ...]]:
    """Return the captions of each image that has some, by its relative path.

    Args:
        listing: the files of the folder.
        files: where the captions are.
        on_fault: called with the UserError of each faulty line, file or image.
        notes: what the user should know of is appended.

    Raises:
        UserError: there are no captions at all, or no such column.
    """
    names = set(os.listdir(listing.folder))
    has_texts = any(_any_ends(listing.others, ending) for ending in files.extensions)
    if METADATA in names:
        metadata = METADATA
    elif TABLE in names and (not has_texts or files.image_column or files.caption_column):
        metadata = TABLE
    else:
        if TABLE in names:
            notes.append(
                f"{listing.folder}: captions are of the text files, not of {TABLE}; name its "
                "`caption_column` to read it"
            )
        if files.image_column or files.caption_column:
            name = "image_column" if files.image_column else "caption_column"
            raise UserError(f"{name}: has no effect on a folder without {METADATA} or {TABLE}; leave it out")
        return _text_captions(listing, files, on_fault, notes)
    for name in ("caption_extension", "caption_lines", "class_tokens"):
        if getattr(files, name) is not None:
            raise UserError(f"{name}: has no effect beside {listing.folder / metadata}; leave one out")
    if {METADATA, TABLE} <= names:
        notes.append(f"{listing.folder}: captions are of {METADATA}, not of {TABLE}")
    return _metadata_captions(listing, metadata, files, on_fault)


def _metadata_captions(
    listing: Listing, name: str, files: CaptionFiles, on_fault: Fault
) -> dict[str, tuple[str, ...]]:
    path = listing.folder / name
    columns = files.image_column or "file_name", files.caption_column or "text"
    entries = _json_entries if name == METADATA else _table_entries
    images = set(listing.images)
    captions: dict[str, tuple[str, ...]] = {}
    is_empty, is_sound = True, True
    for place, entry in entries(path, columns):
        is_empty = False
        try:
            if isinstance(entry, UserError):
                raise entry
            image_name, texts = entry
            image = _image_of(listing, images, image_name)
            if image is None:
                raise UserError(
                    f"{place}: no image {shown(image_name)} in the folder; add the image or remove the line"
                )
            if image in captions:
                raise UserError(
                    f"{place}: second caption for {shown(image_name)}; keep one line for each image"
                )
            captions[image] = texts
        except UserError as error:
            is_sound = False
            on_fault(error)
    if is_empty:
        raise UserError(f"{path}: empty; write a caption into it")
    missing = [image for image in listing.images if image not in captions]
    if missing and is_sound:
        # The captioner skips images that it cannot read; such a folder is still a valid data set.
        warn_once(
            f"{path}: {len(captions)} captions for {len(listing.images)} images; {len(missing)} are left "
            f"out, the first is {missing[0]!r}"
        )
    return captions


def _image_of(listing: Listing, images: set[str], name: str) -> str | None:
    """Return the relative path of the image that a name in the metadata means; None if there is none."""
    plain = os.path.normpath(name)
    if plain in images:
        return plain
    place = inside(listing.folder / name, listing.folder, name).resolve()
    return _by_place(str(listing.folder), tuple(listing.images)).get(place)


@functools.lru_cache(maxsize=1)
def _by_place(folder: str, images: tuple[str, ...]) -> dict[Path, str]:
    return {Path(folder, image).resolve(): image for image in images}


def _json_entries(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, object]]:
    """Yield the place of each line, and its image and captions, or the UserError that tells its fault."""
    remedy = f'write {{"{columns[0]}": "image.png", "{columns[1]}": "a caption"}}'
    for number, line in enumerate(json_files.read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json_files.parse_json(line, place, dict, remedy=remedy, file_names=True, unique=True)
            yield place, _entry(entry, columns, place, remedy)
        except UserError as error:
            yield place, error


def _table_entries(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, object]]:
    """Yield as `_json_entries` from a file of comma-separated values with the columns' names on top."""
    reader = csv.reader((line + "\n" for line in json_files.read_lines(path)), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            fault, remedy = f"not comma-separated values ({error})", "correct it"
            if "new-line character" in str(error):
                fault, remedy = "its lines end in CR alone", "save it with LF or CRLF"
            raise UserError(f"{place}: {fault}; {remedy}") from error
        if row is None:
            return
        if not any(row):
            continue
        if header is None:
            header = [name.strip() for name in row]
            for name in columns:
                if header.count(name) > 1:
                    raise UserError(f"{path}: has the column {shown(name)} twice; rename one")
                if name not in header:
                    raise UserError(
                        f"{path}: has no column {shown(name)}, only {shown(', '.join(header))}; name its "
                        "`image_column` and `caption_column`"
                    )
            continue
        try:
            if len(row) != len(header):
                raise UserError(f"{place}: {len(row)} values for {len(header)} columns; quote commas")
            yield place, _entry(dict(zip(header, row, strict=True)), columns, place, "correct it")
        except UserError as error:
            yield place, error


def _entry(entry: dict, columns: tuple[str, str], place: str, remedy: str) -> tuple[str, tuple[str, ...]]:
    """Return the image's name and the captions of a line."""
    for column in columns:
        if column not in entry:
            keys = shown(", ".join(map(str, entry)))
            raise UserError(f"{place}: has no {column}, only {keys}; {remedy}")
    name, texts = (entry[column] for column in columns)
    texts = texts if isinstance(texts, list) else [texts]
    for column, values in zip(columns, ([name], texts), strict=True):
        if not values or not all(isinstance(value, str) for value in values):
            raise UserError(f"{place}: {column} {shown(entry[column])}: not a text; {remedy}")
        if not all(value.strip() for value in values):
            raise UserError(f'{place}: no "{column}"; {remedy}')
    for text in texts:
        check_text(text, place)
    if any("\0" in text for text in (name, *texts)):
        raise UserError(f"{place}: a NUL in a text; {remedy}")
    return name, tuple(text.strip() for text in texts)


def check_text(text: str, place: str) -> None:
    """Raise a UserError for a caption that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: not valid Unicode (a lone surrogate); write the line anew") from error


def _text_captions(
    listing: Listing, files: CaptionFiles, on_fault: Fault, notes: list[str]
) -> dict[str, tuple[str, ...]]:
    """Return the captions in a text file beside each image."""
    folder = listing.folder
    stems = {image: os.path.splitext(image)[0] for image in listing.images}
    captions: dict[str, tuple[str, ...]] = {}
    of_folders: list[str] = []
    used: set[str] = set()
    for image, stem in stems.items():
        texts = [name for extension in files.extensions if (name := stem + extension) in listing.others]
        used.update(texts)
        try:
            if texts:
                captions[image] = _read_caption(folder, texts[0], listing.others[texts[0]])
            elif words := files.class_tokens or (repeats_of(image) or (1, ""))[1]:
                captions[image] = (words,)
                of_folders.append(image)
            else:
                text = Path(image).stem + files.extensions[0]
                if (folder / (stem + files.extensions[0])).is_dir():
                    raise UserError(f"{folder / stem}{files.extensions[0]}: a folder, not a file; rename it")
                raise UserError(
                    f"{folder / image}: no caption; write {text} beside it, or {METADATA} in {folder} "
                    '(lines with "file_name" and "text")'
                )
        except UserError as error:
            on_fault(error)
    if of_folders:
        notes.append(
            f"{folder}: {len(of_folders)} images without a caption file take the words of their folder or "
            f"class, the first is {of_folders[0]!r}: {shown(captions[of_folders[0]][0])}"
        )
    _check_owners(folder, stems, used, files.extensions, notes)
    _check_orphans(listing, used, files.extensions, on_fault)
    return _lines(folder, captions, files, notes)


def _read_caption(folder: Path, name: str, is_link: bool) -> tuple[str, ...]:
    text = None if is_link else _quick_text(os.path.join(folder, name))
    if text is None:
        path = folder / name
        inside(path, folder, path.name)
        try:
            text = json_files.read_text(path)
        except FileNotFoundError as error:
            raise UserError(f"{path}: not found; put it back") from error
        if not text.strip():
            raise UserError(f"{path}: empty; write a caption into it")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _quick_text(path: str) -> str | None:
    """Return the text of a small plain file; None where anything is unusual. Data sets have many of them."""
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        content = os.read(descriptor, _SMALL)
        text = content.decode("utf-8-sig") if len(content) < _SMALL else ""
    except (OSError, UnicodeDecodeError):
        return None
    finally:
        os.close(descriptor)
    return text if text and not text.isspace() and "\0" not in text else None


def _lines(
    folder: Path, captions: dict[str, tuple[str, ...]], files: CaptionFiles, notes: list[str]
) -> dict[str, tuple[str, ...]]:
    several = [image for image, lines in captions.items() if len(lines) > 1]
    if files.caption_lines == "first":
        return {image: lines[:1] for image, lines in captions.items()}
    if several and files.caption_lines is None:
        notes.append(
            f"{folder}: {len(several)} caption files have several lines, and each line is a caption; with "
            "`caption_lines='first'` the first one is the caption, as in kohya's scripts"
        )
    return captions


def _check_owners(
    folder: Path, stems: dict[str, str], used: set[str], extensions: tuple[str, ...], notes: list[str]
) -> None:
    """Warn of images that share a caption file, and note images that have two."""
    if len(set(stems.values())) < len(stems):
        owners = collections.Counter(stems.values())
        shared = [image for image, stem in stems.items() if owners[stem] > 1]
        warn_once(
            f"{folder}: {len(shared)} images share their name, apart from the suffix, and their caption, the "
            f"first is {shared[0]!r}; rename them if they are not the same image"
        )
    if len(extensions) > 1:
        read, other = extensions
        both = [stem for stem in stems.values() if stem + read in used and stem + other in used]
        if both:
            notes.append(
                f"{folder}: {len(both)} images have two caption files; read is {read}, as in "
                f"{both[0] + read!r}; for the others give `caption_extension={other!r}`"
            )


def _check_orphans(listing: Listing, used: set[str], extensions: tuple[str, ...], on_fault: Fault) -> None:
    """Report caption files without an image, unless their image is a file that is left out."""
    # Of the second suffix only where it is in use: other programs write such files, too.
    in_use = tuple(ending for ending in extensions if ending == extensions[0] or _any_ends(used, ending))
    orphans = [name for name in listing.others if name not in used and name.endswith(in_use)]
    if not orphans:
        return
    folders = {os.path.dirname(image) for image in listing.images}
    left_out = {os.path.splitext(name)[0] for name in listing.left_out}
    for name in sorted(orphans):
        if os.path.dirname(name) in folders and os.path.splitext(name)[0] not in left_out:
            on_fault(
                UserError(
                    f"{listing.folder / name}: a caption without an image; add the image or remove the file"
                )
            )


def _any_ends(names: Iterable[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)
