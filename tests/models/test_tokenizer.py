"""The tokenizer against transformers' CLIPTokenizer on the same files, and its own rules."""

import json
import re
import warnings

import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.models.tokenizer import BEGIN_TOKEN, END_TOKEN, Tokenizer, vector_names
from tests.reference import run_reference

CORPUS = [
    "a red heart on a white background",
    "the woman's face: light skin tone, smiling!",
    "people holding hands, medium-dark skin tone",
    "flag of Côte d'Ivoire, 3 stripes",
    "don't stop! they're dancing, we've seen 100 cats",
    "Ελληνικά γράμματα και שלום עולם",
] * 5

TEXTS = [
    "",
    " ",
    "red heart",
    "Red HEART",
    "  many   spaces\t\nand\u00a0lines \u3000",
    "😀",
    "a 👩🏽‍❤️‍💋‍👨🏿 kiss 🇨🇮",
    "Côte d'Ivoire; cafe\u0301 CAFÉ naïve ﬁ Å K ß İ",
    "שלום עולם مرحبا بالعالم",
    "日本語のテキスト 中文 한국어",
    "0123456789 ١٢٣ Ⅷ ½ 3.14e-10",
    "!!! ... ?!?! -- --- ([{<>}]) \"'`~ </w> a</w>b",
    "don't it's they're we've I'm he'll she'd '' ' DON'T 'tis rock'n'roll",
    "snake_case kebab-case CamelCase e-mail@example.org https://example.org/?a=b&c=d",
    "<|startoftext|>inside<|endoftext|> <|STARTOFTEXT|> <|endoftext|",
    "hello! !bang! a!b",
    "a <cat-toy> and <CAT-TOY> x<cat-toy>y",
    "\u0000 control \u0007 \u200b zero \ufeff width \u00ad",
    "word " * 500,
    "x" * 300,
]


def random_texts(count=200):
    rng = np.random.default_rng(0)
    ranges = ((32, 127), (160, 0x250), (0x370, 0x600), (0x2000, 0x2C00), (0x3040, 0x30FF), (0x1F300, 0x1FAFF))
    texts = []
    for _ in range(count):
        low, high = ranges[rng.integers(len(ranges))]
        points = np.where(rng.random(20) < 0.3, rng.integers(32, 127, 20), rng.integers(low, high, 20))
        texts.append("".join(map(chr, points)))
    return texts


WORDS = """
    a photo of the cat, an <b>old</b> house &amp; garden &lt;3 &#39;quoted&#39; &nbsp; 4k
    ultra-HD, trending! (masterpiece:1.2) naïve café cafe\u0301 Ångström ﬁancé İstanbul ß ẞ Ω
    Ⅷ ½ عَرَبِيّ שָׁלוֹם فارسی हिन्दी ไทย 日本語 中文 한국어 👩🏽‍❤️‍💋‍👨🏿 🇨🇮 ❤️ 🏳️‍🌈 😀😀 #1 @user don't
    WON'T it's we've I'd ''tis rock'n'roll e-mail@example.org https://example.org/?q=1&r=2#x
    3.14e-10 $5 100% -- ... <|endoftext|> <|startoftext|> </w> a\u00adb zero\u200bwidth
    \ufeffbom \u202eright \u0007bell tab\there new\nline \u3000wide
""".split(" ")


# What open_clip leaves as it is: no entities, nothing to mend, no special tokens.
PLAIN = " ".join(word for word in WORDS if word.isascii() and not set(word) & set("&<\x07"))


def captions(count=2000):
    """Empty ones, very long ones, and random sequences of words of all kinds."""
    rng = np.random.default_rng(1)
    mixed = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count - len(TEXTS) - 204)]
    long = ["a red heart, " * 1600, "x" * 20_000, "😀" * 5_000, "é" * 20_000]
    return [*TEXTS, *random_texts(), *long, *mixed]


