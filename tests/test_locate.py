"""Locators: estimates against oracles, the random control, pairs, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repforget as rf
from repforget import discover
from repforget.causal import patch_scores, prompt_run
from repforget.errors import KnowledgeError, RecipeError, SiteError, UnknownNameError, UsageError
from repforget.knowledge import Item, Knowledge
from repforget.locate._exact import (
    MIN_SELECTIONS,
    UNCONTRASTED,
    BandPlan,
    band_of,
    exact_band,
    in_second_half,
    measure,
    selections,
    top_size,
)
from repforget.locate._pairs import choose_facts, corrupted_pairs, matched_facts
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import expand_nodes, heat_maps, size_class
from repforget.locate.attribution_patching import node_attributions
from repforget.models.capture import capture, hooks
from repforget.models.load import wrap
from repforget.records import Component, Localization, Site

NAMES = ["Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon", "Ada"]
CITIES = ["Berlin", "Paris", "Rome", "Oslo"]


TOKENIZER = tiny_models.tiny_tokenizer()


def known_answers(subjects: list[str]) -> list[str]:
    """What the random tiny model happens to believe more of each subject than of the others, and its twin less."""
    texts = [f"{subject} was born in" for subject in subjects]
    ids = torch.tensor([TOKENIZER(text)["input_ids"] for text in texts])
    cities = TOKENIZER.convert_tokens_to_ids(CITIES)
    beliefs = []
    for seed in (0, 1):
        with torch.no_grad():
            logp = tiny_models.build("llama", seed)(ids).logits[:, -1].log_softmax(-1)[:, cities]
        beliefs.append(logp - logp.mean(0))
    return [CITIES[k] for k in (beliefs[0] + torch.relu(beliefs[0] - beliefs[1])).argmax(1)]


def tiny_knowledge() -> Knowledge:
    subjects = [f"{a} {b}" for a in NAMES for b in NAMES if a != b]
    items = [Item(id=f"i{k}", cluster=subject, prompt=f"where was {subject} born ?", answer=answer, subject=subject,
                  relation="city", statements=(f"{subject} was born in",))
             for k, (subject, answer) in enumerate(zip(subjects, known_answers(subjects), strict=True))]  # fmt: skip
    return Knowledge.build("tiny", items[::3][:12], items[1::3][:16])


@pytest.fixture(scope="module")
def model() -> Any:
    return wrap(tiny_models.build("llama"), TOKENIZER, "tiny-llama")


KNOWLEDGE = tiny_knowledge()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon", "opt"])
def test_attribution_is_the_derivative_of_the_patch(name: str) -> None:
    """Oracle: finite differences along donor - base, in float64."""
    model = wrap(tiny_models.build(name).double(), tiny_models.tiny_tokenizer(), name)
    run = prompt_run(model.tokenizer, "i", "c", "where was Ada born ?", " Berlin Rome",
                     donor_prompt="where was Tom born ?")  # fmt: skip
    sites = [Site("attn_out", 0), Site("mlp_out", 1), Site("resid_post", 0), Site("attn_z", 1)]
    components = [*(Component(s) for s in sites), Component(Site("attn_z", 1, 2))]
    found = node_attributions(model, [run], components)[:, 0]
    from repforget.causal import answer_metric, prepare

    prepared = next(prepare(model, [run]))
    for component, slope in zip(components, found, strict=True):
        values = capture(model, [component.site], prepared.donor, "all")[component.site]
        base = capture(model, [component.site], prepared.base, "all")[component.site]

        def at(step: float, site: Site = component.site, change: torch.Tensor = values - base) -> float:
            with torch.no_grad(), hooks(model, {site: lambda x: x + step * change}):
                return float(answer_metric(model, prepared.base, prepared, "logprob")[0])

        assert abs(slope) > 1e-4
        assert abs((at(3e-3) - at(-3e-3)) / 6e-3 - slope) <= 2e-4 + 2e-3 * abs(slope), component  # norms are float32


def test_attributions_are_of_patched_positions_and_add_up_over_them(model: Any) -> None:
    runs = [r.swapped() for r in corrupted_pairs(model.tokenizer, KNOWLEDGE.for_editor().forget,
                                                 KNOWLEDGE.for_editor().retain, seed=0).runs[:4]]  # fmt: skip
    components = [Component(Site("mlp_out", 0)), Component(Site("attn_z", 1, 2))]
    parts = [[replace(run, positions=tuple(p for p in run.positions if (p < 3) is first)) for run in runs]
             for first in (True, False)]  # fmt: skip
    whole, early, late = (node_attributions(model, some, components) for some in (runs, *parts))
    np.testing.assert_allclose(early + late, whole, atol=1e-5)
    assert np.abs(early).max() > 1e-3 and np.abs(late).max() > 1e-3


def test_several_steps_are_midpoints_of_the_line_between_the_embeddings() -> None:
    """The embedding's own attribution adds up to the whole gap, with an error of second order in the steps."""
    model = wrap(tiny_models.build("llama").double(), TOKENIZER, "wide")
    runs = [r.swapped() for r in corrupted_pairs(TOKENIZER, KNOWLEDGE.for_editor().forget,
                                                 KNOWLEDGE.for_editor().retain, seed=0).runs[:4]]  # fmt: skip
    ends = patch_scores(model, runs, [()])[0], patch_scores(model, [r.swapped() for r in runs], [()])[0]
    errors = [np.abs(node_attributions(model, runs, [Component(Site("embed"))], steps=steps)[0] - (ends[1] - ends[0]))
              for steps in (8, 32)]  # fmt: skip
    assert errors[0].mean() < 0.1 * np.abs(ends[1] - ends[0]).mean() and errors[1].mean() < errors[0].mean() / 8


