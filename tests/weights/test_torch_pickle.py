"""Files of torch.save without torch: every tensor, no code, and memory bounded by the file."""

import pickle
import struct
import subprocess
import sys
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.weights.torch_pickle import read_torch
from tests.reference import run_reference
from tests.weights.pickles import (
    WEIGHT,
    archive,
    call,
    items,
    name_of,
    number,
    program,
    storage,
    tensor,
    text,
)

# --- files of torch itself ---------------------------------------------------------------------------------

SCRIPT = """
    from collections import OrderedDict, defaultdict

    class Callback:
        def __init__(self):
            self.best, self.model = 0.5, torch.nn.Linear(2, 2)

    base = torch.arange(24.0).reshape(4, 6) - 7.5
    state = OrderedDict(
        base=base, transposed=base.T, part=base[1:3, 2:5], column=base[:, 3], scalar=torch.tensor(2.5),
        none=torch.zeros(0, 3), parameter=torch.nn.Parameter(base * 2), bool=base > 0,
        double=base.double(), half=base.half(), bfloat16=base.bfloat16(), long=base.long(), int=base.int(),
        short=base.short(), char=base.to(torch.int8), byte=base.abs().byte(),
    )
    lightning = {
        "state_dict": state, "global_step": 875000, "epoch": 3, "pytorch-lightning_version": "1.4.2",
        "callbacks": {Callback: {"best_score": torch.tensor(1.0)}, "object": Callback()},
        "optimizer_states": [{"state": {0: {"exp_avg": base}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "loops": defaultdict(list, a=[1]), "lr_schedulers": [None, {1, 2}, 2**70],
    }
    torch.save(lightning, folder / "zip.ckpt")
    torch.save(lightning, folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save(base, folder / "tensor.pt")
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 2)), folder / "model.pt")
    torch.save({"x": torch.arange(3).to(torch.uint16)}, folder / "unsigned.pt")
    torch.save({"x": torch.ones(1).expand(1000)}, folder / "expanded.pt")
"""


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    run_reference(SCRIPT, {}, folder)
    return folder


def state():
    base = np.arange(24, dtype="float32").reshape(4, 6) - 7.5
    dtypes = {"double": "float64", "half": "float16", "bfloat16": ml_dtypes.bfloat16, "long": "int64"}
    dtypes |= {"int": "int32", "short": "int16", "char": "int8"}
    return {
        "base": base,
        "transposed": base.T,
        "part": base[1:3, 2:5],
        "column": base[:, 3],
        "scalar": np.array(2.5, "float32"),
        "none": np.zeros((0, 3), "float32"),
        "parameter": base * 2,
        **{name: base.astype(dtype) for name, dtype in dtypes.items()},
        "byte": np.abs(base).astype("uint8"),
        "bool": base > 0,
    }


@pytest.mark.parametrize("name", ["zip.ckpt", "legacy.ckpt"])
def test_tensors_of_torch_come_out_as_they_were(torch_files, name):
    saved = read_torch(torch_files / name)
    assert saved["global_step"] == 875000 and saved["pytorch-lightning_version"] == "1.4.2"
    assert sorted(saved["state_dict"]) == sorted(state())
    for key, expected in state().items():
        array = saved["state_dict"][key]
        assert array.dtype == expected.dtype and array.shape == expected.shape
        assert array.tobytes() == expected.tobytes() and not array.flags.writeable
    assert saved["state_dict"]["base"].ctypes.data == saved["state_dict"]["transposed"].ctypes.data
    assert saved["optimizer_states"][0]["state"][0]["exp_avg"].shape == (4, 6)


def test_objects_become_dictionaries_of_what_is_set_on_them(torch_files):
    saved = read_torch(torch_files / "zip.ckpt")
    assert list(saved["callbacks"]) == ["object"]  # a class is no key
    assert saved["callbacks"]["object"]["best"] == 0.5
    assert saved["callbacks"]["object"]["model"]["_parameters"]["weight"].shape == (2, 2)
    assert saved["lr_schedulers"] == [None, {}, 2**70]
    assert read_torch(torch_files / "tensor.pt").tolist() == state()["base"].tolist()
    assert read_torch(torch_files / "model.pt")["_modules"]["0"]["_parameters"]["bias"].shape == (2,)


@pytest.mark.parametrize(
    "name, fault", [("unsigned.pt", "'torch.uint16', a type that no"), ("expanded.pt", "of 4000 bytes in a")]
)
def test_tensors_that_cannot_be_mapped_are_told(torch_files, name, fault):
    with pytest.raises(UserError, match=fault):
        read_torch(torch_files / name)


