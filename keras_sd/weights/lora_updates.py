"""The kinds of update that a LoRA file can hold for a layer, and how each changes the layer's weight.

All arrays are in torch layout: `(out, in)` for a linear layer, `(out, in, height, width)` for a convolution.
"""

from typing import NamedTuple, TypeAlias

import numpy as np

from keras_sd.errors import UserError

_EPSILON = np.finfo("float32").eps


class LowRank(NamedTuple):
    """LoRA (Hu et al., 2022), of a convolution LoCon: the update `alpha / rank * up @ down` of one layer.

    `down` is `(rank, in, …)` and `up` is `(out, rank, …)`.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def shape(self):
        """The shape of the update."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def scaled_product(self):
        """The full update of the layer's weight, float32."""
        rank = len(self.down)
        down = np.asarray(self.down, "float32").reshape(rank, -1)
        product = np.asarray(self.up, "float32").reshape(-1, rank) @ down
        return np.float32(self.alpha / rank) * product.reshape(-1, *self.down.shape[1:])


class Hadamard(NamedTuple):
    """LoHa (Hyeon-Woo et al., 2022): the elementwise product of two low-rank products, times `alpha / rank`.

    `a` is `(out, rank)` and `b` is `(rank, in * …)` in both.
    """

    first: tuple[np.ndarray, np.ndarray]
    second: tuple[np.ndarray, np.ndarray]
    alpha: float

    @property
    def shape(self):
        """The shape of the update; the axes of a kernel's window are joined with its inputs."""
        a, b = self.first
        return a.shape[0], b.size // len(b)

    @property
    def scaled_product(self):
        """The full update of the layer's weight, float32."""
        return np.float32(self.alpha / len(self.first[1])) * _product(self.first) * _product(self.second)


class Kronecker(NamedTuple):
    """LoKr (Yeh et al., 2024): the Kronecker product of two matrices, the second one with a kernel's window.

    Each is one array, or a pair of factors `(rows, rank)` and `(rank, columns, …)` whose product it is.
    `alpha / rank` scales the update; without a pair there is no rank and no scale.
    """

    w1: tuple[np.ndarray, ...]
    w2: tuple[np.ndarray, ...]
    alpha: float

    @property
    def rank(self):
        """The rank of the factors; None without a pair."""
        return next((len(pair[1]) for pair in (self.w2, self.w1) if len(pair) == 2), None)

    @property
    def shape(self):
        """The shape of the update."""
        rows, columns, window = self.w1[0].shape[0], self.w1[-1].shape[1], self.w2[-1].shape[2:]
        return rows * self.w2[0].shape[0], columns * self.w2[-1].shape[1], *window

    @property
    def scaled_product(self):
        """The full update of the layer's weight, float32."""
        first, second = _product(self.w1), _product(self.w2).reshape(len(self.w2[0]), *self.w2[-1].shape[1:])
        product = np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)
        return product if self.rank is None else np.float32(self.alpha / self.rank) * product


class Decomposed(NamedTuple):
    """DoRA (Liu et al., 2024): an update after which each row of the weight has the length `magnitude`.

    Attributes:
        update: one of the other kinds.
        magnitude: `(out,)`, or `(in,)` with `by_input`.
        by_input: whether lengths are those of the columns, as in older files of LyCORIS.
        is_interpolated: how a weight other than 1 acts. A1111 and ComfyUI, for which files with `dora_scale`
            are made, go that part of the way to the new kernel. PEFT multiplies the update only.
    """

    update: LowRank | Hadamard | Kronecker
    magnitude: np.ndarray
    by_input: bool = False
    is_interpolated: bool = True


Update: TypeAlias = LowRank | Hadamard | Kronecker | Decomposed


def _product(factors):
    """Return the product of one or two factors as a matrix, float32; a window's axes are joined."""
    matrices = [np.asarray(factor, "float32").reshape(len(factor), -1) for factor in factors]
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


