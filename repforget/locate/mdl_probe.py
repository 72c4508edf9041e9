"""Description length by layer: how easily can the answers be learnt from each site?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Control, exact_band, ranked
from repforget.locate._labelled import Rows, Token, early_subjects, features, relations
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import Layers, Node, expand_nodes, heat_maps, layer_writes, node_of
from repforget.models.load import LoadedModel
from repforget.probing import Codes, code_lengths
from repforget.progress import Progress, track
from repforget.records import Component, Localization

ITEMS_PER_RELATION: dict[str, Any] = {}  # under any settings


@dataclass(frozen=True)
class _Sent:
    """Bits saved by label, log2 K minus its cost [components, n], and which labels are forget facts'."""

    saved: Array
    forget: NDArray[np.bool_]
    compression: Array
    labels: int


def mdl_probe(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("resid_post", "attn_out", "mlp_out"),
    layers: Layers = "all", token: Token = "last", l2: float = 0.01, permutations: int = 3, statements: int = 1,
    items: int = 100, contrast: float = 0.0, top: int | Literal["auto"] = "auto", draws: int = 100,
    control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank sites by how few bits send the answers to someone who has the site's states and learns on the way.

    Per relation the answers (K of them) of forget and retain statements arrive in random order, in blocks that end at
    0.1, 0.2, 0.4, 0.8, 1.6, 3.125, 6.25, 12.5, 25, 50 and 100 %: the first costs log2 K each, a later one -log2 p of a
    logistic classifier taught by all before it (online code), averaged over ``permutations`` orders. Score: bits saved
    per forget fact against log2 K, less ``contrast`` times that per retain fact; short where little data teaches the
    classifier enough, which accuracy does not show. Tables add the compression n log2 K / L of all labels. The band
    patches sites exactly (for resid_post what its layer writes, for a whole state carries everything), on subjects that
    taught no classifier of the ranking that it judges.

    Cost: one forward pass per statement, one classifier per site, relation, block and order, twice, and the band.
    What it does not show: that the model uses what can be read there, or where it is computed: later states mostly
    save more. On four models with a planted layer the last MLP comes first on each, so that one is found (chance is
    one); with a contrast none is.
    Source: Voita & Titov 2020, arXiv 2003.12298.
    """
    if {"heads", "neurons"} & set(nodes):
        raise UsageError("mdl_probe probes whole sites: use nodes such as resid_post or attn_z, or "
                         "attribution_patching for heads and neurons.")  # fmt: skip
    components = expand_nodes(model, nodes, layers)
    probed, notes = relations(knowledge.for_editor(), statements, items, seed)
    tasks, told = corrupted_tasks(model, knowledge, seed, items=min(items, 64), mode="both")
    early = early_subjects(tasks, probed, seed)
    sent: list[_Sent] = []
    ranking: list[_Sent] = []  # taught by none of the subjects on whom the band is measured
    for rows in track(progress, probed, "coding relations"):
        values = features(model, components, rows.facts, token)
        sent.append(_send(values, rows, l2, permutations, seed))
        part = rows.ranking(early)
        if part is not None:
            ranking.append(_send({c: x[part[1]] for c, x in values.items()}, part[0], l2, permutations, seed))
    scores = _scores(sent, contrast)
    half_order, _ = ranked(components, _scores(ranking, contrast))
    plan = BandPlan(top, draws, control, seed)
    band, band_notes, spent = exact_band(tasks, components, half_order, plan, progress, written=layer_writes,
                                         alike=node_of)  # fmt: skip
    order, best = ranked(components, scores)
    settings: dict[str, Any] = {
        "nodes": list(nodes), "layers": layers, "token": token, "l2": l2, "permutations": permutations,
        "statements": statements, "items": items, "contrast": contrast, "top": top, "draws": draws,
        "control": control, "seed": seed,
    }  # fmt: skip
    run = float(sum(s.labels for s in sent))
    cost = {"forwards": run + spent, "backwards": 0.0, "facts": float(sum(s.forget.sum() for s in sent))}
    weights = [s.labels for s in sent]
    compression = np.average(np.stack([s.compression for s in sent]), axis=0, weights=weights)
    tables = {**heat_maps(components, scores, "bits saved per forget fact"),
              **heat_maps(components, compression, "compression")}  # fmt: skip
    return Localization("mdl_probe", order, best, band, cost, settings, tables, (*notes, *told, *band_notes))


def _scores(sent: Sequence[_Sent], contrast: float) -> Array:
    saved, forget = np.concatenate([s.saved for s in sent], axis=1), np.concatenate([s.forget for s in sent])
    mean = saved[:, forget].mean(axis=1)
    return np.asarray(mean - contrast * saved[:, ~forget].mean(axis=1) if contrast and (~forget).any() else mean)


def _send(
    values: Mapping[Component, NDArray[np.float32]], rows: Rows, l2: float, permutations: int, seed: int
) -> _Sent:
    """Code lengths of one relation's answers at every component; those of one width are fitted together."""
    components = list(values)
    saved = np.zeros((len(components), len(rows.facts)))
    compression = np.zeros(len(components))
    for width in sorted({values[c].shape[1] for c in components}):
        places = [k for k, c in enumerate(components) if values[c].shape[1] == width]
        codes: Codes = code_lengths(np.stack([values[components[k]] for k in places]), rows.labels, rows.clusters,
                                    l2=l2, permutations=permutations, seed=seed)  # fmt: skip
        saved[places], compression[places] = np.log2(codes.n_classes) - codes.bits, codes.compression
    return _Sent(saved, rows.forget, compression, len(rows.facts))
