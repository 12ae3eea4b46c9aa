"""The options of the training commands: bad ones are told in one line, before a backend is loaded."""

import json
import os
import subprocess
import sys

import click
import pytest
from PIL import Image

from keras_sd.cli.program import run_command
from keras_sd.cli.train.main import train

SUBJECT = ("--instance-data-dir", "images", "--instance-prompt", "a sks toy")

# Method, options, and what the line must name.
BAD = [
    ("lora", ["--snr-gamma", "0"], "--snr-gamma"),
    ("text-to-image", ["--snr-gamma", "nan"], "--snr-gamma"),
    ("dreambooth", [*SUBJECT, "--snr-gamma", "-1"], "--snr-gamma"),
    ("lora", ["--lora-alpha", "0"], "--lora-alpha"),
    ("lcm", ["--lora-alpha", "-4"], "--lora-alpha"),
    ("dreambooth", [*SUBJECT, "--lora", "--lora-alpha", "0"], "--lora-alpha"),
    ("lora", ["--guidance-scale", "nan"], "--guidance-scale"),
    ("lcm", ["--guidance-scale", "inf"], "--guidance-scale"),
    ("lora", ["--learning-rate", "-1"], "--learning-rate"),
    ("vae", ["--learning-rate", "0"], "--learning-rate"),
    ("clip", ["--learning-rate", "nan"], "--learning-rate"),
    ("ddim", ["--max-grad-norm", "-1"], "--max-grad-norm"),
    ("lora", ["--lr-warmup-steps", "-5"], "--lr-warmup-steps"),
    ("lora", ["--lr-warmup-steps", "9", "--max-train-steps", "8"], "--lr-warmup-steps 9: more than the 8"),
    ("lora", ["--adam-beta2", "1"], "--adam-beta2"),
    ("lora", ["--adam-epsilon", "0"], "--adam-epsilon"),
    ("lora", ["--adam-weight-decay", "-0.1"], "--adam-weight-decay"),
    ("lora", ["--ema-decay", "1"], "--ema-decay"),
    ("lora", ["--optimizer", "sgd"], "--optimizer"),
    (
        "lora",
        ["--optimizer", "lion", "--adam-beta1", "0.9"],
        "--adam-beta1: has no effect with --optimizer lion",
    ),
    ("ddim", ["--optimizer-type", "Adafactor", "--prodigy-d0", "1"], "with --optimizer adafactor"),
    (
        "vae",
        ["--use-8bit-adam", "--lion-beta1", "0.9"],
        "--lion-beta1: has no effect with --optimizer adamw8bit",
    ),
    ("lora", ["--use-8bit-adam", "--optimizer", "Lion"], "--use-8bit-adam: not with --optimizer lion"),
    ("lora", ["--use-8bit-adam", "--optimizer", "adamw"], "--use-8bit-adam: not with --optimizer adamw"),
    ("lora", ["--learning-rate", "1e30"], "--learning-rate"),
    ("lora", ["--no-prodigy-decouple"], "--prodigy-decouple: has no effect with --optimizer adamw"),
    (
        "lora",
        ["--optimizer", "adafactor", "--adafactor-relative-step", "--lr-scheduler", "linear"],
        "--lr-scheduler: has no effect with --adafactor-relative-step",
    ),
    (
        "lora",
        ["--optimizer", "adafactor", "--adafactor-warmup-init"],
        "--adafactor-warmup-init: has no effect without --adafactor-relative-step",
    ),
    ("text-to-image", ["--text-encoder-lr", "1e-5"], "--text-encoder-lr: has no effect without --train-text"),
    ("lora", ["--train-text-encoder", "--text-encoder-lr", "0"], "--text-encoder-lr"),
    ("vae", ["--dim_from_weights"], "--dim-from-weights: this method trains no LoRA; leave it out"),
    ("lcm", ["--train-text-encoder"], "--train-text-encoder: this method does not train the text encoder"),
    ("lora", ["--learning-rate-by-block", "mid_block"], "--learning-rate-by-block: 'mid_block' is no NAME="),
    (
        "text-to-image",
        ["--from-scratch", "--learning-rate-by-block", "mid_block=0"],
        "--learning-rate-by-block: has no effect with --from-scratch",
    ),
    (
        "text-to-image",
        [
            "--train-data-dir",
            "images",
            "--pretrained-model-name-or-path",
            "zero-snr",
            "--rescale-betas-zero-snr",
        ],
        "--rescale-betas-zero-snr: cannot be learned by a model that predicts epsilon",
    ),
    (
        "dreambooth",
        [*SUBJECT, "--lora", "--zero-terminal-snr"],
        "--rescale-betas-zero-snr: has no effect on a LoRA, whose file has no noise schedule",
    ),
    ("lora", ["--zero-terminal-snr"], "--zero-terminal-snr: the result holds no noise schedule; set"),
    ("text-to-image", ["--alignment-weight", "-1"], "--alignment-weight"),
    ("text-to-image", ["--alignment-model", "emoji"], "--alignment-model: has no effect without"),
    ("text-to-image", ["--alignment-weight", "0.5", "--alignment-model", "nope"], "'nope': no such model"),
    (
        "text-to-image",
        ["--alignment-weight", "0.5", "--pretrained-model-name-or-path", "model"],
        "--alignment-weight 0.5: model has no image encoder; name a CLIP",
    ),
    (
        "text-to-image",
        ["--alignment-weight", "0.5", "--cache-latents", "disk"],
        "--cache-latents disk: the targets of an alignment are not kept on disk",
    ),
    ("lora", ["--optimizer", "prodigy", "--prodigy-growth-rate", "0.5"], "--prodigy-growth-rate"),
    ("lora", ["--proportion-empty-prompts", "5"], "--proportion-empty-prompts"),
    ("lora", ["--noise-offset", "-1"], "--noise-offset"),
    ("lora", ["--num-inference-steps", "0"], "--num-inference-steps"),
    ("lora", ["--num-inference-steps", "5000"], "1000 timesteps"),
    ("lcm", ["--num-inference-steps", "1001"], "1000 timesteps"),
    ("ddim", ["--num-inference-steps", "5000"], "1000 timesteps"),
    ("super-resolution", ["--num-inference-steps", "5000"], "1000 timesteps"),
    ("lora", ["--kid-images", "2"], "--kid-images"),
    ("lora", ["--coordinator-timeout", "5"], "--coordinator-timeout: has no effect without --coordinator"),
    ("lora", ["--num-processes", "2"], "--num-processes: belongs to several processes"),
    (
        "textual-inversion",
        ["--placeholder-token", "a b", "--train-data-dir", "images"],
        "'a b'",
    ),
    ("lora", ["--train-batch-size", "0"], "--train-batch-size"),
    ("lora", ["--max-train-steps", "0"], "--max-train-steps"),
    ("lora", ["--seed", "-1"], "--seed"),
    ("lora", ["--checkpoints-total-limit", "0"], "--checkpoints-total-limit"),
    ("lora", ["--evaluation-steps", "-1"], "--evaluation-steps"),
    ("lora", ["--train-data-dir", "nope"], "nope"),
    ("lora", ["--train-data-dir", "emoji"], "emoji: no such folder"),
    ("lora", ["--dataset-name", "No such/set"], "No such/set"),
    ("lora", ["--train-data-dir", "images", "--dataset-name", "emoji"], "--dataset-name"),
    ("lora", ["--pretrained-model-name-or-path", "model"], "--train-data-dir: missing"),
    ("lora", ["--train-data-dir", "images", "--pretrained-model-name-or-path", "nope"], "nope"),
    ("lora", ["--output-dir", "file"], "file"),
    ("lora", ["--output-dir", "used"], "checkpoint"),
    ("lora", ["--output-dir", "new", "--resume-from-checkpoint", "latest"], "new"),
    ("textual-inversion", ["--placeholder-token", "<a>"], "--train-data-dir"),
    # Zero terminal SNR leaves nothing of a sample at the last timestep, which only epsilon cannot learn.
    ("lora", ["--train-data-dir", "images", "--pretrained-model-name-or-path", "zero-snr"], "epsilon"),
    ("text-to-image", ["--dataset-name", "emoji", "--pretrained-model-name-or-path", "zero-snr"], "epsilon"),
    # Options of noise and loss, before data is read and a run's folder is made.
    ("lora", ["--snr-gamma", "5", "--debiased-estimation"], "--snr-gamma 5.0: --debiased-estimation"),
    ("lora", ["--multires-noise-discount", "0.3"], "has no effect without --multires-noise-iterations"),
    ("ddim", ["--log-sigma-mean", "1"], "--log-sigma-mean 1.0: has no effect"),
    ("lora", ["--cache-latents", "disk", "--cache-dir", "file"], "--cache-dir file: not a folder"),
    # Options without an effect.
    ("text-to-image", ["--unet-config", "unet.json"], "--unet-config: has no effect"),
    ("lcm", ["--loss-type", "l2", "--huber-c", "0.1"], "--huber-c: has no effect"),
    ("dreambooth", [*SUBJECT, "--rank", "4"], "--rank: has no effect"),
    ("dreambooth", [*SUBJECT, "--lora-alpha", "4"], "--lora-alpha: has no effect"),
    ("dreambooth", [*SUBJECT, "--class-prompt", "a toy"], "--class-prompt: has no effect"),
    ("dreambooth", [*SUBJECT, "--num-class-images", "4"], "--num-class-images: has no effect"),
    ("dreambooth", [*SUBJECT, "--prior-loss-weight", "2"], "--prior-loss-weight: has no effect"),
    ("vae", ["--pretrained-vae", "model", "--vae-config", "vae.json"], "--vae-config: has no effect"),
    (
        "vae",
        ["--pretrained-vae", "model", "--decoder-only", "--kl-weight", "1"],
        "--kl-weight: has no effect",
    ),
    ("clip", ["--frozen-text-encoder", "model", "--tokenizer", "words"], "--tokenizer: has no effect"),
    ("ddim", ["--kid-images", "0", "--kid", "kid_inception"], "--kid: has no effect"),
    (
        "lora",
        ["--inception-weights", "file"],
        "--inception-weights: has no effect without --kid kid_inception",
    ),
    (
        "lcm",
        ["--kid", "kid_inception_imagenet", "--inception-weights", "file"],
        "without --kid kid_inception",
    ),
    ("ddim", ["--kid", "kid_inception", "--inception-weights", "nope"], "nope: no such file"),
    ("lora", ["--evaluation-steps", "0", "--kid-images", "8"], "--kid-images: has no effect"),
    ("lora", ["--evaluation-steps", "0", "--guidance-scale", "2"], "--guidance-scale: has no effect"),
    ("lcm", ["--evaluation-steps", "0", "--validation-prompts", "a"], "--validation-prompts: has no"),
    # A shell's variable that was never set.
    ("lora", ["--train-data-dir", ""], "--train-data-dir: empty"),
    ("lora", ["--output-dir", " "], "--output-dir: empty"),
    ("lora", ["--resume-from-checkpoint", ""], "--resume-from-checkpoint: empty"),
    ("lora", ["--pretrained-model-name-or-path", ""], "--pretrained-model-name-or-path: empty"),
    ("dreambooth", ["--instance-data-dir", "", "--instance-prompt", "a toy"], "--instance-data-dir: empty"),
    ("dreambooth", ["--instance-data-dir", "images", "--instance-prompt", ""], "--instance-prompt: empty"),
    ("textual-inversion", ["--placeholder-token", "", "--train-data-dir", "images"], "empty"),
    # Numbers that no run has, or that are infinite or zero in float32.
    ("lora", ["--max-train-steps", "9" * 400], "--max-train-steps"),
    ("lora", ["--rank", "100000000000"], "--rank"),
    ("lora", ["--learning-rate", "1e308"], "is not in the range"),
    ("lora", ["--adam-epsilon", "1e-320"], "float32"),
    ("lora", ["--noise-offset", "1e300"], "float32"),
    ("textual-inversion", ["--placeholder-token", "<a>", "--num-vectors", "100000"], "--num-vectors"),
    # Files that are not there.
    ("text-to-image", ["--from-scratch", "--unet-config", "nope.json"], "nope.json"),
    ("text-to-image", ["--pretrained-vae", "nope"], "'nope': no such model"),
    ("text-to-image", ["--pretrained-vae", "emoji-upscaler"], "holds unet, not the vae"),
    ("text-to-image", ["--pretrained-clip", "emoji-upscaler"], "holds unet, not the text_encoder"),
    ("clip", ["--frozen-text-encoder", "emoji-upscaler"], "holds unet, not the text_encoder"),
    ("vae", ["--vae-config", "nope.json"], "nope.json"),
    ("clip", ["--tokenizer", "nope"], "nope"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, one of a model whose schedule cannot be learned, and used run folders."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "images").mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32)).save(folder / "images" / f"{index}.png")
        (folder / "images" / f"{index}.txt").write_text("a square")
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    for name in ("model", "zero-snr"):
        (folder / name / "scheduler").mkdir(parents=True)
    (folder / "zero-snr" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "used" / "checkpoint-5").mkdir(parents=True)
    for name in ("file", "unet.json", "vae.json", "words"):
        (folder / name).write_text("")
    return folder


@pytest.fixture(scope="module")
def told(folder):
    """(exit code, error lines) of each bad command in one process, and the modules that they loaded."""
    code = f"""if True:
        import contextlib, io, json, sys
        from keras_sd.cli.program import run_command
        from keras_sd.cli.train.main import train
        results = []
        for method, options, _ in {BAD!r}:
            sys.argv = ["train", method, *options]
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors):
                try:
                    run_command(train, "train")
                except SystemExit as end:
                    results.append((end.code, errors.getvalue()))
        print(json.dumps([results, sorted({{name.partition(".")[0] for name in sys.modules}})]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("index", range(len(BAD)), ids=lambda index: f"{BAD[index][0]} {BAD[index][1][-2:]}")
def test_bad_options_end_in_one_line(told, index):
    code, errors = told[0][index]
    assert code == 2 and BAD[index][2] in errors and errors.count("\n") == 1, errors


def test_no_backend_is_loaded_before_the_options_are_checked(told):
    """It takes seconds, and what is at fault shall be told at once."""
    assert not sorted({"keras", "tensorflow", "resvg_py"} & set(told[1]))


@pytest.mark.parametrize("method", sorted(train.commands))
def test_every_number_is_checked(method):
    """No option takes a number without a range, or one that is not finite."""
    for parameter in train.commands[method].params:
        kind = parameter.type
        assert not isinstance(kind, click.types.FloatParamType) or isinstance(kind, click.FloatRange), (
            parameter
        )
        if isinstance(kind, click.FloatRange):
            with pytest.raises(click.BadParameter):
                kind.convert("nan", parameter, None)
            with pytest.raises(click.BadParameter):
                kind.convert("inf", parameter, None)


def test_help_names_what_follows_the_model(run_program):
    code, output, _ = run_program(lambda: run_command(train, "train"), "lora", "--help")
    assert code == 0 and "the model's own; usually 0.0001" in " ".join(output.split())
