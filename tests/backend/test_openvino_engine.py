"""OpenVINO as an engine: the same results, kept graphs, weights that change, and where it is refused."""

import hashlib
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from keras_sd import backend
from keras_sd.backend.openvino_engine import ENGINES, OpenVINOFunction
from keras_sd.cli.generate import generate
from keras_sd.errors import UserError
from keras_sd.files.cache import private_folder
from keras_sd.models.layers import dense
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from keras_sd.training.lora import adaptable_layers


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_SD_CACHE", str(tmp_path / "cache"))


def kept():
    return sorted(private_folder("openvino").glob("*"))


def let_be_faster(engine):
    """Writes into all entries that an engine took less time."""
    for path in kept():
        first_line, files = path.read_bytes()[32:].split(b"\n", 1)
        header = json.loads(first_line) | {"seconds": [1.0, 0.5 if engine == "openvino" else 2.0]}
        content = json.dumps(header).encode() + b"\n" + files
        path.write_bytes(hashlib.sha256(content).digest() + content)


def results(model):
    """What all parts of a model give."""
    draw = np.random.default_rng(0).standard_normal
    latents = draw((2, *model.latent_shape()), "float32")
    texts = model.encode_text(["a red heart", "a cat"])
    options = {"guidance_scale": 2.0, "num_inference_steps": 1, "sampler": "ddim"}
    noise = model.denoise(latents, texts, model.encode_text(["", ""]), **options)
    deep = model.denoise(latents, texts, num_inference_steps=4, reuse_interval=2, sampler="ddim")
    images = np.asarray(model._decode(latents[:1]), "float32")
    encoded = model.encode_image(np.uint8(draw(images.shape[1:]) * 40 + 128))
    return {"texts": texts, "noise": noise, "deep": deep, "images": images, "encoded": encoded}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_results_are_those_of_keras(dtype, tolerance):
    expected = results(StableDiffusion.from_preset("emoji", dtype=dtype))
    first = results(StableDiffusion.from_preset("emoji", dtype=dtype, engine="openvino"))
    # Text encoder for one and two texts, UNet with guidance, storing and reusing features, and VAE.
    assert len(kept()) == 7
    let_be_faster("openvino")
    model = StableDiffusion.from_preset("emoji", dtype=dtype, engine="openvino")
    found = results(model)
    assert model._decode._compiled and model._encode_image._compiled
    for name, values in expected.items():
        for others in (first[name], found[name]):
            error = np.abs(others - values)
            error = error.max() if dtype == "float32" else error.mean()
            assert error < tolerance * values.std(), name
    assert np.abs(found["images"] - expected["images"]).max() > 0  # so it was another engine


def linear(layer):
    """The function of a layer, by the engine that is faster."""

    def function(inputs, more):
        outputs = keras.ops.tanh(layer(inputs["x"]))
        return outputs, {"sum": outputs + (0 if more is None else more)}

    identity = lambda: "linear"  # noqa: E731
    return backend.jit_for_engine("openvino", "layer", "float32", function, layer.variables, True, identity)


def values_of(function, scale=1.0):
    x = scale * np.linspace(0, 1, 16, dtype="float32").reshape(2, 8)
    first, more = function({"x": x}, None)
    np.testing.assert_array_equal(first, more["sum"])
    return np.asarray(first)


def test_inputs_of_kernels_in_8_bits_are_not_rounded():
    layer = dense(256, 256)
    layer.quantize_kernel()
    inputs = np.random.default_rng(0).standard_normal((4, 256)).astype("float32")
    functions = []
    for _ in range(2):
        functions.append(
            backend.jit_for_engine(
                "openvino", "layer", "float32", layer, layer.variables, True, lambda: "in 8 bits"
            )
        )
        results = np.asarray(functions[-1](inputs))
        np.testing.assert_allclose(results, np.asarray(layer(inputs)), atol=1e-4 * results.std())
        let_be_faster("openvino")
    assert functions[1]._compiled


def test_changed_weights_are_seen():
    layer = dense(8, 8, kernel_initializer="ones")
    values_of(linear(layer))
    let_be_faster("openvino")
    (entry,), inode = kept(), kept()[0].stat().st_ino
    function = linear(layer)
    x = np.linspace(0, 1, 16, dtype="float32").reshape(2, 8)
    for change in (
        lambda: None,
        lambda: layer.bias.assign(np.linspace(-1, 0, 8)),
        lambda: layer.kernel.assign_add(np.full((8, 8), 0.1)),
        lambda: layer.kernel.assign(np.full((8, 8), -0.2)),
    ):
        change()
        expected = np.tanh(x @ np.asarray(layer.kernel) + np.asarray(layer.bias))
        np.testing.assert_allclose(values_of(function), expected, atol=1e-6)
        assert len(function._compiled) == 1
    assert entry.stat().st_ino == inode  # weights are no part of it


