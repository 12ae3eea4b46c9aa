"""Kernels in 8 bits: exact codes, images close to the original, LoRAs on them, and what refuses them."""

import numpy as np
import pytest

from keras_sd import AdamW, DiffusionObjective, NoiseSchedule, SchedulerConfig, StableDiffusion, backend
from keras_sd.errors import UserError
from keras_sd.models.layers import convolution, dense
from keras_sd.models.precision import dtype_policy
from keras_sd.models.quantization import quantization_of, quantize_kernels
from keras_sd.models.quantized_kernel import QuantizableKernel
from keras_sd.models.unet import UNet
from keras_sd.training.lora import adaptable_layers, add_lora
from keras_sd.weights.lora_updates import LowRank
from keras_sd.weights.lora_writing import write_lora
from keras_sd.weights.rules import torch_state
from tests import tiny
from tests.programs import run_python

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, and a LoRA for it."""
    folder = tmp_path_factory.mktemp("quantization")
    tiny.pipeline().save(folder / "model")
    generator = np.random.default_rng(0)
    down, up = generator.standard_normal((2, 16)), generator.standard_normal((8, 2))
    update = LowRank(down.astype("float32"), up.astype("float32"), 2.0)
    write_lora(folder / "ink.safetensors", {"unet": {LAYER: update}})
    return folder


@pytest.mark.parametrize("make", [lambda: dense(24, 6), lambda: convolution(5, 6, 3)])
def test_codes_are_the_nearest_of_255(make):
    layer = make()
    kernel = np.random.default_rng(0).standard_normal(layer.kernel.shape).astype("float32")
    kernel[..., 2] = 0
    kernel[..., 3] *= 1e-30
    layer.kernel.assign(kernel)
    layer.quantize_kernel()
    codes, scale = layer.stored_kernel()
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    assert codes.dtype == np.int8 and scale.dtype == np.float32
    np.testing.assert_allclose(scale, np.where(largest == 0, 1, largest / 127), rtol=1e-6)
    assert (np.abs(np.asarray(layer.kernel) - kernel) <= scale * 0.5001).all()
    assert not np.asarray(layer.kernel)[..., 2].any()
    assert [each.dtype for each in layer.weights if "kernel" in each.name] == ["int8", "float32"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("make", [lambda: dense(24, 6), lambda: convolution(5, 6, 3)])
def test_a_layer_computes_with_its_decoded_kernel(make, dtype):
    with dtype_policy(dtype):
        layer, plain = make(), make()
    layer.quantize_kernel()
    plain.kernel.assign(layer.stored_kernel().decoded())
    inputs = np.random.default_rng(0).standard_normal((2, 8, 8, layer.stored_kernel().values.shape[-2]))
    outputs, expected = (np.asarray(each(inputs.astype("float32")), "float32") for each in (layer, plain))
    np.testing.assert_array_equal(outputs, expected)


LARGE = {
    "dense": lambda: dense(1024, 1024),
    "same": lambda: convolution(128, 1024, 3),
    "valid": lambda: convolution(128, 1024, 3, padding="valid", strides=2),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("dtype", ["int8", "float16", "int8, not compiled"])
def test_a_large_kernel_is_decoded_in_a_branch(make, dtype):
    """It has the same results, and numbers that are not finite stay so."""
    with dtype_policy("float16" if dtype == "float16" else "float32"):
        layer = make()
    if dtype != "float16":
        layer.quantize_kernel()
    channels = layer.stored_kernel().values.shape[-2]
    inputs = np.random.default_rng(0).standard_normal((1, 7, 7, channels)).astype(layer.compute_dtype)
    compiled = backend.jit(lambda inputs: layer(inputs), layer.variables, "not" not in dtype)
    expected = np.asarray(layer(inputs))
    np.testing.assert_allclose(
        np.asarray(compiled(inputs)), expected, atol=1e-2 if dtype == "float16" else 1e-4
    )
    for number in (np.nan, np.inf):
        inputs[0, 0, 0, 0] = number
        found = np.asarray(compiled(inputs))
        assert found.shape == expected.shape and np.isnan(found).all()


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_large_kernels_are_not_decoded_all_at_once(dtype):
    """The compiler's own count of the memory that a program of eight layers takes while it runs."""
    code = f"""if True:
        import jax, keras
        from keras_sd import backend
        from keras_sd.models.layers import dense
        keras.config.set_dtype_policy("{"float32" if dtype == "int8" else dtype}")
        layers = [dense(1024, 1024) for _ in range(8)]
        for layer in layers:
            {"layer.quantize_kernel()" if dtype == "int8" else "pass"}

        def call(values, inputs):
            from keras import StatelessScope
            with StatelessScope(list(zip(variables, values))):
                for layer in layers:
                    inputs = layer(inputs)
            return inputs

        variables = [variable for layer in layers for variable in layer.variables]
        values = [variable.value for variable in variables]
        inputs = jax.numpy.ones((16, 1024))
        memory = jax.jit(call).lower(values, inputs).compile().memory_analysis()
        print(memory.temp_size_in_bytes)
    """
    kernel = 4 * 1024**2
    assert kernel <= int(run_python(["-c", code])) < 2 * kernel


def test_a_program_with_branches_can_be_kept():
    """XLA copies what is read inside a branch by an operation that has no portable form."""
    import tensorflow as tf

    layer = dense(1024, 1024)
    layer.quantize_kernel()
    program = tf.function(lambda inputs: layer(inputs), jit_compile=True)
    lowered = program.experimental_get_compiler_ir(tf.zeros((1, 1024)))(stage="stablehlo")
    assert "stablehlo.if" in lowered and "mhlo.copy" not in lowered.replace("stablehlo.", "")


