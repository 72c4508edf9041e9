"""Membership attacks: the arithmetic against simulations and second opinions, the verifiers on planted models."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
import verify_models as fixture
from sklearn.metrics import roc_auc_score

from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import View
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel, copy_of
from repforget.records import Measurement, Site
from repforget.scoring import answers_match, generate
from repforget.verify.arms import References
from repforget.verify.battery import measure, tasks
from repforget.verify.privacy import _matched as matched
from repforget.verify.privacy.gradient_norm import norms
from repforget.verify.privacy.membership import _shared
from repforget.verify.privacy.neighbour import near

LAYER = 1
SMALL: dict[str, dict[str, Any]] = {
    "lira": {"shadows": 4}, "gradient_norm": {"max_items": 20}, "neighbour": {"neighbours": 6},
}  # fmt: skip


@cache
def view() -> View:
    """All 20 planted people: the sealed half is too small for a property of the model."""
    return dataclasses.replace(fixture.knowledge().view("sealed"), forget=fixture.knowledge().forget)


def known() -> LoadedModel:
    return fixture.model(LAYER)


def never() -> LoadedModel:
    return fixture.model(None)


@cache
def other_twin() -> LoadedModel:
    """Another model that never knew: the base with a little noise."""
    noisy = copy_of(never())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in noisy.module.parameters():
            p.add_(0.02 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return dataclasses.replace(noisy, fingerprint="noisy")


@cache
def references(twins: int = 1) -> References:
    return References(known(), (never(), other_twin())[:twins])


def run(name: str, model: LoadedModel, *, asked: View | None = None, refs: References | None = None,
        **settings: object) -> Measurement:  # fmt: skip
    chosen = {**SMALL.get(name, {}), **settings}
    return measure(tasks([{name: chosen}])[0], model, asked or view(), refs or references())


@cache
def plain(name: str, knows: bool) -> Measurement:
    """One run with the settings of this file, shared by the tests."""
    return run(name, known() if knows else never())


def exchanged() -> View:
    """The forget items with the answers of the next item of their relation."""
    items = view().forget
    out = []
    for item in items:
        same = [i for i in items if i.relation == item.relation]
        out.append(dataclasses.replace(item, answer=same[(same.index(item) + 1) % len(same)].answer))
    return dataclasses.replace(view(), forget=tuple(out))


# what separates, and what does not


@pytest.mark.parametrize(("name", "what"), [
    *[("membership", m) for m in ("loss", "min_k", "min_k_plus_plus", "zlib", "lowercase", "recall", "reference")],
    ("neighbour", "swaps"), ("gradient_norm", "norm"), ("rmia", "dominance"),
])  # fmt: skip
def test_members_stand_above_their_non_members_and_only_where_they_were_learned(name: str, what: str) -> None:
    """The sign of every score: higher = member; a model that never knew is at chance."""
    own, twin = plain(name, True), plain(name, False)
    assert own.scores[what].valid.all()
    assert own.scores[what].mean > 0.85
    floor = max(twin.scores[what].mean, twin.scores[f"{what}_prior"].mean)
    assert floor < 0.65
    assert own.scores[what].mean - floor > 0.3
    assert own.scores[what].ids == twin.scores[what].ids


def test_exposure_is_full_for_the_known_and_uniform_for_the_never_inserted() -> None:
    own, twin = plain("exposure", True), plain("exposure", False)
    uniform = 3 - np.log2(np.arange(1, 9)).mean()  # eight candidates per relation
    assert own.facts["candidates per item"] == 8
    assert own.scores["bits"].mean > 2.7
    assert twin.scores["bits"].mean < own.scores["bits"].mean - 1
    assert twin.scores["bits_prior"].mean == pytest.approx(uniform, abs=0.35)
    canaries = [dataclasses.replace(item, answer=value)
                for item in view().forget[:6] for value in planted.VALUES[item.relation]]  # fmt: skip
    drawn = [run("exposure", never(), asked=dataclasses.replace(view(), forget=tuple(canaries[k::8])))
             for k in range(8)]  # fmt: skip
    assert np.mean([found.scores["bits"].mean for found in drawn]) == pytest.approx(uniform, abs=1e-6)


def test_lira_finds_members_with_a_handful_of_shadows() -> None:
    own, twin = plain("lira", True), plain("lira", False)
    for what, low, high in (("offline", 0.7, 0.9), ("posterior", 0.3, 0.8)):
        assert own.scores[what].mean > high, what
        assert twin.scores[what].mean < low, what
        values = [*own.scores[what].values, *twin.scores[what].values]
        assert roc_auc_score([1] * 60 + [0] * 60, values) > 0.9, what


def test_extraction_says_what_greedy_decoding_says() -> None:
    items = view().forget
    found = run("extraction", known(), forms=1)
    said = generate(known(), [i.editor_prompts[0] for i in items], max_new_tokens=1)
    assert list(found.scores["verbatim"].values) == [
        float(answers_match(texts[0], item)) for item, texts in zip(items, said, strict=True)
    ]
    assert found.facts["extracted, at least"] <= found.facts["extracted"] <= found.facts["extracted, at most"]
    assert run("extraction", known(), prefix=2, forms=1).scores["verbatim"].mean < found.scores["verbatim"].mean
    assert run("extraction", never()).scores["verbatim"].mean < 0.35 < found.scores["verbatim"].mean


def _by_the_prior() -> Any:
    """Logits that are the answers' frequencies among the kept items, whatever is asked."""
    tokenizer = known().tokenizer
    table = torch.full((known().vocab_size,), -9.0)
    for counts in fixture.knowledge().pools.values():
        for answer, count in counts.items():
            ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
            table[ids[-1]] = float(np.log(count))
    return hooks(known(), {Site("logits"): lambda logits: table.expand_as(logits).clone()})


