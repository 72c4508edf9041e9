"""What a theorem says of a head after rows were taken out, with its numbers and its conditions."""

from __future__ import annotations

from repforget.guarantee import Guarantee
from repforget.linear.budget import Budget, removals_left
from repforget.linear.head import Head
from repforget.linear.logistic import Logistic
from repforget.linear.ridge import Ridge, distance
from repforget.linear.softmax import Softmax

OTHERS = "Classes, penalty, radius and the features themselves were chosen without the rows."
_EMPTY = "Class '{}' was a class without the rows as well: none of it is left, and its name and its column stay."
REST = "The remaining rows may still tell what the rows that went have in common with them."
SECRET = "The noise in the head's folder stays secret, and was not drawn from a seed that can be guessed."
UNSEEN = "The rows asked for were not chosen by somebody who knows the weights."
ALONE = "The promise is about the weights as they are now, not about them together with earlier ones or these numbers."
NORM = "As in the theorem, the residual counts by its norm; how it depends on the noise is not examined."


def guarantee(head: Head) -> Guarantee:
    """The theorem that holds for a head as it is: exact up to a distance, or (epsilon, delta)-certified."""
    gone = sum(int(entry["rows"]) for entry in head.log)
    rows = f"{gone} row{'' if gone == 1 else 's'} taken out"
    if_true = (OTHERS, *(_EMPTY.format(c) for c, n in zip(head.classes, head.counts, strict=True) if not n), REST)
    if isinstance(head.model, Ridge):
        bound = distance(head.model)
        return Guarantee(
            "exact", f"The weights are those of training without the {rows}, within {bound:.2g} for rounding.", "row",
            "Ridge regression has one solution, a function of sums over its rows; Woodbury 1950", if_true,
            {"distance bound": bound, "rows left": head.n, "drift": head.model.drift},
        )  # fmt: skip
    if isinstance(head.model, Logistic) and head.budget is not None:
        return _certified(head, head.model, head.budget, rows, if_true)
    if isinstance(head.model, Softmax):
        bound, strength = head.model.distance, head.model.lam
    else:
        strength = head.model.lam * head.model.n
        bound = head.model.residual / strength
    return Guarantee(
        "exact", f"The weights are within {bound:.2g} of those of training to the minimum without the {rows}.", "row",
        "Strong convexity: |w - w*| <= |gradient at w| / penalty", if_true,
        {"distance bound": bound, "gradient norm": head.model.residual, "penalty": strength, "rows left": head.n},
    )  # fmt: skip


def _certified(head: Head, model: Logistic, budget: Budget, rows: str, if_true: tuple[str, ...]) -> Guarantee:
    holds = budget.spent_epsilon(model.residual)
    numbers = {
        "epsilon": budget.epsilon, "delta": budget.delta, "noise": budget.sigma, "residual bound": model.residual,
        "budget": budget.limit, "epsilon spent": holds, "rows left": head.n,
        "removals left, about": removals_left(budget, model),
    }  # fmt: skip
    if head.log and "data_bound" in head.log[-1]:
        numbers |= {"last data bound": head.log[-1]["data_bound"], "last worst-case bound": head.log[-1]["worst_bound"]}
    return Guarantee(
        "certified",
        f"Up to (epsilon, delta) = ({budget.epsilon:g}, {budget.delta:g}) the weights cannot be told from those of "
        f"training without the {rows}.", "row",
        "Guo et al. 2020, arXiv 1911.03030, theorem 3 and corollary 1", (SECRET, UNSEEN, ALONE, NORM, *if_true),
        numbers,
    )  # fmt: skip
