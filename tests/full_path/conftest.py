"""The model and the photographs, made once for each file of tests."""

import pytest

from tests.full_path.model import make_model
from tests.full_path.photographs import make_photographs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `model`, Stable Diffusion 1.5's layout with few channels, and `photographs`."""
    folder = tmp_path_factory.mktemp("full_path")
    make_model(folder / "model")
    make_photographs(folder / "photographs")
    return folder
