"""The notebooks: each runs at its smallest setting, and what is published fits its script and can be read."""

import re
import sys

import nbformat
import pytest
from click.testing import CliRunner

from keras_sd.errors import UserError
from tools import run_notebooks

SOURCES = run_notebooks.sources()
LARGEST_BYTES = 3_000_000
HEAD = ("Author", "Date created", "Last modified", "Description", "Accelerator")
# What only holds on the machine that a notebook ran on: paths, addresses in memory, its kernel's files.
# A path begins with a slash that no word, colon or slash is before, as in a URL or a unit.
OF_THE_MACHINE = re.compile(r"(?<![\w/:.+=])/[\w.-]+/|site-packages|object at 0x|ipykernel_")

every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, nbformat.current_nbformat)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def text_of(output):
    data = output.get("data", {})
    return output.get("text", "") + "".join(data.get(kind, "") for kind in ("text/plain", "text/html"))


# The later ones take longest: they go first, so that no process is left with one of them at the end.
@pytest.mark.parametrize("source", SOURCES[::-1], ids=lambda path: path.stem)
def test_runs_at_its_smallest_setting(source, tmp_path):
    run_notebooks.run_notebook(source, tmp_path / "executed.ipynb", smallest=True)
    executed = read(tmp_path / "executed.ipynb")
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.get("id") == "smallest" for cell in code) == (source.stem in run_notebooks.SMALLEST)
    assert not [output for output in outputs(executed) if output.output_type == "error"]


@every_notebook
def test_published_notebook_is_in_step_with_its_script(source):
    published, script = read(source.with_suffix(".ipynb")), run_notebooks.read_script(source)
    assert [(cell.cell_type, cell.source) for cell in published.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    code = [cell for cell in published.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@every_notebook
def test_published_notebook_is_small_and_holds_pictures_and_nothing_of_the_machine(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < LARGEST_BYTES
    notebook = read(path)
    assert notebook.metadata == run_notebooks.METADATA
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", text_of(output)
        assert not OF_THE_MACHINE.search(text_of(output)), text_of(output)


@every_notebook
def test_head_is_that_of_keras_io(source):
    first, second = run_notebooks.read_script(source).cells[:2]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert [
        line.split(":**")[0].strip("*") for line in first.source.splitlines() if line.startswith("**")
    ] == [*HEAD]
    assert second.metadata.get("tags") == ["parameters"]


def script(folder, *cells):
    path = folder / "00_trial.py"
    path.write_text("\n\n".join(f"# %%{cell}" for cell in cells) + "\n", encoding="utf-8")
    return path


def test_failing_cell_is_named_and_nothing_is_overwritten(tmp_path):
    source, output = script(tmp_path, "\nx = 1", "\nx / 0"), tmp_path / "00_trial.ipynb"
    output.write_text("the last good one", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^00_trial.py: cell 2 failed with ZeroDivisionError: division by zero; "
    ):
        run_notebooks.run_notebook(source, output)
    assert output.read_text(encoding="utf-8") == "the last good one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_trial.ipynb", "00_trial.py"]


def test_kernel_is_the_running_interpreter_and_two_runs_are_the_same_file(tmp_path):
    text = f"\nimport sys\nprint(sys.executable == {sys.executable!r})\nprint('one'); print('two')"
    source = script(tmp_path, ' tags=["parameters"]\nSTEPS = 3', text)
    for name in ("first", "second"):
        run_notebooks.run_notebook(source, tmp_path / f"{name}.ipynb")
    assert (tmp_path / "first.ipynb").read_bytes() == (tmp_path / "second.ipynb").read_bytes()
    (output,) = outputs(read(tmp_path / "first.ipynb"))
    assert output.text == "True\none\ntwo\n"


def test_smallest_setting_takes_the_place_of_the_parameters(tmp_path, monkeypatch):
    source = script(tmp_path, ' tags=["parameters"]\nSTEPS, SIZE = 3, 4', "\nprint(STEPS, SIZE)")
    monkeypatch.setitem(run_notebooks.SMALLEST, "00_trial", {"SIZE": 1})
    with pytest.raises(UserError, match="00_trial: has no parameters SIZE"):
        run_notebooks.run_notebook(source, tmp_path / "small.ipynb", smallest=True)
    source = script(tmp_path, ' tags=["parameters"]\nSTEPS = 3\nSIZE = 4', "\nprint(STEPS, SIZE)")
    run_notebooks.run_notebook(source, tmp_path / "small.ipynb", smallest=True)
    assert [output.text for output in outputs(read(tmp_path / "small.ipynb"))] == ["3 1\n"]


def test_command_refuses_what_would_do_harm():
    for arguments, line in (
        (["--smallest"], "--smallest: would replace the notebooks' images"),
        (["99_nothing"], "99_nothing: no such notebook; use 01_"),
    ):
        result = CliRunner().invoke(run_notebooks.run_notebooks, arguments)
        assert isinstance(result.exception, UserError)
        assert str(result.exception).startswith(line)
