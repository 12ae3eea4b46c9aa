"""The library names arguments, and commands name their flags for them."""

import ast
import re
import warnings
from pathlib import Path

import click
import pytest

import keras_sd
from keras_sd.cli.command import MAY_BE_EMPTY, Command
from keras_sd.cli.program import run_command
from keras_sd.errors import UserError

PACKAGE = Path(keras_sd.__file__).parent
# What is no flag of a command of ours.
OF_OTHERS = re.compile(r"pip install --no-deps|--(tf_)?xla_\w+")


def strings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_library_speaks_of_no_flags():
    library = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli"]
    assert len(library) > 100
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text}"
        for path in library
        for line, text in strings(path)
        if re.search(r"(?<![\w-])--[a-z]", OF_OTHERS.sub("", text))
    ]
    assert not found


LINES = {
    "num_inference_steps 0: out of range": "--num-inference-steps 0: out of range",
    "num_inference_steps: missing": "--num-inference-steps: missing",
    "fast: has no effect, leave `fast` out": "--fast: has no effect, leave --fast out",
    "kind: unknown; take `kind='auto'`": "--sort: unknown; take --sort auto",
    "training: stopped; take `fast=True` or `fast=False`": "training: stopped; take --fast or --no-fast",
    "folder: no such thing as kind; see `kind_of`": "folder: no such thing as kind; see `kind_of`",
    "num_inference_steps_more: unknown": "num_inference_steps_more: unknown",
}


@pytest.mark.parametrize("is_warning", [False, True])
def test_command_names_its_flags(run_program, is_warning):
    def tell(line, **options):
        if is_warning:
            warnings.warn(line, stacklevel=2)
        else:
            raise UserError(line)

    parameters = [
        click.Argument(["line"]),
        click.Option(["--num-inference-steps"]),
        click.Option(["--sort", "kind"]),
        click.Option(["--fast/--no-fast"]),
    ]
    command = Command("tell", callback=tell, params=parameters)
    kind = "warning" if is_warning else "error"
    for line, told in LINES.items():
        code, _, errors = run_program(lambda: run_command(command, "tell"), line)
        assert (code, errors) == (0 if is_warning else 2, f"tell: {kind}: {told}\n")
    # A file that is called as an option is none.
    _, _, errors = run_program(lambda: run_command(command, "tell"), "kind: exists", "--sort", "kind")
    assert errors == f"tell: {kind}: kind: exists\n"


@pytest.mark.parametrize("old", [["--steps", "4"], ["--steps=4"]])
def test_old_names_work_and_warn_in_one_line(run_program, old):
    option = click.Option(["--num-inference-steps"], type=int)
    command = Command("draw", callback=lambda **options: print(options), params=[option])
    code, output, errors = run_program(lambda: run_command(command, "draw"), *old)
    assert (code, output) == (0, "{'num_inference_steps': 4}\n")
    assert errors == "draw: warning: --steps: is called --num-inference-steps now; use that\n"


def test_every_command_takes_num_inference_steps_and_steps():
    from keras_sd.cli.main import cli

    commands = [*cli.commands.values(), *cli.commands["train"].commands.values()]
    named = [command for command in commands if isinstance(command, Command)]
    assert len(named) == len(commands) - 1  # the group itself
    flags = {
        command.name: {flag for parameter in command.params for flag in parameter.opts} for command in named
    }
    assert not any("--steps" in each for each in flags.values())
    assert {"generate", "evaluate", "upscale", "walk", "lora"} <= {
        name for name, each in flags.items() if "--num-inference-steps" in each
    }


def all_commands():
    from keras_sd.cli.main import cli

    methods = cli.commands["train"].commands
    named = {**cli.commands, **{f"train {method}": command for method, command in methods.items()}}
    return {name: command for name, command in named.items() if isinstance(command, Command)}


@pytest.mark.parametrize("name", all_commands())
def test_empty_values_are_refused_by_their_own_names(run_program, name):
    """An empty name, such as that of an unset shell variable, does not mean the folder where one is."""
    from keras_sd.cli.main import main

    command = all_commands()[name]
    for parameter in command.params:
        is_text = isinstance(parameter.type, click.types.StringParamType | click.Path)
        if not is_text or parameter.name in MAY_BE_EMPTY:
            continue
        title, given = parameter.human_readable_name, []
        for other in command.params:
            value = "" if other is parameter else "x"
            if isinstance(other, click.Argument):
                given.append(value)
            elif other is parameter:
                title = parameter.opts[0]
                given.append(f"{title}=")
            elif other.required:
                given += [other.opts[0], "x"]
        code, _, errors = run_program(main, *name.split(), *given)
        assert code == 2 and errors.count("\n") == 1
        assert errors.startswith(f"keras-sd: error: {title}: empty; give a value"), errors
