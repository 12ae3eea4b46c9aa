"""Less memory for the same numbers, and one line where it is not enough."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_sd.config import UNetConfig
from keras_sd.diffusion.scheduler_config import SchedulerConfig
from keras_sd.diffusion.schedules import NoiseSchedule
from keras_sd.errors import UserError
from keras_sd.models.gradient_checkpointing import enable_gradient_checkpointing, recomputing_layers
from keras_sd.models.parameters import parameter_paths
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.models.unet import UNet
from keras_sd.models.vae import AutoencoderKL
from keras_sd.training.autoencoder_objective import AutoencoderObjective
from keras_sd.training.objectives import DiffusionObjective
from keras_sd.training.trainer import Settings, Trainer
from tests import tiny
from tests.programs import run_python
from tests.training.test_trainer import assert_same_state, losses, state, train

TOKENS = tiny.tokenizer()
# One level with attention, as nearly all of the time of these tests is tracing.
UNET = UNetConfig(
    sample_size=4,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def objective():
    """A UNet and a text encoder that are trained together."""
    text_encoder = tiny.randomize(TextEncoder(tiny.text_encoder_config(TOKENS)), 1, 0.3)
    return DiffusionObjective(
        tiny.randomize(UNet(UNET), 2, 0.2), NoiseSchedule(SchedulerConfig()), text_encoder=text_encoder
    )


def settings(folder, **options):
    return Settings(output_dir=folder, **{"jit_compile": False, "train_batch_size": 2, **options})


def loss_and_gradients(objective):
    generator = np.random.default_rng(0)
    batch = {
        "samples": generator.standard_normal((2, 4, 4, 4), dtype="float32"),
        "noise": generator.standard_normal((2, 4, 4, 4), dtype="float32"),
        "timesteps": np.array([10, 700], "int32"),
        "token_ids": TOKENS(["red heart", "a grinning face"]),
    }

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(objective(batch))
        variables = [variable.value for variable in objective.trainable_variables]
        return loss, [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]

    loss, gradients = step()
    return float(loss), [gradient.numpy() for gradient in gradients]


def test_recomputed_gradients_are_the_same(objective):
    names = [parameter.name for parameter in parameter_paths(objective)]
    loss, expected = loss_and_gradients(objective)
    assert len(recomputing_layers(objective)) == 4  # three blocks of the UNet, the text transformer
    enable_gradient_checkpointing(objective)
    try:
        recomputed_loss, gradients = loss_and_gradients(objective)
    finally:
        enable_gradient_checkpointing(objective, False)
    assert [parameter.name for parameter in parameter_paths(objective)] == names
    assert recomputed_loss == pytest.approx(loss, rel=1e-6)
    largest = max(np.abs(gradient).max() for gradient in expected)
    for variable, left, right in zip(objective.trainable_variables, gradients, expected, strict=True):
        assert np.abs(right).max() > 0 or "position" in variable.path, variable.path
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6 * largest, err_msg=variable.path)


def test_offloaded_average_resumes_to_the_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, offload_ema=True)
    assert not train(parts, stop_at=3, offload_ema=True)
    assert train(parts, resume_from_checkpoint="latest", offload_ema=True)
    assert_same_state(state(whole), state(parts))
    assert losses(whole) == losses(parts)


def test_checkpoint_of_offloaded_averages_is_resumed_on_the_device(objective, tmp_path):
    trainer = Trainer(objective, settings(tmp_path, offload_ema=True), {})
    for number, average in enumerate(trainer.ema.averages):
        average += number / 7
    trainer.checkpoints.save(1, *trainer.gather_state())
    resumed = Trainer(objective, settings(tmp_path, resume_from_checkpoint="latest"), {})
    for variable, average in zip(resumed.optimizer.ema_variables, trainer.ema.averages, strict=True):
        np.testing.assert_array_equal(variable.numpy(), average)


def test_trainer_has_the_blocks_recomputed(objective, tmp_path):
    try:
        Trainer(objective, settings(tmp_path, gradient_checkpointing=True), {})
        assert all(layer.recomputes for layer in recomputing_layers(objective))
    finally:
        enable_gradient_checkpointing(objective, False)


def test_model_without_blocks_to_recompute_is_refused(tmp_path):
    autoencoder = AutoencoderObjective(AutoencoderKL(tiny.VAE))
    with pytest.raises(UserError, match="gradient_checkpointing.*leave it out"):
        Trainer(autoencoder, settings(tmp_path, gradient_checkpointing=True), {})


MEASURE = """if True:
    import json
    import jax, keras, numpy as np
    from keras_sd.config import UNetConfig
    from keras_sd.diffusion.scheduler_config import SchedulerConfig
    from keras_sd.diffusion.schedules import NoiseSchedule
    from keras_sd.models.gradient_checkpointing import enable_gradient_checkpointing
    from keras_sd.models.unet import UNet
    from keras_sd.training.objectives import DiffusionObjective

    config = UNetConfig(
        sample_size=16, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=2,
    )
    objective = DiffusionObjective(UNet(config), NoiseSchedule(SchedulerConfig()))
    objective.built = True
    shapes = {"samples": (16, 16, 4), "noise": (16, 16, 4), "timesteps": (), "context": (12, 16)}
    values = [np.random.default_rng(1).normal(0, 0.1, v.shape).astype("float32") for v in objective.weights]
    batch = {name: np.random.default_rng(2).normal(size=(8, *shape)) for name, shape in shapes.items()}
    kinds = {name: "int32" if name == "timesteps" else "float32" for name in shapes}
    batch = {name: array.astype(kinds[name]) for name, array in batch.items()}

    def loss(values, batch):
        return objective.stateless_call(values, [], batch)[0].mean()

    found = {"temporaries": []}
    gradients = []
    for recomputes in (False, True):
        enable_gradient_checkpointing(objective, recomputes)
        program = jax.jit(jax.value_and_grad(loss)).lower(values, batch).compile()
        found["temporaries"].append(program.memory_analysis().temp_size_in_bytes)
        gradients.append([np.ravel(array) for array in jax.tree.leaves(program(values, batch))])
    kept, recomputed = (np.concatenate(arrays) for arrays in gradients)
    found["error"] = float(np.abs(kept - recomputed).max() / np.abs(kept).max())
    print(json.dumps(found))
