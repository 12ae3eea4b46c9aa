"""CLIP's files against open_clip itself, which runs in a process of its own."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from keras_sd.config import ImageEncoderConfig, TextEncoderConfig
from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json
from keras_sd.files.writing import write_json
from keras_sd.models.image_encoder import PIXEL_DEVIATION, PIXEL_MEAN, ImageEncoder
from keras_sd.models.text_encoder import TextEncoder
from keras_sd.weights import rules
from keras_sd.weights.checkpoint import Checkpoint, Part
from keras_sd.weights.open_clip import open_clip_config, read_open_clip, write_open_clip
from keras_sd.weights.safetensors_files import read_safetensors, write_safetensors
from tests import tiny
from tests.reference import run_reference

TOKENS, VOCABULARY, SIDE = 10, 50, 16
UNUSUAL_END = 7
TOLERANCE = 1e-4

# Its heads are 64 wide, as a file without a config beside it is understood.
PLAIN = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "layers": 2, "width": 128, "mlp_ratio": 2.0},
    "text_cfg": {
        "context_length": TOKENS,
        "vocab_size": VOCABULARY,
        "layers": 2,
        "width": 64,
        "heads": 1,
        "mlp_ratio": 2.0,
    },
}
# What only the config beside a file can tell: the activation, narrow heads, epsilon and the end token.
UNUSUAL = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": PLAIN["vision_cfg"] | {"head_width": 16, "norm_kwargs": {"eps": 1e-2}},
    "text_cfg": PLAIN["text_cfg"] | {"heads": 4, "pool_type": "eos", "eos_id": UNUSUAL_END},
}
PUBLISHED = {
    "ViT-B-32": "gelu",
    "ViT-L-14-quickgelu": "quick_gelu",
    "ViT-L-14-336": "gelu",
    "ViT-H-14": "gelu",
    "ViT-bigG-14": "gelu",
}

REFERENCE = """
import json
import open_clip
from open_clip.model import CLIP, CustomTextCLIP

pixels = inputs["pixels"]
plain, unusual, published = json.loads((folder / "configs.json").read_text())


def store_outputs(model, group, ids=inputs["ids"].long()):
    outputs[f"{group}/text"] = model.encode_text(ids)
    outputs[f"{group}/text_normalized"] = model.encode_text(ids, normalize=True)
    outputs[f"{group}/image"] = model.encode_image(pixels)
    outputs[f"{group}/image_normalized"] = model.encode_image(pixels, normalize=True)


model = randomize(CLIP(**plain))
store_outputs(model, "plain")
save_file(model.state_dict(), folder / "plain.safetensors")
training = {"module." + name: tensor for name, tensor in model.state_dict().items()}
torch.save({"epoch": 3, "name": "plain", "state_dict": training, "optimizer": {}}, folder / "epoch_3.pt")

custom = CustomTextCLIP(**plain)
custom.visual.load_state_dict(model.visual.state_dict())
custom.text.load_state_dict(
    {n: a for n, a in model.state_dict().items() if not n.startswith(("visual.", "logit_scale"))}
)
custom.logit_scale.copy_(model.logit_scale)
torch.save(custom.state_dict(), folder / "custom.bin")

model = randomize(CLIP(**unusual))
store_outputs(model, "unusual", inputs["unusual_ids"].long())
(folder / "unusual").mkdir()
save_file(model.state_dict(), folder / "unusual" / "open_clip_model.safetensors")

# As OpenAI's originals: a TorchScript archive, half precision, the image's side and the mask as buffers.
model = randomize(CLIP(**plain, quick_gelu=True)).half().float()
store_outputs(model, "openai")
mask = model.attn_mask
del model.attn_mask
model.register_buffer("attn_mask", mask)
model.register_buffer("input_resolution", torch.tensor(pixels.shape[-1]))
torch.jit.trace(model, (pixels, inputs["ids"].long()), check_trace=False).half().save(folder / "traced.pt")

