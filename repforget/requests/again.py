"""Earlier requests checked again after later ones: the models that the ledger's edits make, asked in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from repforget.errors import ResourceError, UsageError
from repforget.knowledge import Item, Knowledge
from repforget.models.load import load
from repforget.progress import Progress, track
from repforget.records import ItemScores
from repforget.requests import matching
from repforget.requests.ledger import Ledger
from repforget.requests.stability import Look, Stability, look, never_known, stability
from repforget.requests.stack import in_force, sequence
from repforget.requests.states import requests
from repforget.verify import _asking as ask

KEPT = 128  # items of what must stay that are asked in every state
ALTERNATIVES = 31


def again(
    ledger: Ledger, knowledge: Knowledge, *, before: str | None = None, floor: str | None = None,
    progress: Progress | None = None,
) -> Stability:  # fmt: skip
    """Ask about every answered request in the model after each answer, and record what came back.

    ``before`` is the model as it was before any request (the ledger's own where edits pile up on it; a sharded
    training starts from a base that never knew, so give the model that was served); ``floor`` a model that never knew,
    without which answering by the prior stands for it.  Each earlier request gets a row "reverified": fail where more
    than 5 % of its knowledge surely came back, pass where surely less did.  A request that names nothing in the probe
    is left out, and so is one of which the original knew nothing (inconclusive).  Cost: one model and one pass over all
    items per request.  UsageError where fewer than two edits are in force or no request is left, ResourceError where
    another process changed what is in force meanwhile.
    """
    ledger.refuse_broken()
    placed, states = in_force(ledger), list(sequence(ledger))
    if len(states) < 2:
        raise UsageError(f"{len(states)} requests of '{ledger.path}' have an edit in force: two are needed before an "
                         "earlier one can be checked again.")  # fmt: skip
    base = load(str(ledger.facts["model"]))
    if before is None and any(event.body.get("mode") == "sharded" for event in ledger.events(kinds=("edit",))):
        raise UsageError(f"The edits of '{ledger.path}' are of a sharded training, whose base '{base.name}' knew "
                         "nothing of its records: give --before, the model that was served before any "
                         "request.")  # fmt: skip
    names = {f"request {number}": number for number, _ in states}
    items = {name: matching.items_of(ledger, requests(ledger, number)[0], knowledge) for name, number in names.items()}
    left_out = {name: f"{name.capitalize()} names nothing in the probe '{knowledge.name}': give the probe whose ids or "
                      "clusters it names." for name, own in items.items() if not own}  # fmt: skip
    asked = {name: own for name, own in items.items() if own}
    keep = _keep(knowledge, {item.id for own in asked.values() for item in own})
    _refuse_none(asked, left_out)
    looks = [look(base if before is None else load(before), knowledge, asked, keep)]
    for _, edit in track(progress, states, "asking again", len(states)):
        looks.append(look(edit.applied_to(base), knowledge, asked, keep))
    known = look(load(floor), knowledge, asked, keep) if floor else _prior(knowledge, looks[0], asked)
    unknown = never_known(looks[0], known)
    left_out |= unknown
    _refuse_none(asked.keys() - unknown.keys(), left_out)
    looks, known = [_without(each, unknown) for each in looks], _without(known, unknown)
    found = stability(looks, known, tuple(names), left_out)
    with ledger.writing():
        if in_force(ledger) != placed:
            raise ResourceError(f"Another process changed what is in force in '{ledger.path}' meanwhile: check again.")
        _record(ledger, names, found, unknown)
    return found


def _refuse_none(asked: Iterable[str], left_out: Mapping[str, str]) -> None:
    if not [*asked]:
        raise UsageError(next(iter(left_out.values())))


def _without(each: Look, names: Iterable[str]) -> Look:
    return replace(each, requests={name: own for name, own in each.requests.items() if name not in names})


def _keep(knowledge: Knowledge, gone: set[str]) -> Sequence[Item]:
    """Judged items of what must stay that no request names, half of them neighbours where there are enough."""
    judged = knowledge.view("sealed")
    near = [item for item in judged.neighbours if item.id not in gone][: KEPT // 2]
    return (*near, *[item for item in judged.retain if item.id not in gone][: KEPT - len(near)])


def _prior(knowledge: Knowledge, like: Look, asked: dict[str, tuple[Item, ...]]) -> Look:
    """What somebody would know who answers by how common an answer is."""
    values = {name: ask.scores(items, ask.prior(items, knowledge, ALTERNATIVES)) for name, items in asked.items()}
    nothing = ItemScores.of(like.keep.ids, like.keep.clusters, [0.0] * len(like.keep.ids))
    return Look(values, nothing)


def _record(ledger: Ledger, names: Mapping[str, int], found: Stability, unknown: Mapping[str, str]) -> None:
    numbers = [*names.values()]
    told: dict[str, dict[str, Any]] = {name: {"reason": reason} for name, reason in unknown.items()}
    told |= {name: {"came_back": back.point, "low": back.low, "high": back.high}
             for name, back in zip(found.names, found.re_emerged, strict=True)}  # fmt: skip
    for name, outcome in found.outcomes.items():
        if name in told:
            ledger.record("reverified", names[name], {"outcome": outcome, "after": numbers[-1], **told[name]})
