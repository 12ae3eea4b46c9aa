"""All readers of the campaign, by name."""

from tests.robustness import image_readers, model_readers, text_readers, weight_readers  # noqa: F401
from tests.robustness.reader import READERS

__all__ = ["READERS"]
