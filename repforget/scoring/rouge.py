"""ROUGE of generations, with the tokens of the library rouge-score and each text tokenised once."""

from __future__ import annotations

from collections import Counter
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import NamedTuple

from repforget.errors import MissingExtraError, UsageError

REMEMBERED = 50_000  # tokenised texts, and stemmed words


class Rouge(NamedTuple):
    """Share of the reference found, share of the prediction that is found, and their harmonic mean."""

    recall: float
    precision: float
    f1: float


def rouge_l(reference: str, prediction: str, *, stem: bool = True) -> Rouge:
    """Score the longest common subsequence of words (Lin 2004), exactly as rouge-score 0.1.2 does.

    TOFU reports the recall with stemming, MUSE F1 without. Recall has no penalty for length: a ramble that
    contains the words scores high. Raises :class:`MissingExtraError` without the library.
    """
    a, b = _words(reference, stem), _words(prediction, stem)
    return _score(_common_length(a, b), len(a), len(b))


def rouge_n(reference: str, prediction: str, n: int = 1, *, stem: bool = True) -> Rouge:
    """Score the common n-grams of words, counted as often as they occur in both; see :func:`rouge_l`."""
    if n < 1:
        raise UsageError(f"rouge_n counts n-grams of at least 1 word, not {n}.")
    a, b = _grams(_words(reference, stem), n), _grams(_words(prediction, stem), n)
    return _score((a & b).total(), a.total(), b.total())


def _score(common: int, in_reference: int, in_prediction: int) -> Rouge:
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    recall, precision = common / in_reference, common / in_prediction
    return Rouge(recall, precision, 2 * precision * recall / (precision + recall))


def _common_length(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Length of the longest common subsequence, one row of the table in the bits of an integer (Hyyro 2004)."""
    places: dict[str, int] = {}
    for k, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << k
    full = (1 << len(a)) - 1
    row = full  # a 0 bit is a step of the table's present row
    for word in b:
        if found := row & places.get(word, 0):
            row = (row + found | row - found) & full
    return len(a) - row.bit_count()


def _grams(words: tuple[str, ...], n: int) -> Counter[tuple[str, ...]]:
    return Counter(words[k : k + n] for k in range(len(words) - n + 1))


@lru_cache(maxsize=REMEMBERED)
def _words(text: str, stem: bool) -> tuple[str, ...]:
    try:
        from rouge_score.tokenize import tokenize
    except ModuleNotFoundError as error:
        raise MissingExtraError("ROUGE needs the library rouge-score, which is not installed: run "
                                '`pip install "repforget[eval]"`.') from error  # fmt: skip
    return tuple(tokenize(text, _stemmer() if stem else None))


@cache
def _stemmer() -> SimpleNamespace:
    """The library's stemmer, each distinct word stemmed once."""
    from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

    return SimpleNamespace(stem=lru_cache(maxsize=REMEMBERED)(PorterStemmer().stem))