"""


def test_recomputing_takes_less_of_what_xla_allocates_under_jax():
    found = json.loads(run_python(["-c", MEASURE]).splitlines()[-1])
    assert found["error"] < 1e-6
    kept, recomputed = found["temporaries"]
    assert recomputed < 0.7 * kept


# A step that asks XLA at once for more memory than any machine has: 2 ** 48 numbers. As a program of its own:
# what TensorFlow frees twice after that would abort the process of the tests.
HUGE = """if True:
    import click, keras, numpy as np
    from keras import ops
    from keras_sd.cli.program import run_command
    from keras_sd.data.framing import Framing
    from keras_sd.training.objectives import Objective
    from keras_sd.training.trainer import Settings, Trainer

    class HugeObjective(Objective):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2**12)
            self.dense.build((None, 4))
            self.built = True

        def call(self, batch):
            features = ops.reshape(self.dense(batch["x"]), (-1, 1))
            products = ops.exp(-ops.square(features - ops.transpose(features)))
            return ops.sum(products @ products, axis=-1)

    class Source(list):
        framing = Framing(512, aspect_ratio_buckets=9)  # what it says of its images

    @click.command()
    @click.argument("folder")
    def train(folder):
        trainer = Trainer(HugeObjective(), Settings(folder, max_train_steps=1, train_batch_size=2**12), {})
        trainer.run(Source([{"x": np.ones(4, "float32")}]), lambda example, generator: example)

    raise SystemExit(run_command(train, "train"))
"""


def test_step_without_enough_memory_names_the_arguments_that_help(tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-c", HUGE, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stderr.splitlines()[-1] == (
        "train: error: training: out of memory; use `mixed_precision='bf16'`, or "
        "`train_batch_size=2048` `gradient_accumulation_steps=2`, or a `resolution` below 512"
    )
    assert done.returncode == 2


def test_arguments_that_are_on_already_are_not_named(objective, tmp_path):
    try:
        on = {"gradient_checkpointing": True, "mixed_precision": "bf16", "offload_ema": True}
        trainer = Trainer(objective, settings(tmp_path, train_batch_size=1, **on), {})
        with pytest.raises(UserError, match="out of memory; use a smaller model"):
            with trainer._with_memory_advice():
                np.ones(2**47)
    finally:
        enable_gradient_checkpointing(objective, False)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_command_without_enough_memory_ends_in_one_line(tmp_path, backend):
    """The largest image that may be asked for, with 16 GiB of addresses, which its features exceed."""
    size = ("--height", 2**14, "--width", 2**14)
    arguments = ["-m", "keras_sd", "generate", "red heart", *size, "--output", tmp_path / "image.png"]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)),
    )
    assert done.returncode == 2, done.stderr[-3000:]
    told = "keras-sd: error: out of memory; use half precision (--dtype bfloat16, in training --mixed-"
    assert done.stderr.splitlines()[-1].startswith(told), done.stderr
    assert "Traceback" not in done.stderr
