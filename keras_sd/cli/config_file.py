"""All options of a training command from a TOML file, as kohya's scripts read it (`config_file`).

A key is the name of an option, with underscores or hyphens. Sections group keys and mean nothing. What the
file says becomes arguments before those of the command line, which therefore win.
"""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

import click

from keras_sd.cli.foreign_flags import FOREIGN_FLAGS, answer_to
from keras_sd.cli.option_types import SIDE
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_text, shown

FLAG = "--config-file"
_NOT_KEPT = ("config_file", "resume_from_checkpoint")
# A length is given in one of two ways; that of the command line counts.
_COUNTERPARTS = {
    "num_train_epochs": "--max-train-steps",
    "max_train_steps": "--num-train-epochs",
    "checkpointing_epochs": "--checkpointing-steps",
    "checkpointing_steps": "--checkpointing-epochs",
}
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

config_file_option = click.option(
    FLAG,
    help="TOML file of options, which those of the command line replace. Keys are the options' names, in "
    "sections of any name. A run keeps its own as `options.toml`.",
)


class UnknownKeys(UserError):
    """Several keys of a file are no options of the command.

    Attributes:
        faults: one line of each, with what to use.
    """

    def __init__(self, path: Path, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"{path}: {len(faults)} keys are no options of this command; change or remove them")


