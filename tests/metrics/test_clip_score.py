"""CLIP score against transformers' CLIPModel."""

import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.metrics.clip_score import ClipScore, clip_score
from keras_sd.models.image_encoder import PIXEL_DEVIATION, PIXEL_MEAN
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.reference import run_reference

CAPTIONS = ["red heart", "flag of Japan", "a grinning face"]

SCRIPT = """
from transformers import CLIPConfig, CLIPModel

text = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=12, bos_token_id=BEGIN, eos_token_id=END)
vision = dict(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
              num_attention_heads=2)
model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
weights = {name[8:]: value for name, value in inputs.items() if name.startswith("weights/")}
result = model.load_state_dict(weights, strict=False)
assert not result.unexpected_keys and all("position_ids" in name for name in result.missing_keys), result
cosines = model(input_ids=inputs["ids"].long(), pixel_values=inputs["pixels"]).logits_per_image
outputs["cosines"] = cosines.diagonal() / model.logit_scale.exp()
"""


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny.pipeline(jit_compile=False)
    head = np.random.default_rng(0).standard_normal((12, 16)).astype("float32")
    pipeline.clip_head = {"text_projection.weight": head, "logit_scale": np.array(2.5, "float32")}
    return pipeline


def test_score_is_that_of_transformers(pipeline, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype="uint8")
    pixels = (images / 255 - PIXEL_MEAN) / PIXEL_DEVIATION
    weights = torch_state(pipeline.text_encoder) | torch_state(pipeline.image_encoder) | pipeline.clip_head
    inputs = {f"weights/{name}": np.ascontiguousarray(array) for name, array in weights.items()}
    inputs |= {
        "ids": pipeline.tokenizer(CAPTIONS),
        "pixels": pixels.transpose(0, 3, 1, 2).astype("float32").copy(),
    }
    words = pipeline.tokenizer
    numbers = {"VOCABULARY": words.vocab_size, "BEGIN": words.begin_token_id, "END": words.end_token_id}
    script = SCRIPT
    for name, number in numbers.items():
        script = script.replace(name, str(number))
    expected = run_reference(script, inputs, tmp_path)["cosines"]
    score = ClipScore(pipeline, {"held_out": CAPTIONS})
    assert score("held_out", images) == pytest.approx(100 * np.maximum(expected, 0).mean(), abs=1e-3)
    for index in range(3):
        alone = ClipScore(pipeline, {"one": CAPTIONS[index : index + 1]})("one", images[index : index + 1])
        assert alone == pytest.approx(100 * max(expected[index], 0), abs=1e-3)
    assert (expected > 0.01).any()


def test_vectors_that_point_apart_count_as_nothing():
    assert clip_score([[2.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, -5.0]]) == 50
    assert clip_score([[1.0, 1.0]], [[1.0, 0.0]]) == pytest.approx(100 / np.sqrt(2))
    with pytest.raises(UserError, match="one text for each image"):
        clip_score(np.ones((2, 3)), np.ones((3, 3)))
