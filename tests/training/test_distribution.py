"""Several devices and processes lose, step by step, what one device loses, and end with its weights."""

import io
import json
import shutil
import socket
import threading

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from keras_sd.errors import UserError
from keras_sd.training import distribution, rendezvous
from tests import tiny
from tests.programs import Program

STEPS = 4
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
RESUMED = ("resumed", "fsdp-on-four")


def start(arguments, flags=""):
    """Starts a program on JAX with these flags for XLA."""
    return Program(arguments, XLA_FLAGS=flags)


def finish(program):
    """What a program printed, once it has succeeded."""
    done = program.finish()
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def free_address():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captioned images of noise, and a tiny pipeline."""
    folder = tmp_path_factory.mktemp("distribution")
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    lines = []
    for index in range(12):
        picture = generator.integers(0, 256, (16, 16, 3), dtype="uint8")
        Image.fromarray(picture).save(folder / "images" / f"{index}.png")
        text = tiny.TEXTS[index % len(tiny.TEXTS)]
        lines.append(json.dumps({"file_name": f"{index}.png", "text": text}) + "\n")
    (folder / "images" / "metadata.jsonl").write_text("".join(lines))
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


def train(folder, output, *options, flags=""):
    """Starts `text-to-image` with all of its UNet trained, on batches of four."""
    arguments = ["-m", "keras_sd.train", "text-to-image", "--output-dir", folder / output]
    arguments += ["--pretrained-model-name-or-path", folder / "model"]
    arguments += ["--train-data-dir", folder / "images"]
    arguments += ["--max-train-steps", STEPS, "--train-batch-size", 4, "--checkpointing-steps", STEPS // 2]
    arguments += ["--learning-rate", 1e-3, "--lr-warmup-steps", 1, "--evaluation-steps", STEPS]
    arguments += ["--kid-images", 0, "--num-inference-steps", 1, "--validation-prompts", "red heart"]
    arguments += ["--validation-steps", STEPS // 2, "--validation-examples", 6, "--validation-split", 0.25]
    arguments += ["--post-hoc-ema"]
    return start([*arguments, *options], flags)


def processes(address, *own):
    """The flags of one of two processes."""
    return ("--distribution", "auto", "--coordinator", address, "--num-processes", 2, "--process-id", *own)


@pytest.fixture(scope="module")
def runs(folder):
    """The same training on one device, on two and in two processes; two at a time, as there are two cores.

    Those on one device and model-parallel keep encodings in memory, the two processes fill one folder, and
    the two devices encode while a step runs.
    """
    one, two = (
        train(folder, "one"),
        train(folder, "two", "--distribution", "data", "--cache-latents", "off", flags=TWO_DEVICES),
    )
    finish(one), finish(two)
    shutil.copytree(
        folder / "two" / f"checkpoint-{STEPS // 2}", folder / "resumed" / f"checkpoint-{STEPS // 2}"
    )
    address = free_address()
    disk = ("--cache-latents", "disk", "--cache-dir", folder / "encodings")
    pair = [train(folder, "processes", *processes(address, index), *disk) for index in range(2)]
    told = [finish(process)[1] for process in pair]
    # Process 0 alone has a progress line.
    assert [f"step {STEPS}/{STEPS}" in errors for errors in told] == [True, False]
    model, resumed = (
        train(folder, "model-parallel", "--distribution", "model", flags=TWO_DEVICES),
        train(folder, "resumed", "--resume-from-checkpoint", "latest"),
    )
    finish(model), finish(resumed)
    # Fully sharded on two devices, the same resumed on four.
    sharded = train(folder, "fsdp", "--distribution", "fsdp", flags=TWO_DEVICES)
    finish(sharded)
    half = f"checkpoint-{STEPS // 2}"
    shutil.copytree(folder / "fsdp" / half, folder / "fsdp-on-four" / half)
    more = ("--distribution", "fsdp", "--resume-from-checkpoint", "latest")
    finish(train(folder, "fsdp-on-four", *more, flags=FOUR_DEVICES))
    return folder


def test_two_processes_fill_one_folder_with_what_one_writes(runs, tmp_path):
    disk = ("--cache-latents", "disk", "--cache-dir", tmp_path)
    finish(train(runs, "on-disk", *disk))
    written = [
        {path.name: path.read_bytes() for path in folder.glob("*.arrayrecord")}
        for folder in (tmp_path, runs / "encodings")
    ]
    assert written[0] == written[1] and sorted(name[:4] for name in written[0]) == ["late", "text"]


def losses(folder):
    records = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def validated(folder):
    """The figures of the validation loss, which has two sets, by step."""
    records = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    found = {
        record["step"]: {name: value for name, value in record.items() if name.startswith("validation")}
        for record in records
        if "validation_loss_held_out_ema" in record
    }
    assert all("validation_loss_train_raw_standard_error" in figures for figures in found.values())
    return found


def largest_difference(folder, other, group):
    """Of all tensors, each relative to its largest number."""
    ours, theirs = (
        load_file(path / f"checkpoint-{STEPS}" / f"{group}.safetensors") for path in (folder, other)
    )
    assert ours.keys() == theirs.keys()
    return max(
        np.abs(ours[name] - theirs[name]).max() / max(np.abs(ours[name]).max(), 1e-9)
        for name in ours
        if ours[name].dtype == "float32"
    )


@pytest.mark.parametrize("output", ["two", "processes", "model-parallel", "resumed", "fsdp", "fsdp-on-four"])
def test_losses_and_weights_are_those_of_one_device(runs, output):
    expected, found = losses(runs / "one"), losses(runs / output)
    assert sorted(expected) == [1, 2, 3, 4]
    assert sorted(found) == ([3, 4] if output in RESUMED else [1, 2, 3, 4])
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    for group in ("weights", "ema", "post_hoc_0.05", "post_hoc_0.1"):
        assert largest_difference(runs / "one", runs / output, group) < 1e-4
    assert (runs / output / "post-hoc-ema" / f"checkpoint-{STEPS}" / "post_hoc_0.1.safetensors").is_file()
    expected, found = validated(runs / "one"), validated(runs / output)
    assert sorted(expected) == [0, 2, 4] and sorted(found) == ([2, 4] if output in RESUMED else [0, 2, 4])
    for step, figures in found.items():
        assert figures == pytest.approx(expected[step], rel=1e-3)
    sample = f"samples/step-{STEPS:06}.png"
    pictures = [np.asarray(Image.open(runs / name / sample)).astype(int) for name in ("one", output)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert (runs / output / "model" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_loss_curve_does_not_depend_on_the_number_of_devices(folder):
    """The same eight images a step on 1, 2, 4 and 8 devices, and in two processes of two devices each."""
    more = ("--train-batch-size", 8, "--max-train-steps", 8)
    one = train(folder, "curve-1", *more)
    finish(one)
    for devices in (2, 4, 8):
        flags = f"--xla_force_host_platform_device_count={devices}"
        finish(train(folder, f"curve-{devices}", *more, "--distribution", "data", flags=flags))
    address = free_address()
    pair = [
        train(folder, "curve-processes", *more, *processes(address, index), flags=TWO_DEVICES)
        for index in range(2)
    ]
    for process in pair:
        finish(process)
    expected = losses(folder / "curve-1")
    assert len(expected) == 8
    for name in (2, 4, 8, "processes"):
        assert losses(folder / f"curve-{name}") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_processes_draw_class_images_into_one_folder(folder):
    """Each image is whole, and as one process draws it, also where some are there already."""
    (folder / "subject").mkdir()
    for index in range(2):
        shutil.copy(folder / "images" / f"{index}.png", folder / "subject")
    arguments = ["-m", "keras_sd.train", "dreambooth", "--instance-data-dir", folder / "subject"]
    arguments += ["--pretrained-model-name-or-path", folder / "model", "--instance-prompt", "a sks heart"]
    arguments += ["--with-prior-preservation", "--class-prompt", "a heart", "--num-class-images", 6]
    arguments += ["--max-train-steps", 1, "--train-batch-size", 2, "--num-inference-steps", 1]
    arguments += ["--evaluation-steps", 9, "--checkpointing-steps", 9]

    def pictures(output):
        return {path.name: path.read_bytes() for path in (folder / output / "class-images").iterdir()}

    finish(start([*arguments, "--output-dir", folder / "alone"]))
    alone = pictures("alone")
    assert list(sorted(alone)) == [f"class-{index:05}.png" for index in range(6)]
    # As after a kill.
    (folder / "both" / "class-images").mkdir(parents=True)
    (folder / "both" / "class-images" / "class-00002.png").write_bytes(alone["class-00002.png"])
    address = free_address()
    pair = [
        start([*arguments, "--output-dir", folder / "both", *processes(address, index)]) for index in range(2)
    ]
    told = [finish(process)[1] for process in pair]
    assert ["class images" in errors for errors in told] == [True, False]
    both = pictures("both")
    assert both.keys() == alone.keys()
    for name in both:
        drawn, expected = (np.asarray(Image.open(io.BytesIO(one[name]))).astype(int) for one in (both, alone))
        assert np.abs(drawn - expected).max() <= 1


def test_a_process_under_slurm_has_all_devices_of_its_node():
    """JAX would take one for each task, though it is told of the processes."""
    code = f"""if True:
        import jax
        from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
        from keras_sd.training import distribution
        distribution.start("auto", 2, coordinator="{free_address()}", num_processes=1, process_id=0)
        print(CUDA_VISIBLE_DEVICES.value, jax.distributed.is_initialized())
    """
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    output, _ = finish(Program(["-c", code], XLA_FLAGS=TWO_DEVICES, **slurm))
    assert output == "all True\n"


def test_every_device_holds_a_part_of_split_weights():
    """Kernels are split as Megatron-LM's, by outputs and then by inputs; moments like their weights."""
    code = """if True:
        import dataclasses
        import numpy as np
        from keras_sd import backend
        from keras_sd.errors import UserError
        from keras_sd.training import distribution
        from keras_sd.training.optimizers import AdamW
        from keras_sd.models.unet import UNet
        from keras_sd.models.parameters import parameter_paths
        from tests import tiny

        def told(function, *arguments, **options):
            try:
                function(*arguments, **options)
            except UserError as error:
                print(error)

        distribution.start("model", 1)
        unet = UNet(tiny.SD2_UNET)
        distribution.split_weights(unet)
        optimizer = AdamW(1e-3)
        optimizer.build(unet.trainable_variables)
        layer = unet.down_blocks[1].attentions[0].transformer_blocks[0]
        for variable, part in (
            (layer.attn2.to_k.kernel, (16, 4)),
            (layer.attn2.to_out[0].kernel, (4, 16)),
            (layer.attn2.to_out[0].bias, (16,)),
            (layer.ff.net[0].proj.bias, (32,)),
            (layer.ff.net[2].kernel, (16, 16)),
            (unet.conv_in.kernel, (3, 3, 4, 8)),
        ):
            index = [v is variable for v in unet.trainable_variables].index(True)
            for value in (variable.value, optimizer.ema_variables[index].value):
                assert len(value.addressable_shards) == 4
                assert all(shard.data.shape == part for shard in value.addressable_shards), part
        kernel = layer.attn2.to_k.kernel
        shards = kernel.value.addressable_shards
        assert {shard.index[1].start for shard in shards} == {0, 4, 8, 12}
        for shard in shards:
            np.testing.assert_array_equal(backend.to_numpy(kernel)[shard.index], shard.data)
        told(distribution.split_weights, UNet(tiny.PIXEL_UNET))
        narrow = dataclasses.replace(tiny.SD1_UNET, block_out_channels=(6, 6), norm_num_groups=2)
        told(distribution.split_weights, UNet(narrow))
    """
    output, _ = finish(start(["-c", code], "--xla_force_host_platform_device_count=4"))
    told = output.splitlines()
    assert len(told) == 2
    assert "no attention" in told[0]
    assert "6 features" in told[1] and "4 devices" in told[1]


