"""Types of options that several commands have."""

import math

import click


class Number(click.FloatRange):
    """A finite number in a range, which holds its ends unless `min_open` or `max_open`."""

    name = "number"

    def convert(self, value, parameter, context):
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", parameter, context)
        return number


POSITIVE = Number(min=0, min_open=True)
NOT_NEGATIVE = Number(min=0)
SHARE = Number(min=0, max=1)
