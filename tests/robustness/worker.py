"""The process that reads damaged files: what to read on a line of stdin, what came of it on one of stdout."""

import gc
import json
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

_MIB = 2**20
# Beyond this an allocation fails, so that no input takes the machine's memory.
_ROOM = 1536 * _MIB


def main():
    # What readers print goes where nobody takes it for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.simplefilter("ignore")
    from tests.robustness.faulty_readers import FAULTY
    from tests.robustness.readers import READERS

    limited = False
    for line in sys.stdin:
        name, folder, file, warm = json.loads(line)
        if not warm and not limited:
            size = _status("VmSize") * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, resource.RLIM_INFINITY))
            limited = True
        answer = _read((READERS | FAULTY)[name].read, Path(folder), file)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if warm:
            gc.collect()
            gc.freeze()  # what is there now is there to stay, and need not be looked through each time


def _read(read, folder, file):
    from keras_sd.errors import UserError

    fault, message = None, ""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _status("VmHWM"), time.monotonic()
    try:
        read(folder, file)
    except UserError as error:
        message = str(error)
        if "\n" in message or len(message) > 3000:
            fault = f"no line: {message[:300]!r}"
    except BaseException:
        fault = traceback.format_exc()[-3000:]
    seconds = time.monotonic() - began
    growth = (_status("VmHWM") - before) * 1024 / _MIB
    return {"fault": fault, "message": message[:300], "seconds": seconds, "growth": growth}


def _status(name):
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
