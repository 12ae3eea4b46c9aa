"""Default values of sampling and training, which depend on the model.

A model whose defaults differ from the usual ones names them in `keras_sd.json` in its folder, a file that
diffusers ignores and that `save` writes again:

    {"sampling": {"guidance_scale": 5.0},
     "training": {"lora": {"learning_rate": 0.001, "train_batch_size": 64}}}

This module imports no backend, so that commands can use it before they load one.
"""

from pathlib import Path

from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json, shown
from keras_sd.files.writing import write_json

FILE = "keras_sd.json"
_LARGEST_NUMBER = 2**31

SAMPLING = {"guidance_scale": 7.5}
"""The usual values of sampling: those of Stable Diffusion 1 and 2."""

_COLUMNS = "learning_rate train_batch_size lr_scheduler lr_warmup_steps max_train_steps ema_decay adam_beta2"
# The usual values of each method, for a model of Stable Diffusion 1's size, from diffusers' scripts and
# documentation and from the methods' papers. A variant of a method follows a comma.
_USUAL = {
    "text-to-image": (1e-5, 16, "constant", 100, 1000, 0.9999, 0.999),
    "text-to-image, from scratch": (1e-4, 64, "constant", 1000, 100_000, 0.9999, 0.999),
    "lora": (1e-4, 4, "cosine", 100, 1000, 0.999, 0.999),
    "lcm": (1e-4, 16, "constant", 0, 1000, 0.95, 0.999),
    "dreambooth": (5e-6, 1, "constant", 0, 400, 0.99, 0.999),
    "dreambooth, lora": (1e-4, 1, "constant", 0, 500, 0.99, 0.999),
    "textual-inversion": (5e-4, 4, "constant", 0, 3000, 0.99, 0.999),
    "vae": (1e-5, 4, "constant", 100, 3000, 0.9999, 0.999),
    "vae, from scratch": (1e-4, 8, "constant", 1000, 100_000, 0.9999, 0.999),
    "clip": (5e-4, 256, "cosine", 2000, 30_000, 0.9999, 0.98),
    "ddim": (2e-4, 64, "constant", 1000, 100_000, 0.9999, 0.999),
    "super-resolution": (1e-4, 64, "constant", 1000, 100_000, 0.9999, 0.999),
}


def usual(method, variant=None):
    """Return option -> usual value of a training method, or of a variant such as "lora" of "dreambooth"."""
    row = _USUAL.get(f"{method}, {variant}", _USUAL[method])
    return dict(zip(_COLUMNS.split(), row, strict=True)) | SAMPLING


class ModelDefaults:
    """The default values of one model.

    Args:
        values: the dictionary in its `keras_sd.json`; None for the usual values.
        source: the file, for messages.

    Raises:
        UserError: a section, a method or an option is unknown, or a value has another type.
    """

    def __init__(self, values=None, source=FILE):
        self.values = {} if values is None else values
        self._source = source
        self._check_names(self.values, ("sampling", "training"))
        self._check(self.sampling_values, SAMPLING)
        training = self.values.get("training", {})
        self._check_names(training, _USUAL)
        for method, options in training.items():
            self._check(options, usual(method.partition(",")[0]))

    @classmethod
    def load(cls, source):
        """Read the defaults of a model's folder; without the file they are the usual ones.

        Raises:
            UserError: the file is damaged.
        """
        path = Path(source) / FILE
        values = read_json(path, default=None, remedy="mend or remove the file")
        return cls() if values is None else cls(values, path)

    @property
    def sampling_values(self):
        return self.values.get("sampling", {})

    @property
    def guidance_scale(self):
        """The default guidance scale of sampling."""
        return (SAMPLING | self.sampling_values)["guidance_scale"]

    def training(self, method, variant=None):
        """Return option -> default of a training method: this model's own, otherwise the usual one."""
        own = self.values.get("training", {})
        guidance = {"guidance_scale": self.guidance_scale}
        return usual(method, variant) | guidance | own.get(method, {}) | own.get(f"{method}, {variant}", {})

    def save(self, folder):
        """Write `keras_sd.json` into a model's folder, if the model has values of its own."""
        if self.values:
            write_json(Path(folder) / FILE, self.values)

    def _check_names(self, given, known):
        if not isinstance(given, dict):
            raise UserError(f"{self._source}: {shown(given)} is no object; mend or remove the file")
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise UserError(
                f"{self._source}: {shown(unknown[0])} is unknown; use {', '.join(known)}, or remove it"
            )

    def _check(self, given, known):
        self._check_names(given, known)
        for name, value in given.items():
            kind = type(known[name])
            accepted = (int, float) if kind is float else kind
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise UserError(f"{self._source}: {name} {shown(value)} is no {kind.__name__}; mend the file")
            if kind is not str and not 0 <= value < _LARGEST_NUMBER:
                raise UserError(f"{self._source}: {name} is out of range; give 0 or more")
