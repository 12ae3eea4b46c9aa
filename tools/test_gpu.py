"""Fine-tunes Stable Diffusion 1.5 at full size on a GPU under JAX, by the real commands, and measures it.

Nothing is installed and no TensorFlow is needed. The model has random weights; the images are scikit-image's
photographs, or noise where that is missing. Figures are written as they come, a JSON object a line. A part
that takes longer than its limit is ended, and the next one begins: twelve minutes in all.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from keras_sd import UserError
from keras_sd.cli.outputs import check_output, overwrite_option
from keras_sd.cli.program import run_command
from machine import description

TOOLS = Path(__file__).resolve().parent
PACKAGES = ("keras_sd", "keras", "jax", "jaxlib", "numpy")
LOGGED_TOGETHER = 10  # steps; the rate is taken after the first ones
KILLED_AFTER = 20  # steps, in the part that resumes
LIMIT_OF_MODEL = 75  # seconds


@dataclasses.dataclass(frozen=True)
class Part:
    """One training at full size: the command, the images in a batch, more flags, and the seconds it has."""

    command: str
    batch: int
    limit: int
    flags: tuple = ()


PARTS = {
    "lora": Part("lora", 8, 130),
    "unet": Part("text-to-image", 16, 215),
    "checkpointing": Part("text-to-image", 16, 180, ("--gradient-checkpointing",)),
    # Starts like the first part, with the programs that it has compiled, is killed and goes on.
    "resume": Part("lora", 8, 120),
}

# Runs a command in a process that tells at its end what it had in memory: the file, then the arguments.
MEASURED = """
import json, resource, runpy, sys
from pathlib import Path

file = sys.argv.pop(1)
sys.argv[0] = "keras_sd.train"
try:
    runpy.run_module("keras_sd.train", run_name="__main__", alter_sys=True)
finally:
    found = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if "jax" in sys.modules:
        import jax

        device = jax.local_devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        found |= {"device": device.device_kind, "peak_device_bytes": peak}
    found["imported_tensorflow"] = "tensorflow" in sys.modules
    Path(file).write_text(json.dumps(found))
