"""`keras-sd encode` and `keras-sd caption` on a Ray cluster of two workers on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from keras_sd.cli.main import main
from keras_sd.cli.ray_cluster import open_worker
from keras_sd.errors import UserError
from tests import tiny
from tests.captions import models
from tests.programs import run_python
from tests.ray_cluster import kill_a_worker, processes, started_cluster
from tests.training.test_stored_encodings import shards, write_images

SHAPES = ("--resolution", 24, "--aspect-ratio-buckets", 3, "--bucket-upscale", "--random-flip")
SHAPES += ("--train-batch-size", 1)
COUNT = 195
SHARDS = 10  # three of each bucket with its mirror images, and one of captions


@pytest.fixture(scope="module")
def cluster():
    with started_cluster() as address:
        yield address


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    write_images(folder / "images", COUNT)
    tiny.pipeline(unet=tiny.ONE_BLOCK_UNET).save(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Variables that a command changes in this process."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)


def encode(folder, cache, *more, images="images"):
    model = ("--pretrained-model-name-or-path", folder / "model")
    return ("encode", folder / images, cache, *model, *SHAPES, *more)


def start(*command, backend="tensorflow", **environment):
    """Starts a command of its own, whose Ray has nothing of this process."""
    environment = {**os.environ, "KERAS_BACKEND": backend, **environment}
    environment.pop("TF_CPP_MIN_LOG_LEVEL")  # of the tests; commands are quiet without it
    arguments = [sys.executable, "-m", "keras_sd", *map(str, command)]
    return subprocess.Popen(
        arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(program):
    """Waits for the end: (exit code, lines of standard error)."""
    errors = program.communicate(timeout=300)[1]
    return program.returncode, re.split(r"[\r\n]+", errors.strip().replace("\x1b[A", ""))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_killed_worker_leaves_the_same_bytes(folder, cluster, tmp_path, run_program, backend):
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    if backend == "jax":
        run_python(["-m", "keras_sd", *encode(folder, whole)])
    else:
        assert run_program(main, *encode(folder, whole))[0] == 0
    program = start(*encode(folder, cache, "--ray", cluster, "--ray-workers", 2), backend=backend)
    kill_a_worker(lambda: shards(cache))
    left = SHARDS - len(shards(cache))
    code, told = finish(program)
    assert code == 0, told
    assert left > 0 and len(shards(cache)) == SHARDS and shards(cache) == shards(whole)
    assert told[-1] == f"{2 * COUNT} images encoded, {COUNT} are in {cache}"


@pytest.mark.slow
def test_captions_of_a_killed_worker_are_the_same(cluster, tmp_path):
    models.write_clip(tmp_path / "clip")
    models.write_vocabulary(tmp_path / "names.txt")
    models.write_emoji(tmp_path / "whole", 24)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    options = ("--mode", "fast", "--max-phrases", 5, "--batch-size", 2, "--clip", tmp_path / "clip")
    options += ("--captioner", "none", "--flavors", tmp_path / "names.txt")
    code, _, told = models.caption(tmp_path / "whole", *options)
    assert code == 0, told
    program = start("caption", tmp_path / "parts", *options, "--ray", cluster, "--ray-workers", 2)
    journals = tmp_path / "parts" / ".captions"
    kill_a_worker(lambda: list(journals.glob("*.jsonl")))
    code, told = finish(program)
    assert code == 0, told
    whole, parts = ((tmp_path / name / "metadata.jsonl").read_bytes() for name in ("whole", "parts"))
    assert parts == whole and whole.count(b"\n") == 24
    lines = [line for path in journals.glob("captions-*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 24 and len(list(journals.glob("captions-*.jsonl"))) == 3


def test_a_local_cluster_prints_nothing_and_leaves_nothing(folder, tmp_path):
    write_images(tmp_path / "images", 3)
    home = tmp_path / "home"
    home.mkdir()
    temporary = set(os.listdir(tempfile.gettempdir()))
    command = encode(folder, tmp_path / "cache", "--ray", "local", images=tmp_path / "images")
    program = start(*command, backend="jax", HOME=str(home))
    code, told = finish(program)
    assert code == 0, told
    own = (
        r"starting Ray|starting the Ray workers|opening .*|data: .*|buckets.*",
        r"encoding on Ray \d/4(, .*)?",
    )
    own += (r"Ray: 1 machine, \d+ CPUs?, \d GPUs?; 1 at work", r"6 images encoded, 3 are in .*cache")
    assert not [line for line in told if not any(re.fullmatch(kind, line) for kind in own)]
    assert len(shards(tmp_path / "cache")) == 4
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".arrayrecord") == [
        "catalogue.npz"
    ]
    left = set(os.listdir(tempfile.gettempdir())) - temporary
    assert not [name for name in left if "ray" in name] and not (home / ".ray").exists()


def test_ctrl_c_ends_the_work_and_keeps_the_shards(folder, cluster, tmp_path):
    program = start(*encode(folder, tmp_path, "--ray", cluster, "--ray-workers", 2), backend="jax")
    while not shards(tmp_path):
        assert program.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    program.send_signal(signal.SIGINT)
    code, told = finish(program)
    assert code == 130 and time.monotonic() - began < 8
    assert not [line for line in told if "Traceback" in line or "raylet" in line]
    while processes():
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert 0 < len(shards(tmp_path)) < SHARDS


def test_a_fault_of_a_worker_is_one_line(folder, cluster, tmp_path, run_program):
    write_images(tmp_path / "images", 3)
    pipeline = tiny.pipeline(unet=tiny.ONE_BLOCK_UNET)
    tiny.randomize(pipeline.vae, 3, 1e20)
    pipeline.save(tmp_path / "model")
    code, _, told = run_program(main, *encode(tmp_path, tmp_path / "cache", "--ray", cluster))
    assert code == 2
    assert re.fullmatch(r"\S+: error: .*\.png: its latents are not finite numbers; .*", told.splitlines()[-1])


def test_an_address_that_does_not_answer_is_one_line(folder, tmp_path, run_program, monkeypatch):
    monkeypatch.setattr("keras_sd.cli.ray_cluster._PATIENCE", 5.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        code, _, told = run_program(main, *encode(folder, tmp_path / "cache", "--ray", address))
        assert code == 2 and time.monotonic() - began < 15
        assert f"error: --ray {address}: no Ray cluster answers" in told.splitlines()[-1]
    code, _, told = run_program(main, *encode(folder, tmp_path / "cache", "--ray", address))
    assert code == 2 and f"--ray {address}: no Ray cluster answers; start one by" in told
    assert len(told.splitlines()) == 1 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("--ray", "nonsense"),
            "--ray nonsense: no address of a cluster; give HOST:PORT of its head, auto or",
        ),
        (("--ray", "ray://head:10001"), "--ray ray://head:10001: no address of a cluster; give HOST:PORT"),
        (("--ray", "head:²"), "--ray head:²: no address of a cluster; give HOST:PORT"),
        (("--ray", "a..b:6379"), "--ray a..b:6379: no address of a cluster; give HOST:PORT"),
        (("--ray-workers", 2), "--ray-workers: has no effect without --ray; leave it out"),
        (("--ray", "local", "--ray-workers", 0), "Invalid value for '--ray-workers'"),
    ],
)
def test_bad_options(folder, tmp_path, run_program, arguments, told):
    code, _, errors = run_program(main, *encode(folder, tmp_path / "cache", *arguments))
    assert code == 2 and told in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "arguments", [("--devices", "cpu,cpu"), ("--num-shards", 2), ("--num-shards", 1), ("--shard-index", 0)]
)
def test_caption_divides_the_folder_in_one_way(folder, run_program, arguments):
    options = ("--mode", "caption", "--captioner", "blip", "--ray", "local")
    code, _, told = run_program(main, "caption", folder / "images", *options, *arguments)
    assert code == 2
    assert f"{arguments[0]}: has no effect with --ray, which divides the folder itself; leave it out" in told


def test_without_ray_the_extra_is_named(folder, tmp_path, run_program, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, told = run_program(main, *encode(folder, tmp_path / "cache", "--ray", "local"))
    assert code == 2 and "error: ray: not installed; pip install 'keras_sd[ray]'" in told


def test_a_folder_that_a_worker_does_not_see_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = {"directory": str(tmp_path), "marker": str(tmp_path / "cache" / ".ray-1")}
    with pytest.raises(
        UserError, match=f"^{tmp_path}/cache: not seen by the Ray worker on .*all machines share"
    ):
        open_worker(request)
    with pytest.raises(UserError, match=f"^{tmp_path}/gone: not seen by the Ray worker on "):
        open_worker({**request, "directory": str(tmp_path / "gone")})
