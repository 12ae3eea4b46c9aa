"""Where a training run keeps encodings: the settings, which need no backend."""

import dataclasses
from pathlib import Path

from keras_sd.data.encoding_store import DTYPES
from keras_sd.errors import UserError
from keras_sd.files.cache import VARIABLE, private_folder

MODES = ("memory", "disk", "off")


@dataclasses.dataclass(frozen=True)
class Caching:
    """Where encodings are kept.

    Attributes:
        cache_latents: "memory"; "disk", in `cache_dir`; or "off", which encodes each batch when it is drawn.
            None is "off" for images that are cropped at random, "memory" for encodings of up to 1 GiB, and
            otherwise "disk".
        cache_dir: the folder on disk; by default `encodings` in the cache folder. Several runs may share one.
        cache_dtype: "float32", "float16" or "bfloat16", in which encodings are kept.

    Raises:
        UserError: a value is unknown, or has no effect.
    """

    cache_latents: str | None = None
    cache_dir: str | Path | None = None
    cache_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.cache_latents not in (None, *MODES):
            raise UserError(f"cache_latents {self.cache_latents!r}: unknown; use {', '.join(MODES)}")
        if self.cache_dtype not in DTYPES:
            raise UserError(f"cache_dtype {self.cache_dtype!r}: unknown; use {', '.join(DTYPES)}")
        if self.cache_dir is not None and self.cache_latents not in (None, "disk"):
            raise UserError(
                f"cache_dir {self.cache_dir}: has no effect with `cache_latents='{self.cache_latents}'`; "
                "leave one out"
            )
        if self.cache_dtype != "float32" and self.cache_latents == "off":
            raise UserError(
                f"cache_dtype {self.cache_dtype}: has no effect with `cache_latents='off'`; leave one out"
            )

    def with_random_crops(self) -> "Caching":
        """Return the settings for images that are cropped anew each time.

        Raises:
            UserError: encodings would be kept.
        """
        return self.encoding_each_time(
            "keeps one crop of an image, and random crops are drawn each time", ", or crop the centre"
        )

    def encoding_each_time(self, reason: str, instead: str = "") -> "Caching":
        """Return the settings for images that are encoded anew each time.

        Args:
            reason: why their encodings cannot be kept, for the message.
            instead: what else the user may do, for the message.

        Raises:
            UserError: encodings would be kept.
        """
        if self.cache_latents not in (None, "off"):
            raise UserError(
                f"cache_latents {self.cache_latents}: {reason}; use `cache_latents='off'`{instead}"
            )
        return dataclasses.replace(self, cache_latents="off")

    def refuse_disk_for_alignment(self) -> None:
        """Raise UserError if encodings would be kept on disk, for a training with an alignment."""
        reason = "the targets of an alignment are not kept on disk"
        if self.cache_latents == "disk":
            raise UserError(f"cache_latents disk: {reason}; use memory or off")
        if self.cache_dir is not None:
            raise UserError(f"cache_dir {self.cache_dir}: {reason}; leave it out")

    def folder(self) -> Path:
        """Return the folder for encodings on disk.

        Raises:
            UserError: none is given, and there is no cache folder.
        """
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        folder = private_folder("encodings")
        if folder is None:
            raise UserError(f"cache_dir: missing, and there is no cache folder ({VARIABLE}); give a folder")
        return folder