def change_of(update, kernel, weight=1.0):
    """Return what an update of a weight adds to a layer's kernel.

    Args:
        update: an `Update`.
        kernel: the kernel without updates, float32 in torch layout.
        weight: the weight of the LoRA, which a user gives.

    Returns:
        An array like `kernel`.
    """
    weight = np.float32(weight)
    if not isinstance(update, Decomposed):
        return weight * update.scaled_product.reshape(kernel.shape)
    share = np.float32(1) if update.is_interpolated else weight
    changed = kernel + share * update.update.scaled_product.reshape(kernel.shape)
    changed *= _scale(update, changed)
    return (weight if update.is_interpolated else 1) * (changed - kernel)


def _scale(update, kernel):
    """Return by what a kernel is multiplied to have the magnitude of a `Decomposed` update."""
    axis = 1 if update.by_input else 0
    others = tuple(other for other in range(kernel.ndim) if other != axis)
    lengths = np.sqrt(np.square(kernel).sum(axis=others)) + _EPSILON
    return np.expand_dims(np.asarray(update.magnitude, "float32").reshape(-1) / lengths, others)


def update_of(tensors, shape, name, path, alpha_of):
    """Return the update that the tensors of one layer describe.

    A convolution's Tucker form (LyCORIS' `lora_mid`, `lokr_t2`, `hada_t1`) is multiplied into its second
    factor, which gives the same update.

    Args:
        tensors: role -> array; roles are "down", "up", "mid", "dora_scale", "magnitude" and LyCORIS' names.
        shape: of the layer's weight.
        name, path: of the layer and the file, for messages.
        alpha_of: `alpha_of(rank)` returns alpha.

    Raises:
        UserError: a tensor is missing, not finite or does not fit the others.
    """
    plain = {role: array for role, array in tensors.items() if role not in _DORA}
    kinds = sorted({_KINDS.get(role.partition("_")[0], "lora") for role in plain})
    if len(kinds) > 1:
        one, other = kinds[:2]
        raise UserError(f"{path}: {name} has tensors of {one} and of {other}; give each in a file of its own")
    for array in tensors.values():
        if not array.size:
            raise UserError(f"{path}: {name} has a half that is empty; fetch the file again")
        if not np.isfinite(np.asarray(array, "float32")).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; use an undamaged file")
    make = {"loha": _hadamard, "lokr": _kronecker}.get("".join(kinds), _low_rank)
    try:
        return make(_Tensors(plain, shape, name, path), alpha_of)
    except UserError:
        raise
    except (ValueError, IndexError) as error:
        shapes = " and ".join(str(array.shape) for array in plain.values())
        raise UserError(f"{path}: {name} has halves {shapes} that do not fit together") from error


_KINDS = {"hada": "loha", "lokr": "lokr"}
_DORA = ("dora_scale", "magnitude")


class _Tensors:
    """The tensors of a layer by role; a missing one raises UserError."""

    def __init__(self, tensors, shape, name, path):
        self._tensors, self._name, self._path = tensors, name, path
        self._inputs = np.prod(shape[1:])

    def __getitem__(self, role):
        if role not in self._tensors:
            raise UserError(f"{self._path}: {self._name} lacks its {role} half; fetch the file again")
        return self._tensors[role]

    def __contains__(self, role):
        return role in self._tensors

    def core(self, role, inputs):
        """Return the core `(rank, rank, …)` of a Tucker form, after checking that its product is not huge."""
        core = np.asarray(self[role], "float32")
        _check(core.ndim >= 2 and inputs * np.prod(core.shape[2:]) <= self._inputs)
        return core


