"""Folders and files that bring Python of their own, for every reader that goes through another library.

Each plants code that writes a marker file when it runs. Nothing may run it, whether the model is opened
without it or refused.
"""

import json
import pickle
import shutil

import pytest

from tests.captions import models
from tests.reference import run_reference

# A module that leaves a marker when it is imported, with classes of any name that a library may look for.
MODULE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor
class Evil:
    from_pretrained = classmethod(lambda cls, *arguments, **options: cls())
def generate(*arguments, **options):
    return None
"""

OPEN = """
    import json
    from keras_sd.captions.captioner import Captioner
    from keras_sd.captions.ranking import Clip
    from keras_sd.errors import UserError
    said = {}
    for name in json.loads((folder / "names.json").read_text()):
        kind, path = name
        try:
            opened = Clip(path) if kind == "clip" else Captioner(path)
            said[path] = "opened"
        except UserError as error:
            said[path] = str(error)
    (folder / "said.json").write_text(json.dumps(said))
"""

AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    "AutoProcessor": "evil.Evil",
    "AutoImageProcessor": "evil.Evil",
}


class Gadget:
    """What torch's files may hold: a call that leaves a marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({self.marker!r}, 'w').close()",))


def change_json(path, **entries):
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | entries))


def plant(folder, marker):
    """Puts the module into a folder, and its name into every JSON file that a library may look for it in."""
    code = MODULE.format(marker=str(marker))
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    names = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    for name in names:
        change_json(folder / name, auto_map=AUTO_MAP, trust_remote_code=True)


def clip_folder(source, folder, marker, text=(), vision=(), **entries):
    """A CLIP whose config asks for the planted module."""
    shutil.copytree(source, folder)
    plant(folder, marker)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= dict(text)
    config["model_cfg"]["vision_cfg"] |= dict(vision)
    (folder / "open_clip_config.json").write_text(json.dumps(config | entries))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What was said of each planted folder; the names of the markers that were left."""
    folder = tmp_path_factory.mktemp("planted")
    markers = folder / "markers"
    markers.mkdir()
    models.write_clip(folder / "clip")
    models.write_captioner(folder)
    trusting = {"tokenizer_kwargs": {"trust_remote_code": True}, "hf_tokenizer_name": "tokenizer"}
    clip_folder(folder / "clip", folder / "trusting", markers / "trusting", trusting)
    clip_folder(folder / "clip", folder / "mapped", markers / "mapped")
    foreign = {
        "hf_model_name": str(folder / "text"),
        "hf_proj_type": "linear",
        "hf_pooler_type": "cls_pooler",
    }
    clip_folder(folder / "clip", folder / "text", markers / "text", foreign)
    timm = {"timm_model_name": f"local-dir:{folder / 'timm'}"}
    clip_folder(folder / "clip", folder / "timm", markers / "timm", vision=timm)
    clip_folder(folder / "clip", folder / "pickle", markers / "mapped")
    (folder / "pickle" / "open_clip_model.safetensors").unlink()
    gadget = pickle.dumps({"state_dict": Gadget(str(markers / "pickle"))})
    for path in (folder / "pickle" / "open_clip_pytorch_model.bin", folder / "gadget.pt"):
        path.write_bytes(gadget)
    shutil.copytree(folder / "blip", folder / "blip-planted")
    plant(folder / "blip-planted", markers / "blip")
    names = [("clip", str(folder / name)) for name in ("trusting", "mapped", "text", "timm", "pickle")]
    names += [("clip", f"ViT-S-32-alt/{folder / 'gadget.pt'}"), ("blip", str(folder / "blip-planted"))]
    (folder / "names.json").write_text(json.dumps(names))
    run_reference(OPEN, {}, folder)
    said = json.loads((folder / "said.json").read_text())
    return {path.rpartition("/")[2]: line for path, line in said.items()}, sorted(
        path.name for path in markers.iterdir()
    )


def test_nothing_planted_runs(said):
    assert said[1] == []


def test_what_needs_no_planted_code_is_opened(said):
    assert said[0]["mapped"] == "opened"
    assert said[0]["blip-planted"] == "opened"


def test_what_asks_for_it_is_refused_in_one_line(said):
    lines = said[0]
    assert "text_cfg tokenizer_kwargs needs another library" in lines["trusting"]
    assert "text_cfg hf_model_name needs another library" in lines["text"]
    assert "vision_cfg timm_model_name needs another library" in lines["timm"]
    assert "torch" in lines["pickle"] and "cannot be opened" in lines["gadget.pt"]
    assert not any("\n" in line for line in lines.values())
