"""Several processes over one folder, each with its own device and its own shard.

`python -m keras_sd.captions.workers` is one of them; it reads its part of the work from standard input.
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
    """Devices by name.

    Args:
        text: names with commas between them; one may come several times. "all" stands for every GPU, "auto"
            for the first, and both for the CPU where there is none.

    Raises:
        UserError: torch knows no such device, or is not installed.
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
            raise UserError(f"device {name!r}: not there; use {', '.join(['cpu', *gpus])}")
    return names


def caption_by_workers(captioned, names, threads=None, advance=None):
    """Has one process for each device describe a shard of a folder.

    Args:
        captioned: a `CaptionedFolder`.
        names: devices, as `devices` gives them.
        threads: of torch, in each process; by default the cores are shared out.
        advance: called with the number of images that have been described meanwhile.

    Raises:
        UserError: what a worker said when it failed. The others go on to their end first.
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
        # Matrix products of other libraries than torch.
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)},
    )
    worker.stdin.write(json.dumps(work))
    worker.stdin.close()
    worker.stdin = None  # communicate() would flush it
    return worker


def main():
    """One worker."""
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
