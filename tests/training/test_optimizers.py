"""Updates of every optimizer against the references of the field, 20 steps, on both backends."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.errors import UserError
from keras_sd.training.optimizers import Adafactor, AdamW, AdamW8bit, Lion, Prodigy
from keras_sd.training.optimizers.adamw8bit import SIGNED, UNSIGNED
from keras_sd.training.pixel_ddim import train_pixel_ddim
from keras_sd.training.settings import Settings
from tests import tiny
from tests.programs import run_python
from tests.reference import run_reference

STEPS = 20
# Two vectors of one length and one of another, kernels of dense layers and convolutions; what 8 bits are for.
SHAPES = [(6,), (6,), (5,), (6, 5), (1, 7), (3, 3, 4, 5), (1, 1, 4, 5), (70, 61)]
PRODIGY_OPTIONS = {
    "use_bias_correction": True,
    "safeguard_warmup": True,
    "d_coef": 2.0,
    "growth_rate": 1.5,
    "weight_decay": 0.02,
}
RELATIVE = {"relative_step": True, "scale_parameter": True}
CASES = {
    "adamw": (AdamW, 1e-3, {"weight_decay": 0.01}),
    "adamw8bit": (AdamW8bit, 1e-3, {"weight_decay": 0.01}),
    "lion": (Lion, 1e-3, {"weight_decay": 0.1}),
    "adafactor": (Adafactor, 1e-3, {}),
    "adafactor, decay and average": (Adafactor, 1e-3, {"weight_decay": 0.1, "beta_1": 0.9}),
    "adafactor, relative": (Adafactor, 1.0, RELATIVE),
    "adafactor, relative, warm-up": (Adafactor, 1.0, RELATIVE | {"warmup_init": True}),
    "prodigy": (Prodigy, 1.0, {}),
    "prodigy, all options": (Prodigy, 1.0, PRODIGY_OPTIONS),
    "prodigy, coupled decay": (Prodigy, 0.5, {"decouple": False, "weight_decay": 0.1, "beta_3": 0.9}),
    "adamw, factors": (AdamW, 1e-3, {"weight_decay": 0.1}),
    "adamw8bit, factors": (AdamW8bit, 1e-3, {"weight_decay": 0.01}),
    "lion, factors": (Lion, 1e-3, {"weight_decay": 0.1}),
    "adafactor, factors": (Adafactor, 1e-3, {"weight_decay": 0.1}),
}
# Of the learning rate of each variable; vectors of one length have several. Small ones drown in rounding.
FACTORS = [0.5, 2.0, 1.0, 3.0, 1.0, 2.0, 0.5, 4.0]


def starts():
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype("float32") for shape in SHAPES]


def gradients():
    """Return the gradients of all steps: noise around a slope, of sizes that differ by variable."""
    generator = np.random.default_rng(1)
    slopes = [generator.normal(size=shape) * 10.0**-place for place, shape in enumerate(SHAPES)]
    return [
        [(slope * (1.0 + generator.normal(size=slope.shape))).astype("float32") for slope in slopes]
        for _ in range(STEPS)
    ]


def changes(case):
    """Return what 20 steps have added to each variable."""
    kind, rate, options = CASES[case]
    variables = [keras.Variable(start) for start in starts()]
    optimizer = kind(rate, ema_decay=0.9, **options)
    if case.endswith("factors"):
        optimizer.rate_factors = dict(zip(map(id, variables), FACTORS, strict=True))
    optimizer.build(variables)
    for step in gradients():
        optimizer.apply([ops.convert_to_tensor(gradient) for gradient in step], variables)
    return [
        ops.convert_to_numpy(variable) - start for variable, start in zip(variables, starts(), strict=True)
    ]


def save_changes(path):
    np.savez(
        path, **{f"{case}/{place}": change for case in CASES for place, change in enumerate(changes(case))}
    )


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def found(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("changes") / "changes.npz"
    if request.param == keras.backend.backend():
        save_changes(path)
    else:
        program = (
            "import sys; from tests.training import test_optimizers as here; here.save_changes(sys.argv[1])"
        )
        run_python(["-c", program, path], request.param)
    return dict(np.load(path))


REFERENCE = """
    from prodigyopt import Prodigy
    from transformers.optimization import Adafactor

    class Lion(torch.optim.Optimizer):  # Chen et al. (2023), algorithm 2
        def __init__(self, parameters, lr, weight_decay):
            super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

        def step(self):
            for group in self.param_groups:
                for weight in group["params"]:
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    direction = (0.9 * momentum + 0.1 * weight.grad).sign() + group["weight_decay"] * weight
                    weight -= group["lr"] * direction
                    momentum.mul_(0.99).add_(weight.grad, alpha=0.01)

    relative = {"relative_step": True, "scale_parameter": True}
    absolute = {"relative_step": False, "scale_parameter": False, "lr": 1e-3}
    prodigy = {"use_bias_correction": True, "safeguard_warmup": True, "d_coef": 2.0, "growth_rate": 1.5}
    cases = {
        "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
        "lion": (Lion, {"lr": 1e-3, "weight_decay": 0.1}),
        "adafactor": (Adafactor, absolute),
        "adafactor, decay and average": (Adafactor, absolute | {"weight_decay": 0.1, "beta1": 0.9}),
        "adafactor, relative": (Adafactor, relative),
        "adafactor, relative, warm-up": (Adafactor, relative | {"warmup_init": True}),
        "prodigy": (Prodigy, {}),
        "prodigy, all options": (Prodigy, prodigy | {"weight_decay": 0.02}),
        "prodigy, coupled decay": (
            Prodigy, {"lr": 0.5, "decouple": False, "weight_decay": 0.1, "beta3": 0.9},
        ),
        "adamw, factors": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
        "lion, factors": (Lion, {"lr": 1e-3, "weight_decay": 0.1}),
        "adafactor, factors": (Adafactor, absolute | {"weight_decay": 0.1}),
    }
    factors = inputs["factors"].tolist()

    def layout(array):  # of torch: outputs first
        return array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array

    def ours(array):
        return array.permute(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array

    count = sum(name.startswith("start") for name in inputs)
    for name, (kind, options) in cases.items():
        starts = [inputs[f"start {place}"] for place in range(count)]
        weights = [torch.nn.Parameter(layout(start).contiguous().clone()) for start in starts]
        groups = weights
        if name.endswith("factors"):
            groups = [
                {"params": [weight], "lr": options["lr"] * factor}
                for weight, factor in zip(weights, factors)
            ]
        optimizer = kind(groups, **options)
        for step in range(20):
            for place, weight in enumerate(weights):
                weight.grad = layout(inputs[f"gradient {step} {place}"]).contiguous().clone()
            optimizer.step()
        for place, weight in enumerate(weights):
            outputs[f"{name}/{place}"] = ours(weight.detach()) - starts[place]
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    arrays = {f"start {place}": start for place, start in enumerate(starts())}
    arrays["factors"] = np.array(FACTORS, "float32")
    for step, values in enumerate(gradients()):
        arrays |= {f"gradient {step} {place}": gradient for place, gradient in enumerate(values)}
    return run_reference(REFERENCE, arrays, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("adamw8bit")])
