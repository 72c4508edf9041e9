"""Clients of a finished training asked again: who fails is asked again, what is finished is kept, faults are named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_federated_run_hostile import Killed, base, data, records, run_of  # noqa: F401

from repforget.artifact import Edit
from repforget.errors import ResourceError, UsageError
from repforget.federated.clients import Client
from repforget.federated.leave import leave
from repforget.federated.messages import Introduction, Reply, Task
from repforget.federated.simulate import Here
from repforget.federated.sources import Source
from repforget.models.load import LoadedModel


@dataclasses.dataclass(frozen=True)
class Elsewhere(Here):
    """Clients that may come back: what of whom fails how often, who is away, and every task that was given."""

    wait: float = 0.3
    failing: dict[tuple[str, int], list[str]] = dataclasses.field(default_factory=dict)
    away: set[str] = dataclasses.field(default_factory=set)
    given: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)
    shares: set[float] = dataclasses.field(default_factory=set)  # of the epochs, as asked for
    late: tuple[str, str, int] | None = None  # the task during which all come who were away
    kill: int = 999  # the task during which the server dies

    def members(self) -> list[Introduction]:
        return [each for each in super().members() if each.client not in self.away]

    def refuse(self, member: Introduction, reason: str) -> None:
        self.away.add(member.client)

    def ask(self, task: Task, clients: Sequence[str]) -> Iterator[Reply]:
        for name in clients:
            if len(self.given) == self.kill:
                raise Killed
            self.given.append((name, task.kind, task.round))
            self.shares.add(task.local.share)
            if self.given[-1] == self.late:
                self.away.clear()
            if reasons := self.failing.get((name, task.round)):
                yield Reply(name, task.round, failed=reasons.pop())
            else:
                yield next(super().ask(task, [name]))

    def meet(self) -> AbstractContextManager[Elsewhere]:
        return nullcontext(self)


def fleet(base: LoadedModel, **more: Any) -> Elsewhere:  # noqa: F811
    return Elsewhere({name: Client.of(name, base, records(name)) for name in ("ann", "bob", "cid")}, **more)


def equal(a: Edit, b: Edit) -> bool:
    pairs = zip(a.operations, b.operations, strict=True)
    return all(np.array_equal(getattr(x, part), getattr(y, part))
               for x, y in pairs for part in ("u", "v", "delta") if hasattr(x, part))  # fmt: skip


KEEP: dict[str, Any] = {"keep_record": True, "editor": "grad_ascent"}


@pytest.mark.parametrize("method", ["retrain", "federaser"])
def test_a_killed_server_asks_nobody_twice_and_who_failed_is_asked_again(
    method: Any, base: LoadedModel, data: dict[str, Source], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    run, said = run_of(base, data, tmp_path / "run"), list[str]()
    wanted = leave(base, run, "bob", method, tmp_path / "here", **KEEP)
    number = 1 if method == "retrain" else 2  # the first that is asked for
    first = fleet(base, kill=1)
    with pytest.raises(Killed):
        leave(base, run, "bob", method, tmp_path / "there", meet=first.meet, **KEEP)
    assert first.given == [("ann", "train", number)]
    second = fleet(base, failing={("cid", 2): ["died before it answered"] * 2})
    found = leave(base, run, "bob", method, tmp_path / "there", meet=second.meet, note=said.append, **KEEP)
    assert equal(found, wanted)
    rounds = [1, 2] if method == "retrain" else [2]
    assert sorted(second.given) == sorted([("ann", "train", r) for r in rounds if r != number]
                                          + [("cid", "train", r) for r in [*rounds, 2, 2]])  # fmt: skip
    assert second.shares == {1.0 if method == "retrain" else 0.5}
    assert sum("Round 2: client 'cid' died before it answered; it is asked again" in line for line in said) == 2
    third = fleet(base)
    leave(base, run, "bob", method, tmp_path / "there", meet=third.meet, **KEEP)
    assert third.given == []
    costs = [json.loads((tmp_path / name / "forget.json").read_text()) for name in ("here", "there")]
    assert costs[0]["down"] == costs[1]["down"] and costs[0]["trainings"] == costs[1]["trainings"]


def test_a_kept_answer_that_is_damaged_is_asked_for_again(
    base: LoadedModel, data: dict[str, Source], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    run, out = run_of(base, data, tmp_path / "run"), tmp_path / "out"
    with pytest.raises(Killed):
        leave(base, run, "bob", "retrain", out, meet=fleet(base, kill=1).meet, **KEEP)
    (kept,) = out.glob("again/answer-*/tensors.safetensors")
    kept.write_bytes(kept.read_bytes()[:-4])
    second = fleet(base)
    found = leave(base, run, "bob", "retrain", out, meet=second.meet, **KEEP)
    assert second.given.count(("ann", "train", 1)) == 1
    assert equal(found, leave(base, run, "bob", "retrain", tmp_path / "here", **KEEP))


def test_who_is_away_or_fails_every_time_is_named_and_the_rest_is_kept(
    base: LoadedModel, data: dict[str, Source], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    run = run_of(base, data, tmp_path / "run")
    never = fleet(base, failing={("cid", 1): ["sent nothing"] * 9})
    with pytest.raises(ResourceError, match="'cid' was asked to train again and sent nothing: .* the same command"):
        leave(base, run, "bob", "retrain", tmp_path / "out", meet=never.meet, **KEEP)
    assert [name for name, _, _ in never.given] == ["ann", "cid", "cid", "cid"]
    gone = fleet(base, away={"cid"})
    with pytest.raises(ResourceError, match="Round 1 lacks client 'cid' .it did not join in 0.3 s"):
        leave(base, run, "bob", "retrain", tmp_path / "out", meet=gone.meet, **KEEP)
    few = fleet(base)
    few.clients["cid"] = Client.of("cid", base, records("cid")[:2])  # type: ignore[index]
    with pytest.raises(ResourceError, match="'cid' .it joins with 2 records and trained with 3: bring the same"):
        leave(base, run, "bob", "retrain", tmp_path / "out", meet=few.meet, **KEEP)
    last = fleet(base, away={"bob"}, late=("cid", "train", 2))  # refused, too late to be asked anything
    leave(base, run, "bob", "retrain", tmp_path / "out", meet=last.meet, **KEEP)
    assert ("ann", "train", 1) not in last.given and last.away == {"bob"}
    with pytest.raises(UsageError, match="Rollback asks no client"):
        leave(base, run, "bob", "rollback", tmp_path / "rolled", meet=last.meet)


def test_the_client_that_leaves_is_asked_to_unlearn_and_nothing_else(
    base: LoadedModel, data: dict[str, Source], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    run = run_of(base, data, tmp_path / "run")
    asked = fleet(base, failing={("bob", 0): ["died before it answered"]})
    leave(base, run, "bob", "client", tmp_path / "out", meet=asked.meet, **KEEP)
    assert [given for given in asked.given if given[0] == "bob"] == [("bob", "unlearn", 0)] * 2
    assert sorted(given[0] for given in asked.given if given[1] == "train") == ["ann", "ann", "cid", "cid"]
    lost = fleet(base, failing={("bob", 0): ["failed: no such editor"] * 3})
    with pytest.raises(ResourceError, match="'bob' was asked to unlearn and failed: no such editor"):
        leave(base, run, "bob", "client", tmp_path / "lost", meet=lost.meet, **KEEP)
