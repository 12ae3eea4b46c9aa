"""Encodings on disk: found by their keys, the same bytes from any run, and checked when they are read."""

import concurrent.futures
import io
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from keras_sd.data import encoding_store
from keras_sd.data.encoding_store import EncodingStore, keys_of
from keras_sd.errors import UserError

GENERATOR = np.random.default_rng(0)
ARRAYS = GENERATOR.standard_normal((10, 2, 3, 5)).astype("float32")
KEYS = keys_of(["a model"], map(str, range(10)))


def filled(folder, dtype="float32"):
    """A store of two shards, of six and four arrays."""
    store = EncodingStore(folder)
    store.write("latents", "a model", KEYS[:6], ARRAYS[:6], dtype)
    store.write("latents", "a model", KEYS[6:], ARRAYS[6:], dtype)
    store.save_catalogue()
    return store


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.arrayrecord")}


def assert_whole(store, tolerance=0.0):
    for key, array in zip(KEYS, ARRAYS, strict=True):
        read = store.read(store.find(np.array([key]))[0])
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, array, atol=tolerance, rtol=tolerance)


def test_arrays_are_found_by_their_keys_in_any_order(tmp_path):
    filled(tmp_path / "store")
    store = EncodingStore(tmp_path / "store")
    assert len(store) == 10 and len(set(KEYS.tolist())) == 10
    assert_whole(store)
    others = keys_of(["another model"], map(str, range(3)))
    mixed = np.concatenate([others, KEYS[::-1]])
    assert (store.find(mixed) < 0).tolist() == 3 * [True] + 10 * [False]
    assert EncodingStore(tmp_path / "none").find(KEYS).tolist() == 10 * [-1]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_takes_half_the_space(tmp_path, dtype, tolerance):
    assert_whole(filled(tmp_path, dtype), tolerance)
    with pytest.raises(UserError, match="too large for float16; use float32 or bfloat16"):
        EncodingStore(tmp_path).write("latents", "", KEYS[:1], [np.array([1e6], "float32")], "float16")


def test_two_runs_write_the_same_bytes_and_none_twice(tmp_path):
    store, first = filled(tmp_path / "one"), shards(tmp_path / "one")
    filled(tmp_path / "two")
    assert len(first) == 2 and shards(tmp_path / "two") == first
    before = [path.stat().st_mtime_ns for path in (tmp_path / "one").glob("*.arrayrecord")]
    store.write("latents", "a model", KEYS[:6], ARRAYS[:6])
    filled(tmp_path / "one")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "one").glob("*.arrayrecord")] == before
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o700


def test_shards_of_another_process_are_found(tmp_path):
    early = EncodingStore(tmp_path)
    filled(tmp_path)
    assert len(early) == 0
    early.refresh()
    assert_whole(early)


def test_processes_of_one_run_make_the_folder_at_the_same_time(tmp_path):
    together = threading.Barrier(8)

    def opened(folder):
        together.wait()
        return EncodingStore(folder)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index in range(50):
            list(pool.map(opened, [tmp_path / str(index)] * 8))


def test_a_catalogue_that_is_missing_or_damaged_is_made_again(tmp_path):
    filled(tmp_path)
    catalogue = tmp_path / "catalogue.npz"
    whole = catalogue.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for content in (None, b"", array.getvalue(), whole[:100], b"PK" + bytes(500), whole[:-400] + bytes(400)):
        catalogue.unlink() if content is None else catalogue.write_bytes(content)
        store = EncodingStore(tmp_path)
        assert_whole(store)
        store.save_catalogue()
        assert EncodingStore(tmp_path)._is_saved


@pytest.mark.parametrize("with_catalogue", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "zeros", "renamed"])
def test_a_damaged_shard_is_one_line_and_is_written_anew(tmp_path, damage, with_catalogue):
    filled(tmp_path)
    first, second = sorted(tmp_path.glob("*.arrayrecord"))
    content = first.read_bytes()
    flipped = bytearray(content)
    array = next(array.tobytes() for array in ARRAYS if array.tobytes() in content)
    flipped[content.index(array) + 50] ^= 1
    changed = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "flipped": flipped,
        "zeros": bytes(len(content)),
        "renamed": second.read_bytes(),
    }
    first.write_bytes(changed[damage])
    if not with_catalogue:
        (tmp_path / "catalogue.npz").unlink()
    with pytest.warns(
        UserWarning, match=f"1 damaged shard is encoded anew, the first is {first.name} \\("
    ) as told:
        store = EncodingStore(tmp_path)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert not first.exists() and 0 < len(store) < 10
    filled(tmp_path)
    assert first.read_bytes() == content
    assert_whole(EncodingStore(tmp_path))


