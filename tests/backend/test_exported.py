"""Exported programs: the next process traces nothing, and has the same results."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_sd.backend import identity_of
from keras_sd.backend.exported import ExportedFunction, Program
from keras_sd.files.cache import private_folder
from keras_sd.models.unet import UNet
from keras_sd.training.lora import add_lora, without_updates
from tests import tiny

ROOT = Path(__file__).parents[2]

# Functions of two weights are called in the order of the arguments; prints how often each was traced.
PROGRAM = """if True:
    import sys
    import numpy as np
    import keras
    from keras_sd import backend
    from keras_sd.models.layers import dense
    layer = dense(8, 8, kernel_initializer="ones")
    traced = []
    def make(name):
        def function(x, numbers, nothing):
            traced.append(name)
            assert nothing is None
            for _ in range(100):
                x = keras.ops.tanh(x @ layer.kernel + layer.bias) * numbers["scale"]
            return x, (x + 1.0, numbers["scale"]) if name == "second" else x * 2.0
        return backend.jit(function, layer.variables, identity=lambda: None if name == "none" else name)
    for word in sys.argv[1:]:
        name, size = word.split(":")
        x = np.linspace(0, 1, 8 * int(size), dtype="float32").reshape(-1, 8)
        call = make(name)
        layer.bias.assign(np.zeros(8))
        before = call(x, {"scale": np.float32(0.5)}, None)
        layer.bias.assign(np.ones(8))  # weights are inputs
        after = call(x, {"scale": np.float32(0.5)}, None)
        assert len(before) == 2 and isinstance(before, tuple)
        first, second = (float(keras.ops.sum(one[0])) for one in (before, after))
        assert first != second
        print(word, traced.count(name), first, second)
        traced.clear()
"""


def run(backend, *words, folder):
    """Return word -> (times that it was traced, results)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env={**os.environ, "KERAS_BACKEND": backend, "KERAS_SD_CACHE": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return {line.split()[0]: (int(line.split()[1]), line.split()[2:]) for line in done.stdout.splitlines()}


def kept(folder):
    return sorted((folder / "programs").glob("*"))


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_the_next_process_traces_nothing(backend, tmp_path):
    first = run(backend, "first:1", "second:1", "first:2", folder=tmp_path)
    assert {word: count for word, (count, _) in first.items()} == {"first:1": 1, "second:1": 1, "first:2": 1}
    assert len(kept(tmp_path)) == 3
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in kept(tmp_path))
    compiled = sorted((tmp_path / "xla").rglob("*.pb"))
    assert compiled or backend == "jax"  # JAX keeps none that compile in a tenth of a second
    # In another order, which numbers TensorFlow's functions differently.
    second = run(backend, "first:2", "second:1", "first:1", folder=tmp_path)
    assert second == {word: (0, results) for word, (_, results) in first.items()}
    assert sorted((tmp_path / "xla").rglob("*.pb")) == compiled
    plain = run(backend, "first:1", "second:1", "first:2", folder="")
    for word, (_, results) in plain.items():
        np.testing.assert_allclose([*map(float, results)], [*map(float, first[word][1])], rtol=1e-6)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_damaged_entries_are_made_anew(backend, tmp_path):
    first = run(backend, "first:1", "second:1", folder=tmp_path)
    one, other = kept(tmp_path)
    contents = [one.read_bytes(), other.read_bytes()]
    one.write_bytes(contents[0][:-1])
    other.write_bytes(contents[1].replace(b"tanh", b"sinh"))
    again = run(backend, "first:1", "second:1", folder=tmp_path)
    assert again == first and [one.read_bytes()[:32], other.read_bytes()[:32]] != [b"", b""]
    assert run(backend, "first:1", "second:1", folder=tmp_path)["first:1"][0] == 0
    # A whole entry that the backend does not understand, as of another version.
    for path in (one, other):
        path.write_bytes(hashlib.sha256(b"{}\nno program").digest() + b"{}\nno program")
    assert run(backend, "first:1", "second:1", folder=tmp_path) == first
    assert run(backend, "first:1", "second:1", folder=tmp_path)["second:1"][0] == 0
    assert not list((tmp_path / "programs").glob(".*"))


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_what_has_no_identity_is_not_kept(backend, tmp_path):
    assert run(backend, "none:1", folder=tmp_path)["none:1"][0] == 1
    assert not kept(tmp_path)
    assert run(backend, "first:1", folder="off")["first:1"][0] == 1


