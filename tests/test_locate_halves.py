"""No locator ranks, for its band, by the facts on which the band is measured."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import planted
import pytest
from test_locate_planted import KNOWLEDGE, model

import repforget as rf
from repforget.errors import KnowledgeError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Moves, in_second_half, may_rank
from repforget.locate._pairs import Pairs
from repforget.locate._tasks import corrupted_tasks
from repforget.records import RandomBand

pytestmark = pytest.mark.skipif(not (planted.FOLDER / "base").exists(), reason="planted-fact models are not built")
# method, module that measures the band, settings
METHODS = [
    ("activation_patching", "activation_patching", {"nodes": ("mlp_out",)}),
    ("attribution_patching", "attribution_patching", {"recheck": 0, "steps": 1}),
    ("twin_patching", "twin_patching", {"nodes": ("mlp_out",)}),
    ("path_patching", "path_patching", {"nodes": ("mlp_out",)}),
    ("causal_tracing", "causal_tracing", {"samples": 1}),
    ("atp_star", "atp_star", {"steps": 1}),
    ("direct_logit_attribution", "direct_logit_attribution", {}),
    ("lens_trajectory", "lens_trajectory", {}),
    ("flu", "flu", {"partners": 1}),
    ("eap", "_edge_locator", {"recheck": 0, "edges": 5, "partners": 1}),
    ("flu", "flu", {"mode": "categories", "partners": 1, "items": 24}),
    ("fisher", "_gradients", {}),
    ("wagle", "_gradients", {}),
    ("activation_statistics", "_gradients", {}),
    ("knowledge_neurons", "_gradients", {"steps": 2, "prompts": 1}),
]
IDS = [name + more.get("mode", "") for name, _, more in METHODS]


def parted(held: set[str], without: int = 7) -> tuple[Knowledge, Knowledge]:
    """Facts of which every ``without``-th has no partner to be patched with, and the same with other answers for
    ``held`` people."""
    forget = [replace(item, subject="", statements=()) if (k + 1) % without == 0 else replace(item, statements=())
              for k, item in enumerate(KNOWLEDGE.forget)]  # fmt: skip
    retain = [replace(item, statements=()) for item in KNOWLEDGE.retain]
    own = [k for k, item in enumerate(forget) if item.cluster in held]
    turned = list(forget)
    for k, other in zip(own, [*own[3:], *own[:3]], strict=True):
        turned[k] = replace(forget[k], answer=forget[other].answer)
    return Knowledge.build("parted", forget, retain), Knowledge.build("parted", turned, retain)


def band_of(found: list[Any]) -> Any:
    def fake(tasks: Any, pool: Any, order: Any, *rest: Any, **more: Any) -> Any:
        found.append((tasks, order))
        return RandomBand(1, 20, 0.0, 0.0, 0.0, "none"), (), 0.0

    return fake


@pytest.mark.parametrize(("method", "module", "settings"), METHODS, ids=IDS)
def test_answers_of_the_facts_that_judge_do_not_change_the_ranking_they_judge(
    method: str, module: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(import_module(f"repforget.locate.{module}"), "exact_band", band_of(found))
    given, without = {"items": 16, **settings}, 999 if "mode" in settings else 7
    if method == "twin_patching":
        given["twins"] = (model(None),)
    rf.locate(model(1), parted(set(), without)[0], method, **given)
    judges = {run.cluster for run in found[0][0][0].half(True, 0).forget}
    assert len(judges) > 2
    before, after = parted(judges, without)
    whole = [rf.locate(model(1), known, method, **given).scores for known in (before, after)]
    assert whole[0] != whole[1]  # they do change what all facts say
    assert found[0][1] == found[1][1] == found[2][1]


@pytest.mark.parametrize(("method", "more"), [
    ("activation_patching", {"nodes": ("mlp_out",)}), ("attribution_patching", {"recheck": 0, "steps": 1}),
    ("path_patching", {"nodes": ("mlp_out",)}), ("causal_tracing", {"samples": 1, "window": 1}),
    ("atp_star", {"steps": 1, "grad_drop": False}), ("direct_logit_attribution", {}), ("lens_trajectory", {}),
    ("flu", {"partners": 1}),
])  # fmt: skip
def test_the_ranking_that_is_judged_is_made_as_the_one_that_is_shown(
    method: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all facts fall into the half that ranks, the two are one: same contrast, same sign, same layers."""
    found: list[Any] = []
    monkeypatch.setattr(import_module(f"repforget.locate.{method}"), "exact_band", band_of(found))
    for module in ("_exact", "_tracing"):
        monkeypatch.setattr(f"repforget.locate.{module}.in_second_half", lambda c, seed: np.zeros(len(c), dtype=bool))
    shown = [rf.locate(model(1), KNOWLEDGE, method, items=6, contrast=contrast, **more).components
             for contrast in (0.0, 2.0)]  # fmt: skip
    assert shown[0] != shown[1]  # the contrast does decide
    for whole, (_, judged) in zip(shown, found, strict=True):
        assert list(judged) == [c for c in whole if c in judged] and len(judged) > 1


