"""What is found wrong with runs, by figures as a run logs them, and how runs are drawn."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from keras_sd.errors import UserError
from keras_sd.training import run_plot
from keras_sd.training.run_curves import Curve, findings, read_run

STEPS = 400


def falling(start, end, count=STEPS):
    return end + (start - end) * np.exp(-np.linspace(0, 5, count))


def write_run(folder, loss=None, norms=None, train=None, held_out=None, method="lora", **options):
    """Writes the log of a run: noisy losses, and validations every 50 steps."""
    generator = np.random.default_rng(0)
    loss = falling(0.2, 0.1) if loss is None else loss
    norms = np.full(STEPS, 0.5) if norms is None else norms
    train = falling(0.2, 0.1, 9) if train is None else train
    held_out = falling(0.21, 0.12, 9) if held_out is None else held_out
    lines = []
    for step in range(STEPS + 1):
        if step:
            noise = np.exp(0.3 * generator.standard_normal(2))
            lines.append(
                {
                    "step": step,
                    "time": 0.0,
                    "loss": loss[step - 1] * noise[0],
                    "gradient_norm": norms[step - 1] * noise[1],
                    "learning_rate": 1e-4,
                }
            )
        if step % 50 == 0:
            figures = {"step": step}
            for part, values in (("train", train), ("held_out", held_out)):
                for weights in ("ema", "raw"):
                    name = f"validation_loss_{part}_{weights}"
                    figures |= {name: values[step // 50], f"{name}_standard_error": 0.01}
            figures |= {
                f"validation_loss_held_out_ema_timesteps_{250 * place}_{250 * place + 249}": 0.1 + place
                for place in range(4)
            }
            lines += [figures, {"step": step, "kid_emoji_train_ema": 0.1, "clip_score_train_ema": 30.0}]
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"version": 1, "method": method, "options": options}))
    return folder


def test_a_good_run_is_not_blamed(tmp_path):
    assert findings(read_run(write_run(tmp_path / "fine"))) == []
    # A new network starts at 1, and so do weighted losses of any size.
    high = {"loss": falling(1.0, 0.2), "train": falling(1.0, 0.2, 9), "held_out": falling(1.0, 0.21, 9)}
    assert findings(read_run(write_run(tmp_path / "new", **high, method="ddim"))) == []
    scratch = write_run(tmp_path / "scratch", **high, method="text-to-image", from_scratch=True)
    assert findings(read_run(scratch)) == []
    assert findings(read_run(write_run(tmp_path / "weighted", **high, snr_gamma=5.0))) == []


BAD = {
    "diverges": {"loss": np.concatenate([falling(0.2, 0.1, 200), np.linspace(0.1, 2.0, 200)])},
    "spikes": {"norms": np.where(np.arange(STEPS) % 40 == 0, 60.0, 0.5)},
    "overfits": {"held_out": np.array([0.21, 0.15, 0.13, 0.12, 0.125, 0.13, 0.14, 0.15, 0.16])},
    "starts at a loss of": {"train": falling(1.0, 0.4, 9), "held_out": falling(1.0, 0.4, 9)},
    "does not learn": {"train": np.full(9, 0.2), "held_out": np.full(9, 0.2)},
    "does not learn: the loss on fixed": {"train": np.linspace(0.2, 0.19999, 9), "held_out": np.full(9, 0.2)},
    "loss is not finite from step 300 on": {"loss": np.where(np.arange(STEPS) < 299, 0.1, np.nan)},
}


@pytest.mark.parametrize("told", BAD)
def test_each_kind_of_bad_run_is_told_alone(tmp_path, told):
    found = findings(read_run(write_run(tmp_path / "bad", **BAD[told])))
    assert len(found) == 1 and told in found[0], found


def test_prodigy_that_has_not_begun_is_told(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    run.curves["prodigy_d"] = Curve(np.arange(1.0, 21.0), np.full(20, 1e-6))
    assert [line.partition(";")[0] for line in findings(run)] == [
        "hardly learns: Prodigy's estimate d is still 1e-06 after 20 steps"
    ]
    run.curves["prodigy_d"].values[-1] = 2e-6
    assert findings(run) == []


def test_panels_show_what_was_logged(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    titles = {}
    for panel in filter(None, run_plot._panels([run])):
        axes = Figure().subplots()
        panel(axes)
        titles[axes.get_title()] = axes
    assert list(titles) == [
        *("loss", "held-out loss by timestep, EMA", "learning rate", "gradient norm before clipping"),
        *("kid emoji", "clip score"),
    ]
    lines = {line.get_label(): line.get_ydata() for line in titles["gradient norm before clipping"].lines}
    (norms,) = lines.values()
    np.testing.assert_array_equal(norms, run.curves["gradient_norm"].values)
    bars = titles["loss"].containers
    assert [container.get_label() for container in bars] == [
        *("held-out, EMA", "held-out, raw", "train, EMA", "train, raw"),
    ]
    np.testing.assert_allclose(bars[0].lines[0].get_ydata(), falling(0.21, 0.12, 9))
    (segments,) = (part.get_segments() for part in bars[0].lines[2])
    np.testing.assert_allclose([segment[1][1] - segment[0][1] for segment in segments], 0.02)


def test_runs_are_compared_in_one_image(tmp_path):
    runs = [read_run(write_run(tmp_path / name)) for name in ("first", "second")]
    run_plot.draw(runs[:1], tmp_path / "one.png")
    run_plot.draw(runs, tmp_path / "two.png")
    images = [np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "two.png")]
    assert all(image.std() > 10 for image in images)
    # Several runs have no panel of bins.
    axes = [Figure().subplots() for _ in range(5)]
    for place, panel in zip(axes, filter(None, run_plot._panels(runs)), strict=True):
        panel(place)
    labels = [text.get_label() for text in axes[0].containers]
    # A run has one colour, so its sets differ by dashes; rates that differ much are both seen.
    figures = {line.get_label(): line.get_linestyle() for line in axes[3].lines}
    assert figures == {"first, train, ema": "--", "second, train, ema": "--"}
    assert axes[1].get_yscale() == "linear"
    runs[0].curves["learning_rate"].values[:] = 1.0
    place = Figure().subplots()
    list(filter(None, run_plot._panels(runs)))[1](place)
    assert place.get_yscale() == "log"
    assert labels == [
        *("first: held-out, EMA", "first: train, EMA", "second: held-out, EMA", "second: train, EMA"),
    ]


def test_a_run_that_goes_on_is_read_and_others_are_refused_in_one_line(tmp_path):
    folder = write_run(tmp_path / "run")
    log = folder / "logs" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 401, "lo')
    assert len(read_run(folder).curves["loss"].values) == STEPS
    log.write_text(whole + '{"step": 401, "loss"\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 419: not valid JSON"):
        read_run(folder)
    log.write_text('{"step": 1, "loss": "low"}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 1: loss is not a number"):
        read_run(folder)
    log.write_text("")
    with pytest.raises(UserError, match="has no figures yet"):
        read_run(folder)
    with pytest.raises(UserError, match="no run folder, as logs/metrics.jsonl is missing"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
