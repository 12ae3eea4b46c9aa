import itertools
import random
import re
import time
import unicodedata

import pytest

from keras_sd.captions import CleaningSettings
from keras_sd.captions.cleaning import ArtistRemover, Cleaner
from keras_sd.errors import UserError

ARTISTS = """Greg Rutkowski|Alphonse Mucha|Claude Monet|Monet|Vincent van Gogh|Van Gogh|H.R. Giger
Jean-Léon Gérôme|Artgerm|Banksy|Beeple|Hayao Miyazaki|Katsushika Hokusai|Hokusai
Utagawa Hiroshige|Rembrandt van Rijn|Rembrandt|Caravaggio|Leonardo da Vinci|Michelangelo
Albrecht Dürer|Hieronymus Bosch|Pieter Bruegel the Elder|J. M. W. Turner|John Singer Sargent
N.C. Wyeth|M.C. Escher|Egon Schiele|Gustav Klimt|Paul Cézanne|Edgar Degas|Édouard Manet
Pierre-Auguste Renoir|Henri de Toulouse-Lautrec|Toulouse-Lautrec|Georges Seurat|Paul Klee
Wassily Kandinsky|Piet Mondrian|Kazimir Malevich|Salvador Dalí|Joan Miró|Pablo Picasso
René Magritte|Max Ernst|Frida Kahlo|Diego Rivera|Edward Hopper|Norman Rockwell|Georgia O'Keeffe
Andy Warhol|Roy Lichtenstein|Keith Haring|Jean-Michel Basquiat|Yayoi Kusama|Takashi Murakami
Zdzisław Beksiński|Ilya Repin|Ivan Aivazovsky|Caspar David Friedrich|William Blake
Dante Gabriel Rossetti|Maxfield Parrish|Moebius|Sachin Teng|Will|Rose
Artist|Syd Mead|Art & Language|George Barret, Jr."""
ARTISTS = ARTISTS.replace("\n", "|").split("|")

TEMPLATES = """a castle on a hill, by {a}
a castle on a hill by {a}, oil on canvas
a castle, by {a} and {b}, trending on artstation
a castle, by {a}, {b} and {c}, 8k
a castle, art by {a}, sharp focus
a castle, inspired by {a}, sharp focus
a castle in the style of {a}
a castle, in the style of {a} and {b}, vivid
a castle, style of {a}
a castle, {a} style, vivid
a castle in {a} style, vivid
a castle, {a}'s style
{a}, a castle on a hill
a castle, {a}, {b}, {c}
a castle, {a}
a painting by {a} of a castle
{a}'s painting of a castle
a {a} landscape with a castle
a castle, trending on artstation by {a}
a castle painted by {a}, vivid
a castle, by artist {a}, vivid
a castle, by {a} & {b}
a castle, by {a} / {b}
a castle, {a}-inspired, vivid
a castle, heavily influenced by {a}
a castle (by {a}:1.2), vivid
a castle, artwork by {a} and by {b}
a castle, a la {a}, vivid""".splitlines()

WITHOUT = """a house by the sea|stand by me|a scarf made by hand|two chairs side by side
a portrait by candlelight|a town by night, moody|seen by everyone|a kimono inspired by Japan
a hall in the style of Art Deco|a gothic style church|monetary policy, a chart
a bankers' meeting|rose petals on a table|a white rose|what will be|a church, a wood, a hill
inspired by nature|baroque style, gold frame|street art style mural|a bus passing by|day by day
one by one|a cabin by Lake Como|by the river, reeds|drawn by hand|stitched by machine
free will and fate|the will of the people|an oil painting of a castle|the artist's studio
a style guide|in style|a painter at work|photography of a cat|a museum of art, marble
high-resolution, 8k,  double  spaces|a,b,c|trailing comma,|(masterpiece:1.2), best quality
van parked by a road|a leonard cat|a klee-like drawing of nothing known|hopping rabbits
friedrich street|max speed|an ernest man|a dali lama|miro board|blakely square|a haring
a turn in the road|turners guild|a boschka doll|art by the people|designed by engineers
directed by no one|powered by steam|lit by moonlight|surrounded by trees|by candlelight
by a mile|by day and by night|a stand by Night|a book by its cover|sorted by size|framed by ivy
style|art|a classic|and|inspired|a hand|the old park|snow on stone|a wolf, a fox, a bird
gold, silver and steel|light by the window|spring, summer, winter|Will it rain|young love
a potter at the wheel|green hill, blue sea|a west wind|a singer on stage|king of the hill
sands of time|rich brown bread|long street|night market|grey marsh|frost on the field
a bell tower|old bridge over a brook|pool side|robin on a wall|a diamond ring
flowers in a garden|deep ocean|storm clouds|a hunter in the woods|moon over water|star chart
rock garden""".replace("\n", "|").split("|")


def plain(text):
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return re.sub(r"[\W_]+", "", "".join(c for c in decomposed if not unicodedata.combining(c)))


