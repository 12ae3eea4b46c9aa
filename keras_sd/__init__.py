"""Stable Diffusion in Keras 3: train, fine-tune, generate and measure under XLA.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that
`import keras_sd` waits for no backend.

A name whose package is missing raises a `UserError`, also in `hasattr`. As an AttributeError, Python's
`from keras_sd import ...` would say "cannot import name", and not which package to install.
"""

import sys

import lazy_loader

from keras_sd.errors import PackageFinder

__version__ = "0.2.0"

if PackageFinder not in sys.meta_path:
    sys.meta_path.insert(0, PackageFinder)

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
