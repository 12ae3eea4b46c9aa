"""Training from the command line: `python -m keras_sd.train [METHOD] [OPTIONS]`."""

import functools
import sys

try:
    import click

    from keras_sd import (
        finetune,
        finetune_dreambooth,
        finetune_lcm,
        finetune_textual_inversion,
        train_from_scratch,
    )
    from keras_sd.errors import run_command
except KeyboardInterrupt:
    if __name__ != "__main__":
        raise
    sys.exit(130)  # without a traceback


class MethodGroup(click.Group):
    """A group that trains text-to-image when no method is named."""

    def parse_args(self, context, arguments):
        if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
            arguments = ["text-to-image", *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=MethodGroup)
def train():
    """Train a part of a model: text-to-image unless another method is named."""


def _describing(command):
    """A method's function, whose run keeps how it was started."""
    callback = command.callback

    @functools.wraps(callback)
    def call(**options):
        from keras_sd.training.run_folder import described

        with described(command.name, dict(options)):
            return callback(**options)

    return call


for _command in (
    finetune.text_to_image,
    finetune.lora,
    finetune_lcm.lcm,
    finetune_dreambooth.dreambooth,
    finetune_textual_inversion.textual_inversion,
    train_from_scratch.vae,
    train_from_scratch.clip,
    train_from_scratch.ddim,
    train_from_scratch.super_resolution,
):
    _command.callback = _describing(_command)
    train.add_command(_command)


if __name__ == "__main__":
    try:
        run_command(train, "python -m keras_sd.train")
    except KeyboardInterrupt:  # before it deals with that
        sys.exit(130)
