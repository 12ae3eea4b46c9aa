"""The help of every command has an example that the command understands, and its options in groups."""

import re
import shlex
from pathlib import Path

import click
import pytest

import keras_sd
from keras_sd.cli.main import cli
from keras_sd.cli.option_groups import OTHER, TASKS, TRAINING, grouped
from tests.programs import run_python

TOOLS = Path(__file__).resolve().parents[2] / "tools"
METHODS = {f"python -m keras_sd.train {name}" for name in cli.commands["train"].commands}


def commands(command, path):
    if isinstance(command, click.Group):
        path = path.replace("keras-sd train", "python -m keras_sd.train")
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")
    else:
        yield path, command


COMMANDS = dict(commands(cli, "keras-sd"))


@pytest.mark.parametrize("path", COMMANDS)
def test_help_has_examples_that_are_understood(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = COMMANDS[path]
    text = command.get_help(click.Context(command, info_name=path, max_content_width=110))
    examples = re.findall(rf"^  ({re.escape(path)}\b.*)$", text, re.MULTILINE)
    assert examples, text
    for example in examples:
        command.make_context(path, shlex.split(example)[len(path.split()) :])


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_shown_once_in_its_group(path):
    command = COMMANDS[path]
    context = click.Context(command)
    groups = grouped(command.get_params(context))
    shown = [option.name for options in groups.values() for option in options]
    assert sorted(shown) == sorted(
        one.name for one in command.get_params(context) if isinstance(one, click.Option)
    )
    if path in METHODS:
        assert set(groups) <= {*TRAINING, OTHER} and {"Input", "Training", "Output"} <= set(groups)
    # What stands alone is an option that keras_sd/cli/option_groups.py does not know.
    assert all(option.opts == ["--help"] for option in groups.get(OTHER, ()))
    titles = [f"{title}:" for title in groups]
    text = command.get_help(context)
    assert [line for line in text.splitlines() if line in titles] == titles


def test_groups_name_an_option_once():
    for groups in (TASKS, TRAINING):
        names = " ".join(groups.values()).split()
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "program",
    [["-m", "keras_sd"], ["-m", "keras_sd.train"], [TOOLS / "bench.py"], [TOOLS / "convert_weights.py"]],
)
def test_programs_tell_their_version(program):
    assert run_python([*program, "--version"], "tensorflow").endswith(f", version {keras_sd.__version__}\n")


def test_shell_completes_commands_and_options():
    code = "import sys; sys.argv[0] = 'keras-sd'; from keras_sd.__main__ import main; main()"
    for words, expected in (
        ("keras-sd gen", "generate"),
        ("keras-sd generate --guidance-s", "--guidance-scale"),
    ):
        variables = {
            "_KERAS_SD_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        assert run_python(["-c", code], "tensorflow", **variables) == f"plain,{expected}\n"
