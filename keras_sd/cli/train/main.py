"""The group of training commands: `python -m keras_sd.train` and `keras-sd train`."""

import functools

import click

from keras_sd.cli.command import HELP_SETTINGS
from keras_sd.cli.config_file import as_toml, given_options
from keras_sd.cli.program import run_command
from keras_sd.cli.train.clip import clip
from keras_sd.cli.train.ddim import ddim
from keras_sd.cli.train.dreambooth import dreambooth
from keras_sd.cli.train.lcm import lcm
from keras_sd.cli.train.lora import lora
from keras_sd.cli.train.super_resolution import super_resolution
from keras_sd.cli.train.text_to_image import text_to_image
from keras_sd.cli.train.textual_inversion import textual_inversion
from keras_sd.cli.train.vae import vae


class MethodGroup(click.Group):
    """A group that trains text-to-image when no method is named."""

    def parse_args(self, context, arguments):
        if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
            arguments = ["text-to-image", *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=MethodGroup, context_settings=HELP_SETTINGS)
def train():
    """Train or fine-tune a model; the method is text-to-image unless another is named."""


def _describing(command):
    """Return a method's function, which records in the run folder how the run was started."""
    callback = command.callback

    @functools.wraps(callback)
    def call(**options):
        from keras_sd.training.run_folder import described

        context = click.get_current_context()
        text = as_toml(command.name, given_options(context))
        with described(command.name, dict(options), text):
            return callback(**options)

    return call


for _command in (text_to_image, lora, lcm, dreambooth, textual_inversion, vae, clip, ddim, super_resolution):
    _command.callback = _describing(_command)
    train.add_command(_command)


def main():
    """Run the training command as a program."""
    run_command(train, "python -m keras_sd.train")