SCRIPT = """
    import json
    from transformers import CLIPTokenizer

    texts = json.loads((folder / "texts.json").read_text())
    for name in ("end_padded", "bang_padded", "added"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / name)
        # Converted from the old files to the one file of recent releases.
        tokenizer.save_pretrained(folder / (name + "_saved"))
        length = tokenizer.model_max_length
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
        outputs[name] = torch.tensor(encoded.input_ids)
        outputs[name + "/size"] = torch.tensor([len(tokenizer), length])

    captions = json.loads((folder / "captions.json").read_text())
    for name in ("clip", "open_clip"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / name)
        encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=77)
        outputs[name] = torch.tensor(encoded.input_ids)
        whole = tokenizer(captions, add_special_tokens=False).input_ids
        outputs[name + "/lengths"] = torch.tensor([len(ids) for ids in whole])
        outputs[name + "/whole"] = torch.tensor([token for ids in whole for token in ids])

    from open_clip.tokenizer import SimpleTokenizer

    original = SimpleTokenizer()
    (folder / "merges.json").write_text(json.dumps(list(original.bpe_ranks)))
    (folder / "vocabulary.json").write_text(json.dumps(original.encoder))
    outputs["original/plain"] = torch.tensor(original.encode((folder / "plain.txt").read_text()))
    outputs["original/entity"] = torch.tensor(original.encode("salt &amp; pepper"))
"""


@pytest.fixture(scope="module")
def tokenizers():
    trained = Tokenizer.train(CORPUS, 700, max_length=32)
    vocabulary, merges = trained.vocabulary, trained.merges
    return {
        "end_padded": trained,
        "bang_padded": Tokenizer(vocabulary, merges, max_length=77, pad_token="!"),
        "added": Tokenizer(vocabulary, merges, max_length=40, added_tokens={"<cat-toy>": len(vocabulary)}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizers):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in tokenizers.items():
        tokenizer.save(folder / name)
    Tokenizer.clip().save(folder / "clip")
    Tokenizer.clip("!").save(folder / "open_clip")
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    (folder / "texts.json").write_text(json.dumps(TEXTS + random_texts()))
    (folder / "captions.json").write_text(json.dumps(captions()))
    (folder / "plain.txt").write_text(PLAIN)
    return run_reference(SCRIPT, {}, folder)


def encode(tokenizer, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(texts)


@pytest.mark.parametrize("suffix", ["", "_saved"])
@pytest.mark.parametrize("name", ["end_padded", "bang_padded", "added"])
def test_ids_are_those_of_transformers(reference, folder, name, suffix):
    tokenizer = Tokenizer.load(folder / (name + suffix))
    assert [tokenizer.vocab_size, tokenizer.max_length] == reference[name + "/size"].tolist()
    ids = encode(tokenizer, TEXTS + random_texts())
    assert ids.dtype == np.int32
    for text, row, expected in zip(TEXTS + random_texts(), ids, reference[name], strict=True):
        assert row.tolist() == expected.tolist(), repr(text)


@pytest.mark.parametrize(("name", "pad_token"), [("clip", END_TOKEN), ("open_clip", "!")])
def test_clip_is_clip_over_two_thousand_captions(reference, name, pad_token):
    tokenizer = Tokenizer.clip(pad_token)
    assert (tokenizer.vocab_size, tokenizer.begin_token_id, tokenizer.end_token_id) == (49408, 49406, 49407)
    texts = captions()
    assert len(texts) == 2000 and max(map(len, texts)) >= 20_000
    whole = tokenizer.encode(texts)
    assert [len(ids) for ids in whole] == reference[name + "/lengths"].tolist()
    assert [token for ids in whole for token in ids] == reference[name + "/whole"].tolist()
    np.testing.assert_array_equal(encode(tokenizer, texts), reference[name])


def test_clip_is_what_open_clip_has(reference, folder):
    tokenizer = Tokenizer.clip()
    assert json.loads((folder / "merges.json").read_text()) == [list(pair) for pair in tokenizer.merges]
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    # Only the names of the special tokens differ.
    vocabulary[BEGIN_TOKEN] = vocabulary.pop("<start_of_text>")
    vocabulary[END_TOKEN] = vocabulary.pop("<end_of_text>")
    assert vocabulary == tokenizer.vocabulary
    assert tokenizer.encode(PLAIN)[0] == reference["original/plain"].tolist()
    assert len(reference["original/plain"]) > 50
    # The difference that the module names.
    assert tokenizer.encode("salt & pepper")[0] == reference["original/entity"].tolist()
    assert tokenizer.encode("salt &amp; pepper")[0] != reference["original/entity"].tolist()


@pytest.mark.parametrize("name", ["end_padded", "bang_padded", "added"])
def test_saved_folder_loads_as_the_same_tokenizer(tokenizers, folder, name):
    first, second = tokenizers[name], Tokenizer.load(folder / name)
    for attribute in ("vocabulary", "merges", "max_length", "pad_token", "added_tokens"):
        assert getattr(first, attribute) == getattr(second, attribute)


def test_begin_end_and_padding(tokenizers):
    ids = tokenizers["end_padded"](["", "red heart"])
    assert ids.shape == (2, 32)
    begin, end = tokenizers["end_padded"].begin_token_id, tokenizers["end_padded"].end_token_id
    assert ids[0].tolist() == [begin] + [end] * 31
    assert ids[1, 0] == begin and set(ids[1, 3:]) == {end}
    assert tokenizers["bang_padded"]("").tolist() == [[begin, end] + [0] * 75]
    assert tokenizers["end_padded"]([]).shape == (0, 32)


def test_layout_of_a_trained_vocabulary():
    tokenizer = Tokenizer.train(CORPUS, 600)
    tokens = sorted(tokenizer.vocabulary, key=tokenizer.vocabulary.get)
    assert list(tokenizer.vocabulary.values()) == list(range(600)) and tokenizer.vocab_size == 600
    assert tokens[:2] == ["!", '"'] and tokens[256:258] == ["!</w>", '"</w>']
    assert tokens[512:598] == ["".join(pair) for pair in tokenizer.merges]
    assert tokens[598:] == [BEGIN_TOKEN, END_TOKEN]
    assert tokenizer.max_length == 77


def test_training_is_reproducible_and_merges_frequent_pairs_first():
    first, second = (Tokenizer.train(iter(CORPUS), 650) for _ in range(2))
    assert first.merges == second.merges
    assert Tokenizer.train(["ab ab ab cd"] * 3, 516).merges == [("a", "b</w>"), ("c", "d</w>")]


def test_few_texts_give_a_smaller_vocabulary():
    assert Tokenizer.train(["a b"], 4096).vocab_size == 514
    assert Tokenizer.train([], 4096).vocab_size == 514
    assert Tokenizer.train(CORPUS, 10_000).vocab_size < 1000


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("", ""),
        ("A Red\n heart", "a red heart"),
        ("😀 שלום cafe\u0301 日本語", "😀 שלום café 日本語"),
        ("3 cats!", "3 cats !"),
    ],
)
def test_decode(tokenizers, text, decoded):
    assert tokenizers["end_padded"].decode(tokenizers["end_padded"](text)) == decoded
    assert tokenizers["end_padded"].decode(tokenizers["end_padded"].encode(text)[0]) == decoded