def test_updates_are_those_of_the_reference(found, expected, case):
    for place, shape in enumerate(SHAPES):
        ours, theirs = (arrays[f"{case}/{place}"] for arrays in (found, expected))
        error, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        assert size > 1e-5
        assert error < 1e-4 * size, f"{case}, {shape}"


def dynamic_map(signed):
    """Return the table of bitsandbytes' `create_dynamic_map`, which has 256 numbers."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        numbers += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(numbers, "float32"))


@pytest.mark.parametrize("map_, signed", [(SIGNED, True), (UNSIGNED, False)])
def test_codes_are_those_of_the_table(map_, signed):
    table = dynamic_map(signed)
    assert len(table) == 256
    codes = np.arange(256, dtype="float32")
    np.testing.assert_allclose(ops.convert_to_numpy(map_.decoded(codes)), table, rtol=2e-6, atol=1e-12)
    generator = np.random.default_rng(0)
    numbers = 10.0 ** generator.uniform(-8, 0, 100_000) * (
        generator.choice([-1, 1], 100_000) if signed else 1
    )
    numbers = np.concatenate([numbers, table, [0.0]]).astype("float32")
    nearest = nearest_codes(numbers, table)
    found = ops.convert_to_numpy(map_.encoded(numbers))
    wrong = found != nearest
    # Where a number lies between two codes, rounding may choose either.
    np.testing.assert_allclose(
        np.abs(table[found[wrong].astype(int)] - numbers[wrong]),
        np.abs(table[nearest[wrong]] - numbers[wrong]),
        rtol=1e-4,
    )
    assert wrong.mean() < 1e-4


def nearest_codes(numbers, table):
    codes = np.searchsorted((table[:-1] + table[1:]) / 2, numbers)
    # As in bitsandbytes, a number keeps its sign.
    return codes - ((numbers < 0) & (table[codes] >= 0))


def reference_8bit(start, steps, rate=1e-3, decay=0.01):
    """Return the change of one variable by bitsandbytes' formula (Dettmers et al., 2022)."""
    size, padding = start.size, -start.size % 256
    tables = dynamic_map(True), dynamic_map(False)
    weight = start.astype("float64").ravel()
    codes = [np.zeros((size + padding) // 256 * 256, "uint8").reshape(-1, 256) for _ in range(2)]
    scales = [np.zeros(len(codes[0]), "float32") for _ in range(2)]
    for step, gradient in enumerate(steps, start=1):
        gradient = gradient.ravel()
        first, second = (
            (table[code] * scale[:, None]).ravel()[:size]
            for table, code, scale in zip(tables, codes, scales, strict=True)
        )
        first = first * 0.9 + 0.1 * gradient
        second = second * 0.999 + 0.001 * gradient**2
        correction1, correction2 = 1 - 0.9**step, np.sqrt(1 - 0.999**step)
        weight -= rate * correction2 / correction1 * first / (np.sqrt(second) + 1e-8 * correction2)
        weight *= 1 - rate * decay
        for place, moment in enumerate((first, second)):
            blocks = np.pad(moment, (0, padding)).reshape(-1, 256)
            scales[place] = np.abs(blocks).max(axis=1)
            codes[place] = nearest_codes(blocks / scales[place][:, None], tables[place])
    return (weight - start.ravel()).reshape(start.shape)


def test_8_bit_updates_are_those_of_the_formula(found):
    reference = reference_8bit(starts()[-1], [step[-1] for step in gradients()])
    ours = found[f"adamw8bit/{len(SHAPES) - 1}"]
    assert np.abs(reference).max() > 5e-3
    assert np.abs(ours - found[f"adamw/{len(SHAPES) - 1}"]).max() > 1e-4  # quantization changes the steps
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)
    assert np.linalg.norm(ours - reference) < 1e-4 * np.linalg.norm(reference)
    for place in range(len(SHAPES) - 1):  # small variables keep 32 bits
        np.testing.assert_array_equal(found[f"adamw8bit/{place}"], found[f"adamw/{place}"])


def test_8_bit_updates_have_factors_of_the_learning_rate(found):
    ours = found[f"adamw8bit, factors/{len(SHAPES) - 1}"]
    steps = [step[-1] for step in gradients()]
    reference = reference_8bit(starts()[-1], steps, rate=1e-3 * FACTORS[-1])
    assert np.linalg.norm(ours - reference) < 1e-4 * np.linalg.norm(reference)


def test_factor_scales_the_step_of_prodigy_and_not_its_estimate():
    def trained(factors):
        variables = [keras.Variable(start) for start in starts()[3:6]]
        optimizer = Prodigy(1.0, d0=1e-3)
        optimizer.rate_factors = dict(zip(map(id, variables), factors, strict=True))
        optimizer.build(variables)
        optimizer.apply([ops.convert_to_tensor(one) for one in gradients()[0][3:6]], variables)
        return [
            ops.convert_to_numpy(one) - start for one, start in zip(variables, starts()[3:6], strict=True)
        ]

    whole, scaled = trained([1.0, 1.0, 1.0]), trained([0.5, 1.0, 2.0])
    for factor, one, other in zip([0.5, 1.0, 2.0], whole, scaled, strict=True):
        assert np.abs(one).max() > 1e-5
        np.testing.assert_allclose(other, factor * one, rtol=1e-2, atol=1e-6)


def test_moments_of_8_bits_take_a_quarter_of_the_memory():
    def size(kind):
        variable = keras.Variable(np.zeros((256, 1024), "float32"))
        optimizer = kind(1e-3, ema_decay=None)
        optimizer.build([variable])
        arrays = [ops.convert_to_numpy(part) for part in optimizer.variables]
        return sum(array.nbytes for array in arrays if array.ndim)

    assert size(AdamW) == 2 * 4 * 256 * 1024
    assert size(AdamW8bit) == 2 * (256 * 1024 + 4 * 1024)  # with a scale for each 256


def test_update_with_a_learning_rate_of_0_counts_for_nothing():
    """Prodigy's sums start when a warm-up has left 0."""

    def trained(rates):
        optimizer = Prodigy(lambda: rates[0], use_bias_correction=True)
        variable = keras.Variable(starts()[3])
        optimizer.build([variable])
        for step in gradients()[:3]:
            optimizer.apply([ops.convert_to_tensor(step[3])], [variable])
        return ops.convert_to_numpy(variable)

    np.testing.assert_array_equal(trained([0.0]), starts()[3])
    assert np.abs(trained([1.0]) - starts()[3]).max() > 0


# Kernels of 5,184 weights, which have moments of 8 bits.
UNET = dataclasses.replace(tiny.ONE_LEVEL_PIXEL_UNET, block_out_channels=(24,))
SCHEDULER = SchedulerConfig(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
IMAGES = [
    {"image": np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype="uint8")} for index in range(8)
]
RUNS = {
    "adamw8bit": {"gradient_accumulation_steps": 2},
    "adafactor": {"adafactor_relative_step": True, "adafactor_beta1": 0.5},
    "lion": {"offload_ema": True, "lr_warmup_steps": 0},
    "prodigy": {"mixed_precision": "fp16", "prodigy_d0": 1e-3, "lr_warmup_steps": 2},
}


def train(folder, optimizer, **options):
    """Runs four steps of a tiny DDIM training, with a checkpoint after each."""
    settings = Settings(
        folder,
        optimizer=optimizer,
        max_train_steps=4,
        train_batch_size=4,
        jit_compile=False,
        evaluation_steps=0,
        checkpointing_steps=1,
        checkpoints_total_limit=None,
        **RUNS[optimizer] | options,
    )
    keras.utils.set_random_seed(0)
    try:
        settings.use_precision()
        return train_pixel_ddim(settings, UNET, SCHEDULER, IMAGES)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {optimizer: tmp_path_factory.mktemp(optimizer) for optimizer in RUNS}
    for optimizer, folder in folders.items():
        assert train(folder, optimizer)
    return folders


def tensors(folder, step):
    return {
        f"{group}/{name}": array
        for group in ("weights", "ema", "optimizer")
        for name, array in load_file(folder / f"checkpoint-{step}" / f"{group}.safetensors").items()
    }


@pytest.mark.parametrize("optimizer", RUNS)
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, runs, optimizer):
    later = [f"checkpoint-{step}" for step in (3, 4)]
    resumed = tmp_path / "resumed"
    shutil.copytree(runs[optimizer], resumed, ignore=shutil.ignore_patterns(*later, "model"))
    assert train(resumed, optimizer, resume_from_checkpoint="latest")
    expected, found = tensors(runs[optimizer], 4), tensors(resumed, 4)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert logged(resumed) == logged(runs[optimizer])
    before = tensors(runs[optimizer], 2)
    moved = [np.abs(before[name] - expected[name]).max() for name in before if name.startswith("weights")]
    assert np.median(moved) > 1e-6


