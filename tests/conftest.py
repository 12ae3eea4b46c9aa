"""What every test shares: TensorFlow as the usual backend, and one cache of compiled programs.

Nothing else differs from what users have: XLA, TensorFlow and JAX run with their own settings.
"""

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings

import pytest

from keras_sd import interruption
from keras_sd.cli.program import collect_garbage_less_often

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Many tests, and the processes that they start, compile the same programs: one fresh cache serves them all.
CACHE = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp(prefix="keras_sd_cache_")
if CACHE:
    os.environ["KERAS_SD_CACHE"] = CACHE

collect_garbage_less_often()  # as every command does

# Files that take longest go first, so that no process is left with one of them at the end.
LONGEST = (
    *("test_shapes", "test_framing", "test_caching", "test_killed_encoding", "test_encode", "test_ray"),
    *("test_text_to_image", "test_flags", "test_bench", "test_distribution", "test_train", "test_main"),
    *("test_keras_cv", "test_lora", "test_interruption", "test_stable_diffusion", "test_trainer"),
    *("test_documentation", "test_gradient_checkpointing", "test_image_parameters", "test_small_folders"),
    *("test_export", "test_program_cache", "test_quiet", "test_primitives", "test_scheduler_options"),
    *("test_campaign", "test_dreambooth", "test_keras_cv_h5", "test_package", "test_gpu"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_unconfigure():
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _no_garbage():
    """Frees the models of each file's tests: they hold themselves, and Python would keep them for long."""
    yield
    gc.collect()
    gc.freeze()  # what is left, so that the next collection is fast


def _signal_handling():
    """The handlers of signals, and the threads that wait for them."""
    handlers = [signal.getsignal(number) for number in interruption.SIGNALS]
    return handlers, [thread for thread in threading.enumerate() if "(_watch)" in thread.name]


@pytest.fixture(autouse=True)
def _signals_as_before():
    """What a test leaves behind would get the signals of later tests, and may end their process."""
    before = _signal_handling()
    yield
    assert _signal_handling() == before


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
