"""Stable Diffusion as one object: its parts, the primitives on them, and the tasks."""

import contextlib
import functools
from pathlib import Path

import numpy as np
from keras import ops
from tqdm import tqdm

from keras_sd import backend, presets
from keras_sd.config import (
    ImageEncoderConfig,
    SchedulerConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from keras_sd.diffusion.samplers import Denoiser, NoiseStreams, find_sampler
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.weights import formats, rules

# Stored with the image tower, since the text tower's own file has no place for them in diffusers:
# what makes the two towers a CLIP.
CLIP_HEAD = ("text_projection.weight", "logit_scale")

_MODELS = {
    "text_encoder": (TextEncoder, TextEncoderConfig),
    "image_encoder": (ImageEncoder, ImageEncoderConfig),
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
}


class StableDiffusion:
    """A text-to-image model: tokenizer, text encoder, UNet, VAE and noise schedule.

    Args:
        tokenizer, text_encoder, unet, vae: the parts, from `keras_sd.models`.
        scheduler_config: `SchedulerConfig` of the noise schedule that the UNet was trained on.
        image_encoder: CLIP's image tower, which some models bring for measuring, or None.
        clip_head: dictionary of the arrays "text_projection.weight" `(projection, width)` and
            "logit_scale" that belong to the image encoder, or None.
        name: what pictures say they were made by.
        batch_size: the most pictures made at a time; more are made in turns of equal size.

    Attributes are those arguments. Arrays in and out of the primitives are NumPy's, channels-last.
    """

    def __init__(
        self,
        tokenizer,
        text_encoder,
        unet,
        vae,
        scheduler_config,
        image_encoder=None,
        clip_head=None,
        name="keras_sd",
        batch_size=8,
    ):
        _check_fit(tokenizer, text_encoder, unet, vae)
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler_config = scheduler_config
        self.image_encoder, self.clip_head = image_encoder, clip_head
        self.name, self.batch_size = name, batch_size
        self._folder = None
        self._denoiser = Denoiser(unet, NoiseSchedule(scheduler_config))
        self._encode_text = backend.jit(lambda ids: text_encoder(ids), text_encoder.variables)
        self._encode_image = backend.jit(self._image_to_latents, vae.variables)
        self._decode = backend.jit(self._latents_to_image, vae.variables)

    # Files

    @classmethod
    def from_preset(cls, name):
        """Opens a bundled model by its name, or one of a hub by its id ("owner/model").

        Raises:
            UserError: the preset is unknown, the line lists those known; or it cannot be had.
        """
        model = cls.load(presets.find(name))
        model.name = str(name)
        return model

    @classmethod
    def load(cls, path):
        """Opens a folder in diffusers' layout, of any float precision.

        Raises:
            UserError: a file is missing or damaged, or the weights are not those of the config.
        """
        folder = Path(path)
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{path}: no model_index.json there; give a folder in diffusers' layout")
        model = cls(
            **load_clip(folder),
            unet=load_part(folder, "unet"),
            vae=load_part(folder, "vae"),
            scheduler_config=SchedulerConfig.from_dict(formats.read_scheduler(folder)),
            name=folder.resolve().name,
        )
        model._folder = folder
        return model

    def save(self, path, dtype="float32"):
        """Writes a folder in diffusers' layout, which `load` and diffusers open.

        Args:
            path: the folder; made if there is none. Files of that name in it are replaced, each at once.
            dtype: "float32", "float16" or "bfloat16".
        """
        formats.check_dtype(dtype)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("text_encoder", "unet", "vae", "image_encoder"):
            layer = getattr(self, part)
            if layer is not None:
                tensors = rules.torch_state(layer)
                if part == "image_encoder":
                    tensors |= self.clip_head or {}
                formats.write_part(folder, part, layer.config.to_dict(), tensors, dtype)
        self.tokenizer.save(folder / "tokenizer")
        formats.write_scheduler(folder, self.scheduler_config.to_dict())
        formats.write_model_index(folder)

    @functools.cached_property
    def model_hash(self):
        """The first ten digits of the SHA-256 of the UNet's file; None if the model came from none."""
        if self._folder is None:
            return None
        return presets.file_hash(formats.weights_path(self._folder, "unet"))[:10]

    # Primitives

    def encode_text(self, prompts):
        """Encodes a list of texts: float32 `(n, tokens, width)`."""
        return self._in_batches(self._encode_text, self.tokenizer(prompts))

    def encode_image(self, images):
        """Encodes uint8 pictures `(n, height, width, 3)` to latents as the UNet takes them."""
        return self._in_batches(self._encode_image, np.asarray(images))

    def denoise(self, latents, context, negative=None, *, on_step=None, **options):
        """Turns noise into latents.

        Args:
            latents: standard-normal noise, float32 `(n, h, w, c)`.
            context, negative: text encodings `(n, tokens, width)` of the prompts and negative prompts.
            on_step: called after each step with a `Denoised(step, latents)`.
            options: as `Denoiser.steps` takes them: guidance_scale, sampler, num_steps, eta, streams.

        Returns:
            Latents, float32 `(n, h, w, c)`.
        """
        for denoised in self._denoiser.steps(latents, context, negative, **options):
            if on_step is not None:
                on_step(denoised)
        return ops.convert_to_numpy(denoised.latents)

    def decode(self, latents):
        """Decodes latents as the UNet gives them to uint8 pictures `(n, height, width, 3)`."""
        return self._in_batches(self._decode, np.asarray(latents))

    # Tasks

    def text_to_image(
        self,
        prompt,
        negative_prompt=None,
        num_images=1,
        num_steps=30,
        guidance_scale=7.5,
        sampler="ddim",
        eta=0.0,
        seed=0,
        height=None,
        width=None,
        progress=True,
    ):
        """Makes pictures of a text.

        Args:
            prompt: a text, or a list of texts.
            negative_prompt: what to stay away from: a text, or a list of as many as there are prompts.
            num_images: pictures for each prompt. Picture i of all is drawn from `seed` + i and is the same
                alone or in a batch, up to rounding.
            num_steps: UNet evaluations for a picture, 1 to the schedule's number of timesteps.
            guidance_scale: how much the prompt is to be followed; 1 leaves guidance out, in half the time.
            sampler: a name in `keras_sd.diffusion.samplers.SAMPLERS`.
            eta: the share of fresh noise in each step, 0 (none) to 1.
            height, width: in pixels; by default what the model was trained on.
            progress: True for a progress bar on stderr, False for none, or a function that is called with
                (steps done, steps in all, latents).

        Returns:
            uint8 `(len(prompts) * num_images, height, width, 3)`, the pictures of one prompt together.

        Raises:
            UserError: a number out of range, an unknown sampler, or lists of unequal length.
        """
        find_sampler(sampler)
        prompts, negatives = _prompts(prompt, negative_prompt)
        shape = self.latent_shape(height, width)
        count = len(prompts) * _at_least("num_images", num_images, 1)
        batches = _batches(count, self.batch_size)
        context, negative = self.encode_text(prompts), self.encode_text(negatives)
        options = dict(guidance_scale=guidance_scale, sampler=sampler, num_steps=num_steps, eta=eta)
        images = []
        with _reporter(progress, len(batches) * num_steps) as on_step:
            options["on_step"] = on_step
            for batch in batches:
                streams, texts = NoiseStreams(_at_least("seed", seed, 0) + batch), batch // num_images
                noise = streams.draw(shape)
                latents = self.denoise(noise, context[texts], negative[texts], streams=streams, **options)
                images.append(self.decode(latents))
        return np.concatenate(images)[:count]

    # Help for the above

    def latent_shape(self, height=None, width=None):
        """The shape `(h, w, c)` of the latents of pictures `height` by `width` pixels.

        Raises:
            UserError: a side that the UNet cannot halve as often as it does.
        """
        factor = self.vae.config.downsampling
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        sides = []
        for title, side in (("height", height), ("width", width)):
            side = self.unet.config.sample_size * factor if side is None else side
            if side < multiple or side % multiple:
                raise UserError(f"{title} {side}: does not fit the model; use a multiple of {multiple}")
            sides.append(side // factor)
        return (*sides, self.vae.config.latent_channels)

    def parameters(
        self, prompt, negative_prompt=None, *, num_steps, guidance_scale, seed, size, sampler="ddim", eta=0.0
    ):
        """What a picture's file says about how it was made, for `keras_sd.images.save_png`.

        Args:
            seed: the picture's own, that of the call plus its index.
            size: `(height, width)`.
        """
        height, width = size
        parameters = {"prompt": prompt, "negative_prompt": negative_prompt, "Steps": num_steps}
        parameters |= {"Sampler": find_sampler(sampler).name, "CFG scale": f"{guidance_scale:g}"}
        parameters |= {"Seed": seed, "Size": f"{width}x{height}", "Eta": f"{eta:g}" if eta else None}
        parameters |= {"Model hash": self.model_hash, "Model": self.name}
        return {name: value for name, value in parameters.items() if value is not None}

    def _image_to_latents(self, images):
        posterior = self.vae.encode(ops.cast(images, "float32") / 127.5 - 1.0)
        return posterior.mode() * self.vae.config.scaling_factor

    def _latents_to_image(self, latents):
        images = self.vae.decode(latents / self.vae.config.scaling_factor)
        return ops.cast(ops.round(ops.clip((images + 1.0) * 127.5, 0.0, 255.0)), "uint8")

    def _in_batches(self, function, inputs):
        batches = _batches(len(inputs), self.batch_size)
        outputs = [ops.convert_to_numpy(function(inputs[batch])) for batch in batches]
        return np.concatenate(outputs)[: len(inputs)]


def load_part(folder, part):
    """Opens one part of a folder in diffusers' layout.

    Args:
        part: "text_encoder", "image_encoder", "unet" or "vae".

    Raises:
        UserError: a file is missing or damaged, or the weights are not those of the config.
    """
    model_class, config_class = _MODELS[part]
    config, tensors = formats.read_part(folder, part)
    with rules.without_initial_values():
        model = model_class(config_class.from_dict(config))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in CLIP_HEAD}
    rules.load_weights(model, tensors, source=formats.weights_path(folder, part))
    return model


def load_clip(folder):
    """Opens the CLIP of a folder, as `StableDiffusion` takes it.

    Returns:
        A dictionary of tokenizer and text_encoder, and of image_encoder and clip_head where they are there.
    """
    folder = Path(folder)
    parts = {
        "tokenizer": Tokenizer.load(folder / "tokenizer"),
        "text_encoder": load_part(folder, "text_encoder"),
    }
    if (folder / "image_encoder").is_dir():
        _, tensors = formats.read_part(folder, "image_encoder")
        head = {name: np.array(tensors[name], "float32") for name in CLIP_HEAD if name in tensors}
        parts |= {"image_encoder": load_part(folder, "image_encoder"), "clip_head": head or None}
    return parts


def _check_fit(tokenizer, text_encoder, unet, vae):
    """Raises a UserError where one part's output is not the next one's input."""
    text, channels = text_encoder.config, (unet.config.in_channels, unet.config.out_channels)
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the text encoder {text.vocab_size}; "
            "use parts of one model"
        )
    if tokenizer.max_length > text.max_position_embeddings:
        raise UserError(
            f"the tokenizer gives {tokenizer.max_length} tokens, the text encoder takes "
            f"{text.max_position_embeddings}; use parts of one model"
        )
    if unet.config.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"text encodings are {text.hidden_size} wide, the UNet takes {unet.config.cross_attention_dim}; "
            "use parts of one model"
        )
    if channels != (vae.config.latent_channels,) * 2:
        raise UserError(
            f"the UNet has {channels[0]} channels in and {channels[1]} out, the VAE's latents "
            f"{vae.config.latent_channels}; use parts of one model"
        )


