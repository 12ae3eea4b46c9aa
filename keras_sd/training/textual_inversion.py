"""Training of textual inversion (Gal et al., 2023): learns the embedding of a new token from a few images."""

import functools

import numpy as np
from keras import ops

from keras_sd import backend
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.tokenizer import vector_names
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.lora import freeze
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.stored_encodings import encoded_source
from keras_sd.training.text_to_image import diffusion_example, diffusion_identity
from keras_sd.training.trainer import Trainer
from keras_sd.training.validation import Validation, validation_maker
from keras_sd.weights.textual_inversion import DIFFUSERS_FILE, write_embeddings

KOHYA_FILE = "embedding_kohya.safetensors"

# The token replaces {}. The first templates are like the captions of `emoji`.
TEMPLATES = {
    "object": (
        *("{}", "{} emoji", "picture of {}", "small icon of {}", "an image of {}", "a picture of one {}"),
        *("a photo of a {}", "a drawing of the {}", "a close look at {}", "this is {}"),
    ),
    "style": (
        *("{}", "{} style emoji", "picture in {} style", "small icon in {} style", "an image in {} style"),
        *("a picture in the manner of {}", "a drawing in the style of {}", "all of it made in {} style"),
    ),
}

# Noise on vectors that start as the mean of the embedding table, as a share of its standard deviation.
_SPREAD = 0.1


def initial_vectors(pipeline, count, words=None, seed=0):
    """Return the initial vectors of a new token.

    Args:
        pipeline: the `StableDiffusion`.
        count: the number of vectors.
        words: text whose token embeddings are used, repeated if there are fewer than `count`. None uses the
            mean of all embeddings, with a little noise.
        seed: seed of that noise.

    Returns:
        float32 `(count, width)`.

    Raises:
        UserError: the text has no tokens.
    """
    embeddings = pipeline.text_encoder.embeddings
    if words is None:
        table = np.asarray(backend.to_numpy(embeddings.token_embedding.embeddings), "float32")
        noise = np.random.default_rng(seed).standard_normal((count, table.shape[1]), dtype="float32")
        return table.mean(axis=0) + _SPREAD * table.std(axis=0) * noise
    (ids,) = pipeline.tokenizer.encode([words])
    if not ids:
        raise UserError(f"initializer token {words!r}: has no letters; name what the new word is like")
    if backend.plan() is not None:
        return np.zeros((count, embeddings.token_embedding.embeddings.shape[1]), "float32")
    vectors = embeddings.token_vectors(np.resize(np.array(ids, "int32"), count))
    return np.asarray(ops.convert_to_numpy(vectors), "float32")


def inversion_example(example, generator, captions, **options):
    """Draw the arrays of one training example: latents, noise, timestep and a random caption.

    Args:
        example: an example of an `encodings.EncodedSource`; its own captions are ignored.
        captions: token ids `(n, tokens)`.
        options: noise and condition, as in `text_to_image.diffusion_example`.
    """
    chosen = captions[generator.integers(len(captions))]
    return diffusion_example({**example, "contexts": chosen[None]}, generator, **options)


