"""One forward over everything a step reads: forget and retain rows together, answer positions alone projected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repforget.edit.train._data import Row, Rows
from repforget.edit.train._head import Head, distribution, reduced, select_head
from repforget.edit.train._objective import Objective, Role, Scores
from repforget.models._hooking import run_forward
from repforget.models.capture import Batch, hooks
from repforget.models.load import LoadedModel
from repforget.records import Site
from repforget.scoring.encode import pad_id

LABELS, STATES, HIDDEN = "labels", "states", "hidden"  # what a request needs of the forward
NEEDS = {"own": LABELS, "instead": LABELS, "reference": LABELS, "instead_reference": LABELS, "logits": STATES,
         "teacher": STATES, "hidden": HIDDEN, "original": HIDDEN}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Term:
    """One weighted loss: an objective with its settings on the rows of a data set, for one side of the bargain.

    ``teachers``: per row, outcomes [labels, k] and log-probabilities [labels, k + 1] of them and of the rest, in place
    of what the untouched model says; such a term reads nothing else of that model.
    """

    objective: Objective
    settings: Mapping[str, Any]
    side: Role
    weight: float
    data: Rows
    layers: tuple[int, ...] = ()
    teachers: Sequence[tuple[Tensor, Tensor]] | None = None

    def reads(self, *names: str) -> bool:
        return any(name in self.objective.reads for name in names)

    def count(self, own: Sequence[Row], instead: Sequence[Row]) -> int:
        """What the sum of this term's values is divided by, over the rows of a whole step."""
        if self.objective.reduction == "whole":
            return 1
        if self.objective.reduction != "token_mean":
            return len(own)
        if self.reads("hidden"):
            return sum(len(row.ids) - 1 for row in own)
        return sum(row.labels for row in (own if self.reads("own", "logits") else instead))


@dataclass(frozen=True)
class Request:
    """Rows and what is needed of them."""

    rows: tuple[Row, ...]
    needs: frozenset[str]
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Reading:
    """What one forward says about the rows of a request; tokens of all rows one after the other.

    ``states`` [m, d] are what the vocabulary projection of token ``labels[k]`` reads, at place ``place[k]`` of the
    answer of row ``row[k]``; ``hidden`` [h, l, d] are residual states of all tokens but each row's first.
    """

    row: Tensor
    labels: Tensor
    place: Tensor
    n: int
    scores: Scores | None = None
    states: Tensor | None = None
    hidden: Tensor | None = None


class _Deep(Exception):
    """Not an error: everything is read and the layers above need not run."""


def read(model: LoadedModel, requests: Sequence[Request]) -> list[Reading]:
    """Answer every request from one forward pass; equal rows run once.  Gradients follow the surrounding mode."""
    index: dict[tuple[int, ...], int] = {}
    for request in requests:
        for row in request.rows:
            index.setdefault(row.ids, len(index))
    batch = Batch.pad(list(index), pad_id(model.tokenizer)).to(model.device)
    layers = sorted({layer for request in requests for layer in request.layers})
    projected = any(request.needs & {LABELS, STATES} for request in requests) \
        or hasattr(model.module, "reshard")  # a model in shards is run to its end
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def visit(value: Tensor) -> None:
            found[layer] = value
            if not projected and layer == layers[-1]:
                raise _Deep

        return visit

    seen = {Site("resid_post", layer): keep(layer) for layer in layers}
    with hooks(model, seen), select_head(model.module) as head, suppress(_Deep):
        run_forward(model.module, batch, vocabulary=True)
    out = []
    for request in requests:
        places = _places(request.rows, index, model.device)
        states = head.states[places.sequence, places.position] if request.needs & {LABELS, STATES} else None
        scores = None
        if LABELS in request.needs and states is not None:
            scores = Scores(head.head.label_logprobs(states, places.label), places.row, len(request.rows))
        hidden = None
        if request.layers:
            inside = _inside(request.rows, index, model.device)
            hidden = torch.stack([found[layer][inside] for layer in request.layers], dim=1)
        out.append(Reading(places.row, places.label, places.place, len(request.rows), scores, states, hidden))
    return out


