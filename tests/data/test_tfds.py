"""TFDS keeps its folder's place from import on, so each check runs in a process of its own."""

import json
import os
import subprocess
import sys

TINY = """
import numpy as np
import tensorflow_datasets as tfds

class TinyShapes(tfds.core.GeneratorBasedBuilder):
    name = "tiny_shapes"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["disc", "oval_ring"])
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(4):
            yield i, {"image": np.full((30, 40, 3), 50 * i, "uint8"), "label": i % 2}
"""


def run(code, folder):
    environment = os.environ | {"TFDS_DATA_DIR": str(folder / "prepared"), "KERAS_BACKEND": "jax"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_emoji_captions_builds_and_reads_back(tmp_path):
    build = "from keras_sd.data.sources import load_source; load_source('emoji_captions', 'train', 64)"
    result = run(build, tmp_path)  # TFDS writes with TensorFlow
    assert result.returncode == 0, result.stderr[-3000:]
    code = """
import sys
import numpy as np
from keras_sd.data.sources import available_splits, load_source
from keras_sd.data.emoji.source import load_emoji

source = load_source("emoji_captions", "validation", 64)
assert len(source) == 200
emoji = {e.captions: e for e in load_emoji() if e.split == "validation"}
for index in range(len(source)):
    example = source[index]
    np.testing.assert_array_equal(example["image"], emoji.pop(example["captions"]).load(64))
assert not emoji
assert len(load_source("emoji_captions", "train", 64)) == 3578
assert set(available_splits("emoji_captions")) == {"train", "validation"}
assert "tensorflow" not in sys.modules
print("ok")
"""
    result = run(code, tmp_path)
    assert result.stdout.strip().endswith("ok"), result.stderr[-3000:]


def test_class_names_become_captions_and_faults_one_line(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "__init__.py").touch()
    (tmp_path / "tiny" / "tiny_shapes.py").write_text(TINY)
    code = """
import tiny.tiny_shapes
from keras_sd.data.framing import FramedSource, Framing
from keras_sd.data.sources import load_source
from keras_sd.errors import UserError

source = load_source("tiny_shapes", "train", 16)
assert len(source) == 4
examples = {int(source[i]["image"][0, 0, 0]): source[i]["captions"] for i in range(4)}
assert examples[0] == ("disc", "a photo of a disc"), examples
assert examples[150] == ("oval ring", "a photo of an oval ring"), examples
assert source.sizes().tolist() == [[30, 40]] * 4 and len(set(source.content_keys())) == 4
assert source.captions() == [source[i]["captions"] for i in range(4)]
import keras_sd.data.images
keras_sd.data.images.read_frame, decoded = None, load_source("tiny_shapes", "train", 16)  # from the catalogue
assert decoded.sizes().tolist() == source.sizes().tolist()
framed = FramedSource(source, Framing(16, aspect_ratio_buckets=3))
assert framed[1]["image"].shape == (16, 16, 3) and framed[1]["captions"] == source.captions()[1]
for name, split in (("tiny_shapes", "test"), ("no_such_set", "train")):
    try:
        load_source(name, split, 16)
    except UserError as error:
        print(error)
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    split, name = result.stdout.strip().splitlines()[-2:]
    assert split == "data set tiny_shapes: no split 'test'; it has train"
    assert name.startswith("no_such_set: neither a folder nor a data set that TFDS knows")


def test_pixels_that_cannot_be_decoded(tmp_path):
    """In files that TFDS has prepared from faulty ones, as it copies their bytes."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "__init__.py").touch()
    cut = """
import io
from PIL import Image

def encoded(i):
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), 50 * i, "uint8")).save(file, "JPEG")
    content = file.getvalue()
    return io.BytesIO(content[:-40] if i == 2 else content)
"""
    made = TINY.replace('np.full((30, 40, 3), 50 * i, "uint8")', "encoded(i)")
    made = made.replace("tfds\n", f"tfds\n{cut}", 1)
    (tmp_path / "tiny" / "tiny_shapes.py").write_text(made)
    code = """
import tiny.tiny_shapes
from keras_sd.data.sources import load_source
from keras_sd.errors import UserError

try:
    load_source("tiny_shapes", "train", 16)
except UserError as error:
    print(error)
source = load_source("tiny_shapes", "train", 16, on_bad_sample="skip")
print(*source.notes)
assert len(source) == len(source.sizes()) == len(source.captions()) == len(source.content_keys()) == 3
assert sorted(round(int(source[i]["image"].mean()) / 50) for i in range(3)) == [0, 1, 3]
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    fault, note = result.stdout.strip().splitlines()[-2:]
    assert fault.startswith("data set tiny_shapes, train") and "truncated or damaged" in fault
    assert "1 faulty examples are left out" in note


def test_missing_package_is_named(tmp_path):
    code = """
import sys
sys.modules["tensorflow_datasets"] = None  # as if it were not installed
from keras_sd.data.sources import load_source
load_source("oxford_flowers102", "train", 16)
"""
    result = run(code, tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert "UserError: tensorflow_datasets: not installed; pip install 'keras_sd[tfds]', or give" in last


def test_a_feature_of_another_module_is_refused_and_not_imported(tmp_path):
    """TFDS imports the module of a feature, which may lie in the folder that the program is started from."""
    folder = tmp_path / "prepared" / "planted" / "1.0.0"
    folder.mkdir(parents=True)
    (tmp_path / "evil.py").write_text("open('marker', 'w').close()")
    own = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    features = {"image": {"pythonClassName": "evil.Feature"}}
    content = {"pythonClassName": own, "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(content))
    splits = [{"name": "train", "shardLengths": ["1"], "numBytes": "1"}]
    info = {"name": "planted", "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    code = "from keras_sd.data.sources import load_source; load_source('planted', 'train', 16)"
    result = run(code, tmp_path)
    assert "names the feature 'evil.Feature', which is not TFDS' own" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "marker").exists()
