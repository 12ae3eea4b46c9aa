# %% [markdown]
# # Create captions for a folder of images
#
# **Author:** keras_sd<br>
# **Date created:** 2026/11/24<br>
# **Last modified:** 2026/11/30<br>
# **Description:** Caption a folder, clean the captions, add a product's words, and look at the result.<br>
# **Accelerator:** None (GPU for published models)

# %% tags=["parameters"]
# With a connection and a GPU: PRESET = None, CLIP = "ViT-L-14/openai", the CLIP that Stable Diffusion 1
# listens to, CAPTIONER = "Salesforce/blip-image-captioning-large" and DEVICE = "cuda".
PRESET = "emoji"  # whose CLIP looks at the images; None for the one below
CLIP = None
CAPTIONER = None
DEVICE = "cpu"
IMAGES = 120

# %% [markdown]
# **What you will learn**
#
# - To caption a folder of images, and to count how many captions are right.
# - What the modes of captioning do.
# - To clean captions, and to write the folder that a training reads.
#
# ## Introduction
#
# To fine-tune a text-to-image model one needs images with texts. The images are often there; writing the
# texts is the work. This notebook lets two models write them, in the way that CLIP Interrogator made
# popular:
#
# - **BLIP** looks at an image and says a sentence, such as "a bottle on a wooden table";
# - **CLIP** has one vector for an image and one for any phrase. Out of long lists of phrases those are
#   taken whose vectors lie closest to the image's.
#
# Then rules clean what the models said, since models also write things that should not be in a caption,
# above all names of living artists. No published model can be fetched offline, so here the bundled `emoji`
# model's own small CLIP looks at emoji, and BLIP is left out. The parameters at the head change both.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keep TensorFlow's log out of the notebook

import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from keras_sd import CaptionSettings, CleaningSettings, caption_folder, evenly, load_emoji, load_source

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10})

warnings.filterwarnings("ignore", message="IProgress not found")  # plain progress bars will do
workspace = tempfile.TemporaryDirectory()
os.chdir(workspace.name)  # all that is written goes there, and goes away with the notebook


def run(*command):
    """Runs a command of `keras-sd` as in a terminal."""
    print("$ keras-sd", " ".join(command))
    done = subprocess.run(
        [sys.executable, "-m", "keras_sd", *command],
        capture_output=True,
        text=True,
    )
    print(done.stdout or done.stderr)


def read_captions(folder):
    """Text by file name, as training reads it."""
    lines = (Path(folder) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["file_name"]: entry["text"] for entry in map(json.loads, lines)}


def show(folder, names, texts, columns=4):
    """Draws images above their texts."""
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 2.1 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        axis.imshow(Image.open(Path(folder) / name))
        axis.set_title(texts[name].replace(", ", ",\n"), fontsize=9)
    plt.show()


# %% [markdown]
# ## A folder of images
#
# We draw emoji as PNG files. One file is damaged on purpose, as in a large folder some often are.

# %%
emoji = evenly([one for one in load_emoji() if one.code == one.concept and one.split == "train"], IMAGES)
folder = Path("images")
folder.mkdir()
for one in emoji:
    Image.fromarray(one.load(64)).save(folder / f"{one.code}.png")
(folder / "broken.png").write_bytes(b"half a download")
names_of = {f"{one.code}.png": one.captions[0] for one in emoji}
print(f"{len(emoji)} images, such as {', '.join(list(names_of)[:4])}")

# %% [markdown]
# ## A vocabulary
#
# A list is a text file with a phrase on each line. With `pip install --no-deps clip-interrogator` its
# lists of artists, media, movements and flavours are used by themselves. We write our own: the names of
# all emoji as flavours, so that we can count how often the right one is found, and a few media and
# movements.

# %%
every_name = sorted({one.captions[0] for one in load_emoji() if one.code == one.concept})
Path("names.txt").write_text("\n".join(every_name), encoding="utf-8")
Path("mediums.txt").write_text("an icon\na sticker\na drawing\na photo", encoding="utf-8")
Path("movements.txt").write_text("flat design\npop art\nde stijl", encoding="utf-8")
Path("artists.txt").write_text("Ada Lindqvist\nTomas Okafor\nMei Tanaka", encoding="utf-8")  # made up
print(f"{len(every_name)} names of emoji, such as {', '.join(every_name[100:105])}")

# %% [markdown]
# CLIP must be in a form that open_clip opens, and `keras-sd convert --open-clip` brings any model's CLIP
# into it. For a published one, its name is enough (`ViT-L-14/openai` for Stable Diffusion 1.x, and
# `ViT-H-14/laion2b_s32b_b79k` for 2.x): a caption should be measured by the CLIP that is the text encoder
# of the model to be trained.

# %%
clip = CLIP
if PRESET is not None:
    run("convert", PRESET, "clip", "--open-clip")
    clip = "clip"

# %% [markdown]
# ## Captions
#
# `fast` takes the phrases that fit an image best, out of all lists. It is quick, since the vectors of the
# phrases are computed once and kept.

# %%
settings = CaptionSettings(
    mode="fast", clip=clip, captioner=CAPTIONER, vocabulary={"flavors": "names.txt"}, maximum_phrases=3
)
summary = caption_folder(folder, settings, device=DEVICE)
print(f"{len(summary.captions)} captions; passed over: {list(summary.passed_over.values())}")