resnet = CLIP(12, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, plain["text_cfg"])
save_file(resnet.state_dict(), folder / "resnet.safetensors")
averaging = CLIP(**plain | {"vision_cfg": plain["vision_cfg"] | {"no_ln_pre": True}})
save_file(averaging.state_dict(), folder / "no_ln_pre.safetensors")

# Full-size models without values, and their configs.
listed = {}
for name in published:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        shapes = {n: list(a.shape) for n, a in CLIP(**config).state_dict().items()}
    listed[name] = {"config": config, "shapes": shapes}
(folder / "published.json").write_text(json.dumps(listed))

for group in ("written", "written_half"):
    model = open_clip.create_model(f"local-dir:{folder / group}", precision="fp32").eval()
    outputs[f"{group}/text"] = model.encode_text(inputs["ids"].long())
    outputs[f"{group}/image"] = model.encode_image(pixels)
    outputs[f"{group}/logit_scale"] = model.logit_scale
"""


def pictures():
    return np.random.default_rng(0).uniform(-1, 1, (3, SIDE, SIDE, 3)).astype("float32")


def token_ids(end_token=VOCABULARY - 1):
    """Texts of several lengths, each with one end token."""
    ids = np.random.default_rng(1).integers(8, VOCABULARY - 1, (3, TOKENS)).astype("int32")
    ids[[0, 1, 2], [4, 9, 6]] = end_token
    return ids


def own_clip():
    """Towers as the bundled model's: narrow heads, the last token ends a text."""
    text = TextEncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=TOKENS,
        projection_dim=12,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
    )
    image = dataclasses.replace(tiny.IMAGE_ENCODER, image_size=SIDE)
    text_encoder, image_encoder = tiny.randomize(TextEncoder(text), 1), tiny.randomize(ImageEncoder(image), 2)
    projection = np.random.default_rng(3).standard_normal((12, 24)).astype("float32")
    head = {"text_projection.weight": projection, "logit_scale": np.array(2.5, "float32")}
    return SimpleNamespace(text_encoder=text_encoder, image_encoder=image_encoder, head=head)


def own_checkpoint(clip):
    text, image = (
        Part(model.config.to_dict(), rules.torch_state(model), Path("own"))
        for model in (clip.text_encoder, clip.image_encoder)
    )
    return Checkpoint(
        {"text_encoder": text, "image_encoder": image._replace(tensors=image.tensors | clip.head)}
    )


def open_towers(checkpoint):
    text, image = checkpoint.parts["text_encoder"], checkpoint.parts["image_encoder"]
    tensors = dict(image.tensors)
    head = {name: tensors.pop(name) for name in ("text_projection.weight", "logit_scale")}
    text_encoder = TextEncoder(TextEncoderConfig.from_dict(text.config))
    image_encoder = ImageEncoder(ImageEncoderConfig.from_dict(image.config))
    rules.load_weights(text_encoder, text.tensors, source=text.source)
    rules.load_weights(image_encoder, tensors, source=image.source)
    return SimpleNamespace(text_encoder=text_encoder, image_encoder=image_encoder, head=head)


def embeddings(clip, ids=None):
    """Projected texts and images."""
    projection = clip.head["text_projection.weight"].astype("float32")
    return np.asarray(
        clip.text_encoder.pooled(token_ids() if ids is None else ids)
    ) @ projection.T, np.asarray(clip.image_encoder(pictures()))


def assert_close(ours, reference):
    assert np.abs(ours - reference).max() <= TOLERANCE * np.abs(reference).max()


@pytest.fixture(scope="module")
def own():
    return own_clip()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, own):
    folder = tmp_path_factory.mktemp("open_clip")
    for group, dtype in (("written", None), ("written_half", "float16")):
        (folder / group).mkdir()
        write_open_clip(folder / group / "open_clip_model.safetensors", own_checkpoint(own), dtype)
    (folder / "configs.json").write_text(json.dumps([PLAIN, UNUSUAL, list(PUBLISHED)]))
    pixels = ((pictures() + 1) / 2 - PIXEL_MEAN) / PIXEL_DEVIATION
    arrays = {
        "ids": token_ids(),
        "unusual_ids": token_ids(UNUSUAL_END),
        "pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), "float32"),
    }
    outputs = run_reference(REFERENCE, arrays, folder)
    write_json(folder / "unusual" / "open_clip_config.json", {"model_cfg": UNUSUAL})
    return SimpleNamespace(folder=folder, outputs=outputs)


