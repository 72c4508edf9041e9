"""Exact effects of components on forget facts, less those on matched retain facts, and the random control."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb, prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from repforget.causal import Effects, Metric, Patch, Run, patch_effects
from repforget.errors import KnowledgeError, UsageError
from repforget.locate._units import size_class
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Component, RandomBand

Array = NDArray[np.float64]
Control = Literal["mean", "joint"]
Alike = Callable[[Component], str]
MIN_SELECTIONS = 41  # fewer possible selections cannot place one above the central 95 % of all
PLENTY = 200  # with so many, the top need not be the very best to lie above the central 95 %
MIN_DRAWS = 20
UNCHECKED = "All facts are of one cluster or item, so the ranking was not checked on other facts."
UNCONTRASTED = "All retain facts are of one cluster, which ranked: the band is measured without the contrast."
DEFAULT_TOP = 20  # of locators of many small units; lowered to half of the components where there are few
AFTER_SPLIT = "of the top {k} ranked on one half of the facts, measured on the other half"


@dataclass(frozen=True)
class Task:
    """What is patched: runs (base to be changed, donor to be written in), donors, metric, weight of contrast.

    ``sign`` is -1 where the donor lacks the knowledge, so that "more important" is always positive.
    """

    model: LoadedModel
    forget: tuple[Run, ...]
    retain: tuple[Run, ...] = ()
    donors: tuple[LoadedModel | None, ...] = (None,)
    metric: Metric = "logprob"
    contrast: float = 0.0
    sign: float = 1.0

    def half(self, second: bool, seed: int) -> Task:
        """The runs of one half of the clusters."""
        return replace(self, forget=_kept(self.forget, second, seed), retain=_kept(self.retain, second, seed))


def in_second_half(clusters: Sequence[str], seed: int) -> NDArray[np.bool_]:
    """Which entries belong to the second half of the clusters, split by seed; all False for a single
    cluster."""
    names = sorted(set(clusters))
    random.Random(f"band-{seed}").shuffle(names)
    second = set(names[(len(names) + 1) // 2 :])
    return np.array([c in second for c in clusters], dtype=bool)


def may_rank(tasks: Sequence[Task], clusters: Sequence[str], seed: int) -> NDArray[np.bool_]:
    """Which forget facts, by their cluster, are not among those that the band of ``tasks`` is measured on.

    For rankings by other facts than the tasks', whose own halves would fall differently. All of them where the tasks'
    facts are of one cluster, which :func:`exact_band` says; KnowledgeError where none is left.
    """
    late = [task.half(True, seed).forget for task in tasks]
    held = {run.cluster for runs in late for run in runs} if all(late) else set()
    found = np.array([cluster not in held for cluster in clusters], dtype=bool)
    if not found.any():
        raise KnowledgeError(f"None of {len(clusters)} facts is left to rank by, beside those on which the ranking is "
                             "measured: allow more items, or give facts about more subjects.")  # fmt: skip
    return found


def _kept(runs: Sequence[Run], second: bool, seed: int) -> tuple[Run, ...]:
    chosen = in_second_half([r.cluster for r in runs], seed)
    return tuple(run for run, late in zip(runs, chosen, strict=True) if bool(late) is second)


@dataclass(frozen=True)
class BandPlan:
    """How the random control is drawn: size of the selections, how many, what is measured of each."""

    top: int | str
    draws: int
    control: Control
    seed: int


def mean_gap(gap: Array) -> float:
    """Mean of what patching could move; UsageError where there is nothing."""
    mean = float(gap.mean())
    if mean <= 1e-6:
        raise UsageError(f"There is nothing to locate: the prompts with the knowledge score its answers only "
                         f"{mean:.1e} higher than those without it; choose facts that the model answers.")  # fmt: skip
    return mean


@dataclass(frozen=True)
class Moves:
    """How far each patch moves each forget run [p, n] and retain run [p, m], and the gap it could close
    [n]."""

    forget: Array
    gap: Array
    retain: Array
    clusters: tuple[str, ...]
    retain_clusters: tuple[str, ...]

    def scores(self, contrast: float, seed: int | None = None) -> Array:
        """Share of the mean forget gap that each patch moves, less ``contrast`` times the move on retain
        facts [p].

        With ``seed``, only on the first half of the clusters.  Both moves are divided by the forget gap,
        because a donor that knows the retain facts leaves no gap there.
        """
        first = np.ones(len(self.gap), dtype=bool) if seed is None else ~in_second_half(self.clusters, seed)
        gap = mean_gap(self.gap[first])
        score = self.forget[:, first].mean(axis=1) / gap
        if contrast and self.retain.shape[1]:
            kept = np.ones(self.retain.shape[1], dtype=bool)
            if seed is not None and not in_second_half(self.retain_clusters, seed).all():
                kept = ~in_second_half(self.retain_clusters, seed)
            score = score - contrast * self.retain[:, kept].mean(axis=1) / gap
        return np.asarray(score, dtype=np.float64)


def measure(tasks: Sequence[Task], patches: Sequence[Patch], progress: Progress | None = None) -> Moves:
    """Exact moves of every patch on the runs of all tasks, averaged over each task's donors."""
    return join([_measure(task, patches, progress) for task in tasks])


