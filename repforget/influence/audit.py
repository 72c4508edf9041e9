"""Training records ranked by their influence on a set of answers, beside what random answers give."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.influence.ekfac import Curvature
from repforget.influence.score import scores_and_likeness
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.training import Example, Record

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Ranking:
    """Influence [n] of every record on the mean of the queries, in nats, its likeness to them, and the controls.

    ``alike`` [n] are mean cosines of gradients.  ``inside`` marks the records the question is about (a forget set; none
    for a plain search); ``limit`` is the likeness that the record outside which is most alike reaches for queries drawn
    at random with a share ``chance`` of such draws; ``outside`` is
    the share of the total positive influence that comes from records outside, ``band`` the central 95 % of that share
    for the ``draws`` random sets, of at least ``drawn`` records each beside ``asked`` queries.
    """

    records: tuple[Record, ...]
    values: NDArray[np.float64]
    alike: NDArray[np.float64]
    inside: NDArray[np.bool_]
    outside: float
    limit: float
    chance: float
    band: tuple[float, float]
    draws: int
    drawn: int
    asked: int

    @property
    def order(self) -> list[int]:
        """Indices of the records outside, those most alike first."""
        return [int(k) for k in np.argsort(-self.alike, kind="stable") if not self.inside[k]]

    @property
    def found(self) -> list[int]:
        """Indices of records outside that no draw explains: likeness above the limit."""
        return [k for k in self.order if self.alike[k] > self.limit]

    def clusters(self) -> dict[str, float]:
        """Sum of the influence of each cluster's records, highest first."""
        sums: dict[str, float] = {}
        for record, value in zip(self.records, self.values, strict=True):
            sums[record.cluster] = sums.get(record.cluster, 0.0) + float(value)
        return dict(sorted(sums.items(), key=lambda pair: (-pair[1], pair[0])))

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        rows = [{"id": self.records[k].id, "cluster": self.records[k].cluster, "score": float(self.values[k]),
                 "likeness": float(self.alike[k]), "above_limit": bool(self.alike[k] > self.limit)}
                for k in self.order[:top]]  # fmt: skip
        return {"records": rows, "found": len(self.found), "limit": self.limit, "chance": self.chance,
                "outside": self.outside, "band": list(self.band), "draws": self.draws, "drawn": self.drawn,
                "asked": self.asked, "inside": int(self.inside.sum()), "of": len(self.records)}  # fmt: skip


def rank(
    model: LoadedModel, records: Sequence[Record], train: Sequence[Example], queries: Sequence[Example],
    names: Sequence[str], curvature: Curvature | None, *, inside: Collection[str] = (), clusters: Sequence[str] = (),
    damping: float = 0.1, draws: int = 20, seed: int = 0, progress: Progress | None = None,
) -> Ranking:  # fmt: skip
    """Rank ``records`` (tokens ``train``) by their mean influence on ``queries``; ``inside`` are ids of a forget set.

    The control asks the same of ``draws`` random sets of training records outside the forget set, as many from as many
    clusters as the queries are about (``clusters``, one each; without them one), as far as half of the clusters reach;
    each set has its own clusters as the inside.  Influence grows with gradients, which are large where the model
    answers badly, so that it hides copies of what is known well and shows much behind an answer that nobody gave:
    records are ordered and compared by their likeness.  What is asked otherwise than it was trained differs from the
    controls in more than that.  UsageError where nothing is left outside.

    Cost: gradients of the queries and of the controls' records, then one pass over ``train`` per memory of ``draws``
    gradients.  A high influence shows that a record pushes the model towards these answers in the linear picture, not
    that leaving it out would make the model lose them; a low one does not clear it where others say the same.
    """
    ours = np.array([record.id in inside for record in records])
    if ours.all():
        raise UsageError("Every training record belongs to the forget set: there is no other that could carry it.")
    if draws < 2:
        raise UsageError(f"{draws} random query sets make no band: give at least two.")
    shape = sorted(Counter(clusters or ("",) * len(queries)).values(), reverse=True)
    picked, controls = _controls(records, ours, shape, draws, seed)
    asked = [*queries, *(train[k] for k in picked)]
    own = {k: len(queries) + place for place, k in enumerate(picked)}
    groups = [list(range(len(queries))), *([own[k] for k in control] for control in controls)]
    values, alike = scores_and_likeness(model, asked, train, names, curvature, groups, damping=damping,
                                        progress=progress)  # fmt: skip
    tops, shares = [], []
    for row, like, control in zip(values[1:], alike[1:], controls, strict=True):
        theirs = {records[k].cluster for k in control}
        within = np.array([record.cluster in theirs for record in records])
        tops.append(float(like[~(within | ours)].max()))
        # less is outside a control than outside the forget set, which it leaves out: counted as if it were as much
        shares.append(_share(row[~ours], within[~ours], (~ours).sum() / (~(within | ours)).sum()))
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    limit, chance = _limit(tops)
    return Ranking(tuple(records), values[0], alike[0], ours, _share(values[0], ours), limit, chance,
                   (float(low), float(high)), len(controls), min(map(len, controls)), len(queries))  # fmt: skip