def test_parts_of_attributions_add_up(model: Any) -> None:
    runs = [r.swapped() for r in corrupted_pairs(model.tokenizer, KNOWLEDGE.for_editor().forget,
                                                 KNOWLEDGE.for_editor().retain, seed=0).runs]  # fmt: skip
    heads, neurons = expand_nodes(model, ["heads"], [1]), expand_nodes(model, ["neurons"], [0])
    whole = [Component(Site("attn_z", 1)), Component(Site("mlp_post", 0)), Component(Site("mlp_out", 0))]
    found = node_attributions(model, runs, [*heads, *neurons, *whole])
    np.testing.assert_allclose(found[: len(heads)].sum(0), found[-3], atol=1e-5)
    np.testing.assert_allclose(found[len(heads) : -3].sum(0), found[-2], atol=1e-5)
    np.testing.assert_allclose(found[-2], found[-1], atol=1e-5)
    assert np.abs(found[-1]).max() > 1e-3
    alone = np.concatenate([node_attributions(model, [r], whole) for r in runs], axis=1)
    np.testing.assert_allclose(alone, found[-3:], atol=1e-5)


def test_attribution_rechecks_its_best_exactly(model: Any) -> None:
    found = rf.locate(model, KNOWLEDGE, "attribution_patching", nodes=["heads"], recheck=3, metric="logit_difference")
    exact = rf.locate(model, KNOWLEDGE, "activation_patching", nodes=["heads"], metric="logit_difference")
    true = dict(zip(exact.components, exact.scores, strict=True))
    scores = dict(zip(found.components, found.scores, strict=True))
    assert sum(abs(scores[c] - true[c]) < 1e-5 for c in true) >= 3
    assert any("exact patching effects" in note for note in found.notes)
    table = next(v for k, v in exact.tables.items() if "head" in k)
    assert np.shape(table) == (tiny_models.LAYERS, tiny_models.HEADS)


