"""The documentation, the notebooks, the help texts and the docstrings use the words of the field."""

import ast
import json
import re
from pathlib import Path

import pytest

from keras_sd.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
PROSE = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").iterdir() if path.suffix in (".ipynb", ".md", ".py"))
MODULES = sorted(path for folder in ("keras_sd", "tools") for path in (ROOT / folder).rglob("*.py"))

# A word of the field -> what stood in its place, as a pattern.
GLOSSARY = {
    "image": r"\bpictures?\b(?! of \{\})",  # a template of textual inversion's
    "transposed, channels-last layout": r"\bturned (?:kernels?|weights?|matri\w+|round)\b",
    "warm or cold compilation cache": r"\bprograms? at hand\b",
    "matrix multiplication (GEMM)": r"\bproducts? of matrices\b|\bmatrix products?\b",
    "im2col": r"\bwindows of (?:a|the) (?:map|kernel|convolution)s?\b",
    "standard deviation": r"(?<!standard )(?<!standard-)(?<!standard_)\bdeviations?\b",
    "bottleneck": r"\bwhat bounds\b",
    "device time, throughput, utilization (MFU)": r"\bmaker'?s'? figures?\b",
    "timestep spacing": r"\basks? the network\b",
    "chunked attention": r"\bquer(?:y|ies)\b[^.]{0,40}\bin turns\b",
    "swap in the EMA weights": r"\blen[dt]\b|\baveraged weights\b",
    "not found, could not be downloaded": r"\bto be had\b",
    "num_inference_steps": r"(?<![\w-])num_steps\b|(?<![\w-])--steps\b",
}


def found_in(text):
    """The words of the right column in a text, each with what stands around it."""
    text = re.sub(r"\s+", " ", text)
    # A published figure's command stands as it was called.
    text = re.sub(r"(tools/bench\.py[^`]*?) --steps \d+", r"\1", text)
    # KerasCV's own argument, called as KerasCV has it.
    text = re.sub(r"(batch_size=[^,]+, )num_steps=", r"\1", text)
    return [
        f"{text[max(match.start() - 30, 0) : match.end() + 30]!r}: write {word}"
        for word, pattern in GLOSSARY.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def text_of_notebook(path):
    """What a reader of a notebook or of its script sees: prose, code and printed lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    return "\n".join(seen_in_cell(cell) for cell in json.loads(text)["cells"])


def seen_in_cell(cell):
    printed = ["".join(output.get("text", "")) for output in cell.get("outputs", ())]
    return "\n".join(["".join(cell["source"]), *printed])


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def help_texts(command):
    yield command.help or ""
    for parameter in command.params:
        yield getattr(parameter, "help", None) or ""
    for below in getattr(command, "commands", {}).values():
        yield from help_texts(below)


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_words_of_pages(path):
    assert not found_in(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_words_of_notebooks(path):
    text = text_of_notebook(path)
    assert len(text) > 1000
    assert not found_in(text)


def test_words_of_docstrings():
    found = {path.relative_to(ROOT).as_posix(): found_in("\n".join(docstrings(path))) for path in MODULES}
    assert len(MODULES) > 150
    assert not {path: words for path, words in found.items() if words}


def test_words_of_help_texts():
    texts = list(help_texts(cli))
    assert sum(map(bool, texts)) > 300
    assert not found_in("\n".join(texts))


def test_each_word_is_found():
    for text in (
        *("a picture", "the turned\nkernel", "a program at hand", "products of matrices", "its deviation"),
        *("what bounds it", "lend the averaged weights", "not to be had", "num_steps", "pass --steps 3"),
        *("share of the maker's figure", "ask the network", "queries go in turns", "windows of a map"),
    ):
        assert found_in(text), text
    assert not found_in("its standard\ndeviation; --num-inference-steps; max_num_steps")
