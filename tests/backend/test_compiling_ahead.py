"""Programs that a thread compiles ahead: they are those that are called later, and nothing runs before."""

import os
import subprocess
import sys

import pytest

BACKEND = """if True:
    import threading
    import numpy as np
    from keras_sd import backend
    from keras_sd.models.layers import dense

    layer, traced = dense(8, 8, kernel_initializer="ones"), []

    def make(name, scale=1.0):
        def function(x, nothing):
            traced.append((name, threading.current_thread().name))
            assert name != "faulty", "a fault of this function"
            return x @ layer.kernel + layer.bias, {"sum": (x * scale).sum()}
        return backend.jit(function, layer.variables, identity=lambda: name)

    x = np.linspace(0, 1, 16, dtype="float32").reshape(2, 8)
    first, second, faulty = make("first"), make("second"), make("faulty")
    found = []

    def use():
        for _ in range(3):
            y, sums = first(x, None)
            found.append((type(y), y.shape, float(y.max()), sums["sum"].shape))
        second(y, None)
        faulty(x, None)
        found.append("not reached")

    values = [variable._value for variable in layer.variables]
    for variable in layer.variables:
        variable._value = None  # as Keras' trainer leaves them
    ahead = backend.CompilationAhead(use)
    ahead.wait()
    assert found == [(np.ndarray, (2, 8), 0.0, ())] * 3, found
    for variable, value in zip(layer.variables, values):
        variable._value = value
    y, sums = first(x, None)
    z, _ = second(np.asarray(y), None)
    np.testing.assert_allclose(np.asarray(y), np.repeat(x.sum(axis=1, keepdims=True), 8, axis=1), rtol=1e-6)
    np.testing.assert_allclose(float(sums["sum"]), x.sum(), rtol=1e-6)
    layer.bias.assign(np.ones(8))  # weights stay inputs
    np.testing.assert_allclose(np.asarray(first(x, None)[0]), np.asarray(y) + 1, rtol=1e-6)
    # Two attempts: to keep the trace, and to run without.
    assert set(traced) == {(name, "compilation ahead") for name in ("first", "second", "faulty")}, traced
    try:
        faulty(x, None)
    except AssertionError as error:
        print(error)

    begun, go = threading.Event(), threading.Event()

    def cancelled():
        begun.set()
        go.wait()
        first(x, None)
        found.append("not reached")

    ahead = backend.CompilationAhead(cancelled)
    begun.wait()
    ahead.cancel()
    go.set()
    ahead.wait()
    assert "not reached" not in found
"""

TRAINING = """if True:
    import pathlib, sys, threading
    import keras, numpy as np
    from keras_sd.diffusion.denoiser import Denoiser
    from keras_sd.training.evaluation_schedule import Evaluation
    from keras_sd.training.pixel_ddim import sample_images, train_pixel_ddim
    from keras_sd.training.trainer import Settings
    from keras_sd.training import architectures
    from tests import tiny

    traced, step = [], Denoiser._step
    def watched(self, *inputs, **options):
        traced.append(threading.current_thread().name)
        return step(self, *inputs, **options)
    Denoiser._step = watched
    keras.utils.set_random_seed(0)
    images = [{"image": np.full((16, 16, 3), 40 * index, "uint8")} for index in range(6)]
    folder, ahead = pathlib.Path(sys.argv[1]), sys.argv[2] == "ahead"
    made = []

    def evaluation_of(denoiser):
        def sample():
            return sample_images(denoiser, 2, num_inference_steps=3)
        def make(trainer):
            def evaluate(step):
                with trainer.ema.applied():
                    made.append(sample())
            return evaluate
        return Evaluation(make, sample) if ahead else make

    settings = Settings(
        output_dir=folder, max_train_steps=4, train_batch_size=2, evaluation_steps=2, learning_rate=1e-2,
        checkpointing_steps=100,
    )
    train_pixel_ddim(
        settings, tiny.ONE_LEVEL_PIXEL_UNET, architectures.PIXEL_SCHEDULER, images,
        make_evaluation=evaluation_of,
    )
    assert len(made) == 2 and made[0].std() > 0
    print(*(image.sum() for image in made), *sorted(set(traced)), sep="|")
"""


def run(program, tmp_path, *arguments, backend="jax"):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, "KERAS_SD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def test_a_thread_compiles_what_is_called_later(tmp_path):
    assert run(BACKEND, tmp_path) == "a fault of this function"


def test_evaluations_find_their_programs_compiled(tmp_path):
    *with_thread, where = run(TRAINING, tmp_path, str(tmp_path / "one"), "ahead").split("|")
    assert where == "compilation ahead"
    *without, where = run(TRAINING, tmp_path / "other", str(tmp_path / "two"), "later").split("|")
    assert where == "MainThread"
    assert with_thread == without


@pytest.mark.parametrize("word", ["ahead", "later"])
def test_tensorflow_compiles_where_it_runs(tmp_path, word):
    assert run(TRAINING, tmp_path, str(tmp_path / "one"), word, backend="tensorflow").endswith("|MainThread")
