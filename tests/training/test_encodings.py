"""Examples encoded once before a run."""

import numpy as np

from keras_sd.training.encodings import EncodedSource
from tests import tiny


def test_a_split_source_has_the_examples_of_the_whole():
    generator = np.random.default_rng(0)
    captions = (("red heart",), ("blue heart", "a grinning face"), (), ("woman running",), ("flag of Japan",))
    pictures = generator.integers(0, 256, (len(captions), 16, 16, 3), "uint8")
    source = [{"image": p, "captions": c} for p, c in zip(pictures, captions, strict=True)]
    sd = tiny.pipeline(jit_compile=False)
    whole = EncodedSource(source, sd.vae, sd.text_encoder, sd.tokenizer, batch_size=4, jit_compile=False)
    assert [len(whole[index]["contexts"]) for index in range(len(whole))] == [1, 2, 0, 1, 1]
    first, others = whole.split(2)
    assert (len(first), len(others), others.condition) == (2, 3, "context")
    parts = [part[index] for part in (first, others) for index in range(len(part))]
    for index, example in enumerate(parts):
        for name, array in whole[index].items():
            np.testing.assert_array_equal(example[name], array, err_msg=name)
