"""What a private training says, for one unit and for a set of them, and from where on it says nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from repforget.guarantee import Guarantee, at_most
from repforget.private.accounting import SPENT_BY, group, reach

SIZES = (1, 2, 4, 8, 16, 32, 64)


def statement(epsilon: float, delta: float, unit: str, units: int, facts: Mapping[str, Any]) -> Guarantee:
    """The theorem of a finished private training on ``units`` units of the kind ``unit``."""
    what = "cluster: all records about one subject" if unit == "cluster" else "record"
    return Guarantee(
        kind="private",
        statement=f"The training is ({at_most(epsilon)}, {at_most(delta)})-differentially private: no outcome of it is "
                  f"more than {at_most(math.exp(epsilon))} times as likely plus {at_most(delta)}, with any one {unit} "
                  f"of the {units} in the training data as without it, or without as with.",
        unit=what,
        theorem=f"Abadi et al. 2016, arXiv 1607.00133 (DP-SGD); epsilon by {SPENT_BY[facts['accountant']]}",
        assumptions=(
            f"every record of a {unit} carries the same name, and nothing about it is in the base model or elsewhere "
            "in the data",
            "settings were chosen without looking at the data; the number of units may be known, from which the chance "
            "of a draw and the steps follow",
            "only the last weights are released: edit.json and train.json hold a digest of the data and its counts, a "
            "loss or a state of training says more, and a second training on the same data adds to epsilon",
            facts["secret"],
            "arithmetic of real numbers: rounding of the noise is not accounted for",
        ),
        numbers={"epsilon": epsilon, "delta": delta, "noise": facts["noise"], "clip": facts["clip"],
                 "rate": facts["rate"], "steps": float(facts["steps"]), "units": float(units)},
    )  # fmt: skip


def group_rows(epsilon: float, delta: float, units: int, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """For each number of units together, of ``units``: epsilon, delta, and whether that still says anything."""
    rows = []
    for k in sorted({min(k, units) for k in sizes}):
        many, chance = group(epsilon, delta, k)
        rows.append({"units": k, "epsilon": many, "delta": chance, "vacuous": chance >= 1.0})
    return rows


def group_report(epsilon: float, delta: float, unit: str, units: int, asked: int | None = None) -> str:
    """Sentences on a forget set of ``asked`` of the ``units`` (default: as many as are covered), the unit named."""
    most = min(units, reach(epsilon, delta))
    k = most if asked is None else min(units, asked)
    many, chance = group(epsilon, delta, k)
    plural = f"{unit}s" if k > 1 else unit
    if chance >= 1.0:
        first = f"A forget set of {k} {plural} is not covered: the statement on {k} {plural} together is vacuous."
    else:
        first = (f"A forget set of {k} {plural} is covered at epsilon {at_most(many)}, delta {at_most(chance)}, "
                 "without any edit.")  # fmt: skip
    beyond = f"all {units} are within it" if most == units else f"it is vacuous beyond {most} {unit}{'s' * (most > 1)}"
    return f"{first} By the rule of group privacy {beyond} (unit: {unit})."