@pytest.mark.parametrize(
    ("kind", "processes", "told"),
    [
        ("auto", {}, "KERAS_BACKEND=jax"),
        (None, {"coordinator": "127.0.0.1:1"}, "coordinator: belongs"),
        (None, {"process_id": 0}, "process_id: belongs"),
        ("data", {"coordinator": "127.0.0.1:1"}, "`num_processes` is missing"),
        ("data", {"coordinator": "here:1", "num_processes": 2, "process_id": 2}, "from 0 to 1"),
        ("data", {"coordinator": "here:1", "num_processes": 0, "process_id": 0}, "use a whole number from 1"),
        ("data", {"coordinator": "here", "num_processes": 2, "process_id": 0}, "give HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(kind, processes, told):
    with pytest.raises(UserError, match=told):
        distribution.start(kind, 4, **processes)


def test_bad_devices_and_hosts_are_one_line_and_exit_code_2(folder):
    """Nothing is written, and nothing long is done before."""
    unreachable = processes(free_address(), 1)
    cases = [
        (("--distribution", "data"), "", "one device was found, cpu:0"),
        ((*unreachable, "--coordinator-timeout", 1), "", "cannot be reached within 1 s"),
        (("--distribution", "auto", "--train-batch-size", 3), TWO_DEVICES, "give a multiple of 2"),
    ]
    started = [train(folder, "refused", *options, flags=flags) for options, flags, _ in cases]
    for program, (_, _, told) in zip(started, cases, strict=True):
        done = program.finish()
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        # Lines on the options and on what is held out come first.
        assert lines[-1].startswith("python -m keras_sd.train: error: ") and told in lines[-1], done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("text", ["localhost", "localhost:", ":8000", "localhost:port", "localhost:70000"])
def test_addresses_that_are_none(text):
    with pytest.raises(UserError, match="give HOST:PORT"):
        rendezvous.parse_address(text)


def meet_all(arguments):
    """What each of several meetings ended with, all held at the same time: None, or the error's line."""
    results = [None] * len(arguments)

    def meet(place):
        try:
            rendezvous.meet(*arguments[place])
        except UserError as error:
            results[place] = str(error)

    threads = [threading.Thread(target=meet, args=(place,)) for place in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_meet():
    address = rendezvous.parse_address(free_address())
    assert meet_all([(address, 3, index, 10) for index in (2, 0, 1)]) == [None] * 3


def test_processes_that_do_not_meet_are_told_why():
    address = rendezvous.parse_address(free_address())
    first, second = meet_all([(address, 3, 0, 1), (address, 3, 2, 2)])
    assert "process 1 did not connect within 1 s" in first
    assert "not all processes connected" in second
    twice = meet_all([(address, 3, 0, 1), (address, 3, 2, 2), (address, 3, 2, 2)])
    assert "process 1 did not connect" in twice[0]
    assert sum("process_id 2: taken" in line for line in twice[1:]) == 1
    fewer = meet_all([(address, 2, 0, 1), (address, 3, 1, 2)])
    assert "process 1 did not connect" in fewer[0]
    assert "started with 2" in fewer[1]
    with socket.create_server(("", address[1])), pytest.raises(UserError, match="use another port"):
        rendezvous.meet(address, 2, 0, 1)


def test_fsdp_holds_a_share_of_weights_moments_and_averages():
    """And the compiler counts what they take, to the byte."""
    code = """if True:
        import jax, keras, numpy as np
        from keras_sd import backend
        from keras_sd import presets
        from keras_sd.config import UNetConfig
        from keras_sd.diffusion.schedules import NoiseSchedule
        from keras_sd.models.unet import UNet
        from keras_sd.training import architectures, distribution
        from keras_sd.training.objectives import DiffusionObjective
        from keras_sd.training.optimizers import AdamW
        from tests import tiny

        distribution.start("fsdp", 8)

        def objective_of(config):
            schedule = NoiseSchedule(architectures.PIXEL_SCHEDULER)
            objective = DiffusionObjective(UNet(config), schedule)
            distribution.split_weights(objective)
            objective.compile(optimizer=AdamW(1e-3))
            objective.optimizer.build(objective.trainable_variables)
            values = [one.value for one in (*objective.variables, *objective.optimizer.variables)]
            held = sum(value.addressable_shards[0].data.nbytes for value in values)
            return objective, held, sum(value.nbytes for value in values)

        _, held, whole = objective_of(UNetConfig.load(presets.find("emoji") / "unet" / "config.json"))
        print(held, whole)
        objective, held, whole = objective_of(tiny.SD1_UNET)
        told = []
        objective.on_compiled = told.append
        side, width = 8, tiny.SD1_UNET.cross_attention_dim
        batch = {
            "samples": np.ones((8, side, side, 4), "float32"),
            "noise": np.zeros((8, side, side, 4), "float32"),
            "timesteps": np.zeros(8, "int32"),
            "context": np.ones((8, 5, width), "float32"),
        }
        objective.fit(batch, batch_size=8, shuffle=False, verbose=0)
        (memory,) = told
        of_batch = sum(array.nbytes for array in batch.values()) // 8
        metrics = sum(variable.value.nbytes for variable in objective.metrics_variables)
        print(held, memory.arguments - of_batch - metrics)
    """
    output, _ = finish(start(["-c", code], "--xla_force_host_platform_device_count=8"))
    held, whole, of_tiny, counted = map(int, output.split())
    assert held < whole * 1.1 / 8  # of emoji, the bundled model
    assert abs(counted - of_tiny) <= 64  # the compiler leaves out what the step does not read
