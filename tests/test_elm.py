"""The teacher of ELM against slow forwards, its zeros, and what training towards it does to a model that knew."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.edit.train._data import Row, fact_rows
from repforget.edit.train._head import reduced
from repforget.edit.train.elm import Asked, Teaching, contexts, elm, fluent, soft_label, teach
from repforget.edit.train.retain.hard_label import hard_label
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.scoring import answer_logprobs
from repforget.training import Example, finetune

TEACHING = Teaching(eta_first=1.0, eta_last=8.0, temperature=1.2, top_k=7, guidance=3.0)
PROPERTY = settings(max_examples=20, deadline=None)


def after(model: LoadedModel, ids: tuple[int, ...]) -> Tensor:
    """Log-probabilities [V] of the next token, by a forward of this text alone."""
    return model.module(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).detach()


def spread(outcomes: Tensor, logp: Tensor, size: int) -> Tensor:
    """A teacher's kept outcomes as distributions over the vocabulary [t, V]."""
    assert bool((logp[:, -1] == -torch.inf).all())
    return torch.zeros(len(logp), size).scatter(1, outcomes, logp[:, :-1].exp())


def asked_about(data: EditData, model: LoadedModel, **texts: object) -> tuple[list[Asked], tuple[Row, ...]]:
    rows, facts = fact_rows(model, data.forget[:6], "forget")
    given = {"expert": "", "novice": "auto", "novices": 3, **texts}
    return contexts(model, data, facts, rows, seed=0, **given), rows  # type: ignore[arg-type]