def test_loras_are_seen(tmp_path):
    options = {"num_inference_steps": 2, "seed": 3, "progress": False}
    model = StableDiffusion.from_preset("emoji", engine="openvino")
    model.text_to_image("red heart", **options)
    let_be_faster("openvino")
    name, layer = next(
        (name, layer) for name, layer in adaptable_layers(model.unet).items() if name.endswith("attn2.to_v")
    )
    draw, (inputs, outputs) = np.random.default_rng(0).standard_normal, layer.kernel.shape
    file = tmp_path / "strong.safetensors"
    tensors = {"lora_A": draw((2, inputs), "float32"), "lora_B": draw((outputs, 2), "float32")}
    save_file({f"unet.{name}.{half}.weight": tensor for half, tensor in tensors.items()}, file)
    images = []
    for engine in ENGINES:
        model = StableDiffusion.from_preset("emoji", engine=engine)
        before = model.text_to_image("red heart", **options)
        model.load_lora(file, weight=0.0)
        tagged = model.text_to_image("red heart <lora:strong:1>", **options)
        images.append([before, tagged, model.text_to_image("red heart", **options)])
    for ours, theirs in zip(*images, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    before, tagged, after = images[1]
    assert np.abs(before.astype(int) - tagged.astype(int)).max() > 8
    assert np.array_equal(before, after)


def test_a_choice_is_kept_for_each_shape_and_damage_is_repaired():
    layer = dense(8, 8)
    expected = values_of(linear(layer))
    for engine in ENGINES:
        let_be_faster(engine)
        whole = kept()[0].read_bytes()
        function = linear(layer)
        np.testing.assert_allclose(values_of(function), expected, atol=1e-6)
        assert bool(function._compiled) == (engine == "openvino") and kept()[0].read_bytes() == whole
    for damaged in (b"", whole[:-1], whole.replace(b"weight_0", b"weight_9")):
        kept()[0].write_bytes(damaged)
        np.testing.assert_allclose(values_of(linear(layer)), expected, atol=1e-6)
        assert kept()[0].read_bytes() != damaged and len(kept()) == 1
    # An entry that is whole, but of another version.
    content = b'{"seconds": [2, 1], "length": 3, "outputs": []}\nxml'
    kept()[0].write_bytes(hashlib.sha256(content).digest() + content)
    np.testing.assert_allclose(values_of(linear(layer)), expected, atol=1e-6)
    assert content not in kept()[0].read_bytes()


def test_what_openvino_cannot_read_is_computed_by_keras():
    def function(x):
        return keras.ops.convert_to_tensor(np.linalg.norm(x)) if isinstance(x, np.ndarray) else x.numpy()

    part = OpenVINOFunction(lambda x: x + 1, function, [], lambda: "odd", "part", "float32")
    with pytest.warns(UserWarning, match="^part: OpenVINO cannot compute it, so Keras does"):
        assert part(np.float32([1]))[0] == 2
    assert part(np.float32([2]))[0] == 3 and not kept()


def command(*arguments, environment=(), before="pass"):
    program = f"import sys; {before}; from keras_sd.__main__ import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, "generate", "a red heart", *map(str, arguments)],
        env={name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
        | dict(environment),
        capture_output=True,
        text=True,
    )


def test_generate_with_the_engine(tmp_path):
    for name, engine in (("keras", "keras"), ("first", "openvino"), ("second", "openvino")):
        path, entries = tmp_path / f"{name}.png", {path: path.stat().st_ino for path in kept()}
        done = command("--engine", engine, "--seed", 3, "--num-inference-steps", 4, "--output", path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "UserWarning" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("UNet: by ")]
        assert len(lines) == (engine == "openvino")
        images = [np.asarray(Image.open(one), "int32") for one in (path, tmp_path / "keras.png")]
        assert np.abs(images[0] - images[1]).max() <= 1
        if name == "first":
            let_be_faster("openvino")
    assert "UNet: by OpenVINO (0.5 s a call by OpenVINO, 1 s by Keras)" in lines
    assert entries == {path: path.stat().st_ino for path in kept()} and len(entries) == 3


REFUSED = (
    ("--dtype float16", {}, "pass", "engine openvino: does not compute in float16; use float32 or bfloat16"),
    ("", {"KERAS_BACKEND": "jax"}, "pass", "engine openvino: cannot read jax's programs; set KERAS_BACKEND="),
    ("", {}, "sys.modules['openvino'] = None", "openvino: not installed; pip install 'keras_sd[openvino]'"),
)


@pytest.mark.parametrize("arguments, environment, before, message", REFUSED)
def test_refused_in_one_line(arguments, environment, before, message, tmp_path):
    arguments = ["--engine", "openvino", "--output", tmp_path / "image.png", *arguments.split()]
    done = command(*arguments, environment=environment, before=before)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "image.png").exists()


def test_refused_in_python():
    for engine in ("torch", None, ["openvino"]):
        with pytest.raises(UserError, match="^engine .*: unknown; use keras or openvino"):
            StableDiffusion.from_preset("emoji", engine=engine)
    with pytest.raises(UserError, match="^engine openvino: does not compute in float16"):
        StableDiffusion.from_preset("emoji", engine="openvino", dtype="float16")
    (option,) = (option for option in generate.params if option.name == "engine")
    assert tuple(option.type.choices) == ENGINES
