"""Latents and text encodings made once before a run, since the networks that make them stay frozen."""

import copy

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.training.losses import images_to_network


class EncodedSource:
    """A source of examples whose pictures and captions are encoded already, all in memory.

    Args:
        source: examples with `image` uint8 and `captions`.
        vae, text_encoder, tokenizer: the frozen parts; without a text encoder (None), as when it is trained,
            captions stay token ids.
        batch_size: pictures encoded at a time.
        jit_compile: whether XLA compiles on TensorFlow.

    Attributes:
        condition: what `contexts` holds for the batch: "context", or "token_ids" without a text encoder.
    """

    def __init__(self, source, vae, text_encoder, tokenizer, batch_size=64, jit_compile=True):
        examples = [source[index] for index in range(len(source))]
        posterior = backend.jit(
            lambda images: _scaled_moments(vae, images_to_network(images)), vae.variables, jit_compile
        )
        self.means, self.deviations = _in_batches(
            posterior, np.stack([example["image"] for example in examples]), batch_size
        )
        # The empty caption comes first: what the network learns when a caption is dropped.
        captions = ["", *(caption for example in examples for caption in example["captions"])]
        self.condition, self.contexts = "token_ids", tokenizer(captions)
        if text_encoder is not None:
            encode = backend.jit(lambda ids: (text_encoder(ids),), text_encoder.variables, jit_compile)
            (self.contexts,) = _in_batches(encode, self.contexts, 4 * batch_size)
            self.condition = "context"
        counts = [len(example["captions"]) for example in examples]
        self.first_caption = np.concatenate([[1], 1 + np.cumsum(counts)])

    def split(self, count):
        """Two sources: the first `count` examples, and the others."""
        parts = copy.copy(self), copy.copy(self)
        for part, place in zip(parts, (slice(0, count), slice(count, None)), strict=True):
            part.means, part.deviations = self.means[place], self.deviations[place]
        parts[1].first_caption = self.first_caption[count:]
        return parts

    def __len__(self):
        return len(self.means)

    def __getitem__(self, index):
        """Keys: mean and deviation of the scaled latents `(h, w, c)`, contexts `(n, tokens, width)` of the
        captions and empty_context; `(n, tokens)` without a text encoder."""
        start, end = self.first_caption[index : index + 2]
        return {
            "mean": self.means[index],
            "deviation": self.deviations[index],
            "contexts": self.contexts[start:end],
            "empty_context": self.contexts[0],
        }


def _scaled_moments(vae, images):
    """Mean and standard deviation of the latents of these pictures, scaled as the UNet takes them."""
    posterior = vae.encode(images)
    scale = vae.config.scaling_factor
    return posterior.mean * scale, ops.exp(0.5 * posterior.log_variance) * scale


def _in_batches(function, inputs, batch_size):
    """Calls a compiled function batch by batch; the last one is filled up, so that it compiles once."""
    outputs = []
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        missing = batch_size - len(batch)
        filled = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
        outputs.append([ops.convert_to_numpy(output)[: len(batch)] for output in function(filled)])
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
