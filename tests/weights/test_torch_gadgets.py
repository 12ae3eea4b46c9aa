"""Pickles that would run code: none of it runs, and the tensors beside it are read."""

import copyreg
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.weights.torch_pickle import read_torch
from tests.weights.pickles import WEIGHT, archive, call, items, name_of, program, short_bytes, tensor, text

# Each gadget would make a file of this name in the working folder.
MARKER = "ran"
PATH, SHELL, CODE = text(MARKER), text(f"touch {MARKER}"), text(f"open({MARKER!r}, 'w')")
WORDS = b"](" + text("touch") + PATH + b"e"

EXTENSION = 0xF0  # registered as os.system
OS_SYSTEM, FILE, POPEN = name_of("os", "system"), name_of("_io", "FileIO"), name_of("subprocess", "Popen")
OS = call("builtins", "__import__", text("os"))
SYSTEM_OF_OS = (
    call("builtins", "getattr", OS, text("system")),
    call("builtins", "getattr", call("importlib", "import_module", text("os")), text("system")),
    call("operator", "attrgetter", text("system")) + items(OS) + b"R",
)
CALLER = call("operator", "methodcaller", text("system"), SHELL)
MAP = call("builtins", "map", OS_SYSTEM, items(SHELL))
COMPILED = call("builtins", "compile", CODE, text("x"), text("eval"))
CONSOLE = call("code", "InteractiveConsole")
NEW_FILE = call("copyreg", "_reconstructor", FILE, name_of("builtins", "object"), b"N")
STATE = b"}" + text("__setstate__") + OS_SYSTEM + b"s"

GADGETS = {
    "os.system": call("os", "system", SHELL),
    "os.popen": call("os", "popen", SHELL),
    "os.mkdir": call("os", "mkdir", PATH),
    "posix.system": call("posix", "system", SHELL),
    "nt.system": call("nt", "system", SHELL),
    "subprocess.Popen": call("subprocess", "Popen", WORDS),
    "subprocess.run": call("subprocess", "run", WORDS),
    "subprocess.getoutput": call("subprocess", "getoutput", SHELL),
    "pty.spawn": call("pty", "spawn", WORDS),
    "eval": call("builtins", "eval", CODE),
    "exec": call("builtins", "exec", CODE),
    "eval of Python 2": call("__builtin__", "eval", CODE),
    "a compiled expression": call("builtins", "eval", COMPILED),
    "open": call("builtins", "open", PATH, text("w")),
    "io.FileIO": call("_io", "FileIO", PATH, text("w")),
    "getattr": SYSTEM_OF_OS[0] + items(SHELL) + b"R",
    "importlib.import_module": SYSTEM_OF_OS[1] + items(SHELL) + b"R",
    "operator.attrgetter": SYSTEM_OF_OS[2] + items(SHELL) + b"R",
    "operator.methodcaller": CALLER + items(OS) + b"R",
    "functools.partial": call("functools", "partial", OS_SYSTEM, SHELL) + items() + b"R",
    "functools.reduce": call("functools", "reduce", name_of("builtins", "eval"), items(CODE, b"}")),
    "map": call("builtins", "list", MAP),
    "types.FunctionType": call("types", "FunctionType", COMPILED, call("builtins", "globals")) + b")R",
    "runpy": call("runpy", "_run_code", CODE, b"}"),
    "timeit": call("timeit", "timeit", CODE, text("pass"), name_of("time", "time"), b"K\x01"),
    "cProfile": call("cProfile", "run", CODE, text(os.devnull)),
    "code": b"\x80\x04"
    + text("code")
    + text("InteractiveConsole.push")
    + b"\x93"
    + items(CONSOLE, CODE)
    + b"R",
    "numpy": call("numpy.testing", "runstring", CODE, b"}"),
    "torch.load": call("torch", "load", PATH),
    "torch.hub": call("torch.hub", "load", PATH, text("model")),
    "socket": call("socket", "create_connection", items(text("127.0.0.1"), b"K\x01")),
    "webbrowser": call("webbrowser", "open", PATH),
    "ctypes": call("ctypes", "CDLL", PATH),
    "a pickle in a pickle": call("_pickle", "loads", short_bytes(OS_SYSTEM + items(SHELL) + b"R.")),
    "names with dots": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + items(SHELL) + b"R",
    "names below torch": text("torch") + text("_utils.os.system") + b"\x93" + items(SHELL) + b"R",
    "INST": b"(" + SHELL + b"ios\nsystem\n",
    "OBJ": b"(" + FILE + PATH + text("w") + b"o",
    "NEWOBJ": POPEN + items(WORDS) + b"\x81",
    "NEWOBJ and BUILD": FILE + b")\x81" + STATE + b"b",
    "NEWOBJ_EX": POPEN + items(WORDS) + b"}\x92",
    "a state of a function": OS_SYSTEM + STATE + b"b" + SHELL + b"b",
    "a state of a dictionary": b"}" + STATE + b"b" + SHELL + b"b",
    "copyreg": NEW_FILE + items(PATH, text("w")) + b"b",
    "a parameter": call("torch._utils", "_rebuild_parameter", call("os", "system", SHELL), b"\x89", b"N"),
    "an extension": b"\x82" + bytes([EXTENSION]) + items(SHELL) + b"R",
    "a storage": items(text("storage"), call("os", "system", SHELL), text("0"), text("cpu"), b"K\x06") + b"Q",
    "a reference": call("os", "system", SHELL) + b"Q",
}

# Not as torch writes a file at all, so that it is refused as a whole.
REFUSED = {"an extension", "a storage", "a reference"}


@pytest.fixture
def registered_extension():
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)


@pytest.mark.parametrize("name", GADGETS)
def test_gadgets_do_not_run(tmp_path, monkeypatch, registered_extension, name):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "gadget.ckpt", program(before=tensor(), gadget=GADGETS[name], after=tensor()))
    if name in REFUSED:
        with pytest.raises(UserError, match="not a readable torch file"):
            read_torch(path)
    else:
        saved = read_torch(path)
        assert np.array_equal(saved["before"], WEIGHT) and np.array_equal(saved["after"], WEIGHT)
    assert os.listdir(tmp_path) == ["gadget.ckpt"]


def test_the_gadgets_would_run_elsewhere(tmp_path):
    """Python's own reader falls for most of them, so that the test above means something."""
    (tmp_path / "gadgets").write_bytes(
        pickle.dumps({name: b"\x80\x02" + gadget + b"." for name, gadget in GADGETS.items()})
    )
    code = f"""if True:
        import copyreg, io, os, pickle, sys, time
        class Unpickler(pickle.Unpickler):
            def persistent_load(self, key):
                return key
        sys.modules["torch"] = None  # takes seconds to import
        copyreg.add_extension("os", "system", {EXTENSION})
        for name, gadget in pickle.load(open("gadgets", "rb")).items():
            os.mkdir(name)
            os.chdir(name)
            try:
                Unpickler(io.BytesIO(gadget)).load()
            except Exception:
                pass
            os.chdir("..")
        time.sleep(0.5)  # for processes that nobody waits for
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    ran = [name for name in GADGETS if (tmp_path / name / MARKER).exists()]
    assert len(ran) >= 30, sorted(set(GADGETS) - set(ran))