def test_checkpoint_holds_moments_of_8_bits(runs):
    state = [array for name, array in tensors(runs["adamw8bit"], 4).items() if name.startswith("optimizer/")]
    eight = [array for array in state if array.dtype == np.uint8]
    assert eight and all(array.size >= 4096 and len(np.unique(array)) > 20 for array in eight)


def logged(folder):
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("step", "time")}
        for line in lines
    ]


def test_log_has_learning_rate_and_gradient_norm(runs):
    rates = {optimizer: [line["learning_rate"] for line in logged(runs[optimizer])] for optimizer in RUNS}
    np.testing.assert_allclose(rates["adafactor"], [0.01] * 4, rtol=1e-6)
    np.testing.assert_allclose(rates["adamw8bit"], [0, 2.5e-5, 5e-5, 7.5e-5], rtol=1e-5)  # of the warm-up
    np.testing.assert_allclose(rates["prodigy"][:3], [0, 0.5, 1.0], rtol=1e-6)
    for optimizer in RUNS:
        norms = [line["gradient_norm"] for line in logged(runs[optimizer])]
        assert len(norms) == len(set(norms)) == 4 and min(norms) > 0
    assert all(line["prodigy_d"] >= np.float32(1e-3) for line in logged(runs["prodigy"]))


@pytest.mark.parametrize("optimizer", RUNS)
def test_checkpoint_of_another_optimizer_is_refused_in_one_line(tmp_path, runs, optimizer):
    other = "lion" if optimizer == "adafactor" else "adafactor"
    shutil.copytree(runs[optimizer], tmp_path / "run")
    with pytest.raises(UserError, match=f'another optimizer \\("{optimizer}" there and "{other}" here\\)'):
        train(tmp_path / "run", other, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "values, line",
    [
        ({"optimizer": "sgd"}, "optimizer 'sgd': unknown; use adamw, adamw8bit, "),
        ({"optimizer": "Lion", "adam_beta1": 0.9}, "adam_beta1 0.9: has no effect with `optimizer='lion'`"),
        ({"optimizer": "adafactor", "adam_epsilon": 1e-8}, "adam_epsilon 1e-08: has no effect with "),
        ({"prodigy_d_coef": 2.0}, "prodigy_d_coef 2.0: has no effect with `optimizer='adamw'`; leave it out"),
        ({"optimizer": "prodigy", "prodigy_growth_rate": 0.9}, "prodigy_growth_rate 0.9: out of range"),
        ({"optimizer": "lion", "lion_beta2": 1.0}, "lion_beta2 1.0: out of range"),
        ({"optimizer": "adafactor", "adafactor_warmup_init": True}, "adafactor_warmup_init True: has no "),
        (
            {"optimizer": "adafactor", "adafactor_relative_step": True, "learning_rate": 1e-3},
            "learning_rate 0.001: has no effect with `adafactor_relative_step=True`; leave it out",
        ),
    ],
)
def test_settings_of_another_optimizer_are_refused(tmp_path, values, line):
    with pytest.raises(UserError) as error:
        Settings(tmp_path, **values)
    assert str(error.value).startswith(line)


