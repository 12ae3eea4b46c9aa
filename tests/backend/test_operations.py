"""Operations of traced programs, against counts by hand and by layers."""

import json

from tests.programs import run_python

COUNTS = """
import json
import jax
import jax.numpy as jnp
from keras_sd.backend.operations import operations_of

def of(function, *shapes):
    return operations_of(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(one, "float32") for one in shapes)))

def convolution(padding, strides=(1, 1)):
    return lambda x, k: jax.lax.conv_general_dilated(
        x, k, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

image, kernel, two = (2, 8, 8, 3), (3, 3, 3, 5), (4, 6, 5)
strided = convolution("SAME", (2, 2))
print(json.dumps({
    "product": of(jnp.matmul, (4, 6), (6, 5)),
    "batch of products": of(jnp.matmul, (7, 4, 6), (7, 6, 5)),
    "gradient": of(jax.value_and_grad(lambda a, b: (a @ b).sum(), argnums=(0, 1)), (4, 6), (6, 5)),
    "loop": of(lambda a, b: jax.lax.scan(lambda c, x: (c, x @ b), 0.0, a), (11, 4, 6), (6, 5)),
    "branches": of(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a), (4, 4)),
    "inner program": of(jax.jit(lambda a: jax.checkpoint(lambda a: a @ a)(a)), (4, 4)),
    "convolution": of(convolution("VALID"), image, kernel),
    "padded": of(convolution("SAME"), image, kernel),
    "gradient of a stride": of(
        jax.value_and_grad(lambda x, k: strided(x, k).sum(), argnums=(0, 1)), image, kernel
    ),
    "stride": of(strided, image, kernel),
}))
"""

MODEL = """
import sys
sys.path.insert(0, "tools")
import jax
from benchmark.counting import multiplications
from keras_sd import UNet
from keras_sd.backend.operations import operations_of
from keras_sd.data.emoji.architecture import EMOJI_UNET

unet, side = UNet(EMOJI_UNET), EMOJI_UNET.sample_size
shapes = {"latents": (2, side, side, EMOJI_UNET.in_channels), "timesteps": (2,)}
shapes["context"] = (2, 32, EMOJI_UNET.cross_attention_dim)
inputs = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}

def call(arrays):
    return unet([arrays[name] for name in shapes])

print(operations_of(jax.make_jaxpr(call)(inputs)), multiplications(call, inputs))
"""


def test_operations_are_those_of_the_definition():
    found = json.loads(run_python(["-c", COUNTS]))
    product, image = 2 * 4 * 6 * 5, 2 * 2 * 3 * 5
    assert found["product"] == product
    assert found["batch of products"] == 7 * product
    assert found["gradient"] == 3 * product
    assert found["loop"] == 11 * product
    assert found["branches"] == found["inner program"] == 2 * 4**3
    assert found["convolution"] == image * 9 * 6 * 6
    # Along an axis of eight positions a kernel of three meets 8 + 7 + 7 of them.
    assert found["padded"] == image * 22 * 22
    # Zero before is no padding here: 4 + 4 + 3 of them.
    assert found["stride"] == image * 11 * 11
    assert found["gradient of a stride"] == 3 * found["stride"]


def test_operations_of_a_unet_are_those_of_its_layers():
    counted, multiplied = map(int, run_python(["-c", MODEL]).split())
    # The layers' count takes the zeros around an image of 8 x 8 for inputs.
    assert 0.85 < counted / (2 * multiplied) < 1