def train_textual_inversion(
    settings,
    pipeline,
    source,
    *,
    placeholder_token,
    initializer_token=None,
    num_vectors=1,
    learnable_property="object",
    identity=None,
    repeats=None,
    diffusion=None,
    caching=None,
    make_evaluation=None,
    validation_examples=None,
):
    """Add a token to a model's vocabulary and train its vectors; all other weights are frozen.

    At the end `output_dir/model` holds the EMA vectors in `learned_embeds.safetensors`, which diffusers and
    A1111's web UI load, and in `embedding_kohya.safetensors`. A few vectors trained on small batches keep
    fluctuating, and the average removes that.

    Args:
        settings: `trainer.Settings`.
        pipeline: the `StableDiffusion`; the token is added to it.
        source: examples with `image` uint8 `(h, w, 3)`; captions are not used.
        placeholder_token: the new token, such as "<my-cat>".
        initializer_token: known words to initialise the vectors with, or None, as in `initial_vectors`.
        num_vectors: number of vectors, and of tokens in a prompt.
        learnable_property: "object" or "style": what the images have in common.
        identity: further JSON values that a checkpoint must share with the run that resumes it.
        repeats: how often an epoch shows each example.
        diffusion: `DiffusionSettings`; None for their defaults.
        caching: `caching.Caching`: where the images' encodings are kept.
        make_evaluation: `make_evaluation(trainer)` returns a function of the step, called at each evaluation.
        validation_examples: number of training examples that the validation loss is measured on; None for
            no validation.

    Returns:
        Whether training reached its end.

    Raises:
        UserError: the token exists already, has more vectors than a prompt can hold, or the model has other
            added tokens that are not saved yet.
    """
    if learnable_property not in TEMPLATES:
        raise UserError(f"learnable_property {learnable_property!r}: unknown; use {' or '.join(TEMPLATES)}")
    if not 1 <= num_vectors <= _room(pipeline):
        raise UserError(f"num_vectors {num_vectors}: a prompt has room for 1 to {_room(pipeline)}")
    text_encoder = pipeline.text_encoder
    if text_encoder.embeddings.learned_embedding is not None:
        raise UserError("the model has words added to it, which would be trained too; save it and load that")
    pipeline.add_tokens(
        {placeholder_token: initial_vectors(pipeline, num_vectors, initializer_token, settings.seed)}
    )
    freeze(pipeline.unet)
    freeze(text_encoder)
    learned = text_encoder.embeddings.learned_embedding.embeddings
    learned.trainable = True

    schedule = NoiseSchedule(pipeline.scheduler_config)
    encoded, captions = encode_examples(
        settings, pipeline, source, placeholder_token, learnable_property, caching
    )
    diffusion = diffusion or DiffusionSettings()
    trainer = Trainer(
        DiffusionObjective(pipeline.unet, schedule, diffusion, text_encoder),
        settings,
        diffusion_identity(
            "textual-inversion",
            pipeline.unet,
            pipeline.scheduler_config,
            encoded,
            repeats,
            diffusion,
            tokens=vector_names(placeholder_token, num_vectors),
            initializer_token=initializer_token,
            learnable_property=learnable_property,
        )
        | (identity or {}),
    )
    noise = NoiseDrawing(diffusion, schedule)
    draw = functools.partial(inversion_example, captions=captions, noise=noise, condition=encoded.condition)
    validation = Validation({"train": encoded}, validation_examples) if validation_examples else None

    def export(folder):
        save_embedding(folder, placeholder_token, ops.convert_to_numpy(learned))

    return trainer.run(
        encoded,
        draw,
        repeats=repeats,
        make_evaluation=make_evaluation,
        make_validation=validation_maker(validation, draw, noise),
        export=export,
    )


def encode_examples(settings, pipeline, source, token, learnable_property, caching=None):
    """Return the images as a source of latents, and the captions' token ids `(templates, tokens)`."""
    encoded = encoded_source(
        source, pipeline.vae, None, pipeline.tokenizer, caching, jit_compile=settings.jit_compile
    )
    captions = [template.format(token) for template in TEMPLATES[learnable_property]]
    # Leave out captions that would be truncated, as they might lose the token. The token alone always fits.
    lengths = map(len, pipeline.tokenizer.encode(captions))
    whole = [text for text, length in zip(captions, lengths, strict=True) if length <= _room(pipeline)]
    return encoded, pipeline.tokenizer(whole)


def _room(pipeline):
    """Return the largest number of tokens in a prompt."""
    return pipeline.tokenizer.max_length - 2


def save_embedding(folder, token, vectors):
    """Write a learned token in both dialects into a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    write_embeddings(folder / DIFFUSERS_FILE, {token: vectors})
    write_embeddings(folder / KOHYA_FILE, {token: vectors}, "kohya")
