"""Masks of training images: where they are, what a frame takes of them, and what is refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from keras_sd.data.framing import FramedSource, Framing, frame_of
from keras_sd.data.images import read_frame
from keras_sd.data.masks import MaskFiles
from keras_sd.data.sources import load_config, load_source
from keras_sd.errors import BadSamples, UserError


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, "uint8")).save(path)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, "uint8")


@pytest.fixture
def folder(tmp_path):
    """Two images of other ratios with masks of other formats, one of them in a sub-folder."""
    save(noise(24, 40, 3), tmp_path / "images" / "a.png")
    save(noise(40, 24, 3, seed=1), tmp_path / "images" / "below" / "b.png")
    save(noise(24, 40, seed=2), tmp_path / "masks" / "a.webp")
    save(noise(40, 24, 3, seed=3), tmp_path / "masks" / "below" / "b.bmp")
    return tmp_path


def opened(folder, files, **options):
    return load_source(folder / "images", "train", 16, False, masks=files, **options)


def of_folder(folder, **options):
    return MaskFiles(mask_data_dir=folder / "masks", **options)


def test_masks_are_cropped_as_their_images(folder):
    source = opened(folder, of_folder(folder))
    framed = FramedSource(source, Framing(16, random_flip=True, crop="random"))
    masks = [Image.open(folder / "masks" / name).convert("L") for name in ("a.webp", "below/b.bmp")]
    for index, mask in enumerate(masks):
        box = frame_of(source.sizes()[index], (16, 16)).box
        expected = mask.resize((16, 16), Image.Resampling.BOX, (box[1], box[0], box[3], box[2]))
        np.testing.assert_array_equal(framed.mask(index), expected)
        np.testing.assert_array_equal(framed.flipped().mask(index), np.asarray(expected)[:, ::-1])
    drawn = framed.draw_example(1, np.random.default_rng(5))
    frame = framed.draw_frame(1, np.random.default_rng(5))
    np.testing.assert_array_equal(
        drawn["mask"][:, ::-1] if frame.flip else drawn["mask"],
        source.read_mask(1, dataclasses.replace(frame, flip=False)),
    )
    assert drawn["mask"].shape == (16, 16) and "mask" not in framed[0]


def test_weight_of_what_is_masked_out(folder):
    plain, weighted = (
        FramedSource(opened(folder, of_folder(folder, **options)), Framing(16))
        for options in ({}, {"unmasked_weight": 0.4})
    )
    np.testing.assert_array_equal(weighted.mask(0), np.maximum(plain.mask(0), 102))
    assert weighted.mask_keys() != plain.mask_keys()
    assert weighted.fingerprint() != plain.fingerprint()


def test_alpha_channel_is_the_mask(tmp_path):
    pixels = noise(20, 20, 4)
    save(pixels, tmp_path / "images" / "a.png")
    save(pixels[..., :3], tmp_path / "images" / "b.png")
    palette = Image.fromarray(pixels[..., :3]).quantize(4)
    palette.info["transparency"] = 1
    palette.save(tmp_path / "images" / "c.png", transparency=1)
    source = opened(tmp_path, MaskFiles(alpha_mask=True))
    assert any("1 of 3 images have no alpha channel and count as a whole" in note for note in source.notes)
    masks = [FramedSource(source, Framing(20, interpolation="nearest")).mask(index) for index in range(3)]
    np.testing.assert_array_equal(masks[0], pixels[..., 3])
    assert (masks[1] == 255).all()
    np.testing.assert_array_equal(masks[2], np.where(np.asarray(palette) == 1, 0, 255))


def test_brightness_of_transparent_masks(tmp_path):
    pixels = noise(20, 20, 4)
    pixels[..., :3] = 200
    save(pixels, tmp_path / "mask.png")
    found = read_frame(tmp_path / "mask.png", frame_of((20, 20), (20, 20)), of="brightness")
    np.testing.assert_allclose(found, 200 * (pixels[..., 3] / 255), atol=1)


def test_changed_mask_changes_the_fingerprint(folder):
    source = opened(folder, of_folder(folder))
    fingerprint, keys = source.fingerprint(), source.mask_keys()
    save(noise(24, 40, seed=9), folder / "masks" / "a.webp")
    source = opened(folder, of_folder(folder))
    assert source.fingerprint() != fingerprint
    assert [one == other for one, other in zip(source.mask_keys(), keys, strict=True)] == [False, True]


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (lambda masks: (masks / "a.webp").unlink(), r"a\.png: has no mask; add \S+masks/a\.png"),
        (
            lambda masks: save(noise(24, 39), masks / "a.webp"),
            "mask of 39 x 24 pixels, but .*a.png has 40 x 24; make both the same size",
        ),
        (lambda masks: save(noise(24, 40), masks / "a.png"), "has 2 masks in .* remove the others"),
        (lambda masks: (masks / "a.webp").write_bytes(b"RIFF0000WEBP"), "truncated or damaged image"),
    ],
)
def test_faulty_masks_are_named_or_left_out(folder, spoil, fault):
    spoil(folder / "masks")
    with pytest.raises(UserError, match=fault):
        opened(folder, of_folder(folder))
    source = opened(folder, of_folder(folder), on_bad_sample="skip")
    assert [source.details(index)["path"] for index in range(len(source))] == [
        str(folder / "images" / "below" / "b.png")
    ]


def test_all_faults_are_named_together(folder):
    for name in ("a.webp", "below/b.bmp"):
        (folder / "masks" / name).unlink()
    save(noise(20, 20), folder / "masks" / "c.png")
    with pytest.raises(BadSamples, match="2 faulty examples"):
        opened(folder, of_folder(folder))


def test_refused(folder, tmp_path):
    with pytest.raises(UserError, match="none: no such folder of masks"):
        opened(folder, MaskFiles(mask_data_dir=tmp_path / "none"))
    with pytest.raises(UserError, match="alpha_mask: no image in .* has an alpha channel"):
        opened(folder, MaskFiles(alpha_mask=True))
    with pytest.raises(UserError, match="`alpha_mask=True` is given too"):
        MaskFiles(True, folder)
    with pytest.raises(UserError, match="unmasked_weight 0.5: has no effect without"):
        MaskFiles(unmasked_weight=0.5)
    with pytest.raises(UserError, match="emoji: masks are read from folders of images alone"):
        load_source("emoji", "train", 16, masks=MaskFiles(alpha_mask=True))


def test_unused_masks_are_counted(folder):
    save(noise(20, 20), folder / "masks" / "c.png")
    source = opened(folder, of_folder(folder))
    assert any("1 masks are of no image that is used, the first is 'c.png'" in note for note in source.notes)


def test_black_mask_warns_once(folder):
    for name in ("a.webp", "below/b.bmp"):
        mask = np.zeros(np.asarray(Image.open(folder / "masks" / name)).shape[:2])
        mask[0, 0] = mask[-1, -1] = 255  # outside the squares in the middle
        save(mask, folder / "masks" / name)
    framed = FramedSource(opened(folder, of_folder(folder)), Framing(16))
    with pytest.warns(UserWarning, match="nothing is learned from this image") as caught:
        framed.mask(0), framed.mask(1)
    assert len(caught) == 1


@pytest.mark.parametrize(("value", "fault"), [(0, "all masks are black"), (1, "no value above 1 of 255")])
def test_masks_that_count_nothing(folder, value, fault):
    for name in ("a.png", "below/b.png"):
        shape = np.asarray(Image.open(folder / "images" / name)).shape[:2]
        save(np.full(shape, value), folder / "values" / name)
    with pytest.raises(UserError, match=f"values: .*{fault}.*, so nothing would be learned; make white"):
        opened(folder, MaskFiles(mask_data_dir=folder / "values"))
    pixels = noise(20, 20, 4)
    pixels[..., 3] = 0
    save(pixels, folder / "clear" / "a.png")
    with pytest.raises(UserError, match="all images are transparent, so nothing would be learned; make opaq"):
        load_source(folder / "clear", "train", 16, False, masks=MaskFiles(alpha_mask=True))


def test_places_of_masks(folder):
    """Inside the folder of the images, in sub-folders of a split, and not the folder of the images itself."""
    (folder / "masks").rename(folder / "images" / "masks")
    masks = MaskFiles(mask_data_dir=folder / "images" / "masks")
    source = opened(folder, masks)
    assert len(source) == 2 and any("masks of 2 of 2 images" in note for note in source.notes)
    with pytest.raises(
        UserError, match="images: is the folder of the images; give the folder of their masks"
    ):
        opened(folder, MaskFiles(mask_data_dir=folder / "images"))
    save(noise(20, 20, 3), folder / "split" / "train" / "a.png")
    save(noise(20, 20), folder / "of-split" / "train" / "a.png")
    of_split = MaskFiles(mask_data_dir=folder / "of-split")
    assert load_source(folder / "split", "train", 16, False, masks=of_split).has_masks


def test_file_of_data_sets(folder):
    path = folder / "sets.toml"
    path.write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}/images'\nclass_tokens = 'cat'\n"
        f"conditioning_data_dir = '{folder}/masks'\nunmasked_weight = 0.2\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}/masks'\nclass_tokens = 'dog'\n"
    )
    source = load_config(path, 16)
    framed = FramedSource(source, Framing(16))
    assert framed.has_masks and len(set(framed.mask_keys())) == 3
    assert framed.mask(0).min() >= 51 and (framed.mask(2) == 255).all()
    path.write_text(path.read_text().replace(f"conditioning_data_dir = '{folder}/masks'\n", ""))
    with pytest.raises(UserError, match="subset 1: unmasked_weight has no effect without alpha_mask or"):
        load_config(path, 16)
    masks = f"conditioning_data_dir = '{folder}/masks'\nalpha_mask = true"
    path.write_text(path.read_text().replace("unmasked_weight = 0.2", masks))
    with pytest.raises(UserError, match="conditioning_data_dir and alpha_mask are both given; leave one out"):
        load_config(path, 16)
