"""The benchmark: every case and side runs, results are compared, and one that fails stops nothing."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_sd import presets
from keras_sd.cli.program import run_command
from keras_sd.config import UNetConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.models.unet import UNet
from keras_sd.training.objectives import DiffusionObjective
from tests import tiny
from tests.programs import run_python
from tests.reference import run_reference

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools/bench.py", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_sides_are_compared_and_one_that_fails_is_named(tmp_path):
    """KerasCV has no network of that size."""
    output = tmp_path / "bench.json"
    case = ("--models", "emoji", "--cases", "text-encoder", "--repeats", "2")
    sides = ("--backends", "tensorflow", "--peers", "keras-cv")
    done = bench(*case, *sides, "--output", str(output))
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    on, off, keras_cv = results["results"][0]["sides"]
    assert (on["xla"], off["xla"], keras_cv["implementation"]) == ("on", "off", "keras-cv")
    assert off["difference"] < 1e-4
    # Two turns: the median of their ratios is between them.
    assert off["least_ratio"] < off["ratio"] < off["largest_ratio"]
    assert off["ratio"] == pytest.approx((off["least_ratio"] + off["largest_ratio"]) / 2)
    assert off["processor_seconds"] > 0
    assert min(on["peak_bytes"], off["peak_bytes"]) > 2**27
    # 16 tokens through 4 blocks of width 192, 4 images at a time.
    encoder = json.loads((presets.find("emoji") / "text_encoder/config.json").read_text())
    width, tokens = encoder["hidden_size"], encoder["max_position_embeddings"]
    block = tokens * width * (4 * width + 2 * encoder["intermediate_size"]) + 2 * tokens**2 * width
    multiplications = 4 * encoder["num_hidden_layers"] * block
    assert on["warm"]["multiplications"] == multiplications
    assert off["gflops"] == pytest.approx(2 * multiplications / off["seconds"] / 1e9)
    assert "seconds" not in keras_cv and "KerasCV has no network" in keras_cv["failed"]
    table = output.with_suffix(".md").read_text()
    assert f"failed: {keras_cv['failed']}" in table and "compiling pays" in table
    # A ratio stands beside the medians of both sides, and the first side has none.
    seconds = f"| {off['seconds']:.3f}, {off['processor_seconds']:.2f} | {off['reference_seconds']:.3f} |"
    ratio = f"{off['ratio']:.2f} ({off['least_ratio']:.2f}–{off['largest_ratio']:.2f}) |"
    assert f"{seconds} {ratio}" in table
    assert f"XLA on | {on['seconds']:.3f}, {on['processor_seconds']:.2f} |  |  |" in table
    assert output.with_suffix(".png").stat().st_size > 10_000


CASES = ["unet", "vae-encode", "vae-decode", "generation", "training", "training-lora"]

BY_DIFFUSERS = """
    import io
    import json
    import numpy as np

    specs = json.loads((folder / "specs.json").read_text())
    sys.path.insert(0, specs.pop("tools"))
    from benchmark import worker

    torch.set_grad_enabled(True)
    answers = {}
    for case, spec in specs.items():
        sys.stdin = io.StringIO("\\n")
        worker.serve(spec, answers.setdefault(case, []).append)
        outputs[case] = torch.from_numpy(np.load(spec["result"]))
    (folder / "answers.json").write_text(json.dumps(answers))
"""


def check_answers(answers):
    """What one start, one line of input and its end are answered with."""
    ready, call, end = answers
    assert (
        ready["first_call_seconds"] > 0
        and min(call["seconds"], call["processor_seconds"]) > 0
        and end["peak_bytes"] > 0
    )


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """One start of each case, without turns, to which an implementation and a file are still to be added."""
    model = tmp_path_factory.mktemp("bench")
    tiny.pipeline().save(model)
    spec = {"folder": str(model), "size": 16, "batch": 2, "steps": 2, "xla": "off", "precision": "float32"}
    return {case: spec | {"case": case} for case in CASES}


@pytest.fixture(scope="module")
def by_diffusers(specs, tmp_path_factory):
    """The results of all cases."""
    folder = tmp_path_factory.mktemp("diffusers")
    own = {
        case: spec | {"implementation": "diffusers", "result": str(folder / f"{case}.npy")}
        for case, spec in specs.items()
    }
    (folder / "specs.json").write_text(json.dumps(own | {"tools": str(ROOT / "tools")}))
    results = run_reference(BY_DIFFUSERS, {}, folder)
    for answers in json.loads((folder / "answers.json").read_text()).values():
        check_answers(answers)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_case_gives_the_same_by_diffusers(case, specs, by_diffusers, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from benchmark import worker

    result, answers = tmp_path / "tensorflow.npy", []
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    worker.serve(specs[case] | {"implementation": "tensorflow", "result": str(result)}, answers.append)
    check_answers(answers)
    expected = by_diffusers[case]
    tolerance = 8 / 255 if case == "generation" else 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(np.load(result), expected, rtol=0, atol=tolerance)


def test_engine_is_a_side_of_its_own(specs, tmp_path, monkeypatch):
    """It makes the images of our own programs. Only the cases that call a whole model have it."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import bench as program
    from benchmark import worker

    images = {}
    for name in ("tensorflow", "engine-openvino"):
        result, answers = tmp_path / f"{name}.npy", []
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        spec = specs["generation"] | {"implementation": name, "xla": "on", "result": str(result)}
        worker.serve(spec, answers.append)
        check_answers(answers)
        images[name] = np.load(result)
    assert images["tensorflow"].std() > 0
    np.testing.assert_allclose(images["engine-openvino"], images["tensorflow"], rtol=0, atol=1 / 255)
    names = {
        case: [side["implementation"] for side in program.sides(case, ["tensorflow"], ["on"], program.PEERS)]
        for case in ("unet", "generation")
    }
    assert "engine-openvino" in names["generation"] and "engine-openvino" not in names["unet"]


