"""CLIP's tokenizer: lower-cased byte-level byte-pair encoding with an end-of-word mark.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016; Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision", 2021. The files are those of
transformers' ``CLIPTokenizer``, which gives the same ids in its release 5. open_clip's tokenizer has the same
merges and ids, but first repairs the text with ftfy and decodes HTML entities: there ``&amp;`` is ``&``.
"""

import gzip
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NotRequired, Self

import numpy as np
import numpy.typing as npt
import tokenizers
from annotated_types import Interval, Len
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from typing_extensions import TypedDict

from keras_sd.arguments import checked_path
from keras_sd.errors import UserError
from keras_sd.files.json_files import MIB, read_json, read_text, shape_fault, shown
from keras_sd.files.writing import write_json, write_text

BEGIN_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
WORD_END = "</w>"
WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# A printable symbol for each byte. CLIP's vocabulary begins with these, in this order, and then has each of
# them at the end of a word.
BYTE_SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet())
_ALPHABET = BYTE_SYMBOLS + [symbol + WORD_END for symbol in BYTE_SYMBOLS]
SPACE_SYMBOL = "\u0120"

DEFAULT_MAX_LENGTH = 77
_CLIP_MERGES = Path(__file__).parents[1] / "bundled" / "clip" / "merges.txt.gz"
# Configs without a limit have a huge number instead.
LARGEST_MAX_LENGTH = 2**20

# These characters are syntax in prompts, so a token with one of them would never be found.
_SYNTAX_PATTERN = re.compile(r"[\s()\[\]\\:]")

_LARGEST_FILE = 16 * MIB
_LARGEST_ID = 2**20
_ABSENT = "a tokenizer folder has vocab.json and merges.txt, or tokenizer.json"

# The schemas of a tokenizer's files. Longer texts than these are no tokens.
TokenText = Annotated[str, Len(1, 256)]
TokenId = Annotated[int, Interval(ge=0, le=_LARGEST_ID)]
Vocabulary = dict[TokenText, TokenId]


class _Token(TypedDict):
    content: TokenText


class _AddedToken(_Token):
    id: TokenId


class SpecialTokens(TypedDict):
    """The schema of `special_tokens_map.json`."""

    bos_token: NotRequired[TokenText | _Token | None]
    eos_token: NotRequired[TokenText | _Token | None]
    unk_token: NotRequired[TokenText | _Token | None]
    pad_token: NotRequired[TokenText | _Token | None]


class TokenizerConfig(SpecialTokens):
    """The schema of `tokenizer_config.json`. The keys of the dictionary are ids, as strings."""

    model_max_length: NotRequired[Annotated[float, Interval(ge=0, le=1e100)]]
    added_tokens_decoder: NotRequired[dict[str, TokenText | _Token]]


class _Model(TypedDict):
    vocab: Vocabulary
    merges: list[str | list[str]]


class TokenizerFile(TypedDict):
    """The schema of `tokenizer.json`."""

    model: _Model
    added_tokens: NotRequired[list[_AddedToken]]


def vector_names(token, count):
    """Return the tokens of a learned word of several vectors: `<cat>`, `<cat>_1`, ..., as in diffusers."""
    return [token, *(f"{token}_{index}" for index in range(1, count))]


