"""A probing classifier at every layer: where can the answers be read?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from repforget.causal import Patch
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import AFTER_SPLIT, Array, band_of, in_second_half, ranked
from repforget.locate._labelled import Rows, Token, early_of, features, relations
from repforget.locate._units import Layers, Node, expand_nodes, heat_maps
from repforget.models.load import LoadedModel
from repforget.probing import SweepResult, fit_sweep
from repforget.progress import Progress, track
from repforget.records import Component, Localization

Classifier = Literal["logistic", "mean_difference", "lda", "mlp"]
ITEMS_PER_RELATION: dict[str, Any] = {}  # under any settings


def probe_sweep(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("resid_post", "attn_out", "mlp_out"),
    layers: Layers = "all", token: Token = "last", classifier: Classifier = "logistic",
    l2: float | Literal["auto"] = 0.01, folds: int = 5, statements: int = 2, items: int = 200,
    top: int | Literal["auto"] = "auto", draws: int = 200,
) -> Localization:  # fmt: skip
    """Rank sites by how well a classifier reads the answers about forget subjects it has never seen.

    Per relation a classifier is fitted on the states at the last prompt token (or the last subject token) of forget
    and retain statements, and judged on forget statements of held-out subjects. Score: accuracy on these less the
    accuracy of the same classifier on labels shuffled between subjects. Tables add the accuracy itself, the floor and
    selectivity (accuracy less that on random labels per subject; needs two statements per item).
    Answers that occur with one subject only are left out; heads and neurons are not probed. The band compares the mean
    score of the top sites with random sites on one half of the forget subjects; classifiers that these have not taught
    rank for it, on the other half.

    Cost: one forward pass per statement, and two classifiers per site, relation, fold and control.
    What it does not show: that the model uses what can be read there, or where it is computed.
    Source: Alain & Bengio 2016, arXiv 1610.01644; Hewitt & Liang 2019, arXiv 1909.03368.
    """
    if {"heads", "neurons"} & set(nodes):
        raise UsageError("probe_sweep probes whole sites: use nodes such as resid_post or attn_z, or "
                         "attribution_patching for heads and neurons.")  # fmt: skip
    components = expand_nodes(model, nodes, layers)
    probed, notes = relations(knowledge.for_editor(), statements, items, seed)
    clusters = [c for rows in probed for c, f in zip(rows.clusters, rows.forget, strict=True) if f]
    judged = in_second_half(clusters, seed)
    if not judged.any():
        judged = ~judged
    early = early_of(probed, frozenset(compress(clusters, ~judged)) or frozenset(clusters))
    found: list[tuple[Rows, Array, list[SweepResult]]] = []
    ranking: list[Array] = []  # of classifiers that none of the judged subjects has taught
    for rows in track(progress, probed, "probing relations"):
        values = features(model, components, rows.facts, token)
        found.append((rows, *_sweep(components, values, rows, classifier, l2, folds, seed)))
        part = rows.ranking(early)
        if part is not None:
            own = {c: x[part[1]] for c, x in values.items()}
            ranking.append(_sweep(components, own, part[0], classifier, l2, folds, seed)[0])
    lifts = np.concatenate([lift for _, lift, _ in found], axis=1)
    place = {c: k for k, c in enumerate(components)}

    def effect(patches: Sequence[Patch]) -> Array:
        return np.array([lifts[[place[c] for c in patch]][:, judged].mean() for patch in patches])

    half_order, _ = ranked(components, np.concatenate(ranking, axis=1).mean(axis=1))
    words = "mean held-out accuracy above the floor " + AFTER_SPLIT
    band, band_notes = band_of(components, half_order, top, draws, seed, words, effect)
    order, scores = ranked(components, lifts.mean(axis=1))
    settings: dict[str, Any] = {
        "nodes": list(nodes), "layers": layers, "token": token, "classifier": classifier, "l2": l2, "folds": folds,
        "statements": statements, "items": items, "top": top, "draws": draws, "seed": seed,
    }  # fmt: skip
    rows_run = float(sum(len(rows.facts) for rows, _, _ in found))
    cost = {"forwards": rows_run, "backwards": 0.0, "facts": float(len(clusters)),
            "fits": float(len(components) * (len(found) + len(ranking)) * folds * 4)}  # fmt: skip
    return Localization("probe_sweep", order, scores, band, cost, settings, _tables(components, found),
                        (*notes, *band_notes))  # fmt: skip


def _sweep(
    components: Sequence[Component], values: dict[Component, NDArray[np.float32]], rows: Rows,
    classifier: Classifier, l2: float | Literal["auto"], folds: int, seed: int,
) -> tuple[Array, list[SweepResult]]:  # fmt: skip
    """Correctness above the floor on forget rows [components, m], and the sweeps behind it (one per width)."""
    lift = np.zeros((len(components), int(rows.forget.sum())))
    sweeps: list[SweepResult] = []
    widths = sorted({values[c].shape[1] for c in components})
    for width in widths:
        places = [k for k, c in enumerate(components) if values[c].shape[1] == width]
        stacked = np.stack([values[components[k]] for k in places])
        result = fit_sweep(stacked, rows.labels, rows.clusters, kind=classifier, folds=folds, seed=seed, l2=l2)
        lift[places] = result.correct[:, rows.forget] - result.shuffled[:, None]
        sweeps.append(result)
    return lift, sweeps


def _tables(
    components: Sequence[Component], found: Sequence[tuple[Rows, Array, list[SweepResult]]]
) -> dict[str, Sequence[Sequence[float]]]:
    """Heat maps, averaged over relations: accuracy on forget facts, floor, selectivity."""
    lift = np.concatenate([part for _, part, _ in found], axis=1).mean(axis=1)
    tables = dict(heat_maps(components, lift, "accuracy above floor"))
    if all(len(sweeps) == 1 for *_, sweeps in found):
        weight = np.array([rows.forget.sum() for rows, *_ in found], dtype=float)
        for label, name in (("floor (shuffled labels)", "shuffled"), ("selectivity", "selectivity")):
            stack = np.stack([getattr(sweeps[0], name) for *_, sweeps in found])
            if not np.isfinite(stack).all():  # one statement per item teaches no control task
                continue
            tables.update(heat_maps(components, np.average(stack, axis=0, weights=weight), label))
        correct = np.concatenate([sweeps[0].correct[:, rows.forget] for rows, _, sweeps in found], axis=1)
        tables.update(heat_maps(components, correct.mean(axis=1), "accuracy on forget facts"))
    return tables