@pytest.fixture(scope="module")
def sd15_unet():
    """Stable Diffusion 1.5's UNet, of zeros: 1.7 GB."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        with tiny.without_initial_values():
            unet = UNet(UNetConfig())
        return unet
    finally:
        keras.config.set_dtype_policy(policy)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "expected"), [(512, 401.6e9), (256, 90.1e9)])
def test_counted_multiplications_of_stable_diffusion_are_those_of_its_layers(
    size, expected, sd15_unet, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from benchmark import counting

    side, config = size // 8, sd15_unet.config
    inputs = {
        "samples": keras.KerasTensor((1, side, side, 4)),
        "noise": keras.KerasTensor((1, side, side, 4)),
        "timesteps": keras.KerasTensor((1,), "int32"),
        "context": keras.KerasTensor((1, 77, config.cross_attention_dim)),
    }
    objective = DiffusionObjective(sd15_unet, NoiseSchedule(SchedulerConfig()))
    counted = counting.multiplications(objective, inputs)
    assert counted == multiplications_of_unet(config, side, tokens=77)
    assert counted == pytest.approx(expected, rel=1e-3)


def multiplications_of_unet(config, side, tokens):
    """Of one example, layer by layer from the config (Rombach et al., 2022)."""
    widths, context = config.block_out_channels, config.cross_attention_dim
    time = 4 * widths[0]

    def convolution(side, inputs, outputs, window=3):
        return side**2 * window**2 * inputs * outputs

    def resnet(side, inputs, outputs):
        shortcut = convolution(side, inputs, outputs, 1) if inputs != outputs else 0
        return (
            convolution(side, inputs, outputs)
            + convolution(side, outputs, outputs)
            + time * outputs
            + shortcut
        )

    def transformer(side, width):
        positions = side**2
        own = 4 * positions * width**2 + 2 * positions**2 * width
        text = 2 * positions * width**2 + 2 * tokens * context * width + 2 * positions * tokens * width
        feed_forward = (8 + 4) * positions * width**2
        return own + text + feed_forward + 2 * convolution(side, width, width, 1)

    sides = [side // 2**level for level in range(len(widths))]
    total = widths[0] * time + time**2 + convolution(side, config.in_channels, widths[0])
    skipped, inputs = [widths[0]], widths[0]
    for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
        for _ in range(config.layers_per_block):
            total += resnet(side, inputs, width)
            total += transformer(side, width) if "Attn" in config.down_block_types[level] else 0
            skipped.append(inputs := width)
        if level < len(widths) - 1:
            total += convolution(side // 2, width, width)
            skipped.append(width)
    total += 2 * resnet(sides[-1], inputs, inputs) + transformer(sides[-1], inputs)
    for block, (side, width) in enumerate(zip(sides[::-1], widths[::-1], strict=True)):
        for _ in range(config.layers_per_block + 1):
            total += resnet(side, inputs + skipped.pop(), width)
            total += transformer(side, width) if "Attn" in config.up_block_types[block] else 0
            inputs = width
        if block < len(widths) - 1:
            total += convolution(2 * side, width, width)
    return total + convolution(sides[0], inputs, config.out_channels)


COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmark import ours, worker

counts = {}
for spec in json.loads(sys.argv[2]):
    call, count = ours.make(spec, worker.inputs(spec))
    if spec["case"] == "training":
        call()  # what a first step traces is not counted
    counts[spec["case"]] = count()
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def one_level(tmp_path_factory):
    """A folder of a model of one level, as that is counted as one of more is."""
    folder = tmp_path_factory.mktemp("one_level")
    levels = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = dataclasses.replace(tiny.ONE_BLOCK_UNET, **levels, mid_block_type="UNetMidBlock2DCrossAttn")
    tiny.pipeline(unet=unet).save(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_training_is_counted_as_multiples_of_the_forward_pass(backend, specs, one_level):
    cases = ("unet", "training", "training-lora")
    # Without XLA, JAX would compile each operation of the step on its own.
    options = {"implementation": backend, "folder": str(one_level), "xla": {"jax": "on"}.get(backend, "off")}
    own = [specs[case] | options for case in cases]
    counts = json.loads(run_python(["-c", COUNT, ROOT / "tools", json.dumps(own)], backend).splitlines()[-1])
    config = UNetConfig.load(one_level / "unet" / "config.json")
    forward = 2 * multiplications_of_unet(config, side=4, tokens=12)  # two examples
    assert counts["unet"] == forward and counts["training"] == 3 * forward
    # Frozen kernels have no gradient of their own; the updates come beside.
    assert 2 * forward < counts["training-lora"] < 2.5 * forward


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--models", "sd3"), "sd3"),
        (("--cases", "unets"), "unets"),
        (("--size", "100"), "--size 100: no multiple of 64; use 64"),
        (("--backends", ""), "--backends: nothing to measure"),
        (("--output", "bench.txt"), "bench.txt"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, line, run_program, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import bench as program

    code, _, errors = run_program(lambda: run_command(program.bench, "bench.py"), *arguments)
    assert code == 2
    assert line in errors.splitlines()[-1]
