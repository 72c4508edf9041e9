"""How far to go along a direction: as far as what must stay allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from repforget.artifact import DenseDelta
from repforget.edit._collect import subsample
from repforget.edit.train._data import Row, fact_rows, text_rows
from repforget.edit.train._head import head_of
from repforget.edit.train._pass import LABELS, STATES, Request, read, swapped
from repforget.errors import KnowledgeError, NumericalError
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.training import Example

POSITIONS = 512  # per set, whose whole distributions are compared
ROWS = 64  # per forward
REACH = 8.0  # largest factor between two trials
CLOSE = 0.9  # share of the budget that is near enough to it


def examples(rows: Sequence[Row]) -> list[Example]:
    """Rows as texts to train on, loss on the answers."""
    return [Example(row.ids, tuple(i >= row.start for i in range(len(row.ids)))) for row in rows]


def divergence(model: LoadedModel, data: EditData, seed: int) -> Callable[[], float]:
    """A function that says how far the model has moved since now: KL(now || then), nats per token.

    The larger of two means, over answers of retained facts and over tokens of general texts, of some hundred
    predictions each.  Raises KnowledgeError where the editor was given neither.
    """
    sets = [fact_rows(model, subsample(data.retain, POSITIONS, seed), "retain")[0]] if data.retain else []
    sets += [text_rows(model, data.general, "general")] if data.general else []
    if not sets:
        raise KnowledgeError("There are neither retained facts nor general texts, so that no damage can be seen: give "
                             "the knowledge probe a set to keep.")  # fmt: skip
    chosen = [_some(rows, seed) for rows in sets]
    before = [[x.cpu() for x in _log_probs(model, rows)] for rows in chosen]

    def measure() -> float:
        return max(_divergence(then, _log_probs(model, rows)) for then, rows in zip(before, chosen, strict=True))

    return measure


def probability(model: LoadedModel, facts: Sequence[Fact], name: str, seed: int) -> Callable[[], float]:
    """A function that says the mean probability of the answers of (some hundred of) ``facts``."""
    rows = fact_rows(model, subsample(facts, POSITIONS, seed), name)[0]

    @torch.no_grad()
    def measure() -> float:
        sums = []
        for part in _parts(rows):
            (found,) = read(model, [Request(part, frozenset({LABELS}))])
            if found.scores is not None:
                sums.append(found.scores.sums.double())
        return float(torch.cat(sums).exp().mean())

    return measure


def _some(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows in an order of the seed, until they hold ``POSITIONS`` labels."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    out: list[Row] = []
    for index in order:
        if sum(row.labels for row in out) >= POSITIONS:
            break
        out.append(rows[index])
    return sorted(out, key=lambda row: (len(row.ids), row.ids))


def _parts(rows: Sequence[Row]) -> Iterator[tuple[Row, ...]]:
    return (tuple(rows[at : at + ROWS]) for at in range(0, len(rows), ROWS))


@torch.no_grad()
def _log_probs(model: LoadedModel, rows: Sequence[Row]) -> Iterator[Tensor]:
    head = head_of(model.module)
    for part in _parts(rows):
        (found,) = read(model, [Request(part, frozenset({STATES}))])
        if found.states is not None:
            yield head.logits(found.states).log_softmax(-1)


def _divergence(before: Sequence[Tensor], now: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for then, here in zip(before, now, strict=True):
        then = then.to(here.device)
        total += float((here.exp() * (here - then)).sum(-1).double().sum())
        count += len(here)
    return total / count


def longest(
    cost: Callable[[float], float], budget: float, first: float, trials: int, *,
    enough: Callable[[float], bool] = lambda step: False, progress: Progress | None = None,
) -> tuple[float, float]:  # fmt: skip
    """The largest of at most ``trials`` steps whose cost stays within the budget, and its cost.

    The cost is taken to grow like a power of the step (a divergence: its square at first), so that secants in the
    logarithm find the budget in a few trials.  ``enough(step)`` ends the search early, at a step within the budget.
    Raises NumericalError where no trial stayed within it.
    """
    step, good, bad = first, (0.0, 0.0), (math.inf, math.inf)
    for _ in track(progress, range(trials), "searching the step", trials):
        found = cost(step)
        if found <= budget:
            good = (step, max(found, 0.0)) if step > good[0] else good
            if enough(step) or found >= CLOSE * budget:
                break
        else:
            bad = (step, found)
        step = _following(good, bad, budget)
    if good[0] == 0.0:
        raise NumericalError(f"None of {trials} steps stayed within the budget of {budget:g} for what must stay (the "
                             f"smallest cost {bad[1]:.3g}): give a larger budget.")  # fmt: skip
    return good


def _following(good: tuple[float, float], bad: tuple[float, float], budget: float) -> float:
    aim = (1 + CLOSE) / 2 * budget
    if good[0] == 0.0:
        factor = math.sqrt(aim / bad[1]) if math.isfinite(bad[1]) else 0.0
        return bad[0] * min(0.5, max(1 / REACH, factor))
    if math.isinf(bad[0]):
        factor = math.sqrt(aim / good[1]) if good[1] > 0 else REACH
        return good[0] * min(REACH, max(1.25, factor))
    width = math.log(bad[0] / good[0])
    known = good[1] > 0 and math.isfinite(bad[1])
    share = math.log(aim / good[1]) / math.log(bad[1] / good[1]) if known and bad[1] > good[1] else 0.5
    return good[0] * math.exp(width * min(0.9, max(0.1, share)))


@dataclass(frozen=True, eq=False)
class Line:
    """The named parameters of a model on their way along ``directions``, in the layout of the parameters."""

    model: LoadedModel
    names: Sequence[str]
    directions: Sequence[Tensor]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        table = dict(self.model.module.named_parameters())
        return [table[name] for name in self.names]

    @contextmanager
    def moved(self, step: float) -> Iterator[list[Tensor]]:
        """The parameters after ``step`` directions while inside; their own tensors stay untouched."""
        there = [(p.data.to(torch.promote_types(d.dtype, torch.float32)) + step * d).to(p.dtype)
                 for p, d in zip(self.parameters, self.directions, strict=True)]  # fmt: skip
        with swapped(self.parameters, there):
            yield there

    def at(self, step: float, measure: Callable[[], float]) -> float:
        """What ``measure`` says after ``step`` directions."""
        with self.moved(step):
            return measure()

    def operations(self, step: float) -> list[DenseDelta]:
        """What ``step`` directions change, as the parameters' own precision lets them."""
        start = [p.detach().float() for p in self.parameters]
        with self.moved(step) as there:
            return [DenseDelta(name, after.float() - before)
                    for name, before, after in zip(self.names, start, there, strict=True)]  # fmt: skip


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all entries together."""
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))
