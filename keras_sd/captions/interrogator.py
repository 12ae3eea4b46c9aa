"""Builds captions from a sentence and a vocabulary, in the modes of CLIP Interrogator."""

import numpy as np

from keras_sd.captions.ranking import top_k
from keras_sd.errors import UserError

MODES = ("best", "fast", "classic", "negative", "caption")
"""`best` is the slowest and fits the image best. `negative` collects what the image is not."""

_CLASSIC_FLAVORS = 3
_CHAIN_CANDIDATES = 2048
_CHAIN_MINIMUM = 8


class Interrogator:
    """Describes images.

    Args:
        clip: a `ranking.Clip`; may be None for the mode "caption".
        vocabulary: a `vocabulary.Vocabulary`.
        captioner: a `captioner.Captioner`; None for captions of phrases alone.
        maximum_phrases: the largest number of phrases in a caption.
    """

    def __init__(self, clip, vocabulary, captioner=None, maximum_phrases=32):
        self.clip, self.vocabulary, self.captioner = clip, vocabulary, captioner
        self.maximum_phrases = maximum_phrases

    def describe(self, images, mode="best", sentences=None):
        """Return one caption for each image.

        Args:
            images: list of Pillow images in RGB.
            mode: one of `MODES`. `caption` is the sentence alone; `fast` adds the phrases that fit the
                image best; `classic` adds a medium, an artist, a site, a movement and three flavours; `best`
                adds phrase after phrase, each time the one that brings the caption closest to the image, and
                returns the closest of all four; `negative` collects the phrases that fit worst.
            sentences: the captioner's sentences, if they are known already.

        Raises:
            UserError: the mode is unknown, or the vocabulary has no phrases for it.
        """
        if mode not in MODES:
            raise UserError(f"mode {mode!r}: unknown; use {', '.join(MODES)}")
        if sentences is None:
            sentences = self.captioner(images) if self.captioner else [""] * len(images)
        if mode == "caption":
            return list(sentences)
        check_vocabulary(self.vocabulary, mode)
        features = self.clip.encode_images(images)
        return getattr(self, f"_{mode}")(sentences, features)

    def rank(self, features, phrases, count, lowest=False):
        """Return the `count` phrases that fit each image best, or worst: a list of lists.

        Args:
            features: images as `Clip.encode_images` gives them, float32 (n, d).
        """
        indices, _ = top_k(features, self.clip.phrase_vectors(phrases), count, lowest)
        return [[phrases[index] for index in row] for row in indices]

    def _fast(self, sentences, features):
        found = self.rank(features, self.vocabulary.phrases, self.maximum_phrases)
        return self._with_phrases(sentences, found)

    def _with_phrases(self, sentences, found):
        return [
            _joined(sentence, *phrases[: self.maximum_phrases])
            for sentence, phrases in zip(sentences, found, strict=True)
        ]

    def _classic(self, sentences, features):
        kinds = ("mediums", "styles", "sites", "movements")
        lists = {kind: getattr(self.vocabulary, kind) for kind in kinds}
        best = {kind: self.rank(features, phrases, 1) for kind, phrases in lists.items() if phrases}
        flavors = [[]] * len(features)
        if self.vocabulary.flavors:
            flavors = self.rank(features, self.vocabulary.flavors, _CLASSIC_FLAVORS)
        captions = []
        for row, sentence in enumerate(sentences):
            medium, style, site, movement = (best[kind][row][0] if kind in best else "" for kind in kinds)
            # "a red heart, an icon by Piet Mondrian, trending on flickr, de stijl, flat, glossy, simple"
            captions.append(_joined(sentence, f"{medium} {style}".strip(), site, movement, *flavors[row]))
        return captions

    def _best(self, sentences, features):
        count = max(_CHAIN_CANDIDATES, self.maximum_phrases)
        candidates = self.rank(features, self.vocabulary.phrases, count)
        # The first candidates are the phrases that `fast` would find.
        classic, fast = self._classic(sentences, features), self._with_phrases(sentences, candidates)
        captions = []
        for row, image in enumerate(features):
            chain = self._chain(image, sentences[row], candidates[row])
            drafts = [draft for draft in (sentences[row], classic[row], fast[row], chain) if draft]
            captions.append(drafts[int(np.argmax(self._similarities(image, drafts)))])
        return captions

    def _negative(self, sentences, features):
        phrases = self.vocabulary.phrases
        candidates = self.rank(features, phrases, _CHAIN_CANDIDATES, lowest=True) if phrases else None
        captions = []
        for row, image in enumerate(features):
            pool = [*(candidates[row] if candidates else ()), *self.vocabulary.negative]
            captions.append(self._chain(image, "", list(dict.fromkeys(pool)), lowest=True))
        return captions

    def _chain(self, image, caption, candidates, lowest=False):
        """Add the phrase that improves the similarity most, again and again, until none improves it.

        The first `_CHAIN_MINIMUM` phrases are always added: a single phrase seldom improves on a sentence.
        """
        sign = -1 if lowest else 1
        candidates = list(candidates)
        best = sign * self._similarities(image, [caption])[0] if caption else -np.inf
        for number in range(self.maximum_phrases):
            if not candidates:
                break
            longer = [_joined(caption, phrase) for phrase in candidates]
            similarities = sign * self._similarities(image, longer)
            index = int(np.argmax(similarities))
            if similarities[index] <= best and number >= _CHAIN_MINIMUM:
                break
            best, caption = similarities[index], longer[index]
            del candidates[index]
        return caption

    def _similarities(self, image, texts):
        return self.clip.encode_texts(texts) @ image


def check_vocabulary(vocabulary, mode):
    """Make sure that there are phrases for a mode.

    Raises:
        UserError: there are none.
    """
    needed = () if mode == "caption" else vocabulary.phrases
    if mode == "negative":
        needed += vocabulary.negative
    if mode != "caption" and not needed:
        raise UserError(f"mode {mode}: the vocabulary is empty; give `flavors` or another list")


def _joined(*phrases):
    """Return the distinct phrases, joined by commas."""
    return ", ".join(dict.fromkeys(phrase for phrase in phrases if phrase))
