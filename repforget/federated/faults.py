"""What can be wrong with a client: how the server tells, and how to make it happen for a drill or a test."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from repforget.errors import UsageError, nearest
from repforget.federated.aggregate import lengths
from repforget.federated.clients import Worker
from repforget.federated.messages import MOST, Introduction, Reply, Task, shown
from repforget.federated.records import Update

Shapes = Mapping[str, tuple[int, ...]]
LARGEST = 1e15  # of an entry: two such factors are still a finite float32 weight
TIMES = 10.0  # an update may be as long as so many times the weights that it changes
FAR = 100.0  # times the median of the others: told, and used all the same
Kind = Literal["die", "late", "nan", "inf", "shape", "error"]


def fault_of(reply: Reply, round: int, member: Introduction, shapes: Shapes, norm: float) -> str | None:
    """Why this reply cannot be used in this round, or None; ``shapes`` are those of the tensors that it must hold.

    ``norm`` is the length of the weights in the base: an update of more than TIMES that (of TIMES, below 1) is not
    used.  No limit depends on what other clients send, so that who takes part does not either.
    """
    if reply.failed is not None or reply.update is None:
        return shown(reply.failed) if reply.failed else "sent no update"
    if reply.client != member.client or reply.round != round:
        return f"answered as '{shown(reply.client)}' for round {reply.round}"
    if reply.update.records != member.records:
        return f"answers for {reply.update.records} records and joined with {member.records}"
    sent = reply.update.tensors
    if strange := sorted(sent.keys() ^ shapes.keys()):
        return f"{'sent' if strange[0] in sent else 'left out'} '{shown(strange[0])}'"
    for name, shape in shapes.items():
        tensor = sent[name]
        if tensor.dtype not in (np.float32, np.float64):
            return f"sent '{name}' as {tensor.dtype}, not as float32 or float64"
        if tensor.shape != shape:
            return f"sent '{name}' with shape {tensor.shape} where {shape} was expected"
        if not np.isfinite(tensor).all():
            return f"sent NaN or infinite numbers in '{name}'"
        if tensor.size and float(np.abs(tensor).max()) > LARGEST:
            return f"sent a number above {LARGEST:g} in '{name}'"
    length = length_of(reply.update)
    if length > TIMES * max(norm, 1.0):
        return (f"sent a change of length {length:.3g} to weights of length {norm:.3g}, where at most {TIMES:g} times "
                "that is taken")  # fmt: skip
    return None


def length_of(update: Update) -> float:
    """Euclidean norm of the whole change."""
    return float(np.linalg.norm(list(lengths(update).values())))


def unusual(updates: Sequence[Update]) -> dict[str, str]:
    """Client -> what about its update is more than FAR times the median of the others; needs two others.

    It is told and used: an average follows whoever says that it has most records, and no check knows who is right.
    """
    found: dict[str, str] = {}
    measures = {"counts {:.3g} times as many records": [float(update.records) for update in updates],
                "sent a change {:.3g} times as long": [length_of(update) for update in updates]}  # fmt: skip
    for text, values in measures.items():
        for k, update in enumerate(updates):
            others = [value for j, value in enumerate(values) if j != k]
            middle = float(np.median(others)) if len(others) > 1 else 0.0
            if middle > 0 and values[k] > FAR * middle:
                found.setdefault(update.client, f"{text.format(values[k] / middle)} as the median of the others")
    return found


def admitted(
    members: Sequence[Introduction], base: str, tokenizer: str, most: int = MOST
) -> tuple[dict[str, Introduction], list[tuple[Introduction, str]]]:  # fmt: skip
    """Who may take part, by name, and why the others may not: no introduction, another base or tokenizer, more than
    ``most`` records or none."""
    welcome: dict[str, Introduction] = {}
    refused: list[tuple[Introduction, str]] = []
    for member in members:
        reason = member.fault
        if reason is None and member.base != base:
            reason = (f"has a base model with weights {shown(member.base, 12)} where the server has {base[:12]}: load "
                      "the same model")  # fmt: skip
        elif reason is None and member.tokenizer != tokenizer:
            reason = "has another tokenizer than the server: load the same model"
        elif reason is None and member.records > most:
            reason = f"claims more than {most} records, which would outweigh everybody else's"
        if reason is None:
            welcome[member.client] = member
        else:
            refused.append((member, reason))
    return welcome, refused


@dataclass(frozen=True)
class Fault:
    """One failure to be staged: what ``client`` does in ``round`` (from 1)."""

    client: str
    round: int
    kind: Kind

    @classmethod
    def parse(cls, text: str) -> Fault:
        """From ``CLIENT:ROUND:KIND``; UsageError for anything else."""
        client, _, rest = text.partition(":")
        number, _, kind = rest.partition(":")
        if not client or not number.isdigit():
            raise UsageError(f"The fault '{text}' is not CLIENT:ROUND:KIND, for example client-2:1:nan.")
        if kind not in get_args(Kind):
            raise UsageError(f"There is no fault '{kind}': {nearest(kind, get_args(Kind))}")
        return cls(client, int(number), kind)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Faulty:
    """A client that fails as told; ``patience`` is the server's, in seconds, for who is to be late."""

    worker: Worker
    faults: tuple[Fault, ...]
    patience: float

    @property
    def name(self) -> str:
        return self.worker.name

    def introduce(self) -> Introduction:
        return self.worker.introduce()

    def work(self, task: Task) -> Reply:
        kind = next((f.kind for f in self.faults if (f.client, f.round) == (self.name, task.round)), None)
        if kind == "die":
            os._exit(1)  # as a machine that is switched off: no farewell, no clean-up
        if kind == "late":
            time.sleep(self.patience + 1.0)
        if kind == "error":
            raise UsageError("a failure was staged")
        reply = self.worker.work(task)
        return reply if kind in (None, "late") else replace(reply, update=_spoiled(reply.update, kind))


def _spoiled(update: Update | None, kind: Kind | None) -> Update | None:
    if update is None:
        return None
    first = next(iter(sorted(update.tensors)))
    bad = np.array(update.tensors[first])
    if kind == "shape":
        bad = np.concatenate([bad, bad])
    else:
        bad.flat[0] = np.nan if kind == "nan" else np.inf
    return replace(update, tensors={**update.tensors, first: bad})
