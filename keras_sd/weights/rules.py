"""The weight map: one rule between Keras variables and the tensors of public checkpoints.

The attribute trees of the models mirror the published parameter trees, so the name of a tensor is the path of
attributes and list indices to its variable. Only its last part is renamed (`kernel` is torch's `weight`), and
only kernels are transposed, by their rank. There is no table of tensors, and the rule works in both
directions.
"""

import functools
import hashlib

import keras
import numpy as np

from keras_sd import backend
from keras_sd.errors import UserError
from keras_sd.models.initializers import deferring
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.precision import dtype_policy
from keras_sd.models.quantization import refuse_quantized
from keras_sd.weights.conversion import Conversion, convert, is_finite
from keras_sd.weights.expected_shapes import REMEDY, account, check_config, same_shape
from keras_sd.weights.old_names import canonical_name
from keras_sd.weights.safetensors_files import is_weight, type_name

# By rank: torch has a kernel's outputs first, (out, in) or OIHW, Keras last, (in, out) or HWIO.
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


def _torch_axes(parameter):
    """Return the order of the Keras variable's axes in the torch tensor."""
    rank = len(parameter.variable.shape)
    return _TO_TORCH[rank] if parameter.variable.name == "kernel" else tuple(range(rank))


def torch_shape(parameter):
    """Return the shape of a `Parameter`'s variable in torch layout."""
    return tuple(parameter.variable.shape[axis] for axis in _torch_axes(parameter))


def torch_state(model, is_wanted=lambda name: True):
    """Return the model's weights under their published names in torch layout.

    Args:
        is_wanted: `is_wanted(name)` returns whether a weight is returned; reading one may copy it.

    Returns:
        A dictionary of NumPy arrays, in the variables' own precision.

    Raises:
        UserError: the model is quantized.
    """
    refuse_quantized("weights", model)
    return {
        parameter.name: to_torch(parameter, parameter.variable)
        for parameter in parameter_paths(model)
        if is_wanted(parameter.name)
    }


def open_model(model_class, config, tensors, *, source="weights", dtype="float32", partial=False):
    """Build a model whose variables are initialised with published tensors.

    Random initial values would take longer than reading the file, and zeros as long.

    Args:
        model_class, config: the model and its config.
        tensors, source: as in `load_weights`.
        dtype: a precision, as `keras_sd.models.precision.dtype_policy` takes it.
        partial: load the tensors that fit and warn of the others; missing ones get their initial values.

    Raises:
        UserError: as `load_weights`.
    """
    if backend.plan() is not None:
        with dtype_policy(dtype):
            return model_class(config)
    check_tensors(config, tensors, source, partial)
    with dtype_policy(dtype), keras.StatelessScope(), deferring() as initializers:
        # In this scope variables get their values only at its end.
        try:
            model = model_class(config)
            found = _matched(model, tensors, source, partial)
        except UserError:
            for initializer in initializers.values():
                initializer.initializer = keras.initializers.Zeros()
            raise
        bad = _set_initializers(found, tensors, initializers)
    if bad:
        raise _non_finite(bad, source)
    return model


def check_tensors(config, tensors, source="weights", partial=False):
    """Raise a UserError unless a config describes these tensors; `open_model` checks this before building.

    Args:
        config, tensors, source, partial: as in `open_model`.
    """
    check_config(config, _given(tensors)[1], source, partial)


def _set_initializers(found, tensors, initializers):
    """Set the array of each variable's initializer; return the names of arrays that are not finite."""
    arrays, bad = convert(
        [
            Conversion(_to_keras(parameter, tensors[name]), parameter.variable.dtype)
            for parameter, name in found
        ]
    )
    for (parameter, _), array in zip(found, arrays, strict=True):
        initializers[id(parameter.variable)].load = functools.partial(backend.to_tensor, array)
    return [found[index][1] for index in bad]


def _to_keras(parameter, array):
    """Return a view of a published array with the axes of the `Parameter`'s variable."""
    # A 1x1 convolution and a linear layer hold the same numbers; files use either shape.
    shaped = np.reshape(array, torch_shape(parameter))
    return shaped.transpose(np.argsort(_torch_axes(parameter)))  # the inverse permutation


def from_torch(parameter, array):
    """Return an array in torch layout transposed to the layout of the `Parameter`'s variable, float32."""
    return np.asarray(_to_keras(parameter, array), "float32", order="C")


def to_torch(parameter, array):
    """Return an array in the layout of the `Parameter`'s variable transposed to torch layout."""
    return np.asarray(array).transpose(_torch_axes(parameter))


def load_weights(model, tensors, *, prefix="", source="weights", remedy=REMEDY):
    """Load published tensors into a model.

    Nothing is assigned unless every tensor has a variable, every variable has a tensor, all shapes agree and
    all values are finite.

    Args:
        model: the built Keras model.
        tensors: a mapping of published names to arrays in torch layout; any float precision.
        prefix: load only tensors whose names begin with it; the prefix is removed.
        source: the tensors' origin in messages, usually the file.
        remedy: for the message if they are not the model's.

    Raises:
        UserError: tensors are missing, left over, misshapen or not finite.
    """
    tensors = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    found = _matched(model, tensors, source, remedy=remedy)
    bad = [name for _, name in found if not is_finite(np.asarray(tensors[name]))]
    if bad:
        raise _non_finite(bad, source)
    for parameter, name in found:
        parameter.variable.assign(
            keras.ops.cast(
                np.ascontiguousarray(_to_keras(parameter, tensors[name])), parameter.variable.dtype
            )
        )


def _given(tensors):
    """Return the names and the shapes of tensors, both by canonical name."""
    given = {canonical_name(name): name for name in tensors}
    given.pop(None, None)
    return given, {name: tuple(tensors[key].shape) for name, key in given.items()}


def _matched(model, tensors, source, partial=False, remedy=REMEDY):
    """Return pairs of a `Parameter` and the name of its tensor; without `partial`, all must match."""
    given, shapes = _given(tensors)
    wanted = {canonical_name(parameter.name): parameter for parameter in parameter_paths(model)}
    if not partial:
        expected = {name: torch_shape(parameter) for name, parameter in wanted.items()}
        account(type(model).__name__, expected, shapes, source, remedy=remedy)
    odd = [given[name] for name in wanted if name in given and not is_weight(tensors[given[name]])]
    if odd:
        raise UserError(
            f"{source}: {odd[0]} is of type {type_name(tensors[odd[0]])}, the first of {len(odd)} that no "
            "weights have; convert the file to F32, F16 or BF16"
        )
    return [
        (parameter, given[name])
        for name, parameter in wanted.items()
        if name in given and same_shape(shapes[name], torch_shape(parameter))
    ]


def _non_finite(names, source):
    return UserError(
        f"{source}: {len(names)} tensors hold NaN or infinity, the first is {names[0]}; use an undamaged file"
    )


def weights_fingerprint(model, left_out=()):
    """Return the SHA-256 of a model's weights with their names, in hexadecimal; None if there are none.

    Args:
        left_out: variables to ignore.
    """
    ignored = {id(variable) for variable in left_out}
    parameters = [parameter for parameter in parameter_paths(model) if id(parameter.variable) not in ignored]
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.name.encode())
        if backend.plan() is None:  # otherwise there are no values
            digest.update(np.ascontiguousarray(backend.to_numpy(parameter.variable)).view(np.uint8))
    return digest.hexdigest() if parameters else None