"""


class Bench:
    """Runs parts in a folder and writes their figures.

    Args:
        folder: for the model, images, compiled programs and runs.
        output: the file of figures.
        model: `sd15`, written with random weights, or a model's name.
        size: side of the images in pixels.
        steps: of each run.
        precision: of the layers, as `--mixed-precision` takes it.
    """

    def __init__(self, folder, output, model, size, steps, precision):
        self.folder, self.output = folder, output
        self.model, self.size, self.steps, self.precision = model, size, steps, precision
        self.failed = False
        self._losses = {}

    def write(self, part, **figures):
        """Add a line to the output and tells it."""
        line = json.dumps({"part": part, **figures})
        with self.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        click.echo(line)

    def make_inputs(self):
        """Write the model and the images."""
        start = time.perf_counter()
        if self.model == "sd15":
            self.model = self.folder / "sd15"
            if not (self.model / "model_index.json").exists():
                command = [sys.executable, "-m", "benchmark.random_models", "sd15", str(self.model)]
                # On the processor: the GPU's memory is for the runs.
                self._run(command, LIMIT_OF_MODEL, JAX_PLATFORMS="cpu")
        seconds = time.perf_counter() - start
        images = self.folder / "images"
        kind = make_images(images, 64, self.size)
        self.write("inputs", seconds_to_write_model=round(seconds, 1), images=kind, size=self.size)

    def _environment(self, **variables):
        path = os.pathsep.join([str(TOOLS.parent), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"KERAS_BACKEND": "jax", "KERAS_SD_CACHE": str(self.folder / "cache"), "PYTHONPATH": path}
        return {**os.environ, **own, **variables}

    def _run(self, command, limit, until=None, **variables):
        """Run a command; return its exit code, None if it took longer than `limit` seconds.

        Args:
            until: a path; the command is ended by SIGKILL as soon as that exists.
        """
        log = self.folder / "log.txt"
        deadline = time.monotonic() + limit
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env=self._environment(**variables),
                stdout=file,
                stderr=file,
                # So that processes that it has started end with it.
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    if until is not None and until.exists():
                        break
                    time.sleep(0.02)
                is_late = process.poll() is None and time.monotonic() >= deadline
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return None if is_late else process.returncode

    def _command(self, part, run, *more):
        arguments = [
            "--pretrained-model-name-or-path",
            self.model,
            "--train-data-dir",
            self.folder / "images",
        ]
        arguments += ["--train-batch-size", part.batch, "--mixed-precision", self.precision]
        arguments += ["--max-train-steps", self.steps, "--evaluation-steps", 0, "--output-dir", run]
        command = [sys.executable, "-c", MEASURED, self.folder / "memory.json", part.command]
        return [str(each) for each in (*command, *arguments, *part.flags, *more)]

    def train(self, name):
        """One part: trains, and write what was measured."""
        part, run = PARTS[name], self.folder / name
        memory = self.folder / "memory.json"
        shutil.rmtree(run, ignore_errors=True)
        memory.unlink(missing_ok=True)
        deadline, more, figures = time.monotonic() + part.limit, (), {}
        if name == "resume":
            more = ("--checkpointing-steps", KILLED_AFTER // 2)
            until = run / f"checkpoint-{KILLED_AFTER}"
            figures["killed"] = (
                self._run(self._command(part, run, *more), part.limit, until) == -signal.SIGKILL
            )
            more += ("--resume-from-checkpoint", "latest")
        start = time.time()
        code = self._run(self._command(part, run, *more), deadline - time.monotonic())
        figures |= {"exit_code": code, "seconds": round(time.time() - start, 1), "batch": part.batch}
        with contextlib.suppress(OSError, ValueError):
            figures |= json.loads(memory.read_text())
        figures |= self._speed(name, run, part.batch, start)
        passed = code == 0 and figures.get("killed", True)
        self.failed = self.failed or not passed
        self.write(name, passed=passed, **figures, **({} if passed else {"log": self._last_line()}))
        shutil.rmtree(run, ignore_errors=True)  # a checkpoint of the whole UNet takes 14 GB

    def _speed(self, name, run, batch, start):
        """What the log of a run says: how soon its first step came, the rate after that, and the losses.

        Steps are logged several at a time, under the time of the last of them.
        """
        records = []
        with contextlib.suppress(OSError):
            lines = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [record for record in map(json.loads, lines) if "loss" in record]
        losses = self._losses[name] = {record["step"]: record["loss"] for record in records}
        last = max(losses, default=0)
        figures = {"last_step": last, "last_loss": losses.get(last)}
        figures |= {"images_per_second": None, "seconds_to_first_step": None}
        if name == "resume" and "lora" in self._losses:
            unbroken = self._losses["lora"]
            differences = [abs(loss - unbroken[step]) for step, loss in losses.items() if step in unbroken]
            figures["largest_loss_difference"] = max(differences, default=None)
        own = [record for record in records if record["time"] > start]
        ends = sorted({record["time"]: record["step"] for record in own}.items())
        if len(ends) > 1:
            (first_time, first), (last_time, _) = ends[0], ends[-1]
            seconds_per_step = (last_time - first_time) / (last - first)
            before = (first - own[0]["step"]) * seconds_per_step
            figures["images_per_second"] = round(batch / seconds_per_step, 2)
            figures["seconds_to_first_step"] = round(first_time - start - before, 1)
        return figures

    def _last_line(self):
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def make_images(folder, count, size):
    """Write square images with captions; return what they are: "photographs" or "noise"."""
    import numpy as np
    from PIL import Image

    try:
        from skimage import data

        whole = {name: Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "rocket")}
    except ImportError:
        whole = {}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = list(whole)
    for number in range(count):
        if names:
            name = names[number % len(names)]
            image = whole[name]
            side = int(min(image.size) * generator.uniform(0.5, 1.0))
            left, top = (int(generator.integers(0, length - side + 1)) for length in image.size)
            image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        else:
            name = "noise"
            image = Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype="uint8"))
        image.save(folder / f"{number:03}.jpg", quality=92)
        (folder / f"{number:03}.txt").write_text(f"a photograph of {name}, number {number}\n")
    return "photographs" if names else "noise"


@click.command(context_settings={"show_default": True})
@click.option("--parts", default=",".join(PARTS), help="Which to run, with commas between them.")
@click.option("--output", default="gpu/test.jsonl", help="File of figures.")
@overwrite_option
@click.option("--folder", default="build/gpu", help="Where the model, images and runs are kept.")
@click.option("--model", default="sd15", help="`sd15`, with random weights, or a model to open.")
@click.option("--size", default=512, type=click.IntRange(64), help="Side of the images in pixels.")
@click.option("--steps", default=60, type=click.IntRange(LOGGED_TOGETHER + 1), help="Updates in each run.")
@click.option("--mixed-precision", default="bf16", type=click.Choice(["no", "fp16", "bf16"]))
def test_gpu(parts, output, overwrite, folder, model, size, steps, mixed_precision):
    """Fine-tune at full size on a GPU under JAX, and write what it takes; 1 is left with if a part fails."""
    names = [name for name in parts.split(",") if name]
    unknown = ", ".join(name for name in names if name not in PARTS)
    if unknown or not names:
        raise UserError(f"--parts {unknown or 'nothing'}: no such part; take of {', '.join(PARTS)}")
    if "resume" in names and steps <= KILLED_AFTER:
        raise UserError(f"--steps {steps}: too few to resume; give more than {KILLED_AFTER}")
    output = check_output(output, ".jsonl", overwrite=overwrite).path.resolve()
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)  # a first step compiles, as a user's does
    (folder / "log.txt").write_bytes(b"")
    bench = Bench(folder, output, model, size, steps, mixed_precision)
    bench.write("machine", command=" ".join(sys.argv), **description(PACKAGES))
    bench.make_inputs()
    for name in names:
        bench.train(name)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    run_command(test_gpu, "test_gpu.py")
