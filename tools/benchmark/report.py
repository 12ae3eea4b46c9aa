"""Formats benchmark results: a line on the terminal for each side, a Markdown table, a plot and JSON."""

from benchmark.panels import saved_panels
from benchmark.worker import SAMPLING_CASES
from keras_sd.files.writing import write_json, write_text

HEAD = (
    f"{'case':22} {'side':26} {'seconds, processor':>18} {'first in turns':>15} {'ratio':>18}  "
    f"{'first call cold, warm':>22} {'memory':>8} {'GEMM':>5}"
)


def name_of(side):
    """Return the name of a side in tables."""
    if side["xla"] is None:
        return side["implementation"]
    if side["implementation"] == "jax":
        return "keras_sd, JAX"
    return f"keras_sd, TensorFlow, XLA {side['xla']}"


def complete(result, figures, gemm_gflops, peak_gflops=None):
    """Add derived figures: throughput, shares of the ceilings, and after how many calls XLA pays.

    Args:
        gemm_gflops: the measured ceiling, by precision.
        peak_gflops: the accelerator's peak in half precision by its data sheet, or None.
    """
    first = (result["sides"] or [figures])[0]
    if "seconds" not in figures:
        return
    multiplications = first.get("warm", {}).get("multiplications")
    if multiplications:
        figures["gflops"] = 2 * multiplications / figures["seconds"] / 1e9
        figures["share_of_gemm"] = figures["gflops"] / gemm_gflops[result["precision"]]
        if peak_gflops and result["precision"] != "float32":
            figures["share_of_peak"] = figures["gflops"] / peak_gflops
    if result["case"] in SAMPLING_CASES:
        figures["steps_per_second"] = result["steps"] / figures["seconds"]
    if figures["xla"] == "off" and first["xla"] == "on" and "ratio" in figures:
        figures["xla_pays_after_calls"] = {
            start: _calls_until_paid(first[start], figures[start], figures)
            for start in ("cold", "warm")
            if start in figures
        }


def _calls_until_paid(with_xla, without, figures):
    """Return after how many calls the time that XLA compiled is saved again; None for never."""
    gained = figures["seconds"] - figures["reference_seconds"]
    lost = with_xla["first_call_seconds"] - without["first_call_seconds"]
    if lost <= 0:
        return 0
    return round(lost / gained + 0.5) if gained > 0 else None


def _cells(result, figures):
    case = f"{result['model']} {result['case']}"
    if "correction" in result:
        case += "*"
    if result["batch"] > 1:
        case += f" x{result['batch']}"
    if result["precision"] != "float32":
        case += f" {result['precision']}"
    if "failed" in figures:
        return [case, name_of(figures), f"failed: {figures['failed']}", "", "", "", "", ""]
    starts = _of_starts(figures, "first_call_seconds")
    memory = f"{figures['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in figures else ""
    return [
        case,
        name_of(figures),
        _of_call(figures),
        f"{figures['reference_seconds']:.3f}" if "ratio" in figures else "",
        _ratio(figures),
        starts,
        memory,
        f"{figures['share_of_gemm']:.0%}" if "share_of_gemm" in figures else "",
    ]


def _of_call(figures):
    """Return the seconds of a call, by the clock and of the processor's cores."""
    processor = f", {figures['processor_seconds']:.2f}" if "processor_seconds" in figures else ""
    return f"{figures['seconds']:.3f}{processor}"


def _ratio(figures):
    """Return the median of the ratios of the turns, and the least and the largest."""
    if "ratio" not in figures:
        return ""
    spread = (
        f" ({figures['least_ratio']:.2f}–{figures['largest_ratio']:.2f})" if "least_ratio" in figures else ""
    )
    return f"{figures['ratio']:.2f}{spread}"


def _of_starts(figures, name):
    """Return the seconds with a cold and with a warm compilation cache, as far as both were measured."""
    seconds = [f"{figures[start][name]:.1f}" for start in ("cold", "warm") if start in figures]
    return f"{', '.join(seconds)} s" if seconds else ""


def line(result, figures):
    """Return one side as a line for the terminal."""
    case, side, seconds, reference, ratio, starts, memory, share = _cells(result, figures)
    line = (
        f"{case:22} {side:26} {seconds:>18} {reference:>15} {ratio:>18}  {starts:>22} {memory:>8} {share:>5}"
    )
    return line.rstrip()


