"""The clients of a finished training asked once more, wherever they are; every answer is kept until all is done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from repforget.errors import NumericalError, ResourceError
from repforget.federated.clients import shapes_of, untouched, weights_norm
from repforget.federated.door import ATTEMPTS, Door
from repforget.federated.faults import fault_of
from repforget.federated.forget import Weights
from repforget.federated.messages import Introduction, Packed, Reply, Task, pack_reply, pack_task, size, unpack_reply
from repforget.federated.records import Update
from repforget.federated.server import Plan
from repforget.models.load import LoadedModel
from repforget.store import Store

ANSWER, HEAD, TENSORS = "answer", "head.json", "tensors.safetensors"


@dataclass
class Again:
    """Who is asked through ``door``, what that costs, and where in ``kept`` each answer lies.

    All clients of a round (``group`` of its 0-based number) are asked together, when its first update is wanted.  An
    answer that is kept already, to the same question, is read instead.
    """

    base: LoadedModel
    plan: Plan
    door: Door
    kept: Store
    group: Callable[[int], Sequence[str]]
    apart: bool = False  # the clients are elsewhere: they may come back, and are waited for
    rounds: dict[int, dict[str, Path]] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    seconds: float = 0.0

    def unlearn(self, name: str, weights: Weights, editor: str) -> Update:
        """The update by which a client takes its own records out of the global ``weights``."""
        task = Task(0, self.plan.local, weights, "unlearn", {"editor": editor})
        return _update(self._answers(task, [name])[name])

    def train(self, name: str, weights: Weights, number: int, share: float) -> Update:
        """The update of one client to the global ``weights`` in the 0-based round ``number``; checked like any."""
        if number not in self.rounds:
            task = Task(number + 1, replace(self.plan.local, share=share), weights)
            self.rounds[number] = self._answers(task, self.group(number))
        return _update(self.rounds[number][name])

    def updates(self, number: int) -> list[Update]:
        """What was trained in a round, read again: no more than one round is ever in memory."""
        return [_update(place) for place in self.rounds.get(number, {}).values()]

    def _answers(self, task: Task, names: Sequence[str]) -> dict[str, Path]:
        """Where the answers of the named clients lie, asked for as often as they may be."""
        packed = pack_task(task)
        keys = {name: {"client": name, "task": _sha(packed), "base": self.base.fingerprint} for name in names}
        attempt = 0
        while True:
            found = {name: place for name, key in keys.items() if (place := self._place(key)) is not None}
            if not (missing := [name for name in names if name not in found]):
                break
            attempt += 1
            for name, reason in self._asked(task, missing, keys).items():
                if self.apart and attempt < ATTEMPTS:
                    self.door.note(f"{_named(task)}: client '{name}' {reason}; it is asked again")
                    continue
                text = f"Client '{name}' was asked to {'train again' if task.round else 'unlearn'} and {reason}: "
                if self.apart:
                    raise ResourceError(f"{text}nothing was changed; bring it back and give the same command.")
                raise NumericalError(f"{text}nothing was changed.")
        for place in found.values():
            reply = _read(place)
            self.seconds, self.up = self.seconds + reply.seconds, self.up + reply.up
        self.down += size(packed) * len(found)
        return found

    def _asked(self, task: Task, missing: Sequence[str], keys: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Ask, and keep every good answer as it comes; who failed and why."""
        members = self.door.gathered(lambda here: here.keys() >= set(missing), " and ".join(map(repr, missing)))
        if absent := [name for name in missing if name not in members]:
            why = self.door.refused.get(absent[0], f"did not join in {self.door.fleet.wait:g} s")
            raise ResourceError(f"{_named(task)} lacks client '{absent[0]}' (it {why}): bring it back and give the "
                                "same command; what is finished is kept.")  # fmt: skip
        failed: dict[str, str] = {}
        shapes = {name: value.shape for name, value in untouched(self.base, task.local).items()}
        shapes = shapes if task.kind == "unlearn" else shapes_of(self.base, task.local)
        norm = weights_norm(self.base, task.local)

        def fault(reply: Reply, member: Introduction) -> str | None:
            return fault_of(reply, task.round, member, shapes, norm)

        for reply, reason in self.door.ask(task, {name: members[name] for name in missing}, fault):
            if reason is None:
                self._keep(keys[reply.client], reply)
            else:
                failed[reply.client] = reason
        return failed

    def _place(self, key: Mapping[str, str]) -> Path | None:
        """Where the answer of this key lies, whole; None where there is none."""
        try:
            return self.kept.stage(ANSWER, key, _none)
        except _NoAnswerError:
            return None

    def _keep(self, key: Mapping[str, str], reply: Reply) -> None:
        def build(folder: Path) -> None:
            head, tensors = pack_reply(reply)
            (folder / HEAD).write_text(head, encoding="utf-8")
            (folder / TENSORS).write_bytes(tensors)

        self.kept.stage(ANSWER, key, build)


class _NoAnswerError(Exception):
    """Nothing is kept that would answer the question."""


def _none(folder: Path) -> None:
    raise _NoAnswerError


def _named(task: Task) -> str:
    return f"Round {task.round}" if task.round else "Unlearning"


def _update(place: Path) -> Update:
    reply = _read(place)
    if reply.update is None:
        raise NumericalError(f"The answer in '{place}' holds no update: remove it and give the same command.")
    return reply.update


def _read(place: Path) -> Reply:
    return unpack_reply(((place / HEAD).read_text(encoding="utf-8"), (place / TENSORS).read_bytes()))


def _sha(packed: Packed) -> str:
    return hashlib.sha256(packed[0].encode() + packed[1]).hexdigest()
