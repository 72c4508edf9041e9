"""MUSE over several models: forget sets of growing size, and requests one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from repforget.bench import _muse as m
from repforget.bench._data import Source, rows
from repforget.bench._records import Metric, Part, mean_metric
from repforget.bench._saying import numbers, plain, whole_text
from repforget.errors import UsageError
from repforget.records import ItemScores
from repforget.scoring.tokens import token_scores

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

Asked = Callable[..., ItemScores]  # (model, "utility" or "knowmem_forget", prefix of the part)


def scalability(data: Source, model: LoadedModel, names: Sequence[str], asked: Asked, seed: int) -> list[Metric]:
    """Slope of utility and of what is left over the logarithm of the forget set's size (one model per fold)."""
    _enough(names, "scal_models")
    at = [math.log(len(rows(data, f"scal/forget_{n}", ("text",)))) for n in range(1, len(names) + 1)]
    found: dict[str, list[ItemScores]] = {"utility": [], "knowmem_forget": []}
    for name in names:
        other = _opened(name, model)
        for which, series in found.items():
            series.append(asked(other, which, f"scal-{other.fingerprint[:16]}-"))
    curve = {which: ", ".join(f"{items.mean:.3f}" for items in series) for which, series in found.items()}
    return [_slope(f"scal_{which}_slope", series, at, f"per unit of ln(texts); {curve[which]}", seed)
            for which, series in found.items()]  # fmt: skip


def sustainability(
    data: Source, model: LoadedModel, names: Sequence[str], asked: Asked, part: Part, texts: int, characters: int,
    seed: int,
) -> list[Metric]:  # fmt: skip
    """What comes back after later requests, and utility over the requests; F[i, j] goes into the notes.

    The forget score of a fold is the share of tokens that are the model's first choice in the beginnings of its
    texts (teacher forcing), so that one pass per text serves.
    """
    _enough(names, "sust_models")
    folds = [rows(data, f"sust/forget_{n}", ("text",))[: texts or None] for n in range(1, len(names) + 1)]
    scores: dict[tuple[int, int], m.Array] = {}
    utility: list[ItemScores] = []
    for j, name in enumerate(names):
        other = _opened(name, model)
        prefix = f"sust-{other.fingerprint[:16]}-"
        utility.append(asked(other, "utility", prefix))
        for i in range(j + 1):
            build = _memory(other, [str(row["text"])[:characters] for row in folds[i]])
            scores[i, j] = numbers(part(f"{prefix}fold-{i + 1}", build))
    run = m.Requests(scores, len(names))
    table, (request, rise) = run.matrix(), run.worst()
    shown = "; ".join(f"request {i + 1}: " + ", ".join(f"{x:.3f}" for x in table[i, i:]) for i in range(len(names)))
    ids = [f"request-{i + 1}-{k:04d}" for i in range(len(names) - 1) for k in range(len(folds[i]))]
    last = len(names) - 1
    drift = ItemScores.of(ids, ids, np.concatenate([run.drift(i) for i in range(last)]).tolist())
    curve = [items.mean for items in utility]
    return [
        mean_metric("sust_reemergence", drift, better="lower", seed=seed, token_based=True,
                    note=f"F[i, j] - F[i, i] over later requests; F: {shown}"),
        Metric("sust_worst_rise", rise, better="lower", n_items=len(folds[request]), token_based=True,
               note=f"of request {request + 1}"),
        Metric("sust_utility_area", m.area(curve), note=", ".join(f"{value:.3f}" for value in curve)),
        _slope("sust_utility_slope", utility, list(range(1, len(names) + 1)), "per request", seed),
    ]  # fmt: skip


def _memory(model: LoadedModel, texts: Sequence[str]) -> Callable[[], Any]:
    def build() -> list[float | None]:
        found = token_scores(model, [whole_text(model.tokenizer, text) for text in texts])
        return plain([float(hits.mean()) if len(hits) else math.nan for hits in found.hits])

    return build


def _slope(name: str, series: Sequence[ItemScores], at: Sequence[float], note: str, seed: int) -> Metric:
    values = np.stack([np.where(items.valid, items.values, np.nan) for items in series])
    slopes = ItemScores.of(series[0].ids, series[0].clusters, m.item_slopes(values, at).tolist())
    better: Any = "reference" if "forget" in name else "higher"
    told = f"{note}; limits are of the items, a second training of the models would add to them"
    return mean_metric(name, slopes, better=better, note=told, seed=seed)


def _opened(name: str, like: LoadedModel) -> LoadedModel:
    from repforget.models.load import load

    return load(name, device=str(like.device), dtype=str(like.dtype).removeprefix("torch."))


def _enough(names: Sequence[str], setting: str) -> None:
    if len(names) < 2:
        raise UsageError(f"{setting} names {len(names)} model: give one per fold in their order, at least two.")