def normalized(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("file", "group", "activation"),
    [
        ("plain.safetensors", "plain", "gelu"),
        ("epoch_3.pt", "plain", "gelu"),
        ("custom.bin", "plain", "gelu"),
        ("unusual/open_clip_model.safetensors", "unusual", "quick_gelu"),
        ("traced.pt", "openai", "quick_gelu"),
    ],
)
def test_embeddings_are_those_of_open_clip(reference, file, group, activation):
    checkpoint = read_open_clip(reference.folder / file)
    assert {part.config["hidden_act"] for part in checkpoint.parts.values()} == {activation}
    text, image = embeddings(
        open_towers(checkpoint), token_ids(UNUSUAL_END) if group == "unusual" else token_ids()
    )
    for name, ours in (("text", text), ("image", image)):
        assert_close(ours, reference.outputs[f"{group}/{name}"])
        assert_close(normalized(ours), reference.outputs[f"{group}/{name}_normalized"])


def test_activation_follows_the_argument_the_config_and_the_name(reference):
    def activation_of(path, **options):
        return read_open_clip(path, **options).parts["image_encoder"].config["hidden_act"]

    plain, folder = reference.folder / "plain.safetensors", reference.folder / "names"
    folder.mkdir()
    for name in ("vit_b_32-quickgelu-laion400m.safetensors", "ViT-B-32-openai.safetensors"):
        (folder / name).symlink_to(plain)
        assert activation_of(folder / name) == "quick_gelu"
    assert activation_of(plain) == "gelu"
    assert activation_of(plain, activation="quick_gelu") == "quick_gelu"
    unusual = reference.folder / "unusual" / "open_clip_model.safetensors"
    assert activation_of(unusual, activation="gelu") == "gelu"
    with pytest.raises(UserError, match="activation 'relu'"):
        read_open_clip(plain, activation="relu")


@pytest.mark.parametrize("group", ["written", "written_half"])
def test_open_clip_opens_what_is_written(reference, own, group):
    text, image = embeddings(own)
    tolerance = TOLERANCE if group == "written" else 1e-2
    for name, ours in (("text", text), ("image", image)):
        theirs = reference.outputs[f"{group}/{name}"]
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
    assert reference.outputs[f"{group}/logit_scale"] == 2.5


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_round_trip_is_exact(reference, tmp_path, dtype):
    original = reference.folder / "unusual" / "open_clip_model.safetensors"
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    write_open_clip(first, read_open_clip(original), dtype)
    write_open_clip(second, read_open_clip(first))
    assert second.read_bytes() == first.read_bytes()
    if dtype is None:
        written, tensors = read_safetensors(first), read_safetensors(original)
        assert written.keys() == tensors.keys()
        for name, array in tensors.items():
            np.testing.assert_array_equal(written[name], array)
    config = read_json(tmp_path / "open_clip_config.json")["model_cfg"]
    assert _with_defaults(config) == _with_defaults(UNUSUAL)


def test_own_clip_comes_back(reference, own):
    given = own_checkpoint(own).parts
    parts = read_open_clip(reference.folder / "written" / "open_clip_model.safetensors").parts
    for name, part in given.items():
        assert parts[name].config == part.config
        assert parts[name].tensors.keys() == part.tensors.keys()
        for key, array in part.tensors.items():
            np.testing.assert_array_equal(parts[name].tensors[key], array)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_derived(reference, tmp_path, name):
    published = read_json(reference.folder / "published.json")[name]
    path = tmp_path / f"{name}.safetensors"
    _write_without_values(path, published["shapes"])
    checkpoint = read_open_clip(path)
    text, image = (checkpoint.parts[part].config for part in ("text_encoder", "image_encoder"))
    assert text["hidden_act"] == PUBLISHED[name]
    assert _with_defaults(open_clip_config(text, image)) == _with_defaults(published["config"])


