"""TOFU's aggregates from per-question arrays (Maini et al. 2024, arXiv 2401.06121); nothing here knows a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from repforget.bench._records import LEVEL, Better, Metric, mean_metric, not_computed
from repforget.records import ItemScores
from repforget.scoring import metrics

Array = NDArray[np.float64]
Compat = Literal["none", "open-unlearning"]
Mean = Literal["geometric", "arithmetic"]
EPSILON = {"none": 0.0, "open-unlearning": metrics.OPEN_UNLEARNING_EPSILON}
UTILITY_SETS = ("retain", "real_authors", "world_facts")
QUALITY = ("forget_quality", "forget_quality_swap", "truth_ratio_difference")
KNOWS_AUC = 0.8  # a reference that separates its own retain and forget questions by less than this knows both


@dataclass(frozen=True)
class Scored:
    """What one set of n questions gave on one model; NaN where a question could not be scored."""

    ids: tuple[str, ...]
    clusters: tuple[str, ...]
    loss: Array  # [n] mean nats per token of the answer, its end token included
    instead: Array  # [n] of the paraphrased answer; of the answer itself where the set has no paraphrase
    wrong: Array  # [n, k] of the k wrong answers
    recall: Array  # [n] ROUGE-L recall of what the model says

    def items(self, values: Array) -> ItemScores:
        return ItemScores.of(self.ids, self.clusters, values.tolist())


def truth_ratio(scored: Scored, *, mean: Mean = "geometric", compat: Compat = "none") -> Array:
    """R per question: mean probability of the wrong answers over that of the paraphrase; small = knows [n].

    ``geometric`` is the leaderboard's mean, ``arithmetic`` that of the other formula in use.
    """
    return metrics.truth_ratio(scored.instead, scored.wrong, mean=mean, epsilon=EPSILON[compat])


def log_truth_ratio(scored: Scored, *, mean: Mean = "geometric", compat: Compat = "none") -> Array:
    """ln R per question, finite where R itself over- or underflows [n]."""
    if EPSILON[compat]:
        return np.log(np.maximum(truth_ratio(scored, mean=mean, compat=compat), np.nextafter(0.0, 1.0)))
    if mean == "geometric":
        return np.asarray(scored.instead - scored.wrong.mean(1))
    with np.errstate(invalid="ignore"):  # NaN marks what could not be scored
        wrong = np.logaddexp.reduce(-scored.wrong, axis=1) - math.log(scored.wrong.shape[1])
    return np.asarray(scored.instead + wrong)


def cells(name: str, scored: Scored, *, mean: Mean = "geometric", compat: Compat = "none") -> dict[str, ItemScores]:
    """The three published cells of one set: probability, rouge, truth_ratio."""
    among = name in ("real_authors", "world_facts")  # there, probability among the options
    epsilon = EPSILON[compat]
    chance = (metrics.option_probability(-scored.loss, -scored.wrong, epsilon=epsilon) if among
              else metrics.probability(-scored.loss))  # fmt: skip
    ratio = truth_ratio(scored, mean=mean, compat=compat)
    cell = metrics.truth_ratio_cell(ratio, "forget" if name == "forget" else "utility", epsilon=epsilon)
    values = {"probability": chance, "rouge": scored.recall, "truth_ratio": cell}
    return {cell: scored.items(found) for cell, found in values.items()}


def model_utility(sets: Mapping[str, Mapping[str, ItemScores]], *, seed: int = 0, draws: int = 2000) -> Metric:
    """Harmonic mean of the nine cells with limits from resampled clusters, each set's within the set.

    Dominated by its smallest cell and 0 where one is 0; on TOFU's own sets the limits are about 0.03 wide each way,
    so that smaller differences are noise.
    """
    absent = [name for name in UTILITY_SETS if name not in sets or any(not s.valid.any() for s in sets[name].values())]
    if absent:
        return not_computed("model_utility", f"{' and '.join(absent)} could not be scored")
    from repforget.verify.statistics import bootstrap

    parts = [(name, cell, scores) for name in UTILITY_SETS for cell, scores in sets[name].items()]
    columns, clusters, strata = _stacked([scores for *_, scores in parts], [name for name, *_ in parts])

    def utility(rows: Array) -> float:
        known = ~np.isnan(rows)
        return float(metrics.harmonic_mean(np.nansum(rows, axis=0) / np.maximum(known.sum(0), 1)))

    found = bootstrap(utility, columns, clusters, strata=strata, alpha=LEVEL, draws=draws, seed=seed)
    zero = [f"{name}.{cell}" for name, cell, scores in parts if scores.mean == 0.0]
    return Metric("model_utility", found.point, found.low, found.high, found.n_items, found.n_clusters,
                  note=f"0 because {' and '.join(zero)} is 0" if zero else "", token_based=True)  # fmt: skip


def _stacked(parts: Sequence[ItemScores], names: Sequence[str]) -> tuple[Array, list[str], list[str]]:
    """One row per item and one column per cell, NaN where the cell is of another set; clusters and sets of the rows."""
    blocks: list[Array] = []
    clusters: list[str] = []
    strata: list[str] = []
    for name in dict.fromkeys(names):
        mine = [k for k, other in enumerate(names) if other == name]
        block = np.full((len(parts[mine[0]].ids), len(parts)), np.nan)
        for k in mine:
            block[:, k] = np.where(parts[k].valid, parts[k].values, np.nan)
        blocks.append(block)
        clusters += parts[mine[0]].clusters
        strata += [name] * len(block)
    return np.concatenate(blocks), clusters, strata


def forget_quality(mine: ItemScores, theirs: ItemScores, *, unpaired: bool = False, seed: int = 0) -> list[Metric]:
    """Forget quality from ln R against a model that never knew, beside what respects the pairing.

    ``forget_quality`` is the published p-value of the exact two-sample Kolmogorov-Smirnov test, which takes the two
    samples for independent although both answer the same questions: far too lenient. ``forget_quality_swap`` is the
    permutation p-value of the same statistic with the two models' values swapped within a cluster, and
    ``truth_ratio_difference`` the mean paired difference of ln R with limits from resampled clusters. A high p-value
    says "not distinguished", never "forgotten". Different questions are refused unless ``unpaired``.
    """
    from repforget.verify.statistics import ks_exact, mean_interval, swap_permutation

    paired = mine.ids == theirs.ids
    use, other = (mine.valid & theirs.valid,) * 2 if paired else (mine.valid, theirs.valid)
    left, right = mine.values[use], theirs.values[other]
    ids, ids_right, clusters = _where(mine.ids, use), _where(theirs.ids, other), _where(mine.clusters, use)
    if not ids or not ids_right:
        return no_quality("no truth ratio could be scored")
    test = ks_exact(left, right, ids_x=ids, ids_y=ids_right, unpaired=unpaired)
    count = len(set(clusters))
    said = f"KS h={test.h}, n={test.n}, m={test.m}{'' if paired else ', different questions'}"
    if np.ptp([*left, *right]) == 0.0:
        said += "; all truth ratios are equal, so that nothing can be told from them"
    quality = Metric(QUALITY[0], test.p, n_items=len(ids), n_clusters=count, note=said)
    if not paired:
        return [quality, *no_quality("the reference answered other questions")[1:]]
    least = 2.0 ** (1 - count)  # swapping every cluster gives the same statistic as swapping none
    weak = f"; with so few clusters it cannot reach below {least:.2g}" if least > 0.01 else ""
    swap = swap_permutation(left, right, ids_x=ids, ids_y=ids_right, clusters=clusters, seed=seed)
    found = mean_interval(left - right, clusters, alpha=LEVEL, seed=seed)
    return [
        quality,
        Metric(QUALITY[1], swap.p, n_items=len(ids), n_clusters=count,
               note=f"{swap.permutations} label swaps of {count} clusters{weak}"),
        Metric(QUALITY[2], found.point, found.low, found.high, len(ids), count, "reference",
               ItemScores.of(ids, clusters, (left - right).tolist()), "ln R minus the reference's; 0 = like it"),
    ]  # fmt: skip


def no_quality(why: str) -> list[Metric]:
    """The three comparisons with a reference, none of which could be made."""
    better: tuple[Better, ...] = ("higher", "higher", "reference")
    return [not_computed(name, why, better=best) for name, best in zip(QUALITY, better, strict=True)]


def _where(names: Sequence[str], use: NDArray[np.bool_]) -> list[str]:
    return [name for name, ok in zip(names, use, strict=True) if ok]


def knows_too(retain_loss: ItemScores, forget_loss: ItemScores) -> float | None:
    """AUC of a reference's forget loss over its retain loss where it is too low for one that never knew, else None."""
    from repforget.verify.statistics import auc

    found = auc(forget_loss.values[forget_loss.valid], retain_loss.values[retain_loss.valid])
    return found if found < KNOWS_AUC else None