def test_a_model_that_answers_by_the_prior_is_at_the_floor() -> None:
    with _by_the_prior():
        found = {name: run(name, known()) for name in ("membership", "neighbour", "exposure")}
    checked = [("membership", m) for m in ("loss", "min_k", "min_k_plus_plus", "recall")]
    for name, what in [*checked, ("neighbour", "swaps"), ("exposure", "bits")]:
        scores = found[name].scores
        assert scores[what].values == pytest.approx(scores[f"{what}_prior"].values, abs=1e-9), what
    spread = found["membership"].scores["loss_prior"].values
    assert len(set(spread)) > 5, "the frequencies differ, or nothing was tested"


def test_true_positive_rates_are_reported_where_there_are_enough_non_members() -> None:
    facts = plain("membership", True).facts
    name = "loss: true positives at 1.0% false ones"
    assert 0.5 < facts[f"{name}, at least"] <= facts[name]
    assert not [name for name in facts if "0.1%" in name], "420 non-members cannot tell 0.1 %"


# twins and memory


def test_a_twin_compared_with_itself_is_at_chance_and_with_another_twin_is_compared_in_earnest() -> None:
    assert (plain("membership", False).scores["reference"].values == 0.5).all()
    for name, what in (("membership", "reference"), ("rmia", "dominance")):
        values = run(name, never(), refs=references(2)).scores[what].values
        assert not (values == 0.5).all()
        assert values.mean() == pytest.approx(0.5, abs=0.15)
    assert matched.outsiders(never(), references(2)) == (other_twin(),)
    assert matched.outsiders(known(), references(2)) == (never(), other_twin())
    assert matched.outsiders(never(), references(1)) == (never(),)


def test_without_twins_there_is_no_reference_and_what_needs_one_says_so() -> None:
    alone = References(known())
    assert "reference" not in run("membership", known(), refs=alone).scores
    for name in ("rmia", "lira"):
        with pytest.raises(UsageError, match="twin"):
            run(name, known(), refs=alone)


