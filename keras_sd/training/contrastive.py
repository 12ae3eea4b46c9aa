"""Contrastive training of CLIP's text and image encoders (Radford et al., 2021)."""

import warnings

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.data.sources import fingerprint_of, framing_identity, image_batches, repeats_identity
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.pixels import images_to_unit
from keras_sd.training.objectives import ContrastiveObjective
from keras_sd.training.trainer import Trainer
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.rules import torch_state

_SEEN = 500  # training examples that are measured besides the held-out ones


def embed_images(image_encoder, examples, batch_size=100):
    """Return the embeddings of the images of examples: unit vectors `(n, projection_dim)`."""
    return _normalized(
        image_encoder(images_to_unit(ops.convert_to_tensor(images)))
        for images in image_batches(examples, batch_size)
    )


def embed_captions(objective, token_ids, batch_size=200):
    """Return the embeddings of captions, given as token ids: unit vectors `(n, projection_dim)`."""
    return _normalized(
        objective.text_projection(objective.text_encoder.pooled(token_ids[start : start + batch_size]))
        for start in range(0, len(token_ids), batch_size)
    )


def _normalized(batches):
    """Return the vectors of all batches, divided by their lengths, as one array."""
    vectors = np.concatenate([ops.convert_to_numpy(batch) for batch in batches])
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def shifted(image, generator, largest=3):
    """Shift an image at random by up to `largest` pixels in each direction, filling with white."""
    down, right = generator.integers(0, 2 * largest + 1, 2)
    padded = np.pad(image, ((largest, largest), (largest, largest), (0, 0)), constant_values=255)
    height, width = image.shape[:2]
    return padded[down : down + height, right : right + width]


def train_contrastive(settings, text_encoder, image_config, tokenizer, source, held_out, *, repeats=None):
    """Train the two encoders and write them and the tokenizer under `output_dir/model`.

    A text encoder that is not `trainable` stays frozen, and the image encoder is trained to match it (Zhai et
    al., 2022, with the roles exchanged). So a UNet that was trained on the text encoder stays usable.

    The text projection and the logit scale, which only contrastive training and captioning need, are stored
    with the image encoder's weights.

    Args:
        settings: `trainer.Settings`.
        text_encoder: `TextEncoder`: a new one to train, or a trained and frozen one.
        image_config: `ImageEncoderConfig` with the text encoder's `projection_dim`.
        tokenizer: `Tokenizer` of the text encoder's vocabulary.
        source: examples with an `image` of `image_config.image_size` and `captions`. A
            `data.framing.FramedSource` crops and flips the images at random.
        held_out: examples on which matching of images and captions is measured; may be empty.
        repeats: how often an epoch shows each example.

    Returns:
        Whether training reached its end.
    """
    text_config, image_encoder = text_encoder.config, ImageEncoder(image_config)
    objective = ContrastiveObjective(text_encoder, image_encoder)
    trainer = Trainer(
        objective,
        settings,
        {
            "method": "clip",
            "text_model": text_config.to_dict(),
            "text_trained": text_encoder.trainable,
            "image_model": image_config.to_dict(),
            "data": fingerprint_of(source),
            **framing_identity(source),
            **repeats_identity(repeats),
        },
    )

    def draw(example, generator):
        caption = example["captions"][generator.integers(len(example["captions"]))]
        return {"images": shifted(example["image"], generator), "token_ids": tokenizer(caption)[0]}

    def matching_rate(examples, captions):
        """Return the share of images whose own caption is the most similar one among all captions."""
        images = embed_images(image_encoder, examples)
        texts = embed_captions(objective, tokenizer(captions))
        return float(np.mean(np.argmax(images @ texts.T, axis=1) == np.arange(len(captions))))

    indices = np.unique(np.linspace(0, len(source) - 1, min(_SEEN, len(source))).astype(int))
    sets = {"matching_train": [source[index] for index in indices]}
    if len(held_out):
        sets["matching_held_out"] = held_out
    elif settings.evaluation_steps:
        warnings.warn(
            f"no held-out images: matching is measured on {len(indices)} training images; put others into a "
            "sub-folder `validation`",
            stacklevel=2,
        )
    # Held-out images are read again at each evaluation; their captions stay in memory.
    captions = {name: [example["captions"][0] for example in examples] for name, examples in sets.items()}

    def evaluate(step):
        with trainer.ema.applied():
            rates = {name: matching_rate(sets[name], captions[name]) for name in sets}
        trainer.log_figures(step, rates)

    return trainer.run(
        source,
        draw,
        repeats=repeats,
        make_evaluation=lambda trainer: evaluate,
        export=lambda folder: save_clip(folder, objective, tokenizer),
    )


def save_clip(folder, objective, tokenizer):
    """Write both encoders, the projection head (with the image encoder's weights) and the tokenizer."""
    text_encoder, image_encoder = objective.text_encoder, objective.image_encoder
    write_part(folder, "text_encoder", text_encoder.config.to_dict(), torch_state(text_encoder))
    beside = {
        "text_projection.weight": backend.to_numpy(objective.text_projection.kernel).T,
        "logit_scale": backend.to_numpy(objective.logit_scale),
    }
    weights = {**torch_state(image_encoder), **beside}
    write_part(folder, "image_encoder", image_encoder.config.to_dict(), weights)
    tokenizer.save(folder / "tokenizer")
