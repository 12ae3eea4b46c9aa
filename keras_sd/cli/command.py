"""Commands whose errors and warnings name their options, where the library names its arguments."""

import re
import warnings

import click

from keras_sd.errors import UserError

OLD_NAMES = {"--steps": "--num-inference-steps"}
"""Options that were called otherwise once, which they may still be."""

# At the beginning of a line, or marked: `name`, `name=value`.
_ARGUMENT = re.compile(r"^(?P<first>\w+)(?=[ :])|`(?P<marked>\w+)(?:=(?P<value>[^`]*))?`")


class Command(click.Command):
    """A command of this package; each is of this class."""

    def parse_args(self, context, arguments):
        known = {flag for parameter in self.params for flag in parameter.opts}
        renamed = []
        for argument in arguments:
            flag, equals, value = argument.partition("=")
            new = OLD_NAMES.get(flag)
            if new in known and flag not in known and "--" not in renamed:
                warnings.warn(f"{flag}: is called {new} now; use that", stacklevel=2)
                argument = f"{new}{equals}{value}"
            renamed.append(argument)
        return super().parse_args(context, renamed)

    def invoke(self, context):
        try:
            return super().invoke(context)
        except UserError as error:
            error.args = (in_flags(str(error)),)
            raise


def decorated(*options):
    """One decorator that adds all of these options, in this order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def in_flags(text):
    """A line of the library as the running command says it: with its flags for their arguments.

    `num_inference_steps 0: out of range` becomes `--num-inference-steps 0: ...`, and what is marked anywhere
    in the line, such as `` `distribution='auto'` ``, becomes `--distribution auto`. A name that the command
    has no option of stays.
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
        # A file may be called as an option is.
        if name not in options or (match["first"] and name in context.params.values()):
            return match[0]
        option = options[name]
        if value in ("True", "False"):
            return (option.opts if value == "True" else option.secondary_opts)[0]
        return option.opts[0] if value is None else f"{option.opts[0]} {value.strip(chr(39))}"

    return _ARGUMENT.sub(flag, text)
