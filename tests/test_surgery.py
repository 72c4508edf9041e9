"""Null-space surgery: its parts against hand-made answers, and what it does to people it was and was not shown."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import planted
import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.surgery import _prefixes
from repforget.edit.surgery._keyspace import LayerKeys, best_layers, directions, separation
from repforget.edit.surgery._prefixes import Reading, logits, merged, prepare
from repforget.edit.surgery._rows import Row, _prior, fact_rows, stranger_facts, strangers
from repforget.errors import KnowledgeError, NumericalError, SiteError, UsageError
from repforget.knowledge import EditData, Item, Knowledge
from repforget.models.load import load, wrap
from repforget.scoring import answer_logprobs


def test_strangers_are_recombined_and_nobody_that_is_known() -> None:
    assert strangers(["Ada Berg", "Tom Lind", "Ada Lind"]) == ("Tom Berg",)
    assert strangers(["Ada van Berg", "Tom Lind"]) == ("Ada van Lind", "Tom Berg")
    assert strangers(["Berlin", "Paris"]) == ()


def test_stranger_facts_keep_the_statement_and_replace_the_name() -> None:
    data = people().for_editor()
    known = {fact.subject for fact in (*data.forget, *data.retain)}
    made = stranger_facts(data, 50, seed=1)
    assert len(made) == 50
    assert not known & {fact.subject for fact in made}
    frames = {fact.prompt.replace(fact.subject, "{}") for fact in data.forget}
    assert all(fact.prompt.replace(fact.subject, "{}") in frames for fact in made)
    assert all(fact.answer in data.pool[fact.relation] for fact in made)
    assert stranger_facts(data, 50, seed=1) == made != stranger_facts(data, 50, seed=2)


def test_prior_follows_the_pool_token_by_token() -> None:
    pool = {(5, 6): 2, (5, 7): 1, (8,): 1}
    assert _prior(pool, ()) == {5: 0.75, 8: 0.25}
    assert _prior(pool, (5,)) == pytest.approx({6: 2 / 3, 7: 1 / 3})
    assert _prior(pool, (9,)) is None
    assert _prior(pool, (8,)) is None


@pytest.mark.parametrize("memory", [_prefixes.MEMORY, 0])
@pytest.mark.parametrize("architecture", [a for a in tiny_models.ALL if a != "mixtral"])
def test_one_token_on_a_cached_prefix_is_the_whole_forward(
    architecture: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_prefixes, "MEMORY", memory)
    model = tiny(architecture)
    ids = [tuple(row) for row in tiny_models.sample_ids(9, 8)]
    rows = [Row("retain" if i % 2 else "stranger", row, len(row) - 1) for i, row in enumerate(ids)]
    found = [piece for pieces, _ in prepare(model, rows, [0]) for piece in pieces]
    assert all((piece.cache is None) == (memory == 0) for piece in found)
    seen = 0
    for length, parts in merged(found).items():
        drawn = [(part, torch.arange(len(part))) for part in parts]
        with torch.no_grad():
            expected = torch.cat([model.module(input_ids=p.tokens).logits[:, -1] for p in parts])
            torch.testing.assert_close(logits(model, drawn), expected, atol=1e-5, rtol=1e-4)
        kept = torch.cat([part.target(model, chosen) for part, chosen in drawn])
        torch.testing.assert_close(kept, expected.softmax(-1), atol=1e-5, rtol=1e-4)
        assert all(part.tokens.shape[1] == length for part in parts)
        seen += sum(map(len, parts))
    assert seen == 2 * len(rows)


def _keys(forget: torch.Tensor, kept: torch.Tensor, check: torch.Tensor) -> LayerKeys:
    keys = LayerKeys()
    nothing = forget[:0]
    for kind, at in (("forget", forget), ("retain", kept), ("check", check)):
        keys.add(Reading(kind, {0: at}, {0: nothing}), 0)  # type: ignore[arg-type]
    return keys


def draw(n: int, m: int, seed: int) -> torch.Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(3, 40), st.integers(1, 6))
def test_directions_are_ordered_generalised_eigenvectors(seed: int, n: int, rank: int) -> None:
    """Oracle: scipy's generalised symmetric eigenproblem."""
    from scipy.linalg import eigh

    m = 8
    keys = _keys(draw(n, m, seed), draw(60, m, seed + 1) * torch.arange(1, m + 1), draw(9, m, seed + 2))
    found = directions(keys, rank, ridge=1e-3).double()
    metric = keys.metric(1e-3, check=True)
    forget = torch.cat(keys.forget).double()
    energy = forget.T @ forget / n
    expected = np.sqrt(np.maximum(eigh(energy.numpy(), metric.numpy(), eigvals_only=True)[::-1], 0))[: len(found)]
    gram, forgotten = found @ metric @ found.T, found @ energy @ found.T
    ratios = (forgotten.diagonal() / gram.diagonal()).sqrt()
    torch.testing.assert_close(ratios, torch.from_numpy(expected.copy()), rtol=1e-3, atol=1e-5)
    off = gram - torch.diag(gram.diagonal())
    assert float(off.abs().max()) <= 1e-4 * float(gram.diagonal().max())
    assert float(forgotten.trace()) == pytest.approx(1.0, rel=1e-3)


def test_protected_keys_lie_in_the_null_space_where_there_is_one() -> None:
    """Protected keys of a subspace are moved by nothing; forget keys outside it by all of their energy."""
    basis = torch.linalg.qr(draw(10, 10, 0)).Q
    kept, forget = draw(50, 6, 1) @ basis[:, :6].T, draw(20, 10, 2)
    found = directions(_keys(forget, kept, draw(9, 6, 3) @ basis[:, :6].T), 4, ridge=1e-5)
    assert float((kept @ found.T).abs().max()) < 1e-2 * float((forget @ found.T).abs().max())
    outside = forget @ basis[:, 6:]
    recovered = torch.linalg.lstsq(forget @ found.T, outside).solution
    torch.testing.assert_close(forget @ found.T @ recovered, outside, atol=1e-2, rtol=1e-2)