STEP = """if True:
    import sys
    import numpy as np
    import keras
    from keras_sd import DiffusionObjective, NoiseSchedule, SchedulerConfig, UNet
    from keras_sd.training.lora import add_lora
    from keras_sd.training.optimizers import AdamW
    from tests import tiny

    kind, rate, scale = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    unet = tiny.randomize(UNet(tiny.ONE_BLOCK_UNET))
    keras.utils.set_random_seed(0)
    add_lora(unet, 2, scale)
    traced = []
    class Counted(DiffusionObjective):
        def call(self, batch):
            traced.append(1)
            return super().call(batch)
    call = DiffusionObjective.call
    def counted(self, batch):
        traced.append(1)
        return call(self, batch)
    DiffusionObjective.call = counted
    objective = (Counted if kind == "own" else DiffusionObjective)(unet, NoiseSchedule(SchedulerConfig()))
    optimizer = keras.optimizers.SGD if kind == "keras" else AdamW
    objective.compile(optimizer=optimizer(learning_rate=rate), jit_compile=True)
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).astype("float32")
    batches = [
        {
            "samples": draw(2, 8, 8, 4),
            "noise": draw(2, 8, 8, 4),
            "timesteps": np.array([3, 700], "int32"),
            "context": draw(2, 5, unet.config.cross_attention_dim),
        }
        for _ in range(3)
    ]
    objective.fit(((batch,) for batch in batches), steps_per_epoch=3, verbose=0)
    print(len(traced), *(float(keras.ops.sum(keras.ops.abs(v))) for v in unet.trainable_variables))
"""


def trained(backend, *arguments, folder):
    """Return how often the loss was traced in training, and a number of each trained weight."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend, "KERAS_SD_CACHE": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, *numbers = done.stdout.split()
    return int(count), numbers


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_training_step_is_kept(backend, tmp_path):
    count, weights = trained(backend, "ours", 1e-2, 2, folder=tmp_path)
    assert count == 1 and len(kept(tmp_path)) == 1
    assert trained(backend, "ours", 1e-2, 2, folder=tmp_path) == (0, weights)
    count, without = trained(backend, "ours", 1e-2, 2, folder="off")
    assert count > 0 and without == weights
    # A learning rate without a schedule is a variable; the scale of LoRA is traced, and so part of the name.
    count, changed = trained(backend, "ours", 2e-2, 2, folder=tmp_path)
    assert count == 0 and changed != weights
    count, changed = trained(backend, "ours", 1e-2, 4, folder=tmp_path)
    assert count == 1 and changed != weights and len(kept(tmp_path)) == 2


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_step_of_a_class_of_ones_own_is_traced_each_time(backend, tmp_path):
    first, second = (trained(backend, "own", 1e-2, 2, folder=tmp_path)[0] for _ in range(2))
    assert first == second > 0
    assert not kept(tmp_path)


def test_a_step_that_assigns_past_keras_is_traced_each_time(tmp_path):
    """Keras' own optimizers assign to TensorFlow's variables, which a kept step would leave as they are."""
    first, second = (trained("tensorflow", "keras", 1e-2, 2, folder=tmp_path) for _ in range(2))
    assert first == second and first[0] > 0
    assert not kept(tmp_path)
    assert first[1] == trained("tensorflow", "keras", 1e-2, 2, folder="off")[1]
    assert first[1] != trained("tensorflow", "keras", 2e-2, 2, folder="off")[1]


def test_an_identity_is_of_all_that_is_traced():
    def identity(unet):
        return identity_of("step", unet)

    first = identity(UNet(tiny.SD1_UNET))
    assert first is not None and first == identity(tiny.randomize(UNet(tiny.SD1_UNET)))
    others = [identity_of("other", UNet(tiny.SD1_UNET)), identity(UNet(tiny.ONE_BLOCK_UNET))]
    half = UNet(tiny.SD1_UNET)
    half.conv_in.dtype_policy = "mixed_bfloat16"
    others.append(identity(half))
    for scale in (2.0, 4.0):
        trained = UNet(tiny.SD1_UNET)
        add_lora(trained, 2, scale)
        others.append(identity(trained))
    with without_updates(trained):
        others.append(identity(trained))
    changed = UNet(tiny.SD1_UNET)
    changed.down_blocks[0].resnets[0].norm1.epsilon = 0.5
    others.append(identity(changed))
    assert None not in others and len({first, *others}) == len(others) + 1

    class OwnUNet(UNet):
        pass

    own = UNet(tiny.SD1_UNET)
    own.conv_in.activation = lambda values: values
    assert identity(OwnUNet(tiny.SD1_UNET)) is identity(own) is None


def test_a_pipeline_uses_what_another_has_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_SD_CACHE", str(tmp_path))
    images = []
    for number in range(2):
        sd = tiny.pipeline()
        if number:
            # Traced once more, the functions would fail.
            for part in ("unet", "text_encoder", "vae"):
                monkeypatch.setattr(type(getattr(sd, part)), "call", None)
        images.append(sd.text_to_image(tiny.TEXTS[0], num_inference_steps=2, progress=False))
        assert len(list(private_folder("programs").iterdir())) == 3
    np.testing.assert_array_equal(*images)


def test_the_programs_of_old_shapes_leave_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_SD_CACHE", str(tmp_path))
    made = []

    def make(inputs, content):
        made.append(len(inputs[0]))
        return Program(lambda inputs: inputs[0] * 2, None)

    call = ExportedFunction(lambda x: x * 2, make, [], lambda: "double", most_shapes=2)
    for size in (1, 2, 1, 3, 2, 1):  # 1 is dropped for 3, and 2 for 1
        np.testing.assert_array_equal(call(np.ones(size)), 2 * np.ones(size))
    assert made == [1, 2, 3, 1]