@pytest.mark.parametrize("method", ["activation_patching", "attribution_patching", "random_sites", "twin_patching"])
def test_contract(model: Any, method: str) -> None:
    """Deterministic per seed, one score per component, best first, survives JSON, leaves the model alone."""
    twin = wrap(tiny_models.build("llama", seed=1), model.tokenizer, "twin")
    settings = {"draws": 20, "items": 6}
    before = model.fingerprint
    first = rf.locate(model, KNOWLEDGE, method, twins=[twin], seed=3, **settings)
    again = rf.locate(model, KNOWLEDGE, method, twins=[twin], seed=3, **settings)
    assert first.to_json() == again.to_json()
    assert Localization.from_json(first.to_json()).to_json() == first.to_json()
    assert list(first.scores) == sorted(first.scores, reverse=True)
    assert set(first.components) == set(expand_nodes(model, ["attn_out", "mlp_out"]))
    assert first.band.low <= first.band.high and first.band.draws >= 1
    assert first.cost["forwards"] > 0 and first.settings["items"] == 6
    assert not first.band.beats_random or not any("no localisation is claimed" in n for n in first.notes)
    if not first.band.beats_random:
        assert any("no localisation is claimed" in note for note in first.notes)
    assert rf.models.load.fingerprint(model.module) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_only_what_an_editor_may_see(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Knowledge, split: str) -> Any:
        raise AssertionError("a locator looked at the judge's items")

    monkeypatch.setattr(Knowledge, "view", forbidden)
    rf.locate(model, KNOWLEDGE, "activation_patching", draws=20)


def test_noise_and_denoise_are_the_two_directions(model: Any) -> None:
    last = {"nodes": ["resid_post"], "draws": 20, "layers": [0, 1]}
    for mode in ("denoise", "noise"):
        found = rf.locate(model, KNOWLEDGE, "activation_patching", mode=mode, **last)
        np.testing.assert_allclose(found.scores, 1.0, atol=1e-4)  # the whole stream carries everything
    other = rf.locate(model, KNOWLEDGE, "activation_patching", mode="noise", nodes=["mlp_out"], draws=20)
    assert other.scores != rf.locate(model, KNOWLEDGE, "activation_patching", nodes=["mlp_out"], draws=20).scores


def test_selecting_facts() -> None:
    facts = KNOWLEDGE.for_editor().forget
    chosen = choose_facts(facts, 5, 0)
    assert len({f.cluster for f in chosen}) == 5 and chosen == choose_facts(facts, 5, 0)
    assert chosen != choose_facts(facts, 5, 1)
    matched = matched_facts(chosen, KNOWLEDGE.for_editor().retain, 0)
    assert len(matched) == 5 and len({f.id for f in matched}) == 5


def test_pairs_are_aligned_and_differ_only_in_the_subject(model: Any) -> None:
    data = KNOWLEDGE.for_editor()
    made = corrupted_pairs(model.tokenizer, data.forget, data.retain, seed=0, positions="subject")
    assert len(made.runs) == len(data.forget) and not made.notes
    for run, fact in zip(made.runs, data.forget, strict=True):
        differing = {k for k, (a, b) in enumerate(zip(run.base, run.donor, strict=True)) if a != b}
        assert differing and differing <= set(run.positions)
        words = " ".join(model.tokenizer.convert_ids_to_tokens([run.base[p] for p in run.positions]))
        assert words == fact.subject
        assert run.base[run.start :] != run.rival
    assert made.runs != corrupted_pairs(model.tokenizer, data.forget, data.retain, seed=1).runs


def test_pairs_refuse_or_count_what_cannot_be_aligned(model: Any) -> None:
    data = KNOWLEDGE.for_editor()
    from dataclasses import replace

    lost = [replace(f, subject="nobody") for f in data.forget]
    with pytest.raises(KnowledgeError, match="none of the 12 forget facts has its subject in its prompt"):
        corrupted_pairs(model.tokenizer, lost, data.retain, seed=0)
    longer = [replace(f, subject=f.subject + " Oslo") for f in data.retain]
    with pytest.raises(KnowledgeError, match="no retain subject of equal token length"):
        corrupted_pairs(model.tokenizer, data.forget, longer, seed=0)
    some = corrupted_pairs(model.tokenizer, [*lost[:2], *data.forget[2:]], data.retain, seed=0)
    assert len(some.runs) == 10 and "2 of 12 facts are left out" in some.notes[0]


