"""The data set `emoji_captions` for TensorFlow Datasets.

Importing this module registers the builder: `tensorflow_datasets.load("emoji_captions")` then works, offline.
"""

import tensorflow_datasets as tfds

from keras_sd.data.emoji.source import load_emoji

IMAGE_SIZE = 64


class EmojiCaptions(tfds.core.GeneratorBasedBuilder):
    """Twemoji images on white with several captions each.

    Splits: `train`, and `validation` with 200 held-out variants. Features: image uint8 (64, 64, 3), captions
    (the first one is unique), code and concept as in `keras_sd.data.emoji.source.Emoji`.
    """

    name = "emoji_captions"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Emoji images of Twemoji with captions made from their Unicode names.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3)),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "code": tfds.features.Text(),
                    "concept": tfds.features.Text(),
                }
            ),
            license="Images: CC-BY 4.0, Twemoji contributors.",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing to download: the images come with an installed package
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str):
        for emoji in load_emoji():
            if emoji.split == split:
                yield (
                    emoji.code,
                    {
                        "image": emoji.load(IMAGE_SIZE),
                        "captions": list(emoji.captions),
                        "code": emoji.code,
                        "concept": emoji.concept,
                    },
                )
