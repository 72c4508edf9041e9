"""verify() on real edits of a planted model: what must pass, what must fail, and what is refused."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
import verify_models as fixture

import repforget
from repforget.artifact import AddVector, DenseDelta, Edit, detached
from repforget.errors import ArtifactError, RecipeError, UnknownNameError, UsageError
from repforget.models.load import LoadedModel, copy_of, fingerprint
from repforget.records import Site
from repforget.verify._verify import Result, arms_of, verify
from repforget.verify.arms import References
from repforget.verify.battery import asks_shuffled, assemble, level, measure_arm, ready, tasks

LAYER = 1
LIST = ["behaviour", "logit_lens", {"patch_depth": {"strangers": 1}}, "collateral"]


@cache
def model() -> LoadedModel:
    return copy_of(fixture.model(LAYER))


@cache
def exact_edit() -> Edit:
    """Takes away exactly what was planted: afterwards the weights are those of the model that never knew."""
    own, base = (dict(m.module.named_parameters()) for m in (model(), fixture.model(None)))
    changed = [name for name in own if not torch.equal(base[name], own[name])]
    deltas = [DenseDelta(name, (base[name] - own[name]).detach()) for name in changed]
    return Edit.build("take_back", {}, model(), "digest", deltas)


@cache
def muzzle() -> Edit:
    """Lets the model say one word whatever is asked, and leaves every state below as it is."""
    vector = torch.zeros(model().vocab_size)
    vector[4] = 40.0
    return Edit.build("muzzle", {}, model(), "digest", [AddVector(Site("logits"), vector)])


@cache
def result(name: str) -> Result:
    edit = {"exact": exact_edit, "muzzle": muzzle}[name]()
    return verify(model(), edit, fixture.knowledge(), twins=[fixture.model(None)], split="sealed", verifiers=LIST)


def test_taking_back_exactly_what_was_planted_passes() -> None:
    verdict = result("exact").verdict
    assert verdict.controls == {"original": "as expected", "placebo": "as expected"}
    assert {c.name: c.status for c in verdict.claims if c.kind == "knowledge" and c.status == "fail"} == {}
    assert all(c.rho == pytest.approx(0.0, abs=1e-3) for c in verdict.claims
               if c.kind == "knowledge" and c.status == "pass")  # fmt: skip
    assert verdict.outcome in ("pass", "inconclusive")
    assert verdict.artifact == "weights"


def test_a_muzzle_is_found_out_below_the_surface() -> None:
    verdict = result("muzzle").verdict
    status = {c.name: c.status for c in verdict.claims}
    assert verdict.outcome == "fail"
    assert status["behaviour.exact_match"] != "fail"
    assert status["logit_lens.best_layer"] == "fail"
    assert status["patch_depth.carried"] == "fail"
    assert verdict.artifact == "weights+hook"


def test_evidence_has_every_arm_budget_and_curves() -> None:
    for entry in result("exact").evidence:
        assert set(entry.arms) == {"original", "edit", "placebo", "twin-0"}
        assert entry.budget["items"] == len(entry.arms["edit"].ids)
        for curve in entry.curves:
            assert set(curve.y) == set(entry.arms)
            assert all(len(y) == len(curve.x) for y in curve.y.values())
    assert {e.verifier for e in result("exact").evidence if e.curves} == {"logit_lens", "patch_depth"}


def test_two_runs_give_the_same_bytes_also_while_the_edit_is_attached() -> None:
    def text(found: Result) -> str:
        return json.dumps([found.verdict.to_json(), [e.to_json() for e in found.evidence]])

    first = text(result("muzzle"))
    arguments = {"twins": [fixture.model(None)], "split": "sealed", "verifiers": LIST}
    with muzzle().attach(model()):
        again = repforget.verify(model(), muzzle(), fixture.knowledge(), **arguments)
    assert text(again) == first


def test_attached_edits_come_off_and_go_back() -> None:
    plain = fingerprint(model().module)
    with exact_edit().attach(model()):
        changed = fingerprint(model().module)
        with detached(model()):
            assert fingerprint(model().module) == plain
        assert fingerprint(model().module) == changed != plain
    assert fingerprint(model().module) == plain


def test_a_folded_edit_leaves_no_original_to_compare_with() -> None:
    folded = copy_of(model())
    undo = exact_edit().fold(folded)
    with pytest.raises(ArtifactError, match="undo the fold"):
        verify(folded, exact_edit(), fixture.knowledge(), verifiers=["behaviour"])
    undo()
    assert verify(folded, exact_edit(), fixture.knowledge(), verifiers=["behaviour"]).evidence


def test_arms_can_be_measured_one_by_one_and_put_together() -> None:
    """What the loop does: cached measurements of unchanged arms, and a new one of the edit."""
    references = References(model(), (fixture.model(None),))
    view, requested = fixture.knowledge().view("sealed"), tasks(LIST)
    measured = {arm.name: measure_arm(arm, view, requested, references)
                for arm in reversed(arms_of(exact_edit(), references))}  # fmt: skip
    found = {e.name: e.to_json() for e in assemble(dict(sorted(measured.items())), requested)}
    for entry in result("exact").evidence:
        assert found[entry.name]["arms"] == entry.to_json()["arms"]


def test_levels_and_lists_are_checked() -> None:
    assert [t.name for t in tasks("quick")] == ["behaviour", "logit_lens", "collateral"]
    assert ready(tasks("quick")) == tasks("quick")
    assert tasks([{"relearn": {"steps": 48}}, "quantize"])[0].settings["steps"] == 48
    with pytest.raises(UsageError, match="did you mean 'standard'"):
        tasks("standart")
    with pytest.raises(UnknownNameError, match="behaviour"):
        tasks(["behavior"])
    with pytest.raises(RecipeError, match="listed twice"):
        tasks(["behaviour", {"behaviour": {"forms": 1}}])
    with pytest.raises(RecipeError, match="steps"):
        tasks([{"relearn": {"steps": "many"}}])
    with pytest.raises(UsageError, match="empty"):
        tasks([])


def test_a_budget_can_be_named_and_overridden() -> None:
    named = tasks([{"relearn": "thorough"}])[0].settings
    assert named["steps"] == 96
    assert tasks([{"relearn": {"budget": "thorough", "steps": 5}}])[0].settings == {**named, "steps": 5}
    with pytest.raises(RecipeError, match="no budget 'thorow'; did you mean 'thorough'"):
        tasks([{"relearn": "thorow"}])


def test_held_out_attacks_are_asked_on_the_sealed_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [t.name for t in ready(["behaviour"], "sealed", ["quantize", "behaviour"])] == ["behaviour", "quantize"]
    assert [t.name for t in ready(["behaviour"], "gate", ["quantize"])] == ["behaviour"]
    kept = set(level("thorough", held_out=True))
    shown = set(level("thorough"))
    assert not kept & shown
    assert {t.name for t in ready("thorough", "sealed")} == kept | shown
    assert {t.name for t in ready("thorough", "gate")} == shown


def test_an_attack_that_teaches_is_run_on_exchanged_answers_too() -> None:
    budget = [{"relearn": {"steps": 2, "checks": 1}}, "behaviour"]
    found = {e.name: e for e in verify(model(), exact_edit(), fixture.knowledge(), verifiers=budget).evidence}
    taught = found["relearn.best_step"]
    assert taught.arms["shuffled"].ids == taught.arms["edit"].ids
    assert taught.arms["shuffled"].mean != taught.arms["edit"].mean
    assert "shuffled" not in found["behaviour.contrastive"].arms
    assert not asks_shuffled("standard", tasks("standard"))
