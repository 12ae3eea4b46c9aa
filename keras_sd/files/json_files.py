"""Reads untrusted JSON files, within limits, and checks them against a declared shape.

A shape is a type that `pydantic` understands: `dict`, `dict[str, str]`, or a `TypedDict` with the keys that
are used; other keys are allowed. Checks are strict: a string is not accepted for a number. pydantic is
imported when the first file is read, to keep the import of this package fast.
"""

import functools
import json
import re
import stat
from pathlib import Path

from keras_sd.arguments import checked_path, shown
from keras_sd.errors import UserError

MIB = 2**20
LARGEST_FILE = 4 * MIB
"""Largest size of a file in bytes; configs have a few thousand. One byte of JSON takes up to 30 in memory."""

LARGEST_LINE = MIB
"""Largest size of a line of a JSON Lines file, in bytes."""

LONGEST_NUMBER = 100
"""Largest number of characters of a number. Tokenizer files have one of 31 digits."""

DEEPEST = 32
"""Largest nesting of lists and dictionaries; configs have 4."""

_NO_DICTIONARY = "not a JSON dictionary"
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
# Python represents bytes of file names that are not UTF-8 as lone surrogates (`surrogateescape`).
_NO_TEXT_BUT_NAMES = re.compile(r"[\0\ud800-\udc7f\udd00-\udfff]")

_REQUIRED = object()


def read_json(
    path,
    shape=dict,
    *,
    default=_REQUIRED,
    absent="check its name",
    remedy="fetch it again",
    largest=LARGEST_FILE,
    error=UserError,
):
    """Read an untrusted JSON file.

    Args:
        path: the file.
        shape: the type that its content must have.
        default: the result if there is no such file; without a default, that is an error.
        absent: the remedy in the message for a missing file.
        remedy: the remedy in the message for a damaged file.
        largest: the largest size of the file in bytes.
        error: the exception class, a `UserError`.

    Returns:
        The content, unchanged.

    Raises:
        UserError: the file is missing, cannot be read, is larger than `largest`, is no JSON in UTF-8, exceeds
            a limit of this module, or has another shape.
    """
    path = checked_path("path", path)
    try:
        content = read_bytes(path, largest, remedy)
    except FileNotFoundError as missing:
        if default is not _REQUIRED:
            return default
        raise error(f"{path}: not found; {absent}") from missing
    except UserError as fault:
        raise error(str(fault)) from fault
    return parse_json(content, path, shape, remedy=remedy, error=error, damaged="not a JSON file")


def parse_json(
    content,
    place,
    shape=dict,
    *,
    remedy="fetch it again",
    file_names=False,
    error=UserError,
    damaged="not valid JSON",
    unique=False,
):
    """Parse a JSON text within the limits of this module, and check its shape.

    Args:
        content: the text, as bytes in UTF-8 or as a string.
        place: the place in messages: the file, or the file and the line.
        shape, remedy, error: as in `read_json`.
        file_names: allow strings with file names that are not UTF-8, as Python represents them.
        damaged: the fault in the message for invalid JSON.
        unique: refuse an object with two equal keys, of which Python's parser keeps the last.

    Raises:
        UserError: as `read_json`.
    """
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        value = json.loads(
            content,
            parse_int=_limited(int),
            parse_float=_limited(float),
            object_pairs_hook=_without_repetition if unique else None,
        )
        _check_limits(value, _NO_TEXT_BUT_NAMES if file_names else _NO_TEXT)
    except RecursionError as fault:
        raise error(f"{place}: {damaged} (nested too deeply); {remedy}") from fault
    except ValueError as fault:  # not UTF-8, not JSON, or beyond a limit
        raise error(f"{place}: {damaged} ({fault}); {remedy}") from fault
    fault = shape_fault(value, shape)
    if fault:
        raise error(f"{place}: {fault}; {remedy}")
    return value


