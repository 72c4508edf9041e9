"""Directions chosen by what they do: the published rules, and scores against one pass of the edited model."""

from __future__ import annotations

import math

import edit_models
import pytest
import tiny_models
import torch
from test_repselect import taught

from repforget.artifact import AddVector, Edit
from repforget.edit._contrast import contrasts
from repforget.edit.steer._selection import Judge, Scores, allowed, best, held_out, last_log_probs, log_odds
from repforget.edit.steer._writers import ablate_writers, orthonormal
from repforget.edit.steer.direction_ablation import direction_ablation
from repforget.errors import NoEffectError
from repforget.models.capture import Batch, forward
from repforget.records import Site
from repforget.scoring import answer_logprobs

DATA = edit_models.people().for_editor()


def test_each_rule_alone_shuts_a_direction_out() -> None:
    good = Scores(bypass=-3.0, induce=0.5, kl=0.05)
    assert allowed(good, 7, 10) and allowed(Scores(9.0, 0.0, 0.1), 0, 10)
    assert not allowed(good, 8, 10), "the last fifth"
    for wrong in (Scores(-3.0, -0.01, 0.05), Scores(-3.0, 0.5, 0.11), Scores(math.nan, 0.5, 0.05)):
        assert not allowed(wrong, 7, 10)


def test_of_the_allowed_the_lowest_bypass_wins() -> None:
    table = {
        (Site("resid_post", 1), "last"): Scores(-1.0, 1.0, 0.01),
        (Site("resid_post", 2), "subject"): Scores(-2.0, 0.1, 0.09),
        (Site("resid_post", 3), "last"): Scores(-5.0, 1.0, 0.2),
        (Site("resid_post", 9), "last"): Scores(-9.0, 1.0, 0.0),
    }
    assert best(table, 10) == (Site("resid_post", 2), "subject")
    with pytest.raises(NoEffectError, match="None of 1 directions passes .* smallest KL is 0.2"):
        best({(Site("resid_post", 3), "last"): Scores(-5.0, 1.0, 0.2)}, 10)


@pytest.mark.parametrize("architecture", tiny_models.ALL)
def test_scores_are_those_of_the_edited_model(architecture: str) -> None:
    """Ablation by hooks while judging is the ablation of the weights that the edit then is."""
    model = edit_models.model(architecture)
    forget, retain = DATA.forget[:12], DATA.retain[:12]
    site = Site("resid_post", 0)
    contrast = contrasts(model, [site], DATA.forget, DATA.retain)[site]
    basis = orthonormal(contrast.directions)
    judge = Judge.of(model, forget, retain)
    found = judge.scores(basis, contrast.difference, site)
    edit = Edit.build("ablation", {}, model, "", ablate_writers(model, basis))
    with edit.attach(model):
        bypass = log_odds(last_log_probs(model, judge.forget[0]), judge.forget[1]).mean()
        spared = last_log_probs(model, judge.retain[0])
    kl = torch.nn.functional.kl_div(spared, judge.known, log_target=True, reduction="batchmean")
    assert found.bypass == pytest.approx(float(bypass), abs=1e-4)
    assert found.kl == pytest.approx(float(kl), abs=1e-4) and found.kl > 1e-6
    with Edit.build("push", {}, model, "", [AddVector(site, contrast.difference)]).attach(model):
        fall = -log_odds(last_log_probs(model, judge.retain[0]), judge.retain[1])
    assert found.induce == pytest.approx(float((fall + log_odds(judge.known, judge.retain[1])).mean()), abs=1e-4)


def test_log_probabilities_are_those_of_single_prompts_and_of_scoring() -> None:
    model = edit_models.model("gpt2")
    judge = Judge.of(model, DATA.forget[:6], DATA.retain[:6])
    for ids, row in zip(judge.retain[0], judge.known, strict=True):
        alone = forward(model, Batch.pad([ids]))[0, -1].double().log_softmax(-1)
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)
    scored = answer_logprobs(model, [(f.prompt, f.answer) for f in DATA.retain[:6]]).sum_logprob
    own = judge.known.gather(1, judge.retain[1][:, None])[:, 0]
    torch.testing.assert_close(own, torch.tensor(scored), atol=1e-5, rtol=1e-5)
    odds = log_odds(judge.known, judge.retain[1])
    torch.testing.assert_close(odds, torch.logit(own.exp()), atol=1e-9, rtol=1e-9)
    assert math.isfinite(float(log_odds(torch.zeros(1, 1).double(), torch.zeros(1, dtype=torch.long))))


def test_a_random_direction_hides_little_and_the_chosen_one_is_noted() -> None:
    model = taught()
    edit = direction_ablation(model, DATA, site="resid_post", select="rules", positions="both")
    (note,) = (text for text in edit.manifest.notes if text.startswith("rules"))
    site, token = note.split()[1], note.split()[4]
    assert edit.manifest.settings["site"] == site and token in ("last", "subject")
    assert edit.manifest.settings["select"] == "rules"
    train, judged = held_out(DATA.forget, 0)
    assert not {f.id for f in train} & {f.id for f in judged} and len(judged) == len(DATA.forget) // 4
    others, spared = held_out(DATA.retain, 0)
    at = Site.parse(site)
    contrast = contrasts(model, [at], train, others, positions=token)[at]  # type: ignore[arg-type]
    own = Judge.of(model, judged, spared).scores(contrast.directions, contrast.difference, at)
    assert f"when ablated, retained answers {own.induce:.3g} less" in note and f"{own.bypass:.3g} when" in note


def test_no_direction_is_forced_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = taught()
    monkeypatch.setattr("repforget.edit.steer._selection.MOST_KL", -1.0)
    with pytest.raises(NoEffectError, match="passes the rules"):
        direction_ablation(model, DATA, site="resid_post", select="rules")
