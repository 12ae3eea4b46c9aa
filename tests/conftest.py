"""What every test shares: a quiet TensorFlow backend, unless the caller chose another.

Several processes of tests get one thread each, as they would only take them from each other, and compile
with fewer passes. Whoever runs a file of tests by itself has all of it as users do.
"""

import functools
import os
import shutil
import sys
import tempfile
import warnings

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    # XLA's own passes stay, and float32 is itself. LLVM's passes on what comes out of them would take half of
    # the time to compile, the newer emitters another sixth, and two thirds of JAX's.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.util import tf_stack

        # TensorFlow's own passes on a graph that is not XLA's, which runs once or twice.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        # The stack that TensorFlow keeps with each operation for its errors: here half of it is pytest's, and
        # keeping it is an eighth of the time to trace.
        shallow = tf_stack.extract_stack()
        tf_stack.extract_stack = lambda stacklevel=1: shallow

# Many tests, and the processes that they start, compile the same programs: one fresh cache serves them all.
CACHE = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp(prefix="keras_sd_cache_")
if CACHE:
    os.environ["KERAS_SD_CACHE"] = CACHE

# Files that take longest go first, so that no process is left with one of them at the end.
LONGEST = (
    "test_text_to_image",
    "test_lora",
    "test_cli",
    "test_distribution",
    "test_documentation",
    "test_bench",
    "test_trainer",
    "test_train",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_unconfigure():
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture
def without_xla(monkeypatch):
    """Has commands open their models without XLA, and a test's commands share those that they have opened.

    Compiling or tracing each anew would take most of the time.
    """
    from keras_sd.cli import generate
    from keras_sd.cli import main as cli

    open_once = functools.cache(functools.partial(generate.open_model, jit_compile=False))
    for module in (cli, generate):
        monkeypatch.setattr(module, "open_model", open_once)


@pytest.fixture
def run_program(monkeypatch, capsys):
    """Runs `main()`, which ends its program, in this process: (exit code, output, errors)."""

    def run(main, *arguments):
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # programs have one of their own
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return run