def _at_least(name, value, least):
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} {value!r}: out of range; use a whole number from {least}")
    return int(value)


def _prompts(prompt, negative_prompt):
    """Prompts and negative prompts as two lists of one length."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("prompt: the list is empty; give at least one text")
    if negative_prompt is None or isinstance(negative_prompt, str):
        return prompts, [negative_prompt or ""] * len(prompts)
    if len(negative_prompt) != len(prompts):
        raise UserError(
            f"{len(negative_prompt)} negative prompts for {len(prompts)} prompts; give one for each"
        )
    return prompts, list(negative_prompt)


def _batches(count, limit):
    """Indices 0 to count - 1 in equal batches of at most `limit`; the last index fills up the last batch.

    Equal, as each size of a batch is compiled for itself.
    """
    size = -(-count // -(-count // limit))
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


@contextlib.contextmanager
def _reporter(progress, total):
    """Yields the function that `denoise` calls after each of `total` steps, or None."""
    if not progress:
        yield None
    elif progress is True:
        with tqdm(total=total, unit="step") as bar:

            def advance(denoised):
                ops.convert_to_numpy(denoised.latents)  # waits for a step that was only dispatched
                bar.update()

            yield advance
    else:
        done = iter(range(1, total + 1))
        yield lambda denoised: progress(next(done), total, denoised.latents)
