"""Draws how the modules of keras_sd import each other: `python tools/draw_architecture.py`.

Writes `docs/images/architecture.svg`. A module stands one row above the highest that it imports. Imports that
follow from others are left out, and so is `errors`, which nearly all import.
"""

import ast
import html
from pathlib import Path

import click

from keras_sd.files.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "keras_sd"
OUTPUT = ROOT / "docs" / "images" / "architecture.svg"
LEFT_OUT = {"errors", "__init__", "__main__"}

CHARACTER, BOX_HEIGHT, ROW_HEIGHT = 7.4, 26, 64  # pixels
GAP, PASSAGE, MARGIN = 18, 6, 16
SWEEPS = 40


def read_imports(package=PACKAGE):
    """Return the modules and sub-packages right below the package, each with those that it imports."""
    imports = {}
    for path in sorted(package.rglob("*.py")):
        unit = path.relative_to(package).with_suffix("").parts[0]
        if unit not in LEFT_OUT:
            imports.setdefault(unit, set()).update(_imported_units(path, package.name))
    return {unit: (others & imports.keys()) - {unit} for unit, others in imports.items()}


def _imported_units(path, package):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith(f"{package}."))


def reduced(imports):
    """Return the imports that do not follow from others, as pairs (importing, imported)."""
    below = {}

    def reach(unit):
        if unit not in below:
            below[unit] = set(imports[unit]).union(*(reach(other) for other in imports[unit]))
        return below[unit]

    for unit in imports:
        reach(unit)
    return sorted(
        (unit, other)
        for unit, others in imports.items()
        for other in others
        if not any(other in below[another] for another in others)
    )


def levels(imports):
    """Return the row of each module, counted from the ground."""
    found = {}

    def level(unit):
        if unit not in found:
            found[unit] = 1 + max((level(other) for other in imports[unit]), default=-1)
        return found[unit]

    for unit in sorted(imports):
        level(unit)
    return found


def route(edges, level):
    """Rows of names, and links between neighbouring rows.

    A link over several rows goes through passages, the pairs (imported, row), one for all links to a module.
    """
    rows = [[] for _ in range(max(level.values()) + 1)]
    for unit in sorted(level):
        rows[level[unit]].append(unit)
    links = set()
    for unit, other in edges:
        end = other
        for row in range(level[other] + 1, level[unit]):
            passage = (other, row)
            if passage not in rows[row]:
                rows[row].append(passage)
            links.add((passage, end))
            end = passage
        links.add((unit, end))
    return rows, sorted(links, key=str)


def _width(name):
    return PASSAGE if isinstance(name, tuple) else len(name) * CHARACTER + 16


def arrange(rows, links):
    """Return the horizontal centre of each name, in pixels: near what it is linked with, without overlaps."""
    neighbours = {name: [] for row in rows for name in row}
    for upper, lower in links:
        neighbours[upper].append(lower)
        neighbours[lower].append(upper)
    centre = {name: 120.0 * index for row in rows for index, name in enumerate(row)}
    for _ in range(SWEEPS):
        for row in rows:
            wanted = {
                name: sum(centre[other] for other in neighbours[name]) / len(neighbours[name])
                if neighbours[name]
                else centre[name]
                for name in row
            }
            ordered = sorted(row, key=lambda name: (wanted[name], str(name)))
            centre |= _spread(ordered, wanted)
    left = min(centre[name] - _width(name) / 2 for name in centre)
    return {name: x - left + MARGIN for name, x in centre.items()}


def _spread(ordered, wanted):
    """Move the names of a row apart, and the row to where it deviates least from what was wanted."""
    placed, edge = {}, None
    for name in ordered:
        half = _width(name) / 2
        placed[name] = wanted[name] if edge is None else max(wanted[name], edge + GAP + half)
        edge = placed[name] + half
    shift = sum(wanted[name] - placed[name] for name in ordered) / len(ordered)
    return {name: x + shift for name, x in placed.items()}


def draw(imports):
    """Return the diagram as the text of an SVG."""
    level = levels(imports)
    rows, links = route(reduced(imports), level)
    centre = arrange(rows, links)
    height = len(rows) * ROW_HEIGHT - (ROW_HEIGHT - BOX_HEIGHT) + 2 * MARGIN
    width = max(centre[name] + _width(name) / 2 for name in centre) + MARGIN
    top = {
        name: MARGIN + (len(rows) - 1 - index) * ROW_HEIGHT for index, row in enumerate(rows) for name in row
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<g fill="none" stroke="#8a94a6" stroke-width="1.2">',
    ]
    for upper, lower in links:
        x, y = centre[upper], top[upper] + BOX_HEIGHT
        end_x, end_y = centre[lower], top[lower]
        middle = (y + end_y) / 2
        lines.append(
            f'<path d="M{x:.0f} {y} C{x:.0f} {middle:.0f} {end_x:.0f} {middle:.0f} {end_x:.0f} {end_y}"/>'
        )
    for name in top:
        if isinstance(name, tuple):
            lines.append(f'<path d="M{centre[name]:.0f} {top[name]} v{BOX_HEIGHT}"/>')
    lines.append("</g>")
    for name in sorted(level):
        x, box = centre[name], _width(name)
        fill = "#dbe7ff" if (PACKAGE / name).is_dir() else "#f4f1e6"
        lines.append(
            f'<rect x="{x - box / 2:.0f}" y="{top[name]}" width="{box:.0f}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="{fill}" stroke="#4a5568"/>'
            f'<text x="{x:.0f}" y="{top[name] + 17}" text-anchor="middle">{html.escape(name)}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


@click.command()
def main():
    """Write the diagram that README.md shows."""
    write_text(OUTPUT, draw(read_imports()))
    click.echo(OUTPUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
