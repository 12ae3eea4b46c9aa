"""CLIP and BLIP themselves, in a process of torch's that writes down what they said."""

import json

import numpy as np
import pytest

from keras_sd.metrics.clip_score import embed_captions
from keras_sd.pipeline.stable_diffusion import StableDiffusion
from tests.captions import models
from tests.reference import run_reference

COUNT = 40

SAY = """
    import json
    import numpy as np
    from PIL import Image
    from keras_sd.captions.captioner import Captioner
    from keras_sd.captions.interrogator import MODES, Interrogator
    from keras_sd.captions.ranking import Clip
    from keras_sd.captions.vocabulary import Vocabulary
    from keras_sd.errors import UserError

    torch.set_grad_enabled(True)
    clip = Clip(folder / "clip", cache_folder=folder / "cache")
    captioner = Captioner(folder / "blip")
    paths = sorted((folder / "images").glob("*.png"))
    images = [Image.open(path).convert("RGB") for path in paths]
    names = Vocabulary.read(flavors=folder / "names.txt")
    lists = Vocabulary(
        artists=("Claude Monet", "Hokusai"), mediums=("an icon", "a photo"), movements=("flat", "de stijl"),
        flavors=names.flavors[:60], negative=("blurry", "a text"),
    )
    said = {"names": [path.name for path in paths]}
    features = clip.encode_images(images)
    said["fast"] = Interrogator(clip, names, maximum_phrases=5).describe(images, "fast")
    files = list((folder / "cache").iterdir())
    said["files"] = [path.name for path in files]
    vectors = clip.phrase_vectors(names.phrases)
    again = Clip(folder / "clip", cache_folder=folder / "cache")
    said["cached"] = bool((again.phrase_vectors(names.phrases) == vectors).all())
    for path in files:
        path.write_bytes(b"damaged")
    again = Clip(folder / "clip", cache_folder=folder / "cache")
    said["mended"] = bool((again.phrase_vectors(names.phrases) == vectors).all())
    few = images[:3]
    teller = Interrogator(clip, lists, captioner, maximum_phrases=6)
    said["modes"] = {mode: teller.describe(few, mode) for mode in MODES}
    said["similarities"] = {
        mode: (features[:3] * clip.encode_texts(texts)).sum(axis=1).tolist()
        for mode, texts in said["modes"].items()
    }
    # The small BLIP's sentence fills all of CLIP's 32 tokens; without one, the chain of phrases is seen.
    alone = Interrogator(clip, lists, maximum_phrases=4)
    said["alone"] = {
        mode: (features[:3] * clip.encode_texts(alone.describe(few, mode))).sum(axis=1).tolist()
        for mode in ("best", "fast", "classic")
    }
    said["ids"] = clip._tokenize(["red heart", "flag: Japan " * 20]).tolist()
    said["errors"] = []
    for name in ("ViT-L-15/openai", "ViT-L-14/nobody", str(folder)):
        try:
            Clip(name)
        except UserError as error:
            said["errors"].append(str(error))
    try:
        Captioner(folder / "clip")
    except UserError as error:
        said["errors"].append(str(error))
    np.save(folder / "texts.npy", clip.encode_texts(["red heart", "flag: Japan"]))
    (folder / "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    models.write_models(folder)
    return folder


@pytest.fixture(scope="module")
def names(folder):
    return models.write_emoji(folder / "images", COUNT)


@pytest.fixture(scope="module")
def said(folder, names):
    run_reference(SAY, {}, folder)
    return json.loads((folder / "said.json").read_text())


def test_clip_is_the_bundled_one(folder, said):
    pipeline = StableDiffusion.from_preset("emoji")
    for texts, ids in ((["red heart"], said["ids"][:1]), (["flag: Japan " * 20], said["ids"][1:])):
        with pytest.MonkeyPatch.context() as context:
            context.setattr("warnings.warn", lambda *_, **__: None)  # of the text that is too long
            np.testing.assert_array_equal(pipeline.tokenizer(texts), ids)
    texts = np.load(folder / "texts.npy")
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    projection = pipeline.clip_head["text_projection.weight"]
    own = embed_captions(pipeline.text_encoder, pipeline.tokenizer, projection, ["red heart", "flag: Japan"])
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_allclose(texts, own, atol=1e-5)


def test_names_are_found(said, names):
    found = [
        names[name] in caption.split(", ") for name, caption in zip(said["names"], said["fast"], strict=True)
    ]
    assert np.mean(found) >= 0.7


def test_phrase_vectors_are_kept_and_made_again_if_damaged(said):
    assert len(said["files"]) == 1 and said["files"][0].endswith(".safetensors")
    assert said["cached"] and said["mended"]


def test_modes(said):
    modes, similarities = said["modes"], said["similarities"]
    for row, sentence in enumerate(modes["caption"]):
        assert 0 < len(sentence.split()) <= 32
        assert modes["fast"][row].startswith(f"{sentence}, ")
        assert len(modes["fast"][row].split(", ")) <= 7
        classic = modes["classic"][row].removeprefix(sentence)
        assert " by " in classic and classic.split(", ")[1].startswith(("an icon", "a photo"))
        for mode in ("caption", "fast", "classic", "negative"):
            assert similarities["best"][row] >= similarities[mode][row]
        assert similarities["negative"][row] < min(0, similarities["caption"][row])
    best, fast, classic = (np.array(said["alone"][mode]) for mode in ("best", "fast", "classic"))
    assert (best > np.maximum(fast, classic)).all()


def test_errors(said):
    unknown, weights, no_folder, no_captioner = said["errors"]
    assert "'ViT-L-15': open_clip has no such model; try ViT-L-16" in unknown
    assert "no weights 'nobody'; write ViT-L-14/" in weights
    assert "no open_clip_config.json" in no_folder
    assert "give a BLIP model, or `captioner=None`" in no_captioner and "\n" not in no_captioner