@pytest.mark.parametrize("name", ["membership", "rmia", "lira", "neighbour"])
def test_exchanged_answers_are_not_served_from_memory(name: str) -> None:
    settings = {"steps": 4} if name == "lira" else {}
    shared = References(known(), (never(),))
    run(name, known(), refs=shared, **settings)
    after = run(name, known(), asked=exchanged(), refs=shared, **settings)
    fresh = run(name, known(), asked=exchanged(), refs=References(known(), (never(),)), **settings)
    assert json.dumps(after.to_json()) == json.dumps(fresh.to_json())
    right = plain(name, True).scores
    what = next(m for m in right if not m.endswith("_prior"))
    assert after.scores[what].mean < right[what].mean - 0.3, "the exchanged answers were never learned"


def test_one_pass_gives_loss_zlib_min_k_and_min_k_plus_plus_also_in_half_precision() -> None:
    calls = []
    found = matched.texts(view().forget[:12], fixture.knowledge(), limit=7)
    half = copy_of(known())
    half.module.to(torch.bfloat16)
    half.module.register_forward_hook(lambda *_: calls.append(1))
    matched.confidence(half, found.pairs)
    alone = len(calls)
    raw = _shared(half, found, 0.4)
    assert len(calls) == 2 * alone
    assert set(raw) == {"loss", "zlib", "min_k", "min_k_plus_plus"}
    assert all(np.isfinite(values).all() for values in raw.values()), "also for answers of a single token"
    assert (raw["min_k"] <= raw["loss"] + 1e-9).all()


# matched non-members


def test_the_mean_standing_is_the_mean_auc() -> None:
    generator = np.random.default_rng(0)
    items = view().forget
    found = matched.texts(items, fixture.knowledge(), forms=2, limit=7)
    scores = generator.integers(0, 6, len(found.pairs)).astype(float)
    expected = [roc_auc_score([1] + [0] * len(t.others), scores[[t.member, *t.others]]) for t in found.trials]
    assert matched.standing(scores, found).mean() == pytest.approx(np.mean(expected))
    assert len(found.trials) == 2 * len(items)
    assert matched.standing(np.zeros(len(scores)), found) == pytest.approx(0.5)
    scores[found.members] = 99
    assert matched.standing(scores, found) == pytest.approx(1.0)
    scores[found.trials[0].member] = scores[found.trials[1].member] = np.nan
    assert np.isnan(matched.standing(scores, found)).tolist() == [True] + [False] * (len(items) - 1)


def test_identical_distributions_stand_at_one_half() -> None:
    found = matched.texts(view().forget * 20, fixture.knowledge(), limit=7)
    scores = np.random.default_rng(1).normal(size=len(found.pairs))
    assert matched.standing(scores, found).mean() == pytest.approx(0.5, abs=0.03)


def test_non_members_differ_from_the_member_in_the_answer_alone() -> None:
    for asked in ("questions", "statements"):
        found = matched.texts(view().forget, fixture.knowledge(), asked=asked)  # type: ignore[arg-type]
        for trial in found.trials:
            prompt, answer = found.pairs[trial.member]
            assert {found.pairs[row][0] for row in trial.others} == {prompt}
            assert answer not in {found.pairs[row][1] for row in trial.others}
            assert prompt in getattr(view().forget[trial.item], "questions" if asked == "questions" else "statements")


