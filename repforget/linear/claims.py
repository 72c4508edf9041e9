"""What a theorem says of a head after rows were taken out, with its numbers and its conditions."""

from __future__ import annotations

import math

from repforget.gaussian import gaussian_epsilon
from repforget.guarantee import Guarantee, at_most
from repforget.linear.budget import Budget
from repforget.linear.head import Head, removals_left
from repforget.linear.logistic import Logistic
from repforget.linear.release import Release, spent
from repforget.linear.ridge import Ridge
from repforget.linear.softmax import Softmax

OTHERS = "Classes, penalty, radius and the features themselves were chosen without the rows."
_EMPTY = "Class '{}' was a class without the rows as well: none of it is left, and its name and its column stay."
REST = "The remaining rows may still tell what the rows that went have in common with them."
SECRET = "The noise in the head's folder stays secret, and was not drawn from a seed that can be guessed."
UNSEEN = "The rows asked for were not chosen by somebody who knows the weights."
ALONE = "The promise is about the weights as they are now, not about them together with earlier ones or these numbers."
NORM = (
    "The residual counts by its norm, as in the theorem, as if it did not depend on the noise. It does: one that "
    "followed the noise closely would break the promise, and nothing here excludes it (--output-noise needs no such "
    "assumption)."
)
FOLDER = (
    "The folder stays secret, and so do these numbers and refusals, which depend on the rows: what is published is "
    "what 'head show --weights' writes, at times that do not depend on them, and from this folder alone: a copy, or a "
    "backup put back, does not count what the other published."
)
EARLIER = (
    "Requests may depend on what was published. Publications from before a request had the rows in and may tell of "
    "them, and so may later requests that follow from those, as they do where heads are retrained."
)
REALS = (
    "Noise and weights are real numbers. Floats are not; publications are rounded to a thousandth of the noise, so "
    "that lower bits do not tell."
)


def guarantee(head: Head) -> Guarantee:
    """The theorem that holds for a head as it is: exact up to a distance, or (epsilon, delta)-certified."""
    gone = sum(int(entry["rows"]) for entry in head.log)
    rows = f"{gone} row{'' if gone == 1 else 's'} taken out"
    if_true = (OTHERS, *(_EMPTY.format(c) for c, n in zip(head.classes, head.counts, strict=True) if not n), REST)
    if head.release is not None:
        return _released(head, head.release, rows, if_true)
    bound = head.distance
    within = at_most(bound, 2)
    if isinstance(head.model, Ridge):
        return Guarantee(
            "exact", f"The weights are those of training without the {rows}, within {within} for rounding.", "row",
            "Ridge regression has one solution, a function of sums over its rows; Woodbury 1950", if_true,
            {"distance bound": bound, "rows left": head.n, "drift": head.model.drift},
        )  # fmt: skip
    if isinstance(head.model, Logistic) and head.budget is not None:
        return _certified(head, head.model, head.budget, rows, if_true)
    strength = head.model.lam * (1 if isinstance(head.model, Softmax) else head.model.n)
    return Guarantee(
        "exact", f"The weights are within {within} of those of training to the minimum without the {rows}.", "row",
        "Strong convexity: |w - w*| <= |gradient at w| / penalty", if_true,
        {"distance bound": bound, "gradient norm": head.model.residual, "penalty": strength, "rows left": head.n},
    )  # fmt: skip


def _released(head: Head, release: Release, rows: str, if_true: tuple[str, ...]) -> Guarantee:
    used, bound, now = spent(head), head.distance, f", now without the {rows}" if head.log else ""
    promise = f"({at_most(release.epsilon)}, {at_most(release.delta)})"
    near = "the penalty" + " and curvature (Bach 2010, arXiv 0910.4627)" * isinstance(head.model, Logistic)
    return Guarantee(
        "certified",
        f"Up to (epsilon, delta) = {promise} all publications of this head together, past and next, cannot be told "
        f"from those of heads trained to the minimum on the rows left at each{now}, and published with the same noise.",
        "row",
        f"Strong convexity, by {near}; one publication by Balle and Wang 2018, arXiv 1805.06530, theorem 8; several, "
        "with requests that depend on them, by Smith and Thakurta 2022, arXiv 2210.17520; of the output alone, as in "
        "Neel et al. 2021, arXiv 2007.02923",
        (FOLDER, EARLIER, REALS, *if_true),
        {"epsilon": release.epsilon, "delta": release.delta, "output noise": release.tau, "distance bound": bound,
         "publications": len(head.published), "distance of all publications": used, "distance covered": release.limit,
         "epsilon with the next publication": gaussian_epsilon(math.hypot(used, bound) / release.tau, release.delta),
         "rows left": head.n, **_about(head)},
    )  # fmt: skip


def _about(head: Head) -> dict[str, float]:
    more = removals_left(head)
    return {} if more is None else {"removals left, about": more}


def _certified(head: Head, model: Logistic, budget: Budget, rows: str, if_true: tuple[str, ...]) -> Guarantee:
    numbers = {
        "epsilon": budget.epsilon, "delta": budget.delta, "noise": budget.sigma, "residual bound": model.residual,
        "budget": budget.limit, "epsilon spent": budget.spent_epsilon(model.residual), "rows left": head.n,
        **_about(head),
    }  # fmt: skip
    if head.log and "data_bound" in head.log[-1]:
        numbers |= {"last data bound": head.log[-1]["data_bound"], "last worst-case bound": head.log[-1]["worst_bound"]}
    return Guarantee(
        "certified",
        f"Up to (epsilon, delta) = ({at_most(budget.epsilon)}, {at_most(budget.delta)}) the weights cannot be told "
        f"from those of training without the {rows}.", "row",
        "Guo et al. 2020, arXiv 1911.03030, theorem 3 and corollary 1", (SECRET, UNSEEN, ALONE, NORM, *if_true),
        numbers,
    )  # fmt: skip
