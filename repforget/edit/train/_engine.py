"""The gradients of one step: terms read from one forward, compared with what the untouched model says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from repforget.edit.train._data import Row, step_plan
from repforget.edit.train._head import head_of, summed, topk_teacher
from repforget.edit.train._objective import Role, Scores
from repforget.edit.train._parts import Taken, shares, those
from repforget.edit.train._pass import (
    HIDDEN,
    LABELS,
    STATES,
    Known,
    Reading,
    Request,
    Term,
    read,
    repeated,
    request_of,
    swapped,
    values,
)
from repforget.edit.train._processes import Processes
from repforget.edit.train._shards import Shards
from repforget.models.load import LoadedModel
from repforget.training.optimizers import drawn_loss

Gradients = dict[str, list[Tensor]]
TEACHER_BYTES = 1 << 28  # of full teacher distributions held; beyond, the most likely outcomes only
OUTCOMES = 64
DRAWN = 1 << 26  # logits from which the curvature of a step is read
READ_ROWS = 64  # rows per forward of the untouched model
NORM_ROWS = 256  # forget rows whose states measure their usual length


@dataclass
class Engine:
    """Everything a step needs; ``untouched`` puts the original model in the place of the trained one while inside."""

    model: LoadedModel
    terms: tuple[Term, ...]
    parameters: list[Tensor]
    originals: list[Tensor]
    untouched: Callable[[], AbstractContextManager[Any]]
    sizes: tuple[int, ...]
    steps: int
    seed: int
    accumulate: int = 1
    teacher: str = "auto"
    clamp: float | None = None
    processes: Processes = field(default_factory=Processes.launched)
    shards: Shards | None = None
    losses: dict[str, float] = field(default_factory=dict)  # of the last gradients, by side
    _cache: dict[tuple[int, str, int], Any] = field(default_factory=dict)

    @cached_property
    def plan(self) -> list[tuple[tuple[int, ...], ...]]:
        lengths = [[len(row.ids) for row in term.data.own] for term in self.terms]
        return step_plan(lengths, self.sizes, self.steps, self.seed)

    @cached_property
    def sides(self) -> tuple[Role, ...]:
        return tuple(dict.fromkeys(term.side for term in self.terms))

    @torch.no_grad()
    def prepare(self) -> None:
        """Ask the untouched model, once, about every row that a step will compare with it."""
        for k, term in enumerate(self.terms):
            if term.teachers is not None:
                self._cache.update({(k, "teacher", i): made for i, made in enumerate(term.teachers)})
                continue
            visited = sorted({i for step in self.plan for i in step[k]})
            for side, names in (("own", ("reference", "teacher", "original")), ("instead", ("instead_reference",))):
                if not term.reads(*names) or self._live(term, side):
                    continue
                rows = [term.data.own[i] if side == "own" else term.data.instead(0, i) for i in visited]  # type: ignore[misc]
                for at in range(0, len(rows), READ_ROWS):
                    self._ask(k, term, side, rows[at : at + READ_ROWS], visited[at : at + READ_ROWS])
        for term in self.terms:
            if "norms" in term.objective.given:
                self._norms(term)

    def _live(self, term: Term, side: str) -> bool:
        """True where the untouched model is asked at every step: for answers that change, or where that was chosen."""
        if side == "instead":
            return not term.data.fixed
        return self.teacher == "live" and term.teachers is None and term.reads("teacher", "original")

    def _ask(self, k: int, term: Term, side: str, rows: Sequence[Row], numbers: Sequence[int]) -> None:
        (found,) = read(self.model, [_about(term, rows, side)])
        counts = [row.labels for row in rows]
        if found.scores is not None:
            name = "reference" if side == "own" else "instead_reference"
            for number, part in zip(numbers, torch.split(found.scores.logprob, counts), strict=True):
                self._cache[k, name, number] = part.cpu()
        if found.hidden is not None:
            for number, part in zip(numbers, torch.split(found.hidden, [len(r.ids) - 1 for r in rows]), strict=True):
                self._cache[k, "original", number] = part.cpu()
        if found.states is not None and term.reads("teacher"):
            self._keep_teacher(k, term, found, counts, numbers)

    def _keep_teacher(
        self, k: int, term: Term, found: Reading, counts: list[int], numbers: Sequence[int]
    ) -> None:
        head = head_of(self.model.module)
        tokens = sum(row.labels for row in term.data.own)
        states = found.states
        assert states is not None  # the request asked for them
        if 4 * tokens * head.size <= TEACHER_BYTES:
            parts: list[Any] = list(torch.split(head.logits(states).log_softmax(-1).cpu(), counts))
        else:
            kept = topk_teacher(states, head, found.labels, OUTCOMES)
            pieces = (torch.split(x.cpu(), counts) for x in (kept.indices, kept.logp))
            parts = list(zip(*pieces, strict=True))
        for number, part in zip(numbers, parts, strict=True):
            self._cache[k, "teacher", number] = part

    def known(self, k: int, term: Term, own: Sequence[Row], instead: Sequence[Row], numbers: Sequence[int]) -> Known:
        """What the untouched model says about these rows: remembered, or asked now."""
        device = self.model.device
        reference = other = teacher = outcomes = original = None
        if self._live(term, "own") or (term.reads("instead_reference") and self._live(term, "instead")):
            with torch.no_grad(), self.untouched():
                for side, rows in (("own", own), ("instead", instead)):
                    if self._live(term, side) and rows:
                        self._ask(k, term, side, rows, numbers)

        def joined(name: str) -> Tensor:
            return torch.cat([self._cache[k, name, i] for i in numbers]).to(device)

        if term.reads("reference"):
            reference = Scores(joined("reference"), _rows_of(own, device), len(own))
        if term.reads("instead_reference"):
            other = Scores(joined("instead_reference"), _rows_of(instead, device), len(instead))
        if term.reads("original"):
            original = joined("original")
        if term.reads("teacher"):
            parts = [self._cache[k, "teacher", i] for i in numbers]
            if isinstance(parts[0], tuple):
                outcomes, teacher = (torch.cat([p[j] for p in parts]).to(device) for j in (0, 1))
            else:
                teacher = torch.cat(parts).to(device)
        pattern = repeated(own, instead).to(device) if term.reads("pattern") else None
        return Known(reference, other, teacher, outcomes, original, pattern)

    def rows(self, index: int, k: int) -> tuple[list[int], list[Row], list[Row]]:
        """The rows that step ``index`` takes of term ``k``: their numbers, themselves, with another answer."""
        numbers, data = list(self.plan[index][k]), self.terms[k].data
        instead = [data.instead(index, i) for i in numbers] if data.instead is not None else []
        return numbers, [data.own[i] for i in numbers], instead

    def gradients(self, index: int, sides: Sequence[str], only: Callable[[Row], bool] | None = None) -> Gradients:
        """Gradients of the weighted losses of step ``index``, per side; "all" is the sum of both.

        Values are summed over parts and processes and divided by the counts of the whole step, so that the result
        does not depend on how the step was cut.  Sides that are not asked for are not read, and their ``losses`` stay;
        ``only`` says which of the step's rows are taken.
        """
        asked = self.sides if "all" in sides else tuple(side for side in self.sides if side in sides)
        totals: dict[str, list[Tensor | None]] = {side: [None] * len(self.parameters) for side in sides}
        losses: dict[str, float] = dict.fromkeys(asked, 0.0)
        taken = [self.rows(index, k) if term.side in asked else ([], [], []) for k, term in enumerate(self.terms)]
        whole = taken if only is None else [those(only, *rows) for rows in taken]
        mine = shares(self.terms, whole, self.model.device.type, self.accumulate, self.processes)
        for number, (part, counts) in enumerate(mine):
            self._read_part(index, part, counts, number, totals, losses)
        total = self.processes.total if self.shards is None else list  # those of shards are added up already
        found = {side: total([torch.zeros_like(p, dtype=_wide(p)) if g is None else g
                              for p, g in zip(self.parameters, totals[side], strict=True)]) for side in sides}
        if self.processes.world > 1:
            (sums,) = self.processes.total([torch.tensor(list(losses.values()), dtype=torch.float64)])
            losses = dict(zip(losses, sums.tolist(), strict=True))
        self.losses = {**self.losses, **losses}
        return found

    def _read_part(
        self, index: int, part: Sequence[Taken], counts: Sequence[float], number: int,
        totals: Mapping[str, list[Tensor | None]], losses: dict[str, float],
    ) -> None:  # fmt: skip
        """Add one part's gradients and losses to those of the step; nothing of it is held afterwards."""
        with torch.enable_grad(), _looked_up(self.model.module, self.parameters):
            by_side = self._losses(index, part, counts, number, tuple(losses))
            for side, loss in by_side.items():
                losses[side] += float(loss.detach())
            self._add(totals, by_side)

    def _add(self, totals: Mapping[str, list[Tensor | None]], by_side: Mapping[str, Tensor]) -> None:
        """Add the gradients of one part's losses to the totals, each as soon as it is there."""
        wanted = {side: sum(by_side.values()) if side == "all" else by_side.get(side) for side in totals}
        todo = [(side, loss) for side, loss in wanted.items() if isinstance(loss, Tensor) and loss.requires_grad]
        for number, (side, loss) in enumerate(todo, 1):
            if self.shards is not None:
                self.shards.backward(loss)
                for place, parameter in enumerate(self.parameters):
                    _take(totals[side], place, parameter)
                continue
            with ExitStack() as stack:
                stack.enter_context(summed(self.parameters, totals[side]))
                for place, parameter in enumerate(self.parameters):
                    parameter.grad = None
                    take = partial(_take, totals[side], place)
                    handle = parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
                torch.autograd.backward(loss, retain_graph=number < len(todo), inputs=self.parameters)

    def _losses(
        self, index: int, taken: Sequence[Taken], counts: Sequence[float], part: int, asked: Sequence[str]
    ) -> dict[str, Tensor]:
        """The weighted losses by side of one part of a step."""
        requests: list[Request] = []
        places: list[tuple[int | None, int | None]] = []
        for term, (_, own, instead) in zip(self.terms, taken, strict=True):
            sides: list[int | None] = []
            for side, rows in (("own", own), ("instead", instead)):
                wanted = request_of(term, rows, side)
                sides.append(len(requests) if wanted.needs and rows else None)
                if sides[-1] is not None:
                    requests.append(wanted)
            places.append((sides[0], sides[1]))
        readings = read(self.model, requests) if requests else []
        total: dict[str, Tensor] = {}
        head = head_of(self.model.module)
        for k, (term, (numbers, own, instead)) in enumerate(zip(self.terms, taken, strict=True)):
            mine = [None if at is None else readings[at] for at in places[k]]
            whole = term.objective.reduction == "whole" and term.side in asked
            if not any(mine) and not (whole and part == 0 and self.processes.rank == 0):
                continue
            found = values(term, head, mine[0], mine[1], self.known(k, term, own, instead, numbers),
                           self._given(index, term))  # fmt: skip
            if self.clamp is not None and term.side == "forget":
                found = found.clamp(min=-self.clamp)
            loss = term.weight * found.sum() / counts[k]
            total[term.side] = total[term.side] + loss if term.side in total else loss
        return total

    def _given(self, index: int, term: Term) -> dict[str, Any]:
        out: dict[str, Any] = {"seed": self.seed, "done": index / max(1, self.steps)}
        if "norms" in term.objective.given:
            out["norms"] = self._norms(term)
        if term.reads("drift"):
            out["drift"] = [p - o for p, o in zip(self.parameters, self.originals, strict=True)]
        if term.reads("importance"):
            out["importance"] = self.importance
        return out

    @torch.no_grad()
    def _norms(self, term: Term) -> Tensor:
        """Mean length [l] of the untouched model's states at the term's layers over some hundred of its rows."""
        key = (-1, f"norms-{term.layers}-{term.data.name}", 0)
        if key not in self._cache:
            rows = term.data.own[:NORM_ROWS]
            with self.untouched():
                found = [read(self.model, [Request(rows[at : at + READ_ROWS], frozenset({HIDDEN}), term.layers)])[0]
                         for at in range(0, len(rows), READ_ROWS)]  # fmt: skip
            lengths = [x.hidden.double().norm(dim=-1) for x in found if x.hidden is not None]
            self._cache[key] = torch.cat(lengths).mean(0).float()
        return self._cache[key]  # type: ignore[no-any-return]

    @cached_property
    def importance(self) -> list[Tensor]:
        """Mean squared gradient, at the start, of the log-likelihood per answer token of (some) single retained rows:
        the diagonal of the empirical Fisher.  An adapter counts where it starts, which is the untouched model too."""
        rows = next(term.data.own for term in self.terms if term.reads("importance"))
        rows = rows[:: -(-len(rows) // READ_ROWS)]
        out = [torch.zeros_like(p, dtype=_wide(p)) for p in self.parameters]
        with swapped(self.parameters, self.originals), torch.enable_grad():
            for row in rows:
                loss = self.nll([row])
                for total, g in zip(out, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
                    if g is not None:
                        total.add_(g.to(total.dtype).square() / len(rows))
        return out

    def drawn(self, index: int) -> tuple[list[Tensor | None], int]:
        """Gradients of the mean loss at labels that the model draws at the answers of step ``index``; their number."""
        rows = [row for k in range(len(self.terms)) for row in self.rows(index, k)[1]]
        head, generator = head_of(self.model.module), torch.Generator().manual_seed(hash((self.seed, index)) % 2**63)
        ends = itertools.accumulate(row.labels for row in rows)
        few = [row for row, end in zip(rows, ends, strict=True) if end * head.size <= DRAWN] or rows[:1]
        with torch.enable_grad():
            (found,) = read(self.model, [Request(tuple(few), frozenset({STATES}))])
            assert found.states is not None  # the request asked for them
            loss = drawn_loss(head.logits(found.states), generator)
            return list(torch.autograd.grad(loss, self.parameters, allow_unused=True)), len(found.labels)

    def nll(self, rows: Sequence[Row]) -> Tensor:
        """Mean negative log-probability per answer token of rows (nats), with gradient."""
        (found,) = read(self.model, [Request(tuple(rows), frozenset({LABELS}))])
        assert found.scores is not None  # the request asked for them
        return -found.scores.logprob.mean()


@dataclass(frozen=True)
class StepContext:
    """What a robust wrapper sees of a step; ``gradients`` are those of the wrappers inside it."""

    engine: Engine
    index: int
    inner: Callable[[Sequence[str]], Gradients]

    @property
    def model(self) -> LoadedModel:
        return self.engine.model

    @property
    def parameters(self) -> list[Tensor]:
        return self.engine.parameters

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.engine.seed, self.index)) % 2**63)

    def gradients(
        self, sides: Sequence[str] = ("forget", "retain"), only: Callable[[Row], bool] | None = None
    ) -> Gradients:
        """Those of the wrappers inside this one; of some rows of the step ``only``, the plain ones."""
        return self.inner(sides) if only is None else self.engine.gradients(self.index, sides, only)

    def loss(self, side: str) -> float:
        """Loss of a side at the last gradients."""
        return self.engine.losses.get(side, 0.0)

    def rows(self, side: str) -> list[Row]:
        terms = self.engine.terms
        return [row for k, term in enumerate(terms) if term.side == side for row in self.engine.rows(self.index, k)[1]]

    def nll(self, rows: Sequence[Row]) -> Tensor:
        return self.engine.nll(rows)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the parameters back bit for bit on the way out."""
        saved = [p.detach().clone() for p in self.parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for p, s in zip(self.parameters, saved, strict=True):
                    p.copy_(s)


def _about(term: Term, rows: Sequence[Row], side: str) -> Request:
    """What has to be asked of the untouched model about rows of a term."""
    names = {LABELS: ("reference",), STATES: ("teacher",), HIDDEN: ("original",)} if side == "own" else \
        {LABELS: ("instead_reference",)}  # fmt: skip
    needs = frozenset(need for need, readers in names.items() if term.reads(*readers))
    return Request(tuple(rows), needs, term.layers if HIDDEN in needs else ())


def _rows_of(rows: Sequence[Row], device: torch.device) -> Tensor:
    counts = torch.tensor([row.labels for row in rows])
    return torch.repeat_interleave(torch.arange(len(rows)), counts).to(device)


@contextmanager
def _looked_up(module: Any, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a trained token embedding has gradients of the rows that were read alone, not of its whole vocabulary."""
    table = module.get_input_embeddings()
    before = getattr(table, "sparse", None)
    if before is None or not any(p is table._parameters.get("weight") for p in parameters):
        yield
        return
    table.sparse = True
    try:
        yield
    finally:
        table.sparse = before


def _take(totals: list[Tensor | None], place: int, parameter: Tensor) -> None:
    """Move the gradient of a parameter to its total."""
    gradient, parameter.grad, total = parameter.grad, None, totals[place]
    if gradient is None:
        return
    if gradient.is_sparse:
        total = torch.zeros_like(parameter, dtype=_wide(parameter)) if total is None else total
        totals[place] = total.index_add_(0, gradient._indices()[0], gradient._values().to(total.dtype))
    else:
        totals[place] = gradient.to(_wide(parameter)) if total is None else total.add_(gradient)


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
