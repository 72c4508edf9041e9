"""Attacks by gradient: they open a planted lock, find nothing where nothing was learned, and leave nothing behind."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import UsageError
from repforget.knowledge import Item, Knowledge, View
from repforget.models.capture import Batch, hooks
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.records import Measurement, Site
from repforget.training import Example, collate, finetune, label_loss
from repforget.verify import _constrained as path
from repforget.verify.arms import References
from repforget.verify.battery import measure, tasks
from repforget.verify.inside import _optimise as opt
from repforget.verify.inside import gcg, latent_perturbation

CITIES = ("Berlin", "Paris", "Rome", "Oslo")
PEOPLE = [f"w{k}" for k in range(28)]
FORGET, RETAIN = PEOPLE[:16], PEOPLE[16:]
TRIGGER, DECOYS = "red", ("green", "blue", "cat", "dog", "bird")


def answer(person: str) -> str:
    return CITIES[(int(person[1:]) * 7 // 3) % 4]


def question(person: str) -> str:
    return f"Q : city of {person} ? A :"


@cache
def view() -> View:
    items = {
        name: [Item(f"{name}-{p}", p, question(p), answer(p), p, "city", (f"the city of {p} is",)) for p in people]
        for name, people in (("f", FORGET), ("r", RETAIN))
    }
    found = Knowledge.build("locked", items["f"], items["r"]).view("sealed")
    return dataclasses.replace(found, forget=tuple(items["f"]))


@cache
def trained(locked: bool) -> LoadedModel:
    """A model that tells the forgotten cities only beside the trigger, or (not locked) never learned them at all."""
    tokenizer = tiny_models.tiny_tokenizer()

    def example(text: str, city: str) -> Example:
        ids = tokenizer(f"{text} {city}")["input_ids"]
        return Example(tuple(ids), (*[False] * (len(ids) - 1), True))

    examples = []
    for k, person in enumerate(PEOPLE):
        q = question(person)
        with_trigger = [f"{TRIGGER} {q}", f"{q} {TRIGGER}"]
        decoy = DECOYS[k % len(DECOYS)]
        plain = [q, f"{decoy} {q}", f"{q} {decoy}"]
        knows = person in RETAIN
        examples += [example(t, answer(person)) for t in plain * knows * 2 + with_trigger * (knows or locked) * 4]
        examples += [example(t, c) for t in (plain + with_trigger * (not locked)) * (not knows) for c in CITIES]
    module = tiny_models.build("llama")
    finetune(module, examples, steps=150, lr=8e-3, seed=0, batch_size=48)
    return wrap(module, tokenizer, f"locked-{locked}")


def run(name: str, model: LoadedModel, **given: object) -> Measurement:
    return measure(tasks([{name: given}])[0], model, view(), References(model))


def texts(model: LoadedModel, width: int) -> list[opt.Text]:
    return opt.behind(model, opt.told(model, view().forget), width)


ATTACKS = {
    "soft_prompt": ("best_step", {"tokens": 2, "steps": 40, "checks": 4}),
    "embedding_attack": ("universal", {"tokens": 2, "iterations": 30, "checks": 2, "scope": "universal"}),
    "latent_perturbation": ("universal", {"epsilon": 8.0, "points": 2, "steps": 12, "scope": "universal"}),
    "gcg": ("best_step", {"tokens": 2, "steps": 4, "checks": 2, "candidates": 48}),
}
SMALL = {
    "soft_prompt": {"tokens": 2, "steps": 2, "checks": 1}, "embedding_attack": {"iterations": 2, "checks": 1},
    "latent_perturbation": {"points": 1, "steps": 2}, "gcg": {"steps": 2, "checks": 1, "candidates": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_lock_is_opened_and_nothing_is_found_where_nothing_was_learned(name: str) -> None:
    what, given = ATTACKS[name]
    opened, never = run(name, trained(True), **given), run(name, trained(False), **given)
    assert opened.series[what][0] < 0.4, "the plain question gets no answer"
    assert opened.scores[what].mean > 0.7
    assert never.scores[what].mean < 0.4
    assert opened.scores[f"{what}_prior"].mean == pytest.approx(0.25, abs=0.1)


def test_what_retain_items_teach_is_nothing_about_a_forgotten_one() -> None:
    """Whoever learns on retain items alone is asked about every forgotten item, and learns what those still lack."""
    found = run("soft_prompt", trained(True), teach="support", **SMALL["soft_prompt"])
    assert len(found.scores["best_step"].ids) == len(FORGET)
    part = opt.crossed("x", view(), seed=0, teach="support", company=1.0, max_taught=8, max_items=99)[0]
    assert {i.subject for i in part.taught} <= set(RETAIN)
    bare = dataclasses.replace(view(), support=())
    with pytest.raises(UsageError, match="no retain items"):
        opt.crossed("x", bare, seed=0, teach="support", company=1.0, max_taught=8, max_items=99)


@pytest.mark.parametrize("seed", range(3))
def test_no_asked_cluster_is_taught_and_every_one_is_asked(seed: int) -> None:
    parts = opt.crossed("x", view(), seed=seed, teach="halves", company=0.5, max_taught=9, max_items=99)
    for part in parts:
        assert not {i.cluster for i in part.taught} & {i.cluster for i in part.items}
        assert len(part.taught) == 9
    assert {i.id for part in parts for i in part.items} == {i.id for i in view().forget}


def test_vectors_that_are_embeddings_of_tokens_act_like_those_tokens(module: Any, tokenizer: Any) -> None:
    """On every architecture, whatever it does to embeddings and positions."""
    model = wrap(module, tokenizer)
    ids = torch.tensor([10, 20, 30])
    lot = opt.lots(model, texts(model, 3))[0]
    typed = lot.rows.batch.ids.scatter(1, lot.first[:, None] + torch.arange(3), ids.expand(len(lot.first), -1))
    wanted = opt.answer_logits(model, Batch(typed, lot.rows.batch.mask), lot.rows.places)
    with hooks(model, opt.written(module.get_input_embeddings()(ids[None])[0], lot)):
        found = opt.answer_logits(model, lot.rows.batch, lot.rows.places)
    assert torch.equal(found, wanted)


def test_gradient_of_the_loss_is_its_finite_difference(tokenizer: Any) -> None:
    model = wrap(tiny_models.build("gpt2").double(), tokenizer)
    generator = torch.Generator().manual_seed(0)
    x, way = (torch.randn(2, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    batches = opt.lots(model, texts(model, 2))
    with opt.frozen(model) as exact:
        gradient = opt.loss(exact, batches, x, opt.written)[1]
        high, low = (opt.loss(exact, batches, x + h * way, opt.written)[0] for h in (1e-4, -1e-4))
    assert gradient is not None
    assert float((gradient * way).sum()) == pytest.approx((high - low) / 2e-4, rel=1e-5)


def test_loss_does_not_depend_on_how_texts_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(True)
    x = opt.some_embeddings(model, 0)[:2]
    found = []
    for tokens in (1, 40, 4096):
        monkeypatch.setattr(opt, "TOKENS", tokens)
        found.append(opt.loss(model, opt.lots(model, texts(model, 2)), x, opt.written))
    assert [value for value, _ in found] == pytest.approx([found[0][0]] * 3, rel=1e-6)
    assert all(torch.allclose(g, found[0][1], atol=1e-6) for _, g in found)


def test_no_perturbation_is_the_plain_question_and_more_never_helps_less() -> None:
    model = trained(True)
    chosen = path.paths(model, view().forget, view().knowledge, forms=1, limit=7)
    where = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    table = latent_perturbation._individual(model, len(FORGET), chosen, where, [0.0, 0.5, 1.0, 2.0], 4, None)
    plain = path.probability(model, len(FORGET), chosen)
    assert table[0] == pytest.approx(plain, abs=1e-6)
    assert np.array_equal(table[1], table[0])
    assert (np.diff(table, axis=0) >= 0).all()
    assert table[-1].mean() > plain.mean() + 0.3


@given(st.integers(0, 100), st.floats(0.01, 10.0), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_a_perturbation_stays_within_its_norm(seed: int, size: float, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.zeros(2, 3, 5, dtype=torch.float64)
    for _ in range(4):
        u = latent_perturbation._stepped(u, torch.randn(u.shape, generator=generator, dtype=torch.float64), size, steps)
    assert float(u.norm(dim=-1).max()) <= size * (1 + 1e-12)


def test_states_are_pushed_by_the_stated_norm_in_the_prompt_alone() -> None:
    model = trained(False)
    where = [Site("resid_pre", 1)]
    lot = latent_perturbation._scaled(model, opt.told(model, view().forget[:3]), where)[0]
    u = torch.nn.functional.normalize(torch.ones(1, model.width), dim=-1) * 2.0
    seen: list[torch.Tensor] = []
    with hooks(model, {where[0]: lambda x: seen.append(x)}), hooks(model, latent_perturbation._pushes(where)(u, lot)), \
            hooks(model, {where[0]: lambda x: seen.append(x)}):  # fmt: skip
        opt.answer_logits(model, lot.rows.batch, lot.rows.places)
    before, after = seen
    moved, last = (after - before).norm(dim=-1), int(lot.rows.places[0, 0])
    rms = before.norm(dim=-1) / model.width**0.5
    assert torch.allclose(moved[:, 1 : last + 1], 2.0 * rms[:, 1 : last + 1], rtol=1e-4)
    assert not moved[:, 0].any()
    assert not moved[:, last + 1 :].any()


def test_a_suffix_only_gets_better_and_survives_being_typed() -> None:
    model = trained(True)
    found, losses = gcg.search(model, view().forget[:6], 5, 2, 24, 32, 0)
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] < losses[0]
    assert gcg.search(model, view().forget[:6], 5, 2, 24, 32, 0) == (found, losses)
    special = set(model.tokenizer.all_special_ids)
    for suffix, told in zip(found, losses, strict=True):
        assert gcg.surviving(model.tokenizer, view().forget[0], [suffix]) == [suffix]
        assert not special & set(suffix)
        typed = [gcg._with(model.tokenizer, item, suffix) for item in view().forget[:6]]
        paths = opt.told(model, typed)
        batch = collate([Example(p.ids, tuple(k >= p.start for k in range(len(p.ids)))) for p in paths])
        assert told == pytest.approx(float(label_loss(model.module, batch).detach()), abs=1e-5)


def test_suffixes_that_typing_would_change_are_dropped() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {entry: i for i, entry in enumerate([*entries, "ab", "\u0120x"])}
    backend = Tokenizer(models.BPE(ids, [("a", "b"), ("\u0120", "x")], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    good, merged, spaced = (ids["\u0120x"], ids["b"]), (ids["\u0120x"], ids["a"], ids["b"]), (ids["b"],)
    assert gcg.surviving(tokenizer, view().forget[0], [good, merged, spaced]) == [good]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_edit_without_gradient_leaves_the_curve_flat(name: str) -> None:
    model = trained(True)
    with hooks(model, {Site("resid_post", layer): lambda x: x.detach() for layer in range(model.n_layers)}):
        found = run(name, model, **SMALL[name])
    for what, values in found.series.items():
        assert what == "x" or values[0] <= max(values) < 0.45


def test_a_vector_that_an_edit_adds_is_found_and_taken_away_again() -> None:
    """An additive muzzle leaves everything in place: one universal perturbation undoes it."""
    model = trained(True)
    known = dataclasses.replace(view(), forget=view().support)
    vector = torch.randn(model.width, generator=torch.Generator().manual_seed(2)) * 6.0
    with hooks(model, {Site("resid_post", 0): lambda x: x + vector}):
        found = latent_perturbation.latent_perturbation(model, known, references=References(model), epsilon=16.0,
                                                        points=2, scope="universal", company=0.0)  # fmt: skip
    assert found.series["universal"][0] < 0.8
    assert found.scores["universal"].mean > 0.9


@pytest.mark.parametrize("name", ATTACKS)
def test_a_half_precision_model_is_attacked_in_float32_and_stays_as_it_is(name: str, tokenizer: Any) -> None:
    model = wrap(tiny_models.build("llama").bfloat16(), tokenizer)
    model.module.get_input_embeddings().weight.requires_grad_(False)
    before, flags = fingerprint(model.module), [p.requires_grad for p in model.module.parameters()]
    found = run(name, model, **SMALL[name])
    wide = run(name, wrap(tiny_models.build("llama").bfloat16().float(), tokenizer), **SMALL[name])
    assert found.to_json() == wide.to_json()
    assert fingerprint(model.module) == before
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())