def composite(name: str, parts: Mapping[str, Metric], note: str = "") -> Metric:
    """Harmonic mean of other metrics' values; not computed where one of them is not."""
    absent = [part for part, metric in parts.items() if math.isnan(metric.value)]
    if absent or not parts:
        return not_computed(name, f"{' and '.join(absent) or 'nothing'} is missing")
    made = f"harmonic mean of {', '.join(parts)}"
    return Metric(name, float(metrics.harmonic_mean(np.array([m.value for m in parts.values()]))),
                  note="; ".join(filter(None, (made, note))))  # fmt: skip


def memorization(of: Mapping[str, Metric]) -> Metric:
    """HM(1 - ES, 1 - EM, 1 - paraphrase probability, 1 - knowledge): the peer's Memorization score (2506.12618)."""
    names = ("forget.extraction_strength", "forget.exact_memorization", "forget.probability_paraphrased",
             "forget.knowledge")  # fmt: skip
    parts = {f"1-{name}": Metric(name, 1.0 - of[name].value) for name in names if name in of}
    return composite("aggregate_memorization", parts)


def privacy(mine: Sequence[Metric], theirs: Mapping[str, Metric]) -> Metric:
    """HM over attacks of clip(1 - |AUC - AUC_r| / AUC_r, 0, 1): the peer's Privacy score (2506.12618)."""
    if not mine:
        return not_computed("aggregate_privacy", "no holdout set was named (setting holdout)")
    if any(metric.name not in theirs for metric in mine):
        return not_computed("aggregate_privacy", "no reference with the same attacks was given")
    parts = {}
    for metric in mine:
        base = theirs[metric.name].value
        share = 1.0 - abs(metric.value - base) / base if base > 0 else math.nan
        parts[metric.name] = Metric(metric.name, float(np.clip(share, 0.0, 1.0)))
    return composite("aggregate_privacy", parts, "of clip(1 - |AUC - AUC_r| / AUC_r, 0, 1)")


def means(prefix: str, group: Mapping[str, ItemScores], *, seed: int) -> list[Metric]:
    """One metric per cell of a set, named ``set.cell``."""
    out = []
    for cell, scores in group.items():
        forget: Better = "reference" if cell == "truth_ratio" else "lower"
        out.append(mean_metric(f"{prefix}.{cell}", scores, better=forget if prefix == "forget" else "higher",
                               token_based=cell != "rouge", seed=seed))  # fmt: skip
    return out
