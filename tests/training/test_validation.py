"""The validation loss: what it is measured on, its estimates, and that it depends on the weights alone."""

import json
import shutil

import keras
import numpy as np
import pytest

from keras_sd.data.sources import batches
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.unet import UNet
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.run_folder import RECORD
from keras_sd.training.trainer import Settings, Trainer
from keras_sd.training.validation import (
    Validation,
    estimates,
    fixed_examples,
    validation_maker,
)
from tests import tiny

SCHEDULER = SchedulerConfig(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
SCHEDULE = NoiseSchedule(SCHEDULER)
IMAGES = [np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype="uint8") for index in range(20)]
STEPS, COUNT = 4, 12


def drawing(noise):
    def draw(image, generator):
        return {"samples": image, **noise.draw(generator, image.shape)}

    return draw


def train(folder, steps=STEPS, **options):
    """Trains a tiny DDIM and measures it; returns the trainer and the measure."""
    settings = Settings(
        output_dir=folder,
        max_train_steps=steps,
        train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        checkpointing_steps=2,
        checkpoints_total_limit=None,
        validation_steps=2,
        jit_compile=False,
        **options,
    )
    keras.utils.set_random_seed(0)
    diffusion = DiffusionSettings(snr_gamma=5.0)
    noise = NoiseDrawing(diffusion, SCHEDULE)
    objective = DiffusionObjective(UNet(tiny.ONE_LEVEL_PIXEL_UNET), SCHEDULE, diffusion)
    trainer = Trainer(objective, settings, {})
    made = []

    def make(trainer):
        validation = Validation({"train": IMAGES[:12], "held_out": IMAGES[12:]}, COUNT)
        made.append(validation_maker(validation, drawing(noise), noise)(trainer))
        return made[0]

    assert trainer.run(IMAGES[:12], drawing(noise), make_validation=make)
    return trainer, made[0]


