"""Keywords of texts such as product introductions, by TF-IDF over the whole set.

Spärck Jones, "A Statistical Interpretation of Term Specificity and Its Application in Retrieval", 1972.
"""

import collections
import functools
import html
import re

from keras_sd.errors import require

_NOISE = re.compile(r"<[^<>]*>|https?://\S+|www\.\S+|\S+@\S+\.\S+")
_JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uff66-\uff9fー々]+")
_LATIN = re.compile(r"[^\W\d_](?:[\w'’-]*[^\W_])?")
_NO_NOUNS = {"非自立", "代名詞", "数", "接尾", "副詞可能"}


def keywords(texts, count=5):
    """Return the most significant words of each text.

    A word counts more the more often it occurs in a text and the fewer texts it occurs in; words that occur
    in all texts come last. Japanese, recognised by its script, is split into nouns and adjectives. In other
    languages only English stop words and words with a digit are left out.

    Args:
        texts: strings; HTML is allowed.
        count: number of words for each text.

    Returns:
        A list of words for each text, the most significant first, each in its most frequent spelling; fewer
        than `count` if a text has fewer.

    Raises:
        UserError: scikit-learn, or for Japanese janome, is not installed.
    """
    texts = [html.unescape(_NOISE.sub(" ", text)) for text in texts]
    written = [_words(text) for text in texts]
    terms = [[word.lower() for word in words] for words in written]
    if not any(terms):
        return [[] for _ in texts]
    vectorizer = _scikit_learn().TfidfVectorizer(analyzer=list)
    weights = vectorizer.fit_transform(terms)
    columns = vectorizer.vocabulary_
    documents = collections.Counter(term for row in terms for term in set(row))
    result = []
    for index, row in enumerate(terms):
        forms = collections.defaultdict(collections.Counter)
        for word in written[index]:
            forms[word.lower()][word] += 1
        weight = weights[index].toarray()[0]
        distinct = dict.fromkeys(row)  # in order of appearance, which a stable sort keeps
        everywhere = {term: len(terms) > 1 and documents[term] == len(terms) for term in distinct}
        best = sorted(distinct, key=lambda term: (everywhere[term], -round(weight[columns[term]], 9)))
        result.append([forms[term].most_common(1)[0][0] for term in best[:count]])
    return result


def _words(text):
    words = []
    for run in _JAPANESE.findall(text):
        words += _japanese_words(run)
    stop_words = _scikit_learn().ENGLISH_STOP_WORDS
    for word in _LATIN.findall(_JAPANESE.sub(" ", text)):
        plain = word.replace("’", "'").removesuffix("'s")
        if len(plain) > 1 and plain.lower() not in stop_words and not any(map(str.isdigit, plain)):
            words.append(plain)
    return words


def _japanese_words(text):
    words = []
    for token in _japanese_tokenizer().tokenize(text):
        kind, detail = token.part_of_speech.split(",")[:2]
        if kind == "名詞" and detail not in _NO_NOUNS and len(token.surface) > 1:
            words.append(token.surface)
        elif kind == "形容詞":
            words.append(token.base_form)
    return words


def _scikit_learn():
    require("sklearn")
    from sklearn.feature_extraction import text

    return text


@functools.cache
def _japanese_tokenizer():
    require("janome")
    from janome.tokenizer import Tokenizer

    return Tokenizer()