def with_config_file(command: click.Command, arguments: list[str]) -> list[str]:
    """Return the arguments of a command with those of its file of options before them.

    Args:
        command: a command that has the option.
        arguments: flags with hyphens.

    Raises:
        UserError: the file is missing or no TOML, a key is no option, or a value does not fit.
    """
    name = _value_of(FLAG, arguments)
    if name is None:
        return arguments
    if not name.strip():
        raise UserError(f"{FLAG}: empty; give a value, or leave it out")
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"{FLAG} {path}: a folder, not a file; give a TOML file")
    if not path.is_file() and Path(f"{path}.toml").is_file():  # as kohya's scripts name it
        path = Path(f"{path}.toml")
    options = _read(path)
    known = {
        flag: parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    typed = {known.get(argument.partition("=")[0]) for argument in arguments}
    given: dict[click.Option, str] = {}
    words: list[str] = []
    for key, parameter in _options_of(path, options, known).items():
        value = options[key]
        if parameter in given:
            raise UserError(f"{path}: {given[parameter]} and {key} are one option; remove one of them")
        given[parameter] = key
        found = _arguments(path, key, value, parameter)
        counterpart = known.get(_COUNTERPARTS.get(parameter.name or "", ""))
        if parameter not in typed and (counterpart is None or counterpart not in typed):
            words += found
    return words + arguments


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """Return the last value of an option among arguments; None if it is not given."""
    value = None
    for place, argument in enumerate(arguments):
        name, equals, given = argument.partition("=")
        if argument == "--":
            break
        if name == flag:
            value = given if equals else next(iter(arguments[place + 1 : place + 2]), None)
    return value


def _read(path: Path) -> dict[str, Any]:
    """Return key -> value of all sections."""
    try:
        content = tomllib.loads(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{FLAG} {path}: no such file; correct the path") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{FLAG} {path}: not valid TOML ({error}); correct it") from error
    options: dict[str, Any] = {}
    for key, value in content.items():
        table = value if isinstance(value, dict) else {key: value}
        for name, inner in table.items():
            if isinstance(inner, dict):
                raise UserError(f"{path}: {key}.{name} is a section in a section; put its keys into {key}")
            if name in options:
                raise UserError(f"{path}: {name} is given twice; remove one of them")
            options[name] = inner
    return options


def _options_of(
    path: Path, options: dict[str, Any], known: dict[str, click.Option]
) -> dict[str, click.Option]:
    """Return key -> option, without the keys of other scripts that are turned off.

    Raises:
        UserError: some keys are no options; all of them are named.
    """
    found: dict[str, click.Option] = {}
    faults: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if flag in known and flag != FLAG:
            found[key] = known[flag]
        elif flag not in FOREIGN_FLAGS or not (value is False or value in ("", [])):
            faults.append(f"{path}: {_remedy(key, flag, known)}")
    if len(faults) > 1:
        raise UnknownKeys(path, faults)
    if faults:
        raise UserError(faults[0])
    return found


def _remedy(key: str, flag: str, known: dict[str, click.Option]) -> str:
    """Return what to use in place of a key that is no option."""
    answer = answer_to(flag, known)
    if answer is not None:
        return f"{key}: {answer}"
    flags = [name for name, one in known.items() if name != FLAG and name in one.opts]
    nearest = difflib.get_close_matches(flag, flags, n=1)
    remedy = f"the nearest is {nearest[0][2:].replace('-', '_')}" if nearest else "remove it"
    return f"{key} is no option of this command; {remedy}"


def _arguments(path: Path, key: str, value: Any, parameter: click.Option) -> list[str]:
    """Return what stands for a key on the command line.

    Raises:
        UserError: the value does not fit the option.
    """
    flag = f"--{key.replace('_', '-')}"
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise _misfit(path, key, value, "true or false")
        opposite = parameter.secondary_opts if flag in parameter.opts else parameter.opts
        return [flag] if value else opposite[:1]
    if value is True and isinstance(parameter.flag_value, str):  # it may stand without a value
        return [flag]
    values = value if isinstance(value, list) and parameter.multiple else [value]
    return [f"{flag}={_text(path, key, one, parameter)}" for one in values]


def _text(path: Path, key: str, value: Any, parameter: click.Option) -> str:
    """Return a value as it is on the command line, after the option's own check."""
    kind = parameter.type
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(kind, click.types.IntParamType):
        fits = (is_number and isinstance(value, int)) or (kind is SIDE and isinstance(value, str))
    elif isinstance(kind, click.types.FloatParamType):
        fits = is_number
    elif isinstance(kind, click.Choice):
        fits = isinstance(value, str) or (is_number and str(value) in kind.choices)
    else:
        fits = isinstance(value, str)
    if not fits:
        title = _title(kind)
        if isinstance(value, list):
            title = f"{title}; write several in one text, with commas" if title == "a text" else title
        raise _misfit(path, key, value, title)
    text = str(value)
    try:
        kind.convert(text, parameter, click.get_current_context(silent=True))
    except click.BadParameter as error:
        raise UserError(f"{path}: {key}: {error.message.rstrip('.')}; correct it") from error
    return text


def _title(kind: click.ParamType) -> str:
    if isinstance(kind, click.types.IntParamType):
        return "a whole number"
    if isinstance(kind, click.types.FloatParamType):
        return "a number"
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    return "a text"


def _misfit(path: Path, key: str, value: Any, title: str) -> UserError:
    return UserError(f"{path}: {key} {shown(value)}: not {title}; correct it")


def given_options(context: click.Context) -> dict[str, Any]:
    """Return the options of a command that were given, by their names with underscores, as TOML has them."""
    given = {}
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            value = context.params[name]
            key = parameter.opts[0].lstrip("-").replace("-", "_")
            if name not in _NOT_KEPT and value is not None:
                given[key] = list(value) if isinstance(value, tuple) else value
    return given


def as_toml(method: str, options: dict[str, Any]) -> str:
    """Return the options of a run as a file that `--config-file` reads.

    Args:
        method: the name of the training command.
        options: key -> text, number, bool, or list of texts.
    """
    lines = [f"{key} = {_toml_value(value)}" for key, value in options.items()]
    command = f"python -m keras_sd.train {method} --config-file THIS_FILE --output-dir ANOTHER_FOLDER"
    return "\n".join([f"# {command}", *lines, ""])


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return '"' + re.sub(r'[\x00-\x1f\x7f"\\]', lambda match: f"\\u{ord(match[0]):04x}", str(value)) + '"'
