"""Splits, views and priors of a knowledge probe: what the editor sees and what the judge asks never meet."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import KnowledgeError
from repforget.knowledge import SPLITS, Item, Knowledge


def items(name: str, clusters: int, each: int = 2, **extra: object) -> list[Item]:
    return [
        Item(f"{name}-{c}-{k}", f"{name}-{c}", f"Ask {name} {c} {k}", f"answer {name} {c} {k}", relation="r",
             statements=(f"State {name} {c} {k}",), **extra)  # type: ignore[arg-type]
        for c in range(clusters) for k in range(each)
    ]  # fmt: skip


def build(clusters: int = 12, seed: int = 0) -> Knowledge:
    general = [f"text {k}" for k in range(16)]
    return Knowledge.build("k", items("f", clusters), items("r", 12), items("n", 8), general, seed)


@given(clusters=st.integers(8, 40), seed=st.integers(0, 50))
@settings(max_examples=40)
def test_splits_cover_every_cluster_once_and_never_cut_one(clusters: int, seed: int) -> None:
    views = [build(clusters, seed).view(split) for split in SPLITS]
    parts = [{item.cluster for item in view.forget} for view in views]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == clusters
    assert all(len([i for i in v.forget if i.cluster == c]) == 2 for v, p in zip(views, parts, strict=True) for c in p)
    assert len(parts[2]) >= len(parts[0]) == len(parts[1])


def test_the_editor_never_sees_a_judged_question_nor_a_judged_retain_cluster() -> None:
    knowledge = build()
    seen = knowledge.for_editor()
    prompts = {fact.prompt for fact in (*seen.forget, *seen.retain)}
    judged = [item for split in SPLITS for item in (*knowledge.view(split).forget, *knowledge.view(split).retain)]
    assert not prompts & {question for item in judged for question in item.questions}
    assert not {f.cluster for f in seen.retain} & {i.cluster for s in SPLITS for i in knowledge.view(s).retain}
    assert {f.cluster for f in seen.forget} == {i.cluster for i in knowledge.forget}
    texts = [text for split in SPLITS for text in knowledge.view(split).general]
    assert not set(seen.general) & set(texts) and len(set(texts)) == len(texts) == 8


def test_support_and_judged_retain_items_are_disjoint_and_halves_partition() -> None:
    view = build(20).view("sealed")
    assert not {i.cluster for i in view.support} & {i.cluster for i in view.retain}
    first, second = view.halves(seed=3)
    assert first and second and {*first, *second} == set(view.forget)
    assert not {i.cluster for i in first} & {i.cluster for i in second}


def test_digest_changes_with_any_text_and_with_the_seed() -> None:
    base = build()
    changed = Knowledge.build("k", [*items("f", 12)[:-1], Item("z", "f-11", "Ask", "other")], base.retain)
    assert len({base.digest, changed.digest, build(seed=1).digest}) == 3
    assert base.digest == build().digest


def test_prior_is_the_add_one_share_and_uniform_over_given_alternatives() -> None:
    retain = [Item(f"r{k}", f"c{k}", f"q{k}", "Oslo" if k < 6 else "Rome", relation="city") for k in range(8)]
    forget = [Item(f"f{k}", f"g{k}", f"p{k}", "Oslo" if k else "Rome", relation="city") for k in range(8)]
    knowledge = Knowledge.build("k", forget, retain)
    assert math.isclose(knowledge.prior(forget[1]), 7 / (7 + 3))  # counts 6 and 2, one added to each
    assert knowledge.prior_guess(forget[0]) == "Oslo" and knowledge.alternatives(forget[1]) == ("Rome",)
    given_wrong = Item("x", "y", "p", "true", wrong_answers=("a", "b", "a", "true"))
    assert knowledge.alternatives(given_wrong) == ("a", "b") and math.isclose(knowledge.prior(given_wrong), 1 / 3)


def test_every_fault_is_reported_at_once() -> None:
    blank = Item("f-0-0", "f-0", " ", "x")
    with pytest.raises(KnowledgeError, match="(?s)the retain set is empty.*1 ids.*empty prompt or answer.*1 clusters"):
        Knowledge.build("k", [blank, blank], [])


@given(clusters=st.integers(8, 20), seed=st.integers(0, 5), own=st.booleans())
def test_exchanged_answers_are_wrong_and_everything_else_stays(clusters: int, seed: int, own: bool) -> None:
    wrong = {"wrong_answers": ("Nowhere", "Elsewhere")} if own else {}
    knowledge = Knowledge.build("k", items("f", clusters, **wrong), items("r", 16), seed=seed)
    view = knowledge.view("sealed")
    other = view.shuffled(seed)
    assert view.shuffled(seed) == other
    assert [(i.id, i.cluster, i.prompt, i.relation) for i in other.forget] == [
        (i.id, i.cluster, i.prompt, i.relation) for i in view.forget
    ]
    for before, after in zip(view.forget, other.forget, strict=True):
        assert after.answer != before.answer
        assert after.answer not in after.wrong_answers
        assert before.answer in knowledge.alternatives(after, 1000)
