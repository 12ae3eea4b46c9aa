"""Files of prompts for sample images, each with options of its own, as kohya's scripts read them.

A text file has a prompt in each line; `#` begins a comment. Options follow a prompt, each after two hyphens:
n (negative prompt), w and h (width and height in pixels), d (seed), s (steps) and l (guidance scale).
A JSON file is a list of such prompts as dictionaries, a TOML file has them as `[[prompt.subset]]`, with
defaults in `[prompt]`.
"""

import dataclasses
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_sd.errors import UserError
from keras_sd.files.json_files import read_json, read_text

LONGEST_SIDE = 2**14


@dataclasses.dataclass(frozen=True)
class SamplePrompt:
    """A prompt of a sample image; what is None is as in the other samples of the run.

    Attributes:
        prompt: the text.
        place: where it stands, for messages.
        negative_prompt: what the image must not show.
        height, width: in pixels.
        seed: of the image, 0 to 2**64 - 1.
        num_inference_steps, guidance_scale: of its sampling.
    """

    prompt: str
    place: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that it sets, as arguments of `StableDiffusion.text_to_image`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name not in ("prompt", "place") and value is not None
        }


def _whole(least: int, most: int) -> tuple[Callable[[str], int], str]:
    def convert(text):
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    return convert, f"a whole number from {least} to {most}"


def _scale(text):
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError
    return value


_SIDE = _whole(1, LONGEST_SIDE)
# Option -> the attribute, its conversion from text and what is accepted.
_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "n": ("negative_prompt", str, "a text"),
    "w": ("width", *_SIDE),
    "h": ("height", *_SIDE),
    "d": ("seed", *_whole(0, 2**64 - 1)),
    "s": ("num_inference_steps", *_whole(1, 2**31 - 1)),
    "l": ("guidance_scale", _scale, "0 or more"),
}
# Keys of kohya's dictionaries and those of diffusers' arguments -> the option.
_KEYS = {
    **{name: option for option, (name, _, _) in _OPTIONS.items()},
    "sample_steps": "s",
    "scale": "l",
}
# Further options of kohya's scripts, and what there is in their place.
_OTHERS = {
    "ss": "samples are made by the model's own sampler",
    "sample_sampler": "samples are made by the model's own sampler",
    "cn": "there is no ControlNet in training",
    "controlnet_image": "there is no ControlNet in training",
    "g": "it is of other models; give the guidance scale as l",
}


def read_sample_prompts(path: Path) -> list[SamplePrompt]:
    """Read a file of prompts: `.txt`, `.json` or `.toml`.

    Raises:
        UserError: it is missing, empty or of another kind, or a line of it is faulty, which is named.
    """
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise UserError(f"{path}: not a file of prompts; name a .txt, .json or .toml file")
    try:
        prompts = _READERS[kind](path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    if not prompts:
        raise UserError(f"{path}: has no prompts; write one in each line")
    return prompts


def _read_lines(path):
    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        text, place = line.strip(), f"{path}, line {number}"
        if text and not text.startswith("#"):
            prompts.append(_parsed(text, place))
    return prompts


def _parsed(text, place):
    """Return the prompt of a line of a text file."""
    first, *others = f" {text}".split(" --")
    found = {}
    for other in others:
        option, _, value = other.strip().partition(" ")
        if option in found:
            raise UserError(f"{place}: --{option} is given twice; leave one out")
        found[option] = value.strip()
    return _made(first.strip(), found, place, "--")


def _made(prompt, found, place, dashes):
    """Return the prompt with options, a dictionary of option -> text."""
    if not prompt:
        raise UserError(f"{place}: has no prompt; write it before the options")
    values = {}
    for option, text in found.items():
        if option not in _OPTIONS:
            remedy = f"{_OTHERS[option]}; leave it out" if option in _OTHERS else "use n, w, h, d, s or l"
            raise UserError(f"{place}: {dashes}{option} is unknown here: {remedy}")
        name, convert, accepted = _OPTIONS[option]
        try:
            values[name] = convert(text)
        except (ValueError, OverflowError):
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            raise UserError(f"{place}: {dashes}{option} {shown}: not right; give {accepted}") from None
    return SamplePrompt(prompt, place, **values)


def _read_json(path):
    content = read_json(path, list, remedy="correct it")
    return [_of_dictionary(one, f"{path}, prompt {number}") for number, one in enumerate(content, start=1)]


def _read_toml(path):
    try:
        content = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML ({error}); correct it") from error
    general = content.get("prompt")
    unknown = sorted(content.keys() - {"prompt"})
    if unknown or not isinstance(general, dict) or not isinstance(general.get("subset"), list):
        fault = f"{unknown[0]} is unknown" if unknown else "there is no [[prompt.subset]]"
        raise UserError(f"{path}: {fault}; write each prompt as [[prompt.subset]] with the key prompt")
    defaults = {key: value for key, value in general.items() if key != "subset"}
    return [
        _of_dictionary(defaults | one if isinstance(one, dict) else one, f"{path}, prompt {number}")
        for number, one in enumerate(general["subset"], start=1)
    ]


def _of_dictionary(values, place):
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f"{place}: not a dictionary with a text as prompt; correct it")
    found = {}
    for key, value in values.items():
        if key == "prompt":
            continue
        option = _KEYS.get(key, key)
        is_text = option == "n"
        if isinstance(value, str) != is_text or isinstance(value, bool | list | dict):
            accepted = _OPTIONS[option][2] if option in _OPTIONS else "another value"
            raise UserError(f"{place}: {key} {value!r}: not right; give {accepted}")
        if option in _OPTIONS and option != key:
            found[option] = str(value)
        else:
            found[key] = str(value)
    return _made(values["prompt"].strip(), found, place, "")


_READERS = {".txt": _read_lines, ".json": _read_json, ".toml": _read_toml}
