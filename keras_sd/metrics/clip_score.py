"""CLIP score: how well images fit their captions, to a CLIP (Hessel et al., 2021)."""

import numpy as np
from keras import ops

from keras_sd.errors import UserError
from keras_sd.metrics.features import FeatureExtractor, extract


def clip_score(image_embeddings, text_embeddings):
    """Return the mean over pairs of 100 * max(cosine, 0), 0 to 100; both are `(n, d)` of any length."""
    images, texts = (np.asarray(rows, "float64") for rows in (image_embeddings, text_embeddings))
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise UserError(f"CLIP score of {images.shape} and {texts.shape}: give one text for each image")
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return float(np.mean(100 * np.maximum((images * texts).sum(axis=1) / lengths, 0)))


class ClipImageEmbeddings(FeatureExtractor):
    """Images in the space that CLIP's towers share."""

    def __init__(self, image_encoder, jit_compile=True):
        super().__init__(image_encoder, image_encoder.config.image_size, "clip_score", jit_compile)

    def features(self, images):
        return self.network(images)


def embed_captions(text_encoder, tokenizer, text_projection, captions, batch_size=200):
    """Captions in the space that CLIP's towers share, float32 `(n, projection_dim)`.

    Args:
        text_encoder, tokenizer: the text tower and its tokenizer.
        text_projection: its projection `(projection_dim, hidden_size)`, as published files hold it.
        captions: a list of texts.
    """
    ids = tokenizer(list(captions))
    pooled = [
        ops.convert_to_numpy(text_encoder.pooled(ids[start : start + batch_size]))
        for start in range(0, len(ids), batch_size)
    ]
    return np.concatenate(pooled) @ np.asarray(text_projection, "float32").T


class ClipScore:
    """The CLIP score of images for captions that are known beforehand.

    Args:
        pipeline: with an image encoder and the head that belongs to it.
        captions: name of a set -> its captions. They are embedded now, so that a text encoder that is trained
            does not change the yardstick.
        jit_compile: whether XLA compiles on TensorFlow.
    """

    def __init__(self, pipeline, captions, jit_compile=True):
        self._images = ClipImageEmbeddings(pipeline.image_encoder, jit_compile)
        projection = pipeline.clip_head["text_projection.weight"]
        self._texts = {
            name: embed_captions(pipeline.text_encoder, pipeline.tokenizer, projection, texts)
            for name, texts in captions.items()
        }

    def __call__(self, name, images):
        """Return the score of uint8 images, one for each caption of a set."""
        return clip_score(extract(self._images, images), self._texts[name])