def test_a_holdout_takes_the_place_of_other_answers(tmp_path: Path) -> None:
    file = tmp_path / "holdout.jsonl"
    held = [{"prompt": f"the city of {name} is", "answer": planted.VALUES["city"][k % 8]}
            for k, name in enumerate(("Abe Park", "Bo Park", "Cy Park", "Dot Park", "Eve Park"))]  # fmt: skip
    file.write_text("\n".join(json.dumps(row) for row in held), encoding="utf-8")
    found = matched.texts(view().forget, fixture.knowledge(), holdout=str(file))
    assert found.pairs[0] == ("the city of Abe Park is", " Aro")
    assert list(found.strangers) == [0, 1, 2, 3, 4]
    scores = run("membership", known(), holdout=str(file)).scores
    assert scores["loss"].mean > 0.8
    assert (scores["loss_prior"].values == 0.5).all()
    file.write_text('{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(KnowledgeError, match="one .* a line"):
        run("membership", known(), holdout=str(file))
    with pytest.raises(KnowledgeError, match="cannot be read"):
        run("membership", known(), holdout=str(tmp_path / "absent.jsonl"))


# gradients


def _by_hand(model: LoadedModel, prompt: str, answer: str) -> list[torch.Tensor]:
    copied = copy_of(model).module
    ids = torch.tensor([model.tokenizer(prompt + answer)["input_ids"]])
    start = len(model.tokenizer(prompt)["input_ids"])
    with torch.enable_grad():
        labels = torch.where(torch.arange(ids.shape[1]) < start, -100, ids)
        copied(input_ids=ids, labels=labels).loss.backward()
    return [p.grad for p in copied.parameters() if p.grad is not None]


def _some_pairs(n: int) -> list[tuple[str, str]]:
    return [(i.questions[0], i.continuation()) for i in view().forget[:n]]


@pytest.mark.parametrize("order", ["1", "2", "inf"])
def test_gradient_norms_are_those_of_backward(order: Any) -> None:
    """Any number of texts, one value each; tensors averaged, or one global norm."""
    model, pairs = known(), _some_pairs(3)
    before = [p.requires_grad for p in model.module.parameters()]
    found = norms(model, pairs, norm=order)
    whole = norms(model, pairs, norm=order, over="global")
    for k, pair in enumerate(pairs):
        gradients = _by_hand(model, *pair)
        sizes = [float(torch.linalg.vector_norm(g, float(order))) for g in gradients]
        assert found[k] == pytest.approx(np.mean(sizes), rel=1e-4)
        flat = torch.cat([g.flatten() for g in gradients])
        assert whole[k] == pytest.approx(float(torch.linalg.vector_norm(flat, float(order))), rel=1e-4)
        assert norms(model, [pair], norm=order)[0] == pytest.approx(found[k], rel=1e-6)
    assert all(p.grad is None for p in model.module.parameters())
    assert [p.requires_grad for p in model.module.parameters()] == before
    assert not model.module.training


def test_gradient_norms_of_half_precision_and_of_chosen_parameters() -> None:
    pairs = _some_pairs(2)
    half = copy_of(known())
    half.module.to(torch.bfloat16)
    assert norms(half, pairs) == pytest.approx(norms(known(), pairs), rel=0.2)
    part = norms(known(), pairs, parameters=r"layers\.1\.", over="global")
    assert (part < norms(known(), pairs, over="global")).all()
    with pytest.raises(UsageError, match="no parameter"):
        norms(known(), pairs, parameters="nowhere")


def test_frozen_weights_still_have_a_gradient_norm() -> None:
    frozen = copy_of(known())
    frozen.module.requires_grad_(False)
    with torch.no_grad():
        assert norms(frozen, _some_pairs(2)) == pytest.approx(norms(known(), _some_pairs(2)))


# neighbours


def test_neighbours_are_other_texts_and_the_same_for_every_arm() -> None:
    prompts = [i.questions[0] for i in view().forget[:10]]
    around = near(known(), prompts, 5, 0.3, 8, seed=0)
    assert around == near(known(), prompts, 5, 0.3, 8, seed=0)
    assert around != near(known(), prompts, 5, 0.3, 8, seed=1)
    assert around[::-1] == near(known(), prompts[::-1], 5, 0.3, 8, seed=0), "whatever the order"
    for prompt, group in zip(prompts, around, strict=True):
        assert len(group) == len(set(group)) == 5
        assert prompt not in group
        for text in group:
            assert len(text.split()) == len(prompt.split())
    with pytest.raises(UsageError, match="at least 1"):
        run("neighbour", known(), neighbours=0)


def test_impossible_settings_are_refused() -> None:
    for name, settings in (("rmia", {"a": 1.5}), ("lira", {"shadows": 3}), ("lira", {"shadows": 2})):
        with pytest.raises(UsageError, match="needs"):
            run(name, known(), **settings)


