"""Builds the documentation as HTML: `python tools/make_docs.py [OUTPUT]`, by default in `build/docs`.

The prose is that of the Markdown files, the reference of the Python modules is made by pdoc out of their
docstrings, and that of the commands out of their help. Every warning is an error.
"""

import functools
import html
import importlib
import os
import pkgutil
import re
import shutil
import warnings
from pathlib import Path

import click
import pdoc
from pdoc.render_helpers import formatter, to_html

import keras_sd
from keras_sd import UserError
from keras_sd.cli.main import cli
from keras_sd.cli.program import run_command
from keras_sd.files.writing import write_text

ROOT = Path(__file__).resolve().parents[1]

# The pages, in the order in which they are listed.
PAGES = (
    *("README.md", "notebooks/README.md"),
    *(
        f"docs/{name}.md"
        for name in (
            *("models", "prompts", "samplers", "data", "finetuning", "training-guide", "migration"),
            *("captions", "devices"),
        )
    ),
    *(f"docs/{name}.md" for name in ("results", "parity", "questions", "architecture")),
    *(f"docs/{name}.md" for name in ("model-card-emoji", "responsible-use")),
    *("CONTRIBUTING.md", "CHANGELOG.md"),
)
API, COMMANDS = "api/index.html", "commands.html"

# The commands have a page of their own; the others are programs, not for import.
NOT_PUBLIC = r"keras_sd\.(__main__|train|cli|parity\.reference)(\.|$)"

LINK = re.compile(r'(?<= )(href|src)="([^"]+)"')
STYLE = """
body { display: flex; gap: 3rem; margin: 2rem; font: 16px/1.5 system-ui, sans-serif; color: #1a202c; }
nav { flex: 0 0 13rem; } nav ul { list-style: none; padding: 0; } main { max-width: 60rem; min-width: 0; }
img { max-width: 100%; } pre { overflow: auto; padding: .8rem; background: #f6f8fa; }
table { border-collapse: collapse; } td, th { border: 1px solid #cbd5e0; padding: .25rem .6rem; }
"""


def pages():
    """Return the Markdown files, those of PAGES first; new ones in docs/ come after them."""
    others = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return [*PAGES, *(name for name in others if name not in PAGES)]


def html_name(name):
    """Where the page of a Markdown file goes, below the output folder."""
    return "index.html" if name == "README.md" else str(Path(name).with_suffix(".html"))


def title_of(text):
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1].replace("`", "")


def write_page(output, name, title, body, titles):
    """Write one page of HTML, with the list of all pages beside it."""
    target = output / name
    entries = {html_name(page): title for page, title in titles.items()}
    entries |= {COMMANDS: "Commands", API: "Python reference"}
    items = "".join(
        f'<li><a href="{os.path.relpath(output / place, target.parent)}">{html.escape(entry)}</a></li>'
        for place, entry in entries.items()
    )
    style = STYLE + formatter.get_style_defs()
    write_text(
        target,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><nav><ul>{items}</ul></nav><main>{body}</main></body></html>\n",
    )


def write_prose(output, titles):
    """Write the pages of the Markdown files, and copies what they show or lead to.

    Raises:
        UserError: a link leads nowhere.
    """
    for name, title in titles.items():
        mend = functools.partial(_mended, page=name, output=output)
        body = LINK.sub(mend, to_html((ROOT / name).read_text(encoding="utf-8")))
        write_page(output, html_name(name), title, body, titles)


def _mended(link, page, output):
    """Return a link of a Markdown file as one of its page."""
    attribute, address = link.groups()
    if re.match(r"[a-z]+:|#", address):
        return link[0]
    path, hash_sign, anchor = address.partition("#")
    target = (ROOT / page).parent / path
    if not target.is_file():
        raise UserError(f"{page}: the link {address} leads nowhere; correct it")
    name = target.resolve().relative_to(ROOT).as_posix()
    if name in pages():
        place = output / html_name(name)
    else:
        place = output / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, place)
    place = os.path.relpath(place, (output / html_name(page)).parent)
    return f'{attribute}="{place}{hash_sign}{anchor}"'


def write_commands(output, titles):
    """Write the page with the help of every command."""
    parts = [
        f'<h2 id="{path.replace(" ", "-")}">{path}</h2><pre>{html.escape(text)}</pre>'
        for path, text in helps(cli, "keras-sd")
    ]
    write_page(output, COMMANDS, "Commands", "<h1>Commands</h1>" + "".join(parts), titles)


def helps(command, name, parent=None):
    """Yield (command as typed, help) of a command and those below it."""
    context = click.Context(command, info_name=name, parent=parent, max_content_width=100)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from helps(below, below.name, context)


def write_reference(output):
    """Write the reference of the public modules."""
    # What other packages warn of while they are imported is none of ours.
    for module in pkgutil.walk_packages(keras_sd.__path__, "keras_sd."):
        importlib.import_module(module.name)
    # The public names are imported on first use; pdoc looks at what a module holds.
    vars(keras_sd).update({name: getattr(keras_sd, name) for name in keras_sd.__all__})
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text=f"keras_sd {keras_sd.__version__}"
    )
    units = [f"keras_sd.{module.name}" for module in pkgutil.iter_modules(keras_sd.__path__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("keras_sd", *units, f"!{NOT_PUBLIC}", output_directory=(output / API).parent)


@click.command()
@click.argument("output", default="build/docs", type=click.Path(file_okay=False, path_type=Path))
def main(output):
    """Write the documentation to the folder OUTPUT, which is made anew."""
    if output.exists() and not (output / "index.html").is_file() and any(output.iterdir()):
        raise UserError(f"{output}: holds something else; name another folder")
    shutil.rmtree(output, ignore_errors=True)
    titles = {name: title_of((ROOT / name).read_text(encoding="utf-8")) for name in pages()}
    write_prose(output, titles)
    write_commands(output, titles)
    write_reference(output)
    click.echo(output / "index.html")


if __name__ == "__main__":
    run_command(main, "make_docs.py")
