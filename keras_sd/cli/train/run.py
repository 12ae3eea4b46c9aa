"""What a training command has after its checks: settings, images, options, and the checkpoint to resume."""

import dataclasses
import shlex
import sys
from pathlib import Path

from keras_sd.cli.train.epochs import images_of_epoch, updates_of_epochs
from keras_sd.cli.train.framing import check_sides, framed, framing_of
from keras_sd.data.framing import FramedSource


@dataclasses.dataclass
class Run:
    """The result of `preparation.prepare`.

    Attributes:
        settings: `trainer.Settings`.
        source, held_out: the checked sources of training images and of held-out ones (empty if there are
            none), not yet at the training resolution; None if the method reads its own.
        model: path of the pretrained model, or None.
        options: all options of the command, with the model's defaults filled in.
        checkpoint: folder of the checkpoint to resume from, or None.
        counts_repeats: whether an epoch shows images as often as their repeats say.
        command: the command that uses the model, and what it takes before a prompt.
        inception: the feature extractor of KID if it is Inception v3.
    """

    settings: object
    source: object
    held_out: object
    model: Path | None
    options: dict
    checkpoint: Path | None = None
    counts_repeats: bool = True
    command: tuple = ("generate",)
    inception: object = None

    def resolution(self, own_size):
        """Return the side of the run's square images in pixels; `own_size` is that of the model's."""
        return self.options["resolution"] or own_size

    def sources(self, own_size, factor=1):
        """Return the framed training source, the held-out one in squares, and the repeats per epoch.

        Args:
            own_size: side in pixels of the model's images, the default resolution.
            factor: pixels along a side for each latent value.

        Raises:
            UserError: images do not fit, or a checkpoint to resume has other sizes or crops.
        """
        source = self.framed(self.source, own_size, factor)
        self.source = source.source  # without images that are too small
        held_out = FramedSource(self.held_out, source.framing.of_squares()) if self.held_out else ()
        repeats = source.repeats() if self.counts_repeats else None
        self.count_epochs(source, repeats)
        return source, held_out, repeats

    def count_epochs(self, source, repeats=None):
        """Count the updates of epochs anew, as images that are too small were left out."""
        from keras_sd import backend

        images = images_of_epoch(source, repeats)
        counted = updates_of_epochs(self.options, images, self.checkpoint)
        changed = {name: steps for name, steps in counted.items() if steps != getattr(self.settings, name)}
        if changed:
            self.options.update(changed)
            self.settings = dataclasses.replace(self.settings, **changed)
        if "max_train_steps" in changed and backend.process_index() == 0:
            steps = changed["max_train_steps"]
            print(f"epochs of {images} images: {steps} steps", file=sys.stderr, flush=True)

    def framed(self, source, own_size, factor=1):
        """Return a source with its images framed as the options say, and print what is cropped away."""
        from keras_sd.training.checkpoints import check_same_run

        framing = framing_of(self.options, own_size)
        check_sides(framing, factor)
        if self.checkpoint is not None:
            check_same_run(self.checkpoint, {"framing": framing.identity()})
        on_bad_sample = self.options.get("on_bad_sample") or "error"
        return framed(source, framing, self.settings.train_batch_size, on_bad_sample)

    def print_next_command(self, option=None, result="", prompt="PROMPT", more=()):
        """Print a command that generates with what was trained.

        Args:
            option: the option that adds the result to the pretrained model; None for a whole model.
            result: path of the result in the run's folder `model`.
            prompt: an example of a prompt.
            more: further words of the command.
        """
        from keras_sd import backend

        if backend.process_index():
            return
        if self.options.get("clip_skip", 1) > 1:
            more = ["--clip-skip", self.options["clip_skip"], *more]
        words = [option or "--model", self.settings.output_dir / "model" / result]
        base = self.options["pretrained_model_name_or_path"]
        if option and base != "emoji":  # which is the default
            words = ["--model", base, *words]
        command = shlex.join(map(str, ["keras-sd", *self.command, prompt, *words, *more]))
        print(f"generate with it: {command}", file=sys.stderr, flush=True)
