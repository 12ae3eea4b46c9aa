"""Ranks phrases for an image: OpenCLIP embeddings, and exact nearest-neighbour search."""

import contextlib
import difflib
import functools
import hashlib
import logging
import warnings
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from keras_sd.captions.clip_folder import open_folder
from keras_sd.errors import UserError, require
from keras_sd.weights.safetensors_files import write_safetensors

_TEXT_BATCH = 256
_QUERIES = 64


class Clip:
    """Embeds images and texts as unit vectors in one space (Radford et al., 2021, arXiv:2103.00020).

    Args:
        name: an open_clip model and its weights, such as `ViT-L-14/openai` (the CLIP of Stable Diffusion 1)
            or `ViT-H-14/laion2b_s32b_b79k` (Stable Diffusion 2). The weights may be a file:
            `ViT-L-14/my/clip.pt`. Or a folder with `open_clip_config.json` and
            `open_clip_model.safetensors`.
        device: torch device: "cpu", "cuda", "cuda:1", ...
        cache_folder: where the embeddings of long lists of phrases are cached; None for no cache.

    Raises:
        UserError: open_clip is not installed, does not know the model or cannot get its weights.
    """

    def __init__(self, name, device="cpu", cache_folder=None):
        self.device = device
        self.cache_folder = None if cache_folder is None else Path(cache_folder)
        self._model, self._preprocess, self._tokenize = _open(name, device)
        self._vectors = {}

    def encode_images(self, images):
        """Return the embeddings of a list of Pillow images: unit vectors, float32 (n, d)."""
        import torch

        pixels = torch.stack([self._preprocess(image) for image in images]).to(self.device)
        with torch.inference_mode():
            return self._model.encode_image(pixels, normalize=True).float().cpu().numpy()

    def encode_texts(self, texts):
        """Return the embeddings of texts, each cut to the model's length: unit vectors, float32 (n, d)."""
        import torch

        vectors = []
        for start in range(0, len(texts), _TEXT_BATCH):
            ids = self._tokenize(list(texts[start : start + _TEXT_BATCH])).to(self.device)
            with torch.inference_mode():
                vectors.append(self._model.encode_text(ids, normalize=True).float().cpu().numpy())
        return np.concatenate(vectors)

    def phrase_vectors(self, phrases):
        """Return the same as `encode_texts`, cached in memory and on disk for a list that is used again.

        The file name is a digest of the text tower's weights and of the list.
        """
        phrases = tuple(phrases)
        if phrases not in self._vectors:
            self._vectors[phrases] = self._kept_vectors(phrases)
        return self._vectors[phrases]

    def _kept_vectors(self, phrases):
        if self.cache_folder is None:
            return self.encode_texts(phrases)
        key = hashlib.sha256("\0".join(phrases).encode()).hexdigest()[:32]
        path = self.cache_folder / f"{self._digest}-{key}.safetensors"
        vectors = _read_vectors(path, len(phrases))
        if vectors is None:
            vectors = self.encode_texts(phrases)
            try:
                write_safetensors(path, {"vectors": vectors})
            except UserError as error:
                warnings.warn(f"{error}; the next run computes them again", stacklevel=2)
        return vectors

    @functools.cached_property
    def _digest(self):
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            if not name.startswith("visual."):
                digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _read_vectors(path, count):
    if not path.is_file():
        return None
    try:
        vectors = load_file(path)["vectors"]
    except (SafetensorError, KeyError, OSError):  # damaged: compute it again
        return None
    return vectors if len(vectors) == count else None


def _open(name, device):
    require("open_clip", instead="use `mode='caption'`")
    import open_clip

    if Path(name).is_dir():
        try:
            return open_folder(Path(name), device)
        except UserError:
            raise
        except Exception as error:
            raise _cannot_be_opened(name, error) from error
    identifier, _, pretrained = name.partition("/")
    options = _check_name(open_clip, identifier, pretrained)
    try:
        with _quiet():
            model, preprocess = open_clip.create_model_from_pretrained(
                identifier, pretrained=pretrained, device=device
            )
            tokenize = open_clip.get_tokenizer(identifier, **options)
    except Exception as error:  # from files, the hub or torch, each with exceptions of its own
        raise _cannot_be_opened(name, error) from error
    return model.eval(), preprocess, tokenize


def _cannot_be_opened(name, error):
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"CLIP {name}: cannot be opened ({line}); check the name, the connection and the files")


def _check_name(open_clip, identifier, pretrained):
    """Raise a UserError for a name that open_clip does not know; return its tokenizer's options."""
    models = open_clip.list_models()
    if identifier not in models:
        near = difflib.get_close_matches(identifier, models, n=3, cutoff=0.3)
        raise UserError(
            f"CLIP {identifier!r}: open_clip has no such model; try {', '.join(near) or models[0]}"
        )
    known = open_clip.list_pretrained_tags_by_model(identifier)
    if pretrained not in known and not Path(pretrained or " ").is_file():
        raise UserError(
            f"CLIP {identifier}: no weights {pretrained!r}; write {identifier}/ and then "
            f"{', '.join(known[:4]) or 'a file'}"
        )
    text = open_clip.get_model_config(identifier)["text_cfg"]
    for hub_name in (text.get("hf_model_name"), text.get("hf_tokenizer_name")):
        if hub_name and Path(hub_name).exists():
            raise UserError(
                f"CLIP {identifier}: the local folder {hub_name} would be used in place of the hub's "
                "repository; rename it, or start from another folder"
            )
    # By default, transformers asks on the terminal whether to run a repository's code.
    return {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}


@contextlib.contextmanager
def _quiet():
    """Silence the root logger, which open_clip writes to while it loads."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)


def top_k(queries, keys, count, lowest=False):
    """Return the `count` keys with the largest inner product with each query, exactly.

    Single precision selects the candidates, with a margin for the largest possible rounding error; double
    precision sorts them. Of equal products the lowest index comes first.

    Args:
        queries: float32 (n, d).
        keys: float32 (m, d).
        count: number of keys; all if there are fewer.
        lowest: return the smallest products instead, the smallest first.

    Returns:
        Indices into the keys (n, count), the best first, and their products, float64 (n, count).
    """
    count = min(count, len(keys))
    sign = np.float32(-1 if lowest else 1)
    indices = np.empty((len(queries), count), dtype=np.int64)
    products = np.empty((len(queries), count))
    # Error bound of a dot product: Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1.
    length = np.linalg.norm(keys, axis=1).max(initial=0.0)
    error = (keys.shape[1] + 2) * 2.0**-24 * np.linalg.norm(queries, axis=1) * length
    for start in range(0, len(queries), _QUERIES):
        rough = sign * (queries[start : start + _QUERIES] @ keys.T)
        limits = np.partition(rough, -count, axis=1)[:, -count]
        for row, (scores, limit) in enumerate(zip(rough, limits, strict=True), start):
            candidates = np.flatnonzero(scores >= limit - 2 * error[row])
            exact = (keys[candidates].astype(np.float64) * queries[row]).sum(axis=1)
            best = np.argsort(-sign * exact, kind="stable")[:count]
            indices[row], products[row] = candidates[best], exact[best]
    return indices, products
