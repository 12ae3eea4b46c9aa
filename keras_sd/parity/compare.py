"""Compares a written model with its source: tensor by tensor, and by the outputs of its parts.

Tensors are compared as they stand in the files. Outputs are computed in float32 on fixed random inputs by
the source's parts, by the written parts and, if they are installed, by diffusers and transformers.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from keras import ops
from safetensors.numpy import load_file, save_file

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import installed_version
from keras_sd.files.json_files import read_json
from keras_sd.models.image_encoder import normalize_pixels
from keras_sd.parity import reference
from keras_sd.parity.report import (
    ADDED,
    BAR,
    CHANGED,
    EQUAL,
    FAR,
    GOOD,
    LEFT_OUT,
    MISSING,
    NOT_COMPARED,
    ROUNDED,
    ROUNDING,
    OutputParity,
    Report,
    TensorParity,
)
from keras_sd.weights import readers
from keras_sd.weights.checkpoint import CLIP_HEAD, Checkpoint
from keras_sd.weights.loading import open_parts
from keras_sd.weights.old_names import canonical_name

_ENCODED = "VAE encode"
_REFERENCE_LIBRARIES = ("diffusers", "transformers", "torch")

# Sides in latent positions, as small as shows a fault: a full-size model then takes seconds.
_UNET_SIDE, _VAE_SIDE = 16, 8
_CONTEXT_TOKENS = 77
_TIMESTEP = 601


def compare_tensors(part, source, written):
    """Compare every tensor of a part in two files.

    Args:
        part: "text_encoder", "image_encoder", "unet" or "vae".
        source, written: mappings of arrays by published names, in any release's spelling.

    Returns:
        A list of `TensorParity`.
    """
    source, written = _by_canonical_name(source), _by_canonical_name(written)
    return [_compared(part, name, source.get(name), written.get(name)) for name in source | written]


def _by_canonical_name(tensors):
    names = {canonical_name(name): name for name in tensors}
    return {name: tensors[given] for name, given in names.items() if name is not None}


def _compared(part, name, source, written):
    if source is None:
        return TensorParity(part, name, written.shape, None, written.dtype.name, None, ADDED)
    if written is None:
        # Where there is no image encoder to compare texts with, its head is not part of the model.
        has_no_place = name in CLIP_HEAD and part != "image_encoder"
        verdict = LEFT_OUT if has_no_place else MISSING
        return TensorParity(part, name, source.shape, source.dtype.name, None, None, verdict)
    types = source.dtype.name, written.dtype.name
    # A 1x1 convolution and a linear layer hold the same numbers; files have either.
    if np.squeeze(source).shape != np.squeeze(written).shape:
        return TensorParity(part, name, source.shape, *types, None, CHANGED)
    written = np.reshape(written, source.shape)
    single = source.astype("float32")
    if not np.array_equal(_bits(single.astype(written.dtype)), _bits(written)):
        verdict = CHANGED
    elif np.array_equal(source, written):
        verdict = EQUAL
    else:
        verdict = ROUNDED
    difference = float(np.abs(single - written.astype("float32")).max(initial=0))
    return TensorParity(part, name, source.shape, *types, difference, verdict)


def _bits(array):
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def part_inputs(part, config):
    """Return the random inputs on which a part is compared, always the same ones: NumPy arrays by name.

    Images and latents are channels-last. Of the image encoder `pixels` is what CLIP's own code is given,
    `images` the same in [-1, 1].
    """
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape).astype("float32")

    if part == "text_encoder":
        shape = (1, config.max_position_embeddings)
        return {"ids": generator.integers(0, config.vocab_size, shape).astype("int32")}
    if part == "image_encoder":
        images = generator.uniform(-1, 1, (1, config.image_size, config.image_size, 3)).astype("float32")
        return {"images": images, "pixels": normalize_pixels(images)}
    if part == "vae":
        side = _VAE_SIDE * config.downsampling
        return {
            "images": generator.uniform(-1, 1, (1, side, side, config.in_channels)).astype("float32"),
            "latents": normal(1, _VAE_SIDE, _VAE_SIDE, config.latent_channels),
        }
    inputs = {
        "latents": normal(1, _UNET_SIDE, _UNET_SIDE, config.in_channels),
        "timesteps": np.array([_TIMESTEP], "int32"),
    }
    if config.cross_attention_dim:
        inputs["context"] = normal(1, _CONTEXT_TOKENS, config.cross_attention_dim)
    if config.num_class_embeds:
        inputs["class_labels"] = np.array([config.num_class_embeds // 2], "int32")
    return inputs


def part_outputs(part, model):
    """Return what a Keras model computes from `part_inputs`: NumPy arrays, channels-last, by title."""
    inputs = part_inputs(part, model.config)
    if part == "text_encoder":
        outputs = {"text encoder": model(inputs["ids"])}
    elif part == "image_encoder":
        outputs = {"image encoder": model(inputs["images"])}
    elif part == "vae":
        outputs = {_ENCODED: model.encode(inputs["images"]).mode()} if model.encoder else {}
        outputs["VAE decode"] = model.decode(inputs["latents"])
    else:
        arrays = [inputs[name] for name in ("latents", "timesteps", "context") if name in inputs]
        outputs = {"UNet": model(arrays, class_labels=inputs.get("class_labels"))}
    return {title: ops.convert_to_numpy(output) for title, output in outputs.items()}


def compare(path, source, source_outputs, output, configs=None, notes=()):
    """Read a written model back and compare it with its source.

    Args:
        path: where the source came from.
        source: the `Checkpoint` that was converted.
        source_outputs: `part_outputs` of the source's models, by part; these parts are compared.
        output: what was written, a folder in diffusers' layout or a single file.
        configs: for a single file, which holds none, a folder in diffusers' layout with the configs and the
            tokenizer of its parts.
        notes: sentences for the report.

    Returns:
        A `Report`.

    Raises:
        UserError: what was written cannot be read.
    """
    written = readers.read_checkpoint(output)
    tensors, outputs, inputs, written_outputs = [], [], {}, {}
    for part, expected in source_outputs.items():
        found = written.parts.get(part)
        own = compare_tensors(part, source.parts[part].tensors, found.tensors if found else {})
        if all(tensor.passes or tensor.difference is not None for tensor in own):
            model = _open(part, found, configs or output)
            inputs[part], written_outputs[part] = part_inputs(part, model.config), part_outputs(part, model)
            is_rounded = any(t.verdict == ROUNDED for t in own) and all(t.passes for t in own)
            outputs += compare_outputs("source", expected, written_outputs[part], is_rounded)
        else:
            outputs += _not_compared(expected, "source", "not computed: not the same tensors")
        tensors += own
    if not configs:
        outputs += compare_schedulers(source, written)
    packages = ("keras_sd", "keras", keras.backend.backend(), *_REFERENCE_LIBRARIES)
    versions = {name: installed_version(name) for name in packages}
    outputs += compare_with_libraries(output, configs, inputs, written_outputs, versions)
    today = datetime.date.today().isoformat()
    return Report(str(path), str(output), tensors, outputs, list(notes), today, versions)


def compare_schedulers(source, written):
    """Compare the files of two checkpoints that describe how a model is sampled.

    Returns:
        A list of `OutputParity`; nothing is computed.
    """
    entries = []
    for title in ("scheduler", "low_res_scheduler"):
        before, after = (_scheduler_of(checkpoint, title) for checkpoint in (source, written))
        if before is None and after is None:
            continue
        before, after = before or {}, after or {}
        other = [name for name in before | after if before.get(name) != after.get(name)]
        verdict = f"differs in {', '.join(other)}" if other else GOOD
        entries.append(OutputParity(title.replace("low_res_", "low-res "), "source", *(None,) * 3, verdict))
    return entries


def _scheduler_of(checkpoint, title):
    values = getattr(checkpoint, title)
    # A file without a class is written with the one that it was taken for.
    if values is None or values.get("_class_name") is not None:
        return values
    return SchedulerConfig.from_dict(values).to_dict()


def _open(part, found, folder):
    """Return the Keras model of a part that was read, with the config and the tokenizer of a folder."""
    folder = Path(folder)
    found = found._replace(config=read_json(folder / part / "config.json"))
    tokenizer = folder / "tokenizer" if part == "text_encoder" else None
    return open_parts(Checkpoint({part: found}, tokenizer=tokenizer))[part]


def compare_outputs(against, expected, computed, is_rounded=False):
    """Compare the outputs of a part, as `part_outputs` gives them.

    Args:
        against: whose the expected ones are, for the report.
        is_rounded: whether the computing part's tensors are roundings of the other's.

    Returns:
        A list of `OutputParity`.
    """
    entries = []
    for title, array in expected.items():
        difference, deviation = float(np.abs(array - computed[title]).max()), float(array.std())
        ratio = difference / deviation if difference else 0.0
        verdict = GOOD if ratio <= BAR else ROUNDING if is_rounded else FAR
        if not deviation and not difference:  # such as a new UNet's, whose last kernel is zero
            verdict = f"{NOT_COMPARED}: the output is the same number everywhere"
        entries.append(OutputParity(title, against, difference, deviation, ratio, verdict))
    return entries


def _not_compared(titles, against, verdict):
    return [OutputParity(title, against, None, None, None, verdict) for title in titles]


def compare_with_libraries(output, configs, inputs, written_outputs, versions):
    """Compare the outputs of our models of what was written with those of diffusers' and transformers'.

    Args:
        output, configs: as in `compare`.
        inputs, written_outputs: `part_inputs` and `part_outputs` by part.
        versions: dictionary of the libraries' versions; None for those that are not installed.

    Returns:
        A list of `OutputParity`. Where a library is missing, or cannot open a part, its verdict says so.
    """
    missing = [name for name in _REFERENCE_LIBRARIES if versions[name] is None]
    expected, failures = {}, {}
    if inputs and not missing:
        expected, failures = _outputs_of_libraries(output, configs, inputs)
    entries = []
    for part, computed in written_outputs.items():
        library = "diffusers" if part in ("unet", "vae") else "transformers"
        if missing:
            reason = f"{NOT_COMPARED}: {' and '.join(missing)} not installed"
        elif part == "vae" and _ENCODED not in computed:
            reason = f"{NOT_COMPARED}: {library} opens no VAE without an encoder"
        else:
            reason = failures.get(part)
        if reason:
            entries += _not_compared(computed, library, reason)
        else:
            own = {title: expected[title] for title in computed}
            entries += compare_outputs(f"{library} {versions[library]}", own, computed)
    return entries


def _outputs_of_libraries(output, configs, inputs):
    """Run `reference` as a program: (arrays by the output's title, reasons of failure by part)."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        job = {"model": str(output), "configs": configs and str(configs), "parts": list(inputs)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        arrays = {f"{part}/{name}": array for part, own in inputs.items() for name, array in own.items()}
        save_file(arrays, folder / "inputs.safetensors")
        done = subprocess.run(
            # -P keeps this package's folder, whose modules share names with others, off the search path.
            [sys.executable, "-P", reference.__file__, str(folder)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {}, dict.fromkeys(inputs, f"no result: {reason}")
        return load_file(folder / "outputs.safetensors"), read_json(folder / "failures.json")
