"""What a benchmark hands back: metrics whose per-item values are the product, aggregates with limits second."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from repforget.records import ItemScores

Better = Literal["higher", "lower", "reference"]  # reference: best where the model that never knew is
Part = Callable[[str, Callable[[], Any]], Any]  # part(name, build): what build() returned, now or in an earlier run
LEVEL = 0.025  # outside each limit: low and high bound 95 %


@dataclass(frozen=True)
class Metric:
    """One number with 95 % limits from resampled clusters, and the items behind it where it is made of items.

    ``value`` is NaN where it could not be computed, and ``note`` then says why. ``token_based`` marks what depends on
    how the tokenizer cuts the text: models with different tokenizers are not compared by it.
    """

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    n_items: int = 0
    n_clusters: int = 0
    better: Better = "higher"
    items: ItemScores | None = None
    note: str = ""
    token_based: bool = False

    def to_json(self) -> dict[str, Any]:
        """Everything but the items."""
        return {name: value for name, value in vars(self).items() if name != "items"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], items: ItemScores | None = None) -> Metric:
        numbers = {name: math.nan if data[name] is None else data[name] for name in ("value", "low", "high")}
        return cls(**{**data, **numbers}, items=items)


def mean_metric(
    name: str, items: ItemScores, *, better: Better = "higher", note: str = "", token_based: bool = False, seed: int = 0
) -> Metric:
    """The mean over the valid items with limits from resampled clusters; how many were not valid goes in the note."""
    from repforget.verify.statistics import mean_interval, zero_event_limit

    lost = int((~items.valid).sum())
    if lost == len(items.ids):
        return not_computed(name, f"none of its {lost} items could be scored", better=better)
    clusters = [cluster for cluster, ok in zip(items.clusters, items.valid, strict=True) if ok]
    found = mean_interval(items.values[items.valid], clusters, alpha=LEVEL, seed=seed)
    low, high = found.low, found.high
    if low == high and low in (0.0, 1.0):  # no event among the clusters is not no spread
        reach = zero_event_limit(found.n_clusters, LEVEL)
        low, high = (0.0, reach) if low == 0.0 else (1.0 - reach, 1.0)
    said = f"{lost} of {len(items.ids)} items could not be scored and are left out" if lost else ""
    return Metric(name, found.point, low, high, found.n_items, found.n_clusters, better, items,
                  "; ".join(filter(None, (note, said))), token_based)  # fmt: skip


def not_computed(name: str, why: str, *, better: Better = "higher") -> Metric:
    """A metric that has no value, and the sentence that says so."""
    return Metric(name, math.nan, better=better, note=f"not computed, because {why}")


@dataclass(frozen=True)
class BenchResult:
    """All metrics of one benchmark on one model, by name; counts of what was scored; notes for people."""

    benchmark: str
    metrics: Mapping[str, Metric]
    counts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, benchmark: str, metrics: Sequence[Metric], counts: Mapping[str, float], notes: tuple[str, ...] = ()
    ) -> BenchResult:
        return cls(benchmark, {metric.name: metric for metric in metrics}, counts, notes)

    def items_json(self) -> dict[str, Any]:
        """Per-item values, metric -> items."""
        return {name: m.items.to_json() for name, m in self.metrics.items() if m.items is not None}

    def to_json(self) -> dict[str, Any]:
        """Aggregates; the items are in :meth:`items_json`."""
        return {"benchmark": self.benchmark, "metrics": [m.to_json() for m in self.metrics.values()],
                "counts": dict(self.counts), "notes": list(self.notes)}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any], items: Mapping[str, Any] | None = None) -> BenchResult:
        scores = {name: ItemScores.from_json(entry) for name, entry in (items or {}).items()}
        metrics = [Metric.from_json(entry, scores.get(entry["name"])) for entry in data["metrics"]]
        return cls.of(data["benchmark"], metrics, data["counts"], tuple(data["notes"]))

    def with_notes(self, *notes: str) -> BenchResult:
        return replace(self, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Reference:
    """What a model that never knew the forget set reached on the same benchmark, data and settings."""

    name: str
    result: BenchResult
    fingerprint: str = ""
    tokenizer: str = ""  # digest; "" where unknown


@dataclass(frozen=True)
class Work:
    """What a run will cost: teacher-forced sequences and their tokens (estimated), generations, new tokens at most."""

    sequences: int
    tokens: int
    generations: int = 0
    new_tokens: int = 0
    notes: tuple[str, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.sequences + other.sequences, self.tokens + other.tokens, self.generations + other.generations,
                    self.new_tokens + other.new_tokens, (*self.notes, *other.notes))  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "notes": list(self.notes)}