class Tokenizer:
    """CLIP's tokenizer for one vocabulary: turns texts into token ids.

    Args:
        vocabulary: dictionary from token to id; the begin, end and pad tokens are in it.
        merges: list of pairs of tokens, in the order in which they are merged.
        max_length: tokens in a sequence, the begin and the end token included.
        pad_token: fills up short sequences: the end token in Stable Diffusion 1.x, ``!`` in 2.x.
        added_tokens: dictionary from text to id of tokens without merges, such as those of a textual
            inversion. If `<cat>_1`, `<cat>_2`, ... are added too, `<cat>` in a text means all of them.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, ...]],
        max_length: int = DEFAULT_MAX_LENGTH,
        pad_token: str = END_TOKEN,
        added_tokens: dict[str, int] | None = None,
    ) -> None:
        for token in (BEGIN_TOKEN, END_TOKEN, pad_token):
            if token not in vocabulary:
                raise UserError(f"tokenizer: the vocabulary has no token {token!r}; CLIP's has")
        if max_length < 3:
            raise UserError(f"tokenizer: max_length {max_length} has no room for a text; give 3 or more")
        self.vocabulary = dict(vocabulary)
        self.merges = [tuple(pair) for pair in merges]
        self.max_length = max_length
        self.pad_token = pad_token
        self.added_tokens = dict(added_tokens or {})
        self.begin_token_id = vocabulary[BEGIN_TOKEN]
        self.end_token_id = vocabulary[END_TOKEN]
        self.pad_token_id = vocabulary[pad_token]
        self._encoder = self._make_encoder()
        self._further_ids = {
            token_id: self._further_vectors(token) for token, token_id in self.added_tokens.items()
        }

    def _make_encoder(self):
        try:
            model = BPE(self.vocabulary, self.merges, end_of_word_suffix=WORD_END, unk_token=END_TOKEN)
        except Exception as error:  # the library raises the base class
            fault = shown(str(error))
            raise UserError(f"tokenizer: vocabulary and merges do not fit together ({fault})") from error
        encoder = _with_clip_words(model)
        # A special token is found in a text before words are, so with 2.x's files "!" is never a word.
        encoder.add_special_tokens([BEGIN_TOKEN, END_TOKEN, self.pad_token])
        for token, token_id in sorted(self.added_tokens.items(), key=lambda item: item[1]):
            encoder.add_tokens([tokenizers.AddedToken(token, normalized=True)])
            if encoder.token_to_id(token) != token_id:
                raise UserError(
                    f"tokenizer: added token {token!r} has id {token_id} where {encoder.token_to_id(token)} "
                    "is next; ids must go on from the vocabulary without a gap"
                )
        return encoder

    def _further_vectors(self, token):
        """Return the ids of a learned word's vectors after the first."""
        names = (f"{token}_{index}" for index in itertools.count(1))
        return [
            self.added_tokens[name] for name in itertools.takewhile(self.added_tokens.__contains__, names)
        ]

    def add_tokens(self, names: Iterable[str]) -> Self:
        """Return a tokenizer with more added tokens, whose ids continue from the last one.

        Raises:
            UserError: a name is empty, is in the vocabulary already, or would be split in a prompt.
        """
        taken = {token.lower() for token in self.added_tokens}
        for name in names:
            word = name.lower()
            if not name or _SYNTAX_PATTERN.search(name):
                raise UserError(
                    f"token {name!r}: empty, or with a space, bracket, colon or backslash, which mean "
                    "something in prompts; name it like <my-cat>"
                )
            if name == "BREAK":
                raise UserError("token 'BREAK': begins a new chunk in prompts; name it like <my-cat>")
            if word in taken or word in self.vocabulary or word + WORD_END in self.vocabulary:
                raise UserError(
                    f"token {name!r}: is in the vocabulary already; choose a name that is none, like <my-cat>"
                )
            taken.add(word)
        ids = {name: self.vocab_size + index for index, name in enumerate(names)}
        return type(self)(
            self.vocabulary, self.merges, self.max_length, self.pad_token, self.added_tokens | ids
        )

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int, max_length: int = DEFAULT_MAX_LENGTH) -> Self:
        """Learn the vocabulary of a collection of texts; the same texts give the same vocabulary.

        The ids are in CLIP's order: 256 bytes, 256 bytes that end a word, merges, begin, end.

        Args:
            texts: iterable of strings.
            vocab_size: largest number of tokens; few texts give fewer.
            max_length: as in the constructor.
        """
        smallest = len(_ALPHABET) + 2
        if vocab_size < smallest:
            raise UserError(
                f"tokenizer: vocab_size {vocab_size} is too small; bytes and special tokens take {smallest}"
            )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            # As special tokens, all symbols get ids, in this order.
            special_tokens=_ALPHABET,
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        learner = _with_clip_words(BPE(end_of_word_suffix=WORD_END))
        learner.train_from_iterator(texts, trainer)
        merges = json.loads(learner.to_str())["model"]["merges"]
        return cls(_clip_vocabulary(merges), merges, max_length)

    @classmethod
    def clip(cls, pad_token: str = END_TOKEN) -> Self:
        """Return CLIP's own tokenizer, that of Stable Diffusion 1.x and 2.x; the package has its merges.

        Args:
            pad_token: the end token for OpenAI's CLIP (1.x), "!" for OpenCLIP (2.x).
        """
        merges = _parse_merges(gzip.decompress(_CLIP_MERGES.read_bytes()).decode("utf-8"), _CLIP_MERGES)
        return cls(_clip_vocabulary(merges), merges, pad_token=pad_token)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the ``tokenizer`` folder of a pipeline, as any release of transformers writes it.

        Raises:
            UserError: a file is missing or damaged, or the tokenizer is not of CLIP's kind.
        """
        folder = checked_path("folder", folder)
        config = _read_json(folder / "tokenizer_config.json", TokenizerConfig, default={})
        if (folder / "vocab.json").exists() or not (folder / "tokenizer.json").exists():
            vocabulary = _read_json(folder / "vocab.json", Vocabulary)
            merges = _read_merges(folder / "merges.txt")
            added_tokens = _read_json(folder / "added_tokens.json", Vocabulary, default={})
        else:
            vocabulary, merges, added_tokens = _read_tokenizer_json(folder / "tokenizer.json")
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            added_tokens[_content(token)] = _checked_id(token_id, folder / "tokenizer_config.json")
        pad_token = config.get("pad_token")
        if "added_tokens_decoder" not in config:
            # The older of the two files takes precedence; in 2.x's files they differ.
            special_tokens = _read_json(folder / "special_tokens_map.json", SpecialTokens, default={})
            pad_token = special_tokens.get("pad_token", pad_token)
        special = {
            _content(config[key]) for key in SpecialTokens.__annotations__ if config.get(key) is not None
        }
        max_length = int(config.get("model_max_length", DEFAULT_MAX_LENGTH))
        tokenizer = cls(
            vocabulary,
            merges,
            max_length if max_length <= LARGEST_MAX_LENGTH else DEFAULT_MAX_LENGTH,
            END_TOKEN if pad_token is None else _content(pad_token),
            {token: token_id for token, token_id in added_tokens.items() if token not in vocabulary},
        )
        _check_merges_make(vocabulary, merges, special | {tokenizer.pad_token} | added_tokens.keys(), folder)
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write the ``tokenizer`` folder of a pipeline."""
        folder = checked_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        special_tokens = {
            "bos_token": BEGIN_TOKEN,
            "eos_token": END_TOKEN,
            "pad_token": self.pad_token,
            "unk_token": END_TOKEN,
        }
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            **special_tokens,
        }
        write_json(folder / "vocab.json", self.vocabulary, indent=None)
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", special_tokens)
        if self.added_tokens:
            write_json(folder / "added_tokens.json", self.added_tokens)
        merges = "".join(f"{first} {second}\n" for first, second in self.merges)
        write_text(folder / "merges.txt", "#version: 0.2\n" + merges)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return len(self.vocabulary) + len(self.added_tokens)

    def encode(self, texts: str | Iterable[str]) -> list[list[int]]:
        """Return all token ids of each text, without begin, end and padding."""
        return [[token_id for token_id, _ in tokens] for tokens in self._tokens(texts)]

    def __call__(self, texts: str | Iterable[str]) -> npt.NDArray[np.int32]:
        """Encode texts to the length `max_length`.

        Texts that are too long are cut; a warning shows the part that is lost.

        Args:
            texts: a string or a list of strings.

        Returns:
            int32 array `(n, max_length)`: begin token, text, end token, padding.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.full((len(texts), self.max_length), self.pad_token_id, dtype="int32")
        room = self.max_length - 2
        for row, text, tokens in zip(ids, texts, self._tokens(texts), strict=True):
            if len(tokens) > room:
                dropped = text[tokens[room][1] :]
                warnings.warn(
                    f"the text has {len(tokens)} tokens where {room} fit; dropped its end: {dropped!r}",
                    stacklevel=2,
                )
            kept = [self.begin_token_id, *(token_id for token_id, _ in tokens[:room]), self.end_token_id]
            row[: len(kept)] = kept
        return ids

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of one sequence of ids, up to its end token, lower-cased and with plain spaces."""
        ids = [int(token_id) for token_id in np.ravel(ids)]
        if ids[:1] == [self.begin_token_id]:
            ids = ids[1:]
        if self.end_token_id in ids:
            ids = ids[: ids.index(self.end_token_id)]
        tokens = [self._encoder.id_to_token(token_id) for token_id in ids]
        if None in tokens:
            raise UserError(
                f"tokenizer: token id {ids[tokens.index(None)]} is outside of the vocabulary "
                f"(0 to {self.vocab_size - 1})"
            )
        # In the alphabet of bytes, with a space at the end of each word.
        symbols = [re.sub(f"{WORD_END}$", SPACE_SYMBOL, token) for token in tokens]
        return decoders.ByteLevel().decode(symbols).strip()

    def _tokens(self, texts):
        """Return (id, start in the text) of each token of each text; a learned word has all its vectors."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"tokenizer: {text!r} is a {type(text).__name__}; give texts as strings")
        try:
            encodings = self._encoder.encode_batch(texts, add_special_tokens=False)
        except TypeError as error:  # all are strings, so one holds half of a surrogate pair
            raise UserError("tokenizer: a text is not valid Unicode; remove the lone surrogate") from error
        return [
            [
                (vector_id, start)
                for token_id, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
                for vector_id in (token_id, *self._further_ids.get(token_id, ()))
            ]
            for encoding in encodings
        ]


def _clip_vocabulary(merges):
    """Return a dictionary from token to id in CLIP's order: the alphabet, merged tokens, begin and end."""
    tokens = [*_ALPHABET, *("".join(pair) for pair in merges), BEGIN_TOKEN, END_TOKEN]
    return {token: index for index, token in enumerate(tokens)}