@dataclass(frozen=True)
class _Places:
    sequence: Tensor
    position: Tensor
    label: Tensor
    row: Tensor
    place: Tensor


def _places(rows: Sequence[Row], index: Mapping[tuple[int, ...], int], device: torch.device) -> _Places:
    """Where the answer tokens of rows are predicted: one entry per answer token."""
    table = [(index[row.ids], at - 1, row.ids[at], number, at - row.start)
             for number, row in enumerate(rows) for at in range(row.start, len(row.ids))]  # fmt: skip
    columns = torch.tensor(table, dtype=torch.long).reshape(-1, 5).T.to(device)
    return _Places(*columns)


def _inside(rows: Sequence[Row], index: Mapping[tuple[int, ...], int], device: torch.device) -> tuple[Tensor, Tensor]:
    table = [(index[row.ids], at) for row in rows for at in range(1, len(row.ids))]
    columns = torch.tensor(table, dtype=torch.long).reshape(-1, 2).T.to(device)
    return columns[0], columns[1]


def repeated(own: Sequence[Row], instead: Sequence[Row]) -> Tensor:
    """For each answer token of ``own`` the token that the other answer, said over and over, has at its place [m]."""
    out: list[int] = []
    for row, other in zip(own, instead, strict=True):
        said = other.ids[other.start :]
        out += [said[k % len(said)] for k in range(row.labels)]
    return torch.tensor(out)


def request_of(term: Term, rows: Sequence[Row], side: str) -> Request:
    """What a term needs of its own rows, or of those with another answer ("instead")."""
    names = ("instead",) if side == "instead" else ("own", "logits", "hidden")
    needs = frozenset(NEEDS[name] for name in names if term.reads(name))
    return Request(tuple(rows), needs, term.layers if HIDDEN in needs else ())


@dataclass(frozen=True, eq=False)
class Known:
    """What the untouched model says about the rows of a term: log-probabilities, teacher, hidden states."""

    reference: Scores | None = None
    instead_reference: Scores | None = None
    teacher: Tensor | None = None  # [m, V] or, reduced to the outcomes ``outcomes`` [m, k], [m, k + 1]
    outcomes: Tensor | None = None
    original: Tensor | None = None
    pattern: Tensor | None = None  # [m] the tokens of another answer, repeated along the own one


def values(
    term: Term, head: Head, own: Reading | None, instead: Reading | None, known: Known, given: Mapping[str, Any]
) -> Tensor:
    """The unreduced values of a term: [m] per token, [n] per sequence, or [1]."""
    objective = term.objective
    offered: dict[str, Any] = {
        "own": own and own.scores, "instead": instead and instead.scores, "reference": known.reference,
        "instead_reference": known.instead_reference, "hidden": own and own.hidden, "original": known.original,
        **{name: given.get(name) for name in ("drift", "importance")},
    }  # fmt: skip
    given = {**given, "rest": known.outcomes is not None}
    settings = {**term.settings, **{name: given[name] for name in objective.given}}
    if not term.reads("logits"):
        return objective.function(*(offered[name] for name in objective.reads), **settings)
    if own is None or own.states is None:
        raise RuntimeError(f"the rows of '{objective.name}' were not read")
    reading = own

    def chunk(logits: Tensor, part: slice) -> Tensor:
        labels = reading.labels[part]
        if known.outcomes is not None:  # the teacher is known for its top outcomes only
            kept = known.outcomes[part]
            logits, labels = reduced(logits, kept), (kept == labels[:, None]).int().argmax(1)
        own_part = {"logits": logits, "labels": labels, "place": reading.place[part]}
        for name, whole in (("teacher", known.teacher), ("pattern", known.pattern)):
            own_part |= {} if whole is None else {name: whole[part]}
        return objective.function(*(own_part.get(name, offered.get(name)) for name in objective.reads), **settings)

    return distribution(own.states, head, chunk)


@contextmanager
def swapped(parameters: Sequence[Tensor], originals: Sequence[Tensor]) -> Iterator[None]:
    """Put the original values in the place of the trained ones while inside; no copy of the model is made."""
    trained = [p.data for p in parameters]
    try:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
        yield
    finally:
        for parameter, own in zip(parameters, trained, strict=True):
            parameter.data = own
