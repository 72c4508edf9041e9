"""The judge on made-up evidence: statuses, margins, controls, wording."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from repforget.errors import ControlError
from repforget.records import Access, Evidence, ItemScores, Verdict
from repforget.verify._claims import Rule, claims, worst_items
from repforget.verify.verdict import judge, outcome, worst_claim

CLUSTERS, PER = 24, 8
IDS = tuple(f"i{k:03d}" for k in range(CLUSTERS * PER))
NAMES = tuple(f"c{k // PER:02d}" for k in range(CLUSTERS * PER))
FORBIDDEN = ("removed", "deleted", "guaranteed", "certified")


def column(level: float, seed: int, noise: float = 0.03, ids: tuple[str, ...] = IDS) -> ItemScores:
    generator = np.random.default_rng(seed)
    names = NAMES[: len(ids)]
    return ItemScores.of(ids, names, list(np.clip(level + noise * generator.standard_normal(len(ids)), 0, 1)))


def knowledge(name: str = "behaviour.contrastive", *, edit: float = 0.05, placebo: float = 0.9, twins: int = 2,
              original: float = 0.95, noise: float = 0.03, prior: float | None = None, votes: bool = True,
              second: float = 0.05) -> Evidence:  # fmt: skip
    verifier, measure = name.split(".")
    levels = {"original": (original, 1), "edit": (edit, 2), "placebo": (placebo, 3)}
    arms = {arm: column(level, seed, noise) for arm, (level, seed) in levels.items()}
    arms |= {f"twin-{k}": column(0.05 if k == 0 else second, 10 + k, noise) for k in range(twins)}
    access: Access = "black-box" if measure == "exact_match" else "logits"
    before = None if prior is None else column(prior, 4, 0.0)
    return Evidence(verifier, measure, "knowledge", access, votes, arms, before, {"steps": 24.0, "max_items": 9.0})


def collateral(name: str = "collateral.retain", *, edit: float = 0.95, placebo: float = 0.95, twins: int = 2,
               original: float = 0.95, noise: float = 0.02) -> Evidence:  # fmt: skip
    verifier, measure = name.split(".")
    levels = {"original": (original, 1), "edit": (edit, 5), "placebo": (placebo, 6)}
    arms = {arm: column(level, seed, noise) for arm, (level, seed) in levels.items()}
    arms |= {f"twin-{k}": column(original, 20 + k, noise) for k in range(twins)}
    return Evidence(verifier, measure, "collateral", "logits", True, arms)


def test_an_edit_at_the_twin_level_passes() -> None:
    verdict = judge([knowledge(), knowledge("relearn.best_step"), collateral()])
    assert verdict.outcome == "pass"
    assert verdict.controls_ok
    assert verdict.controls == {"original": "as expected", "placebo": "as expected", "twin-1": "as expected"}
    assert verdict.sentence.startswith("Robust to attack")
    assert "steps 24" in verdict.sentence
    assert "max_items" not in verdict.sentence


def test_one_surviving_attack_fails_and_is_named() -> None:
    verdict = judge([knowledge("behaviour.exact_match"), knowledge("reprobe.mlp", edit=0.8), collateral()])
    assert verdict.outcome == "fail"
    assert verdict.worst == "reprobe.mlp"
    assert verdict.sentence.startswith("Suppressed: ")


def test_retained_in_behaviour_is_not_called_suppressed() -> None:
    verdict = judge([knowledge(edit=0.9), knowledge("behaviour.exact_match", edit=0.9), collateral()])
    assert verdict.outcome == "fail"
    assert "still there" in verdict.sentence
    claim = verdict.claims[0]
    assert claim.rho == pytest.approx((0.9 - 0.05) / 0.9, abs=0.02)
    assert claim.rho_low < claim.rho < claim.rho_high


def test_damage_fails_although_the_knowledge_is_gone() -> None:
    verdict = judge([knowledge(), collateral(edit=0.7)])
    assert verdict.outcome == "fail"
    assert verdict.worst == "collateral.retain"
    assert verdict.claims[1].rho == pytest.approx(0.25 / 0.95, abs=0.02)


def test_no_collateral_evidence_is_never_a_pass() -> None:
    verdict = judge([knowledge()])
    assert verdict.outcome == "inconclusive"
    assert "collateral" in verdict.sentence


def test_too_few_items_are_inconclusive_and_say_how_many() -> None:
    short = [dataclasses.replace(e, arms={k: cut(v, 128) for k, v in e.arms.items()})
             for e in (knowledge(noise=0.5, twins=1), collateral(noise=0.0, twins=1))]  # fmt: skip
    verdict = judge(short)
    assert verdict.outcome == "inconclusive"
    claim = verdict.claims[0]
    assert claim.status == "inconclusive"
    assert claim.n_needed is not None
    assert claim.n_needed > claim.n_items
    assert str(claim.n_needed) in claim.reason


def cut(scores: ItemScores, n: int) -> ItemScores:
    return ItemScores(scores.ids[:n], scores.clusters[:n], scores.values[:n], scores.valid[:n])


def test_what_the_original_never_knew_has_no_power() -> None:
    verdict = judge([knowledge(original=0.06, edit=0.05, placebo=0.05), collateral()])
    assert verdict.claims[0].status == "no power"
    assert verdict.outcome == "inconclusive"
    assert not verdict.controls_ok
    assert verdict.sentence.startswith("No verdict: the controls came out wrong")


def test_a_raw_likelihood_that_answers_by_the_prior_looks_unforgotten_and_does_not_vote() -> None:
    """Such a model can score -0.87 nats where the knowing one has 0 and a stranger -3.58: 75 % "left", yet no vote."""
    levels = {"original": 0.0, "edit": -0.87, "placebo": -0.1, "twin-0": -3.58}
    arms = {arm: ItemScores.of(IDS, NAMES, [level] * len(IDS)) for arm, level in levels.items()}
    raw = Evidence("behaviour", "log_probability", "knowledge", "logits", False, arms)
    verdict = judge([knowledge(twins=1), raw, collateral(twins=1)])
    assert verdict.claims[1].status == "descriptive"
    assert verdict.claims[1].rho == pytest.approx(0.757, abs=0.001)
    assert verdict.outcome == "pass"


def test_the_floor_is_the_higher_of_twin_and_prior() -> None:
    low = claims([knowledge(edit=0.2, prior=0.02)], Rule())[0]
    high = claims([knowledge(edit=0.2, prior=0.2)], Rule())[0]
    assert low.reason.endswith("floor: twin")
    assert low.status == "fail"
    assert "floor: prior" in high.reason
    assert high.status == "pass"
    assert high.levels["floor"] == pytest.approx(0.2)


def test_without_twins_the_wording_is_chance() -> None:
    verdict = judge([knowledge(twins=0, prior=0.05), collateral(twins=0)])
    assert verdict.outcome == "pass"
    assert verdict.sentence.startswith("Consistent with chance")
    assert set(verdict.controls) == {"original", "placebo"}


def test_without_any_floor_there_is_no_vote() -> None:
    verdict = judge([knowledge(twins=0), collateral(twins=0)])
    assert verdict.claims[0].status == "no power"
    assert verdict.outcome == "inconclusive"


def test_the_margin_is_never_below_the_difference_between_twins() -> None:
    apart = claims([knowledge(second=0.17)], Rule())[0]
    assert apart.margin == pytest.approx(0.12 / (0.95 - 0.11), abs=0.01)
    assert claims([knowledge()], Rule())[0].margin == pytest.approx(0.05)


def test_the_second_twin_is_held_to_the_users_margin() -> None:
    """The noise between the twins may not excuse the very pair it was measured on."""
    verdict = judge([knowledge(second=0.3), collateral()])
    assert not verdict.controls_ok
    assert "never saw" in verdict.controls["twin-1"]
    assert verdict.outcome == "inconclusive"


def test_a_placebo_that_does_the_same_is_a_fault_of_the_controls() -> None:
    verdict = judge([knowledge(placebo=0.05), collateral()])
    assert not verdict.controls_ok
    assert "placebo" in verdict.sentence
    assert verdict.outcome == "inconclusive"


def test_a_placebo_that_only_does_damage_is_as_expected() -> None:
    verdict = judge([knowledge(placebo=0.05), collateral(placebo=0.3)])
    assert verdict.controls["placebo"] == "as expected"


def test_below_the_floor_is_reported_as_over_unlearned() -> None:
    verdict = judge([knowledge(edit=0.0, twins=0, prior=0.2, noise=0.01), collateral(twins=0)])
    assert verdict.claims[0].status == "inconclusive"
    assert "over-unlearned" in verdict.claims[0].reason
    silent = judge([knowledge("behaviour.exact_match", edit=0.0, twins=0, prior=0.2, noise=0.01), collateral(twins=0)])
    assert silent.claims[0].status == "pass", "declining to answer is not avoiding the truth"


def test_no_success_at_all_keeps_an_upper_limit_above_zero() -> None:
    def exact(rate: float, seed: int) -> ItemScores:
        draws = np.random.default_rng(seed).random(len(IDS)) < rate
        return ItemScores.of(IDS, NAMES, list(draws.astype(float)))

    arms = {"original": exact(0.99, 1), "edit": exact(0.0, 2), "placebo": exact(0.95, 3), "twin-0": exact(0.0, 4)}
    evidence = Evidence("behaviour", "exact_match", "knowledge", "black-box", True, arms)
    claim = claims([evidence], Rule())[0]
    assert claim.rho == 0.0
    assert claim.rho_high == pytest.approx((1 - 0.05 ** (1 / len(IDS))) / arms["original"].mean, rel=1e-6)
    few = dataclasses.replace(evidence, arms={k: cut(v, 40) for k, v in arms.items()})
    assert claims([few], Rule())[0].status == "inconclusive"


def test_invalid_items_are_left_out_on_every_arm_and_counted() -> None:
    entry = knowledge()
    broken = entry.arms["edit"]
    valid = broken.valid.copy()
    valid[:16] = False
    arms = {**entry.arms, "edit": ItemScores(broken.ids, broken.clusters, broken.values, valid)}
    claim = claims([dataclasses.replace(entry, arms=arms)], Rule())[0]
    assert claim.n_items == len(IDS) - 16
    assert claim.n_clusters == CLUSTERS - 2


def test_other_items_on_one_arm_are_refused() -> None:
    entry = knowledge()
    edit = entry.arms["edit"]
    arms = {**entry.arms, "edit": ItemScores(edit.ids[::-1], edit.clusters, edit.values, edit.valid)}
    with pytest.raises(ControlError, match="other items on arm 'edit'"):
        claims([dataclasses.replace(entry, arms=arms)], Rule())
    with pytest.raises(ControlError, match="no arm 'edit'"):
        claims([dataclasses.replace(entry, arms={"original": entry.arms["original"]})], Rule())


def test_holm_takes_back_a_lone_lucky_failure() -> None:
    """One of twenty attacks just above the margin: alone it would fail, beside nineteen others it is not sure."""
    edge = 0.05 + 0.055 * 0.9
    lone = [knowledge("a.x", edit=edge, noise=0.02)]
    rule = Rule()
    alone = claims(lone, rule)[0]
    assert alone.status == "fail"
    p_rule = dataclasses.replace(rule, margin=alone.rho_low - 1e-4)
    crowd = claims([*lone, *(knowledge(f"b{k}.x", noise=0.02) for k in range(19))], p_rule)
    assert crowd[0].status == "inconclusive"
    assert "Holm" in crowd[0].reason


def shuffled(entry: Evidence, level: float) -> Evidence:
    return dataclasses.replace(entry, arms={**entry.arms, "shuffled": column(level, 30)})


def test_what_an_attack_elicits_of_exchanged_answers_is_the_floor() -> None:
    entry = knowledge("soft_prompt.best", edit=0.3)
    assert claims([entry], Rule())[0].status == "fail"
    found = claims([shuffled(entry, 0.3)], Rule())[0]
    assert found.status == "pass"
    assert found.reason.endswith("floor: shuffled answers")
    assert found.levels["floor"] == pytest.approx(0.3, abs=0.01)
    assert claims([shuffled(entry, 0.01)], Rule())[0].reason.endswith("floor: twin")


def test_an_attack_that_elicits_anything_has_no_power() -> None:
    found = claims([shuffled(knowledge("soft_prompt.best", edit=0.9), 0.95)], Rule())[0]
    assert found.status == "no power"


def test_exchanged_answers_are_no_control_and_no_floor_of_quality() -> None:
    verdict = judge([shuffled(knowledge(), 0.04), shuffled(collateral(), 0.3)])
    assert verdict.outcome == "pass"
    assert set(verdict.controls) == {"original", "placebo", "twin-1"}
    assert "floor" not in verdict.claims[1].levels


def test_a_pass_says_whether_it_is_equivalent_to_the_floor() -> None:
    near = claims([knowledge(edit=0.06)], Rule())[0]
    assert near.status == "pass"
    assert "equivalent to the floor" in near.reason
    silent = [knowledge("behaviour.exact_match", edit=edit, twins=0, prior=0.2, noise=0.1) for edit in (0.0, 0.16)]
    below, unsure = claims(silent, Rule())
    assert "over-unlearned by at least" in below.reason
    assert "below the floor" in unsure.reason
    assert unsure.rho_low < -0.05 < unsure.rho_high


def test_the_margin_follows_the_noise_of_all_twins() -> None:
    entry = knowledge()
    third = dataclasses.replace(entry, arms={**entry.arms, "twin-2": column(0.15, 12)})
    assert claims([third], Rule())[0].margin > claims([entry], Rule())[0].margin
    levels = [third.arms[f"twin-{k}"].mean for k in range(3)]
    gap = third.arms["original"].mean - np.mean(levels)
    assert claims([third], Rule())[0].margin == pytest.approx((max(levels) - min(levels)) / gap, rel=1e-6)


def test_the_worst_items_are_named_with_the_attack_that_found_them() -> None:
    quiet, loud = knowledge(), knowledge("relearn.best_step")
    values = loud.arms["edit"].values.copy()
    values[[3, 77]] = 1.0, 0.8
    told = ItemScores(IDS, NAMES, values, loud.arms["edit"].valid)
    loud = dataclasses.replace(loud, arms={**loud.arms, "edit": told})
    unheard = knowledge("relearn.nats", edit=0.9, votes=False)
    blind = knowledge("relearn.blind", original=0.05, edit=0.9)
    found = worst_items([quiet, loud, unheard, blind, collateral()])
    assert len(found) == math.ceil(0.05 * len(IDS))
    assert [item.id for item in found[:2]] == ["i003", "i077"]
    assert {item.attack for item in found[:2]} == {"relearn.best_step"}
    assert found[0].left == pytest.approx(0.95 / 0.9, abs=0.05)
    assert found[0].cluster == "c00"
    assert {item.attack for item in worst_items([quiet, loud], 500)} == {quiet.name, loud.name}


@settings(max_examples=30)
@given(some.floats(0, 1), some.floats(0, 1), some.floats(0.3, 1), some.integers(0, 2))
def test_the_sentence_uses_only_the_fixed_words(edit: float, kept: float, original: float, twins: int) -> None:
    verdict = judge([knowledge(edit=edit, original=original, twins=twins, prior=0.05),
                     knowledge("reprobe.linear", edit=edit / 2, original=original, twins=twins, prior=0.05),
                     collateral(edit=kept, twins=twins)], draws=200, sites=["resid_post.1"])  # fmt: skip
    text = " ".join([verdict.sentence, *(c.reason for c in verdict.claims), *verdict.controls.values()]).lower()
    assert not [word for word in FORBIDDEN if word in text]
    assert verdict.sentence.count(".") >= 1
    assert verdict.sentence.endswith(".")


def test_a_linear_pass_names_the_sites_of_the_edit() -> None:
    verdict = judge([knowledge(), knowledge("reprobe.linear"), collateral()], sites=["resid_post.1", "resid_post.2"])
    assert "linearly erased at sites resid_post.1, resid_post.2" in verdict.sentence


def test_a_verdict_survives_json_and_repeats() -> None:
    evidence = [knowledge(), collateral()]
    verdict = judge(evidence, seed=3)
    assert verdict == judge(evidence, seed=3)
    text = json.dumps(verdict.to_json(), allow_nan=False)
    assert Verdict.from_json(json.loads(text)).claims[0].rho == verdict.claims[0].rho


def test_bad_margins_and_no_evidence_are_refused() -> None:
    with pytest.raises(ControlError, match="Margins"):
        judge([knowledge()], margin=0.0)
    with pytest.raises(ControlError, match="no evidence"):
        judge([])


def test_worst_and_outcome_of_nothing() -> None:
    assert worst_claim([]) is None
    assert outcome([]) == "inconclusive"


def test_no_rho_is_nan_where_a_claim_votes() -> None:
    for claim in judge([knowledge(), collateral()]).claims:
        assert all(math.isfinite(x) for x in (claim.rho, claim.rho_low, claim.rho_high))


def test_a_later_look_at_the_same_items_needs_more() -> None:
    """Spending the level on repeated looks widens every interval, so that looking again cannot buy a pass."""
    rng = np.random.default_rng(0)
    ids, clusters = [f"i{k}" for k in range(120)], [f"c{k // 6}" for k in range(120)]

    def arm(p: float) -> ItemScores:
        return ItemScores.of(ids, clusters, (rng.random(120) < p).astype(float).tolist())

    arms = {"original": arm(1.0), "edit": arm(0.1), "placebo": arm(1.0), "twin-0": arm(0.05)}
    evidence = (Evidence("behaviour", "exact_match", "knowledge", "black-box", True, arms),)
    first, fifth = (claims(evidence, Rule(alpha=0.05 / 2**look))[0] for look in (1, 5))
    assert fifth.rho == first.rho
    assert fifth.rho_low < first.rho_low < first.rho_high < fifth.rho_high
