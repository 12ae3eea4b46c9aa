"""Commands whose errors and warnings name options where the library's messages name arguments."""

import itertools
import re
import warnings

import click

from keras_sd.cli import config_file
from keras_sd.cli.foreign_flags import FOREIGN_FLAGS, answer_to
from keras_sd.cli.option_groups import grouped
from keras_sd.errors import UserError

HELP_SETTINGS = {"show_default": True, "max_content_width": 110}
"""Context settings of the groups, for the help of all their commands."""

OLD_NAMES = {"--steps": "--num-inference-steps"}
"""Former names of options, which are still accepted."""

TAKEN_NAMES = {"--random-crop": "--crop-size"}
"""Former names of options that would be read as something else today, and are refused."""

MAY_BE_EMPTY = {"prompt", "prompts", "negative_prompt", "validation_prompts"}
"""Names of parameters that may be an empty text: what an image shows."""

# An argument at the beginning of a line, or marked anywhere: `name`, `name=value`.
_ARGUMENT = re.compile(r"^(?P<first>\w+)(?=[ :])|`(?P<marked>\w+)(?:=(?P<value>[^`]*))?`")


class Command(click.Command):
    """The class of all commands of this package."""

    def parse_args(self, context, arguments):
        known = {flag for parameter in self.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        renamed = []
        answers = {}
        for argument in arguments:
            flag, equals, value = argument.partition("=")
            if "--" not in renamed and flag not in known:
                hyphened = flag.replace("_", "-")  # as diffusers' and kohya's scripts are called
                if hyphened in known | TAKEN_NAMES.keys() | FOREIGN_FLAGS.keys():
                    flag, argument = hyphened, f"{hyphened}{equals}{value}"
            new = TAKEN_NAMES.get(flag)
            if new in known and flag not in known and "--" not in renamed:
                raise UserError(f"{flag}: is called {new} now; --no-center-crop crops at random")
            new = OLD_NAMES.get(flag)
            if new in known and flag not in known and "--" not in renamed:
                warnings.warn(f"{flag}: is called {new} now; use that", stacklevel=2)
                argument = f"{new}{equals}{value}"
            elif flag not in known and "--" not in renamed:
                answer = answer_to(flag, known)
                if answer is not None:
                    answers[flag] = answer
            renamed.append(argument)
        if answers:
            raise UserError("; ".join(f"{flag}: {answer}" for flag, answer in answers.items()))
        self._warn_of_repeated(renamed)
        if config_file.FLAG in known:
            renamed = config_file.with_config_file(self, renamed)
        try:
            return super().parse_args(context, renamed)
        except click.UsageError as error:
            error.ctx = error.ctx or context  # the parser does not always know the command
            raise

    def format_options(self, context, formatter):
        for title, options in grouped(self.get_params(context)).items():
            with formatter.section(title):
                formatter.write_dl([option.get_help_record(context) for option in options])

    def _warn_of_repeated(self, arguments):
        """Warn of options that are given twice although one value counts."""
        single = [one for one in self.params if isinstance(one, click.Option) and not one.multiple]
        option_of = {flag: one for one in single for flag in (*one.opts, *one.secondary_opts)}
        seen = set()
        for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
            option = option_of.get(argument.partition("=")[0])
            if option is not None and option in seen:
                warnings.warn(f"{option.opts[0]}: is given twice; the last one counts", stacklevel=4)
            seen.add(option)

    def invoke(self, context):
        _refuse_empty(context)
        try:
            return super().invoke(context)
        except UserError as error:
            error.args = (in_flags(str(error)),)
            raise


def _refuse_empty(context):
    """Raise UserError for an empty text, such as that of an unset shell variable; a path would mean "."."""
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        texts = value if isinstance(value, tuple) else (value,)
        empty = [text for text in texts if isinstance(text, str) and not text.strip()]
        if empty and parameter.name not in MAY_BE_EMPTY:
            is_option = isinstance(parameter, click.Option)
            title = parameter.opts[0] if is_option else parameter.human_readable_name
            remedy = "give a value" if parameter.required else "give a value, or leave it out"
            raise UserError(f"{title}: empty; {remedy}")


def decorated(*options):
    """Return one decorator that adds all of these options, in this order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def is_given(name):
    """Return whether the user has given an option of the running command, or its file of options has."""
    given = click.get_current_context().get_parameter_source(name)
    return given is click.core.ParameterSource.COMMANDLINE


def refuse_unused(names, has_effect, reason):
    """Raise UserError if the user has given some of the named options although they have no effect.

    Args:
        reason: the cause, as the rest of the message "--name: has no effect ...".
    """
    if has_effect:
        return
    parameters = click.get_current_context().command.params
    flags = [one.opts[0] for one in parameters if one.name in names and is_given(one.name)]
    if flags:
        has, it = ("has", "it") if len(flags) == 1 else ("have", "them")
        raise UserError(f"{', '.join(flags)}: {has} no effect {reason}; leave {it} out")


def in_flags(text):
    """Return a message of the library with the running command's flags in place of arguments.

    `num_inference_steps 0: out of range` becomes `--num-inference-steps 0: ...`. An argument anywhere in the
    line is marked: `` `distribution='auto'` `` becomes `--distribution auto`. A name that is no option of the
    command is left as it is.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return text
    options = {
        parameter.name: parameter
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
    }

    def flag(match):
        name, value = match["first"] or match["marked"], match["value"]
        # A file may have the name of an option.
        if name not in options or (match["first"] and name in context.params.values()):
            return match[0]
        option = options[name]
        if value in ("True", "False"):
            return (option.opts if value == "True" else option.secondary_opts)[0]
        return option.opts[0] if value is None else f"{option.opts[0]} {value.strip(chr(39))}"

    return _ARGUMENT.sub(flag, text)
