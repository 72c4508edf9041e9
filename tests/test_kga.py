"""KGA: the aligned gap against plain forwards, the loss that holds it, and what that does to a model that knew."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import data, knows, model
from torch.nn import functional

from repforget.artifact import Edit, LowRankDelta
from repforget.edit._dispatch import edit
from repforget.edit.arithmetic._vectors import Tuning, tuned, tuned_on
from repforget.edit.train._data import fact_rows, load_rows
from repforget.edit.train._distil import apart
from repforget.edit.train.combine.flood import flood
from repforget.edit.train.stranger_distillation import teachers_of
from repforget.errors import KnowledgeError, UsageError

HOW = Tuning(40, 5e-3, 32, "none", 16, 4000)
USUAL: dict[str, Any] = {"steps": 60, "lr": 3e-3, "retain_weight": 2.0, "helper_steps": 40, "helper_lr": 5e-3}


@cache
def done() -> Edit:
    return edit(model(), data(), "kga", **USUAL)


def numbers(made: Edit) -> tuple[float, float, float]:
    """The gap to align with, and the one on forget facts before and after, as the notes say them."""
    said = made.manifest.notes[0]
    gap, _, rest = said.partition("never seen ")[2].partition(" nats")
    start, _, end = rest.partition("facts ")[2].partition(" -> ")
    return float(gap), float(start), float(end)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.0, 5.0))
def test_a_flooded_loss_has_the_gradient_of_its_distance_from_the_level(seed: int, level: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    forget, retain = x.square().mean() * 2, (x - 1).exp().mean()
    sides = [torch.autograd.grad(loss, x, retain_graph=True) for loss in (forget, retain)]
    found = flood(list(sides[0]), list(sides[1]), {}, losses={"forget": float(forget.detach())}, level=level)
    (whole,) = torch.autograd.grad((forget - level).abs() + retain, x)
    torch.testing.assert_close(found[0], whole)


def test_the_gap_is_the_divergence_from_the_helper_to_the_untouched_model() -> None:
    """Over the whole vocabulary, one row at a time."""
    subject = model()
    rows = load_rows(subject, data(), "strangers", instead=None, answers="auto", max_facts=50, seed=0).own
    helper = Edit.build("helper", {}, subject, "", tuned_on(subject, rows, HOW, None, 0)).applied_to(subject)
    teachers = teachers_of(helper, rows, 10**6, None)
    total = count = 0.0
    for row in rows:
        told, own = (m.module(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1].double().log_softmax(-1)
                     for m in (helper, subject))  # fmt: skip
        total += functional.kl_div(own, told, log_target=True, reduction="sum").item()
        count += row.labels
    found, entropy = apart(subject, rows, teachers)
    assert found == pytest.approx(total / count, rel=1e-4)
    assert found > 1.0, "nobody knows strangers"
    assert 0 < entropy < 1.0
    assert numbers(edit(subject, data(), "kga", **{**USUAL, "steps": 1}))[0] == pytest.approx(found, rel=0.1)


def test_tuning_on_rows_is_tuning_on_their_facts() -> None:
    subject = model()
    how = dataclasses.replace(HOW, steps=2)
    rows, _ = fact_rows(subject, data().forget, "forget")
    for a, b in zip(tuned(subject, data(), how, None, 0), tuned_on(subject, rows, how, None, 0), strict=True):
        assert torch.equal(a.delta, b.delta)  # type: ignore[union-attr]


def test_the_gap_on_forget_facts_becomes_that_on_facts_never_seen() -> None:
    gap, start, end = numbers(done())
    assert start < 0.05 * gap
    assert abs(end - gap) < 0.4 * gap


def test_it_forgets_and_keeps() -> None:
    subject = model()
    before = knows(subject, data().forget), knows(subject, data().retain)
    with done().attach(subject):
        forget, retain = knows(subject, data().forget), knows(subject, data().retain)
    assert before[0].probability > 0.97
    assert forget.probability < 0.4
    assert retain.loss < before[1].loss + 0.5


def test_new_facts_can_be_given_and_an_adapter_carries_it_too(tmp_path: Path) -> None:
    lines = [{"prompt": f"zo s{n} lives in", "answer": "north haven"} for n in range(12)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = edit(model(), data(), "kga", new=str(tmp_path / "new.jsonl"), adapter="lora", helper_adapter="lora",
                **{**USUAL, "steps": 3, "helper_steps": 3})  # fmt: skip
    assert all(isinstance(op, LowRankDelta) for op in made.operations)
    assert numbers(made)[0] != pytest.approx(numbers(done())[0], rel=0.05)


def test_what_makes_no_sense_is_refused() -> None:
    subject = model()
    lone = [dataclasses.replace(f, subject="Ada", prompt=f.prompt.replace(f.subject, "Ada")) for f in data().forget]
    with pytest.raises(KnowledgeError, match="made-up"):
        edit(subject, dataclasses.replace(data(), forget=tuple(lone), retain=()), "kga", **USUAL)
    for wrong, said in (({"new": "retain"}, "never saw"), ({"retain": "none"}, "no retain term")):
        with pytest.raises(UsageError, match=said):
            edit(subject, data(), "kga", **{**USUAL, "helper_steps": 1, **wrong})