def prompts(count=300):
    generator = random.Random(0)
    templates = itertools.cycle(TEMPLATES)
    spellings = (str, str.lower, str.upper, lambda name: unicodedata.normalize("NFD", name))
    spellings += (lambda name: name.replace(".", "").replace("-", " "),)
    for template in itertools.islice(templates, count):
        names = generator.sample([name for name in ARTISTS if name not in ("Will", "Rose", "Artist")], 3)
        spelled = [generator.choice(spellings)(name) for name in names]
        yield template.format(**dict(zip("abc", spelled, strict=True))), names


def test_no_known_name_is_left():
    remove = ArtistRemover(ARTISTS)
    for prompt, names in prompts():
        text, removed = remove(prompt)
        assert removed, prompt
        assert not [name for name in names if plain(name) in plain(text)], (prompt, text)
        assert "castle" in text
        assert not re.search(
            r"  |, ,|,,|^,|,$|\bby *(,|$)|\band *(,|$)|style of *(,|$)|inspired by *(,|$)", text
        ), text


def test_prompts_without_names_are_not_changed():
    assert len(WITHOUT) >= 100
    remove = ArtistRemover(ARTISTS)
    for prompt in WITHOUT:
        assert remove(prompt) == (prompt, []), prompt


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A Castle, by Greg Rutkowski, Oil", "A Castle, Oil"),
        ("a castle by HR Giger", "a castle"),
        ("a castle, by H. R. Giger and Some Unknown, wet", "a castle, wet"),
        ("a castle, by Some Unknown", "a castle"),
        ("a painting by Some Unknown, wet", "a painting, wet"),
        ("art by Monet", ""),
        ("a painting by Monet of a boat", "a painting of a boat"),
        ("a pond in Monet style, lilies", "a pond, lilies"),
        ("by Monet, Degas, lilies", "Degas, lilies"),
        ("lilies, Rose, pond", "lilies, pond"),
        ("lilies by rose, pond", "lilies, pond"),
        ("Jean-Leon Gerome's market", "market"),
        ("a field, by Art & Language, George Barret, Jr. and Syd Mead. rich colors", "a field, rich colors"),
        ("the artist's studio, by Artist", "the artist's studio"),
        ("lilies, a work in the style of van Gogh, vivid", "lilies, a work, vivid"),
    ],
)
def test_what_is_left(prompt, expected):
    assert ArtistRemover(ARTISTS)(prompt)[0] == expected


def test_names_are_told_as_they_stood():
    assert ArtistRemover(ARTISTS)("a castle, by HR Giger and Monet")[1] == ["HR Giger", "Monet"]


def test_a_long_list_costs_little():
    artists = [
        f"{first}{a} {last}{b}"
        for first in ("Ann", "Bo")
        for a in "abcdefghijklmnop"
        for last in ("Smit", "Berg")
        for b in map(str, range(80))
    ]
    assert len(artists) > 5000
    remove = ArtistRemover(artists)
    start = time.process_time()
    for _ in range(200):
        remove("a castle on a hill, by Anna Smit7, " + "vivid, sharp focus, oil on canvas, " * 8)
    assert time.process_time() - start < 2


def count_words(text):
    return len(text.replace(",", " ,").split())


def test_order_of_cleaning():
    clean = Cleaner(ARTISTS, [r"\bof a bottle\b", r"\d+k"], "whisky")
    cleaned = clean("a picture of a bottle, by Monet, 8k, warm light", ["peat", "Islay", "warm"])
    assert cleaned.text == "whisky, a picture, warm light, peat, Islay"
    assert cleaned.artists == ("Monet",)


def test_product_type_stands_once():
    assert Cleaner(product_type="whisky")("a Whisky bottle").text == "a Whisky bottle"
    assert Cleaner(product_type="whisky")("whiskyish").text == "whisky, whiskyish"


def test_names_may_stand_in_a_file(tmp_path):
    (tmp_path / "artists.txt").write_text("Claude Monet\n")
    clean = CleaningSettings(artists=str(tmp_path / "artists.txt")).prepare()
    cleaned = clean("heart.png", "a heart by Claude Monet, a star")
    assert (cleaned.text, cleaned.artists) == ("a heart, a star", ("Claude Monet",))


def test_artists_stay_unless_asked():
    assert Cleaner()("lilies, by Monet").text == "lilies, by Monet"


def test_length_is_cut_at_commas_flavours_first():
    clean = Cleaner(product_type="tea", maximum_tokens=9, count_tokens=count_words)
    cleaned = clean("a green cup, steam, morning, soft", ["Uji"])
    assert (cleaned.text, cleaned.cut) == ("tea, a green cup, steam, Uji", 2)
    assert count_words(cleaned.text) <= 9


def test_a_long_sentence_is_cut_at_words():
    clean = Cleaner(product_type="tea", maximum_tokens=5, count_tokens=count_words)
    assert clean("a green cup on a table", ["Uji"]).text == "tea, a green cup"


def test_nothing_is_left():
    assert Cleaner([], [".*"])("a green cup").text == ""


def test_wrong_pattern():
    with pytest.raises(UserError, match=r"pattern '\(': no regular expression"):
        Cleaner(patterns=["("])
