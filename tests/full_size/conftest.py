"""The small model of the full path, which the methods of training begin with."""

from tests.full_path.conftest import folder

__all__ = ["folder"]
