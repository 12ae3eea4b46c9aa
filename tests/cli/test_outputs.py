"""What is there already stays, unless it is given up."""

import pytest

from keras_sd.cli.main import main
from keras_sd.cli.outputs import check_output, check_output_folder
from keras_sd.errors import UserError


def beside(path):
    return [path.with_suffix(".md")]


def test_default_names_are_numbered(tmp_path):
    default = tmp_path / "results.json"

    def chosen(**options):
        return check_output(None, ".json", default=default, beside=beside, **options).path.name

    assert chosen() == "results.json"
    default.with_suffix(".md").touch()
    (tmp_path / "results-1.json").symlink_to("nowhere")
    assert chosen() == "results-2.json"
    assert chosen(overwrite=True) == "results.json"


def test_named_ones_are_refused(tmp_path):
    (tmp_path / "taken.md").touch()
    with pytest.raises(UserError, match="taken.md: exists"):
        check_output(tmp_path / "taken.json", ".json", beside=beside)
    assert check_output(tmp_path / "taken.json", ".json", beside=beside, overwrite=True)


@pytest.mark.parametrize(
    "name, line",
    [
        ("x.png/.", "x.png/.: is a folder"),
        ("x.png/", "is a folder"),
        ("a/.png", "not a .png file; name it .*a/image.png"),
    ],
)
def test_names_that_are_none_of_a_file(tmp_path, name, line):
    with pytest.raises(UserError, match=line):
        check_output(f"{tmp_path}/{name}", ".png")


def test_what_has_appeared_meanwhile_stays(tmp_path):
    output = check_output(tmp_path / "image.png", ".png")
    overwriting = check_output(tmp_path / "image.png", ".png", overwrite=True)
    assert output.free() == tmp_path / "image.png"
    (tmp_path / "image.png").touch()
    with pytest.warns(UserWarning, match="written by another program meanwhile; this goes to .*image-1.png"):
        assert output.free() == tmp_path / "image-1.png"
    assert overwriting.free() == tmp_path / "image.png"


def test_folders(tmp_path):
    def chosen(path=None, overwrite=False):
        return check_output_folder(path, tmp_path / "demo", overwrite, lambda path: (path / "own").exists())

    assert chosen().name == "demo"
    (tmp_path / "demo").mkdir()
    assert chosen().name == "demo-1"
    assert chosen(tmp_path / "demo").name == "demo"
    (tmp_path / "demo" / "file").touch()
    with pytest.raises(UserError, match="demo: exists"):
        chosen(tmp_path / "demo")
    with pytest.raises(UserError, match="demo: holds something else"):
        chosen(tmp_path / "demo", overwrite=True)
    (tmp_path / "demo" / "own").touch()
    assert chosen(tmp_path / "demo", overwrite=True).name == "demo"
    with pytest.raises(UserError, match="file: is a file"):
        chosen(tmp_path / "demo" / "file")


def test_plots_keep_what_is_there_too(tmp_path, run_program):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 0.5}\n')

    def plot(*options):
        return run_program(main, "plot", run, *options)

    assert plot()[:2] == (0, f"{run / 'plot.png'}\n")
    assert plot()[:2] == (0, f"{run / 'plot-1.png'}\n")
    kept = (run / "plot.png").read_bytes()
    assert kept.startswith(b"\x89PNG")
    code, _, errors = plot("--output", run / "plot.png")
    assert code == 2 and (run / "plot.png").read_bytes() == kept
    assert errors == (
        f"keras-sd: error: {run / 'plot.png'}: exists; choose another name, or replace it with --overwrite\n"
    )
    assert plot("--output", run / "plot.png", "--overwrite")[0] == 0
    assert {path.name for path in run.iterdir()} == {"logs", "plot.png", "plot-1.png"}
    code, _, errors = plot(run)
    assert code == 2 and "RUN: a run folder is named twice" in errors