def _measure(task: Task, patches: Sequence[Patch], progress: Progress | None) -> Moves:
    def effects(runs: Sequence[Run]) -> list[Effects]:
        return [patch_effects(task.model, runs, patches, donor=donor, metric=task.metric, progress=progress)
                for donor in task.donors]  # fmt: skip

    forget = effects(task.forget)
    retain = np.zeros((len(patches), 0))
    if task.retain:
        retain = np.mean([e.moved for e in effects(task.retain)], axis=0)
    return moves_of(task, np.mean([e.moved for e in forget], axis=0), np.mean([e.gap for e in forget], axis=0), retain)


def moves_of(task: Task, forget: Array, gap: Array, retain: Array) -> Moves:
    """Raw moves of one task's runs with their clusters, oriented by its sign."""
    return Moves(task.sign * forget, task.sign * gap, task.sign * retain, tuple(r.cluster for r in task.forget),
                 tuple(r.cluster for r in task.retain))  # fmt: skip


def join(parts: Sequence[Moves]) -> Moves:
    """The runs of several tasks side by side."""
    return Moves(
        np.concatenate([m.forget for m in parts], axis=1), np.concatenate([m.gap for m in parts]),
        np.concatenate([m.retain for m in parts], axis=1), tuple(c for m in parts for c in m.clusters),
        tuple(c for m in parts for c in m.retain_clusters),
    )  # fmt: skip


def forwards(tasks: Sequence[Task], patches: int) -> float:
    """Sequences run for :func:`measure`: base, donor twice (values, score) and one per patch, for each donor."""
    return float(sum((len(t.forget) + len(t.retain)) * len(t.donors) * (patches + 3) for t in tasks))


def ranked(components: Sequence[Component], scores: Array) -> tuple[tuple[Component, ...], tuple[float, ...]]:
    """Components best first, ties in their own order."""
    order = sorted(range(len(components)), key=lambda k: (-scores[k], components[k]))
    return tuple(components[k] for k in order), tuple(float(scores[k]) for k in order)


def _possible(pool: Sequence[Component], chosen: Sequence[Component], alike: Alike) -> int:
    """How many selections have as many components of each size as ``chosen``."""
    have, want = Counter(map(alike, pool)), Counter(map(alike, chosen))
    return prod(comb(have[size], count) for size, count in want.items())


