"""The library names arguments, and commands name their flags for them."""

import ast
import re
import warnings
from pathlib import Path

import click
import pytest

import keras_sd
from keras_sd.cli.command import MAY_BE_EMPTY, Command
from keras_sd.cli.foreign_flags import FOREIGN_FLAGS
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


def flags_of_commands():
    return {
        flag
        for command in all_commands().values()
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--max_train_steps=x",), "'--max-train-steps': 'x' is not a valid integer"),
        (("--resolution", "512,768"), "512,768 is no square; give one side"),
        (("--network_dim", 8), "--network-dim: is called --rank here"),
        (("--model", "sd-1.5"), "--model: is called --pretrained-model-name-or-path here"),
        (
            ("--network_dim=8", "--unet_lr", 1e-4),
            "--network-dim: is called --rank here; --unet-lr: is called --learning-rate here",
        ),
        (("--random_crop",), "--random-crop: use --no-center-crop with --cache-latents off"),
        (
            ("--save_n_epoch_ratio=3",),
            "--save-n-epoch-ratio: use --checkpointing-steps, or --checkpointing-epochs",
        ),
        (("--resolution", "64,64", "--train_data_dir", "/none"), "/none: no such folder"),
    ],
)
def test_flags_of_other_scripts(run_program, given, told):
    from keras_sd.cli.train.main import main

    code, _, errors = run_program(main, "lora", *given)
    assert code == 2 and told in errors.splitlines()[-1], errors


@pytest.mark.parametrize(
    ("script", "here"), [("text_to_image_lora", "lora"), ("dreambooth-lora", "dreambooth --lora")]
)
def test_methods_by_the_names_of_scripts(run_program, script, here):
    from keras_sd.cli.main import cli, main

    code, _, errors = run_program(main, "train", script, "--rank", 4)
    assert code == 2 and errors == f"keras-sd: error: {script}: is called {here} here\n"
    assert here.split()[0] in cli.commands["train"].commands


def test_a_name_that_a_command_lacks_is_not_named(run_program):
    from keras_sd.cli.main import main

    code, _, errors = run_program(main, "generate", "a heart", "--network_dim", 8)
    assert code == 2 and "--rank" not in errors and "--network-dim" in errors


@pytest.mark.parametrize("page", ["data", "finetuning"])
def test_migration_tables_say_what_commands_answer(page):
    """Each flag of another script is taken as it is, or the answer names the flags of the table."""
    text = (PACKAGE.parent / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = text.partition("| kohya | diffusers | here |")[2].split("\n\n")[0].splitlines()[2:]
    own, checked = flags_of_commands(), 0
    assert len(rows) > 10
    for row in rows:
        *others, here = row.strip("|").split("|")
        named = set(re.findall(r"--[a-z][\w-]*", here))
        assert named <= own, row
        for flag in re.findall(r"--[a-z][\w-]*", " ".join(others)):
            flag, checked = flag.replace("_", "-"), checked + 1
            assert flag in own | FOREIGN_FLAGS.keys(), flag
            if flag in FOREIGN_FLAGS and "same" not in here:
                answered = set(re.findall(r"--[a-z][\w-]*", FOREIGN_FLAGS[flag]))
                assert answered <= named | {"--output-dir", "--train-data-dir"}, row
    assert checked > 10


def test_answers_name_flags_that_exist():
    own = flags_of_commands()
    for answer in FOREIGN_FLAGS.values():
        assert set(re.findall(r"--[a-z][\w-]*", answer)) <= own, answer


def test_every_command_takes_num_inference_steps_and_steps():
    from keras_sd.cli.main import cli

    commands = [*cli.commands.values(), *cli.commands["train"].commands.values()]
    named = [command for command in commands if isinstance(command, Command)]
    assert len(named) == len(commands) - 2  # the groups train and lora
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
                given += [other.opts[0], "0.1" if isinstance(other.type, click.types.FloatParamType) else "x"]
        code, _, errors = run_program(main, *name.split(), *given)
        assert code == 2 and errors.count("\n") == 1
        assert errors.startswith(f"keras-sd: error: {title}: empty; give a value"), errors


def test_control_characters_of_names_do_not_reach_the_terminal(run_program, tmp_path):
    from keras_sd.cli.main import main

    code, _, errors = run_program(main, "dataset", tmp_path / "\x1b[31mred")
    assert code == 2 and "\x1b" not in errors and "\\x1b[31mred" in errors