def test_the_size_of_a_circuit_is_chosen_on_other_facts_than_report_its_faithfulness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("repforget.locate._edge_locator")
    monkeypatch.setattr(module, "exact_band", band_of([]))
    seen: list[frozenset[str]] = []

    def fake(model: Any, graph: Any, runs: Any, circuits: Any, *rest: Any) -> Any:
        seen.append(frozenset(run.cluster for run in runs))
        steps = np.arange(len(circuits))  # 20 edges suffice where the size is chosen, 50 where it is reported
        return np.where(steps >= (2 if len(seen) == 1 else 3), 0.9, 0.1 + 0.01 * steps)

    monkeypatch.setattr(module, "faithfulness", fake)
    known = parted(set())[0]
    found = rf.locate(model(1), known, "eap_ig", items=16, steps=1, recheck=0)
    tasks, _ = corrupted_tasks(model(1), known, 0, items=16, partners=2, mode="both")
    late, early = ({run.cluster for run in tasks[1].half(second, 0).forget} for second in (True, False))
    assert seen == [early, late, late] and late and not early & late
    told = next(note for note in found.notes if "faithfulness of 0.12 on the other half" in note)
    assert "at most 20 of" in told and len(found.edges) <= 20


@pytest.mark.parametrize(("method", "fit"), [("mdl_probe", "code_lengths"), ("flu", "fit_sweep")])
def test_classifiers_that_rank_for_the_band_are_taught_by_none_whom_it_is_measured_on(
    method: str, fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, found = import_module(f"repforget.locate.{method}"), []
    monkeypatch.setattr(module, "exact_band", band_of(found))
    tasks, _ = corrupted_tasks(model(1), KNOWLEDGE, 0, items=12, partners=2, mode="both")
    judges = {run.cluster for run in tasks[0].half(True, 0).forget}
    others = {item.cluster for item in KNOWLEDGE.forget} - judges

    def fake(features: Any, labels: Any, groups: Any, **_: Any) -> Any:
        assert sorted(set(labels.tolist())) == list(range(labels.max() + 1)) and features.shape[1] == len(labels)
        best = 2 if judges & set(groups) else 1  # whoever is taught by the judges names another MLP
        assert others & set(groups)
        bits = np.full((len(features), len(labels)), 5.0)
        bits[best] = 1.0
        right = np.cumsum(np.arange(len(features)) == best + 1)[:, None] * np.ones(len(labels))
        return SimpleNamespace(bits=bits, n_classes=4, compression=np.ones(len(features)), correct=right)

    monkeypatch.setattr(module, fit, fake)
    given: dict[str, Any] = {"nodes": ("mlp_out",)} if method == "mdl_probe" else {"mode": "categories"}
    result = rf.locate(model(1), KNOWLEDGE, method, items=12, **given)
    assert (found[0][1][0].site.layer, result.components[0].site.layer) == (1, 2)


def test_a_sweep_ranks_for_the_band_by_classifiers_that_the_judged_have_not_taught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, found = import_module("repforget.locate.probe_sweep"), list[Any]()
    real = module.band_of

    def kept(pool: Any, order: Any, *rest: Any) -> Any:
        found.append(order)
        return real(pool, order, *rest)

    monkeypatch.setattr(module, "band_of", kept)
    clusters = sorted({item.cluster for item in KNOWLEDGE.forget})
    judges = {c for c, late in zip(clusters, in_second_half(clusters, 0), strict=True) if late}
    whole = [rf.locate(model(1), known, "probe_sweep", classifier="lda", statements=1).scores
             for known in (parted(set(), 999)[0], parted(judges, 999)[1])]  # fmt: skip
    assert whole[0] != whole[1] and found[0] == found[1]


def test_features_are_ranked_on_one_half_and_judged_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    room, asked, orders = import_module("repforget.locate.sae_features"), list[Any](), list[Any]()
    halves, real = room._halves(KNOWLEDGE.for_editor(), 24, 0), room._activity

    def effect(model: Any, saes: Any, half: Any, *_: Any) -> Any:
        asked.append(half)
        return [Pairs(()), Pairs(())], lambda chosen: np.zeros(len(chosen))

    def band(pool: Any, order: Any, *_: Any) -> Any:
        orders.append(order)
        return RandomBand(1, 20, 0.0, 0.0, 0.0, "none"), ()

    def turned(model: Any, saes: Any, half: Any, progress: Any) -> Any:
        found = real(model, saes, half, progress)
        if half != halves[1]:
            return found
        return {site: (replace(a, mean=b.mean), replace(b, mean=a.mean)) for site, (a, b) in found.items()}

    monkeypatch.setattr(room, "_effect", effect)
    monkeypatch.setattr(room, "band_of", band)
    given: dict[str, Any] = {"sites": ["mlp_out.1"], "size": 64, "sae_steps": 20, "max_facts": 24, "percentile": 0.0}
    whole = [rf.locate(model(1), KNOWLEDGE, "sae_features", **given).scores]
    monkeypatch.setattr(room, "_activity", turned)
    whole.append(rf.locate(model(1), KNOWLEDGE, "sae_features", **given).scores)
    assert whole[0] != whole[1] and orders[0] == orders[1] and asked == [halves[1]] * 2


def test_value_vectors_are_ranked_by_the_answers_of_facts_that_do_not_judge_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room, found = import_module("repforget.locate.concept_vectors"), list[Any]()
    monkeypatch.setattr(room, "band_of", lambda pool, order, *_: found.append(order) or (
        RandomBand(1, 20, 0.0, 0.0, 0.0, "none"), ()))  # fmt: skip
    clusters = [item.cluster for item in KNOWLEDGE.forget]
    late = in_second_half(clusters, 0)
    others = [*KNOWLEDGE.forget[1:], KNOWLEDGE.forget[0]]  # of another relation
    turned = [replace(item, answer=other.answer) if judged else item
              for item, other, judged in zip(KNOWLEDGE.forget, others, late, strict=True)]  # fmt: skip
    whole = [rf.locate(model(1), known, "concept_vectors", items=8).scores
             for known in (KNOWLEDGE, Knowledge.build("turned", turned, KNOWLEDGE.retain))]  # fmt: skip
    assert whole[0] != whole[1] and found[0] == found[1]


def test_no_relation_is_left_to_teach_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repforget.locate._labelled.MIN_ROWS", 39)
    with pytest.raises(KnowledgeError, match="39 statements left to rank by"):
        rf.locate(model(1), KNOWLEDGE, "mdl_probe", nodes=("mlp_out",), statements=1, items=20)


def test_the_half_that_ranks_is_contrasted_with_its_own_retain_facts() -> None:
    generator = np.random.default_rng(0)
    clusters, beside = tuple(f"f{k}" for k in range(8)), tuple(f"r{k}" for k in range(6))
    moves = Moves(generator.random((3, 8)), 1 + generator.random(8), generator.random((3, 6)), clusters, beside)
    early, kept = ~in_second_half(clusters, 4), ~in_second_half(beside, 4)
    assert 0 < early.sum() < 8 and 0 < kept.sum() < 6
    gap = moves.gap[early].mean()
    expected = moves.forget[:, early].mean(1) / gap - 0.5 * moves.retain[:, kept].mean(1) / gap
    np.testing.assert_allclose(moves.scores(0.5, 4), expected)
    whole = (moves.forget.mean(1) - 0.5 * moves.retain.mean(1)) / moves.gap.mean()
    np.testing.assert_allclose(moves.scores(0.5), whole)


def test_nobody_is_left_to_rank_by() -> None:
    tasks, _ = corrupted_tasks(model(1), KNOWLEDGE, 0, items=24, mode="both")
    judges = {run.cluster for run in tasks[0].half(True, 0).forget}
    assert may_rank(tasks, [*judges, "another"], 0).tolist() == [False] * len(judges) + [True]
    with pytest.raises(KnowledgeError, match="left to rank by"):
        may_rank(tasks, sorted(judges), 0)
    one = [replace(t, forget=tuple(replace(run, cluster="one") for run in t.forget)) for t in tasks]
    assert may_rank(one, ["one", "two"], 0).all()  # said by the band
