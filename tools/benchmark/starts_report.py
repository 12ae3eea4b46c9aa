"""Formats what `tools/bench_start.py` measured: a Markdown table, and a plot of where the seconds go."""

from benchmark.panels import saved_panels

HEAD = (
    "| what a user waits for | side | median | over diffusers | first process | range | caches |",
    "|---|---|---|---|---|---|---|",
)


def table(results):
    """Return the rows as a Markdown table: medians, and the ratio to the fastest peer of the row."""
    lines = [*HEAD]
    for row in results["rows"]:
        figure, peers = row["figure"], [side for side in row["sides"] if _is_peer(side) and "median" in side]
        fastest = min((side["median"][figure] for side in peers), default=None)
        for side in row["sides"]:
            if "failed" in side:
                lines.append(f"| {row['title']} | {side['side']} | failed: {side['failed']} | | | | |")
                continue
            values = [run[figure] for run in side["runs"][1:]]
            median = side["median"][figure]
            ratio = "" if fastest is None or _is_peer(side) else f"{median / fastest:.2f} ×"
            cells = (
                row["title"],
                side["side"],
                _written(median, figure),
                ratio,
                _written(side["first"][figure], figure),
                f"{_written(min(values), figure)} to {_written(max(values), figure)}",
                f"{side['cache_bytes'] / 2**20:,.0f} MiB",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path, results, before=None):
    """Draw the phases of each side as bars on top of each other.

    Args:
        path: PNG file to write.
        before: earlier results, whose sides of the same rows are drawn beside.
    """
    earlier = {row["key"]: row["sides"] for row in before["rows"]} if before else {}
    panels = []
    for row in results["rows"]:
        if row["figure"] != "seconds":
            continue
        bars = [
            (f"{side['side']}, before", side) for side in earlier.get(row["key"], []) if not _is_peer(side)
        ]
        bars += [(side["side"], side) for side in row["sides"]]
        bars = [(name, side["phases"]) for name, side in bars if "phases" in side]
        if bars:
            panels.append((row["title"], bars))
    if not panels:
        return
    with saved_panels(path, [len(bars) for _, bars in panels], 0.7, 0.3) as axes:
        for axis, (title, bars) in zip(axes, panels, strict=True):
            _draw(axis, title, bars)
        axes[-1].set_xlabel("seconds, medians of each phase", fontsize=9)


def _draw(axis, title, bars):
    names, starts = [name for name, _ in bars], [0.0] * len(bars)
    most_first = sorted((phases for _, phases in bars), key=len, reverse=True)
    for phase in dict.fromkeys(phase for phases in most_first for phase in phases):
        lengths = [phases.get(phase, 0.0) for _, phases in bars]
        axis.barh(names, lengths, left=starts, label=phase)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for place, total in enumerate(starts):
        axis.text(total, place, f" {total:.1f} s", va="center", fontsize=8)
    axis.margins(x=0.35)  # room for the numbers and the legend
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10, loc="left")
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, loc="lower right")


def _is_peer(side):
    return not side["side"].startswith("keras_sd")


def _written(value, figure):
    return f"{value:.2f} GiB" if figure == "peak_gigabytes" else f"{value:.2f} s"
