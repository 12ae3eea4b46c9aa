"""What a compiled program sends between devices, as the text of its XLA module tells."""

import collections
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)"
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)(?:[a-z]\w*)?\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


def collective_bytes(text: str) -> dict[str, int]:
    """Return the bytes of the arrays that a device's program sends, by kind of operation.

    Counted is the whole array: what is summed by an all-reduce, what comes out of an all-gather, what goes
    into a reduce-scatter. A loop counts as often as it runs, where XLA knows that.

    Args:
        text: `as_text()` of a compiled program.
    """
    own, called, entry = _computations(text)
    totals: collections.Counter[str] = collections.Counter()

    def visit(name, times):
        for kind, size in own[name]:
            totals[kind] += times * size
        for callee, trips in called[name]:
            if callee in own:
                visit(callee, times * trips)

    if entry is not None:
        visit(entry, 1)
    return dict(totals)


def _computations(text):
    """Return the collectives of each computation, what it calls how often, and the name of the entry."""
    own: dict[str, list] = {}
    called: dict[str, list] = {}
    entry = name = None
    for line in text.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            name = found["name"]
            own[name], called[name] = [], []
            entry = name if found["entry"] else entry
        elif name is not None:
            instruction = _INSTRUCTION.search(line)
            if instruction:
                own[name].append((instruction["kind"], _size(instruction)))
            trips = _TRIPS.search(line)
            for names in _CALLED.findall(line):
                callees = [one.strip(" %") for one in names.split(",")]
                called[name] += [(callee, int(trips[1]) if trips else 1) for callee in callees]
    return own, called, entry


def _size(instruction):
    """Return the bytes of an instruction's whole array."""
    arrays = [_bytes(kind, shape) for kind, shape in _ARRAY.findall(instruction["shape"])]
    if instruction["start"] and instruction["kind"] != "all-reduce":
        # Inputs and results side by side, and perhaps numbers of the transfer.
        return max(arrays, default=0)
    total = sum(arrays)
    if instruction["kind"] != "reduce-scatter":
        return total
    groups = _GROUPS.search(instruction["rest"])
    devices = 1 if groups is None else int(groups[2] or len(groups[1].split(",")))
    return total * devices


def _bytes(kind, shape):
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    return bits * math.prod(int(length) for length in shape.split(",") if length) // 8
