"""Gathers the faults of a data set, so that all are named before a run begins."""

import functools
import re
import warnings

from keras_sd.errors import BadSamples, UserError


class Faults:
    """Gathers the faults of a data set's examples, to raise or to leave out all of them together.

    Args:
        place: the data set, for messages.
        on_bad_sample: "error" or "skip".
    """

    def __init__(self, place: object, on_bad_sample: str = "error") -> None:
        if on_bad_sample not in ("error", "skip"):
            raise UserError(f"on_bad_sample {on_bad_sample!r}: unknown; use error or skip")
        self.place = place
        self.skips = on_bad_sample == "skip"
        self._errors: dict[str, UserError] = {}

    def add(self, error: UserError) -> None:
        """Remember the fault of an example."""
        self._errors.setdefault(str(error), error)

    def raise_or_note(self, left: int, notes: list[str]) -> None:
        """Raise the faults or, if they are to be left out, append a note that counts them.

        Args:
            left: number of examples that can be used.
        """
        if not self._errors:
            return
        first = next(iter(self._errors.values()))
        if self.skips and not left:
            raise UserError(f"{self.place}: every example is faulty, the first is {first}")
        if not self.skips:
            raise first if len(self._errors) == 1 else BadSamples(self.place, self._errors)
        notes.append(f"{self.place}: {len(self._errors)} faulty examples are left out, the first is {first}")


@functools.cache
def warn_once(message: str) -> None:
    """Warn once in a process. Python's own filter forgets past warnings when Pillow's are suppressed."""
    warnings.warn(message, stacklevel=3)


def first_line(error: BaseException, longest: int = 160) -> str:
    """Return the type and the first line of another library's error, cut to `longest` characters."""
    text = re.sub(r"\s+", " ", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text[:longest]}" if text else type(error).__name__