def test_the_teacher_is_its_formula() -> None:
    model, data = tiny(), people().for_editor()
    asked, rows = asked_about(data, model, expert="who is {subject} ?")
    for row, about, made in zip(rows, asked, teach(model, asked, rows, TEACHING), strict=True):
        q = spread(*made, size=96)
        for k, at in enumerate(range(row.start, len(row.ids))):
            own = row.ids[row.start : at]
            novice = torch.stack([after(model, n + own).exp() for n in about.novices]).mean(0).log()
            eta = 1.0 + 7.0 * (at - 1) / (len(row.ids) - 1)
            scores = after(model, about.plain + own) / 1.2 - eta * (after(model, about.expert + own) - novice)
            cut = scores.sort(descending=True).values[6]
            wanted = scores.masked_fill(scores < cut, -torch.inf).softmax(-1)
            torch.testing.assert_close(q[k].double(), wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("same", ["eta", "texts"])
def test_without_a_difference_it_is_the_tempered_model(same: str) -> None:
    model, data = tiny(), people().for_editor()
    texts = {"expert": "who", "novice": "who"} if same == "texts" else {}
    teaching = TEACHING if same == "texts" else dataclasses.replace(TEACHING, eta_first=0.0, eta_last=0.0)
    asked, rows = asked_about(data, model, **texts)
    for row, made in zip(rows, teach(model, asked, rows, teaching), strict=True):
        base = after(model, row.ids[: row.start]) / 1.2
        kept = base.topk(7)
        assert set(made[0][0].tolist()) == set(kept.indices.tolist())
        torch.testing.assert_close(made[1][0, :-1].double(), kept.values.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_steep_teacher_is_finite_and_next_to_one_token() -> None:
    model, data = tiny(), people().for_editor()
    asked, rows = asked_about(data, model)
    steep = dataclasses.replace(TEACHING, eta_last=1e6, top_k=1000)
    for outcomes, logp in teach(model, asked, rows, steep):
        assert outcomes.shape[1] == 95  # one outcome is left for the rest
        assert not bool(logp.isnan().any())
        np.testing.assert_allclose(logp.exp().sum(-1), 1, rtol=1e-5)
        assert float(logp.max()) > np.log(0.9)


@PROPERTY
@given(st.integers(1, 4), st.integers(3, 30), st.integers(0, 99))
def test_the_loss_is_entropy_and_divergence(m: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, m, size, generator=generator, dtype=torch.float64)
    best = other.topk(size // 2)
    chosen = best.values.log_softmax(-1)
    teacher = torch.cat([chosen, torch.full((m, 1), -torch.inf)], -1)
    loss = soft_label(reduced(logits, best.indices), teacher)
    q = torch.zeros(m, size, dtype=torch.float64).scatter(1, best.indices, chosen.exp())
    entropy, divergence = torch.special.entr(q).sum(-1), (torch.xlogy(q, q) - q * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss, entropy + divergence)
    torch.testing.assert_close(loss, -(q * logits.log_softmax(-1)).sum(-1))  # the reduction loses nothing


def test_hard_label_is_the_cost_of_the_most_likely_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 5, 9, generator=generator)
    teacher = teacher.log_softmax(-1)
    expected = torch.nn.functional.cross_entropy(logits, teacher.argmax(-1), reduction="none")
    torch.testing.assert_close(hard_label.objective.function(logits, teacher), expected)


def test_contexts_hold_the_texts_and_the_made_up_names() -> None:
    model, data = tiny(), people().for_editor()
    decode = model.tokenizer.decode
    asked, rows = asked_about(data, model, expert="who is {subject} ? ")
    known = {fact.subject for fact in (*data.forget, *data.retain)}
    for fact, about, row in zip(data.forget, asked, rows, strict=False):
        assert about.plain == row.ids[: row.start]
        assert decode(about.expert, skip_special_tokens=True) == f"who is {fact.subject} ? {fact.prompt}"
        for ids in about.novices:
            text = decode(ids, skip_special_tokens=True)
            assert fact.subject not in text
            assert not any(name in text for name in known)
    asked, _ = asked_about(data, model, novice="what is {subject} ?", novices=3)
    assert all(len(about.novices) == 1 for about in asked)
    assert asked_about(data, model)[0] == asked_about(data, model)[0]


def test_continuations_are_drawn_from_the_guided_model() -> None:
    model, data = tiny(), people().for_editor()
    asked, _ = asked_about(data, model)
    steep = dataclasses.replace(TEACHING, guidance=1e6)
    told = fluent(model, asked, steep, 2, seed=0)
    assert told == fluent(model, asked, steep, 2, seed=1)  # nothing is left to chance
    for row, about in zip(told, asked, strict=True):
        assert row.ids[: row.start] == about.plain
        own: tuple[int, ...] = ()
        for token in row.ids[row.start :]:
            novice = torch.stack([after(model, n + own).exp() for n in about.novices]).mean(0).log()
            assert token == int((novice - after(model, about.expert + own)).argmax())
            own += (token,)
        assert len(own) == 2 or own[-1] == model.tokenizer.eos_token_id
    free = fluent(model, asked * 40, dataclasses.replace(TEACHING, guidance=0.0), 1, seed=0)
    drawn = torch.tensor([row.ids[-1] for row, about in zip(free, asked * 40, strict=True) if about is asked[0]])
    odds = after(model, asked[0].plain).exp()
    assert float(odds[drawn].mean()) == pytest.approx(float((odds**2).sum()), rel=0.5)


@cache
def taught() -> LoadedModel:
    """A tiny model that has learned the people by heart."""
    model = tiny()
    model.module.requires_grad_(True)
    data = people().for_editor()
    rows, _ = fact_rows(model, (*data.forget, *data.retain), "all")
    examples = [Example(row.ids, tuple(i >= row.start for i in range(len(row.ids)))) for row in rows]
    finetune(model.module, examples, steps=120, lr=1e-2, seed=0, batch_size=64)
    model.module.requires_grad_(False)
    return dataclasses.replace(tiny(), module=model.module, fingerprint="taught")


def probability(model: LoadedModel, facts: tuple[object, ...]) -> float:
    scores = answer_logprobs(model, [(f.prompt, f.answer) for f in facts])  # type: ignore[attr-defined]
    return float(np.exp(np.array(scores.sum_logprob)).mean())


def test_a_model_that_knew_forgets_and_keeps_the_rest() -> None:
    model, data = taught(), people().for_editor()
    before = probability(model, data.forget), probability(model, data.retain)
    assert min(before) > 0.8
    made = elm(model, data, steps=60, lr=3e-3, fluency_tokens=2, fluency_weight=0.2, eta_last=20.0, max_retain_rise=9.0)
    with made.attach(model, check=False):
        now = probability(model, data.forget), probability(model, data.retain)
    assert now[0] < 0.4 < now[1]
    assert made.manifest.settings["retain"] == "hard_label"
    assert all("layers.0" in name or "layers.1" in name for name in made.manifest.weights)


def test_what_it_cannot_use_is_refused() -> None:
    model, data = tiny(), people().for_editor()
    for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"novices": 0}, {"fluency_weight": -1.0}, {"fluency_tokens": 0}):
        with pytest.raises(UsageError, match="elm was given"):
            elm(model, data, **wrong)
    nobody = dataclasses.replace(data, forget=tuple(dataclasses.replace(f, subject="") for f in data.forget))
    with pytest.raises(KnowledgeError, match=r"give a text \(novice\)"):
        elm(model, nobody)
    with pytest.raises(KnowledgeError, match="shorten the texts"):
        elm(model, data, expert="who is " * 40)
