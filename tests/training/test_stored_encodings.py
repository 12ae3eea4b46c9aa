"""Encodings in memory, on disk and made when they are drawn: one training, whichever way."""

import functools
import itertools
import resource

import numpy as np
import pytest
from PIL import Image

from keras_sd.data.folders import FolderSource
from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.masks import MaskFiles
from keras_sd.data.sources import batches
from keras_sd.errors import UserError
from keras_sd.training.caching import MODES, Caching
from keras_sd.training.diffusion_settings import DiffusionSettings, NoiseDrawing
from keras_sd.training.encodings import EncodedSource, UnencodedSource
from keras_sd.training.stored_encodings import StoredSource, encoded_source
from keras_sd.training.text_to_image import diffusion_example
from tests import tiny
from tests.programs import run_python

CAPTIONS = ("red heart", "blue heart\na grinning face", "woman running", "flag of Japan\nred heart")
BUCKETS = {"aspect_ratio_buckets": 3, "bucket_upscale": True}


def write_images(folder, count):
    """Images of three ratios."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        shape = [(24, 24), (20, 36), (36, 20)][index % 3]
        pixels = np.random.default_rng(index).integers(0, 256, (*shape, 3), "uint8")
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(CAPTIONS[index % len(CAPTIONS)])
    return folder


def framed(folder, masks=None, **framing):
    return FramedSource(FolderSource(folder, 16, masks=masks), Framing(16, **framing))


def write_masks(images, folder):
    """A mask of grey levels for each image."""
    folder.mkdir()
    for index, path in enumerate(sorted(images.glob("*.png"))):
        height, width = np.asarray(Image.open(path)).shape[:2]
        pixels = np.random.default_rng(100 + index).integers(0, 256, (height, width), "uint8")
        Image.fromarray(pixels).save(folder / path.name)
    return MaskFiles(mask_data_dir=folder)


def encode(source, sd, mode, folder=None, dtype="float32", text_encoder=None, jit_compile=False):
    caching = Caching(mode, folder if mode == "disk" else None, dtype)
    options = {"jit_compile": jit_compile, "progress": False}
    return encoded_source(source, sd.vae, text_encoder, sd.tokenizer, caching, **options)


def drawn(encoded, count=6):
    """The first batches of a training run."""
    options = {"noise": NoiseDrawing(DiffusionSettings(input_perturbation=0.1), 1000), "caption_dropout": 0.2}
    draw = functools.partial(diffusion_example, condition=encoded.condition, **options)
    stream = batches(encoded, batch_size=3, seed=1, draw=draw, buckets=encoded.buckets)
    if hasattr(encoded, "encode_batches"):
        stream = encoded.encode_batches(stream)
    return list(itertools.islice(iter(stream), count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, array in batch.items():
            assert other[name].dtype == array.dtype
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.arrayrecord")}


@pytest.fixture(scope="module")
def sd():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", 11)


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder, sd):
    """A folder with the encodings of all images."""
    place = tmp_path_factory.mktemp("stored") / "cache"
    encode(framed(folder), sd, "disk", place)
    return place


def check_modes(folder, cache, sd, masks=None, **framing):
    source = framed(folder, masks, **framing)
    options = {"text_encoder": sd.text_encoder, "jit_compile": True}
    encoded = [encode(source, sd, mode, cache, **options) for mode in MODES]
    assert [type(one) for one in encoded] == [EncodedSource, StoredSource, UnencodedSource]
    assert len({one.fingerprint() for one in encoded}) == 1
    memory, disk, off = map(drawn, encoded)
    assert_same(memory, disk)
    assert_same(memory, off)
    assert len({batch["samples"].shape for batch in memory}) == len(source.bucket_sizes)
    return memory


def test_training_is_the_same_wherever_encodings_are_kept(tmp_path, folder, sd):
    check_modes(folder, tmp_path, sd, **BUCKETS)


def test_masks_are_the_same_wherever_they_are_kept(tmp_path, folder, sd):
    masks = write_masks(folder, tmp_path / "masks")
    batch = check_modes(folder, tmp_path / "cache", sd, masks, random_flip=True, **BUCKETS)[0]
    assert batch["mask"].shape == (*batch["samples"].shape[:3], 1) and batch["mask"].dtype == np.float32
    source = framed(folder, masks)
    encoded = encode(source, sd, "disk", tmp_path / "cache")
    factor = sd.vae.config.downsampling
    expected = np.asarray(Image.fromarray(source.mask(3)).convert("F").reduce(factor)) / 255
    np.testing.assert_allclose(encoded[3]["mask"][..., 0], expected, atol=1e-6)
    written = len(shards(tmp_path / "cache"))
    assert encode(source, sd, "disk", tmp_path / "cache").encoded == 0
    assert len(shards(tmp_path / "cache")) == written


def test_without_a_text_encoder_a_caption_is_its_token_ids(tmp_path, folder, sd):
    memory, *others = (drawn(encode(framed(folder), sd, mode, tmp_path)) for mode in MODES)
    assert memory[0]["token_ids"].dtype == np.int32
    for other in others:
        assert_same(memory, other)


def test_flips_are_a_second_version(folder, sd):
    plain, flipped = (encode(framed(folder, random_flip=flip), sd, "memory") for flip in (False, True))
    generator = np.random.default_rng(0)
    versions = {flipped.draw_example(1, generator)["mean"].tobytes() for _ in range(20)}
    mirrored = FramedSource(FolderSource(folder, 16), Framing(16)).flipped()
    one = encode(mirrored, sd, "memory")[1]["mean"]
    assert versions == {plain[1]["mean"].tobytes(), one.tobytes()}


JAX = """if True:
    import sys
    from pathlib import Path
    from tests import tiny
    from tests.training.test_stored_encodings import BUCKETS, check_modes
    check_modes(Path(sys.argv[1]), Path(sys.argv[2]), tiny.pipeline(), random_flip=True, **BUCKETS)