def read_json_lines(path, shape=dict, *, remedy="correct it", file_names=False):
    """Yield `(line, value)` for each line of a JSON Lines file; empty lines are skipped.

    The file is read line by line, so it may have any size.

    Args:
        path, shape, remedy, file_names: as in `parse_json`.

    Yields:
        The text of the line without its line ending, and its value.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: as `parse_json`; the message names the line.
    """
    for number, line in enumerate(read_lines(path, remedy), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield line, parse_json(line, place, shape, remedy=remedy, file_names=file_names)


def read_lines(path, remedy="correct it"):
    """Yield the lines of a UTF-8 text file without their line endings.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or a line is not UTF-8 or longer than `LARGEST_LINE`.
    """
    with _opened(path, remedy) as file:
        number = 0
        while line := file.readline(LARGEST_LINE + 1):
            number += 1
            if len(line) > LARGEST_LINE:
                raise UserError(f"{path}, line {number}: longer than {LARGEST_LINE // MIB} MiB; {remedy}")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); {remedy}") from error


def read_bytes(path, largest=LARGEST_FILE, remedy="check the file", too_large=None):
    """Return the content of a file of at most `largest` bytes.

    Args:
        too_large: the remedy for a larger file, if it is another one.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, is not a regular file, or is larger.
    """
    with _opened(path, remedy) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise UserError(f"{path}: larger than {largest // MIB} MiB; {too_large or remedy}")
    return content


def read_text(path, largest=LARGEST_FILE, remedy="save it as UTF-8"):
    """Return the text of a UTF-8 file of at most `largest` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    content = read_bytes(path, largest, remedy, too_large="shorten it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); {remedy}") from error
    if "\0" in text:  # of UTF-16, or no text at all
        raise UserError(f"{path}: no text, as it has NUL characters; {remedy}")
    return text


def _opened(path, remedy):
    try:
        # Reading a pipe or a device might never end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            kind = "a folder, not a file" if Path(path).is_dir() else "not a plain file"
            raise UserError(f"{path}: cannot be read ({kind}); {remedy}")
        return open(path, "rb")
    except UserError:  # a subclass of ValueError, which is caught below
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except (OSError, ValueError) as error:  # ValueError for a name with a NUL
        fault = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({fault}); {remedy}") from error


def shape_fault(value, shape):
    """Return the first difference between a JSON value and a shape, in a few words; None if it fits."""
    if shape is dict:
        return None if isinstance(value, dict) else _NO_DICTIONARY
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_python(value, strict=True)
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = shown(".".join(map(str, first["loc"])))[1:-1]
        if first["type"] == "missing":
            return f"has no {where}"
        if first["type"] == "dict_type":
            return f"{where}: {_NO_DICTIONARY}" if where else _NO_DICTIONARY
        message = first["msg"][:1].lower() + first["msg"][1:]
        return f"{f'{where} ' if where else ''}{shown(first['input'])}: {message}"


@functools.cache
def _adapter(shape):
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _limited(convert):
    """Return a function that converts the text of a number, unless the text is too long."""

    def convert_short(text):
        if len(text) > LONGEST_NUMBER:
            raise ValueError(f"a number of {len(text)} characters")
        return convert(text)

    return convert_short


def _without_repetition(pairs):
    """Return the dictionary of an object's pairs; raise a ValueError for equal keys."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} twice")
    return values


def _check_limits(value, no_text):
    """Raise a ValueError for values nested too deeply, and for strings that are not valid text."""
    level = [value]
    for _ in range(DEEPEST):
        inner = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(one)
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
            elif isinstance(one, str) and not one.isascii() and no_text.search(one):
                raise ValueError("a lone surrogate in a text")
            elif isinstance(one, str) and "\0" in one:
                raise ValueError("a NUL in a text")
        if not inner:
            return
        level = inner
    raise ValueError(f"more than {DEEPEST} nested lists or dictionaries")
