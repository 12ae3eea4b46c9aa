"""Captions one folder with several processes, each with its own device and shard.

`python -m keras_sd.captions.workers` is one such process; it reads its task as JSON from standard input.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

from keras_sd.captions.dataset import CaptionedFolder, CaptionSettings, caption_shard
from keras_sd.errors import UserError, require

_INTERVAL = 0.5


def devices(text="auto"):
    """Return the names of torch devices.

    Args:
        text: names separated by commas; a name may occur several times. "all" is every GPU, "auto" the first
            GPU; both are the CPU if there is no GPU.

    Raises:
        UserError: there is no such device, or torch is not installed.
    """
    require("torch")
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if text in ("auto", "all"):
        return (gpus if text == "all" else gpus[:1]) or ["cpu"]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        known = name in ("cpu", "mps") or name in gpus or (name == "cuda" and gpus)
        if not known:
            raise UserError(f"device {name!r}: not found; use {', '.join(['cpu', *gpus])}")
    return names


def caption_by_workers(captioned, names, threads=None, advance=None):
    """Caption a folder with one process for each device, each with its own shard.

    Args:
        captioned: a `CaptionedFolder`.
        names: devices, as `devices` returns them.
        threads: torch threads of each process; by default an equal share of the cores.
        advance: called with the number of images captioned since the last call.

    Raises:
        UserError: the message of a worker that failed, after the other workers have ended.
    """
    captioned.begin()
    threads = threads or max(1, (os.cpu_count() or 1) // len(names))
    done = captioned.lines()
    workers = [_start(captioned, index, len(names), device, threads) for index, device in enumerate(names)]
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(_INTERVAL)
            now = captioned.lines()
            if advance and now > done:
                advance(now - done)
            done = max(done, now)
    except BaseException:
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        raise
    finally:
        outputs = [worker.communicate()[1] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        if worker.returncode:
            lines = output.strip().splitlines() or [f"a worker ended with exit code {worker.returncode}"]
            raise UserError(lines[-1].removeprefix("worker: error: "))


def _start(captioned, index, count, device, threads):
    work = {
        "folder": str(captioned.folder),
        "settings": dataclasses.asdict(captioned.settings),
        "overwrite": captioned.overwrite,
        "shard": {"shard_index": index, "num_shards": count, "device": device, "threads": threads},
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "keras_sd.captions.workers"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Limits matrix multiplications of libraries other than torch.
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)},
    )
    worker.stdin.write(json.dumps(work))
    worker.stdin.close()
    worker.stdin = None  # communicate() would flush it
    return worker


def main():
    """Run one worker."""
    work = json.load(sys.stdin)
    try:
        captioned = CaptionedFolder(work["folder"], CaptionSettings(**work["settings"]), work["overwrite"])
        caption_shard(captioned, **work["shard"])
    except UserError as error:
        print(f"worker: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
