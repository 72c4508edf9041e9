"""Features of a sparse autoencoder that are active on the forget facts and not on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.causal import Prepared, answer_metric, prepare
from repforget.errors import UsageError
from repforget.features import (
    TRAIN,
    Activity,
    Source,
    SparseAutoencoder,
    encoded,
    frequency_difference,
    importance_ratio,
    measure,
    obtain,
    rare_elsewhere,
    told,
)
from repforget.knowledge import EditData, Fact, Knowledge
from repforget.locate._exact import UNCHECKED, Array, band_of, in_second_half, ranked
from repforget.locate._pairs import Pairs, choose_facts, matched_facts, plain_runs
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site

Rule = Literal["ratio", "difference", "rare"]
LAYERS = 4  # at which autoencoders are trained where no site was named


@dataclass(frozen=True)
class _Half:
    """The facts that rank, or those that judge: forget facts and matched retain facts."""

    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...]


def _frequency(seen: Activity, feature: int) -> str:
    return f"active on 2^{round(math.log2(float(seen.frequency[feature])))} of the forget tokens"


WORDS = "nats that removing the top {k}, ranked on one half of the facts, takes from the answers of the other"


def sae_features(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, sae: str = TRAIN, sites: Literal["auto"] | list[str] = "auto",
    check: bool = True, size: int = 0, active: int = 8, sae_steps: int | Literal["auto"] = "auto",
    rule: Rule = "ratio", percentile: float = 80.0, relative: float = 3.0, most: float = 0.01,
    max_facts: int = 2000, items: int = 64, contrast: float = 1.0, top: int | Literal["auto"] = 20, draws: int = 100,
) -> Localization:  # fmt: skip
    """Rank features of sparse autoencoders by how much more they are active on forget facts than on matched ones.

    Over all tokens but first ones, f the mean value of a feature: "ratio" scores f_forget² where (f_forget /
    f_retain)² is at least the ``percentile`` of all features (Muhamed et al. 2025, arXiv 2504.08192); "difference" the
    difference of frequencies where f_forget >= ``relative`` f_retain (Ashuach et al. 2025, arXiv 2508.13650); "rare"
    the frequency on forget facts of features active on less than a share ``most`` of the retain tokens (Farrell et al.
    2024, arXiv 2410.19278).  Others score 0; "ratio" counts values in units of all the site's features, so that sites
    compare.  ``sae`` is the folder or file of an autoencoder, checked against its site unless ``check`` is off, or
    "train": small ones with ``size`` features (0: four times the width), ``active`` of them per token, are trained in
    ``sae_steps`` steps on the editor's statements, at ``sites`` ("auto": mlp_out of up to four layers); they know
    nothing of other text.  At most ``max_facts`` forget facts rank, beside as many of the same relations.

    The band is exact: what the ``top`` features, ranked on one half of the facts, take from the answers of the other
    half (about the same subjects) when their part is removed at the site, less ``contrast`` times what that takes from
    matched retain answers; at most ``items`` of each, against ``draws`` random selections of like frequency there.

    Cost: training (some hundred forwards), two forwards per fact, one per item and selection.
    What it does not show: where the knowledge is (features may detect the subject alone; of four planted layers none is
    found, chance one), or that nothing of it is in what the autoencoder leaves unexplained.
    """
    if items < 1 or max_facts < 2:
        raise UsageError(f"sae_features was given items={items} and max_facts={max_facts}: give 1 and 2 or more.")
    data = knowledge.for_editor()
    source = Source(sae, _sites(model, sae, sites), check, size, active, sae_steps, seed)
    saes, notes, trained = obtain(model, data, source, progress)
    first, second = _halves(data, max_facts, seed)
    seen = {half: _activity(model, saes, half, progress) for half in (first, second)}
    both = {site: tuple(a.joined(b) for a, b in zip(seen[first][site], seen[second][site], strict=True))
            for site in saes}  # fmt: skip
    pool = [Component(site, feature=i) for site in saes for i in both[site][0].frequency.nonzero()[:, 0].tolist()]

    def scores(found: Mapping[Site, tuple[Activity, ...]]) -> Array:
        by_site = {site: _scores(saes[site], found[site], rule, percentile, relative, most) for site in saes}
        return np.array([float(by_site[c.site][c.feature or 0]) for c in pool])

    def alike(component: Component) -> str:
        return _frequency(both[component.site][0], component.feature or 0)

    pairs, effect = _effect(model, saes, second, items, contrast, seed, progress)
    told_of = [note for found in pairs for note in found.notes] + ([UNCHECKED] if second.forget == first.forget else [])
    (order, values), (held, _) = ranked(pool, scores(both)), ranked(pool, scores(seen[first]))
    band, said = band_of(pool, held, top, draws, seed, WORDS, effect, alike)
    settings: dict[str, Any] = {
        "sae": sae, "sites": [str(site) for site in saes], "check": check, "size": size, "active": active,
        "sae_steps": sae_steps, "rule": rule, "percentile": percentile, "relative": relative, "most": most,
        "max_facts": max_facts, "items": items, "contrast": contrast, "top": top, "draws": draws, "seed": seed,
        "autoencoders": {str(site): one.digest for site, one in saes.items()},
    }  # fmt: skip
    asked = sum(len(found.runs) for found in pairs) * (band.draws + 2)
    cost = {"forwards": float(trained + sum(map(_size, (first, second))) * len(saes) + asked), "backwards": 0.0,
            "facts": float(len(pairs[0].runs))}  # fmt: skip
    tables, told = {"selected features and best score by layer": _table(order, values)}, (*notes, *told_of, *said)
    return Localization("sae_features", order, values, band, cost, settings, tables, told)


def _effect(
    model: LoadedModel, saes: Mapping[Site, SparseAutoencoder], half: _Half, items: int, contrast: float, seed: int,
    progress: Progress | None,
) -> tuple[list[Pairs], Callable[[Sequence[Sequence[Component]]], Array]]:  # fmt: skip
    """The forget and retain runs that judge, and what removing each selection of features takes from them."""
    pairs = [plain_runs(model.tokenizer, facts, "all") for facts in _asked(half, items, seed)]
    batches = [list(prepare(model, found.runs)) for found in pairs]

    def effect(selections: Sequence[Sequence[Component]]) -> Array:
        base = [_answers(model, part, {}) for part in batches]
        return np.array([_taken(model, batches, base, saes, chosen, contrast)
                         for chosen in track(progress, selections, "removing features", len(selections))])  # fmt: skip

    return pairs, effect


def _sites(model: LoadedModel, sae: str, sites: Literal["auto"] | list[str]) -> tuple[Site, ...]:
    places = site_map(model.module)
    if sites != "auto":
        return tuple(dict.fromkeys(site for text in sites for site in places.expand(text)))
    if sae != TRAIN:
        return ()
    found = places.expand("mlp_out")
    return tuple(found[round(k)] for k in np.linspace(0, len(found) - 1, min(LAYERS, len(found))))


def _halves(data: EditData, max_facts: int, seed: int) -> tuple[_Half, _Half]:
    """Forget facts with matched retain facts, the items of each subject split in two: features tell subjects, so that
    the other half are other facts about the same ones."""

    def split(facts: Sequence[Fact]) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
        items = [fact.id.rpartition("#")[0] for fact in facts]
        late = in_second_half(items, seed)
        return _where(facts, ~late), _where(facts, late)

    own = split(subset(data.forget, max_facts, seed))
    kept = split(data.retain)
    return _half(own[0], kept[0] or kept[1], seed), _half(own[1] or own[0], kept[1] or kept[0], seed)


def _where(facts: Sequence[Fact], chosen: NDArray[np.bool_]) -> tuple[Fact, ...]:
    return tuple(fact for fact, wanted in zip(facts, chosen, strict=True) if wanted)


def _half(forget: tuple[Fact, ...], retain: tuple[Fact, ...], seed: int) -> _Half:
    return _Half(forget, matched_facts(forget, retain, seed))


def subset(facts: Sequence[Fact], most: int, seed: int) -> Sequence[Fact]:
    """At most ``most`` facts drawn by seed."""
    if len(facts) <= most:
        return facts
    draw = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed))
    return [facts[i] for i in draw[:most].tolist()]


def _asked(half: _Half, items: int, seed: int) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    forget = choose_facts(half.forget, items, seed)
    return forget, matched_facts(forget, half.retain, seed)


def _size(half: _Half) -> int:
    return len(half.forget) + len(half.retain)


def _activity(
    model: LoadedModel, saes: Mapping[Site, SparseAutoencoder], half: _Half, progress: Progress | None
) -> dict[Site, tuple[Activity, Activity]]:
    texts = told(model, half.forget), told(model, half.retain)
    return {site: (measure(model, one, texts[0], progress), measure(model, one, texts[1], progress))
            for site, one in saes.items()}  # fmt: skip


def _scores(
    sae: SparseAutoencoder, seen: tuple[Activity, ...], rule: Rule, percentile: float, relative: float, most: float
) -> Tensor:
    forget, retain = seen
    if rule == "rare":
        return rare_elsewhere(forget, retain, most)
    if rule == "difference":
        return frequency_difference(forget, retain, relative)
    lengths = sae.decoder.double().square().sum(1)
    whole = float((forget.mean.square() * lengths).sum())
    return importance_ratio(forget, retain, percentile) * lengths / max(whole, 1e-300)


def _answers(
    model: LoadedModel, batches: Sequence[Prepared], removed: Mapping[Site, tuple[Tensor, ...]]
) -> float:
    """Mean log-probability of the answers (nats) with features removed at all tokens but first ones."""
    total, n = 0.0, 0
    for item in batches:
        counted = item.base.counted.unsqueeze(-1)

        def remover(rows: tuple[Tensor, ...], scaling: Any, where: Tensor = counted) -> Any:
            def run(x: Tensor) -> Tensor:
                encoder, bias, threshold, decoder = (t.to(x.device) for t in rows)
                f, unit = encoded(x.float(), encoder, bias, threshold, scaling)
                return (x.float() - torch.where(where.to(x.device), f @ decoder * unit, 0.0)).to(x.dtype)

            return run

        edits = {site: remover(tuple(rows[:4]), rows[4]) for site, rows in removed.items()}
        with torch.no_grad(), hooks(model, edits):
            found = answer_metric(model, item.base, item, "logprob")
        total, n = total + float(found.sum()), n + len(found)
    return total / max(1, n)


def _taken(
    model: LoadedModel, batches: Sequence[Sequence[Prepared]], base: Sequence[float],
    saes: Mapping[Site, SparseAutoencoder], chosen: Sequence[Component], contrast: float,
) -> float:  # fmt: skip
    """What removing features takes from the forget answers, less ``contrast`` times what it takes from retain ones."""
    removed: dict[Site, Any] = {}
    for site in {c.site for c in chosen}:
        index = torch.tensor([c.feature for c in chosen if c.site == site])
        removed[site] = (*(t[index] for t in (*saes[site].rows(), saes[site].decoder)), saes[site].scaling)
    forget = base[0] - _answers(model, batches[0], removed)
    return forget - contrast * (base[1] - _answers(model, batches[1], removed)) if contrast else forget


def _table(order: Sequence[Component], values: Sequence[float]) -> list[list[float]]:
    """Rows by layer: number of features with a score, and the best score."""
    layers = sorted({c.site.layer for c in order})
    of = {k: [v for c, v in zip(order, values, strict=True) if c.site.layer == k and v > 0] for k in layers}
    return [[float(len(of[k])), max(of[k], default=0.0)] for k in layers]
