"""A file of options does what the same options do on the command line, or is refused in one line."""

import click
import pytest

from keras_sd.cli.config_file import as_toml, given_options
from keras_sd.cli.train.main import main, train

FILE = """
pretrained_model_name_or_path = "emoji"
[data]
train_data_dir = "a \\"folder\\" ü"
resolution = "64,64"
cache_latents = true
bucket_no_upscale = true
xformers = false
optimizer_args = []
[run]
train-batch-size = 2
learning_rate = 1
max_token_length = 150
jit_compile = false
enable_bucket = true
validation_prompts = ["a\\nb", "-c"]
optimizer_type = "AdamW8bit"
"""
SAME = [
    *("--pretrained-model-name-or-path=emoji", '--train-data-dir=a "folder" ü', "--resolution=64"),
    *("--cache-latents", "--bucket-no-upscale", "--train-batch-size=2", "--learning-rate=1"),
    *("--max-token-length=150", "--no-jit-compile", "--enable-bucket", "--validation-prompts=a\nb"),
    *("--validation-prompts=-c", "--optimizer=adamw8bit"),
]


def parsed(*arguments):
    """The context of `lora` with these arguments."""
    return train.commands["lora"].make_context("lora", list(map(str, arguments)))


def without_file(context):
    return {name: value for name, value in context.params.items() if name != "config_file"}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "options.toml").write_text(FILE, encoding="utf-8")
    return tmp_path / "options.toml"


def test_file_says_what_arguments_say(path):
    for name in (path, path.with_suffix("")):
        assert without_file(parsed("--config_file", name)) == without_file(parsed(*SAME))
    # As on the command line: checks that look for given options find them.
    source = parsed(f"--config-file={path}").get_parameter_source("learning_rate")
    assert source is click.core.ParameterSource.COMMANDLINE


def test_command_line_wins(path):
    more = ["--train-batch-size", "8", "--validation-prompts", "d", "--jit-compile", "--cache-latents=off"]
    params = parsed("--config-file", path, *more).params
    assert (params["train_batch_size"], params["validation_prompts"]) == (8, ("d",))
    assert params["jit_compile"] and params["cache_latents"] == "off" and params["learning_rate"] == 1


def test_length_on_the_command_line_wins(tmp_path):
    for key, flag in (("num_train_epochs", "--max-train-steps"), ("max_train_steps", "--max-train-epochs")):
        (tmp_path / "run.toml").write_text(f"{key} = 10\n", encoding="utf-8")
        params = parsed("--config-file", tmp_path / "run.toml", flag, "3").params
        assert {params["num_train_epochs"], params["max_train_steps"]} == {None, 3}


def test_options_that_are_given_twice():
    with pytest.warns(UserWarning, match="--rank: is given twice; the last one counts"):
        assert parsed("--rank", "4", "--rank=2").params["rank"] == 2


def test_written_options_are_read_again(tmp_path):
    context = parsed(*SAME, "--seed", "7", "--adam-epsilon", "1e-9", "--resume-from-checkpoint", "latest")
    given = given_options(context)
    assert "rank" not in given and "resume_from_checkpoint" not in given  # a default, and another run's
    (tmp_path / "again.toml").write_text(as_toml("lora", given), encoding="utf-8")
    again = without_file(parsed("--config-file", tmp_path / "again.toml"))
    assert again == without_file(context) | {"resume_from_checkpoint": None}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rnak = 3", "rnak is no option of this command; the nearest is rank"),
        ('rank = "3"', "rank '3': not a whole number; correct it"),
        ("rank = true", "rank True: not a whole number; correct it"),
        ("rank = 0", "rank: 0 is not in the range 1<=x<=16384; correct it"),
        ("learning_rate = nan", "learning_rate: nan is not"),
        ("jit_compile = 1", "jit_compile 1: not true or false; correct it"),
        ("output_dir = 3", "output_dir 3: not a text; correct it"),
        ("cache_latents = false", "cache_latents False: not one of memory, disk, off; correct it"),
        ("rank = [3]", "rank [3]: not a whole number; correct it"),
        ("validation_prompts = [3]", "validation_prompts 3: not a text; correct it"),
        ("network_dim = 8", "network_dim: is called --rank here"),
        ("xformers = true", "xformers: XLA compiles attention; leave it out"),
        ("config_file = 'x'", "config_file is no option of this command"),
        ("[a.b]\nrank = 1", "a.b is a section in a section; put its keys into a"),
        ("[a]\nrank = 1\n[b]\nrank = 1", "rank is given twice; remove one of them"),
        ("optimizer = 'lion'\noptimizer_type = 'lion'", "optimizer and optimizer_type are one option"),
        ("rank = ", "not valid TOML (Invalid value (at end of document)); correct it"),
        ("[run]\noptimizer = 'lion'\nadam_beta1 = 0.8", "--adam-beta1: has no effect with --optimizer lion"),
        ("num_train_epochs = 3\nmax_train_steps = 4", "--num-train-epochs 3: --max-train-steps is given too"),
    ],
)
def test_bad_file_is_told_in_one_line(tmp_path, run_program, text, told):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    code, _, errors = run_program(main, "lora", "--config-file", path, "--evaluation-steps", "0")
    assert code == 2 and told in errors and errors.count("\n") == 1, errors


def test_all_unknown_keys_are_named_at_once(tmp_path, run_program):
    path = tmp_path / "kohya.toml"
    path.write_text(
        "network_dim = 8\nxformers = true\nsdpa = false\nrnak = 2\nseed = 1\nqqqq = 1\n", encoding="utf-8"
    )
    code, _, errors = run_program(main, "lora", "--config-file", path)
    *lines, last = [line.partition(f"{path}: ")[2] for line in errors.splitlines()]
    assert code == 2 and last == "4 keys are no options of this command; change or remove them"
    assert lines == [
        "network_dim: is called --rank here",
        "xformers: XLA compiles attention; leave it out",
        "rnak is no option of this command; the nearest is rank",
        "qqqq is no option of this command; remove it",
    ]


def test_no_flag_is_named_that_the_command_lacks(tmp_path, run_program):
    (tmp_path / "kohya.toml").write_text("network_dim = 8\n", encoding="utf-8")
    code, _, errors = run_program(main, "vae", "--config-file", tmp_path / "kohya.toml")
    assert code == 2 and "network_dim is no option of this command; " in errors and "--rank" not in errors


def test_missing_file_is_told_in_one_line(run_program):
    code, _, errors = run_program(main, "vae", "--config-file", "nope.toml")
    assert code == 2 and errors.endswith("error: --config-file nope.toml: no such file; correct the path\n")
