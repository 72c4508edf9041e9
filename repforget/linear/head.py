"""A linear head with its rows, classes and promise: fitted, asked to let rows go, and told what then holds."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError, nearest
from repforget.linear import logistic, ridge
from repforget.linear._arrays import Array
from repforget.linear.budget import Budget, draw_noise, for_rows, steps_left, within
from repforget.linear.logistic import Logistic, change_logistic, fit_logistic, leaving, refit, within_unit
from repforget.linear.release import Release, covered, left
from repforget.linear.ridge import Ridge, change_ridge, fit_ridge
from repforget.linear.rows import Index, Table, prepared
from repforget.linear.softmax import Softmax, fit_softmax

Loss = Literal["ridge", "logistic", "softmax"]
LOSSES: tuple[str, ...] = get_args(Loss)


@dataclass(frozen=True)
class Head:
    """A fitted head: ``loss``, its sums and weights (``model``), and what is needed to answer a request.

    ``classes`` are in the order of the columns (two classes have one column, whose positive side is the second);
    empty where ridge predicts numbers; ``counts`` are the rows each has left.  ``log`` has one entry per removal,
    ``published`` one per publication under a ``release``.  Everything but the weights is private, and with a
    ``release`` the weights are as well; the noise of a ``budget`` above all.
    """

    loss: Loss
    model: Ridge | Logistic | Softmax
    classes: tuple[str, ...]
    radius: float | None
    intercept: bool
    index: Index
    budget: Budget | None = None
    log: tuple[Mapping[str, Any], ...] = ()
    source: str = ""
    counts: tuple[int, ...] = ()
    release: Release | None = None
    published: tuple[Mapping[str, Any], ...] = ()

    @property
    def weights(self) -> Array:
        """[d, k], d counting the intercept: what may be published, unless a ``release`` adds noise to it first."""
        return self.model.change if isinstance(self.model, Softmax) else self.model.weights

    @property
    def n(self) -> int:
        return len(self.index)

    @cached_property
    def distance(self) -> float:
        """Upper bound on the distance (Frobenius) of the weights to the minimiser on the rows that are left."""
        if isinstance(self.model, Logistic):
            return logistic.distance(self.model, self._curvature)
        return ridge.distance(self.model) if isinstance(self.model, Ridge) else self.model.distance

    @property
    def _curvature(self) -> float:
        """Known where rows were checked to be within 1, under a release."""
        known = isinstance(self.model, Logistic) and self.release is not None
        return logistic.least_curvature(self.model) if known else 0.0  # type: ignore[arg-type]

    def scores(self, x: NDArray[Any]) -> Array:
        """What the columns say of rows ``x`` [n, d]: [n, k]."""
        found: Array = prepared(x, self.radius, self.intercept) @ self.weights
        return found

    def predict(self, x: NDArray[Any]) -> NDArray[Any]:
        """Classes [n], or the scores where ridge predicts numbers."""
        scores = self.scores(x)
        return named(scores, self.classes) if self.classes else scores


def named(scores: Array, classes: tuple[str, ...]) -> NDArray[np.str_]:
    """The class of each row [n] that ``scores`` [n, k] are largest for; one column's positive side is the second."""
    found: NDArray[np.str_] = np.array(classes)[_numbers(scores)]
    return found


def fit_head(
    table: Table, loss: Loss, lam: float, *, radius: float | None = None, intercept: bool = False,
    budget: Budget | None = None, release: Release | None = None, seed: int | None = None,
) -> Head:  # fmt: skip
    """Fit a head to a table; with a ``release`` or a ``budget`` it can be promised on after a step for each request.

    ``release``: noise on what is published, for any loss.  ``budget``: secret noise in the objective, for logistic.
    Several classes under ``logistic`` are one column each against the rest: together one convex problem, whose residual
    is that of all columns.  ``softmax`` has no bounded step here and takes no budget; ``ridge`` needs none.
    """
    if loss not in LOSSES:
        raise UsageError(f"There is no loss '{loss}': {nearest(loss, LOSSES)}")
    if budget is not None and release is not None:
        raise UsageError("Output noise and noise in the objective are two promises: give one of them.")
    if budget is not None and loss != "logistic":
        reason = "its removal is exact without noise" if loss == "ridge" else "its Newton step has no bound here"
        raise UsageError(f"Private noise is for the loss logistic and not for {loss}, since {reason}: leave the noise "
                         "out, or use --loss logistic, which takes several classes one against the rest.")  # fmt: skip
    numbers = loss == "ridge" and np.issubdtype(table.y.dtype, np.number)
    classes = () if numbers else tuple(str(name) for name in np.unique(table.y.astype(np.str_)))
    if len(classes) == 1 or (classes and table.y.ndim != 1):
        raise UsageError(f"'{table.name}' has {len(classes)} classes in targets of shape {table.y.shape}: give [n] "
                         "classes, two or more.")  # fmt: skip
    x, y = prepared(table.x, radius, intercept), encoded(table.y, classes)
    promise = release or budget
    if promise is not None:
        for_rows(promise.delta, len(x))
        if loss == "logistic":
            within_unit(x)
    model: Ridge | Logistic | Softmax
    if loss == "ridge":
        model = fit_ridge(x, y, lam)
    elif loss == "logistic":
        noise = None if budget is None else draw_noise(budget.sigma, (x.shape[1], y.shape[1]), seed)
        model = fit_logistic(x, y, lam, noise)
        if budget is not None:
            within(budget, model, 0)
    else:
        model = fit_softmax(x, _numbers(y), len(classes), lam)
    index = Index.of(secrets.token_bytes(16), table, x, y)
    return covered(Head(loss, model, classes, radius, intercept, index, budget, source=table.name,
                        counts=_counts(y, classes), release=release))  # fmt: skip