def test_a_singular_metric_is_refused() -> None:
    flat = draw(50, 3, 1) @ draw(3, 8, 2)
    with pytest.raises(NumericalError, match="larger ridge"):
        directions(_keys(draw(20, 8, 0), flat, flat[:5]), 4, ridge=0.0)


def test_separation_is_one_for_separate_keys_and_half_for_the_same() -> None:
    shift = torch.zeros(8)
    shift[3] = 20.0
    apart = _keys(draw(200, 8, 0) + shift, draw(400, 8, 1), draw(200, 8, 2))
    same = _keys(draw(2000, 8, 0), draw(4000, 8, 1), draw(2000, 8, 2))
    assert separation(apart, 1e-2) > 0.999
    assert abs(separation(same, 1e-2) - 0.5) < 0.05
    assert best_layers([(0, 0.5), (1, 0.9), (2, 0.9), (3, 0.7)], 3) == [1, 2, 3]


def test_forget_rows_have_a_prior_for_each_answer_token() -> None:
    model, data = tiny("llama"), people().for_editor()
    rows = fact_rows(model, data, data.forget, "forget")
    assert len(rows) == len(data.forget)
    for row in rows:
        assert len(row.priors) == len(row.ids) - row.start + 1
        assert row.priors[0] is not None
        assert sum(row.priors[0].values()) == pytest.approx(1.0)


def test_refusals() -> None:
    data = people().for_editor()
    with pytest.raises(SiteError, match="batched experts"):
        run_editor(tiny("mixtral"), data, "null_space_surgery")
    with pytest.raises(SiteError, match="0 to 1"):
        run_editor(tiny(), data, "null_space_surgery", layers=[7])
    with pytest.raises(UsageError, match="steps"):
        run_editor(tiny(), data, "null_space_surgery", steps=0)
    empty = EditData(data.forget, (), (), data.pool, data.digest)
    single = dataclasses.replace(empty, forget=tuple(dataclasses.replace(f, subject="") for f in data.forget))
    with pytest.raises(KnowledgeError, match="retain facts"):
        run_editor(tiny(), single, "null_space_surgery")


def test_says_when_no_strangers_can_be_made() -> None:
    data = people().for_editor()
    plain = dataclasses.replace(
        data, forget=tuple(dataclasses.replace(f, subject="") for f in data.forget),
        retain=tuple(dataclasses.replace(f, subject="") for f in data.retain),
    )  # fmt: skip
    edit = run_editor(tiny(), plain, "null_space_surgery", steps=3)
    assert any("no strangers" in note for note in edit.manifest.notes)


def _planted() -> Knowledge:
    everyone = planted.facts()

    def items(names: list[str]) -> list[Item]:
        return [
            Item(f"{name}-{relation}", name, planted.TEMPLATES[1].format(subject=name, relation=relation), value, name,
                 relation, tuple(planted.TEMPLATES[k].format(subject=name, relation=relation) for k in (0, 2)))
            for name in names for relation, value in everyone[name].items()
        ]  # fmt: skip

    return Knowledge.build("planted", items(planted.planted_people()), items(planted.background_people()))


def test_planted_people_are_forgotten_and_the_others_kept() -> None:
    """The edit sees two statement forms and half of the others; the third form and the other half are asked."""
    module, tokenizer = planted.planted(2)
    model = wrap(module, tokenizer, "planted-2")
    knowledge = _planted()
    edit = run_editor(model, knowledge, "null_space_surgery", steps=150, strangers=2000)
    shown = {fact.subject for fact in knowledge.for_editor().retain}
    unseen = planted.questions([name for name in planted.background_people() if name not in shown])
    asked = planted.questions(planted.planted_people())
    assert planted.accuracy(model.module, tokenizer, asked) > 0.95
    kept = planted.accuracy(model.module, tokenizer, unseen)
    with edit.attach(model):
        assert planted.accuracy(model.module, tokenizer, asked) < 0.35  # a guess among eight values
        assert planted.accuracy(model.module, tokenizer, unseen) > kept - 0.1
    assert edit.artifact == "weights"


@pytest.mark.slow
def test_the_organism_forgets_people_and_keeps_neighbours_it_was_not_shown() -> None:
    """A quarter of its people; of the others, 0.94 are left without strangers and 0.97 along directions by chance."""
    from repforget.knowledge_files import load_knowledge

    model, everyone = load("organism:bios"), load_knowledge("bios-people")
    people = sorted({item.cluster for item in everyone.forget})[::4]
    knowledge = dataclasses.replace(everyone, forget=tuple(i for i in everyone.forget if i.cluster in people))
    shown = {fact.subject for fact in knowledge.for_editor().retain}
    retain = [item for item in knowledge.retain if item.subject not in shown]

    def share(items: Any) -> float:
        pairs = [(item.prompt, item.continuation()) for item in items]
        return float(np.mean(answer_logprobs(model, pairs).greedy_match))

    sets: list[Any] = [knowledge.forget, knowledge.neighbours, retain]
    assert all(share(items) > 0.95 for items in sets)
    with run_editor(model, knowledge, "null_space_surgery", steps=150, strangers=4000).attach(model):
        forget, neighbours, others = (share(items) for items in sets)
    assert forget < 0.13
    assert neighbours > 0.975
    assert others > 0.975
