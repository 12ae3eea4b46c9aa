"""Measures what fine-tuning teaches the bundled model: a style, a subject, a word, a higher resolution.

`images` writes what the subject and the word are trained on; the other commands compare a fine-tuned model
with the bundled one and add their figures to a JSON file. The training commands stand in docs/finetuning.md.
"""

import datetime
import importlib.metadata
import json
from pathlib import Path

import click
import numpy as np

from keras_sd.cli.outputs import check_output, overwrite_option
from keras_sd.cli.program import run_command
from keras_sd.files.writing import write_json

# A fruit that Twemoji does not have, and a combination that the bundled model has not seen.
SUBJECT, SUBJECT_CLASS = "e0c4", "fruit"
UNSEEN = "1f44c-1f3ff"
SAMPLING = {"num_inference_steps": 30, "guidance_scale": 2.0, "progress": False}


@click.group()
def finetuning():
    """Measure fine-tuned models."""


def output_option(command):
    return click.option("--output", default="benchmarks/finetuning.json", help="JSON file to add to.")(
        command
    )


@finetuning.command()
@click.argument("folder")
@overwrite_option
def images(folder, overwrite):
    """Write FOLDER/subject, four views of a new symbol, and FOLDER/word, one image that is held out."""
    from PIL import Image

    from keras_sd import load_emoji, save_png
    from keras_sd.data.emoji.source import draw_openmoji

    subject, word = Path(folder) / "subject", Path(folder) / "word"
    for place in (subject / "0.png", word / f"{UNSEEN}.png"):
        check_output(place, ".png", overwrite=overwrite)
    drawing = Image.fromarray(draw_openmoji(SUBJECT, 256))
    views = ((0, 1.0, 0, 0), (15, 0.9, -8, 6), (-15, 0.8, 10, -8), (30, 0.9, 4, 10))
    for index, (degrees, scale, right, down) in enumerate(views):
        size = round(256 * scale)
        view = Image.new("RGB", (256, 256), "white")
        turned = drawing.resize((size, size)).rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
        view.paste(turned, ((256 - size) // 2 + right, (256 - size) // 2 + down))
        view = view.resize((64, 64), Image.Resampling.LANCZOS)
        save_png(np.asarray(view), subject / f"{index}.png")
    unseen = next(emoji for emoji in load_emoji() if emoji.code == UNSEEN)
    save_png(unseen.load(64), word / f"{UNSEEN}.png")


@finetuning.command()
@click.argument("folder")
@click.option("--lora", is_flag=True, help="FOLDER holds a LoRA, not a whole model.")
@output_option
def style(folder, lora, output):
    """KID to the held-out OpenMoji images of the bundled model and of the one in FOLDER."""
    from keras_sd import ClipFeatures, extract, load_source, paired_kernel_inception_distance

    held_out = load_source("openmoji", "validation", 64)
    examples = [held_out[index] for index in range(len(held_out))]
    captions = [example["captions"][0] for example in examples]
    before, after = _bundled(), _tuned(folder, lora)
    extractor = ClipFeatures(before.image_encoder)
    real = extract(extractor, np.stack([example["image"] for example in examples]))
    figures = {"images": len(captions)}
    for name, model in (("before", before), ("after", after)):
        made = model.text_to_image(captions, seed=0, **SAMPLING)
        figures[f"kid_{name}"] = paired_kernel_inception_distance(real, extract(extractor, made)).mean
    figures["ratio"] = figures["kid_after"] / figures["kid_before"]
    shown = [
        f"{name}" for name in ("red heart", "grinning face", "red apple", "dog face", "flag of japan", "sun")
    ]
    _sheet(output, f"style-{'lora' if lora else 'full'}", [before, after], shown)
    _add(output, f"style_{'lora' if lora else 'full'}", figures)


@finetuning.command()
@click.argument("subject_folder")
@click.argument("with_prior")
@click.argument("without_prior")
@click.option("--instance-prompt", default="sks fruit", show_default=True)
@output_option
def subject(subject_folder, with_prior, without_prior, instance_prompt, output):
    """Likeness to the subject, and what happens to its class, with and without prior preservation."""
    from keras_sd import ClipFeatures, extract, load_source, paired_kernel_inception_distance

    source = load_source(subject_folder, "train", 64, need_captions=False)
    models = {"before": _bundled(), "with_prior": _tuned(with_prior), "without_prior": _tuned(without_prior)}
    extractor = ClipFeatures(models["before"].image_encoder)
    wanted = _unit(extract(extractor, np.stack([source[index]["image"] for index in range(len(source))])))
    figures, of_class = {}, {}
    for name, model in models.items():
        made = model.text_to_image(instance_prompt, num_images=16, seed=0, **SAMPLING)
        figures[f"similarity_{name}"] = float((_unit(extract(extractor, made)) @ wanted.T).mean())
        # Seeds that the class images of the training were not made from.
        made = model.text_to_image(SUBJECT_CLASS, num_images=100, seed=10_000, **SAMPLING)
        of_class[name] = extract(extractor, made)
    for name in ("with_prior", "without_prior"):
        drift = paired_kernel_inception_distance(of_class["before"], of_class[name])
        figures[f"class_kid_{name}"] = drift.mean
    _sheet(output, "subject", list(models.values()), [instance_prompt, SUBJECT_CLASS], count=4)
    _add(output, "subject", figures)


@finetuning.command()
@click.argument("embeddings")
@click.option("--placeholder-token", default="<word>", show_default=True)
@output_option
def word(embeddings, placeholder_token, output):
    """How often an image of the learned word is nearest to the one that it was learned from."""
    from keras_sd import load_emoji
    from keras_sd.data.emoji.retrieval import top1

    model = _bundled()
    model.load_textual_inversion(embeddings)
    emoji = load_emoji()
    gallery = np.stack([one.load(64) for one in emoji])
    label = next(index for index, one in enumerate(emoji) if one.code == UNSEEN)
    made = model.text_to_image(placeholder_token, num_images=16, seed=0, **SAMPLING)
    figures = {"nearest_top1": top1(made, gallery, [label] * len(made)), "samples": len(made)}
    _sheet(output, "word", [model], [placeholder_token, f"{placeholder_token} emoji"], count=8)
    _add(output, "word", figures)


@finetuning.command()
@click.option("--model", default="emoji-upscaler", show_default=True, help="Preset or folder.")
@click.option("--num-steps", default=10, show_default=True)
@output_option
def upscaler(model, num_inference_steps, output):
    """Held-out images made small and large again, against bicubic and Lanczos."""
    from PIL import Image

    from keras_sd import Upscaler, image_grid, load_source, presets
    from keras_sd.training.super_resolution import measure_upscaling

    model = Upscaler.load(presets.find(model))
    source = load_source("emoji", "validation", 128)
    images = np.stack([source[index]["image"] for index in range(len(source))])
    made, figures = measure_upscaling(model, images, num_inference_steps=num_inference_steps)
    small = [Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in images[:8]]
    enlarged = [np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC)) for image in small]
    sheet = image_grid([*enlarged, *made[:8], *images[:8]], columns=8)
    _save(output, "upscaler", sheet)
    for other in ("bicubic", "lanczos"):
        figures[f"edges_against_{other}"] = figures["edge_error"] / figures[f"{other}_edge_error"] - 1
        figures[f"psnr_against_{other}"] = figures["psnr"] - figures[f"{other}_psnr"]
    _add(output, "upscaler", figures | {"num_inference_steps": num_inference_steps, "images": len(images)})


