import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image, ImageOps

from keras_sd.data.folders import FolderSource
from keras_sd.data.framing import FramedSource, Framing, SmallImages, frame_of, framed_source
from keras_sd.data.images import read_frame
from keras_sd.data.sources import EmojiSource, batches
from keras_sd.errors import UserError

ORIENTATION = 0x0112


def photo(height, width, seed=0):
    """A smooth image with fine detail."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 20, (height, width))
    channels = [rows * 200 / height, columns * 200 / width, 100 + 80 * np.sin(rows / 9 + columns / 7)]
    return (np.stack(channels, axis=-1) + noise[..., None]).astype("uint8")


def write(folder, sizes, suffix="png"):
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(photo(height, width, index)).save(folder / f"{index:03}.{suffix}")
        (folder / f"{index:03}.txt").write_text(f"image {index}")
    return FolderSource(folder, 16)


@pytest.mark.parametrize("original", [(90, 60), (60, 90), (64, 64), (61, 97)])
@pytest.mark.parametrize("interpolation", ["lanczos", "bicubic", "bilinear", "box", "nearest"])
def test_a_centred_frame_is_pillows_fit(tmp_path, original, interpolation):
    path = tmp_path / "a.png"
    Image.fromarray(photo(*original)).save(path)
    for size in [(32, 32), (24, 40), (40, 24)]:
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling[interpolation.upper()]))
        frame = frame_of(original, size, interpolation)
        np.testing.assert_array_equal(read_frame(path, frame), expected)
        flipped = dataclasses.replace(frame, flip=True)
        np.testing.assert_array_equal(read_frame(path, flipped), expected[:, ::-1])
        assert frame.key() != flipped.key()


def test_a_shifted_frame_is_a_crop_of_the_resized_image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo(80, 240)).save(path)
    with Image.open(path) as image:
        resized = np.asarray(image.resize((120, 40), Image.Resampling.LANCZOS))
    for shift in (0.0, 0.25, 1.0):
        frame = frame_of((80, 240), (40, 40), shift=(0.7, shift))
        left = int(80 * shift)
        np.testing.assert_array_equal(read_frame(path, frame), resized[:, left : left + 40])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_rotated_photo_is_framed_upright(tmp_path, orientation, suffix):
    pixels = photo(120, 300)
    upright = Image.fromarray(pixels)
    turned = upright.rotate({1: 0, 3: 180, 6: 90, 8: 270}[orientation], expand=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("a photo")
    source = FolderSource(tmp_path, 16)
    assert source.sizes().tolist() == [[120, 300]]
    framed = FramedSource(source, Framing(32, aspect_ratio_buckets=9))
    (height, width) = framed.bucket_sizes[0]
    assert width / height > 1.6
    expected = np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(framed[0]["image"] - expected).mean() < 4


def test_exif_after_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(photo(40, 60)).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    tail = data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:start] + data[end:tail] + data[start:end] + data[tail:])
    source = FolderSource(tmp_path, 16, need_captions=False)
    assert source.sizes().tolist() == [[60, 40]]
    np.testing.assert_array_equal(source.read(0, frame_of((60, 40), (60, 40))), np.rot90(photo(40, 60), -1))


def test_a_large_jpeg_is_reduced_while_it_is_decoded(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(photo(1203, 1605)).save(path, quality=92)
    with Image.open(path) as image:
        whole = np.asarray(ImageOps.fit(image, (128, 96), Image.Resampling.LANCZOS)).astype(int)
    found = read_frame(path, frame_of((1203, 1605), (96, 128)))
    assert np.abs(found - whole).mean() < 1
    # Nearest pixels are those of the whole image.
    with Image.open(path) as image:
        nearest = np.asarray(ImageOps.fit(image, (128, 96), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(read_frame(path, frame_of((1203, 1605), (96, 128), "nearest")), nearest)


def test_a_file_of_another_size_than_was_checked(tmp_path):
    source = write(tmp_path, [(40, 60)])
    framed = FramedSource(source, Framing(16))
    Image.fromarray(photo(60, 40)).save(tmp_path / "000.png")
    with pytest.raises(UserError, match="000.png: is 40 x 60 pixels now, but was 60 x 40; start again"):
        framed[0]


SIZES = [(40, 80), (80, 40), (50, 60), (60, 60), (44, 78), (90, 45)]


def test_images_fall_into_buckets(tmp_path):
    source = write(tmp_path, SIZES)
    framed = FramedSource(source, Framing(32, aspect_ratio_buckets=5))
    for index, (height, width) in enumerate(SIZES):
        example = framed[index]
        size = framed.bucket_sizes[framed.buckets[index]]
        assert example["image"].shape == (*size, 3) and example["captions"] == (f"image {index}",)
        assert abs(np.log(size[1] / size[0] * height / width)) < 0.36
        np.testing.assert_array_equal(framed.flipped()[index]["image"], example["image"][:, ::-1])
        assert framed.flipped().frame_key(index) != framed.frame_key(index)
        assert framed.squares()[index]["image"].shape == (32, 32, 3)
    assert framed.buckets[0] == framed.buckets[4] and framed.buckets[1] == framed.buckets[5]
    assert framed.fingerprint() == source.fingerprint() and len(framed) == 6
    (line,) = framed.summary()
    assert line.startswith("buckets for batches of 1, width x height: images: 24 x 40: 2, ")
    assert "% of the images' area" in line
    # An added image moves no other.
    keys = [framed.frame_key(index) for index in range(6)]
    more = FramedSource(write(tmp_path, [*SIZES, (45, 88)]), framed.framing)
    assert [more.frame_key(index) for index in range(6)] == keys


def test_small_buckets_are_merged_with_a_line(tmp_path):
    framed = FramedSource(write(tmp_path, SIZES), Framing(32, aspect_ratio_buckets=5), smallest_bucket=2)
    assert np.bincount(framed.buckets).min() >= 2
    assert any("fewer images in an epoch than a batch, so they go into" in line for line in framed.summary())


def test_an_image_counts_as_often_as_it_is_repeated(tmp_path):
    (tmp_path / "10_dog").mkdir()
    write(tmp_path / "10_dog", [(64, 64)])
    write(tmp_path, [(40, 64)] * 4)
    framed = FramedSource(FolderSource(tmp_path, 16), Framing(32, aspect_ratio_buckets=5), smallest_bucket=4)
    assert not framed.merged and framed.frame(4).size == (32, 32)


def test_no_image_is_enlarged_unless_it_may_be(tmp_path):
    source = write(tmp_path, [(100, 120), (30, 40)])
    with pytest.raises(UserError) as caught:
        FramedSource(source, Framing(64, aspect_ratio_buckets=9))
    assert "1 of 2 images are smaller than their bucket: " in str(caught.value)
    assert "001.png (40 x 30); enlarge them by `bucket_upscale=True`, leave them out by" in str(caught.value)
    framing = Framing(64, aspect_ratio_buckets=9)
    (kept,) = framed_source(source, framing, on_bad_sample="skip").captions()
    assert kept == source.captions()[0]
    lines = framed_source(source, framing, on_bad_sample="skip").summary()
    assert lines[0].startswith("1 of 2 images are smaller than their bucket, and are left out: ")
    with pytest.raises(SmallImages, match="2 of 2 images are smaller"):
        framed_source(source, Framing(512, aspect_ratio_buckets=9), on_bad_sample="skip")
    for framing in (Framing(64, aspect_ratio_buckets=9, bucket_upscale=True), Framing(64)):
        framed = FramedSource(source, framing)
        assert framed[1]["image"].shape[:2] == framed.bucket_sizes[framed.buckets[1]]
        assert "1 of 2 images are smaller than their frame and enlarged" in framed.summary()[-1]


def test_random_crops_and_flips_are_functions_of_the_position(tmp_path):
    framing = Framing(32, crop="random", random_flip=True, aspect_ratio_buckets=3)
    source = FramedSource(write(tmp_path, SIZES), framing)

    def draw(example, generator):
        return {"image": example["image"]}

    def take(start, count):
        stream = batches(source, batch_size=2, seed=3, draw=draw, start=start, buckets=source.buckets)
        return [batch["image"] for batch in itertools.islice(stream, count)]

    whole = take(0, 9)
    for one, other in zip(whole[4:], take(4, 5), strict=True):
        np.testing.assert_array_equal(one, other)
    generator = np.random.default_rng(0)
    frames = {source.draw_frame(0, generator) for _ in range(50)}
    assert {frame.flip for frame in frames} == {True, False} and len(frames) == 50
    assert all(0 <= frame.box[1] and frame.box[3] <= 80 for frame in frames)
    assert source.draw_image(0, generator).shape == (24, 40, 3)


def test_emoji_are_drawn_at_any_size():
    source = EmojiSource("validation")
    for side in (16, 64, 72, 200):
        framed = FramedSource(source, Framing(side))
        np.testing.assert_array_equal(framed[3]["image"], source.emoji[3].load(side))
        assert framed.summary() == [] and framed.bucket_sizes == [(side, side)]
    framed = FramedSource(source, Framing(512, aspect_ratio_buckets=9))
    assert framed.bucket_sizes == [(512, 512)] and framed[3]["concept"] == source[3]["concept"]
    assert len(set(source.content_keys())) == len(source)
    part = source.read(3, frame_of((72, 72), (40, 20)))
    assert part.shape == (40, 20, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution 0: too small"),
        ({"crop": "left"}, "crop 'left': unknown; use center or random"),
        ({"interpolation": "cubic"}, "interpolation 'cubic': unknown; use one of lanczos, bicubic"),
        ({"aspect_ratio_buckets": 0}, "aspect_ratio_buckets 0: too few"),
        (
            {"resolution": 500, "aspect_ratio_buckets": 9},
            "resolution 500: does not fit; give a multiple of 8",
        ),
    ],
)
def test_bad_framing(options, message):
    with pytest.raises(UserError, match=message):
        Framing(**{"resolution": 512} | options)
