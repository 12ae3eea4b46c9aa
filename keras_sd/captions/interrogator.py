"""Captions out of a sentence and a vocabulary, in the ways that CLIP Interrogator made known."""

import numpy as np

from keras_sd.captions.ranking import top_k
from keras_sd.errors import UserError

MODES = ("best", "fast", "classic", "negative", "caption")
"""From the slowest and closest to the image; `negative` collects what it is not, for a negative prompt."""

_CLASSIC_FLAVORS = 3
_CHAIN_CANDIDATES = 2048
_CHAIN_MINIMUM = 8


class Interrogator:
    """Describes images.

    Args:
        clip: a `ranking.Clip`; None where only sentences are wanted.
        vocabulary: a `vocabulary.Vocabulary`.
        captioner: a `captioner.Captioner`, or None, and captions are of the vocabulary alone.
        maximum_phrases: how many phrases a caption gets at the most.
    """

    def __init__(self, clip, vocabulary, captioner=None, maximum_phrases=32):
        self.clip, self.vocabulary, self.captioner = clip, vocabulary, captioner
        self.maximum_phrases = maximum_phrases

    def describe(self, images, mode="best", sentences=None):
        """One caption for each image.

        Args:
            images: list of Pillow images in RGB.
            mode: one of `MODES`. `caption` is the sentence alone; `fast` adds the phrases that fit the
                image best; `classic` a medium, an artist, a site, a movement and three flavours; `best`
                builds the caption up phrase by phrase, each time the one that brings it closest to the
                image, and takes the closest of all four.
            sentences: what the captioner said, where that is known already.

        Raises:
            UserError: the mode is unknown, or the vocabulary has nothing for it.
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
        """The `count` phrases that fit each image best, or worst: a list of lists.

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
        # The best of the candidates are what `fast` would look for.
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
        """Adds the phrase that changes the similarity most, again and again, while it gets better.

        The first `_CHAIN_MINIMUM` are added whether it does or not: a single phrase seldom beats a sentence.
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
    """Makes sure that there are phrases for a mode.

    Raises:
        UserError: there are none.
    """
    needed = () if mode == "caption" else vocabulary.phrases
    if mode == "negative":
        needed += vocabulary.negative
    if mode != "caption" and not needed:
        raise UserError(f"mode {mode}: the vocabulary is empty; give `flavors` or another list")


def _joined(*phrases):
    """Distinct phrases with commas between them; what the sentence says already is not said again."""
    return ", ".join(dict.fromkeys(phrase for phrase in phrases if phrase))
