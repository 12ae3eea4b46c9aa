"""Stable Diffusion in Keras 3: train, fine-tune, generate and measure under XLA.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that
`import keras_sd` waits for no backend.
"""

from typing import Any

import lazy_loader

from keras_sd.errors import UserError, missing_package

__version__ = "0.1.0"

_import_public, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]


def __getattr__(name: str) -> Any:
    try:
        return _import_public(name)
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        instead = "set KERAS_BACKEND=jax where JAX is installed"
        raise UserError(missing_package("tensorflow", instead)) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
