"""How the rows of one step are cut into parts of like length, so that little is padded and little is held at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repforget.edit.train._data import Row
from repforget.edit.train._pass import Term, request_of
from repforget.edit.train._processes import Processes

Taken = tuple[Sequence[int], Sequence[Row], Sequence[Row]]  # rows of a term: their numbers, themselves, another answer
Text = tuple[int, ...]


def those(
    only: Callable[[Row], bool], numbers: Sequence[int], own: Sequence[Row], instead: Sequence[Row]
) -> Taken:
    """Of the rows taken of a term, the ones wanted."""
    kept = [i for i, row in enumerate(own) if only(row)]
    return [numbers[i] for i in kept], [own[i] for i in kept], [instead[i] for i in kept] if instead else []


@dataclass(frozen=True)
class Budget:
    """Padded ``tokens`` that a part has at most (one unit may have more), and what one more part costs, in tokens."""

    tokens: int
    extra: int


BUDGETS = {"cpu": Budget(512, 64)}  # one more part writes every gradient once more
ACCELERATOR = Budget(16384, 2048)  # small parts would leave most of it idle


def shares(
    terms: Sequence[Term], rows: Sequence[Taken], device: str, least: int, processes: Processes
) -> list[tuple[list[Taken], Sequence[float]]]:
    """The parts of a step that this process reads, and what the sum of each term's values is divided by.

    With a model in shards all processes have the same parts with rows of the same terms; one that has no row of its
    own reads another's, divided by infinity.
    """
    counts = [max(1, term.count(own, instead)) for term, (_, own, instead) in zip(terms, rows, strict=True)]
    share = processes.share
    if not processes.sharded:
        mine = [(share(numbers), share(own), share(instead)) for numbers, own, instead in rows]
        return [(part, counts) for part in parts(terms, mine, device, least)]
    return [([(share(n) or n[:1], share(own) or own[:1], share(instead) or instead[:1]) for n, own, instead in part],
             [count if share(n) else math.inf for (n, _, _), count in zip(part, counts, strict=True)])
            for part in parts(terms, rows, device, least, processes.world)]  # fmt: skip


def parts(
    terms: Sequence[Term], rows: Sequence[Taken], device: str, least: int, together: int = 1
) -> list[list[Taken]]:
    """Cut the rows of all terms into ``least`` parts or more (never none); each has rows of all terms, or of some.

    ``together`` processes share out each part.
    """
    budget = BUDGETS.get(device, ACCELERATOR)
    budget = Budget(budget.tokens * together, budget.extra * together)
    asked = [[bool(request_of(term, (), side).needs) for side in ("own", "instead")] for term in terms]
    units, texts = [], []
    for k, (numbers, own, instead) in enumerate(rows):
        for i in range(len(numbers)):
            run = [x[i].ids for x, wanted in zip((own, instead), asked[k], strict=True) if wanted and x]
            if run:
                units.append((k, i))
                texts.append(run)
    out: list[list[Taken]] = []
    for chosen in cut(texts, budget, least) or [[]]:
        places = [sorted(units[j][1] for j in chosen if units[j][0] == k) for k in range(len(rows))]
        out.append([([numbers[i] for i in at], [own[i] for i in at], [instead[i] for i in at] if instead else [])
                    for (numbers, own, instead), at in zip(rows, places, strict=True)])  # fmt: skip
    return out


def cut(units: Sequence[Sequence[Text]], budget: Budget, least: int = 1) -> list[list[int]]:
    """Numbers of the ``units`` of each part, shortest first, with the fewest padded tokens in all.

    A unit is the texts that must run together.  With ``least`` above 1 no part holds more than that share of the
    tokens.  Units with the same first text stay together, since equal texts run once.
    """
    order = sorted(range(len(units)), key=lambda i: (_width(units[i]), units[i]))
    whole = sum(len(text) for unit in units for text in unit)
    most = budget.tokens if least == 1 else min(budget.tokens, -(-whole // least))
    best = [(0, 0)]  # of the first j units: what they cost, and where their last part starts; it is as wide as unit j
    for stop in range(1, len(order) + 1):
        width, size, found = _width(units[order[stop - 1]]), 0, None
        for start in range(stop - 1, -1, -1):
            size += len(units[order[start]]) * width
            if size > most and found is not None:
                break
            if start and units[order[start]][0] == units[order[start - 1]][0]:
                continue
            cost = best[start][0] + size + budget.extra
            if found is None or cost < found[0]:
                found = cost, start
        best.append(found or (0, 0))
    out: list[list[int]] = []
    stop = len(order)
    while stop:
        stop, end = best[stop][1], stop
        out.insert(0, order[stop:end])
    return out


def _width(unit: Sequence[Text]) -> int:
    return max(len(text) for text in unit)
