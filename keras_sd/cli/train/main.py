"""The group of training commands: `python -m keras_sd.train` and `keras-sd train`."""

import functools

import click

from keras_sd import __version__
from keras_sd.cli.command import HELP_SETTINGS
from keras_sd.cli.config_file import as_toml, given_options
from keras_sd.cli.lazy_commands import LazyCommands
from keras_sd.cli.program import run_command
from keras_sd.errors import UserError

_METHODS = (
    *("text-to-image", "lora", "lcm", "dreambooth", "textual-inversion", "vae", "clip", "ddim"),
    "super-resolution",
)

# Methods by the names of diffusers' scripts, where those are others.
_SCRIPTS = {"text-to-image-lora": "lora", "dreambooth-lora": "dreambooth --lora"}


class MethodGroup(click.Group):
    """A group that trains text-to-image when no method is named."""

    def parse_args(self, context, arguments):
        if arguments and (here := _SCRIPTS.get(arguments[0].replace("_", "-"))):
            raise UserError(f"{arguments[0]}: is called {here} here")
        if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("--help", "--version")):
            arguments = ["text-to-image", *arguments]
        return super().parse_args(context, arguments)


def _describe(command):
    """Have a method watch its process, and record in the run folder how the run was started."""
    callback = command.callback

    @functools.wraps(callback)
    def call(**options):
        from keras_sd.cli.train.processes import watch
        from keras_sd.training.run_folder import described

        if options["plan"] is not None:
            from keras_sd.cli.train.plan import run_plan

            run_plan(command.name, options, lambda options: callback(**options))
            return None
        watch(command.name, options)
        context = click.get_current_context()
        text = as_toml(command.name, given_options(context))
        with described(command.name, dict(options), text):
            return callback(**options)

    command.callback = call


_COMMANDS = LazyCommands(
    {name: f"keras_sd.cli.train.{name.replace('-', '_')}" for name in _METHODS}, prepare=_describe
)


@click.group(cls=MethodGroup, context_settings=HELP_SETTINGS, commands=_COMMANDS)
@click.version_option(__version__, prog_name="python -m keras_sd.train")
def train():
    """Train or fine-tune a model; the method is text-to-image unless another is named."""


def main():
    """Run the training command as a program."""
    run_command(train, "python -m keras_sd.train")
