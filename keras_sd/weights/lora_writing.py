"""Writing LoRA files in PEFT's and kohya's dialects."""

import hashlib

import numpy as np
from safetensors.numpy import save

from keras_sd.errors import UserError
from keras_sd.weights.lora_files import KOHYA_PREFIXES
from keras_sd.weights.lora_updates import Decomposed, Kronecker, LowRank
from keras_sd.weights.safetensors_files import DTYPES, converted, write_safetensors

_LEGACY_BYTES = slice(0x100000, 0x110000)


def write_lora(path, lora, dialect="peft", dtype=None, metadata=None):
    """Write the updates of a LoRA as a safetensors file.

    Args:
        path: the file.
        lora: dictionary of part -> layer -> `lora_updates.Update`, as `read_lora` returns it.
        dialect: "peft", which diffusers reads, or "kohya". PEFT's dialect has no entry for alpha that all
            readers know, so the scale is multiplied into `up`. It has no LoKr and no LoHa.
        dtype: as in `write_safetensors`.
        metadata: dictionary of texts for the file's header, which gets hashes of the tensors, too.

    Raises:
        UserError: the dialect is unknown or has no such kind of update, or as `write_safetensors`.
    """
    if dialect not in ("peft", "kohya"):
        raise UserError(f"LoRA dialect {dialect!r}: unknown; use peft or kohya")
    tensors = {}
    for part, layers in lora.items():
        for layer, update in layers.items():
            if dialect == "peft":
                tensors |= _peft_tensors(f"{part}.{layer}", update, dtype)
            else:
                tensors |= _kohya_tensors(KOHYA_PREFIXES[part] + layer.replace(".", "_"), update)
    _write(path, tensors, dtype, metadata)


def write_kohya(path, updates, dtype=None, metadata=None):
    """Write updates by kohya's names of their layers, as `lora_arithmetic` has them.

    Args:
        updates: kohya's name of a layer -> `lora_updates.Update`.
        path, dtype, metadata: as `write_lora` takes them.
    """
    tensors = {}
    for name, update in updates.items():
        tensors |= _kohya_tensors(name, update)
    _write(path, tensors, dtype, metadata)


def _write(path, tensors, dtype, metadata):
    if metadata:
        tensors = {name: converted(name, array, dtype) for name, array in tensors.items()}
        metadata = with_hashes(tensors, metadata)
    write_safetensors(path, tensors, dtype, metadata)


def with_hashes(tensors, metadata):
    """Return the metadata with the hashes by which A1111 and kohya's tools recognise a LoRA's tensors.

    `sshs_model_hash` is the SHA-256 of all that follows the header; `sshs_legacy_hash` is the older one, of
    64 KiB of a file with kohya's entries.
    """
    written = memoryview(
        save(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    )
    start = 8 + int.from_bytes(written[:8], "little")
    return {
        **metadata,
        "sshs_model_hash": hashlib.sha256(written[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(written[_LEGACY_BYTES]).hexdigest()[:8],
    }


def _peft_tensors(name, update, dtype):
    tensors = {}
    if isinstance(update, Decomposed):
        if update.by_input:
            raise UserError(f"{name}: PEFT has no DoRA of columns; use the dialect kohya")
        # PEFT writes the name without ".weight", and transformers 5 reads it with it alone.
        tensors[f"{name}.lora_magnitude_vector.weight"] = _peft_magnitude(update)
        update = update.update
    if not isinstance(update, LowRank):
        raise UserError(f"{name}: diffusers reads no LoKr and no LoHa; use the dialect kohya")
    down, up = _with_scale(update.down, update.up, update.alpha / len(update.down), dtype)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up} | tensors


def _peft_magnitude(update):
    magnitude = np.asarray(update.magnitude).reshape(-1)
    window = len(update.update.shape) - 2
    return magnitude.reshape(1, -1, *(1,) * window) if window else magnitude


def _kohya_tensors(name, update):
    tensors = {}
    if isinstance(update, Decomposed):
        axes = len(update.update.shape) - 1
        shape = (1, -1, *(1,) * (axes - 1)) if update.by_input else (-1, *(1,) * axes)
        tensors["dora_scale"] = np.asarray(update.magnitude).reshape(shape)
        update = update.update
    if isinstance(update, LowRank):
        tensors |= {"lora_down.weight": update.down, "lora_up.weight": update.up}
    elif isinstance(update, Kronecker):
        tensors |= _factors("lokr_w1", update.w1) | _factors("lokr_w2", update.w2)
    else:
        tensors |= _factors("hada_w1", update.first) | _factors("hada_w2", update.second)
    tensors["alpha"] = np.asarray(update.alpha, "float32")
    return {f"{name}.{role}": array for role, array in tensors.items()}


def _factors(name, factors):
    if len(factors) == 1:
        return {name: factors[0]}
    a, b = factors
    return {f"{name}_a": a, f"{name}_b": b.reshape(len(b), -1)}


def _with_scale(down, up, scale, dtype):
    """Return the two factors of an update with `scale` multiplied in, in the type to write."""
    kind = np.dtype(DTYPES[dtype] if dtype else up.dtype)
    scaled = np.asarray(up, "float32") * np.float32(scale)
    if kind != np.float16:
        return down, scaled.astype(kind)
    # float16 loses precision below 6e-5. A power of two, which is exact, gives both factors the same
    # magnitude.
    down = np.asarray(down, "float32")
    largest, own = np.abs(scaled).max(initial=0), np.abs(down).max(initial=0)
    share = np.float32(2.0 ** np.round(np.log2(largest / own) / 2)) if largest and own else np.float32(1)
    return (down * share).astype(kind), (scaled / share).astype(kind)