def _open(name):
    from keras_sd import StableDiffusion, presets

    return StableDiffusion.load(presets.find(name), batch_size=50)


def _bundled():
    return _open("emoji")


def _tuned(folder, lora=False):
    if not lora:
        return _open(folder)
    model = _bundled()
    model.load_lora(folder)
    return model


def _unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _sheet(output, name, models, prompts, count=1):
    """An image for the documentation: a row for each model, the same seeds in all."""
    from keras_sd import image_grid

    rows = [model.text_to_image(prompts, num_images=count, seed=0, **SAMPLING) for model in models]
    labels = [prompt for _ in models for prompt in prompts for _ in range(count)]
    # A row for each model, or for each prompt where there is one model.
    columns = count * (len(prompts) if len(models) > 1 else 1)
    _save(output, name, image_grid(np.concatenate(rows), labels, columns=columns, scale=2))


def _save(output, name, image):
    from keras_sd import save_png

    folder = Path(output).parent / "finetuning"
    save_png(image, folder / f"{name}.png")


def _add(output, name, figures):
    """Add figures to the JSON file, and prints them."""
    path = Path(output)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    versions = {
        package: importlib.metadata.version(package) for package in ("keras_sd", "keras", "tensorflow")
    }
    results[name] = figures | {"date": datetime.date.today().isoformat(), "versions": versions}
    write_json(path, results)
    click.echo(json.dumps({name: figures}, indent=2))


if __name__ == "__main__":
    run_command(finetuning, "tools/finetuning.py")
