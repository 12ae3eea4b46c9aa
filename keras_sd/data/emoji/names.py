"""Prompt-like names for emoji whose Unicode names nobody would type, and words for their categories.

They are kept in `names.json`. "Black", "white" and "heavy" in Unicode names are about fonts, not colours:
the images differ, so such names are replaced there. All other names are used as they are, in lower case.
"""

import json
from pathlib import Path

_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

NAMES: dict[str, list[str]] = {
    name: used for group in _TABLES["names"].values() for name, used in group.items()
}
"""Unicode name (or, where two emoji share one, a code) -> the name that prompts use, and further ones."""

CATEGORIES: dict[str, str] = _TABLES["categories"]
"""Unicode subcategory -> what a caption may add after an emoji's name."""