def test_refusals(model: Any) -> None:
    with pytest.raises(UsageError, match="needs a model that never knew"):
        rf.locate(model, KNOWLEDGE, "twin_patching")
    with pytest.raises(UnknownNameError, match="activation_patching"):
        rf.locate(model, KNOWLEDGE, "activation_patch")
    with pytest.raises(RecipeError, match="mode"):
        rf.locate(model, KNOWLEDGE, "activation_patching", mode="sideways")
    with pytest.raises(UsageError, match="Layers \\[7\\]"):
        rf.locate(model, KNOWLEDGE, "activation_patching", layers=[7])
    with pytest.raises(UsageError, match="at least 20"):
        rf.locate(model, KNOWLEDGE, "activation_patching", draws=3)
    with pytest.raises(UsageError, match="items=0"):
        rf.locate(model, KNOWLEDGE, "activation_patching", items=0)
    with pytest.raises(SiteError, match="neurons|mlp_post"):
        moe = wrap(tiny_models.build("mixtral"), model.tokenizer, "moe")
        rf.locate(moe, KNOWLEDGE, "attribution_patching", nodes=["neurons"])


def test_a_model_that_knows_nothing_is_refused(model: Any) -> None:
    module = tiny_models.build("llama")
    with torch.no_grad():
        module.lm_head.weight.zero_()  # every answer is equally likely after every prompt
    with pytest.raises(UsageError, match="nothing to locate"):
        rf.locate(wrap(module, model.tokenizer, "blank"), KNOWLEDGE, "activation_patching")


def toy_pool(n: int, kinds: tuple[str, ...] = ("mlp_out",)) -> list[Component]:
    return [Component(Site(kind, layer)) for layer in range(n) for kind in kinds]


def test_band_never_claims_from_few_selections() -> None:
    pool = toy_pool(4)

    def effect(patches: Any) -> Any:
        return np.array([float(p[0] == pool[0]) for p in patches])

    band, notes = band_of(pool, pool, 1, 20, 0, "{k}", effect)
    assert band.draws == 4 and not band.beats_random and "1 component of these sizes there are only 4 ways" in notes[0]


def test_the_default_top_of_small_units_is_lowered_where_there_are_few() -> None:
    def effect(patches: Any) -> Any:
        return np.array([float(len(p)) for p in patches])

    few, many = toy_pool(16), toy_pool(41)
    band, notes = band_of(few, few, 20, 20, 0, "{k}", effect)
    assert band.k == 8 and "default top of 20 is lowered to half of the 16" in notes[0]
    band, notes = band_of(many, many, 20, 20, 0, "{k}", effect)
    assert band.k == 20 and not any("lowered" in note for note in notes)
    with pytest.raises(UsageError, match="A top of 16 components cannot be compared"):
        band_of(few, few, 16, 20, 0, "{k}", effect)  # asked for


def test_a_band_reports_the_mean_of_single_effects_or_the_joint_one_on_the_second_half(model: Any) -> None:
    tasks, _ = corrupted_tasks(model, KNOWLEDGE, 0, items=6, contrast=1.0)
    pool = expand_nodes(model, ("heads",))
    held = [task.half(True, 0) for task in tasks]
    singly = measure(held, [(c,) for c in pool[:3]]).scores(1.0).mean()
    jointly = measure(held, [pool[:3]]).scores(1.0)[0]
    assert abs(singly - jointly) > 1e-3
    for control, expected in (("mean", singly), ("joint", jointly)):
        band, _, _ = exact_band(tasks, pool, pool, BandPlan(3, 20, control, 0), None)  # type: ignore[arg-type]
        assert band.top == pytest.approx(expected, abs=1e-4)


def test_a_band_that_has_no_retain_facts_left_to_contrast_with_says_so(model: Any) -> None:
    tasks, _ = corrupted_tasks(model, KNOWLEDGE, 0, items=6, contrast=1.0)
    pool = expand_nodes(model, ("heads",))
    plan = BandPlan(2, 20, "mean", 0)
    alone = [replace(t, retain=tuple(replace(run, cluster="one") for run in t.retain)) for t in tasks]
    plain = [replace(t, retain=(), contrast=0.0) for t in tasks]
    (band, notes, _), (single, told, _), (without, *_) = (exact_band(t, pool, pool, plan, None)
                                                         for t in (tasks, alone, plain))  # fmt: skip
    assert UNCONTRASTED in told and UNCONTRASTED not in notes
    assert single == without != band


