"""The average of the weights: beside them on the device and in host memory, its decay, its exact return."""

import os

import keras
import numpy as np
import pytest
from keras import ops

from keras_sd.training.callbacks import EMACallback, StepCallbackList
from keras_sd.training.objectives import Objective
from keras_sd.training.offloaded_ema import OffloadedEMACallback
from keras_sd.training.optimizers import AdamW
from tests.programs import run_python
from tests.reference import run_reference

STEPS = 8
DECAY = 0.6  # the young decay exceeds it from the sixth update on


def trained(ema_decay, make_average, **options):
    """A linear layer after some steps on fixed data, with its average."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4 * STEPS, 5)).astype("float32")
    model = keras.Sequential([keras.layers.Input((5,)), keras.layers.Dense(3, kernel_initializer="ones")])
    optimizer = AdamW(0.1, ema_decay=ema_decay, **options)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    optimizer.build(model.trainable_variables)
    average = make_average(optimizer, model.trainable_variables)
    average.batches_per_step = options.get("gradient_accumulation_steps") or 1
    callbacks = StepCallbackList([average], add_history=True, model=model)
    model.fit(inputs, inputs[:, :3], batch_size=4, shuffle=False, verbose=0, callbacks=callbacks)
    return model, average


def offloaded(optimizer, variables):
    return OffloadedEMACallback(optimizer, variables, DECAY)


@pytest.mark.parametrize("accumulation", [None, 2])
def test_offloaded_average_equals_the_compiled_one(accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    model, compiled = trained(DECAY, EMACallback, **options)
    same_model, on_host = trained(None, offloaded, **options)
    for average, expected, weight, same in zip(
        on_host.averages, compiled.averages, model.weights, same_model.weights, strict=True
    ):
        assert isinstance(average, np.ndarray)
        expected, weight = keras.ops.convert_to_numpy(expected), keras.ops.convert_to_numpy(weight)
        np.testing.assert_array_equal(weight, keras.ops.convert_to_numpy(same))
        assert np.abs(expected - weight).max() > 1e-2
        np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-7)


def test_offloaded_average_is_lent_and_taken_back_exactly():
    model, average = trained(None, offloaded)
    weights = [keras.ops.convert_to_numpy(variable).copy() for variable in model.weights]
    averages = [array.copy() for array in average.averages]
    with average.applied():
        for variable, expected in zip(model.weights, averages, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), expected)
    for variable, expected in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), expected)
    for array, expected in zip(average.averages, averages, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_optimizer_without_average_has_the_moments_alone():
    model, _ = trained(None, offloaded)
    held = sum(np.prod(variable.shape) for variable in model.optimizer.variables if len(variable.shape))
    assert held == 2 * model.count_params()


def test_step_skipped_for_an_overflow_leaves_the_average():
    """Half precision skips updates whose gradients overflow: the average must not move then."""
    model, average = trained(None, offloaded)
    before = [array.copy() for array in average.averages]
    average.on_train_begin()
    average.on_step({})
    for array, expected in zip(average.averages, before, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_step_equals_the_one_of_keras(jit_compile):
    """Many variables, a schedule, decay and clipping; Keras computes variable by variable."""
    asked = []

    class Counted(keras.optimizers.schedules.CosineDecay):
        def __call__(self, step):
            asked.append(step)
            return super().__call__(step)

    def weights_after(optimizer_class):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(5, activation="tanh") for _ in range(6)]
        model = keras.Sequential([keras.layers.Input((5,)), *layers])
        schedule = Counted(0.01, decay_steps=10)
        # So small that it does not matter where it is added.
        options = {"epsilon": 1e-12, "weight_decay": 0.1, "beta_2": 0.99, "global_clipnorm": 0.5}
        optimizer = optimizer_class(schedule, **options)
        model.compile(optimizer=optimizer, loss="mse", jit_compile=jit_compile)
        inputs = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
        for _ in range(STEPS):
            model.train_on_batch(inputs, inputs[::-1])
        return [np.array(weight) for weight in model.get_weights()]

    expected = weights_after(keras.optimizers.AdamW)
    asked_by_keras = len(asked)
    found = weights_after(AdamW)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    # Once in each trace, for the decay of all variables and for their update.
    assert len(asked) - asked_by_keras < asked_by_keras / 3


def test_steps_equal_those_of_torch(tmp_path):
    """Also where gradients are as small as epsilon, and a step depends on where that is added."""
    generator = np.random.default_rng(0)
    sizes = [1.0, 1e-3, 1e-7, 1e-8, 1e-10]
    start = generator.normal(size=(len(sizes), 6)).astype("float32")
    gradients = generator.normal(size=(STEPS, *start.shape)) * np.array(sizes)[:, None]
    gradients = gradients.astype("float32")
    script = """
        weight = torch.nn.Parameter(inputs["start"].clone())
        optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        for gradient in inputs["gradients"]:
            weight.grad = gradient.clone()
            optimizer.step()
        outputs["change"] = weight.detach() - inputs["start"]
    """
    expected = run_reference(script, {"start": start, "gradients": gradients}, tmp_path)["change"]
    variable = keras.Variable(start)
    optimizer = AdamW(1e-3, beta_2=0.999, weight_decay=0.01)
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    found = ops.convert_to_numpy(variable) - start
    assert np.abs(expected[2]).min() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=3e-7)


class Scaled(Objective):
    """A loss whose gradient overflows float16 in the steps that a batch says."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones", dtype="mixed_float16")
        self.dense.build((None, 3))
        self.built = True

    def call(self, batch):
        # The loss itself is finite. Its gradient, times the scale of the loss, is not.
        return ops.cast(self.dense(batch["x"]), "float32")[:, 0] * batch["factor"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_overflowing_step_is_no_update(accumulation):
    """Of iterations, moments, average and learning rate, all are as if its batch had not been there."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(8, 4, 3)).astype("float32")
    overflows = [1, 4]

    def trained(places):
        model = Scaled()
        schedule = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=10)
        optimizer = AdamW(
            schedule, ema_decay=0.5, gradient_accumulation_steps=accumulation if accumulation > 1 else None
        )
        model.compile(optimizer=keras.optimizers.LossScaleOptimizer(optimizer), jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        for place in places:
            factor = np.full(4, 1e30 if place in overflows else 1.0, "float32")
            logs = model.train_on_batch({"x": inputs[place], "factor": factor}, return_dict=True)
            assert np.isfinite(logs["loss"])
        if hasattr(model, "jax_state_sync"):
            model.jax_state_sync()
        scale = float(model.optimizer.dynamic_scale)
        variables = [*model.trainable_variables, *optimizer.variables]
        return scale, int(optimizer.iterations), [ops.convert_to_numpy(variable) for variable in variables]

    scale, updates, found = trained(range(8))
    whole_scale, expected_updates, expected = trained([place for place in range(8) if place not in overflows])
    assert scale == whole_scale / 2 ** len(overflows)
    assert updates == expected_updates == 6 // accumulation
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-6)


def test_the_same_on_the_other_backend():
    if "KERAS_SD_OTHER_BACKEND" in os.environ:
        return
    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    options = ("-q", "-p", "no:cacheprovider", "-k", "overflowing or torch")
    run_python(["-m", "pytest", *options, __file__], other, KERAS_SD_OTHER_BACKEND="1")