def top_size(order: Sequence[Component], top: int | str, alike: Alike = size_class) -> int:
    """``auto``: the fewest leading components of which plenty (or else just enough) random selections exist."""
    if top != "auto":
        if not 1 <= int(top) < len(order):
            raise UsageError(f"A top of {plural(int(top))} cannot be compared with random ones among "
                             f"{len(order)}: choose 1 to {len(order) - 1}, or 'auto'.")  # fmt: skip
        return int(top)
    sizes = range(1, max(2, len(order) // 2 + 1))
    enough = (next((k for k in sizes if _possible(order, order[:k], alike) >= needed), None)
              for needed in (PLENTY, MIN_SELECTIONS))  # fmt: skip
    return next((k for k in enough if k is not None), max(sizes))


def selections(
    pool: Sequence[Component], chosen: Sequence[Component], draws: int, seed: int, alike: Alike = size_class
) -> list[Patch]:
    """Random selections with as many components of each size as ``chosen``: all of them where few exist."""
    counts = Counter(map(alike, chosen))
    same = {size: [c for c in pool if alike(c) == size] for size in counts}
    if _possible(pool, chosen, alike) <= draws:
        found: list[tuple[Component, ...]] = [()]
        for size, k in counts.items():
            found = [(*left, *right) for left in found for right in combinations(same[size], k)]
        return list(found)
    generator = random.Random(f"selections-{seed}")
    return [[c for size, k in counts.items() for c in generator.sample(same[size], k)] for _ in range(draws)]


def band_of(
    pool: Sequence[Component], order: Sequence[Component], top: int | str, draws: int, seed: int, words: str,
    effect: Callable[[Sequence[Patch]], Array], alike: Alike = size_class,
) -> tuple[RandomBand, tuple[str, ...]]:  # fmt: skip
    """The effect of the leading components of ``order`` beside that of random selections of the same kinds.

    ``alike`` names the kind of a component: those of one may stand for each other (default: of one size).

    ``effect`` gives one value per selection and must look at other facts than ``order`` was made from.
    Returns the band, a note where it cannot or does not support a claim, and how many selections were
    measured.  The upper limit is an attained value (the 97.5 % quantile rounded up), so that few selections
    can never be beaten by chance.
    """
    if draws < MIN_DRAWS:
        raise UsageError(f"{draws} random selections are too few to say what chance reaches: draw at least "
                         f"{MIN_DRAWS}.")
    half, lowered = max(1, len(order) // 2), tuple[str, ...]()
    if top == DEFAULT_TOP and half < DEFAULT_TOP:
        top, lowered = half, (f"The default top of {DEFAULT_TOP} is lowered to half of the {len(order)} components.",)
    k = top_size(order, top, alike)
    chosen = order[:k]
    drawn = selections(pool, chosen, draws, seed, alike)
    values = effect([chosen, *drawn])
    low = float(np.quantile(values[1:], 0.025, method="lower"))
    high = float(np.quantile(values[1:], 0.975, method="higher"))
    band = RandomBand(k, len(drawn), float(values[0]), low, high, words.format(k=k))
    possible = _possible(pool, chosen, alike)
    if possible < MIN_SELECTIONS:
        return band, (*lowered, f"To select {plural(k)} of these sizes there are only {possible} ways, and a claim "
                      f"needs {MIN_SELECTIONS}: no localisation is claimed; rank more components or more "
                      "kinds.")  # fmt: skip
    if not band.beats_random:
        return band, (*lowered, f"The top {plural(k)} did not beat random selections of the same sizes "
                      f"({band.top:.3f} against at most {high:.3f}): no localisation is claimed.")  # fmt: skip
    return band, lowered


def plural(count: int) -> str:
    return "1 component" if count == 1 else f"{count} components"


def exact_band(
    tasks: Sequence[Task], pool: Sequence[Component], order: Sequence[Component], plan: BandPlan,
    progress: Progress | None, *, written: Callable[[Component], Patch] = lambda c: (c,), alike: Alike = size_class,
) -> tuple[RandomBand, tuple[str, ...], float]:  # fmt: skip
    """:func:`band_of` with exact effects on the second half of the facts; also the passes spent.

    ``mean`` is the mean effect of patching the selected components one at a time; ``joint`` that of patching them
    together, which is the harder question where a few components already bring back everything. ``written`` says what
    is patched for a component (default: itself).
    """
    held = [task.half(True, plan.seed) for task in tasks]
    split = all(task.forget for task in held)
    held = held if split else list(tasks)
    words = {"mean": "mean exact patching effect ", "joint": "joint exact patching effect "}[plan.control]
    words += AFTER_SPLIT if split else "of the top {k} on the facts that ranked them"
    run: list[int] = []

    def effect(patches: Sequence[Patch]) -> Array:
        each = sorted({c for p in patches for c in p})
        units = list(patches) if plan.control == "joint" else [(c,) for c in each]
        run.append(len(units))
        patched = [[part for c in unit for part in written(c)] for unit in units]
        values = measure(held, patched, progress).scores(held[0].contrast)
        if plan.control == "joint":
            return values
        single = dict(zip(each, values, strict=True))
        return np.array([np.mean([single[c] for c in patch]) for patch in patches])

    band, notes = band_of(pool, order, plan.top, plan.draws, plan.seed, words, effect, alike)
    if not split:
        notes = (*notes, UNCHECKED)
    if any(whole.contrast and whole.retain and not part.retain for whole, part in zip(tasks, held, strict=True)):
        notes = (*notes, UNCONTRASTED)
    return band, notes, forwards(held, sum(run))


def pearson(a: Iterable[float], b: Iterable[float]) -> float:
    """Pearson correlation; NaN where one side is constant."""
    x, y = np.asarray(list(a)), np.asarray(list(b))
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
