"""safetensors files and the diffusers folder."""

import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from keras_sd.errors import UserError
from keras_sd.files.mapping import identity_of, origin_of
from keras_sd.weights import safetensors_files


def tensors():
    generator = np.random.default_rng(0)
    return {
        "a.weight": generator.standard_normal((3, 5)).astype("float32"),
        "b.weight": generator.standard_normal((2, 3, 4, 1)).astype("float32").transpose(3, 2, 0, 1),
        "scale": np.array(2.5, "float32"),
    }


@pytest.mark.parametrize("dtype", safetensors_files.DTYPES)
def test_written_files_are_what_the_library_reads(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    safetensors_files.write_safetensors(path, tensors(), dtype)
    expected = {name: array.astype(safetensors_files.DTYPES[dtype]) for name, array in tensors().items()}
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    for read in (load_file(path), safetensors_files.read_safetensors(path)):
        assert sorted(read) == sorted(expected)
        for name, array in expected.items():
            assert read[name].dtype == array.dtype and read[name].shape == array.shape
            assert read[name].tobytes() == array.tobytes()


def test_files_are_mapped_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((4, 4), ml_dtypes.bfloat16), "none": np.zeros((0, 3), "float32")}, path)
    read = safetensors_files.read_safetensors(path)
    assert origin_of(read["a"]).file == identity_of(path.stat())
    assert not read["a"].flags.writeable and read["none"].shape == (0, 3)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors_files.write_safetensors(path, {"a": np.zeros(3, "float32")})
    mapped = safetensors_files.read_safetensors(path)["a"]
    with pytest.raises(UserError, match="holds values that are no finite float16"):
        safetensors_files.write_safetensors(path, {"a": np.full(3, 1e6, "float32")}, "float16")
    with pytest.raises(UserError, match="use one of float32, float16, bfloat16"):
        safetensors_files.write_safetensors(path, {"a": np.zeros(3, "float32")}, "int8")
    safetensors_files.write_safetensors(path, {"a": np.ones(3, "float32")})
    assert mapped.tolist() == [0, 0, 0]  # the old file lives as long as its map
    assert safetensors_files.read_safetensors(path)["a"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors_files.write_safetensors(path, {"a": np.zeros(3, "float32")})
    # A limit on the size of files stands for the end of the disk.
    code = """if True:
        import resource, signal, sys
        import numpy as np
        from keras_sd.errors import UserError
        from keras_sd.weights import safetensors_files

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            safetensors_files.write_safetensors(sys.argv[1], {"a": np.ones(100_000, "float32")})
        except UserError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: cannot be written") and done.stdout.count("\n") == 1
    assert safetensors_files.read_safetensors(path)["a"].tolist() == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def header_of(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


BAD_FILES = {
    "empty": b"",
    "not safetensors": b"PK\x03\x04" + bytes(100),
    "absurd header": struct.pack("<Q", 2**60) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"nope",
    "truncated": header_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + bytes(12),
    "too long": header_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + bytes(20),
    "overlap": header_of(
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        }
    )
    + bytes(24),
    "shape": header_of({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}) + bytes(16),
    "quantised": header_of({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}) + bytes(4),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_end_in_one_line(tmp_path, fault):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_FILES[fault])
    with pytest.raises(UserError) as caught:
        safetensors_files.read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message


def test_missing_files_end_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        safetensors_files.read_safetensors(tmp_path / "none")