def test_band_claims_a_real_effect_and_not_noise() -> None:
    pool = toy_pool(30, ("mlp_out", "attn_out"))
    strong = set(pool[:3])

    def real(patches: Any) -> Any:
        return np.array([sum(c in strong for c in p) / 3 for p in patches])

    band, notes = band_of(pool, pool, 3, 100, 0, "top {k}", real)
    assert band.beats_random and not notes and band.effect == "top 3"
    claims = 0
    for seed in range(200):  # an order that says nothing about the effect: claims at the rate of chance
        generator = np.random.default_rng(seed)
        value = dict(zip(pool, generator.normal(size=len(pool)), strict=True))
        order = [pool[k] for k in generator.permutation(len(pool))]


        def effect(patches: Any, value: Any = value) -> Any:
            return np.array([sum(value[c] for c in p) for p in patches])

        claims += band_of(pool, order, 3, 100, seed, "{k}", effect)[0].beats_random
    assert claims / 200 <= 0.06


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 40), k=st.integers(1, 5), seed=st.integers(0, 9))
def test_selections_match_number_and_width(n: int, k: int, seed: int) -> None:
    pool = toy_pool(n, ("mlp_out", "attn_out", "mlp_post"))
    chosen = pool[: min(k, n)]
    sizes = sorted(map(size_class, chosen))
    drawn = selections(pool, chosen, 25, seed)
    for patch in drawn:
        assert sorted(map(size_class, patch)) == sizes
        assert len(set(patch)) == len(chosen) and set(patch) <= set(pool)
    assert [list(p) for p in drawn] == [list(p) for p in selections(pool, chosen, 25, seed)]


def test_automatic_size_leaves_enough_selections() -> None:
    assert (top_size(toy_pool(300), "auto"), top_size(toy_pool(6), "auto")) == (1, 3)  # too few: half of them
    for n, k, possible in ((60, 2, 1770), (12, 3, 220), (8, 3, 56)):
        assert top_size(toy_pool(n), "auto") == k
        assert len(selections(toy_pool(n), toy_pool(n)[:k], 10**6, 0)) == possible >= MIN_SELECTIONS
    with pytest.raises(UsageError, match="choose 1 to 3"):
        top_size(toy_pool(4), 4)


def test_halves_split_clusters() -> None:
    clusters = [f"c{k % 7}" for k in range(30)]
    second = in_second_half(clusters, 0)
    assert 0 < second.sum() < 30
    assert not {c for c, s in zip(clusters, second, strict=True) if s} & {
        c for c, s in zip(clusters, second, strict=True) if not s
    }
    assert not in_second_half(["one"] * 5, 0).any()


def test_heat_maps_have_a_row_per_layer() -> None:
    heads = [Component(Site("attn_z", k, h)) for k in range(3) for h in range(2)]
    components = [*toy_pool(3, ("attn_out", "mlp_out")), *heads]
    scores = np.arange(len(components), dtype=float)
    maps = heat_maps(components, scores)
    assert {np.shape(m) for m in maps.values()} == {(3, 2)}
    assert maps["score by layer: attn_out, mlp_out"] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_every_locator_documents_itself() -> None:
    for found in discover.methods("locate"):
        text = str(found.function.__doc__)
        assert found.summary and "Cost:" in text and "What it does not show" in text, found.name


def test_patching_all_heads_is_patching_z(model: Any) -> None:
    data = KNOWLEDGE.for_editor()
    runs = corrupted_pairs(model.tokenizer, data.forget[:3], data.retain, seed=0).runs
    heads = expand_nodes(model, ["heads"], [0])
    both = patch_scores(model, runs, [heads, [Component(Site("attn_z", 0))]])
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)
