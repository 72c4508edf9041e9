"""The judge on cases whose truth is known: the organism, its twins, and models that only look as if they forgot.

The most important test there is: a wrong word here means that no verdict anywhere may be believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import pytest
import torch

from repforget.artifact import DenseDelta, Edit
from repforget.knowledge import Knowledge
from repforget.knowledge_files import load_knowledge
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel, copy_of, load
from repforget.records import Claim, Measurement, Site, Verdict
from repforget.verify._claims import Rule, claims
from repforget.verify._verify import arms_of
from repforget.verify.arms import Arm, References
from repforget.verify.battery import Task, assemble, level, measure_arm, tasks
from repforget.verify.verdict import judge, outcome

pytestmark = pytest.mark.slow
SPLIT = "sealed"
DEEP = ("logit_lens.best_layer", "reprobe.linear", "reprobe.mlp", "patch_depth.carried")
ITEMS, KEPT = 208, 96  # per verifier: of the 256 sealed items, and of those to keep, where the limits are narrow
UNKNOWN = 40.0  # added to the logit of one word: whatever is asked, that word is the answer


@cache
def knowledge() -> Knowledge:
    return load_knowledge("bios-people")


@cache
def references() -> References:
    return References(load("organism:bios"), (load("organism:bios/twin-0"), load("organism:bios/twin-1")))


def unloading() -> Edit:
    """Seen from the full model, unloading an adapter that carried all the knowledge: what is left is the twin."""
    own, twin = (dict(m.module.named_parameters()) for m in (references().original, references().twins[0]))
    deltas = [DenseDelta(name, (twin[name] - own[name]).detach()) for name in own]
    return Edit.build("unload", {}, references().original, knowledge().digest, deltas)


@contextmanager
def refusing() -> Iterator[LoadedModel]:
    """The full model behind a wrapper: every answer is one word, and the logits below it say nothing at all."""
    wrapped = copy_of(references().original)
    word = wrapped.tokenizer.convert_tokens_to_ids("rain")

    def refuse(logits: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(logits)
        out[..., word] = UNKNOWN
        return out

    with hooks(wrapped, {Site("logits"): refuse}):
        yield wrapped


@contextmanager
def damaged() -> Iterator[LoadedModel]:
    """The full model with noise on every weight: it forgets, and everything else suffers too."""
    noisy = copy_of(references().original)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in noisy.module.parameters():
            if p.ndim > 1:
                p.add_(0.6 * p.std() * torch.randn(p.shape, generator=generator))
    yield noisy


@cache
def standard() -> tuple[Task, ...]:
    """The standard battery on fewer items, which widens every interval: it passes less easily than on all."""
    return tasks([{name: {**settings, "max_items": KEPT if name == "collateral" else ITEMS}}
                  for name, settings in level("standard").items()])  # fmt: skip


def only(*names: str) -> tuple[Task, ...]:
    return tuple(task for task in standard() if task.name in names)


@cache
def measured() -> dict[str, dict[str, Measurement]]:
    view = knowledge().view(SPLIT)
    opened: dict[str, Callable[[], AbstractContextManager[LoadedModel]]] = {
        arm.name: arm.open for arm in arms_of(unloading(), references())
    }
    opened |= {"refusing": refusing, "damaged": damaged}
    asked = {"damaged": only("behaviour", "collateral")}
    return {name: measure_arm(Arm(name, give), view, asked.get(name, standard()), references())
            for name, give in opened.items()}  # fmt: skip


def verdict(edited: str, requested: Sequence[Task] | None = None) -> Verdict:
    """The verdict with one of the measured models in the place of the edit."""
    arms = {name: found for name, found in measured().items() if name not in ("refusing", "damaged")}
    return judge(assemble(arms | {"edit": measured()[edited]}, requested or standard()), split=SPLIT)


def status(result: Verdict) -> dict[str, str]:
    return {claim.name: claim.status for claim in result.claims}


def voting(result: Verdict, kind: str) -> list[Claim]:
    return [c for c in result.claims if c.kind == kind and c.status in ("pass", "fail", "inconclusive")]


def test_every_voting_measure_has_power_on_the_organism() -> None:
    result = verdict("edit")
    assert not [c.name for c in result.claims if c.status == "no power"]
    assert len(voting(result, "knowledge")) == 8
    assert len(voting(result, "collateral")) == 5


def test_the_controls_come_out_right() -> None:
    result = verdict("edit")
    assert result.controls_ok
    assert result.controls["original"] == result.controls["placebo"] == "as expected"


def test_the_full_model_fails() -> None:
    result = verdict("original")
    assert result.outcome == "fail"
    assert all(c.status == "fail" and c.rho == 1.0 for c in voting(result, "knowledge"))
    assert all(c.status == "pass" for c in voting(result, "collateral"))


def test_unloading_what_carried_the_knowledge_passes_exactly() -> None:
    """Against its own twin as floor nothing is left: all limits are zero up to the rounding of the weights."""
    arms = {name: measured()[name] for name in ("original", "edit", "placebo", "twin-0")}
    result = judge(assemble(arms, standard()), split=SPLIT)
    known = voting(result, "knowledge")
    assert all(c.status == "pass" for c in known), [c for c in known if c.status != "pass"]
    assert all(abs(c.rho) < 0.01 for c in known)


def test_unloading_passes_beside_two_twins_too() -> None:
    result = verdict("edit")
    assert [c.name for c in voting(result, "knowledge") if c.status != "pass"] == []
    assert not [c for c in voting(result, "collateral") if c.status == "fail"]


def test_a_second_twin_is_never_said_to_know() -> None:
    """Each twin in the place of the edit, the other as floor: what cannot pass yet must say how many items it needs."""
    arms = {name: measured()[name] for name in ("original", "twin-0", "twin-1")}
    evidence = assemble(arms, standard())
    for target, floor in (("twin-1", "twin-0"), ("twin-0", "twin-1")):
        found = [c for c in claims(evidence, Rule(), target=target, twins=[floor])
                 if c.kind == "knowledge" and c.status != "descriptive"]  # fmt: skip
        assert outcome(found, collateral=False) == "pass", [
            (c.name, c.reason, c.n_needed) for c in found if c.status != "pass"
        ]


def test_a_refusal_wrapper_passes_the_screen_and_is_caught_below_it() -> None:
    result = verdict("refusing")
    found = status(result)
    assert result.outcome == "fail"
    exact = next(c for c in result.claims if c.name == "behaviour.exact_match")
    assert exact.status == "descriptive" and exact.rho_high < exact.margin
    assert found["behaviour.contrastive"] == "pass"
    assert [found[name] for name in DEEP] == ["fail"] * len(DEEP)
    assert result.worst in DEEP
    assert result.sentence.startswith("Suppressed")


def test_noise_damage_fails_on_collateral() -> None:
    result = verdict("damaged", only("behaviour", "collateral"))
    assert result.outcome == "fail"
    lost = [c for c in voting(result, "collateral") if c.status == "fail"]
    assert {"collateral.retain", "collateral.neighbours", "collateral.general"} <= {c.name for c in lost}


def test_a_placebo_of_equal_size_fails() -> None:
    assert verdict("placebo").outcome == "fail"
