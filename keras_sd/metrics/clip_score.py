"""CLIP score: how well images fit their captions according to CLIP (Hessel et al., 2021)."""

import numpy as np
import numpy.typing as npt

from keras_sd.errors import UserError
from keras_sd.metrics.features import FeatureExtractor, extract
from keras_sd.models.batches import in_batches


def clip_score(image_embeddings: npt.ArrayLike, text_embeddings: npt.ArrayLike) -> float:
    """Return the mean over pairs of 100 * max(cosine, 0), from 0 to 100.

    Both arguments are `(n, d)`; their rows need not be normalised.
    """
    images, texts = (np.asarray(rows, "float64") for rows in (image_embeddings, text_embeddings))
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise UserError(f"CLIP score of {images.shape} and {texts.shape}: give one text for each image")
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise UserError("CLIP score: not all embeddings are finite numbers; check the model")
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    if not lengths.all():
        raise UserError("CLIP score: an embedding is zero, which has no direction; check the model")
    return float(np.mean(100 * np.maximum((images * texts).sum(axis=1) / lengths, 0)))


class ClipImageEmbeddings(FeatureExtractor):
    """Embeds images in CLIP's shared space."""

    def __init__(self, image_encoder, jit_compile=True):
        super().__init__(image_encoder, image_encoder.config.image_size, "clip_score", jit_compile)

    def features(self, images):
        return self.network(images)


def embed_captions(text_encoder, tokenizer, text_projection, captions, batch_size=200):
    """Embed captions in CLIP's shared space, float32 `(n, projection_dim)`.

    Args:
        text_encoder, tokenizer: the text tower and its tokenizer.
        text_projection: its projection matrix `(projection_dim, hidden_size)`, in torch layout.
        captions: a list of texts.
    """
    ids = tokenizer(list(captions))
    return in_batches(text_encoder.pooled, ids, batch_size) @ np.asarray(text_projection, "float32").T


class ClipScore:
    """The CLIP score of images for sets of captions that are known beforehand.

    Args:
        pipeline: a pipeline with an image encoder and CLIP's projection head.
        captions: dictionary of set name -> list of captions. They are embedded at once, so that training the
            text encoder does not change the metric.
        jit_compile: whether to compile with XLA on TensorFlow.
    """

    def __init__(self, pipeline, captions, jit_compile=True):
        self._images = ClipImageEmbeddings(pipeline.image_encoder, jit_compile)
        projection = pipeline.clip_head["text_projection.weight"]
        self._texts = {
            name: embed_captions(pipeline.text_encoder, pipeline.tokenizer, projection, texts)
            for name, texts in captions.items()
        }

    def __call__(self, name, images):
        """Return the mean score of uint8 images `(n, h, w, 3)`, one for each caption of the set `name`."""
        return clip_score(extract(self._images, images), self._texts[name])