def _low_rank(tensors, alpha_of):
    down, up = tensors["down"], tensors["up"]
    if down.ndim < 2 or up.ndim < 2 or len(down) != up.shape[1] or up.size != len(up) * len(down):
        raise ValueError
    if "mid" in tensors:
        mid = tensors.core("mid", down.shape[1])
        _check(mid.shape[:2] == (len(down), len(down)) and down.size == len(down) * down.shape[1])
        inner = np.asarray(down, "float32").reshape(len(down), -1)
        down = np.einsum("mn...,ni->mi...", mid, inner)
    return LowRank(down, up, alpha_of(len(down)))


def _check(is_right):
    if not is_right:
        raise ValueError


def _with_core(a, b, core):
    """Return the pair `(rows, rank)`, `(rank, columns, …)` of LyCORIS' Tucker form.

    Args:
        a, b: `(rank, rows)` and `(rank, columns)`.
        core: `(rank, rank, …)`.
    """
    a, b = (np.asarray(array, "float32") for array in (a, b))
    _check(a.ndim == b.ndim == 2 and core.shape[:2] == (len(a), len(b)))
    return a.T, np.einsum("ij...,jr->ir...", core, b)


def _hadamard(tensors, alpha_of):
    pairs = []
    for index in "12":
        a, b = tensors[f"hada_w{index}_a"], tensors[f"hada_w{index}_b"]
        if f"hada_t{index}" in tensors:
            a, b = _with_core(a, b, tensors.core(f"hada_t{index}", b.shape[1]))
        _check(a.ndim == 2 and b.ndim >= 2 and a.shape[1] == len(b))
        pairs.append((a, b))
    _check(_sizes(pairs[0]) == _sizes(pairs[1]))
    return Hadamard(*pairs, alpha_of(len(pairs[0][1])))


def _sizes(pair):
    return len(pair[0]), pair[1].size // len(pair[1])


def _kronecker(tensors, alpha_of):
    matrices = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            matrices.append((tensors[name],))
            _check(tensors[name].ndim >= 2)
            continue
        a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
        if name == "lokr_w2" and "lokr_t2" in tensors:
            a, b = _with_core(a, b, tensors.core("lokr_t2", b.shape[1]))
        _check(a.ndim == 2 and b.ndim >= 2 and a.shape[1] == len(b))
        matrices.append((a, b))
    _check(matrices[0][-1].ndim == 2)
    update = Kronecker(*matrices, 1.0)
    return update._replace(alpha=alpha_of(update.rank or 1))


def fitted(update, shape):
    """Return an update for a layer of this shape; None if it is for another layer.

    A 1x1 convolution and a linear layer hold the same numbers, and files use either shape. LyCORIS joins a
    window with the inputs in the second factor of LoKr and LoHa.
    """
    if isinstance(update, Kronecker) and len(update.w2) == 2 and update.w2[1].ndim == 2 and len(shape) > 2:
        a, b = update.w2
        window = int(np.prod(shape[2:]))
        if b.shape[1] % window:
            return None
        update = update._replace(w2=(a, b.reshape(len(b), -1, *shape[2:])))
    own = update.shape
    if own[0] != shape[0] or np.prod(own) != np.prod(shape):
        return None
    return update if isinstance(update, Hadamard) or own[1] == shape[1] else None


def decomposed(update, tensors, shape, name, path):
    """Return an update with the magnitude of DoRA that its tensors have, if any.

    Raises:
        UserError: the magnitude does not fit the layer.
    """
    if not tensors.keys() & set(_DORA):
        return update
    is_interpolated = "dora_scale" in tensors
    magnitude = tensors["dora_scale" if is_interpolated else "magnitude"]
    by_input = is_interpolated and magnitude.shape[:1] != shape[:1]
    if magnitude.size != shape[1 if by_input else 0] or len(tensors.keys() & set(_DORA)) > 1:
        raise UserError(
            f"{path}: {name} has a magnitude of DoRA {magnitude.shape} that does not fit the layer {shape}; "
            "use a LoRA of this base model"
        )
    return Decomposed(update, magnitude, by_input, is_interpolated)
