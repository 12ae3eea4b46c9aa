from keras_sd.captions.keywords import keywords

WHISKY = [
    "<p>This <b>whisky</b> from Islay is full of peat and smoke. Peat, smoke, salt: Islay&#39;s best.</p>",
    "A whisky matured in sherry casks. Sherry, raisins, dark chocolate at £49.99: https://example.com/sherry",
    "A light whisky with honey and citrus: honey on the nose, citrus on the palate, 12 years old.",
]
TEA = [
    "宇治の抹茶です。濃い抹茶の香りと旨味。",
    "静岡の煎茶です。爽やかな煎茶の渋み。",
    "台湾の烏龍茶です。花のような香りの烏龍茶。",
]


def test_english():
    words = keywords(WHISKY, 3)
    assert set(words[0]) == {"Islay", "peat", "smoke"}
    assert words[1][0].lower() == "sherry"
    assert words[2][:2] == ["honey", "citrus"]
    everything = {word.lower() for row in keywords(WHISKY, 50) for word in row}
    assert not everything & {"b", "p", "the", "https", "example", "49", "12", "at"}


def test_words_of_all_texts_come_last():
    for row in keywords(WHISKY, 50):
        assert row[-1] == "whisky"


def test_japanese():
    words = keywords(TEA, 2)
    assert words[0][0] == "抹茶" and words[1][0] == "煎茶"
    assert "烏龍茶" in "".join(words[2])


def test_both_languages_in_one_text():
    assert set(keywords(["宇治 matcha latte", "静岡 sencha"], 3)[0]) == {"宇治", "matcha", "latte"}


def test_one_text_goes_by_frequency():
    assert keywords(["smoke peat smoke salt smoke peat"], 2) == [["smoke", "peat"]]


def test_ties_go_by_appearance():
    assert keywords(["salt smoke peat", "honey"], 3)[0] == ["salt", "smoke", "peat"]


def test_empty():
    assert keywords(["", "<br>"]) == [[], []]
    assert keywords([]) == []
    assert keywords(["", "peat"]) == [[], ["peat"]]
