"""Parity reports as data, as Markdown tables and as JSON."""

from typing import NamedTuple

import numpy as np

# The largest difference between two outputs that is allowed, over the standard deviation of the expected one.
BAR = 1e-4

# What can be said of a tensor. Rounded: exactly the source's value in the type that was written.
EQUAL, ROUNDED, CHANGED = "equal", "rounded", "changed"
MISSING, ADDED, LEFT_OUT = "missing", "not in the source", "left out"
_TENSOR_VERDICTS = (EQUAL, ROUNDED, LEFT_OUT, CHANGED, MISSING, ADDED)

# What can be said of an output. Cost of rounding: farther than the bar, but all tensors are exact roundings.
GOOD, ROUNDING, FAR = "good", "cost of rounding", "far"
NOT_COMPARED = "not compared"


class TensorParity(NamedTuple):
    """One tensor of the source against the written one.

    Attributes:
        part, name: where it belongs, as published by diffusers and transformers.
        shape: the source's, or the written one's where the source has none.
        source_dtype, dtype: the types in the two files; None where there is no such tensor.
        difference: the largest absolute difference; None where one is missing or has another shape.
        verdict: EQUAL (bit for bit), ROUNDED, LEFT_OUT (the format has no place for it), CHANGED, MISSING or
            ADDED.
    """

    part: str
    name: str
    shape: tuple
    source_dtype: str | None
    dtype: str | None
    difference: float | None
    verdict: str

    @property
    def passes(self):
        return self.verdict in (EQUAL, ROUNDED, LEFT_OUT)


class OutputParity(NamedTuple):
    """An output of a written part against the same output of a reference.

    Attributes:
        output: "text encoder", "image encoder", "UNet", "VAE encode" or "VAE decode"; or "scheduler" or
            "low-res scheduler", whose files are compared.
        against: "source" (the source's part, opened here) or the library that opened what was written.
        difference: the largest absolute difference.
        standard_deviation: that of the expected output.
        ratio: the difference over the standard deviation. All three are None where nothing was computed.
        verdict: GOOD, FAR, ROUNDING or NOT_COMPARED; anything else is the reason of a failure.
    """

    output: str
    against: str
    difference: float | None
    standard_deviation: float | None
    ratio: float | None
    verdict: str

    @property
    def passes(self):
        return self.verdict in (GOOD, ROUNDING) or self.verdict.startswith(NOT_COMPARED)


class Report(NamedTuple):
    """A parity report.

    Attributes:
        source, output: the two paths.
        tensors: list of `TensorParity`.
        outputs: list of `OutputParity`.
        notes: list of sentences on what the output cannot hold.
        date: of the comparison, ISO 8601.
        versions: dictionary of the libraries' versions; None for those that are not installed.
    """

    source: str
    output: str
    tensors: list
    outputs: list
    notes: list
    date: str
    versions: dict

    @property
    def passes(self):
        """Whether no tensor and no output is farther than it may be."""
        return all(entry.passes for entry in [*self.tensors, *self.outputs])

    @property
    def farthest(self):
        """The tensors that are not equal, those that fail first, then by their difference."""

        def distance(tensor):
            known = tensor.difference is not None and np.isfinite(tensor.difference)
            return not tensor.passes, tensor.difference if known else np.inf

        return sorted((t for t in self.tensors if t.verdict != EQUAL), key=distance, reverse=True)

    def to_dict(self):
        """Return the report as a JSON dictionary. Values that are no finite number are null."""
        return {
            "source": self.source,
            "output": self.output,
            "date": self.date,
            "versions": self.versions,
            "largest_allowed_ratio": BAR,
            "passes": self.passes,
            "notes": self.notes,
            "parts": [_jsonable(output) for output in self.outputs],
            "tensors": [_jsonable(tensor) for tensor in self.tensors],
        }

    def to_markdown(self, num_tensors=5):
        """Return the report as Markdown: outputs, tensor counts, the `num_tensors` worst ones (None: all)."""
        blocks = [_outputs_table(self.outputs), _counts_table(self.tensors)]
        listed = self.farthest[:num_tensors] if num_tensors is not None else self.tensors
        if listed:
            blocks.append(_tensors_table(listed))
        blocks += [f"Note: {note}" for note in self.notes]
        return "\n\n".join([*blocks, self.summary])

    @property
    def summary(self):
        """The verdict in one line."""
        tensors = [entry for entry in self.tensors if not entry.passes]
        outputs = [entry for entry in self.outputs if not entry.passes]
        if not tensors and not outputs:
            is_rounded = any(entry.verdict == ROUNDING for entry in self.outputs)
            but = " but for the cost of rounding" if is_rounded else ""
            return f"Good: {len(self.tensors)} tensors as they should be, all outputs within {BAR:g}{but}."
        first = f"{tensors[0].part} {tensors[0].name}" if tensors else outputs[0].output
        return (
            f"FAR: {len(tensors)} of {len(self.tensors)} tensors and {len(outputs)} of {len(self.outputs)} "
            f"outputs are not as they should be; the first is {first}."
        )


def _jsonable(entry):
    values = entry._asdict()
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in values.items()
    }


def _table(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _figure(value):
    return "" if value is None else f"{value:.2g}"


def _outputs_table(outputs):
    titles = ["output", "compared with", "largest difference", "standard deviation", "ratio", "verdict"]
    figures = [map(_figure, (o.difference, o.standard_deviation, o.ratio)) for o in outputs]
    rows = [[o.output, o.against, *three, o.verdict] for o, three in zip(outputs, figures, strict=True)]
    return _table(titles, rows)


def _counts_table(tensors):
    parts = list(dict.fromkeys(tensor.part for tensor in tensors))
    verdicts = [v for v in _TENSOR_VERDICTS if v == EQUAL or any(t.verdict == v for t in tensors)]
    rows = []
    for part in parts:
        own = [tensor for tensor in tensors if tensor.part == part]
        counts = [sum(tensor.verdict == verdict for tensor in own) for verdict in verdicts]
        rows.append([part, len(own), *counts])
    return _table(["part", "tensors", *verdicts], rows)


def _tensors_table(tensors):
    titles = ["part", "tensor", "shape", "source", "written", "largest difference", "verdict"]
    rows = [
        [
            t.part,
            t.name,
            _shape(t.shape),
            t.source_dtype or "",
            t.dtype or "",
            _figure(t.difference),
            t.verdict,
        ]
        for t in tensors
    ]
    return _table(titles, rows)


def _shape(shape):
    return " x ".join(map(str, shape)) or "scalar"
