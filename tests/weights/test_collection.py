"""Python looks for no garbage while a model is made, and does so again afterwards."""

import gc

import pytest

from keras_sd import UserError, load_part, presets


def test_no_collection_while_a_model_opens(tmp_path):
    collections = []

    def record(phase, information):
        if phase == "start":
            collections.append(information["generation"])

    gc.callbacks.append(record)
    try:
        load_part(presets.find("emoji"), "unet")
        assert not collections and gc.isenabled()
        with pytest.raises(UserError):
            load_part(tmp_path, "unet")
        assert gc.isenabled()
        gc.disable()
        load_part(presets.find("emoji"), "unet")
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.callbacks.remove(record)
