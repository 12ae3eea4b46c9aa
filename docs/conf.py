"""Sphinx's configuration: `make docs` builds pages, commands' help and docstrings as HTML.

The source folder is the whole repository, so that pages link to each other here as they do on GitHub.
Nothing is fetched. Two directives fill the pages in `docs/reference/`: `modules` names a package, whose
modules are documented from their docstrings, and `commands` prints the help of every command as a terminal
does. sphinx-click would leave out the groups of options.
"""

import importlib
import pkgutil
import shutil
from pathlib import Path

import click
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import keras_sd
from keras_sd.cli.main import cli

project = "keras_sd"
author = "The contributors of keras_sd"
copyright = author
version = release = keras_sd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "benchmarks/*.md", "docs/**", "notebooks/README.md"]
exclude_patterns = ["docs/conf.py"]
root_doc = "README"
# Tables of benchmarks are no part of the menu; pages link to them.
suppress_warnings = ["toc.not_included"]
default_role = "code"
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # those of Keras are Markdown
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"keras_sd {release}"
html_copy_source = False
html_show_sphinx = False

# The pages in the order of the menu; other pages in docs/ come after them.
CONTENTS = {
    "Start": ("docs/getting-started", "docs/how-to", "notebooks/README", "docs/questions"),
    "Generate": ("docs/models", "docs/formats", "docs/prompts", "docs/samplers"),
    "Train": ("docs/data", "docs/captions", "docs/finetuning", "docs/training-guide", "docs/devices"),
    "Come from elsewhere": ("docs/migration",),
    "Measure": ("docs/speed", "docs/results", "docs/parity", "docs/model-card-emoji"),
    "Reference": ("docs/reference/commands", "docs/reference/public", "docs/reference/modules"),
    "Project": (
        "docs/architecture",
        "docs/responsible-use",
        "CONTRIBUTING",
        "CHANGELOG",
        "CODE_OF_CONDUCT",
        "SECURITY",
    ),
}


def add_contents(app, docname, source):
    """Append the menu to the first page, where GitHub need not show it."""
    if docname != root_doc:
        return
    listed = {page for pages in CONTENTS.values() for page in pages}
    others = sorted(page for page in app.env.found_docs if page.startswith("docs/") and page.count("/") == 1)
    contents = {**CONTENTS, "More": [page for page in others if page not in listed]}
    for caption, pages in contents.items():
        lines = "\n".join(pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def show_examples(app, what, name, obj, options, lines):
    """Make code blocks of the examples in docstrings, which stand between fences as in Keras."""
    fenced, result = None, []
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip() == "```python":
            fenced = indent
            result += [f"{indent}.. code-block:: python", ""]
        elif fenced is not None and line.strip() == "```":
            fenced = None
            result.append("")
        else:
            result.append(f"    {line}" if fenced is not None and line else line)
    lines[:] = result


def write_index(app, failure):
    """Give the first page the name that a server looks for."""
    if failure is None:
        shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


class Modules(SphinxDirective):
    """`.. modules:: keras_sd.diffusion` documents the modules of a package."""

    required_arguments = 1

    def run(self):
        package = importlib.import_module(self.arguments[0])
        names = [package.__name__]
        names += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        parts = [f"{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n   :members:\n" for name in names]
        return self.parse_text_to_nodes("\n".join(parts), allow_section_headings=True)


class Commands(SphinxDirective):
    """`.. commands::` prints the help of every command."""

    def run(self):
        sections = []
        for path, text in helps(cli, "keras-sd"):
            section = nodes.section(ids=[nodes.make_id(path)], names=[path])
            section += [nodes.title(path, path), nodes.literal_block(text, text, language="text")]
            sections.append(section)
        return sections


def helps(command, name, parent=None):
    """Yield (command as typed, help) of a command and those below it."""
    context = click.Context(command, info_name=name, parent=parent, max_content_width=100)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from helps(below, below.name, context)


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", show_examples, priority=100)  # before napoleon
    app.connect("build-finished", write_index)
    app.add_directive("modules", Modules)
    app.add_directive("commands", Commands)
