"""Commands print their own lines only, whatever the libraries below them log."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import tiny

BAR = r"\s*\d+%\|.*|\s*|\d+step \[.*"
PHASE = r"(starting|opening|compiling|encoding|decoding|evaluating|validating|saving|exporting)[\w :/.-]*"
TRAINING = (r"training: lora of .*", r"encoding (images|captions) \d.*", r"step \d/2, .*", r"saved: .*")
TRAINING += (r"generate with it: keras-sd generate .*", r"memory of the training step: .*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    (folder / "images").mkdir()
    for index in range(2):
        place = folder / "images" / f"{index}.png"
        Image.fromarray(np.full((24, 24, 3), 100 * index, "uint8")).save(place)
        place.with_suffix(".txt").write_text("red heart")
    return folder


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_commands_print_their_own_lines_only(folder, backend):
    options = ("--max-train-steps", 2, "--lr-warmup-steps", 1, "--train-batch-size", 2, "--rank", 1)
    options += ("--evaluation-steps", 2, "--num-inference-steps", 1, "--kid-images", 0, "--seed", 1)
    generate = ("generate", "red heart", "--model", "model", "--num-inference-steps", 2)
    train = ("train", "lora", "--pretrained-model-name-or-path", "model", "--train-data-dir", "images")
    train += ("--output-dir", f"run-{backend}")
    environment = {**os.environ, "KERAS_BACKEND": backend}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"  # as users set it; it silences no more than without it
    for command, own in ((generate, (BAR, PHASE)), ((*train, *options), (BAR, PHASE, *TRAINING))):
        arguments = [sys.executable, "-m", "keras_sd", *map(str, command)]
        done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
        environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
        assert done.returncode == 0, done.stderr
        lines = re.split(r"[\r\n]+", done.stderr.replace("\x1b[A", ""))
        assert not [line for line in lines if not any(re.fullmatch(kind, line) for kind in own)]


FILTERED = """if True:
    import os, sys
    from keras_sd.cli.quiet import _without_log_lines
    os.write(2, b"before\\n")
    with _without_log_lines():
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called\\n")
        os.write(2, b"I0000 00:00:1795857061.137370   20050 port.cc:153] oneDNN custom operations are on\\n")
        os.write(2, b"W0000 00:00:1795857061.137370   20050 port.cc:153] slow\\n")
        os.write(2, b"F0000 00:00:1795857061.137370   20050 port.cc:153] no AVX\\nIt ends here\\n")
        print("warning: of ours", file=sys.stderr)
        if len(sys.argv) > 1:
            os.abort()
    os.write(2, b"after\\n")
"""


@pytest.mark.parametrize("aborts", [False, True])
def test_errors_and_last_words_are_passed_on(aborts):
    arguments = [sys.executable, "-c", FILTERED, *(["abort"] if aborts else [])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode == 0) is not aborts
    lines = done.stderr.splitlines()
    assert lines[0] == "before" and lines[-1] == ("warning: of ours" if aborts else "after")
    assert [line[-12:] for line in lines[1:3]] == [".cc:153] no AVX"[-12:], "It ends here"]


IMPORTED = """if True:
    import sys
    from keras_sd.cli.quiet import quiet_libraries
    quiet_libraries()
    import keras
    print(*(name for name in ("matplotlib", "pandas", "sklearn") if name in sys.modules))
    import matplotlib, pandas, sklearn
"""


@pytest.mark.parametrize("level", [None, "0"])
def test_what_keras_imports_on_the_side_is_left_out(level):
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL")
    environment |= {} if level is None else {"TF_CPP_MIN_LOG_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", IMPORTED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stderr