def test_truncation_warns_once_for_each_text_and_names_what_is_dropped(tokenizers):
    long = "cats " * 30 + "😀 and the END"
    with pytest.warns(UserWarning) as caught:
        ids = tokenizers["end_padded"](["red heart", long, "dogs " * 40])
    assert len(caught) == 2
    assert "😀 and the END'" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert ids[1, -1] == tokenizers["end_padded"].end_token_id
    kept = tokenizers["end_padded"].decode(ids[1])
    dropped = str(caught[0].message).split("dropped its end: ")[1].strip("'")
    assert (kept + " " + dropped).lower().split() == long.lower().split()


def test_a_text_that_just_fits_does_not_warn(tokenizers):
    tokenizer = tokenizers["end_padded"]
    word = next(text for text in ("a", "o", "1") if len(tokenizer.encode(text)[0]) == 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(" ".join([word] * 30))
    with pytest.warns(UserWarning, match="31 tokens where 30 fit"):
        tokenizer(" ".join([word] * 31))


@pytest.mark.parametrize(("value", "message"), [(["\ud83d"], "not valid Unicode"), ([3], "3 is a int")])
def test_what_is_no_text(tokenizers, value, message):
    with pytest.raises(UserError, match=message):
        tokenizers["end_padded"](value)


def test_decode_refuses_unknown_ids(tokenizers):
    with pytest.raises(UserError, match="token id 5000 is outside of the vocabulary"):
        tokenizers["end_padded"].decode([5000])


def test_vocabulary_size_below_the_alphabet():
    with pytest.raises(UserError, match="vocab_size 513 is too small; .* 514$"):
        Tokenizer.train(CORPUS, 513)


def test_length_without_room():
    with pytest.raises(UserError, match="max_length 2 has no room"):
        Tokenizer.train(CORPUS, 600, max_length=2)


def test_older_file_leads_on_padding(tmp_path, tokenizers):
    # As the files of SD 2.x: the end token in one, "!" in the other.
    tokenizers["bang_padded"].save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"pad_token": END_TOKEN, "model_max_length": 10**30}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_token_id == 0 and tokenizer.max_length == 77
    special_tokens = {"pad_token": {"content": END_TOKEN, "lstrip": False, "normalized": True}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    assert Tokenizer.load(tmp_path).pad_token == END_TOKEN


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"{", "vocab.json: not a JSON file"),
        ("vocab.json", b"[]", "vocab.json: not a JSON dictionary"),
        ("vocab.json", b'{"a": 0}', "has no token '<|startoftext|>'"),
        ("merges.txt", b"\xff\xfe", "merges.txt: not UTF-8"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merges.txt: 'a b c' is no pair"),
        ("merges.txt", b"#version: 0.2\nqx zj\n", "do not fit together"),
        ("merges.txt", b"", "no merge makes"),
        ("merges.txt", b"#version: 0.2\n", "fetch the tokenizer's files again"),
        ("merges.txt", None, "merges.txt: not found"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "bos_token"),
        ("added_tokens.json", b'{"<new>": 9999}', "'<new>' has id 9999 where 657 is next"),
    ],
)
def test_damaged_files(tmp_path, tokenizers, name, content, message):
    tokenizers["end_padded"].save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folder_without_files(tmp_path):
    with pytest.raises(UserError, match=r"vocab.json: not found; .* or tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "model", [{}, {"type": "WordPiece", "vocab": {}}, {"type": "BPE", "vocab": {}, "merges": []}]
)
def test_other_kinds_of_tokenizer(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(UserError, match="not CLIP's byte-pair encoding"):
        Tokenizer.load(tmp_path)


def test_added_tokens_are_found_whole(tokenizers):
    plain = tokenizers["end_padded"]
    tokenizer = plain.add_tokens(["<Cat>"]).add_tokens(vector_names("<dog>", 3))
    size = plain.vocab_size
    assert (tokenizer.vocab_size, plain.vocab_size, plain.added_tokens) == (size + 4, size, {})
    (red,), (comma,) = plain.encode(["red"]), plain.encode([","])
    cat, dog = size, list(range(size + 1, size + 4))
    # A word of several vectors stands for all of them, in whatever case and place.
    for text, expected in {
        "<cat>": [cat],
        "red <CAT>, red": [*red, cat, *comma, *red],
        "<dog>": dog,
        "<cat><dog><dog>": [cat, *dog, *dog],
        "red,<DOG> red": [*red, *comma, *dog, *red],
        "<dog>_2": dog[2:],
    }.items():
        assert tokenizer.encode([text]) == [expected], text
    with pytest.warns(UserWarning, match="33 tokens where 30 fit; dropped its end: '<dog>'"):
        ids = tokenizer("<dog>" * 11)
    assert ids[0, 1:-1].tolist() == dog * 10


def test_added_tokens_survive_the_folder(tokenizers, tmp_path):
    tokenizer = tokenizers["end_padded"].add_tokens(vector_names("<dog>", 2))
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.added_tokens == tokenizer.added_tokens
    assert again.encode(["a <dog>"]) == tokenizer.encode(["a <dog>"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "'a': is in the vocabulary already"),
        (["!"], "'!': is in the vocabulary already"),
        ([END_TOKEN], "is in the vocabulary already"),
        (["<b>", "<B>"], "'<B>': is in the vocabulary already"),
        ([""], "token '': empty"),
        (["my cat"], "'my cat': empty, or with a space"),
        (["(cat)"], "bracket"),
        (["<lora:cat>"], "colon"),
    ],
)
def test_names_that_cannot_be_added(tokenizers, names, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tokenizers["end_padded"].add_tokens(names)