def encoded(y: NDArray[Any], classes: tuple[str, ...]) -> Array:
    """Targets [n, k]: numbers as they are; two classes as one column of signs, more as one column each."""
    if not classes:
        found: Array = y.astype(np.float64).reshape(len(y), -1)
        return found
    names = y.astype(np.str_)
    if not np.isin(names, classes).all():
        raise UsageError(f"Class '{names[~np.isin(names, classes)][0]}' is none of the head's: "
                         f"{nearest(str(names[~np.isin(names, classes)][0]), classes)}")  # fmt: skip
    columns = classes[1:] if len(classes) == 2 else classes
    return np.where(names[:, None] == np.array(columns), 1.0, -1.0)


def _numbers(y: Array) -> NDArray[np.intp]:
    return (y[:, 0] > 0).astype(np.intp) if y.shape[1] == 1 else y.argmax(1)


def _counts(y: Array, classes: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(_numbers(y), minlength=len(classes))) if classes else ()


def remove(head: Head, table: Table, names: Iterable[str] = (), *, retrain: bool = False) -> Head:
    """Take the rows of these ids or clusters out of the head; the last entry of ``log`` says how.

    ridge: Woodbury, reading these rows alone.  logistic with a promise: one Newton step from the head's own sums,
    reading these rows alone; ResourceError where the promise does not cover it.  Otherwise, and with ``retrain``,
    for which no name is needed: to convergence on all remaining rows, which ``table`` must then hold.
    Raises UsageError for a name that was never trained on and for a row that differs from the one trained on.
    """
    names = tuple(names)
    places = head.index.chosen(names, head.source) if names or not retrain else np.zeros(0, dtype=np.intp)
    rest = head.index.without(places)
    if not len(rest):
        raise UsageError(f"All {head.n} rows would be taken out, which leaves nothing to train on: drop the head.")
    gone = _rows(head, places, table)
    entry: dict[str, Any] = {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                             "rows": len(places), "left": len(rest)}  # fmt: skip
    model = head.model
    promised = head.budget is not None or head.release is not None
    if isinstance(model, Ridge) and not retrain:
        model = change_ridge(model, *gone)
        entry |= {"by": "woodbury", "drift": model.drift}
    elif isinstance(model, Logistic) and promised and model.hessian.size and not retrain:
        model, bounds = change_logistic(model, *gone)
        entry |= {"by": "newton step", "data_bound": bounds.data, "worst_bound": bounds.worst,
                  "residual": model.residual}  # fmt: skip
    else:
        model, how = _retrained(head, gone[0], *_rows(head, np.delete(np.arange(head.n), places), table))
        entry |= how
    if head.budget is not None and isinstance(model, Logistic):
        within(head.budget, model, len(places))
    counts = tuple(n - m for n, m in zip(head.counts, _counts(gone[1], head.classes), strict=True))
    return covered(replace(head, model=model, index=rest, log=(*head.log, entry), counts=counts))


def _retrained(head: Head, gone: Array, x: Array, y: Array) -> tuple[Ridge | Logistic | Softmax, dict[str, Any]]:
    """The model on exactly the rows ``x``, ``gone`` having been in it as well, and how."""
    model = head.model
    if isinstance(model, Ridge):
        return fit_ridge(x, y, model.lam), {"by": "sums of all rows"}
    if isinstance(model, Logistic):
        model = refit(leaving(model, gone) if len(gone) else model, x, y)
    else:
        model = fit_softmax(x, _numbers(y), len(head.classes), model.lam, start=model.change)
    return model, {"by": "newton to convergence", "residual": model.residual}


def removals_left(head: Head) -> int | None:
    """About how many more single rows a promise on steps covers, an estimate; None where no such promise is made."""
    model = head.model
    if isinstance(model, Logistic) and head.release is not None:
        return steps_left(logistic.residual_at(model, left(head, head.release), head._curvature), model)
    return steps_left(head.budget.limit, model) if isinstance(model, Logistic) and head.budget is not None else None


def _rows(head: Head, places: NDArray[np.intp], table: Table) -> tuple[Array, Array]:
    """The rows at ``places`` as the head saw them, compared with what was trained on."""
    if not len(places):
        return np.zeros((0, head.weights.shape[0])), np.zeros((0, head.weights.shape[1]))
    chosen = table.only(head.index.rows_of(places, table))
    x, y = prepared(chosen.x, head.radius, head.intercept), encoded(chosen.y, head.classes)
    head.index.check(places, x, y, chosen)
    return x, y
