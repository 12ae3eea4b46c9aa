"""Types of options that several commands share."""

import math

import click

_SMALLEST, LARGEST = 1.2e-38, 3.4e38  # normal float32 numbers


class Number(click.FloatRange):
    """A finite float32 number in a range, which includes its ends unless `min_open` or `max_open`."""

    name = "number"

    def convert(self, value, parameter, context):
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", parameter, context)
        if number and not _SMALLEST < abs(number) < LARGEST:
            self.fail(f"{value} is out of the range of float32.", parameter, context)
        return number


POSITIVE = Number(min=0, min_open=True)
NOT_NEGATIVE = Number(min=0)
SHARE = Number(min=0, max=1)
COUNT = click.IntRange(1, 2**31 - 1)
FROM_ZERO = click.IntRange(0, 2**31 - 1)


class _Side(click.IntRange):
    """A side of images in pixels, a multiple of 8; also WIDTH,HEIGHT of a square, as in kohya's scripts."""

    def convert(self, value, parameter, context):
        width, comma, height = value.partition(",") if isinstance(value, str) else (value, "", "")
        if comma and width.strip() != height.strip():
            self.fail(f"{value} is no square; give one side, and other ratios by buckets", parameter, context)
        value = width
        side = super().convert(value, parameter, context)
        if side % 8:
            self.fail(f"{side} is not a multiple of 8.", parameter, context)
        return side


SIDE = _Side(8, 2**14)
