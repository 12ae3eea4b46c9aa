"""Training from the command line: `python -m keras_sd.train [METHOD] [OPTIONS]`."""

import click

from keras_sd import (
    finetune,
    finetune_dreambooth,
    finetune_lcm,
    finetune_textual_inversion,
    train_from_scratch,
)
from keras_sd.errors import run_command


class MethodGroup(click.Group):
    """A group that trains text-to-image when no method is named."""

    def parse_args(self, context, arguments):
        if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
            arguments = ["text-to-image", *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=MethodGroup)
def train():
    """Train a part of a model: text-to-image unless another method is named."""


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
    train.add_command(_command)


if __name__ == "__main__":
    run_command(train, "python -m keras_sd.train")
