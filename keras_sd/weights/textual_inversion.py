"""Textual inversion as a file format (Gal et al., 2023): reads and writes learned embeddings.

There are three dialects. diffusers stores `{token: vectors}`. A1111's web UI stores a pickle with
`string_to_param` and the token's `name`. kohya's scripts store `emb_params`; the token is the file's name.
"""

import numpy as np

from keras_sd.errors import UserError, os_errors_in_one_line
from keras_sd.files.json_files import shown
from keras_sd.weights.safetensors_files import file_in, read_safetensors, write_safetensors
from keras_sd.weights.torch_pickle import read_torch

DIFFUSERS_FILE = "learned_embeds.safetensors"
DIALECTS = ("diffusers", "kohya")

_FOLDER_FILES = (DIFFUSERS_FILE, "learned_embeds.bin")
_KOHYA_KEY = "emb_params"
MOST_VECTORS = 75  # tokens of a prompt
_SDXL_KEYS = {"clip_g", "clip_l"}


def embedding_file(path):
    """Return the path of an embedding file: the path itself, or the file in a folder."""
    return file_in(path, _FOLDER_FILES)


def read_embeddings(path, width):
    """Read learned embeddings from a file, or a folder with `learned_embeds.safetensors` or `.bin`.

    Args:
        path: a safetensors file, a torch file (`.pt`, `.bin`) or a folder.
        width: width of the text encoder's token embeddings.

    Returns:
        A dictionary of token -> its vectors, float32 `(k, width)`. The token is None if the file does not
        name it.

    Raises:
        UserError: the file is damaged, or holds no embeddings, embeddings of another model family, or NaN.
    """
    with os_errors_in_one_line(path):
        path = embedding_file(path)
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    return {token: _checked(array, width, path) for token, array in _arrays(content, path).items()}


def _arrays(content, path):
    """Return the arrays of a file of any dialect by token."""
    if isinstance(content, np.ndarray):
        return {None: content}
    if not isinstance(content, dict):
        content = {}
    if _SDXL_KEYS & content.keys():
        raise UserError(f"{path}: embeddings of Stable Diffusion XL; use ones made for this kind of model")
    if "string_to_param" in content:
        parameters, name = content["string_to_param"], content.get("name")
        # torch's ParameterDict is an object that keeps its parameters in an attribute.
        parameters = parameters.get("_parameters", parameters) if isinstance(parameters, dict) else {}
        found = [array for array in parameters.values() if isinstance(array, np.ndarray)]
        arrays = {name if isinstance(name, str) and name else None: array for array in found[:1]}
    elif _KOHYA_KEY in content:
        further = [name for name in content if name != _KOHYA_KEY]
        if further:
            raise UserError(f"{path}: {shown(further[0])} beside {_KOHYA_KEY}; give a file of one word")
        arrays = {None: content[_KOHYA_KEY]}
    else:
        arrays = content
    if not arrays or not all(_is_embedding(array) for array in arrays.values()):
        raise UserError(
            f"{path}: holds no embeddings; give a textual inversion in diffusers', A1111's or kohya's format"
        )
    return arrays


def _is_embedding(array):
    return isinstance(array, np.ndarray) and array.ndim in (1, 2) and array.size > 0


def _checked(array, width, path):
    vectors = np.atleast_2d(np.asarray(array, "float32"))
    if len(vectors) > MOST_VECTORS:
        raise UserError(
            f"{path}: {len(vectors)} vectors for one word, where a prompt has room for {MOST_VECTORS}; "
            "use a textual inversion of fewer"
        )
    if vectors.shape[1] != width:
        raise UserError(
            f"{path}: embeddings are {vectors.shape[1]} wide, the text encoder's {width}; "
            "use ones made for this kind of model"
        )
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: holds NaN or infinity; use an undamaged file")
    return vectors


def write_embeddings(path, embeddings, dialect="diffusers", dtype=None):
    """Write learned embeddings as a safetensors file.

    Args:
        path: the file.
        embeddings: dictionary from token to its vectors `(k, width)`.
        dialect: "diffusers", or "kohya", which holds one token, named by the file's name.
        dtype: as in `write_safetensors`.

    Raises:
        UserError: the dialect is unknown or cannot hold several tokens, or as `write_safetensors`.
    """
    if dialect not in DIALECTS:
        raise UserError(f"dialect {dialect!r} of embeddings: unknown; use {' or '.join(DIALECTS)}")
    if dialect == "kohya":
        if len(embeddings) != 1:
            raise UserError(f"{path}: kohya's files hold one word, not {len(embeddings)}; write one for each")
        (vectors,) = embeddings.values()
        embeddings = {_KOHYA_KEY: vectors}
    write_safetensors(path, embeddings, dtype)
