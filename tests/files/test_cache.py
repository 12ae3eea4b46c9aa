"""The folder of the cache, and how it is turned off."""

from pathlib import Path

import pytest

from keras_sd.files.cache import VARIABLE, cache_root


@pytest.mark.parametrize("value", ["", "off", "OFF", "0", "none", "false", "no"])
def test_values_that_turn_the_cache_off(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    assert cache_root() is None


def test_any_other_value_is_a_folder(monkeypatch):
    monkeypatch.setenv(VARIABLE, "~/kept")
    assert cache_root() == Path("~/kept").expanduser()