# %%
captions = read_captions(folder)
shown = evenly(list(captions), 8)
show(folder, shown, captions)

# %% [markdown]
# The broken file was told and left out, and the rest is there. How good are these captions? The emoji have
# names, so it can be counted: how often is the right name the first of the three phrases, and how often is
# it among them?

# %%
phrases = {name: text.split(", ") for name, text in captions.items()}
first = sum(names_of[name] == found[0] for name, found in phrases.items())
among = sum(names_of[name] in found for name, found in phrases.items())
print(f"right name first: {first} of {len(phrases)}, among the three: {among} of {len(phrases)}")
later = [name for name, found in phrases.items() if names_of[name] != found[0]]
for name in later[:6]:
    print(f"  {names_of[name]!r} was described as {captions[name]!r}")

# %% [markdown]
# Where it errs, it takes an image for one that looks much like it. The phrases behind the right one are of
# little worth, though: an image of one thing has no second name, and with `maximum_phrases` at three it
# gets some all the same. This CLIP was trained on these emoji and their names, so it knows these well
# and nothing else. A published CLIP knows far more, less exactly. Whatever you use: look at a sample
# before you train.
#
# ## The other modes
#
# `classic` has a fixed form: a medium, an artist, a site, a movement and flavours. `best` builds the caption
# up phrase by phrase, each time with the one that brings the whole closest to the image; it is the
# slowest. `negative` collects what fits least, for a negative prompt. Captions that another mode wrote
# are not replaced by accident: that takes `overwrite`. The command does the same as the function, with a
# progress bar, goes on where it was killed, and starts a worker for each GPU.

# %%
lists = {
    "flavors": "names.txt",
    "mediums": "mediums.txt",
    "movements": "movements.txt",
    "artists": "artists.txt",
}
classic = CaptionSettings(mode="classic", clip=clip, captioner=CAPTIONER, vocabulary=lists)
caption_folder(folder, classic, overwrite=True, device=DEVICE)
for name in shown[:4]:
    print(f"{names_of[name]:24} {read_captions(folder)[name]}")

# %% [markdown]
# The names are right and the rest is guessed: nobody told this CLIP of artists, media and movements, and
# `classic` takes one of each whether it fits or not. With a published CLIP they mean something.
#
# ## Cleaning
#
# The `classic` form credits an artist, as the lists of CLIP Interrogator do for every image: a model
# that is trained on such captions learns to draw in the manner of people who did not agree to it. With
# `artists` names go out, those of the list and unknown ones behind "by", together with the words that
# hung on them. The site ("trending on behance") says nothing of an image either: `patterns` takes out what
# these regular expressions match.
#
# `product_type` makes all captions of a set say what it is of. Introductions, such as the texts of a shop's
# pages, give the words that set one image apart from the others (TF-IDF): all texts below say "vinyl" and
# "Lisbon", so what is left to tell is the finish. The descriptions stay as they were: cleaning can be changed
# and done again in an instant, as no model is asked.

# %%
finishes = itertools.cycle(["glossy", "holographic", "matte", "transparent"])
introductions = [
    {"file_name": name, "text": f"<p>Our {finish} sticker of vinyl, made in Lisbon.</p>"}
    for name, finish in zip(captions, finishes, strict=False)
]
with open("introductions.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(entry) + "\n" for entry in introductions)

before = read_captions(folder)
sites = "artstation|behance|cg society|deviantart|dribbble|flickr|instagram|pexels|pinterest|pixabay|pixiv"
sites += "|polycount|reddit|shutterstock|tumblr|unsplash"
cleaning = CleaningSettings(
    artists="artists.txt",
    patterns=(rf"\b((trending|featured) on )?({sites})\b",),
    product_type="sticker",
    introductions="introductions.jsonl",
    keywords=1,
    maximum_tokens=40,
)
summary = caption_folder(folder, classic, cleaning, device=DEVICE)
after = read_captions(folder)
for name in shown[:4]:
    print(f"before  {before[name]}\nafter   {after[name]}\n")
print(f"artists taken out: {dict(summary.artists)}; captions cut to 40 tokens: {summary.cut}")

# %% [markdown]
# ## Look at the result
#
# A page of images above their captions shows in a minute what no figure does. The command writes one with
# `--contact-sheet sheet.png`.

# %%
show(folder, evenly(list(after), 12), after)

# %% [markdown]
# ## Train on it
#
# `metadata.jsonl` beside the images is what `keras_sd.train` and Hugging Face's imagefolder read. The
# broken file has no caption; training would leave it out with a warning, so we take it away. Here is the
# folder as training sees it, and the command that would train on it.

# %%
(folder / "broken.png").unlink()
source = load_source(str(folder), "train", 64)
example = source[0]
print(f"{len(source)} examples; the first: {example['image'].shape}, {example['captions']}")
print("$ python -m keras_sd.train lora --train-data-dir images --max-train-steps 500")

# %% [markdown]
# ## Conclusion
#
# - Two models describe, rules clean, and a person looks.
# - Measure captions where you can: with names that you know, or with CLIP's similarity.
# - Use the CLIP that is the text encoder of the model to be trained.
# - Take names of artists out, and ask people before their images go in (`docs/responsible-use.md`).
#
# All options are in [docs/captions.md](../docs/captions.md). `06_fine_tune` trains on captioned images.
