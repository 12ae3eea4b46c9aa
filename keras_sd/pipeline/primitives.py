"""A model's parts as one object, loading and saving it, and its primitives: encode, denoise, decode.

The tasks are built from these in `keras_sd.pipeline.stable_diffusion`.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from keras import ops

from keras_sd import backend, interruption, presets
from keras_sd.arguments import (
    LONGEST_SIDE,
    Floats,
    Images,
    Tensor,
    checked_path,
    float_array,
    formerly,
    shown,
    switch,
    switch_or_none,
    whole_number,
)
from keras_sd.diffusion.denoiser import Denoised, Denoiser, Known
from keras_sd.diffusion.finite import check_inputs, check_result
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError, os_errors_in_one_line
from keras_sd.models.batches import in_batches
from keras_sd.models.image_encoder import ImageEncoder
from keras_sd.models.pixels import as_images, images_from_unit, images_to_unit
from keras_sd.models.precision import check_dtype
from keras_sd.models.quantization import check_quantization, quantization_of, quantize_kernels
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.tokenizer import Tokenizer, vector_names
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.pipeline.defaults import ModelDefaults
from keras_sd.pipeline.image_parameters import image_parameters, model_hash
from keras_sd.pipeline.lora import Adapters
from keras_sd.pipeline.prompts import as_texts, chunk_prompts, equally_long, weighted_encoding
from keras_sd.pipeline.tiling import in_tiles
from keras_sd.weights import diffusers_folder, readers, safetensors_files, single_file
from keras_sd.weights.checkpoint import Checkpoint
from keras_sd.weights.loading import check_fit, model_part, open_parts
from keras_sd.weights.lora_files import holds_lora
from keras_sd.weights.textual_inversion import embedding_file, read_embeddings

# Sides in latent positions. The VAE processes larger images in tiles, as its feature maps at full resolution
# need the most memory. 128 positions of Stable Diffusion are 1024 pixels.
LARGEST_UNTILED = 128
_TILE, _TILE_OVERLAP = 96, 16


class Primitives:
    """The base class of `StableDiffusion`, which documents the arguments and the use by several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        unet: UNet,
        vae: AutoencoderKL,
        scheduler_config: SchedulerConfig,
        image_encoder: ImageEncoder | None = None,
        clip_head: dict[str, Any] | None = None,
        low_res_scheduler_config: SchedulerConfig | None = None,
        defaults: ModelDefaults | None = None,
        name: str = "keras_sd",
        batch_size: int = 8,
        jit_compile: bool | None = None,
        engine: str = "keras",
    ) -> None:
        for title, part, kinds in (
            ("tokenizer", tokenizer, Tokenizer),
            ("text_encoder", text_encoder, TextEncoder),
            ("unet", unet, UNet),
            ("vae", vae, AutoencoderKL),
            ("image_encoder", image_encoder, ImageEncoder | None),
            ("defaults", defaults, ModelDefaults | None),
            ("name", name, str),
        ):
            if not isinstance(part, kinds):
                kind = getattr(kinds, "__name__", kinds)
                raise UserError(f"{title} {shown(part)}: of another type; give a {kind}")
        check_fit(tokenizer, text_encoder, unet, vae)
        self.tokenizer, self.text_encoder, self.unet, self.vae = tokenizer, text_encoder, unet, vae
        self.scheduler_config, self.low_res_scheduler_config = scheduler_config, low_res_scheduler_config
        self.image_encoder, self.clip_head = image_encoder, clip_head
        self.defaults = defaults or ModelDefaults()
        self.name, self.batch_size = name, whole_number("batch_size", batch_size, 1)
        self._lock = threading.RLock()  # held by the thread whose task runs; tasks call each other
        self._weights_file: Any = None
        self.vae_source: tuple[str | None, Path | None] = (None, None)
        self.embedding_files: dict[str, Path] = {}
        self.adapters, self.lora_folder = Adapters({"unet": unet, "text_encoder": text_encoder}), None
        self._engine = backend.check_engine(engine, unet.compute_dtype)
        self._denoiser = Denoiser(
            unet, NoiseSchedule(scheduler_config), jit_compile=jit_compile, engine=engine
        )
        self._jit_compile = switch_or_none("jit_compile", jit_compile)
        self._text_encodings: dict[int, Any] = {}  # number of skipped layers -> compiled function
        self._encode_image, self._decode = (
            backend.jit_for_engine(
                engine,
                title,
                vae.compute_dtype,
                function,
                vae.variables,
                backend.compiles(jit_compile, vae.compute_dtype),
                identity=functools.partial(backend.identity_of, function.__name__, vae),
            )
            for title, function in (
                ("VAE encoder", self._image_to_latents),
                ("VAE decoder", self._latents_to_image),
            )
        )

    # Files

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """Open a bundled model by its name, or a model of the Hugging Face hub by its id ("owner/model").

        Args:
            name: a preset in `keras_sd.presets.PRESETS`, such as "emoji" or "sd-1.5", or a hub id.
            options: as `load` takes them.

        Returns:
            The model.

        Raises:
            UserError: the model is unknown or could not be downloaded.

        Example:
            ```python
            sd = keras_sd.StableDiffusion.from_preset("emoji")
            ```
        """
        return cls.load(presets.find(name), **{"name": str(name)} | options)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        weights: str = "ema",
        variant: str | None = None,
        dtype: str = "float32",
        prediction_type: str | None = None,
        partial: bool = False,
        vae: str | Path | None = None,
        defaults: ModelDefaults | None = None,
        name: str | None = None,
        batch_size: int = 8,
        jit_compile: bool | None = None,
        engine: str = "keras",
        quantize: str | None = None,
    ) -> Self:
        """Open a model of any format; the format is detected from the files.

        Args:
            path: a folder in diffusers' layout, a single file (`.safetensors`, `.ckpt`) as for A1111, a
                folder of KerasCV's H5 files, a preset or a hub id, in the order of `keras_sd.presets.find`.
            weights: "ema" or "raw", if a file holds both.
            variant: variant of a folder's weight files, such as "fp16"; by default none.
            dtype: precision of weights and computation: "float32", "float16" or "bfloat16".
            prediction_type: "epsilon" or "v_prediction"; overrides the files.
            partial: accept missing and unknown weights, with a warning.
            vae: path of a folder or a file with another VAE.
            defaults, name: as in the constructor; by default those of the files.
            batch_size, jit_compile, engine: as in the constructor.
            quantize: "int8" keeps the kernels of UNet and text encoder in 8 bits, with a scale for each
                output: a quarter of the memory of float32. LoRAs are rounded likewise. Such a model makes
                images; it is neither trained nor saved. None keeps them in `dtype`.

        Returns:
            The model.

        Raises:
            UserError: a file is missing or damaged, it is no Stable Diffusion model, or the engine cannot
                compute here or in this precision.

        Example:
            ```python
            sd = keras_sd.StableDiffusion.load("model.safetensors", dtype="bfloat16", batch_size=4)
            ```
        """
        checked_path("path", path)
        if vae is not None:
            checked_path("vae", vae)
        check_dtype(dtype)
        (
            switch("partial", partial),
            switch_or_none("jit_compile", jit_compile),
            whole_number("batch_size", batch_size, 1),
            backend.check_engine(engine, dtype),
            check_quantization(quantize),
        )
        source = presets.find(path)
        checkpoint = readers.read_checkpoint(
            source, weights=weights, variant=variant, prediction_type=prediction_type
        )
        if vae is not None:
            checkpoint.parts["vae"] = readers.read_part(vae, "vae")
        missing = [part for part in ("text_encoder", "unet", "vae") if part not in checkpoint.parts]
        if missing:
            raise UserError(
                f"{path}: has no {' and no '.join(missing)}; give a whole model, and single parts beside it"
            )
        if checkpoint.scheduler is None:
            raise UserError(
                f"{path}: has no noise schedule; put the model's own {diffusers_folder.SCHEDULER} there"
            )
        parts = open_parts(checkpoint, dtype, partial)
        if quantize is not None:
            quantize_kernels(parts["unet"])
            quantize_kernels(parts["text_encoder"])
        model = cls(
            **parts,
            defaults=ModelDefaults.load(source) if defaults is None else defaults,
            name=source.resolve().name if name is None else name,
            batch_size=batch_size,
            jit_compile=jit_compile,
            engine=engine,
        )
        model._weights_file = checkpoint.parts["unet"].source
        if vae is not None:
            model.vae_source = Path(vae).name, checkpoint.parts["vae"].source
        return model

    def save(self, path: str | Path, dtype: str | None = None) -> None:
        """Write the model as a folder in diffusers' layout, or as a single file as for A1111.

        Args:
            path: a folder, created if necessary, or a file that ends in `.safetensors`. Existing files are
                replaced after the new ones are on disk.
            dtype: "float32", "float16" or "bfloat16"; by default that of the weights in memory.

        Raises:
            UserError: `path` is no name or cannot be written, or a value does not fit `dtype`.

        Example:
            ```python
            sd.save("my-model")  # a folder, which diffusers reads too
            sd.save("my-model.safetensors", dtype="float16")
            ```
        """
        safetensors_files.check_dtype(dtype)
        checked_path("path", path)
        names = ("text_encoder", "unet", "vae", "image_encoder")
        models = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        low_res = self.low_res_scheduler_config
        checkpoint = Checkpoint(
            {name: model_part(name, model, self.clip_head) for name, model in models.items()},
            self.scheduler_config.to_dict(),
            low_res.to_dict("DDPMScheduler") if low_res else None,
        )
        with os_errors_in_one_line(path):
            if Path(path).suffix != ".safetensors":
                diffusers_folder.write_folder(
                    path, checkpoint, self.tokenizer.save, dtype, write_more=self.defaults.save
                )
            elif self.tokenizer.added_tokens:
                raise UserError(f"{path}: a single file has no place for learned words; name a folder")
            else:
                self.defaults.warn_of_loss(path)
                single_file.write_single_file(path, checkpoint, dtype, self.tokenizer)

    @property
    def quantization(self) -> str | None:
        """What the UNet's kernels are quantized to: "int8", or None."""
        return quantization_of(self.unet)

    @functools.cached_property
    def model_hash(self) -> str | None:
        """The first ten digits of the SHA-256 of the UNet's file; None if the model has no file."""
        return self._weights_file and model_hash(self._weights_file)

    # Low-rank updates

    def load_lora(self, path: str | Path, name: str | None = None, weight: float = 1.0) -> str:
        """Add a LoRA of diffusers, PEFT or kohya to the model (Hu et al., 2022); several are summed.

        Updates are added to the kernels, so sampling stays as fast; `save` writes the sum. A tag such as
        `<lora:name:0.8>` in a prompt sets the weight for that call.

        The scale of an update is read from the file: alpha, PEFT's `adapter_config.json` beside
        `adapter_model`, or diffusers' metadata in the header.

        Args:
            path: a file, or a folder with `pytorch_lora_weights.safetensors` or PEFT's `adapter_model`.
            name: its name from now on; by default that of the file or folder, of a training run's result
                that of the run folder. If another LoRA has this default name, a number is appended, with a
                warning.
            weight: factor of the updates; with 0 the LoRA is only available to prompts.

        Returns:
            The name.

        Raises:
            UserError: the file is damaged, belongs to another kind of model or uses what is not supported
                (OFT, ...); or another LoRA has the given name.

        Example:
            ```python
            sd.load_lora("watercolour.safetensors", weight=0.8)
            sd.text_to_image("a lighthouse <lora:watercolour:0.5>")
            ```
        """
        with self._lock:
            return self.adapters.load(path, name, weight)

    def set_lora_weights(self, weights: dict[str, float]) -> None:
        """Set the weights of loaded LoRAs; those not named are removed from the model, but stay loaded.

        Args:
            weights: name -> weight.

        Raises:
            UserError: a name is unknown, or a weight or the resulting kernel is not finite.
        """
        with self._lock:
            self.adapters.set(weights)

    def unload_lora(self, name: str | None = None) -> None:
        """Remove a LoRA, or all of them; without any, the weights are exactly the original ones.

        Raises:
            UserError: the name is unknown.
        """
        with self._lock:
            self.adapters.unload(name)

    def find_lora(self, name: str) -> bool:
        """Return whether a LoRA of that name is loaded, after loading it from `lora_folder` if it is there.

        In the folder it is the file `NAME.safetensors`, or the folder `NAME` as PEFT and diffusers write it.
        """
        if name not in self.adapters.names and self.lora_folder is not None:
            file, folder = Path(self.lora_folder) / f"{name}.safetensors", Path(self.lora_folder) / name
            # A name may be too long, contain slashes, or be that of another folder.
            if file.parent == folder.parent == Path(self.lora_folder) and folder.name not in ("", ".", ".."):
                if os.path.isfile(file):
                    self.load_lora(file, name, weight=0.0)
                elif holds_lora(folder):
                    self.load_lora(folder, name, weight=0.0)
        return name in self.adapters.names

    # Learned words

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> None:
        """Add the words of a textual inversion (Gal et al., 2022) of diffusers, A1111 or kohya.

        Args:
            path: a file, or a folder with `learned_embeds.safetensors` or `.bin`.
            token: name of the word in prompts; by default that in the file.

        Raises:
            UserError: the file is damaged or belongs to another kind of model; it has no name for its word
                and none is given; one is given for several words; or as `add_tokens`.

        Example:
            ```python
            sd.load_textual_inversion("learned_embeds.safetensors", "<my-cat>")
            sd.text_to_image("a photo of <my-cat>")
            ```
        """
        embeddings = read_embeddings(path, self.text_encoder.config.hidden_size)
        if token is not None:
            if len(embeddings) > 1:
                raise UserError(f"{path}: holds several words, {', '.join(embeddings)}; leave {token!r} out")
            (vectors,) = embeddings.values()
            embeddings = {token: vectors}
        if None in embeddings:
            raise UserError(f"{path}: has no name for its word; give a token, like <my-cat>")
        self.add_tokens(embeddings)
        self.embedding_files |= dict.fromkeys(embeddings, embedding_file(path))

    def add_tokens(self, embeddings: dict[str, Any]) -> None:
        """Add words to the vocabulary, each of one or several vectors.

        Args:
            embeddings: token -> its vectors `(k, width)`; one word in a prompt stands for all k.

        Raises:
            UserError: a token exists already or would be split in a prompt, vectors have another width or are
                not finite, or tokenizer and text encoder have vocabularies of different sizes.
        """
        tokens, size = self.tokenizer.vocab_size, self.text_encoder.config.vocab_size
        if tokens != size:
            raise UserError(
                f"the tokenizer has {tokens} tokens, the text encoder {size}; tokens can be added where "
                "both are the same"
            )
        names = [name for token, array in embeddings.items() for name in vector_names(token, len(array))]
        tokenizer = self.tokenizer.add_tokens(names)
        with self._lock:
            self.text_encoder.add_tokens(np.concatenate(list(embeddings.values())))
            self.tokenizer = tokenizer
            self._text_encodings = {}

    # Primitives

    def encode_text(
        self, prompts: str | Sequence[str], chunks: int | None = None, clip_skip: int | None = None
    ) -> Floats:
        """Encode prompts by the text encoder.

        Args:
            prompts: a prompt, or a list of them, in A1111's language (`keras_sd.pipeline.prompts`): weights,
                BREAK, any length.
            chunks: number of token chunks for each prompt, a multiple of what each needs; by default the
                least common multiple. A shorter prompt's chunks are repeated, which does not change the
                result of attention.
            clip_skip: number of the text encoder's last layers that are left out, as in diffusers; None is
                the encoder's own, usually 0.

        Returns:
            float32 `(n, chunks * tokens, width)`.

        Raises:
            UserError: a prompt is no text, `chunks` does not fit, or there are not so many layers.
        """
        chunked = chunk_prompts(self.tokenizer, as_texts("prompts", prompts), chunks)
        return self._encode_chunks(chunked.ids, chunked.weights, clip_skip)

    def encode_each(self, prompts: Sequence[str], clip_skip: int | None = None) -> list[Floats]:
        """Encode prompts like `encode_text`, each at its own length: a list of float32 `(tokens, width)`."""
        chunked = [chunk_prompts(self.tokenizer, [prompt]) for prompt in as_texts("prompts", prompts)]
        ids, weights = (np.concatenate(parts, axis=1) for parts in zip(*chunked, strict=True))
        encoding = self._encode_chunks(ids, weights, clip_skip)[0]
        ends = np.cumsum([each.ids[0].size for each in chunked])
        return np.split(encoding, ends[:-1])

    def _encode_chunks(self, ids, weights, clip_skip):
        """Return encodings `(n, chunks * tokens, width)` of ids and weights, both `(n, chunks, tokens)`."""
        count, chunks, tokens = ids.shape
        # Each distinct chunk once: chunks of short prompts are repeated, and prompts may share chunks.
        unique, places = np.unique(ids.reshape(-1, tokens), axis=0, return_inverse=True)
        with interruption.phase("encoding prompts", in_commands=True):
            encodings = self._in_batches(self._text_encoding(clip_skip), unique)[places.reshape(-1)]
        return weighted_encoding(encodings.reshape(count, chunks, tokens, -1), weights)

    @formerly(images="image")
    def encode_image(self, image: Images) -> Floats:
        """Encode images by the VAE to scaled latents, as the UNet takes them.

        Args:
            image: uint8 `(height, width, 3)` or `(n, height, width, 3)`; sides are multiples of the VAE's
                factor (8).

        Returns:
            float32 `(n, h, w, c)`, the mode of each latent distribution.

        Raises:
            UserError: the images have another type, shape or size.
        """
        return self._encode_unit(images_to_unit(self._checked(image)))

    @formerly(num_steps="num_inference_steps")
    def denoise(
        self,
        latents: Tensor,
        context: Tensor,
        negative: Tensor = None,
        *,
        on_step: Callable[[Denoised], object] | None = None,
        channels: Tensor = None,
        class_labels: Tensor = None,
        known: Known | None = None,
        **options: Any,
    ) -> Floats:
        """Denoise latents step by step.

        Args:
            latents: standard-normal noise, float32 `(n, h, w, c)`.
            context, negative: text encodings `(n, tokens, width)` of prompts and negative prompts. Different
                lengths are repeated to the least common multiple.
            on_step: called after each step with a `Denoised(step, latents)`.
            channels: additional input channels, float32 `(n, h, w, k)`, for a UNet that takes k more.
            class_labels: int `(n,)`, for a UNet with `num_class_embeds`.
            known: `Known` content that is restored after each step, or None.
            options: as `Denoiser.steps` takes them: guidance_scale, sampler, num_inference_steps, eta,
                streams, ...

        Returns:
            Latents, float32 `(n, h, w, c)`.

        Raises:
            UserError: an array is of another type or shape, is missing, or is not taken by the UNet; or as
                `Denoiser.steps`.
        """
        config = self.unet.config
        latents = float_array("latents", latents, None, None, None, config.out_channels)
        count, width, more = (
            len(latents),
            config.cross_attention_dim,
            config.in_channels - config.out_channels,
        )
        context = float_array("text encoding", context, count, None, width)
        if negative is not None:
            negative = float_array("negative text encoding", negative, count, None, width)
        if _is_taken("channels", channels, more):
            channels = float_array("channels", channels, *latents.shape[:3], more)
        if _is_taken("class_labels", class_labels, config.num_class_embeds):
            labels = float_array("class_labels", class_labels, count)
            for label in labels:
                if label not in range(config.num_class_embeds):
                    raise UserError(
                        f"class_labels {shown(label.item())}: out of range; use whole numbers from 0 to "
                        f"{config.num_class_embeds - 1}"
                    )
            class_labels = labels.astype("int32")
        if on_step is not None and not callable(on_step):
            raise UserError(f"on_step {shown(on_step)}: no function; give one that takes a Denoised")
        context, negative = equally_long(context, negative)
        options |= {"channels": channels, "class_labels": class_labels, "known": known}
        for denoised in self._denoiser.steps(latents, context, negative, **options):
            if on_step is not None:
                on_step(denoised)
        return ops.convert_to_numpy(denoised.latents)

    def decode(self, latents: Tensor) -> Images:
        """Decode scaled latents by the VAE.

        Args:
            latents: `(n, h, w, c)`.

        Returns:
            Images, uint8 `(n, 8 * h, 8 * w, 3)`; 8 is the VAE's factor.

        Raises:
            UserError: the latents have another type or shape, or latents or images are not finite.
        """
        latents = float_array("latents", latents, None, None, None, self.vae.config.latent_channels)
        check_inputs({"latents": latents})
        with interruption.phase("decoding images", in_commands=True):
            images = self._tiled(self._decode, latents, self.vae.config.downsampling)
        check_result(images, self.vae, "VAE")
        return images_from_unit(images)

    # Helpers

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return the shape `(h, w, c)` of the latents of images.

        Args:
            height, width: in pixels; by default the size that the model was trained at.

        Raises:
            UserError: a side is no whole number up to `LONGEST_SIDE`, or no multiple of the VAE's factor.
        """
        factor = self.vae.config.downsampling
        sides = []
        for title, side in (("height", height), ("width", width)):
            usual = self.unet.config.sample_size * factor
            side = usual if side is None else whole_number(title, side, 1, LONGEST_SIDE)
            if side % factor:
                raise UserError(f"{title} {side}: does not fit the model; use a multiple of {factor}")
            sides.append(side // factor)
        return (*sides, self.vae.config.latent_channels)

    @formerly(num_steps="num_inference_steps")
    def parameters(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Return the parameters to write into an image's file, for `keras_sd.save_png`.

        Args:
            prompt, negative_prompt: texts; for a walk, a list of prompts. LoRAs in the model are appended to
                each prompt as tags.
            settings: seed (of the call plus the image's index), size `(height, width)` in pixels, and other
                arguments of the task.

        Returns:
            Name -> value, with A1111's names.
        """
        return image_parameters(self, prompt, negative_prompt, **settings)

    def _text_encoding(self, clip_skip):
        """Return the compiled text encoder without its last layers."""
        encoder = self.text_encoder
        if clip_skip is None:
            clip_skip = encoder.clip_skip
        blocks = encoder.config.num_hidden_layers
        clip_skip = whole_number("clip_skip", clip_skip, 0, blocks - 1)
        if clip_skip not in self._text_encodings:

            def encode(ids):
                if clip_skip == encoder.clip_skip:
                    return encoder(ids)
                return encoder.hidden_states(ids, -1 - clip_skip)

            self._text_encodings[clip_skip] = backend.jit_for_engine(
                self._engine,
                "text encoder",
                encoder.compute_dtype,
                encode,
                encoder.variables,
                backend.compiles(self._jit_compile, encoder.compute_dtype),
                identity=functools.partial(backend.identity_of, "encode text", clip_skip, encoder),
            )
        return self._text_encodings[clip_skip]

    def _checked(self, images):
        """Return images as `(n, height, width, 3)`, after checking that their size fits the VAE."""
        images = as_images(images)
        self.latent_shape(*images.shape[1:3])
        return images

    def _encode_unit(self, images):
        with interruption.phase("encoding images", in_commands=True):
            return self._tiled(self._encode_image, images, 1 / self.vae.config.downsampling)

    def _tiled(self, function, inputs, scale):
        """Apply the VAE's encoder or decoder in batches, and in tiles to large images."""
        positions = self.vae.config.downsampling if scale < 1 else 1
        if max(inputs.shape[1:3]) <= LARGEST_UNTILED * positions:
            return self._in_batches(function, inputs)
        return in_tiles(
            lambda tiles: self._in_batches(function, tiles, limit=1),
            inputs,
            tile=_TILE * positions,
            overlap=_TILE_OVERLAP * positions,
            scale=scale,
        )

    def _image_to_latents(self, images):
        return self.vae.encode(images).mode() * self.vae.config.scaling_factor

    def _latents_to_image(self, latents):
        return self.vae.decode(latents / self.vae.config.scaling_factor)

    def _in_batches(self, function, inputs, limit=None):
        return in_batches(function, inputs, limit or self.batch_size)


def _is_taken(title, values, number):
    """Return whether the UNet takes an input; raise a UserError if it is missing, or given in vain."""
    if bool(number) != (values is not None):
        takes = "takes them; give them" if number else "takes none; leave them out"
        raise UserError(f"{title}: the UNet {takes}")
    return bool(number)
