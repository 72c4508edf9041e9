"""Requests one after the other: does what was forgotten first stay forgotten, and what does every request cost?

Rows are states (0: before any request, j: after request j), columns are requests.  Knowledge is a share: 1 as before
any request, 0 as in a model that never knew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel
from repforget.records import ItemScores
from repforget.verify import _asking as ask
from repforget.verify.statistics.equivalence import Equivalence, equivalence
from repforget.verify.statistics.intervals import Interval, mean_interval, ratio_interval

Array = NDArray[np.float64]
MARGIN = 0.05  # of the gap between the original and never having known, as in a verdict


@dataclass(frozen=True)
class Look:
    """What one model knows about the items of every request, and about what must stay (probability of the truth)."""

    requests: Mapping[str, ItemScores]
    keep: ItemScores


@dataclass(frozen=True)
class Stability:
    """Knowledge left [states, requests] with what follows from it; limits are one-sided at 5 %, people resampled.

    ``before``: least share left of a request that had not been made yet (1: later requests were not touched early).
    ``re_emerged``: share of each request's knowledge that came back between its own state and the last.
    ``kept`` [states]: share of what must stay that is still known; ``slope``: its change per request.  ``area``: mean
    share left over all pairs of a request and a state at or after it.  ``states``: the request after which each state
    but the first was looked at.  ``left_out``: requests without a column, and why.
    """

    names: tuple[str, ...]
    left: Array
    re_emerged: tuple[Interval, ...]
    kept: Array
    slope: Interval
    area: float
    before: float
    states: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def worst(self) -> int:
        """The request of which most may have come back, by the upper limit."""
        return int(np.argmax([interval.high for interval in self.re_emerged]))

    @property
    def outcomes(self) -> dict[str, str]:
        """For each request with a later state: fail where more than the margin surely came back, pass where less did,
        inconclusive where neither is known or the request was left out."""
        found = {name: "fail" if back.low > MARGIN else "pass" if back.high < MARGIN else "inconclusive"
                 for name, back in zip(self.names, self.re_emerged, strict=True)}  # fmt: skip
        return {name: found.get(name, "inconclusive") for name in self.states[:-1]}

    def rows(self) -> list[tuple[str, ...]]:
        """The matrix as a table: a row per state, the share left of each request, and of what must stay."""
        return [(state, *(f"{share:.2f}" for share in (*row, kept)))
                for state, row, kept in zip(("none", *self.states), self.left, self.kept, strict=True)]  # fmt: skip

    def sentences(self) -> tuple[str, ...]:
        """What a reader needs to know, without the words that only a theorem allows."""
        own = np.array([self.left[self.states.index(name) + 1, k] for k, name in enumerate(self.names)])
        back, name = self.re_emerged[self.worst], self.names[self.worst]
        return (
            f"Right after its request {own.mean():.1%} of the knowledge is left on average (at most {own.max():.1%}); "
            f"over all later states {self.area:.1%}.",
            f"Most came back of '{name}': {back.point:+.1%} of what was known (limits {back.low:+.1%} to "
            f"{back.high:+.1%}).",
            f"What must stay: {self.kept[-1]:.1%} after the last request, {self.slope.point:+.2%} per request (limits "
            f"{self.slope.low:+.2%} to {self.slope.high:+.2%}).",
            f"Of requests not made yet at least {self.before:.1%} was known until their turn.",
            *self.left_out.values(),
        )


def look(
    model: LoadedModel, knowledge: Knowledge, requests: Mapping[str, Sequence[Item]], keep: Sequence[Item], *,
    forms: int = 2, alternatives: int = 31,
) -> Look:  # fmt: skip
    """Ask a model about every request's items and about what must stay, in question forms no editor saw.

    Cost: one pass over the prompts and one short row per alternative.  It measures behaviour alone: knowledge that is
    merely suppressed is found by ``repforget verify``.  Raises UsageError for an item that cannot be asked.
    """

    def asked(items: Sequence[Item]) -> ItemScores:
        found = ask.scores(items, ask.contrast(model, items, knowledge, forms=forms, limit=alternatives).probability)
        if not found.valid.all():
            name = found.ids[int(np.argmin(found.valid))]
            raise UsageError(f"Item '{name}' has no other answer to compare with or does not fit the context of "
                             f"'{model.name}': give it wrong_answers, or leave it out.")  # fmt: skip
        return found

    return Look({name: asked(items) for name, items in requests.items()}, asked(keep))


def stability(
    looks: Sequence[Look], floor: Look, states: Sequence[str] | None = None, left_out: Mapping[str, str] | None = None
) -> Stability:
    """The matrix of a sequence of requests: ``looks[0]`` before any of them, ``looks[j]`` after ``states[j - 1]``.

    Requests are in the order of ``looks[0].requests``, which are the states but for those ``left_out``; ``floor`` is a
    model that never knew.  Raises UsageError where looks do not fit each other, or a request was not known to begin
    with.  Source: MUSE's sustainability (Shi et al. 2024, arXiv 2407.06460), extended by the state before, by later
    requests and by limits over people.
    """
    names, left_out = tuple(looks[0].requests), left_out or {}
    states = names if states is None else tuple(states)
    if len(looks) != len(states) + 1 or names != tuple(n for n in states if n not in left_out) or any(
        tuple(each.requests) != names for each in (*looks, floor)
    ):
        raise UsageError(f"{len(looks)} states of {len(names)} requests do not fit: give one look before the first "
                         "request and one after each, all of the same requests in the same order.")  # fmt: skip
    own = [states.index(name) + 1 for name in names]
    gaps = {name: _gap(looks[0], floor, name) for name in names}
    left = np.array([[_share(each, floor, gaps[name], name) for name in names] for each in looks])
    back = tuple(ratio_interval(_values(looks[-1], name) - _values(looks[own[k]], name), gaps[name],
                                looks[0].requests[name].clusters) for k, name in enumerate(names))  # fmt: skip
    keep = np.array([each.keep.values for each in looks])
    steps = np.arange(len(looks)) - (len(looks) - 1) / 2
    slope = mean_interval(steps @ keep / (steps @ steps) / keep[0].mean(), looks[0].keep.clusters)
    later = [left[j, k] for k in range(len(names)) for j in range(own[k], len(looks))]
    early = [left[j, k] for k in range(len(names)) for j in range(own[k])]
    kept = keep.mean(axis=1) / keep[0].mean()
    return Stability(names, left, back, kept, slope, float(np.mean(later)), float(min(early)), states,
                     left_out)  # fmt: skip


def never_known(original: Look, floor: Look) -> dict[str, str]:
    """Requests of which the original knew no more than a model that never did, each with a sentence that says so."""
    return {name: f"{name.capitalize()} was known no better before any request than by a model that never knew: there "
                  "is nothing whose return could be seen, so that it is left out."
            for name in original.requests if (_values(original, name) - _values(floor, name)).mean() <= 0}  # fmt: skip


@dataclass(frozen=True)
class OneShot:
    """The requests one by one against all of them at once: differences in shares of knowledge and of what must stay.

    Positive ``knowledge``: the sequence leaves more behind than the one edit.
    """

    knowledge: Interval
    keep: Interval
    same: Equivalence


def one_shot(sequence: Look, joint: Look, original: Look, floor: Look, margin: float = MARGIN) -> OneShot:
    """Compare the last state of a sequence with one edit for all requests, paired by item; ``same`` tests both ways."""
    names = tuple(original.requests)
    clusters = [c for name in names for c in original.requests[name].clusters]
    gap = np.concatenate([_gap(original, floor, name) for name in names])
    more = np.concatenate([_values(sequence, name) - _values(joint, name) for name in names])
    share = ratio_interval(more, gap, clusters)
    kept = ratio_interval(sequence.keep.values - joint.keep.values, original.keep.values, original.keep.clusters)
    return OneShot(share, kept, equivalence(share, margin))


def order_spread(finals: Sequence[Look], original: Look, floor: Look) -> Array:
    """Standard deviation over orders [requests] of the share left after the last request (several orders, one seed).

    0 where the order does not matter; two orders give a difference rather than a spread.
    """
    if len(finals) < 2:
        raise UsageError("One order shows no spread: give the last states of at least two orders.")
    names = tuple(original.requests)
    shares = [[_share(each, floor, _gap(original, floor, name), name) for name in names] for each in finals]
    return np.asarray(np.std(shares, axis=0, ddof=1), dtype=np.float64)


def _values(each: Look, name: str) -> Array:
    return np.asarray(each.requests[name].values, dtype=np.float64)


def _gap(original: Look, floor: Look, name: str) -> Array:
    gap = _values(original, name) - _values(floor, name)
    if gap.mean() <= 0.0:
        raise UsageError(f"Request '{name}' was known no better before any request than by a model that never knew: "
                         "there is nothing whose return could be seen; leave it out.")  # fmt: skip
    return gap


def _share(each: Look, floor: Look, gap: Array, name: str) -> float:
    return float((_values(each, name) - _values(floor, name)).mean() / gap.mean())