def _with_clip_words(model):
    """Return a tokenizer of the library that normalises texts and splits them into words as CLIP does."""
    encoder = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    return encoder


def _content(token):
    """Return the text of a token, which files give as a string or in a dictionary."""
    return token["content"] if isinstance(token, dict) else token


def _checked_id(text, path):
    """Return a token's id, which a file gives as the key of a dictionary."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_LARGEST_ID))):
        raise UserError(f"{path}: added_tokens_decoder has {shown(text)}, which is no id; fetch it again")
    return int(text)


def _read_json(path, shape, **options):
    return read_json(path, shape, absent=_ABSENT, largest=_LARGEST_FILE, **options)


def _read_merges(path):
    try:
        return _parse_merges(read_text(path, _LARGEST_FILE, "fetch it again"), path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; {_ABSENT}") from error


def _parse_merges(text, path):
    lines = (line.rstrip("\r") for line in text.split("\n"))
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return _checked_merges(pairs, path)


def _checked_merges(pairs, path):
    """Return pairs of tokens as tuples; raise a UserError for anything else."""
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{path}: {shown(' '.join(pair))} is no pair of tokens; fetch it again")
    return [tuple(pair) for pair in pairs]


def _check_merges_make(vocabulary, merges, special, folder):
    """Raise a UserError for a token that no text can have, since its merge is missing."""
    made = {"".join(pair) for pair in merges} | special | {BEGIN_TOKEN, END_TOKEN}
    lost = [token for token in vocabulary if token not in made and len(token.removesuffix(WORD_END)) > 1]
    if lost:
        raise UserError(
            f"{folder}: no merge makes {len(lost)} of the vocabulary's tokens, the first is "
            f"{shown(lost[0])}; fetch the tokenizer's files again"
        )


def _read_tokenizer_json(path):
    """Return vocabulary, merges and added tokens of `tokenizer.json`, which newer releases write."""
    content = _read_json(path, dict)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("end_of_word_suffix") != WORD_END:
        raise UserError(f"{path}: not CLIP's byte-pair encoding; give a Stable Diffusion model's tokenizer")
    fault = shape_fault(content, TokenizerFile)
    if fault:
        raise UserError(f"{path}: {fault}; fetch it again")
    # Merges are lists of two in newer files and strings in older ones.
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    added_tokens = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return model["vocab"], _checked_merges(pairs, path), added_tokens
