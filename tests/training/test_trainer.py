"""The training loop: resumed against uninterrupted runs, accumulation, EMA, XLA, both backends."""

import functools
import json
import math
import os
import shutil
import signal

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.training.objectives import DiffusionObjective, Objective
from keras_sd.training.pixel_ddim import train_pixel_ddim
from keras_sd.training.trainer import Settings, Trainer
from tests import tiny

SCHEDULER = SchedulerConfig(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
PICTURES = [
    {"image": np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype="uint8")} for index in range(12)
]
STEPS = 6


def train(
    folder, stop_at=None, pictures=PICTURES, evaluation_steps=3, jit_compile=False, evaluate=None, **options
):
    """Runs a tiny DDIM training; a SIGTERM arrives after step `stop_at`, or `evaluate(step)` evaluates."""
    settings = Settings(
        output_dir=folder,
        learning_rate=1e-2,
        evaluation_steps=evaluation_steps,
        jit_compile=jit_compile,
        **{
            "max_train_steps": STEPS,
            "lr_warmup_steps": 2,
            "train_batch_size": 4,
            "checkpointing_steps": 100,
            **options,
        },
    )
    keras.utils.set_random_seed(settings.seed)

    def stop(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def make_evaluation(denoiser):
        def make(trainer):
            assert evaluation_steps
            return evaluate or stop

        return make

    return train_pixel_ddim(
        settings, tiny.ONE_LEVEL_PIXEL_UNET, SCHEDULER, pictures, make_evaluation=make_evaluation
    )


def state(folder, step=STEPS):
    return {
        group: load_file(folder / f"checkpoint-{step}" / f"{group}.safetensors")
        for group in ("weights", "ema", "optimizer")
    }


def assert_same_state(left, right):
    for group in left:
        assert left[group].keys() == right[group].keys()
        for name in left[group]:
            np.testing.assert_array_equal(left[group][name], right[group][name], err_msg=f"{group}/{name}")


def losses(folder):
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


@pytest.fixture(autouse=True)
def policy():
    """Leaves Keras' precision as it was."""
    yield
    keras.config.set_dtype_policy("float32")


WHOLE_RUNS = {
    "traced": {},
    "xla": {"jit_compile": True},
    "accumulating": {"gradient_accumulation_steps": 2},
    "fp16": {"mixed_precision": "fp16"},
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Gives the folder of one of `WHOLE_RUNS`, which holds every checkpoint and which no test writes into.

    Each is trained once: nearly all of its time goes into its first step.
    """

    @functools.cache
    def folder(kind):
        folder = tmp_path_factory.mktemp(kind)
        assert train(folder, checkpointing_steps=1, checkpoints_total_limit=None, **WHOLE_RUNS[kind])
        return folder

    return folder


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def copy_as_of_step(step, folder, copy):
    """Copies of a run what a process that was killed after this step would have left behind."""
    later = [path.name for path in folder.glob("checkpoint-*") if int(path.name.split("-")[1]) > step]
    assert later and (folder / f"checkpoint-{step}").is_dir()
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*later, "model"))


@pytest.mark.parametrize("kind", WHOLE_RUNS)
def test_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, whole_run, kind):
    whole, options = whole_run(kind), WHOLE_RUNS[kind]
    if kind in ("traced", "accumulating"):
        assert not train(tmp_path / "parts", stop_at=3, **options)
        assert not (tmp_path / "parts" / f"checkpoint-{STEPS}").exists()
    else:
        # What stops a run knows nothing of how its step is compiled or in which precision.
        copy_as_of_step(3, whole, tmp_path / "parts")
    assert train(tmp_path / "parts", resume_from_checkpoint="latest", **options)
    assert_same_state(state(whole), state(tmp_path / "parts"))
    assert losses(whole) == losses(tmp_path / "parts")
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))


def test_xla_trains_to_the_weights_of_eager_execution(whole_run):
    compiled, traced = state(whole_run("xla")), state(whole_run("traced"))
    for name, array in compiled["weights"].items():
        np.testing.assert_allclose(array, traced["weights"][name], atol=2e-4, err_msg=name)


def test_accumulated_batches_train_like_one_large_batch(tmp_path, whole_run):
    # The second step: the layers before the last, which begins at zero, have next to no gradient yet, and
    # Adam divides even that by its own size.
    train(tmp_path, train_batch_size=8, checkpointing_steps=2, checkpoints_total_limit=None)
    large, accumulated = state(tmp_path, 2), state(whole_run("accumulating"), 2)
    for group in ("weights", "ema"):
        for name in ("unet.conv_out.weight", "unet.conv_out.bias"):
            left, right = large[group][name], accumulated[group][name]
            assert np.abs(left).max() > 1e-3
            np.testing.assert_allclose(left, right, atol=1e-5, err_msg=f"{group}/{name}")


def test_average_follows_the_warmed_up_decay(whole_run):
    """The EMA after each step, computed here from the weights that the checkpoints hold."""
    traced_run = whole_run("traced")
    average = state(traced_run, 1)["ema"]
    for step in range(2, STEPS + 1):
        decay = min(0.9999, (1 + step - 1) / (10 + step - 1))
        weights = state(traced_run, step)["weights"]
        pairs = zip(average.items(), weights.values(), strict=True)
        average = {name: decay * array + (1 - decay) * weight for (name, array), weight in pairs}
    for (name, array), expected in zip(state(traced_run)["ema"].items(), average.values(), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_exported_model_holds_the_average(whole_run):
    traced_run = whole_run("traced")
    exported = load_file(traced_run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    average = sorted(float(np.sum(np.abs(array))) for array in state(traced_run)["ema"].values())
    written = sorted(float(np.sum(np.abs(array))) for array in exported.values())
    np.testing.assert_allclose(written, average, rtol=1e-6)


def test_checkpoint_of_other_settings_is_refused(tmp_path, whole_run):
    with pytest.raises(UserError, match=r"made with another seed \(0 there and 1 here\)"):
        train(copy(whole_run("traced"), tmp_path), seed=1, resume_from_checkpoint="latest")


def test_settings_that_may_change_are_told_and_honoured(tmp_path, whole_run, capsys):
    run = tmp_path / "run"
    copy_as_of_step(3, whole_run("traced"), run)
    changes = {"max_train_steps": 5, "train_batch_size": 5, "gradient_accumulation_steps": 2}
    assert train(run, resume_from_checkpoint="latest", **changes, **{"max_grad_norm": 0.0})
    assert (
        "resuming after step 3 with changes: max_grad_norm is 0.0, it was 1.0; "
        "max_train_steps is 5, it was 6; train_batch_size is 5, it was 4; "
        "gradient_accumulation_steps is 2, it was 1; "
        "checkpointing_steps is 100, it was 1; checkpoints_total_limit is 2, it was None; "
        "the cosine schedule of the learning rate ends at the new last step; "
        "updates are now of 10 images, and their order continues after the 12 seen\n"
    ) in capsys.readouterr().err
    # Twelve examples are two batches of five and a part of the third.
    position = json.loads((run / "checkpoint-5" / "position.json").read_text())
    assert position == {"batch": 3 + 2 * 2, "examples": 35}
    assert state(run, 5)["optimizer"]["00000"] == 5 * 2  # Keras counts batches
    # And back, from there.
    more = {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    assert train(run, **more)
    assert json.loads((run / "checkpoint-6" / "position.json").read_text())["examples"] == 36 + 4


class Narrow(Objective):
    def __init__(self, width):
        super().__init__()
        self.dense = keras.layers.Dense(width)
        self.dense.build((None, 4))
        self.built = True


def test_checkpoint_of_other_tensors_is_refused_in_one_line(tmp_path):
    trainer = Trainer(Narrow(2), Settings(tmp_path), {})
    trainer.checkpoints.save(1, *trainer.gather_state())
    resumed = Settings(tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=r"weights does not fit this run \(dense.* is \[4, 2\] there and"):
        Trainer(Narrow(3), resumed, {})
    frozen = Narrow(2)
    frozen.dense.bias.trainable = False
    with pytest.raises(UserError, match="made with other frozen weights .of another base model"):
        Trainer(frozen, resumed, {})
    with pytest.warns(UserWarning, match="cannot be compared with this run in: training method"):
        Trainer(Narrow(2), resumed, {"method": "new"})


def test_beginning_over_an_earlier_run_is_refused(tmp_path, whole_run):
    folder = copy(whole_run("traced"), tmp_path)
    with pytest.raises(UserError, match="earlier run.*resume_from_checkpoint='latest'"):
        train(folder)
    assert_same_state(state(whole_run("traced")), state(folder))


def test_resuming_from_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no valid checkpoint"):
        train(tmp_path, resume_from_checkpoint="latest")


def test_loss_that_is_not_finite_names_step_and_checkpoint(tmp_path, whole_run):
    run = tmp_path / "run"
    copy_as_of_step(3, whole_run("traced"), run)
    broken = [{"image": np.full((8, 8, 3), np.nan, "float32")} for _ in PICTURES]
    with pytest.raises(UserError, match=r"(?s)(loss|not finite).*checkpoint-3") as raised:
        train(run, pictures=broken, resume_from_checkpoint="latest")
    assert "\n" not in str(raised.value)
    assert (run / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_train_steps": [0],
        "train_batch_size": [0],
        "gradient_accumulation_steps": [0],
        "learning_rate": [-1.0, 0.0, math.nan, math.inf],
        "lr_warmup_steps": [-5],
        "adam_beta1": [1.0, -0.1],
        "adam_beta2": [1.0, math.nan],
        "adam_weight_decay": [-0.1],
        "adam_epsilon": [0.0],
        "max_grad_norm": [-1.0, math.nan],
        "ema_decay": [1.0, -0.5],
        "seed": [-1, 2**32],
        "checkpointing_steps": [0],
        "checkpoints_total_limit": [0],
        "evaluation_steps": [-1],
    }.items(),
)
def test_numbers_out_of_range_are_refused(tmp_path, name, values):
    for value in values:
        with pytest.raises(UserError, match=f"{name} .*: out of range; give "):
            Settings(output_dir=tmp_path, **{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", 1e308),
        ("learning_rate", 1e-320),
        pytest.param("learning_rate", 10**400, id="of 400 digits"),
        ("adam_epsilon", 1e-320),
        pytest.param("adam_epsilon", 10**5000, id="of 5000 digits"),
        ("adam_beta2", 1 - 1e-12),  # 1 in float32
        ("max_train_steps", 10**400),
        ("max_train_steps", math.inf),
        ("max_grad_norm", 1e39),
    ],
)
def test_numbers_that_a_step_has_none_for_are_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=f"^{name} .*: (out of range|not a whole number); give .{{1,90}}$"):
        Settings(output_dir=tmp_path, **{name: value})
    with pytest.raises(UserError, match=f"{name} 'many': not a (whole )?number; give "):
        Settings(output_dir=tmp_path, **{name: "many"})


@pytest.mark.parametrize(
    "name, values",
    {
        "max_train_steps": [1.5, 3.0, True, None],
        "learning_rate": [[], True, "1"],
        "seed": [None, 1.5],
        "checkpoints_total_limit": [2.0, True],
        "resume_from_checkpoint": [5],
        "mixed_precision": [[], None],
        "jit_compile": ["no", 1, None],
    }.items(),
)
def test_settings_of_another_type_are_refused(tmp_path, name, values):
    assert Settings(tmp_path, max_train_steps=np.int64(3), learning_rate=1, checkpoints_total_limit=None)
    for value in values:
        with pytest.raises(UserError, match=f"^{name} .*: not .*; give "):
            Settings(tmp_path, **{name: value})


def test_arguments_of_another_class_are_refused(tmp_path):
    objective, settings = Narrow(2), Settings(tmp_path)
    for arguments, name in (
        ((keras.layers.Dense(2), settings, {}), "objective"),
        ((keras.Sequential(), settings, {}), "objective"),
        ((objective, {}, {}), "settings"),
        ((objective, settings, {"a": {1}}), "identity"),
        ((objective, settings, 5), "identity"),
    ):
        with pytest.raises(UserError, match=f"^{name} .*; give one"):
            Trainer(*arguments)
    for arguments in ((None, NoiseSchedule(SchedulerConfig())), (keras.Sequential(), SchedulerConfig())):
        with pytest.raises(UserError, match="^(unet|schedule) .*; give one"):
            DiffusionObjective(*arguments)
    assert not any(tmp_path.iterdir())


def test_failed_evaluation_loses_nothing(tmp_path, recwarn):
    """The last one comes when checkpoint and model are there, also at a step that is no multiple."""
    found = {}

    def evaluate(step):
        found[step] = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock")
        raise RuntimeError("no samples\ntoday")

    assert train(tmp_path, max_train_steps=3, evaluation_steps=2, checkpointing_steps=2, evaluate=evaluate)
    assert found == {2: ["checkpoint-2", "logs"], 3: ["checkpoint-2", "checkpoint-3", "logs", "model"]}
    told = [str(warning.message) for warning in recwarn if "evaluation at step" in str(warning.message)]
    assert [line.split(";")[0] for line in told] == [
        f"evaluation at step {step}: failed (RuntimeError: no samples today)" for step in (2, 3)
    ]
    # Resumed, it is tried once more, and nothing else is done.
    again = []
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 3, "evaluation_steps": 2}
    assert train(tmp_path, evaluate=again.append, **resumed)
    assert train(tmp_path, evaluate=again.append, **resumed)
    assert again == [3]


def test_no_evaluation_is_made_where_none_is_wanted(tmp_path, whole_run):
    run = tmp_path / "run"
    copy_as_of_step(3, whole_run("traced"), run)
    assert train(run, evaluation_steps=0, resume_from_checkpoint="latest")
    assert_same_state(state(whole_run("traced")), state(run))
    assert (run / "model" / "unet").is_dir()


@pytest.mark.parametrize(
    ("step", "record", "made_up"),
    [
        (3, {}, [3, 6]),  # killed between checkpoint and evaluation, or within that
        (3, {"evaluated": 3}, [6]),
        (6, {"evaluated": 3}, [6]),  # ... between the last checkpoint and the export
        (6, {"evaluated": 3, "exported": 6}, [6]),  # ... in the last evaluation
    ],
)
def test_killed_run_makes_up_for_what_it_has_not_come_to(tmp_path, whole_run, step, record, made_up):
    run, whole = tmp_path / "run", whole_run("traced")
    unfinished = ("model",) if "exported" not in record else ()
    later = [f"checkpoint-{number}" for number in range(step + 1, STEPS + 1)]
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns(*later, *unfinished))
    (run / "logs" / "record.json").write_text(json.dumps(record))
    steps = []
    assert train(run, evaluate=steps.append, resume_from_checkpoint="latest")
    assert steps == made_up
    model = "model/unet/diffusion_pytorch_model.safetensors"
    assert (run / model).read_bytes() == (whole / model).read_bytes()
    assert (run / "logs" / "record.json").read_text() == (whole / "logs" / "record.json").read_text()


def test_samples_before_the_first_step_are_made_once(tmp_path):
    steps = []
    options = {"evaluation_steps": 2, "sample_at_first": True, "evaluate": steps.append}
    train(tmp_path, max_train_steps=2, checkpointing_steps=2, **options)
    assert steps == [0, 2]
    train(tmp_path, max_train_steps=3, resume_from_checkpoint="latest", **options)
    assert steps == [0, 2, 3]