def table(results):
    """Return all sides as a Markdown table, with what it was measured on.

    A ratio is to the seconds of the first side in the same turns, given beside it: the machine's speed may
    have changed since the first side was measured alone. Where figures were derived again from the measured
    times, `correction` says what was wrong.
    """
    lines = [
        "| case | side | seconds, of the processor | the first, in turns | × the first "
        "| 1st call: cold, warm | start: cold, warm | memory | GEMM | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results["results"]:
        for figures in result["sides"]:
            cells = _cells(result, figures)
            starts = _of_starts(figures, "start_seconds")
            peak = f"{figures['share_of_peak']:.0%}" if "share_of_peak" in figures else ""
            lines.append(f"| {' | '.join([*cells[:6], starts, *cells[6:], peak])} |")
    lines += ["", *_pay_offs(results), ""]
    corrections = dict.fromkeys(each["correction"] for each in results["results"] if "correction" in each)
    lines += [line for text in corrections for line in (f"\\* {text}", "")]
    versions = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    device = results.get("accelerator") or f"{results['processor']}, {results['cores']} cores"
    ceilings = ", ".join(f"{name} {value:.0f}" for name, value in results["gemm_gflops"].items())
    lines += [
        f"{device}, {results['date']}; {versions}; GEMM in GFLOP/s: {ceilings}. "
        f"Medians of {results['repeats']} calls, in turns with the first side. `{results['command']}`",
    ]
    return "\n".join(lines) + "\n"


def _pay_offs(results):
    for result in results["results"]:
        for figures in result["sides"]:
            if "xla_pays_after_calls" in figures:
                said = {
                    start: "never" if count is None else f"after {count} calls"
                    for start, count in figures["xla_pays_after_calls"].items()
                }
                case = f"{result['model']} {result['case']}, {result['precision']}"
                warm = f"with the programs kept by an earlier process {said['warm']}"
                cold = f"compiling pays {said['cold']}; " if "cold" in said else "compiling pays, "
                yield f"- {case}: {cold}{warm}."


def write(output, results):
    """Write the JSON and the table beside it."""
    write_json(output, results)
    write_text(output.with_suffix(".md"), table(results))


def plot(path, results):
    """Draw the time of each side as a multiple of the first one's in the same turns, a panel for a case.

    Cases with one side only share a panel of seconds.
    """
    measured = [
        (result, [side for side in result["sides"] if "seconds" in side]) for result in results["results"]
    ]
    compared = [(result, sides) for result, sides in measured if len(sides) > 1]
    alone = [(result, sides[0]) for result, sides in measured if len(sides) == 1]
    heights = [len(sides) for _, sides in compared] + ([len(alone)] if alone else [])
    if not heights:
        return
    with saved_panels(path, heights, 0.9, 0.32) as panels:
        for panel, (result, sides) in zip(panels, compared, strict=False):
            _draw_case(panel, result, sides)
        if compared:
            label = (
                "time of a call as a multiple of the first side's in the same turns; line: fastest to slowest"
            )
            panels[len(compared) - 1].set_xlabel(label, fontsize=9)
        if alone:
            _draw_alone(panels[-1], alone)


def _draw_case(panel, result, sides):
    ratios = [side.get("ratio", 1.0) for side in sides]
    units = [side.get("reference_seconds", side["seconds"]) for side in sides]
    labels = [f" {sides[0]['seconds']:.3g} s"]
    labels += [
        f" {ratio:.2f} × ({side['seconds']:.3g} s, the first {unit:.3g} s)"
        for ratio, side, unit in zip(ratios[1:], sides[1:], units[1:], strict=True)
    ]
    _draw_bars(panel, sides, [name_of(side) for side in sides], units, labels)
    panel.margins(x=0.65)  # room for the labels
    panel.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    panel.set_title(f"{result['model']}, {result['case']}: {_size_of(result)}", fontsize=10, loc="left")


def _draw_alone(panel, cases):
    sides = [side for _, side in cases]
    names = [f"{result['model']}, {result['case']}: {_size_of(result)}" for result, _ in cases]
    _draw_bars(panel, sides, names, [1.0] * len(sides), [f" {side['seconds']:.3g} s" for side in sides])
    panel.margins(x=0.2)
    panel.set_title(", ".join(dict.fromkeys(map(name_of, sides))), fontsize=10, loc="left")
    panel.set_xlabel("seconds of a call, each case measured apart: median, fastest to slowest", fontsize=9)


def _draw_bars(panel, sides, names, units, labels):
    """Bars of seconds in `units`, with a line from the fastest to the slowest call."""
    lengths = [side["seconds"] / unit for side, unit in zip(sides, units, strict=True)]
    spread = [
        [(side["seconds"] - side["fastest"]) / unit for side, unit in zip(sides, units, strict=True)],
        [(side["slowest"] - side["seconds"]) / unit for side, unit in zip(sides, units, strict=True)],
    ]
    colours = ["0.65" if side["xla"] is None else "tab:blue" for side in sides]
    bars = panel.barh(names, lengths, xerr=spread, color=colours, ecolor="0.3")
    panel.bar_label(bars, labels, fontsize=8, label_type="edge")
    panel.invert_yaxis()


def _size_of(result):
    return f"{result['size']} px, batch of {result['batch']}, {result['precision']}"