def validated(folder):
    """The figures of the validations, by step."""
    records = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return {
        record["step"]: {name: value for name, value in record.items() if name != "time"}
        for record in records
        if "validation_loss_train_raw" in record
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validated")
    return (folder, *train(folder))


def test_measures_before_the_first_step_every_two_steps_and_at_the_end(run):
    folder, _, _ = run
    figures = validated(folder)
    assert list(figures) == [0, 2, 4]
    for step, values in figures.items():
        # Both sets and weights; the whole and four bins; the mean and its standard error.
        assert len(values) == 1 + 2 * 2 * 5 * 2
        assert np.isfinite(list(values.values())).all(), step
    assert figures[0]["validation_loss_train_ema"] == figures[0]["validation_loss_train_raw"]
    assert figures[4]["validation_loss_train_ema"] != figures[4]["validation_loss_train_raw"]
    assert figures[4]["validation_loss_train_raw"] < figures[0]["validation_loss_train_raw"]


def test_is_the_loss_of_the_objective_on_the_same_examples(run):
    _, trainer, measure = run
    for name, examples in measure.sets.items():
        expected = np.asarray(trainer.objective.call(examples))
        np.testing.assert_allclose(measure.losses(name), expected, rtol=1e-5)
        whole, bins = measure.measure(name)
        assert whole.mean == pytest.approx(expected.mean(), rel=1e-5)
        places = examples["timesteps"] // 250
        for place, estimate in enumerate(bins.values()):
            assert estimate.mean == pytest.approx(expected[places == place].mean(), rel=1e-5)
        assert list(bins) == [f"_timesteps_{start}_{start + 249}" for start in (0, 250, 500, 750)]


def test_killed_and_resumed_run_logs_the_same_numbers(run, tmp_path):
    folder, _, _ = run
    ignored = shutil.ignore_patterns("checkpoint-4")
    shutil.copytree(folder, tmp_path / "killed", ignore=ignored)
    record = json.loads((tmp_path / "killed" / RECORD).read_text())
    assert record["validated"] == 4
    train(tmp_path / "killed", resume_from_checkpoint="latest")
    assert validated(tmp_path / "killed") == validated(folder)


def test_killed_before_its_validation_a_run_makes_up_for_it(run, tmp_path):
    folder, _, _ = run
    killed = shutil.copytree(folder, tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoint-4"))
    (killed / RECORD).unlink()
    log = killed / "logs" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    whole = [index for index, line in enumerate(lines) if '"validation_loss' in line and '"step": 2' in line]
    log.write_text("".join(lines[: whole[0]]))
    train(killed, resume_from_checkpoint="latest")
    assert validated(killed) == validated(folder)


def test_examples_are_fixed_stratified_and_none_of_training():
    noise = NoiseDrawing(DiffusionSettings(), SCHEDULE)
    draw = drawing(noise)
    few, many = (fixed_examples(images, 16, 3, draw, noise) for images in (IMAGES[:5], IMAGES))
    again = fixed_examples(IMAGES[:5], 16, 3, draw, noise)
    for name, array in few.items():
        np.testing.assert_array_equal(array, again[name])
    # One timestep in each sixteenth of the schedule, the same for other images, as is the noise.
    assert sorted(few["timesteps"] * 16 // 1000) == list(range(16))
    for name in ("noise", "timesteps"):
        np.testing.assert_array_equal(few[name], many[name])
    np.testing.assert_array_equal(few["samples"][:6], [IMAGES[index % 5] for index in range(6)])
    np.testing.assert_array_equal(many["samples"], [IMAGES[index * 20 // 16] for index in range(16)])
    assert len(np.unique(few["noise"][:, 0, 0, 0])) == 16
    other = fixed_examples(IMAGES, 16, 4, draw, noise)
    assert not np.intersect1d(other["noise"], many["noise"]).size
    trained = next(iter(batches(IMAGES, batch_size=16, seed=3, draw=draw)))
    assert not np.intersect1d(trained["noise"], many["noise"]).size


def test_timesteps_follow_the_distribution_of_the_run():
    settings = DiffusionSettings(timestep_sampling="log_normal")
    noise = NoiseDrawing(settings, NoiseSchedule(SchedulerConfig()))
    found = fixed_examples(IMAGES, 512, 0, drawing(noise), noise)["timesteps"]
    generator = np.random.default_rng(0)
    drawn = [noise.timestep(generator) for _ in range(20000)]
    shares = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(found, shares), np.quantile(drawn, shares), atol=12)


def test_standard_error_is_that_of_a_stratified_sample():
    """Of many samples, each of 10 losses in each half of the timesteps, the means spread as it says."""
    generator = np.random.default_rng(0)
    timesteps = np.repeat([100, 900], 10)
    centres, spreads = np.repeat([1.0, 9.0], 10), np.repeat([0.5, 2.0], 10)
    found = [
        estimates(centres + spreads * generator.standard_normal(20), timesteps, 1000, 2) for _ in range(2000)
    ]
    means = [whole.mean for whole, _ in found]
    error = np.sqrt(np.mean([whole.standard_error**2 for whole, _ in found]))
    assert error == pytest.approx(np.std(means), rel=0.05)
    assert np.mean(means) == pytest.approx(5.0, abs=0.05)
    for name, spread in (("_timesteps_0_499", 0.5), ("_timesteps_500_999", 2.0)):
        error = np.sqrt(np.mean([bins[name].standard_error ** 2 for _, bins in found]))
        assert error == pytest.approx(spread / 10**0.5, rel=0.05)


def test_fixed_noise_shows_a_difference_that_fresh_noise_hides(run, tmp_path):
    """Of two checkpoints the difference deviates, from seed to seed, a tenth as much with the same noise."""
    _, trainer, _ = run
    noise = NoiseDrawing(DiffusionSettings(), SCHEDULE)
    states = []
    for scale in (0.0, 1e-3):  # two checkpoints close to one another, as in a run
        generator = np.random.default_rng(1)
        states.append(
            [
                np.array(variable) + scale * generator.standard_normal(variable.shape).astype("float32")
                for variable in trainer.objective.trainable_variables
            ]
        )

    def losses(state):
        for variable, value in zip(trainer.objective.trainable_variables, state, strict=True):
            variable.assign(value)
        found = []
        for seed in range(24):
            examples = fixed_examples(IMAGES, 16, seed, drawing(noise), noise)
            found.append(np.asarray(trainer.objective.call(examples)).mean())
        return np.array(found)

    first, second = map(losses, states)
    fixed, fresh = np.std(second - first), np.std(second[1:] - first[:-1])
    assert 0 < fixed < 0.1 * fresh


def test_a_loss_that_is_not_finite_is_named(run):
    _, trainer, measure = run
    variable = trainer.objective.trainable_variables[0]
    kept = np.array(variable)
    variable.assign(np.full_like(kept, np.nan))
    try:
        with pytest.raises(UserError, match="validation loss of train: not a finite number"):
            measure.measure("train")
    finally:
        variable.assign(kept)


def test_empty_sets_and_counts_are_refused():
    with pytest.raises(UserError, match="validation set held_out: has no examples"):
        Validation({"held_out": []})
    with pytest.raises(UserError, match="validation_examples 0"):
        Validation({"train": IMAGES}, 0)
    assert validation_maker(None, None, None) is None