def test_truncated_files_of_torch(torch_files, tmp_path):
    for name in ("zip.ckpt", "legacy.ckpt"):
        content = (torch_files / name).read_bytes()
        for size in (0, 1, 8, 15, 100, len(content) // 2, len(content) - 1):
            path = tmp_path / name
            path.write_bytes(content[:size])
            assert "\n" not in fault_of(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_bytes_never_escape_as_another_error(torch_files, tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.ckpt"
    for name in ("zip.ckpt", "legacy.ckpt"):
        content = np.frombuffer((torch_files / name).read_bytes(), np.uint8)
        for _ in range(300):
            damaged = content.copy()
            places = generator.integers(0, len(content), generator.integers(1, 20))
            damaged[places] = generator.integers(0, 256, len(places))
            path.write_bytes(damaged.tobytes())
            try:
                read_torch(path)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 400


# --- files made by hand ------------------------------------------------------------------------------------


def fault_of(path):
    with pytest.raises(UserError) as raised:
        read_torch(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


HUGE = 2**61
BAD_TENSORS = {
    "an offset behind the end": tensor(offset=1),
    "a shape that is too long": tensor(shape=(3, 3)),
    "a stride that leads outside": tensor(strides=(4, 1)),
    "repeated elements": tensor(shape=(2000, 3), strides=(0, 1)),
    "a huge shape": tensor(shape=(HUGE, HUGE, HUGE), strides=(0, 0, 0)),
    "a huge stride": tensor(strides=(HUGE, HUGE)),
    "a huge offset": tensor(offset=2**61),
    "absurd integers": tensor(shape=(2**1000, 3)),
    "a negative stride": tensor(source=storage()).replace(
        b"\x8a\x01\x03\x8a\x01\x01t", b"J\xff\xff\xff\xffK\x01t"
    ),
    "a shape of floats": tensor().replace(
        b"\x8a\x01\x02\x8a\x01\x03t", b"G" + struct.pack(">d", 2) + b"K\x03t"
    ),
    "a storage that claims more": tensor(source=storage(count=7)),
    "a storage of wider elements": tensor(source=storage(kind="DoubleStorage")),
    "a storage that is not there": tensor(source=storage(key="1")),
    "a storage outside of its folder": tensor(source=storage(key="../data.pkl")),
    "an unknown storage": tensor(source=storage(kind="QInt8Storage")),
    "not a storage": tensor(source=b"}"),
    "too few arguments": call("torch._utils", "_rebuild_tensor_v2", storage()),
    "no arguments": name_of("torch._utils", "_rebuild_parameter") + b"NR",
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_their_storage_does_not_hold(tmp_path, name):
    assert "not a readable torch file" in fault_of(
        archive(tmp_path / "a.ckpt", program(weight=BAD_TENSORS[name]))
    )


def test_tensors_that_claim_more_than_twice_the_file(tmp_path):
    whole = tensor(shape=(250, 100), strides=(100, 1), source=storage(count=25_000))
    shared = {str(index): whole for index in range(2)}
    saved = read_torch(archive(tmp_path / "a.ckpt", program(**shared), bytes(100_000)))
    assert saved["1"].shape == (250, 100)
    more = archive(tmp_path / "a.ckpt", program(**shared, third=whole), bytes(100_000))
    assert "claim more than twice the file" in fault_of(more)


COPIED = b"}(" + b"".join(number(index) + b"N" for index in range(20_000)) + b"u"
PAIRS = items(b"](" + (text("a") + b"N\x86") * 20_000 + b"e")
ORDERED = name_of("collections", "OrderedDict") + b"q\x00" + PAIRS + b"q\x01R"
BAD_PICKLES = {
    "an end that is missing": b"\x80\x02}",
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
    "an unknown opcode": b"\x80\x02\xff.",
    "bytes of absurd length": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "a bytearray of absurd length": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "a text of absurd length": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",
    "an integer of absurd length": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "an integer of many digits": b"L" + b"9" * 10**6 + b"L\n.",
    "a buffer out of band": b"\x80\x05\x97.",
    "a persistent name": b"Pname\n.",
    "a memo that was never stored": b"\x80\x02j" + struct.pack("<I", 2**31) + b".",
    "a mark that was never set": b"\x80\x02t.",
    "an odd number of items": b"\x80\x02}(Nu.",
    "a name of no texts": b"\x80\x04}}\x93.",
    "too many operations": b"\x80\x02" + b"}0" * 200_000 + b"N.",
    "a dictionary copied often": b"\x80\x02(" + COPIED + b"q\x00" + b"}h\x00b" * 2_000 + b"l.",
    "an ordered dictionary copied often": b"\x80\x02(" + ORDERED + b"h\x00h\x01R" * 2_000 + b"l.",
    "a long name copied often": b"\x80\x04("
    + text("x" * 2**20)
    + b"q\x00"
    + b"h\x00h\x00\x93" * 2_000
    + b"l.",
    "too large a pickle": b"\x80\x02" + text("x" * 2**23) + b".",
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_damaged_pickles(tmp_path, name):
    fault = fault_of(archive(tmp_path / "a.ckpt", BAD_PICKLES[name]))
    assert "not a readable torch file" in fault
    assert "copied" not in name or "far more than weights" in fault or "names no class" in fault


def test_odd_pickles_that_are_read(tmp_path):
    odd = program(
        deep=b"]" * 20_000 + b"a" * 19_999,
        deep_key=b"})" + b"\x85" * 20_000 + b"Ns",
        far_memo=b"Kar" + struct.pack("<I", 2**31) + b"",
        itself=b"}q\x01" + text("x") + b"h\x01s",
        ordered=call("collections", "OrderedDict", b"](" + items(text("a"), b"K\x01") + b"e"),
        weight=tensor(),
    )
    saved = read_torch(archive(tmp_path / "a.ckpt", odd))
    assert saved["deep_key"] == {} and saved["far_memo"] == ord("a") and saved["ordered"] == {"a": 1}
    assert saved["itself"]["x"] is saved["itself"]
    assert np.array_equal(saved["weight"], WEIGHT)


def edited(path, old, new, target):
    content = path.read_bytes()
    assert old in content
    target.write_bytes(content.replace(old, new))
    return target


def test_zip_files_that_are_not_as_torch_writes_them(tmp_path):
    good = archive(tmp_path / "good.ckpt", program(weight=tensor()))
    bomb = archive(tmp_path / "bomb.ckpt", program(weight=tensor()), bytes(10**7), zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in fault_of(bomb)
    directory = good.read_bytes().index(b"PK\x01\x02")
    content = bytearray(good.read_bytes())
    for place, value in ((directory + 20, 2**31), (directory + 24, 2**31), (directory + 42, 2**31)):
        damaged = content.copy()
        damaged[place : place + 4] = struct.pack("<I", value)
        (tmp_path / "bad.ckpt").write_bytes(damaged)
        assert "does not lie inside of the file" in fault_of(tmp_path / "bad.ckpt")
    end = content.index(b"PK\x05\x06")
    damaged = content.copy()
    damaged[end + 16 : end + 20] = struct.pack("<I", 2**31)
    (tmp_path / "bad.ckpt").write_bytes(damaged)
    assert "cannot be right" in fault_of(tmp_path / "bad.ckpt")
    assert "truncated" in fault_of(edited(good, b"PK\x05\x06", b"PK\x05\x05", tmp_path / "bad.ckpt"))
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice.ckpt", "w") as file:
        warnings.simplefilter("ignore")  # of a name that is there twice
        file.writestr("archive/data.pkl", program())
        file.writestr("archive/data.pkl", program())
    assert "two entries of one name" in fault_of(tmp_path / "twice.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as file:
        file.writestr("config.json", "{}")
    assert "0 entries data.pkl" in fault_of(tmp_path / "other.ckpt")


def test_files_that_are_none_of_torch(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("text", "pickle"):
        assert "neither a zip nor a pickle of torch.save" in fault_of(tmp_path / f"{name}.ckpt")
    assert "an empty file" in fault_of(tmp_path / "empty.ckpt")
    assert "no such file" in fault_of(tmp_path / "missing.ckpt")


def test_memory_stays_small_beside_the_file(tmp_path):
    """Peak memory of a process that reads each file, over that of one that reads a tiny one."""
    megabytes = 2**20
    archive(tmp_path / "tiny.ckpt", program(weight=tensor()))
    large = program(a=tensor(shape=(16 * megabytes,), strides=(1,), source=storage(count=16 * megabytes)))
    archive(tmp_path / "large.ckpt", large, bytes(64 * megabytes))
    archive(tmp_path / "objects.ckpt", b"\x80\x02(" + b"}" * 4 * megabytes + b"l.")
    many = b"\x80\x02" + b"(" + b"".join(b"\x94}" for _ in range(90_000)) + b"l."
    archive(tmp_path / "memo.ckpt", many.replace(b"(\x94", b"("))
    with zipfile.ZipFile(tmp_path / "entries.ckpt", "w") as file:
        for index in range(60_000):
            file.writestr(str(index), b"")
    code = """if True:
        import resource, sys
        from keras_sd.errors import UserError
        from keras_sd.weights.torch_pickle import read_torch
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for name in ("tiny", "large", "objects", "memo", "entries"):
            before = peak()
            try:
                kept = read_torch(f"{sys.argv[1]}/{name}.ckpt")
            except UserError:
                pass
            print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(float(line) < 40 for line in done.stdout.split()), done.stdout