"""


def test_training_is_the_same_on_jax(tmp_path, folder):
    run_python(["-c", JAX, folder, tmp_path])


def test_a_second_start_encodes_only_what_is_new(tmp_path, sd, capsys):
    images, cache = write_images(tmp_path / "images", 5), tmp_path / "cache"
    assert encode(framed(images), sd, "disk", cache).encoded == 5
    first = shards(cache)
    assert encode(framed(images), sd, "disk", cache).encoded == 0
    write_images(tmp_path / "images", 7)
    grown = encode(framed(images), sd, "disk", cache)
    assert grown.encoded == 2 and shards(cache).items() > first.items()
    assert_same(drawn(grown), drawn(encode(framed(images), sd, "memory")))


def test_a_cache_of_another_vae_or_precision_is_rebuilt_with_a_line(tmp_path, sd, folder, store, capsys):
    source = framed(folder)
    other = tiny.randomize(type(sd.vae)(sd.vae.config), 5, 0.2)

    def start(vae, dtype="float32"):
        caching = Caching("disk", store, dtype)
        encoded = encoded_source(source, vae, None, sd.tokenizer, caching, jit_compile=False)
        return encoded.encoded, capsys.readouterr().err.splitlines()

    assert start(sd.vae) == (0, [f"encodings: 11 of 11 images are in {store}"])
    encoded, (line, *_) = start(other)
    assert encoded == 11 and line.startswith(f"{store}: holds encodings of another VAE or precision (")
    assert start(sd.vae, "bfloat16")[0] == 11
    assert start(sd.vae)[0] == start(other)[0] == 0


class Interrupted(FramedSource):
    """Images of which one ends the run."""

    def __init__(self, source, framing, index):
        super().__init__(source, framing)
        self.index = index

    def __getitem__(self, index):
        if index == self.index:
            raise UserError("out of patience")
        return super().__getitem__(index)


def test_interrupted_encoding_goes_on_with_the_same_shards(tmp_path, sd, monkeypatch):
    """The images are more than three shards; the division is by buckets."""
    monkeypatch.setattr("keras_sd.training.stored_encodings.SHARD_SIZE", 4)
    images = write_images(tmp_path / "images", 17)
    source = framed(images, **BUCKETS)
    whole, part = tmp_path / "whole", tmp_path / "part"
    encode(source, sd, "disk", whole)
    for index in (np.flatnonzero(source.buckets == bucket)[-1] for bucket in (1, 2)):
        with pytest.raises(UserError, match="out of patience"):
            encode(Interrupted(source.source, source.framing, index), sd, "disk", part)
        assert 0 < len(shards(part)) < len(shards(whole))
    encode(source, sd, "disk", part)
    assert shards(part) == shards(whole) and len(shards(whole)) == 6


def test_a_damaged_shard_is_encoded_anew(tmp_path, sd, folder):
    source = framed(folder)
    encode(source, sd, "disk", tmp_path)
    before = shards(tmp_path)
    name = sorted(before)[0]
    (tmp_path / name).write_bytes(before[name][:-1000])
    with pytest.warns(UserWarning, match="1 damaged shard is encoded anew"):
        encode(source, sd, "disk", tmp_path)
    assert shards(tmp_path) == before


def test_half_precision(sd, folder, tmp_path):
    source = framed(folder)
    whole = encode(source, sd, "memory")
    memory, disk = (encode(source, sd, mode, tmp_path, "bfloat16") for mode in ("memory", "disk"))
    assert_same(drawn(memory), drawn(disk))
    np.testing.assert_allclose(memory[3]["mean"], whole[3]["mean"], rtol=1e-2, atol=1e-2)
    assert not np.array_equal(memory[3]["mean"], whole[3]["mean"])
    assert memory[3]["mean"].dtype == np.float32


def test_random_crops_are_not_kept(tmp_path, sd, folder):
    source = framed(folder, crop="random")
    assert isinstance(encode(source, sd, None), UnencodedSource)
    for mode in ("memory", "disk"):
        with pytest.raises(UserError, match=f"cache_latents {mode}: keeps one crop of an image"):
            encode(source, sd, mode, tmp_path)
    one, two = drawn(encode(source, sd, "off")), drawn(encode(source, sd, "off"))
    assert_same(one, two)


def test_few_images_stay_in_memory_and_many_go_to_disk(tmp_path, sd, folder, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_SD_CACHE", str(tmp_path))
    source = framed(folder)
    assert isinstance(encode(source, sd, None), EncodedSource)
    monkeypatch.setattr("keras_sd.training.stored_encodings.MOST_IN_MEMORY", 1000)
    encoded = encoded_source(source, sd.vae, sd.text_encoder, sd.tokenizer)
    assert isinstance(encoded, StoredSource) and shards(tmp_path / "encodings")
    assert f"are kept in {tmp_path / 'encodings'}" in capsys.readouterr().err
    monkeypatch.setenv("KERAS_SD_CACHE", "")
    with pytest.raises(
        UserError, match=r"cache_dir: missing, and there is no cache folder \(KERAS_SD_CACHE\)"
    ):
        encode(source, sd, None)


def test_a_full_disk_is_one_line(tmp_path, folder, sd):
    source = framed(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); free some space"):
            encode(source, sd, "disk", tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert encode(source, sd, "disk", tmp_path / "full").encoded == 11


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"cache_latents": "tape"}, "cache_latents 'tape': unknown; use memory, disk, off"),
        ({"cache_dtype": "int8"}, "cache_dtype 'int8': unknown"),
        ({"cache_latents": "off", "cache_dtype": "float16"}, "cache_dtype float16: has no effect"),
        ({"cache_latents": "memory", "cache_dir": "here"}, "cache_dir here: has no effect"),
    ],
)
def test_values_that_cannot_be(values, told):
    with pytest.raises(UserError, match=told):
        Caching(**values)