def test_a_model_computes_with_its_decoded_kernels(folder):
    model = StableDiffusion.load(folder / "model", quantize="int8", jit_compile=False)
    plain = StableDiffusion.load(folder / "model", jit_compile=False)
    assert model.quantization == "int8" and plain.quantization is None
    for part in ("unet", "text_encoder"):
        for layer, exact in zip(*(_layers(getattr(one, part)) for one in (model, plain)), strict=True):
            exact.assign_kernel(exact.stored_kernel().encoded(layer.stored_kernel().decoded()))
    given = {"prompt": "red heart", "num_inference_steps": 2, "progress": False, "seed": 3}
    images, expected = (one.text_to_image(**given).astype(int) for one in (model, plain))
    assert np.abs(images - expected).max() <= 1
    ours, theirs = (_bytes(one.unet) for one in (model, plain))
    assert ours < theirs * 0.4  # biases and scales of tiny layers weigh much


def _layers(layer):
    return [found for found in layer._flatten_layers() if isinstance(found, QuantizableKernel)]


def _bytes(model):
    sizes = {"int8": 1, "float32": 4}
    return sum(int(np.prod(each.shape)) * sizes[each.dtype] for each in model.variables)


def test_compiled_images_are_those_without_compilation(folder):
    """The program of the model that is not quantized, which is kept in the same folder, is another one."""
    given = {"prompt": "red heart", "num_inference_steps": 2, "progress": False}
    for quantize in (None, "int8", "int8"):
        eager, compiled = (
            StableDiffusion.load(folder / "model", quantize=quantize, jit_compile=jit_compile)
            for jit_compile in (False, True)
        )
        images = [one.text_to_image(**given).astype(int) for one in (eager, compiled)]
        assert np.abs(images[0] - images[1]).max() <= 1


def test_loras_are_added_and_removed(folder):
    model = StableDiffusion.load(folder / "model", quantize="int8", jit_compile=False)
    layer = adaptable_layers(model.unet)[LAYER]
    before = layer.stored_kernel()
    model.load_lora(folder / "ink.safetensors")
    plain = StableDiffusion.load(folder / "model", jit_compile=False)
    plain.load_lora(folder / "ink.safetensors")
    expected = adaptable_layers(plain.unet)[LAYER].stored_kernel().values
    codes, scale = layer.stored_kernel()
    # Two roundings: of the base, and of the sum.
    assert (np.abs(codes * scale - expected) <= 0.5001 * (scale + before.scale)).all()
    assert np.abs(expected - before.decoded()).max() > 10 * scale.max()
    model.unload_lora()
    for ours, original in zip(layer.stored_kernel(), before, strict=True):
        assert np.array_equal(ours, original)


def test_a_lora_of_infinite_numbers_changes_nothing(folder, tmp_path):
    model = StableDiffusion.load(folder / "model", quantize="int8", jit_compile=False)
    before = adaptable_layers(model.unet)[LAYER].stored_kernel()
    update = LowRank(np.full((2, 16), 1e30, "float32"), np.full((8, 2), 1e30, "float32"), 2.0)
    write_lora(tmp_path / "large.safetensors", {"unet": {LAYER: update}})
    with pytest.raises(UserError, match="'large': makes .* infinite"):
        model.load_lora(tmp_path / "large.safetensors")
    assert np.array_equal(adaptable_layers(model.unet)[LAYER].stored_kernel().values, before.values)


def test_what_is_quantized_is_not_saved_and_not_trained(folder, tmp_path):
    model = StableDiffusion.load(folder / "model", quantize="int8", jit_compile=False)
    with pytest.raises(UserError, match="quantized to int8.*without `quantize`"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    unet = UNet(tiny.SD1_UNET)
    quantize_kernels(unet)
    assert quantization_of(unet) == "int8"
    with pytest.raises(UserError, match="quantized to int8"):
        DiffusionObjective(unet, NoiseSchedule(SchedulerConfig())).compile(optimizer=AdamW(1e-3))
    with pytest.raises(UserError, match="quantized to int8"):
        torch_state(unet)
    with pytest.raises(UserError, match="quantized to int8"):
        add_lora(unet, 2, 2)


def test_unknown_kinds_are_refused(folder):
    for kind in ("int4", True, ["int8"]):
        with pytest.raises(UserError, match="^quantize .*: unknown; use int8"):
            StableDiffusion.load(folder / "model", quantize=kind)


MAPPED = """if True:
    import gc

    from keras_sd import StableDiffusion
    from keras_sd.weights import conversion

    conversion.SMALLEST = 0  # so that a small model is kept, too
    for quantize in (None, None, "int8"):
        model = StableDiffusion.from_preset("emoji", quantize=quantize)
        with open("/proc/self/maps") as file:
            print(len({line.split()[-1] for line in file if "/weights/" in line}))
        del model
        gc.collect()
"""


@pytest.mark.parametrize("backend_name", ["tensorflow", "jax"])
def test_files_of_quantized_parts_are_let_go(backend_name):
    """Of a model whose parts are mapped from the cache, the UNet and the text encoder are not any more."""
    _, whole, quantized = map(int, run_python(["-c", MAPPED], backend_name).split())
    assert whole - quantized == 2