def _write_without_values(path, shapes):
    """A safetensors file of float32 zeros that takes no room on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _with_defaults(config):
    """A config of OpenCLIP's with the values that it means by leaving a key out."""
    vision = {"head_width": 64, "mlp_ratio": 4.0} | config["vision_cfg"]
    text = {"heads": 8, "mlp_ratio": 4.0} | config["text_cfg"]
    return {"quick_gelu": False} | config | {"vision_cfg": vision, "text_cfg": text}


@pytest.mark.parametrize("file", ["resnet.safetensors", "no_ln_pre.safetensors"])
def test_other_architectures_are_refused(reference, file):
    with pytest.raises(UserError) as error:
        read_open_clip(reference.folder / file)
        open_towers(read_open_clip(reference.folder / file))
    assert str(reference.folder / file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tower", "value"),
    [("vision_cfg", {"pool_type": "avg"}), ("text_cfg", {"no_causal_mask": True, "pool_type": "last"})],
)
def test_configs_of_other_architectures_are_refused(reference, tmp_path, tower, value):
    path = tmp_path / "open_clip_model.safetensors"
    path.symlink_to(reference.folder / "plain.safetensors")
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": PLAIN | {tower: PLAIN[tower] | value}})
    with pytest.raises(UserError, match=f"{tower}.*not supported"):
        read_open_clip(path)
    for config in ([], {"model_cfg": {}}, {"model_cfg": PLAIN | {"text_cfg": {"heads": 0}}}):
        write_json(tmp_path / "open_clip_config.json", config)
        with pytest.raises(UserError, match="open_clip_config.json"):
            read_open_clip(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"visual.conv1.weight": None}, "patch_embedding.weight' is missing or has"),
        (
            {"visual.positional_embedding": np.zeros((0, 128), "f")},
            "position_embedding.weight' is missing or has",
        ),
        ({"token_embedding.weight": np.zeros((), "f")}, "token_embedding.weight' is missing or has"),
        ({"visual.proj": np.zeros((), "f")}, "visual_projection.weight' is missing or has"),
        ({"visual.trunk.stem.weight": np.zeros(3, "f"), "logit_bias": np.zeros((), "f")}, "2 of its tensors"),
    ],
)
def test_damaged_files_are_refused_in_one_line(reference, tmp_path, change, fault):
    tensors = read_safetensors(reference.folder / "plain.safetensors") | change
    path = tmp_path / "damaged.safetensors"
    write_safetensors(path, {name: array for name, array in tensors.items() if array is not None})
    with pytest.raises(UserError, match=fault) as error:
        read_open_clip(path)
    assert "\n" not in str(error.value)


def test_only_a_whole_clip_is_written(own, tmp_path):
    checkpoint = own_checkpoint(own)
    path = tmp_path / "clip.safetensors"
    with pytest.raises(UserError, match="no image_encoder"):
        write_open_clip(path, Checkpoint({"text_encoder": checkpoint.parts["text_encoder"]}))
    image = checkpoint.parts["image_encoder"]
    headless = image._replace(tensors={n: a for n, a in image.tensors.items() if n != "logit_scale"})
    with pytest.raises(UserError, match="no logit_scale"):
        write_open_clip(path, Checkpoint(checkpoint.parts | {"image_encoder": headless}))
    wider = image._replace(config=image.config | {"projection_dim": 13})
    with pytest.raises(UserError, match="projection_dim is 12 in the text tower, 13 in the image tower"):
        write_open_clip(path, Checkpoint(checkpoint.parts | {"image_encoder": wider}))
    with pytest.raises(UserError, match="safetensors"):
        write_open_clip(tmp_path / "clip.bin", checkpoint)
    assert not list(tmp_path.iterdir())
