"""Several localizations of one model side by side: how far their rankings agree, and whether they name the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from repforget.locate._exact import pearson
from repforget.locate._units import node_of
from repforget.records import Component, Localization

PARTS = ("attention", "MLP", "layer")
Unit = tuple[int, str]  # layer and part of it


@dataclass(frozen=True)
class Agreement:
    """How far two methods agree on the ``count`` units that both rank: Spearman correlation of their scores (NaN for
    fewer than three or constant ones), and the overlap (Jaccard) of the best ``k`` of each."""

    one: str
    other: str
    units: str
    count: int
    spearman: float
    k: int
    overlap: float


@dataclass(frozen=True)
class Found:
    """Where a method ranks a true component among the ``count`` units of its kind; it is found if no more than the
    number of true ones come before or with it; rank and count 0 where the method does not look there."""

    truth: str
    unit: str
    rank: int
    count: int
    hit: bool


@dataclass(frozen=True)
class Comparison:
    """Localizations by method, the CPU seconds of each, what each says of the truth, and methods that failed."""

    localizations: Mapping[str, Localization]
    seconds: Mapping[str, float] = field(default_factory=dict)
    truth: tuple[Component, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()  # interrupted before them

    @property
    def agreements(self) -> tuple[Agreement, ...]:
        return tuple(agreement(a, b) for a, b in combinations(self.localizations.values(), 2))

    def found(self, method: str) -> tuple[Found, ...]:
        return find(self.localizations[method], self.truth)

    def accuracy(self, method: str) -> float | None:
        """Share of the true components that the method finds; None where no truth was named."""
        found = self.found(method)
        return sum(f.hit for f in found) / len(found) if found else None

    def to_json(self) -> dict[str, Any]:
        return {
            "methods": {
                name: {"localization": where.to_json(), "cpu_seconds": self.seconds.get(name),
                       "truth": [vars(f) for f in self.found(name)], "planted_accuracy": self.accuracy(name)}
                for name, where in self.localizations.items()
            },
            "agreement": [{**vars(a), "spearman": None if np.isnan(a.spearman) else a.spearman}
                          for a in self.agreements],
            "truth": [str(c) for c in self.truth], "failed": dict(self.failed), "not_run": list(self.missing),
        }  # fmt: skip


def part_of(component: Component) -> str | None:
    """The part of a layer a component belongs to: attention, MLP, or the whole layer for states of the stream."""
    kind = component.site.kind
    if component.site.layer < 0:
        return None
    if kind in ("q", "k", "v") or kind.startswith("attn"):
        return "attention"
    return "MLP" if kind.startswith("mlp") else "layer"


def unit_scores(where: Localization) -> dict[Unit, float]:
    """Best score among the components of every part of every layer: heads, queries and whole writes alike."""
    found: dict[Unit, float] = {}
    for component, score in zip(where.components, where.scores, strict=True):
        part = part_of(component)
        if part is not None:
            unit = component.site.layer, part
            found[unit] = max(score, found.get(unit, score))
    return found


def layer_scores(where: Localization) -> dict[Unit, float]:
    """Best score in every layer."""
    found: dict[Unit, float] = {}
    for (layer, _), score in unit_scores(where).items():
        found[layer, "layer"] = max(score, found.get((layer, "layer"), score))
    return found


def common(one: Localization, other: Localization) -> tuple[str, list[float], list[float]]:
    """What both rank, in words, and the two scores of each.

    The same components where they cover every part of a layer that both look at; otherwise the parts that both look
    at; layers where there are none.
    """
    exact = [dict(zip(map(str, w.components), w.scores, strict=True)) for w in (one, other)]
    shared = [c for c in one.components if str(c) in exact[1] and part_of(c)]
    parts = [{part_of(c) for c in w.components} - {None} for w in (one, other)]
    if len(shared) > 2 and {part_of(c) for c in shared} == parts[0] & parts[1]:
        kinds = ", ".join(dict.fromkeys(_kind(c) for c in sorted(shared)))
        return kinds, *([scores[str(c)] for c in shared] for scores in exact)  # type: ignore[return-value]
    both = parts[0] & parts[1]
    a, b = (unit_scores(w) if both else layer_scores(w) for w in (one, other))
    units = sorted(set(a) & set(b))
    words = f"layers x {{{', '.join(p for p in PARTS if p in both)}}}" if both else "layers"
    return words, [a[u] for u in units], [b[u] for u in units]


def agreement(one: Localization, other: Localization) -> Agreement:
    """Compare two rankings on what both rank; the best quarter (at least one) is the top."""
    words, a, b = common(one, other)
    k = max(1, round(len(a) / 4))
    tops = [set(np.argsort(-np.asarray(scores), kind="stable")[:k].tolist()) for scores in (a, b)]
    overlap = len(tops[0] & tops[1]) / len(tops[0] | tops[1]) if a else float("nan")
    rho = spearman(a, b) if len(a) > 2 else float("nan")
    return Agreement(one.method, other.method, words, len(a), rho, k, overlap)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson correlation of the ranks, ties sharing their mean rank; NaN where one side is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranked: list[float] = (np.cumsum(counts) - counts / 2)[place].tolist()
        return ranked

    return pearson(ranks(a), ranks(b))


def find(where: Localization, truth: Sequence[Component]) -> tuple[Found, ...]:
    """Rank of every true component among the units of its kind that the method ranks: the components themselves,
    else the parts of layers, else the layers."""
    tables = [_table(where, component) for component in truth]
    found: list[Found] = []
    for component, (key, unit, scores) in zip(truth, tables, strict=True):
        if key not in scores:
            found.append(Found(str(component), "not ranked", 0, 0, False))
            continue
        true = sum(other == unit for _, other, _ in tables)
        rank = sum(score >= scores[key] for score in scores.values())  # a tie is not found
        found.append(Found(str(component), unit, rank, len(scores), rank <= true))
    return tuple(found)


def _kind(component: Component) -> str:
    kind, node = component.site.kind, node_of(component)
    return f"{kind} heads" if node == "heads" and kind != "attn_z" else node


def _table(where: Localization, component: Component) -> tuple[Any, str, dict[Any, float]]:
    if component in where.components:
        own = {c: s for c, s in zip(where.components, where.scores, strict=True) if _kind(c) == _kind(component)}
        return component, _kind(component), own
    part, layer = part_of(component), component.site.layer
    units = {unit: score for unit, score in unit_scores(where).items() if unit[1] == part}
    if units:
        return (layer, part), str(part), units
    return (layer, "layer"), "layer", layer_scores(where)
