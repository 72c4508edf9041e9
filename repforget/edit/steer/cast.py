"""Conditional steering: add a vector in sequences whose activations point along a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import AddVector, Edit, Gate
from repforget.edit._collect import Positions, read_points, subsample
from repforget.edit._contrast import contrasts
from repforget.edit.steer.steering import steering_sites
from repforget.errors import NoEffectError, UsageError
from repforget.knowledge import EditData
from repforget.models.capture import stream
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization, Site
from repforget.scoring.encode import context_limit, encode_prompts, pad_id, token_batches

MARGIN = 1e-4  # cosines closer than this are the same: in float32 they depend on the batch they are computed in


def cast(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, sites: Literal["auto"] | list[str] = "auto", top_layers: int = 1,
    strength: float = 1.0, positions: Positions = "last", condition: str = "auto",
    condition_positions: Positions = "subject", directions: Literal["mean", "principal"] = "mean",
    max_facts: int = 1024,
) -> Edit:  # fmt: skip
    """Steer towards the retain mean from the first token on whose cosine with a condition vector crosses a threshold.

    Lee et al. 2024, arXiv 2409.05907 (CAST).  Layer, threshold and direction of the comparison are those with the best
    F1 in telling the prompts of forget facts from those of retained facts and from general texts.  There one cosine of
    the whole prompt decides; here the first token that crosses opens the rest of its sequence, so that each token
    depends on earlier ones alone, read at once or decoded with a cache.  ``steering`` gates by a fitted linear reader.

    Args:
        sites: where the vector is added; "auto" is resid_post of the ``top_layers`` best layers of ``where``, or of the
            middle layer.
        strength: multiple of the difference of means (retain less forget, at ``positions``) that is added.
        condition: site of the condition, "auto" for the best of all residual sites before the first of ``sites``.
        condition_positions: points at which forget and retain facts are compared for the condition vector.
        directions: the condition vector is the difference of "mean", or the leading "principal" difference.
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where the means agree or no condition tells any two prompts apart; UsageError for a condition
    that does not lie before the sites.  Cost: three passes over the facts.

    Weakness: it depends on the input and cannot be folded: whoever holds the weights can drop it.  F1 is that of the
    prompts it was chosen on.  It suppresses an answer, and does not remove what is stored.
    """
    forget, retain = subsample(data.forget, max_facts, seed), subsample(data.retain, max_facts, seed)
    chosen = steering_sites(model, sites, where, top_layers)
    found = contrasts(model, chosen, forget, retain, positions=positions, progress=progress)
    candidates = _candidates(model, condition, chosen)
    vectors = contrasts(model, candidates, forget, retain, positions=condition_positions,
                        principal=directions == "principal", required=condition != "auto",
                        progress=progress)  # fmt: skip
    texts = [read_points(model, facts).ids for facts in (forget, retain)]
    if data.general:
        limit = context_limit(model)
        texts[1] += tuple(ids[:limit] for ids in encode_prompts(model.tokenizer, list(data.general)))
    axes = {site: contrast.directions[0] for site, contrast in vectors.items()}
    cosines = [extremes(model, axes, rows, progress) for rows in texts]
    gates = {site: best_gate(cosines[0][site], cosines[1][site]) for site in axes}
    site = max(gates, key=lambda s: gates[s].f1)
    rule, always = gates[site], 2 * len(texts[0]) / (2 * len(texts[0]) + len(texts[1]))
    if not rule.opened:
        raise NoEffectError(f"All prompts have the same cosine with the condition at {site}, so that none can be told "
                            "from another: name another condition, or use steering without a gate.")  # fmt: skip
    gate = Gate(axes[site], rule.threshold, scope="prefix", cosine=True, above=rule.above, site=site)
    operations = [AddVector(at, -c.difference, strength, gate) for at, c in found.items()]
    settings = {"sites": [str(s) for s in chosen], "top_layers": top_layers, "strength": strength,
                "positions": positions, "condition": str(site), "condition_positions": condition_positions,
                "directions": directions, "max_facts": max_facts}  # fmt: skip
    side = "above" if rule.above else "below"
    notes = [f"condition at {site}: cosine {side} {rule.threshold:.4g}, F1 {rule.f1:.3f} ({always:.3f} if always "
             f"open); opens on {rule.opened:.1%} of the forget prompts and {rule.false_open:.1%} of the others"]
    return Edit.build("cast", settings, model, data.digest, operations, sites=chosen, notes=notes)


@dataclass(frozen=True)
class Rule:
    """A comparison with a threshold, its F1, and the shares of forget and other texts for which it holds."""

    threshold: float
    above: bool
    f1: float
    opened: float
    false_open: float


def best_gate(forget: Tensor, others: Tensor) -> Rule:
    """The rule with the best F1 of all thresholds and both comparisons on extremes [n, 2] of :func:`extremes`."""
    return max((_best(side * forget[:, column], side * others[:, column], side)
                for column, side in ((0, 1.0), (1, -1.0))), key=lambda rule: rule.f1)  # fmt: skip


def _best(forget: Tensor, others: Tensor, side: float) -> Rule:
    scores, order = torch.cat([forget, others]).sort(descending=True, stable=True)
    hits = (order < len(forget)).double().cumsum(0)
    f1 = 2 * hits / (len(forget) + torch.arange(1, len(scores) + 1))
    apart = scores[:-1] - scores[1:] > MARGIN
    if not bool(apart.any()):
        return Rule(side * float(scores[0]), side > 0, 0.0, 0.0, 0.0)
    at = int(torch.where(apart, f1[:-1], -1.0).argmax())
    opened, total = float(hits[at]), at + 1
    return Rule(side * float(scores[at] + scores[at + 1]) / 2, side > 0, float(f1[at]), opened / len(forget),
                (total - opened) / max(1, len(others)))  # fmt: skip


def extremes(
    model: LoadedModel, axes: Mapping[Site, Tensor], sequences: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> dict[Site, Tensor]:  # fmt: skip
    """Highest and lowest cosine with each site's axis over the tokens of a text without its first, [n, 2] float64."""
    out = {site: torch.zeros(len(sequences), 2, dtype=torch.float64) for site in axes}
    batches = list(token_batches(sequences, pad_id=pad_id(model.tokenizer)))

    def consume(values: dict[Site, Tensor], index: int) -> None:
        rows, batch = batches[index]
        counted = batch.counted.cpu()
        for site, x in values.items():
            wide = x.double()
            cosine = torch.cosine_similarity(wide, axes[site].to(wide), dim=-1).cpu()
            out[site][rows, 0] = cosine.masked_fill(~counted, -torch.inf).amax(1)
            out[site][rows, 1] = cosine.masked_fill(~counted, torch.inf).amin(1)

    shown = track(progress, (batch for _, batch in batches), "reading conditions", len(batches))
    stream(model, list(axes), shown, "all", consume)
    return out


def _candidates(model: LoadedModel, condition: str, chosen: Sequence[Site]) -> tuple[Site, ...]:
    places = site_map(model.module)
    first = min(chosen, key=places.rank)
    found = places.expand("resid_pre" if condition == "auto" else condition)
    before = tuple(site for site in found if places.rank(site) < places.rank(first))
    if not before or (condition != "auto" and len(before) < len(found)):
        raise UsageError(f"The condition '{condition}' does not lie before {first}, where the first vector is added: "
                         "name an earlier site, or add it at later ones.")  # fmt: skip
    return before