def test_settings_take_the_defaults_of_their_optimizer(tmp_path):
    assert Settings(tmp_path, optimizer="Prodigy").learning_rate == 1.0
    adamw = Settings(tmp_path)
    assert (adamw.learning_rate, adamw.adam_beta2, adamw.adam_weight_decay) == (1e-4, 0.999, 0.01)
    # As in checkpoints of earlier versions, which such a run resumes.
    names = set(adamw.identity())
    assert {"adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay"} <= names
    assert not any(name.startswith(("optimizer", "lion", "adafactor", "prodigy")) for name in names)
    again = dataclasses.replace(adamw, mixed_precision="bf16")
    assert again.identity() | {"mixed_precision": "no"} == adamw.identity()


def test_updates_of_split_weights_are_those_of_whole_ones():
    """Under JAX, on two devices; codes of 8 bits are split as their weights are."""
    code = """if True:
        import jax, keras, numpy as np
        from keras_sd import backend
        from keras_sd.training.optimizers import Adafactor, AdamW8bit, Lion, Prodigy

        inputs = np.random.default_rng(0).normal(size=(20, 64)).astype("float32")

        def trained(kind, mesh=None):
            keras.utils.set_random_seed(0)
            layers = [keras.layers.Dense(128, activation="tanh"), keras.layers.Dense(64)]
            model = keras.Sequential([keras.layers.Input((64,)), *layers])
            for layer, axes in zip(layers, ([None, "model"], ["model", None]) if mesh else ()):
                backend.lay_out(layer.kernel, keras.distribution.TensorLayout(axes, mesh))
            optimizer = kind(1.0 if kind is Prodigy else 1e-3, global_clipnorm=1.0)
            optimizer.build(model.trainable_variables)
            model.compile(optimizer=optimizer, loss="mse")
            model.fit(inputs, inputs[::-1], batch_size=4, verbose=0, shuffle=False)
            if mesh and kind is AdamW8bit:
                codes = [state.value for state in optimizer.variables if state.dtype == "uint8"]
                parts = [part.data.size for value in codes for part in value.addressable_shards]
                assert parts == [64 * 128 // 2] * 8, parts
            return model.get_weights()

        kinds = AdamW8bit, Adafactor, Lion, Prodigy
        whole = [trained(kind) for kind in kinds]
        mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), jax.devices())
        keras.distribution.set_distribution(keras.distribution.ModelParallel(
            layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="batch", auto_shard_dataset=False
        ))
        for kind, weights in zip(kinds, whole):
            for split, expected in zip(trained(kind, mesh), weights):
                np.testing.assert_allclose(split, expected, atol=1e-6, err_msg=kind.__name__)
    """
    run_python(["-c", code], XLA_FLAGS="--xla_force_host_platform_device_count=2")
