"""The bundled CLIP for open_clip, a small BLIP of the real class, and a folder of emoji."""

import json

from PIL import Image

from keras_sd.cli.convert import convert
from keras_sd.data.emoji.source import load_emoji
from tests.programs import Program
from tests.reference import run_reference

BLIP = """
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor
    from transformers import BlipProcessor
    blip = str(folder / "blip")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    words = [*special, *"a red blue heart face on of the".split()]
    with open(blip + "/vocab.txt", "w") as file:
        file.write("\\n".join(words))
    tokenizer = BertTokenizerFast(blip + "/vocab.txt", additional_special_tokens=["[DEC]"])
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 5, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**size, **text, "pad_token_id": 0, "sep_token_id": 3, "max_position_embeddings": 64},
        vision_config={**size, "image_size": 32, "patch_size": 8},
    )
    model = BlipForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(blip)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(images, tokenizer).save_pretrained(blip)
"""


def start_caption(*arguments):
    """Starts `keras-sd caption`."""
    return Program(["-m", "keras_sd", "caption", *arguments])


def caption(*arguments):
    """`keras-sd caption`: (exit code, standard output, standard error)."""
    done = start_caption(*arguments).finish()
    return done.returncode, done.stdout, done.stderr


def write_models(folder):
    """The folders `clip` and `blip`, and `names.txt`, the vocabulary of the emoji's names."""
    write_clip(folder / "clip")
    write_captioner(folder)
    write_vocabulary(folder / "names.txt")


def write_clip(folder):
    convert.main(["emoji", str(folder), "--open-clip"], standalone_mode=False)


def write_captioner(folder):
    (folder / "blip").mkdir()
    run_reference(BLIP, {}, folder)


def write_emoji(folder, count):
    """Images of base concepts that CLIP was trained on, and their names by file name."""
    folder.mkdir(parents=True)
    emoji = [e for e in load_emoji() if e.split == "train" and e.code == e.concept]
    names = {}
    for e in emoji[:: len(emoji) // count][:count]:
        Image.fromarray(e.load(64)).save(folder / f"{e.code}.png")
        names[f"{e.code}.png"] = e.captions[0]
    return names


def write_vocabulary(path):
    names = dict.fromkeys(e.captions[0] for e in load_emoji() if e.code == e.concept)
    path.write_text("\n".join(names), encoding="utf-8")


def read_lines(path):
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["file_name"]: line["text"] for line in lines}