def _limit(tops: Sequence[float]) -> tuple[float, float]:
    """A limit that one more draw like ``tops`` exceeds with the chance beside it, at most 5 % where 19 are enough."""
    place = min(len(tops), math.ceil(LEVEL * (len(tops) + 1)))
    return sorted(tops)[place - 1], 1 - place / (len(tops) + 1)


def _controls(
    records: Sequence[Record], ours: NDArray[np.bool_], shape: Sequence[int], draws: int, seed: int
) -> tuple[list[int], list[list[int]]]:
    """Indices of all records drawn, and of each control set: ``shape`` [clusters] many of random clusters, and more
    clusters where these have fewer.  A set that is drawn twice counts once."""
    clusters: dict[str, list[int]] = {}
    for k, record in enumerate(records):
        if not ours[k]:
            clusters.setdefault(record.cluster, []).append(k)
    if len(clusters) < 2:
        raise UsageError("Random query sets need records of two clusters (outside the forget set), and there are fewer:"
                         " give more training data.")  # fmt: skip
    draw = random.Random(f"influence-{seed}")
    most = max(1, len(clusters) // 2)  # a set leaves as many clusters outside
    found: dict[tuple[int, ...], None] = {}
    for _ in range(draws):
        left, control = sum(shape), list[int]()
        for place, name in enumerate(draw.sample(sorted(clusters), most)):
            wanted = min(left, shape[place] if place < len(shape) else left, len(clusters[name]))
            control += draw.sample(clusters[name], wanted)
            left -= wanted
        found[tuple(sorted(control))] = None
    if len(found) < 2:
        raise UsageError("All random query sets came out alike: give more training data, or more draws.")
    return sorted({k for control in found for k in control}), [list(control) for control in found]


def _share(values: NDArray[np.float64], within: NDArray[np.bool_], weight: float = 1.0) -> float:
    """Share of the positive influence that comes from outside, weighted; NaN where there is none at all."""
    positive = values.clip(min=0)
    outside = weight * float(positive[~within].sum())
    total = outside + float(positive[within].sum())
    return outside / total if total else float("nan")


def cluster_lines(values: Mapping[str, float]) -> str:
    """JSON lines {"cluster", "score"}."""
    return "".join(json.dumps({"cluster": name, "score": value}) + "\n" for name, value in values.items())


def sentences(found: Ranking) -> tuple[str, ...]:
    """What a ranking says and what it does not, for people."""
    whose = "records outside the forget set" if found.inside.any() else "records"
    shares = f"random query sets have {found.band[0]:.2f} to {found.band[1]:.2f} outside their own clusters"
    share = () if not found.inside.any() else (
        f"Of the positive influence {found.outside:.2f} comes from outside the forget set; {shares}.",)  # fmt: skip
    small = () if found.drawn >= found.asked else (
        f"Random query sets have as few as {found.drawn} records while {found.asked} are asked about: there are too "
        "few others for a fair comparison.",)  # fmt: skip
    return (
        f"{len(found.found)} of {len(found.order)} {whose} are above the limit, a likeness (mean cosine of gradients) "
        f"of {found.limit:.3g}. For a random query set the foreign record most alike comes so high in "
        f"{100 * found.chance:.0f} % of cases ({found.draws} sets were drawn).",
        *share,
        *small,
        "Influence is what an answer's log-probability (nats) would lose without the record in a linear picture of "
        "training: it orders records, its size is not what retraining without them would show.",
    )  # fmt: skip
