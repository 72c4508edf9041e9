"""ROUGE against the library it takes its words from, and against values logged with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import MissingExtraError, UsageError
from repforget.scoring import rouge

pytest.importorskip("rouge_score", reason="the extra 'eval' is not installed")
GOLDEN = Path(__file__).parents[2] / "shared/data/golden/rouge_golden.json"
PAIRS = [
    ("The author's full name is Ada Berg.", "Ada Berg is the author's name"),
    ("She writes mostly historical novels", "She wrote history novels mostly, she says"),
    ("Oslo", ""), ("", "Oslo"), ("", ""), ("...", "Oslo"), ("Oslo", "Oslo"),
    ("born on 12/03/1956 in Kuwait-City", "Born 12 03 1956, Kuwait City"),
    ("Renée Dvořák's café", "Renee Dvorak cafe"), ("generalizations relational", "generalization relations"),
    ("a b a b a", "b a b a b a"), ("New\n\nYork", "york NEW york"), ("dying lying skies news", "die lie sky new"),
    ("東京 Tokyo", "Tokyo 東京"), ("x " * 70 + "y", "y " + "x " * 90),
]  # fmt: skip
VOCABULARY = ["the", "authors", "wrote", "writing", "Ada's", "novel", "1956", "é", "\n"]
texts = st.lists(st.sampled_from(VOCABULARY), max_size=12)


def library(reference: str, prediction: str, stem: bool) -> dict[str, tuple[float, float, float]]:
    from rouge_score.rouge_scorer import RougeScorer

    found = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem).score(reference, prediction)
    return {name: (s.recall, s.precision, s.fmeasure) for name, s in found.items()}


def ours(reference: str, prediction: str, stem: bool) -> dict[str, tuple[float, float, float]]:
    return {"rouge1": rouge.rouge_n(reference, prediction, 1, stem=stem),
            "rouge2": rouge.rouge_n(reference, prediction, 2, stem=stem),
            "rougeL": rouge.rouge_l(reference, prediction, stem=stem)}  # fmt: skip


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_equals_the_library(pair: tuple[str, str], stem: bool) -> None:
    assert ours(*pair, stem) == library(*pair, stem)


@given(texts.map(" ".join), texts.map(" ".join), st.booleans())
@settings(max_examples=80, deadline=None)
def test_equals_the_library_on_any_words(reference: str, prediction: str, stem: bool) -> None:
    assert ours(reference, prediction, stem) == library(reference, prediction, stem)


def test_golden_pairs() -> None:
    if not GOLDEN.exists():
        pytest.skip("the shared golden data is not here")
    pairs = json.loads(GOLDEN.read_text())["pairs"]
    assert len(pairs) == 327
    for pair in pairs:
        one = rouge.rouge_n(pair["reference"], pair["prediction"], 1).recall
        longest = rouge.rouge_l(pair["reference"], pair["prediction"]).recall
        assert (one, longest) == pytest.approx((pair["rouge1_recall"], pair["rougeL_recall"]), abs=1e-12)


@given(texts.map(" ".join), st.randoms())
@settings(max_examples=40, deadline=None)
def test_what_each_score_sees(text: str, random: object) -> None:
    words = text.split()
    random.shuffle(words)  # type: ignore[attr-defined]
    same = rouge.rouge_l(text, text)
    assert set(same) <= {0.0, 1.0} and rouge.rouge_l(text, "").recall == 0
    assert rouge.rouge_n(text, " ".join(words)).recall == rouge.rouge_n(text, text).recall
    assert rouge.rouge_l(text, " ".join(words)).recall <= same.recall


def test_order_and_stemming_matter() -> None:
    assert rouge.rouge_l("a b c", "c b a").recall == pytest.approx(1 / 3)
    assert rouge.rouge_l("she writes", "she writing").recall == 1
    assert rouge.rouge_l("she writes", "she writing", stem=False).recall == 0.5


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="at least 1 word"):
        rouge.rouge_n("a", "a", 0)
    monkeypatch.setitem(sys.modules, "rouge_score.tokenize", None)
    with pytest.raises(MissingExtraError, match=r'pip install "repforget\[eval\]"'):
        rouge.rouge_l("never asked before", "this neither")
