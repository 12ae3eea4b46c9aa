"""Operations that OpenVINO has as one: marks in a graph that is traced for it.

Written out, a group normalisation or an attention is a dozen operations, most of which OpenVINO computes one
by one. In place of them a trace for OpenVINO holds one operation, which TensorFlow could not run, with a
name and its settings. `convert_mark` makes of it what OpenVINO calls so. Stable Diffusion's UNet takes 0.75
of the time in float32 (2 images of 256 pixels).
"""

import contextlib
import contextvars
import json

from keras_sd.files.json_files import parse_json

_is_tracing = contextvars.ContextVar("is_tracing", default=False)
_MARK = "PyFunc"  # an operation of any inputs that carries a text


@contextlib.contextmanager
def tracing_for_openvino():
    """Inside the block functions are traced for OpenVINO, so they hold marks."""
    token = _is_tracing.set(True)
    try:
        yield
    finally:
        _is_tracing.reset(token)


def traces_for_openvino():
    """Return whether a graph is traced for OpenVINO, where `mark` may be used."""
    return _is_tracing.get()


def mark(name, inputs, shape, **settings):
    """Return the result of an operation that OpenVINO has.

    Args:
        name: "group_normalization", "layer_normalization" or "attention".
        inputs: tensors.
        shape: the result's; its type is that of the first input.
        settings: numbers.
    """
    import tensorflow as tf

    tensors = [tf.convert_to_tensor(one) for one in inputs]
    text = json.dumps({"name": name, "settings": settings})
    (result,) = tf.raw_ops.PyFunc(input=tensors, token=text, Tout=[tensors[0].dtype])
    result.set_shape(shape)
    return result


def marks_of_openvino():
    """Return the extensions by which `openvino.convert_model` understands marks."""
    from openvino.frontend.tensorflow import ConversionExtension

    return [ConversionExtension(_MARK, convert_mark)]


def convert_mark(node):
    """Return OpenVINO's outputs for a mark."""
    mark = parse_json(node.get_attribute("token", ""), "mark")
    inputs = [node.get_input(place) for place in range(node.get_input_size())]
    return [_OPERATIONS[mark["name"]](*inputs, **mark["settings"]).output(0)]


def _group_normalization(inputs, gamma, beta, groups, epsilon, silu):
    from openvino import opset13

    outputs = opset13.group_normalization(
        opset13.transpose(inputs, [0, 3, 1, 2]), gamma, beta, groups, epsilon
    )
    if silu:
        outputs = opset13.swish(outputs)
    return opset13.transpose(outputs, [0, 2, 3, 1])


def _layer_normalization(inputs, gamma, beta, epsilon):
    from openvino import opset13

    normal = opset13.mvn(inputs, [-1], True, epsilon, "inside_sqrt")
    return opset13.add(opset13.multiply(normal, gamma), beta)


def _attention(query, key, value):
    from openvino import opset13

    heads_first = [opset13.transpose(one, [0, 2, 1, 3]) for one in (query, key, value)]
    return opset13.transpose(opset13.scaled_dot_product_attention(*heads_first), [0, 2, 1, 3])


_OPERATIONS = {
    "group_normalization": _group_normalization,
    "layer_normalization": _layer_normalization,
    "attention": _attention,
}
