"""Take directions out of everything that is written to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit._collect import Points, Positions, collect, leftover, read_points, subsample, text_sequences
from repforget.edit._contrast import Contrast, contrasts
from repforget.edit.steer._selection import LATEST, Judge, Scores, best, held_out
from repforget.edit.steer._writers import ablate_writers, orthonormal
from repforget.errors import NoEffectError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization, Site


def direction_ablation(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, site: str = "auto", positions: Positions = "last",
    directions: Literal["mean", "principal"] = "mean", rank: int = 1, select: Literal["spread", "rules"] = "spread",
    max_facts: int = 1024,
) -> Edit:  # fmt: skip
    """Orthogonalise every writer of the residual stream against the forget-minus-retain direction of one site.

    Arditi et al. 2024 (arXiv 2406.11717, section 2.4): ``W ← (I - r rᵀ) W`` for embeddings, attention and MLP
    outputs, with biases. Exact on all covered architectures: tied embeddings are untied, and writers behind a norm
    with gain γ are projected against γ⊙r. The share of r left in the residual stream is measured and noted. It
    shows that nothing is *written* along r, not that the knowledge is gone: concepts with more than one
    direction survive, and everyone's activations change.

    Args:
        site: where the direction is read; "auto" is resid_post of the best layer of ``where``, or of the layer
            in the first 80 % of the depth that ``select`` prefers.
        positions: points that are compared: last prompt token, last subject token, or both (together; one against
            the other with ``select="rules"``).
        directions: "mean" difference, or the leading "principal" directions of the uncentred differences.
        rank: number of directions; more than one needs "principal".
        select: of several sites, "spread" prefers the one where forget and retain points lie furthest apart in units
            of their spread; "rules" the one whose ablation makes the answers of held-out forget facts least likely, of
            those that change retained predictions by a KL of at most 0.1 and that make retained answers less likely
            when added at their site (Arditi et al., with the answer's first token in the place of a refusal's).
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where the means agree, or no direction passes the rules. Cost: two to three passes over the
    facts, with "rules" three over 32 facts per site and position; no training.
    """
    if rank < 1 or (rank > 1 and directions == "mean"):
        raise UsageError(f"A difference of means is one direction and rank={rank} was asked for: give rank=1, or "
                         "directions='principal'.")  # fmt: skip
    forget, retain = subsample(data.forget, max_facts, seed), subsample(data.retain, max_facts, seed)
    candidates = _candidates(model, site, where)
    if select == "rules":
        chosen, found, notes = _judged(model, candidates, forget, retain, positions, rank, directions, seed, progress)
    else:
        found = contrasts(model, candidates, forget, retain, positions=positions, rank=rank,
                          principal=directions == "principal", required=site != "auto", progress=progress)  # fmt: skip
        chosen = next(iter(found)) if len(found) == 1 else _furthest(model, found, forget, retain, positions)
        notes = []
    basis = orthonormal(found[chosen].directions)
    settings = {"site": str(chosen), "positions": positions, "directions": directions, "rank": rank,
                "select": select, "max_facts": max_facts}  # fmt: skip
    edit = Edit.build("direction_ablation", settings, model, data.digest, ablate_writers(model, basis))
    places = site_map(model.module)
    stream = [s for kind in ("resid_pre", "resid_post") for s in places.expand(kind)]
    texts = text_sequences(model, data, retain)[:32]
    before = leftover(model, stream, basis, texts)
    with edit.attach(model):
        after = leftover(model, stream, basis, texts)
    note = (f"direction of {chosen}: largest share of the residual stream along it {before:.3g} before, {after:.3g} "
            "left after")  # fmt: skip
    return Edit.build("direction_ablation", settings, model, data.digest, edit.operations,
                      notes=(note, *notes))  # fmt: skip


def _candidates(model: LoadedModel, site: str, where: Localization | None) -> tuple[Site, ...]:
    places = site_map(model.module)
    if site != "auto":
        found = places.expand(site)
        if any(places.size(s) != places.width for s in found):
            raise UsageError(f"Site '{site}' is not as wide as the residual stream, so that it holds no direction of "
                             "it: name a residual site such as 'resid_post.3'.")  # fmt: skip
        return found
    if where is not None and where.layers():
        return (Site("resid_post", where.layers()[0]),)
    return tuple(Site("resid_post", i) for i in range(max(1, int(LATEST * places.n_layers))))


def _judged(
    model: LoadedModel, candidates: Sequence[Site], forget: Sequence[Fact], retain: Sequence[Fact],
    positions: Positions, rank: int, directions: str, seed: int, progress: Progress | None,
) -> tuple[Site, Mapping[Site, Contrast], list[str]]:  # fmt: skip
    """The site that the rules choose of all sites and positions, its contrasts, and what was seen."""
    if not forget or not retain:
        raise NoEffectError("The rules judge a direction by facts of both sets, and one is empty: give facts of both.")
    (ours, judged), (others, spared) = held_out(forget, seed), held_out(retain, seed)
    kinds: tuple[Positions, ...] = ("last", "subject") if positions == "both" else (positions,)
    found: dict[str, dict[Site, Contrast]] = {}
    for kind in kinds:
        try:
            found[kind] = contrasts(model, candidates, ours, others, positions=kind, rank=rank,
                                    principal=directions == "principal", required=False, progress=progress)  # fmt: skip
        except NoEffectError:
            if kind == kinds[-1] and not found:
                raise
    judge = Judge.of(model, judged, spared)
    pairs = [(site, kind) for kind, sites in found.items() for site in sites]
    scores: dict[tuple[Site, str], Scores] = {}
    for site, token in track(progress, pairs, "judging directions"):
        contrast = found[token][site]
        scores[site, token] = judge.scores(orthonormal(contrast.directions), contrast.difference, site)
    chosen, token = best(scores, model.n_layers)
    won = scores[chosen, token]
    note = (f"rules: {chosen} at the {token} token, of {len(pairs)} directions: log-odds of forget answers "
            f"{won.bypass:.3g} when ablated, retained answers {won.induce:.3g} less when added, KL {won.kl:.3g} on "
            "retained prompts")  # fmt: skip
    return chosen, found[token], [note]


def _furthest(
    model: LoadedModel, found: dict[Site, Contrast], forget: Sequence[Fact], retain: Sequence[Fact],
    positions: Positions,
) -> Site:  # fmt: skip
    """The site at which forget and retain points lie furthest apart along the direction, in pooled deviations."""
    spread = dict.fromkeys(found, 0.0)
    for facts in (forget, retain):
        points: Points = read_points(model, facts, positions)
        scores: dict[Site, list[Tensor]] = {site: [] for site in found}

        def note(values: dict[Site, Tensor], _: list[int]) -> None:
            for site, x in values.items():
                scores[site].append((x.double() @ found[site].directions[0].to(x.device)).cpu())  # noqa: B023

        collect(model, points, list(found), note)
        for site, parts in scores.items():
            spread[site] += float(torch.cat(parts).var(correction=0)) / 2
    reach = {s: float(c.difference @ c.directions[0].to(c.difference)) ** 2 for s, c in found.items()}
    return max(found, key=lambda s: reach[s] / max(spread[s], 1e-300))
