"""One measure on every arm -> one claim: how much of the original's knowledge (or quality) is left, and how surely.

rho = (target - floor) / (original - floor), over the items that every arm could be scored on, where the floor is a
model that never knew (the mean of the twins, per item), the prior over alternatives, or what the same attack gets out
of the edited model when its answers are exchanged between clusters: whichever is highest on average.
For collateral measures rho = (original - target) / original, the share of quality lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from repforget.errors import ControlError
from repforget.records import Claim, ClaimStatus, Evidence, ItemScores
from repforget.verify import statistics as st

Array = NDArray[np.float64]
AUC_NEEDED = 0.8
VOTING: tuple[ClaimStatus, ...] = ("pass", "fail", "inconclusive")
SHUFFLED = "shuffled"  # arm: the edited model asked for answers exchanged between clusters, which it never learnt
FLOORS = {SHUFFLED: "shuffled answers"}  # how a floor is called in a reason, where not by its own name


@dataclass(frozen=True)
class Rule:
    """The limits a claim is held to: ``margin`` of knowledge left, ``utility_margin`` of quality lost.

    ``alpha`` is the one-sided level of the intervals; repeated looks at the same items spend it (spec rule V7).
    """

    margin: float = 0.05
    utility_margin: float = 0.02
    seed: int = 0
    draws: int = st.DRAWS
    alpha: float = st.ALPHA


class _Aligned(NamedTuple):
    """Values of every arm on the items that the arms of this claim share."""

    ids: tuple[str, ...]
    original: Array
    target: Array
    floor: Array | None
    floor_name: str
    clusters: tuple[str, ...]
    levels: dict[str, float]
    noise: float  # how far two twins lie apart


def twin_names(evidence: Evidence) -> tuple[str, ...]:
    """Arms that never knew, in order."""
    return tuple(sorted((a for a in evidence.arms if a.startswith("twin-")), key=lambda a: int(a.split("-")[1])))


def _same_items(evidence: Evidence) -> None:
    ids = evidence.arms["original"].ids
    other = {name: scores.ids for name, scores in evidence.arms.items()}
    if evidence.prior is not None:
        other["prior"] = evidence.prior.ids
    wrong = sorted(name for name, found in other.items() if found != ids)
    if wrong:
        raise ControlError(f"Measure '{evidence.name}' was taken on other items on arm '{wrong[0]}' than on the "
                           "original: measure every arm on the same view.")  # fmt: skip


def _align(evidence: Evidence, target: str, twins: Sequence[str]) -> _Aligned:
    exchanged = (SHUFFLED,) if evidence.kind == "knowledge" and SHUFFLED in evidence.arms else ()
    needed = ("original", target, *twins, *exchanged)
    missing = sorted(set(needed) - set(evidence.arms))
    if missing:
        raise ControlError(f"Measure '{evidence.name}' has no arm '{missing[0]}': measure it before judging.")
    _same_items(evidence)
    arms = evidence.arms
    keep = np.logical_and.reduce([arms[name].valid for name in needed])
    prior = evidence.prior
    if prior is not None:
        keep = keep & prior.valid
    clusters = tuple(np.asarray(arms["original"].clusters, dtype=object)[keep])
    values = {name: arms[name].values[keep] for name in needed}
    levels = {name: _mean(scores, keep) for name, scores in arms.items()}
    floors: dict[str, Array] = {}
    if twins:
        floors["twin"] = np.mean([values[name] for name in twins], axis=0)
    if prior is not None:
        floors["prior"] = prior.values[keep]
        levels["prior"] = _mean(prior, keep)
    floors |= {name: values[name] for name in exchanged}
    name = max(floors, key=lambda key: float(floors[key].mean()) if keep.any() else 0.0, default="")
    floor = floors.get(name)
    if floor is not None and keep.any():
        levels["floor"] = float(floor.mean())
    noise = st.noise_floor([float(values[t].mean()) for t in twins]) if keep.any() else 0.0
    ids = tuple(np.asarray(arms["original"].ids, dtype=object)[keep])
    return _Aligned(ids, values["original"], values[target], floor, FLOORS.get(name, name), clusters, levels, noise)


def _mean(scores: ItemScores, keep: NDArray[np.bool_]) -> float:
    chosen = scores.values[keep & scores.valid]
    return float(chosen.mean()) if len(chosen) else math.nan


def _no_power(data: _Aligned, evidence: Evidence, rule: Rule) -> str | None:
    """Why this measure may not vote here, or None: it must separate the original from the floor (spec rule V8)."""
    if len(data.original) == 0:
        return "no item could be scored on every arm"
    if data.floor is None:
        if evidence.kind == "collateral":
            return None if data.original.mean() > 0 else "the original has nothing to lose on these items"
        return "there is neither a twin nor a prior to compare with"
    gap = st.mean_interval(data.original - data.floor, data.clusters, alpha=0.025, draws=rule.draws, seed=rule.seed)
    separation = st.auc(data.original, data.floor)
    if gap.low > 0.0 and separation >= AUC_NEEDED:
        return None
    return (f"the measure does not tell the original from the floor on these items (difference {gap.point:.3f}, at "
            f"least {gap.low:.3f}; AUC {separation:.2f}, needs {AUC_NEEDED})")  # fmt: skip


def _knowledge(data: _Aligned, floor: Array, rule: Rule) -> tuple[st.Interval, float]:
    """The share of knowledge left with its limits, and the margin it is held to."""
    above, gap = data.target - floor, data.original - floor
    share = st.ratio_interval(above, gap, data.clusters, alpha=rule.alpha, draws=rule.draws, seed=rule.seed)
    if not data.target.any():
        # No success at all has no spread; the upper limit is then that of zero events, not zero.
        limit = (st.zero_event_limit(len(data.target), rule.alpha) - float(floor.mean())) / float(gap.mean())
        share = replace(share, high=max(share.high, limit))
    return share, st.margin_above_noise(rule.margin, data.noise, float(gap.mean()))


def _status(share: st.Interval, margin: float, forced: bool) -> tuple[ClaimStatus, str]:
    """``forced``: the measure makes the model choose, so that lying below the floor means avoiding the truth."""
    side = st.equivalence(share, margin).side
    if side == "above":
        return "fail", f"at least {share.low:.1%} is left, the margin is {margin:.1%}"
    if side == "below" and forced:
        return "inconclusive", (f"over-unlearned: {-share.point:.1%} below the floor, so that the answer is avoided, "
                                "which itself tells something")  # fmt: skip
    if share.high < margin:
        below = {"within": f"equivalent to the floor ({share.low:+.1%} to {share.high:+.1%})",
                 "below": f"over-unlearned by at least {-share.high:.1%}, since it declines to answer",
                 "not told": f"it may lie up to {-share.low:.1%} below the floor"}[side]  # fmt: skip
        return "pass", f"at most {share.high:.1%} is left, the margin is {margin:.1%}; {below}"
    return "inconclusive", f"between {share.low:.1%} and {share.high:.1%} is left, the margin is {margin:.1%}"


def _loss_status(share: st.Interval, margin: float) -> tuple[ClaimStatus, str]:
    if share.low > margin:
        return "fail", f"at least {share.low:.1%} is lost, the limit is {margin:.1%}"
    if share.high < margin:
        return "pass", f"at most {share.high:.1%} is lost, the limit is {margin:.1%}"
    return "inconclusive", f"between {share.low:.1%} and {share.high:.1%} is lost, the limit is {margin:.1%}"


def _claim(evidence: Evidence, rule: Rule, target: str, twins: Sequence[str]) -> tuple[Claim, float]:
    """The claim and the p-value of "at most the margin is left"."""
    knowledge = evidence.kind == "knowledge"
    # Quality is compared with the original alone: what a twin kept does not excuse a loss.
    data = _align(evidence, target, twins if knowledge else ())
    margin = rule.margin if knowledge else rule.utility_margin
    fault = _no_power(data, evidence, rule)
    base = Claim(evidence.name, evidence.kind, evidence.access, "no power", fault or "", margin, levels=data.levels,
                 n_items=len(data.original), n_clusters=len(set(data.clusters)))  # fmt: skip
    if fault is not None:
        return (base if evidence.votes else replace(base, status="descriptive")), 1.0
    if knowledge and data.floor is not None:
        share, margin = _knowledge(data, data.floor, rule)
        # A model that declines to answer is below the floor of a black-box measure and gives nothing away.
        status, reason = _status(share, margin, evidence.access != "black-box")
        reason += f"; floor: {data.floor_name}"
    else:
        lost = data.original - data.target
        share = st.ratio_interval(lost, data.original, data.clusters, alpha=rule.alpha, draws=rule.draws,
                                  seed=rule.seed)
        status, reason = _loss_status(share, margin)
    needed = st.items_needed(share, margin, alpha=rule.alpha)
    if status == "inconclusive" and needed is not None and needed > share.n_items:
        reason += f"; about {needed} items would be needed to show it"
    claim = replace(base, status=status if evidence.votes else "descriptive", reason=reason, margin=margin,
                    rho=share.point, rho_low=share.low, rho_high=share.high, n_needed=needed)  # fmt: skip
    return claim, share.p_above(margin)


def claims(
    evidence: Sequence[Evidence], rule: Rule, *, target: str = "edit", twins: Sequence[str] | None = None
) -> tuple[Claim, ...]:
    """Judge ``target`` on every measure; ``twins`` names the floor arms (all twins other than the target if None).

    That something is retained is a disjunction over attacks, so each "fail" must survive Holm's correction over the
    voting knowledge measures; that it is not is a conjunction and needs none (intersection-union).
    """
    pairs = []
    for entry in evidence:
        floor = [t for t in twin_names(entry) if t != target] if twins is None else list(twins)
        pairs.append(_claim(entry, rule, target, floor))
    voting = [i for i, (c, _) in enumerate(pairs) if c.kind == "knowledge" and c.status in VOTING]
    rejected = dict(zip(voting, st.holm([pairs[i][1] for i in voting]), strict=True))
    result = []
    for index, (claim, _) in enumerate(pairs):
        if claim.status == "fail" and not rejected.get(index, True):
            note = f"{claim.reason}; not sure enough beside {len(voting)} measures (Holm)"
            claim = replace(claim, status="inconclusive", reason=note)
        result.append(claim)
    return tuple(result)


class WorstItem(NamedTuple):
    """An item on which an attack found most: ``left`` is its own (target - floor) / (mean original - mean floor)."""

    id: str
    cluster: str
    left: float
    attack: str


def worst_items(
    evidence: Sequence[Evidence], n: int | None = None, *, target: str = "edit", rule: Rule | None = None
) -> tuple[WorstItem, ...]:  # fmt: skip
    """The ``n`` items (None: 5 %) that stand out most above the floor, each with the attack that got most out of it.

    Only measures that vote and have power take part.  A mean hides such items; one of them is still no proof, since the
    largest of many differences is large by chance too.
    """
    found: dict[str, WorstItem] = {}
    for entry in evidence:
        if entry.kind != "knowledge" or not entry.votes:
            continue
        data = _align(entry, target, [t for t in twin_names(entry) if t != target])
        if data.floor is None or _no_power(data, entry, rule or Rule()) is not None:
            continue
        left = (data.target - data.floor) / float((data.original - data.floor).mean())
        for item in map(WorstItem, data.ids, data.clusters, left.tolist(), [entry.name] * len(left)):
            if item.id not in found or item.left > found[item.id].left:
                found[item.id] = item
    ranked = sorted(found.values(), key=lambda item: (-item.left, item.id))
    return tuple(ranked[: math.ceil(0.05 * len(ranked)) if n is None else n])
