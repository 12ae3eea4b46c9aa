"""The prompt language against what AUTOMATIC1111's interface makes of the same texts."""

import time
import warnings

import numpy as np
import pytest

from keras_sd.errors import UserError
from keras_sd.models.tokenizer import Tokenizer
from keras_sd.pipeline.prompts import _multiply, chunk_prompts, equally_long, parse_prompt, weighted_encoding
from tests import tiny

BREAK = (None, 1.0)


@pytest.fixture(scope="module")
def clip():
    return Tokenizer.clip()


@pytest.mark.parametrize(
    "prompt, fragments",
    [
        ("a red fox", [("a red fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a ((red)) fox", [("a ", 1), ("red", 1.21), (" fox", 1)]),
        ("a [red] fox", [("a ", 1), ("red", 1 / 1.1), (" fox", 1)]),
        ("a [[red]] fox", [("a ", 1), ("red", 1 / 1.21), (" fox", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("a (red: 1.3 ) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("a (red:.5) fox", [("a ", 1), ("red", 0.5), (" fox", 1)]),
        ("a (red:-1) fox", [("a ", 1), ("red", -1), (" fox", 1)]),
        ("a (red:0) fox", [("a ", 1), ("red", 0), (" fox", 1)]),
        ("a (very (red:2) big:1.5) fox", [("a ", 1), ("very ", 1.5), ("red", 3), (" big", 1.5), (" fox", 1)]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
        ("a \\(red\\) fox", [("a (red) fox", 1)]),
        ("a \\[red\\] \\\\fox", [("a [red] \\fox", 1)]),
        ("(a \\(b\\):1.2)", [("a (b)", 1.2)]),
        ("a (red fox", [("a ", 1), ("red fox", 1.1)]),
        ("a [red fox", [("a ", 1), ("red fox", 1 / 1.1)]),
        ("a red) fox]", [("a red) fox]", 1)]),
        ("a (b [c) d]", [("a ", 1), ("b ", 1.1), ("c", 1), (" d", 1 / 1.1)]),
        ("ratio 16:9 at 9:30", [("ratio 16:9 at 9:30", 1)]),
        ("a: 1.5) fox", [("a: 1.5) fox", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.5", [("a:1.5", 1.1)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("(x:1e999)", [("x:1e999", 1.1)]),
        ("(x:nan)", [("x:nan", 1.1)]),
        ("a BREAK b", [("a ", 1), BREAK, (" b", 1)]),
        ("(a BREAK b:2)", [("a ", 2), BREAK, (" b", 2)]),
        ("BREAKFAST, a break, OUTBREAK", [("BREAKFAST, a break, OUTBREAK", 1)]),
        ("a\nBREAK\nb", [("a\n", 1), BREAK, ("\nb", 1)]),
        ("(BREAK)(BREAK)", [BREAK, BREAK]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *(("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1)),
                *(("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
            ],
        ),
        ("C:\\fox \\", [("C:\\fox \\", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("[a:1.5)", [("a:1.5)", 1 / 1.1)]),
        ("()", []),
        ("", []),
    ],
)
def test_weights(prompt, fragments):
    parsed = parse_prompt(prompt)
    texts, weights = (
        [text for text, _ in parsed],
        [1.0 if text is None else weight for text, weight in parsed],
    )
    assert texts == [text for text, _ in fragments]
    np.testing.assert_allclose(weights, [weight for _, weight in fragments])


def weight_of_each_letter(pieces):
    """The letters of a prompt given in pieces, each with the product of all brackets that span it."""
    spans = []  # first piece, piece after the last, factor
    letters = {}
    for opening, factor in (("(", 1.1), ("[", 1 / 1.1)):
        closing = {"(": {")": 1.1, ":1.5)": 1.5}, "[": {"]": 1 / 1.1}}[opening]
        open_at = []
        for place, piece in enumerate(pieces):
            if piece == opening:
                open_at.append(place)
            elif piece in closing and open_at:
                spans.append((open_at.pop(), place, closing[piece]))
            elif piece in closing:
                letters[place] = piece
        spans += [(start, len(pieces), factor) for start in open_at]
    letters |= {place: piece for place, piece in enumerate(pieces) if piece.strip().isalpha()}
    letters |= {place: piece[1] for place, piece in enumerate(pieces) if piece[0] == "\\"}
    return [
        (letter, np.prod([factor for start, end, factor in spans if start < place < end]))
        for place, piece in sorted(letters.items())
        for letter in piece.replace("BREAK", "")
    ]


def test_every_letter_has_the_weight_of_its_brackets():
    generator = np.random.default_rng(1)
    pieces = ["(", "[", ")", "]", ":1.5)", "\\(", "\\]", "\\\\", "red", " fox ", " BREAK "]
    for _ in range(500):
        chosen = [str(piece) for piece in generator.choice(pieces, generator.integers(1, 25))]
        parsed = parse_prompt("".join(chosen))
        letters = [(letter, weight) for text, weight in parsed if text is not None for letter in text]
        expected = weight_of_each_letter(chosen)
        assert [letter for letter, _ in letters] == [letter for letter, _ in expected], chosen
        np.testing.assert_allclose([w for _, w in letters], [w for _, w in expected], err_msg=str(chosen))
        assert sum(text is None for text, _ in parsed) == chosen.count(" BREAK ")


def test_brackets_in_any_order_lose_no_letter():
    generator = np.random.default_rng(0)
    for _ in range(500):
        prompt = "".join(generator.choice(list("ab (()[]:1.,\\") + ["BREAK", "(a:1.5)"], 20))
        letters = "".join(character for character in prompt.replace("BREAK", "") if character in "ab,")
        text = "".join(text for text, _ in parse_prompt(prompt) if text is not None)
        assert "".join(character for character in text if character in "ab,") == letters


@pytest.mark.parametrize(
    "prompts",
    [
        ["red heart"],
        ["", "blue heart, flag of Japan"],
        ["16:9 C:\\x", "a) b] <3 &amp; | Cafe\u0301 😀 שלום", " \n BREAKFAST"],
    ],
)
def test_a_plain_prompt_is_what_the_tokenizer_makes_of_it(clip, prompts):
    for tokenizer in (clip, tiny.tokenizer(max_length=32)):
        ids, weights = chunk_prompts(tokenizer, prompts)
        np.testing.assert_array_equal(ids[:, 0], tokenizer(prompts))
        assert ids.shape == weights.shape == (len(prompts), 1, tokenizer.max_length)
        assert (weights == 1).all()


def test_tokens_carry_their_weights(clip):
    (ids,), (weights,) = chunk_prompts(clip, ["a (red:1.3) fox"])
    assert ids[0, :5].tolist() == [49406, 320, 736, 3240, 49407]
    np.testing.assert_allclose(weights[0, :5], [1, 1, 1.3, 1, 1])
    assert (weights[0, 5:] == 1).all() and (ids[0, 5:] == 49407).all()


def words(ids, clip):
    """The text of each chunk."""
    return [clip.decode(chunk) for chunk in ids]


def test_long_prompts_go_on_in_further_chunks(clip):
    numbers = [str(number % 10) for number in range(160)]
    ids, weights = chunk_prompts(clip, [" ".join(numbers), "red"])
    assert ids.shape == weights.shape == (2, 3, 77)
    assert words(ids[0], clip) == [" ".join(numbers[start : start + 75]) for start in (0, 75, 150)]
    assert words(ids[1], clip) == ["red"] * 3


@pytest.mark.parametrize("after_comma, carried", [(0, True), (1, True), (19, True), (20, False), (60, False)])
def test_a_phrase_is_not_cut_if_its_comma_is_near(clip, after_comma, carried):
    prompt = "a " * (74 - after_comma) + "," + " b" * (after_comma + 5)
    (ids,), _ = chunk_prompts(clip, [prompt])
    first, second = words(ids, clip)
    assert second.split() == ["b"] * (after_comma + 5 if carried else 5)
    assert first.count("b") == (0 if carried else after_comma)


def test_a_comma_that_would_begin_a_chunk_cuts_no_phrase(clip):
    (ids,), _ = chunk_prompts(clip, ["a " * 70 + ", b b b b , c"])
    assert words(ids, clip) == ["a " * 70 + ", b b b b", ", c"]


def chunk_borders(tokens, room):
    """How many tokens each chunk holds, by cutting a list."""
    lengths = []
    while len(tokens) > room:
        near = [place for place in range(max(room - 20, 0), room) if tokens[place] == ","]
        lengths.append(near[-1] + 1 if near and tokens[room] != "," else room)
        tokens = tokens[lengths[-1] :]
    return [*lengths, len(tokens)]


@pytest.mark.parametrize("max_length", [12, 32, 77])
def test_borders_of_chunks(clip, max_length):
    tokenizer = Tokenizer(clip.vocabulary, clip.merges, max_length)
    generator = np.random.default_rng(2)
    for share in (0.0, 0.02, 0.05, 0.2, 1.0):
        for length in (1, max_length - 2, max_length - 1, 300):
            tokens = ["," if comma else "a" for comma in generator.random(length) < share]
            (ids,), _ = chunk_prompts(tokenizer, [" ".join(tokens)])
            lengths = [list(chunk).index(tokenizer.end_token_id) - 1 for chunk in ids]
            assert lengths == chunk_borders(tokens, max_length - 2)
            assert " ".join(words(ids, tokenizer)).split() == tokens


def test_break_begins_a_chunk(clip):
    (ids,), (weights,) = chunk_prompts(clip, ["a red fox BREAK (snow:1.5) BREAK ice"])
    assert words(ids, clip) == ["a red fox", "snow", "ice"]
    assert weights[1, 1] == 1.5 and (np.delete(weights.ravel(), 77 + 1) == 1).all()


@pytest.mark.parametrize(
    "prompt, chunks",
    [
        ("a BREAK", ["a"]),
        ("BREAK", [""]),
        ("BREAK a", ["", "a"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("a " * 75 + "BREAK", ["a " * 75]),
        ("a " * 75 + "BREAK b", ["a " * 75, "b"]),
    ],
)
def test_chunks_of_breaks_at_borders(clip, prompt, chunks):
    (ids,), _ = chunk_prompts(clip, [prompt])
    assert words(ids, clip) == [chunk.strip() for chunk in chunks]


def test_twenty_thousand_characters_of_brackets_lose_nothing(clip):
    prompt = "(a[b" * 5000
    (ids,), (weights,) = chunk_prompts(clip, [prompt])
    assert " ".join(words(ids, clip)).split() == ["a", "b"] * 5000
    is_text = (ids != clip.begin_token_id) & (ids != clip.end_token_id)
    np.testing.assert_allclose(weights[is_text], [1.1, 1] * 5000, rtol=1e-6)


def test_digits_without_end_are_letters(clip):
    (ids,), _ = chunk_prompts(clip, ["(x:" + "9" * 20_000])
    assert "".join(words(ids, clip)).replace(" ", "") == "x:" + "9" * 20_000


def test_a_number_of_chunks_can_be_asked_for(clip):
    ids, _ = chunk_prompts(clip, ["red"], chunks=3)
    assert words(ids[0], clip) == ["red"] * 3
    with pytest.raises(UserError, match="needs 2 chunks of tokens where 3 are given; give a multiple"):
        chunk_prompts(clip, ["a BREAK b"], chunks=3)


def test_no_prompts(clip):
    ids, weights = chunk_prompts(clip, [])
    assert ids.shape == weights.shape == (0, 1, 77)


def test_weighing_by_hand():
    encodings = np.array([[[[1, 3], [2, 2]]]], "float32")
    weighted = weighted_encoding(encodings, np.array([[[1, 2]]], "float32"))
    # The mean of 1, 3, 4, 4 is 3; it was 2.
    np.testing.assert_allclose(weighted, np.array([[[1, 3], [4, 4]]]) * 2 / 3, rtol=1e-6)
    assert weighted.dtype == np.float32


def test_weighing_restores_the_mean_of_each_chunk():
    generator = np.random.default_rng(0)
    encodings = generator.standard_normal((2, 3, 5, 4)).astype("float32") + 0.3
    weights = np.ones((2, 3, 5), "float32")
    plain = weighted_encoding(encodings, weights)
    assert plain.tobytes() == encodings.tobytes() and plain.shape == (2, 15, 4)

    weights[1, 2, 3] = 1.5
    weighted = weighted_encoding(encodings, weights).reshape(encodings.shape)
    np.testing.assert_array_equal(weighted[0], encodings[0])
    np.testing.assert_array_equal(weighted[1, :2], encodings[1, :2])
    np.testing.assert_allclose(weighted[1, 2].mean(), encodings[1, 2].mean(), rtol=1e-5)
    ratio = weighted[1, 2] / encodings[1, 2]
    np.testing.assert_allclose(ratio[3] / ratio[0], 1.5, rtol=1e-5)
    silent = weighted_encoding(encodings, np.zeros_like(weights))
    assert (silent == 0).all()  # no mean to restore


def test_where_there_is_no_mean_the_norm_is_restored():
    generator = np.random.default_rng(0)
    encodings = generator.standard_normal((1, 1, 5, 400)).astype("float32")
    weights = np.ones((1, 1, 5), "float32")
    weights[..., 2] = 1.5
    encodings -= (
        encodings * weights[..., None]
    ).mean() / weights.mean() + 1e-4  # nothing is left of the mean
    weighted = weighted_encoding(encodings, weights)[0]
    np.testing.assert_allclose(np.linalg.norm(weighted), np.linalg.norm(encodings), rtol=1e-5)
    np.testing.assert_allclose(
        weighted[2] / weighted[0], 1.5 * encodings[0, 0, 2] / encodings[0, 0, 0], rtol=1e-4
    )
    # Nor may the mean of what has been weighed be divided by where it vanishes.
    shifted = encodings + 0.5
    weights[..., 2] = 1 - 5 * shifted.mean() / shifted[0, 0, 2].mean()
    assert abs((shifted * weights[..., None]).mean()) < 1e-5
    weighted = weighted_encoding(shifted, weights)
    np.testing.assert_allclose(np.linalg.norm(weighted), np.linalg.norm(shifted), rtol=1e-5)


def test_chunks_are_repeated_to_the_least_common_multiple(clip):
    ids, weights = chunk_prompts(clip, ["a BREAK (b:1.5)", "a BREAK b BREAK c", "d"])
    assert [words(row, clip) for row in ids] == [["a", "b"] * 3, ["a", "b", "c"] * 2, ["d"] * 6]
    assert weights[0, :, 1].tolist() == [1, 1.5] * 3
    short, long = np.arange(8.0).reshape(1, 4, 2), np.arange(12.0).reshape(1, 6, 2)
    first, second, none = equally_long(short, long, None)
    np.testing.assert_array_equal(first, np.concatenate([short] * 3, axis=1))
    np.testing.assert_array_equal(second, np.concatenate([long] * 2, axis=1))
    assert none is None


@pytest.mark.parametrize(
    "prompt, line",
    [
        ("a fox <lora:snow:0.8>", "<lora:snow:0.8> is left out"),
        ("a fox <hypernet:snow:1>", "<hypernet:snow:1> is left out"),
        ("a [fox|cat]", r"\[fox\|cat\] is read as a weight"),
        ("a [fox:cat:0.5]", r"\[fox:cat:0.5\] is read as a weight"),
        ("a [fox::10]", r"\[fox::10\] is read as a weight"),
        ("a [fox: .5]", r"\[fox: .5\] is read as a weight"),
        ("a [(b:1.1)|c]", r"\[\(b:1.1\)\|c\] is read as a weight"),
        ("a [[[fox]]:2]", r"prompt: \[\[\[fox\]\]:2\] is read as a weight"),
        ("a [fox\n|\ncat]", r"\[fox \| cat\] is read as a weight"),
        (f"[{'a' * 100}|b]", r"\[a{56}\.\.\. is read as a weight"),
        ("a fox AND a cat", "AND is read as a word"),
    ],
)
def test_what_a_model_cannot_take_is_named(clip, prompt, line):
    with pytest.warns(UserWarning, match=line) as caught:
        (ids,), _ = chunk_prompts(clip, [prompt])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)
    assert "lora" not in clip.decode(ids[0]) and "hypernet" not in clip.decode(ids[0])


def test_ordinary_prompts_warn_of_nothing(clip):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunk_prompts(clip, ["a (red:1.3) [fox], 16:9, sand and stone <3", "word " * 200])
        chunk_prompts(clip, ["a \\[fox|cat\\] or a|b, [a (b:1.2)], [unclosed|, SAND"])


@pytest.mark.parametrize(
    "prompt, line",
    [
        (3, "3 is a int; give texts"),
        ("\ud83d", "not valid Unicode"),
        ("(x:1001)", "prompt: a weight of 1001; use at most 1000"),
        ("(" * 9000 + "x", "prompt: a weight of inf; use at most 1000"),
        (f"(x:{'9' * 400})", "prompt: a weight of inf; use at most 1000"),
        (f"((x:0):{'9' * 400})", "prompt: a weight of nan; use at most 1000"),
        ("(x:-1001)", "prompt: a weight of -1001; use at most 1000"),
    ],
)
def test_what_is_no_prompt_is_one_line(clip, prompt, line):
    with pytest.raises(UserError, match=line):
        chunk_prompts(clip, [prompt])


@pytest.mark.parametrize("end", ["", ":1)" * 50_000, ")" * 50_000])
def test_brackets_in_each_other_take_no_time(end):
    began = time.process_time()
    assert parse_prompt("(a" * 50_000 + end)[0].weight == (1 if ":" in end else 1.1)
    assert time.process_time() - began < 5


def test_spans_in_each_other_multiply():
    weights = [1.0] * 6
    _multiply(weights, [(1, 4, 2.0), (0, 4, 3.0), (2, 2, 100.0), (1, 2, 5.0), (5, 6, 7.0)])
    assert weights == [3, 30, 6, 6, 1, 7]
