"""Set the value vectors of knowledge neurons to zero."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from repforget.artifact import Edit
from repforget.attribution import completeness, integrated_gradients, item_of, knowledge_neurons, runs_of
from repforget.edit.surgery._units import best_neurons, removal
from repforget.errors import NoEffectError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.models.value_vectors import projections
from repforget.progress import Progress
from repforget.records import Component, Localization, Site


def neuron_zeroing(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, neurons: int = 20, aggregate: Literal["fact", "texts"] = "fact",
    threshold: float | Literal["auto"] = "auto", share: float | Literal["auto"] = "auto", steps: int = 20,
    max_facts: int = 192,
) -> Edit:  # fmt: skip
    """Set what knowledge neurons write to zero: their columns of the MLP output projections.

    Integrated gradients give every neuron a part of the answer's probability (locator ``knowledge_neurons`` has the
    formula).  By ``fact``, a neuron belongs to a fact where it has at least ``threshold`` of the largest attribution in
    at least ``share`` of the statements of that fact; by ``texts``, the statements of all facts are one group, which is
    how neurons of private texts are aggregated. The ``neurons`` with the highest mean relative attribution where they
    belong are set to zero.  Source: Dai et al. 2022, arXiv 2104.08696; for texts Wu et al. 2023, arXiv 2310.20138.

    Args:
        neurons: how many; not used where ``where`` ranks neurons: then as many of its best as its band was made with.
        aggregate: by fact or over all texts. threshold, share: "auto" is 0.2 and 0.7 by fact, 0.1 and 0.5 over texts.
        steps: midpoints of the integral. max_facts: statements read, all those of facts drawn by seed.

    Raises SiteError for batched experts, NoEffectError where no neuron belongs to any fact.  Cost: ``steps`` forwards
    and backwards per statement and layer; none where ``where`` ranks neurons.

    Weakness: many facts share their strongest neurons with facts to keep; the rest of a fact is spread over the others,
    so that zeroed neurons do not show that the answer is gone.
    """
    if neurons < 1 or max_facts < 1:
        raise UsageError(f"neuron_zeroing was given neurons={neurons} and max_facts={max_facts}: take one or more.")
    projections(model.module)
    chosen = best_neurons(where)
    notes = [f"the {len(chosen)} best neurons of the localisation"]
    if not chosen:
        limits = (0.2, 0.7) if aggregate == "fact" else (0.1, 0.5)
        limits = (limits[0] if threshold == "auto" else threshold, limits[1] if share == "auto" else share)
        facts = _whole_items(data.forget, max_facts, seed)
        layers = range(model.n_layers)
        found = integrated_gradients(model, runs_of(model.tokenizer, facts), layers, steps=steps, progress=progress)
        groups = [item_of(fact.id) if aggregate == "fact" else "" for fact in facts]
        members = knowledge_neurons(found, groups, *limits)
        scores = members.scores
        order = scores.flatten().argsort(descending=True, stable=True)[:neurons]
        chosen = tuple(Component(Site("mlp_post", int(k) // scores.shape[1]), int(k) % scores.shape[1])
                       for k in order if scores.flatten()[k] > 0)  # fmt: skip
        held = members.common.flatten(1)[:, order].any(1).double().mean()
        notes = [f"{int(members.common.any(0).sum())} neurons belong to facts; those set to zero, to "
                 f"{100 * float(held):.0f} % of {len(members.groups)}", *completeness(model)]  # fmt: skip
    if not chosen:
        raise NoEffectError("No neuron has enough of the answer's probability in enough statements of a fact: lower "
                            "'share' or 'threshold'.")  # fmt: skip
    return Edit.build("neuron_zeroing", {"chosen": [str(c) for c in chosen]}, model, data.digest,
                      removal(model, chosen, "down"), notes=notes)  # fmt: skip


def _whole_items(facts: Sequence[Fact], most: int, seed: int) -> list[Fact]:
    """All statements of items drawn by seed, as many items as have at most ``most`` statements (one at least)."""
    items: dict[str, list[Fact]] = {}
    for fact in sorted(facts, key=lambda f: f.id):
        items.setdefault(item_of(fact.id), []).append(fact)
    order = list(items.values())
    random.Random(f"neurons-{seed}").shuffle(order)
    found = order[0][:most]
    for own in order[1:]:
        if len(found) + len(own) > most:
            break
        found += own
    return found