def test_damage_after_the_check_is_found_when_it_is_read(tmp_path):
    store = filled(tmp_path)
    number = store.find(KEYS[:1])[0]
    for path in tmp_path.glob("*.arrayrecord"):
        path.write_bytes(path.read_bytes()[:70000])
    with pytest.raises(UserError, match=r"latents-.*arrayrecord: damaged; start again"):
        store.read(number)
    with pytest.raises(UserError, match=r"latents-.*arrayrecord: no longer there; start again"):
        store.read(number)


def test_threads_read_more_shards_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding_store, "_MOST_READERS", 2)
    store = EncodingStore(tmp_path)
    for index in range(10):
        store.write("latents", "", KEYS[index : index + 1], ARRAYS[index : index + 1])
    numbers, faults = store.find(KEYS), []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 10, 200):
            if not np.array_equal(store.read(numbers[index]), ARRAYS[index]):
                faults.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(store._readers) <= 2


def test_a_full_disk_is_one_line_and_leaves_what_is_written(tmp_path):
    store = EncodingStore(tmp_path)
    store.write("latents", "", KEYS[:1], ARRAYS[:1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); free some space") as told:
            store.write("latents", "", KEYS[1:3], np.zeros((2, 100_000), "float32"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value)
    assert len(list(tmp_path.iterdir())) == 1 and len(EncodingStore(tmp_path)) == 1


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        EncodingStore(tmp_path / "file")
    with pytest.raises(UserError, match="file"):
        EncodingStore(tmp_path / "file" / "below")


def test_reading_needs_no_keras(tmp_path):
    code = """if True:
        import sys
        from keras_sd.data.encoding_store import EncodingStore
        store = EncodingStore(sys.argv[1])
        store.read(0)
        print(len(store), "keras" in sys.modules, "jax" in sys.modules)
    """
    filled(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ, capture_output=True, text=True
    )
    assert done.stdout.split() == ["10", "False", "False"], done.stderr


WITHOUT_DESCRIPTORS = """if True:
    import os, resource, sys
    from array_record.python.array_record_module import ArrayRecordReader
    from keras_sd.data.encoding_store import EncodingStore
    from keras_sd.errors import UserError

    store = EncodingStore(sys.argv[1])  # modules are imported when they are first used
    store = None if sys.argv[2] == "open" else store
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        os.close(held.pop())  # the listing of the folder takes one
    try:
        EncodingStore(sys.argv[1]) if store is None else store.read(0)
    except UserError as error:
        os.write(1, str(error).encode())
"""


@pytest.mark.parametrize("moment", ["open", "read"])
def test_a_fault_of_the_system_removes_no_shard(tmp_path, moment):
    filled(tmp_path)
    if moment == "open":
        (tmp_path / "catalogue.npz").unlink()
    before = shards(tmp_path)
    held = ["-c", WITHOUT_DESCRIPTORS, str(tmp_path), moment]
    done = subprocess.run([sys.executable, *held], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path) == before
    if done.stdout:
        assert "Too many open files" in done.stdout and "\n" not in done.stdout
    assert_whole(EncodingStore(tmp_path))


def test_shards_of_a_later_version_stay(tmp_path, monkeypatch):
    filled(tmp_path)
    (tmp_path / "catalogue.npz").unlink()
    later = tmp_path / "later"
    with monkeypatch.context() as patch:
        patch.setattr(encoding_store, "_VERSION", 2)
        filled(later)
    (later / "catalogue.npz").unlink()
    before = shards(later)
    with pytest.raises(UserError, match=r"written by another version of keras_sd \(2\); choose another"):
        EncodingStore(later)
    assert shards(later) == before


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["catalogue.npz", "latents-" + 32 * "0" + ".arrayrecord"])
def test_what_is_no_plain_file_is_one_line(tmp_path, make, name):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: not a plain file; remove it, or choose another folder"):
        EncodingStore(tmp_path)


def test_every_damage_of_the_catalogue_is_made_good(tmp_path):
    filled(tmp_path)
    path, generator = tmp_path / "catalogue.npz", np.random.default_rng(0)
    content = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(damaged)
        assert len(EncodingStore(tmp_path)) == 10
