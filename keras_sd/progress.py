"""Progress of long tasks before or after training, on standard error."""

import os
import sys
import time

from tqdm import tqdm

FIRST_LINE_SECONDS = 2.0
"""A task that takes less time prints no line."""


def is_terminal() -> bool:
    """Return whether standard error is a terminal that a bar can be drawn on; some report a width of 0."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # a stream of Python's own
        return True


def print_above_bars(line: str) -> None:
    """Print a line on standard error, above the progress bars if there are any."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A progress bar with the rate and the time left; without a terminal, lines at intervals.

    Use it as a context manager and call `update` after each part.

    Args:
        description: the task, such as "encoding images".
        total: number of items.
        unit: name of the items, in the plural.
        delay: seconds after which the bar appears.
        line_seconds: seconds between two lines.
        disable: show nothing, as in all processes but one.
    """

    def __init__(self, description, total, unit, *, delay=0.0, line_seconds=30.0, disable=False):
        self.description = description
        self.total = total
        self.unit = unit
        self.delay = delay
        self.line_seconds = line_seconds
        self.disable = disable
        self.done = 0
        self._first = None  # (time, items) of the first update, which may have compiled
        self._bar = None

    def __enter__(self):
        self._began = time.monotonic()
        self._next_line = self._began + FIRST_LINE_SECONDS
        self._reported = -1  # items done at the last line
        if not self.disable and is_terminal():
            self._bar = tqdm(
                total=self.total,
                desc=self.description,
                unit=self.unit,
                delay=self.delay,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                file=sys.stderr,
            )
        return self

    def __exit__(self, kind, *_):
        if self._bar is not None:
            self._bar.close()
        elif kind is None and 0 <= self._reported < self.done:
            self._report()

    def update(self, count):
        """Count `count` more as done."""
        self.done += count
        if self._first is None:
            self._first = time.monotonic(), self.done
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(count)
        elif not self.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self.line_seconds
            self._report()

    def _report(self):
        self._reported = self.done
        line = ", ".join(filter(None, (f"{self.description} {self.done}/{self.total}", self._figures())))
        print(line, file=sys.stderr, flush=True)

    def _figures(self):
        """Return the rate and the time left; an empty text where the first update is all there is to know."""
        since, before = self._first
        if self.done == self.total:
            since, before = self._began, 0  # what the task took as a whole
        elif self.done == before:
            return ""
        rate = (self.done - before) / max(time.monotonic() - since, 1e-9)
        left = tqdm.format_interval((self.total - self.done) / max(rate, 1e-9))
        return f"{rate:.1f} {self.unit}/s, {left} left"
