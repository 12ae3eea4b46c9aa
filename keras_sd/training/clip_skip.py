"""Training with a layer of the text encoder before its last one (clip skip)."""

from keras_sd import backend
from keras_sd.models.layers import LowRankUpdate
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder


def skip_layers(text_encoder: TextEncoder, count: int) -> None:
    """Leave out the last layers of a text encoder from now on; they are frozen, and have no LoRA.

    Call this before anything is compiled with the encoder.

    Args:
        text_encoder: the encoder.
        count: number of layers to skip, as diffusers counts; 0 changes nothing.

    Raises:
        UserError: there are not so many layers.
    """
    depth = text_encoder.depth(count)
    text_encoder.clip_skip = count
    for block in text_encoder.encoder.layers[depth:]:
        for layer in {id(one.layer): one.layer for one in parameter_paths(block)}.values():
            if isinstance(layer, LowRankUpdate) and layer.lora_A is not None:
                for update in (layer.lora_A, layer.lora_B):
                    backend.forget(layer, update)
                layer.lora_A = layer.lora_B = None
        for variable in block.weights:
            variable.trainable = False
