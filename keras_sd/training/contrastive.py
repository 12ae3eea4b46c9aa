"""Contrastive training of CLIP's text and image encoders (Radford et al., 2021)."""

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.data.datasets import fingerprint_of
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.training.losses import ContrastiveObjective, images_to_network
from keras_sd.training.trainer import Trainer
from keras_sd.weights.diffusers_folder import write_part
from keras_sd.weights.rules import torch_state


def embed_images(image_encoder, images, batch_size=100):
    """Unit vectors `(n, projection_dim)` of uint8 pictures."""
    embeddings = [
        ops.convert_to_numpy(image_encoder(images_to_network(images[start : start + batch_size])))
        for start in range(0, len(images), batch_size)
    ]
    return _normalized(np.concatenate(embeddings))


def embed_captions(objective, token_ids, batch_size=200):
    """Unit vectors `(n, projection_dim)` of captions given as token ids."""
    embeddings = [
        ops.convert_to_numpy(
            objective.text_projection(objective.text_encoder.pooled(token_ids[start : start + batch_size]))
        )
        for start in range(0, len(token_ids), batch_size)
    ]
    return _normalized(np.concatenate(embeddings))


def _normalized(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def shifted(image, generator, largest=3):
    """Moves a picture by up to `largest` pixels each way on a white ground."""
    down, right = generator.integers(0, 2 * largest + 1, 2)
    padded = np.pad(image, ((largest, largest), (largest, largest), (0, 0)), constant_values=255)
    height, width = image.shape[:2]
    return padded[down : down + height, right : right + width]


def train_contrastive(settings, text_encoder, image_config, tokenizer, source, held_out, *, repeats=None):
    """Trains the two encoders and writes them and the tokenizer under `output_dir/model`.

    A text encoder that is not `trainable` stays as it is and a new image encoder learns to meet it
    (Zhai et al., 2022, the other way round): a UNet that was trained on it goes on to understand it.

    The text projection and the logit scale, which only contrastive training and captioning need,
    lie beside the image encoder's weights.

    Args:
        settings: `trainer.Settings`.
        text_encoder: `TextEncoder`, freshly made to be trained, or a trained one that is kept.
        image_config: `ImageEncoderConfig` with the text encoder's `projection_dim`.
        tokenizer: `Tokenizer` of the text encoder's vocabulary.
        source: examples with an `image` of `image_config.image_size` and `captions`.
        held_out: examples on which the right caption is looked for among all of theirs.
        repeats: how often an epoch shows each example.

    Returns:
        Whether training got to its end.
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
        },
    )

    def draw(example, generator):
        caption = example["captions"][generator.integers(len(example["captions"]))]
        return {"images": shifted(example["image"], generator), "token_ids": tokenizer(caption)[0]}

    def matching_rate(examples):
        """Share of pictures whose own caption is the most similar one of all these examples'."""
        pictures = embed_images(image_encoder, np.stack([example["image"] for example in examples]))
        captions = embed_captions(objective, tokenizer([example["captions"][0] for example in examples]))
        return float(np.mean(np.argmax(pictures @ captions.T, axis=1) == np.arange(len(examples))))

    seen = [source[index] for index in np.linspace(0, len(source) - 1, 500).astype(int)]

    def evaluate(step):
        with trainer.ema.applied():
            rates = {
                "matching_train": matching_rate(seen),
                "matching_held_out": matching_rate(list(held_out)),
            }
        trainer.log.log_scalars(step, rates)

    if not trainer.run(source, draw, repeats=repeats, evaluate=evaluate):
        return False

    def export(folder):
        write_part(folder, "text_encoder", text_config.to_dict(), torch_state(text_encoder))
        beside = {
            "text_projection.weight": backend.to_numpy(objective.text_projection.kernel).T,
            "logit_scale": backend.to_numpy(objective.logit_scale),
        }
        write_part(folder, "image_encoder", image_config.to_dict(), {**torch_state(image_encoder), **beside})
        tokenizer.save(folder / "tokenizer")

    trainer.export(export)
    return True
