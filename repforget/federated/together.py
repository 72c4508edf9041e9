"""An edit from the moments of a fleet: the server asks, adds up and solves, and begins again when a client is lost."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from repforget.artifact import Edit
from repforget.errors import ResourceError, UsageError, nearest
from repforget.federated.door import ATTEMPTS, Door, Fleet, Members
from repforget.federated.messages import UNREADABLE, Introduction, Kind, Local, Reply, Task, Told
from repforget.federated.moments import MINIMUM, Classes, Moments, Question, checked, leace, null_space
from repforget.federated.questions import NO_FACTS, blank, classes_of, moments_of, packed, parts, strange, sums
from repforget.federated.secure import LEAST, Agreement, Shapes, restored, unmasked
from repforget.models.load import LoadedModel
from repforget.progress import Progress

Method = Literal["leace", "null_space"]
METHODS: tuple[str, ...] = get_args(Method)
BETWEEN = {"masked": " after the exchange of keys, so that the masks of the others stay on"}


@dataclass(frozen=True)
class Sums:
    """How clients' moments are added: ``bound`` is the largest absolute entry anybody may send; None: in the clear."""

    bound: float | None = 1e8
    minimum: int = MINIMUM


SECURE = Sums()


class LostError(ResourceError):
    """Clients that did not answer, with the reasons; what the others told of this sum is of no use."""

    def __init__(self, failed: Mapping[str, str], between: str) -> None:
        self.failed = failed
        super().__init__("; ".join(f"Client '{name}' {reason}{'' if unable(reason) else between}"
                                   for name, reason in failed.items()))  # fmt: skip


def unable(reason: str) -> bool:
    """Whether a client said that it cannot do what it was asked: it would say so again."""
    return reason.startswith("failed")


@dataclass
class Together:
    """All clients behind a fleet as one reader: each tells which classes it has, and moments masked or in the clear.

    Masked, the server sees uniform numbers and their sum (:mod:`repforget.federated.secure`), and the minimum of points
    holds for the sum: the points of every class are added first, and moments of fewer are not asked for.  In the clear
    it holds for every client.  ``traffic``: bytes to and from each client.
    """

    door: Door
    members: Members
    sums: Sums
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)
    run: str = ""  # of the server, the same when all is begun again
    asked: int = 0
    opened: int = 0  # masked sums whose total is known
    enough: bool = False  # points behind every mean

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.members))

    def classes(self, question: Question) -> Classes:
        told = self._ask("classes", {}, question)
        holders = Counter(pair for each in told.values() for pair in dict.fromkeys(classes_of(each.words)))
        if self.sums.bound is not None and (alone := sum(count == 1 for count in holders.values())):
            self.door.note(f"{alone} of {len(holders)} classes are with one client alone: what sums tell of them is "
                           "its own")  # fmt: skip
        return tuple(sorted(holders))

    def moments(self, question: Question) -> Moments:
        return self._summed("moments", question)

    def keys(self, question: Question) -> Moments:
        return self._summed("keys", question)

    def _summed(self, of: str, question: Question) -> Moments:
        shape = blank(self.door.base, question, of)
        if self.sums.bound is None:
            wanted = parts(shape)
            told = self._ask("moments", {"of": of}, question, lambda told: strange(told.tensors, wanted))
            return _merged([moments_of(shape, told[name].tensors, summed=False) for name in self.names])
        if not self.enough:
            counted = self._masked(of, question, {"counts": (next(iter(shape.values()))[0].k,)}, counts=True)["counts"]
            few = min((round(float(count)) for count in counted if round(float(count))), default=0)
            if few < question.minimum:
                raise UsageError(f"All clients together have {few} points of a class, fewer than {question.minimum}, "
                                 "and a mean over so few tells much about each: let more clients take part, or allow "
                                 f"it with minimum={few}.")  # fmt: skip
            self.enough = True
        shapes = {name: value.shape for name, value in sums(shape).items()}
        total = self._masked(of, question, shapes, counts=False)
        return checked("together", moments_of(shape, total, summed=True), question.minimum)

    def _masked(self, of: str, question: Question, shapes: Shapes, *, counts: bool) -> dict[str, np.ndarray]:
        """The total of what the clients have, by a secure sum with keys of its own."""
        agreement = Agreement(self.names, float(self.sums.bound or 0), f"{self.run}:{secrets.token_hex(8)}")
        wanted = {"public": np.zeros(32, np.uint8)}
        words = {"clients": self.names, "bound": agreement.bound, "purpose": agreement.purpose}
        keys = self._ask("key", words, None, lambda told: strange(told.tensors, wanted))
        public = {name: told.tensors["public"].tobytes().hex() for name, told in keys.items()}
        masked = {"sum": np.zeros(1 + sum(int(np.prod(size)) for size in shapes.values()), np.uint64)}
        words = {"of": of, "counts": counts, "purpose": agreement.purpose, "public": public}
        sent = self._ask("masked", words, question, lambda told: strange(told.tensors, masked))
        total = unmasked({name: told.tensors["sum"] for name, told in sent.items()}, agreement)
        self.opened += 1
        return restored(total, shapes)

    def _ask(
        self, kind: Kind, words: Mapping[str, Any], question: Question | None,
        fault: Callable[[Told], str | None] = lambda told: None,
    ) -> dict[str, Told]:  # fmt: skip
        """Every client's answer; LostError where one is missing or wrong."""
        body, tensors = ({}, {}) if question is None else packed(question)
        self.asked += 1
        task = Task(self.asked, Local(), tensors, kind, {**words, "question": body})

        def wrong(reply: Reply, member: Introduction) -> str | None:
            if reply.failed is not None or reply.told is None:
                return reply.failed or "told nothing"
            if reply.round != task.round:
                return f"answered question {reply.round}, not {task.round}"
            try:
                if kind == "classes":
                    classes_of(reply.told.words)
                return fault(reply.told)
            except UNREADABLE:
                return "sent a message that cannot be read"

        found: dict[str, Told] = {}
        failed: dict[str, str] = {}
        for reply, reason in self.door.ask(task, self.members, wrong):
            down, up = self.traffic.get(reply.client, (0, 0))
            self.traffic[reply.client] = down + reply.down, up + reply.up
            if reason is None and reply.told is not None:
                found[reply.client] = reply.told
            else:
                failed[reply.client] = str(reason)
        if failed:
            raise LostError(dict(sorted(failed.items())), BETWEEN.get(kind, ""))
        return found


def _merged(told: Sequence[Moments]) -> Moments:
    """The clients' statistics in one, in the order of their names."""
    found = dict(told[0])
    for each in told[1:]:
        for site, (seen, space) in each.items():
            before, other = found[site]
            merged = before.merge(seen)
            found[site] = merged, merged if space is seen else other.merge(space)
    return found


def edit_of_fleet(
    fleet: Fleet, model: LoadedModel, method: Method, clients: int, *, layers: Sequence[int] = (), sums: Sums = SECURE,
    seed: int = 0, note: Callable[[str], None] = lambda line: None, progress: Progress | None = None,
) -> tuple[Edit, dict[str, tuple[int, int]]]:  # fmt: skip
    """The edit of ``method`` on the facts of all clients together, and the bytes to and from each of them.

    Waits for ``clients`` clients.  Where one is lost, or tells that it cannot answer, all is begun again with those
    that are left: what was masked with it cannot be read without it.  But once a masked sum is known, only the same
    clients may be in another: the difference of two sums is what one client has told.  (A server that lies about who
    was lost learns that.)  ``layers`` are those of null_space.

    Raises UsageError for what cannot be asked for, ResourceError for too few clients, and as
    :func:`repforget.federated.moments.leace`.
    """
    made = editor_of(method, clients, layers, sums)
    least = LEAST if sums.bound is not None else 1
    door = Door(fleet, model, note, lambda member: None if member.facts > 0 else NO_FACTS)
    traffic: dict[str, tuple[int, int]] = {}
    same: frozenset[str] = frozenset()
    run = secrets.token_hex(8)
    wanted, attempt = clients, 0
    while True:
        attempt += 1
        members = _gathered(door, wanted, same)
        reader = Together(door, members, sums, traffic, run)
        try:
            edit = made(model, {"all": reader}, seed=seed, progress=progress, minimum=sums.minimum)
        except LostError as lost:
            if not fleet.wait:
                raise UsageError(f"{lost}.") from None
            final = [name for name, reason in lost.failed.items() if unable(reason)]
            for name in final:
                door.refuse(members[name], lost.failed[name])
            same = frozenset(members) if same or reader.opened else frozenset()
            if attempt == ATTEMPTS or same.intersection(final):
                raise ResourceError(f"{lost}: nothing was written; put that right and give the same "
                                    "command.") from None  # fmt: skip
            note(f"{lost}: beginning again with {'the same clients' if same else 'the others'}")
            wanted = least
        else:
            door.members()  # who came too late hears why it may not take part
            return edit, {name: traffic[name] for name in reader.names}


def _gathered(door: Door, wanted: int, same: frozenset[str]) -> Members:
    """As many clients as are wanted, and no others than the ``same`` ones where these are named."""
    members = door.gathered(lambda here: len(here) >= wanted and here.keys() >= same, f"{wanted} clients")
    if lost := sorted(same - members.keys()):
        raise ResourceError(f"Client '{lost[0]}' did not come back in {door.fleet.wait:g} s, and sums with it are "
                            "known already: others without it would show what it told; bring it back and give the "
                            "same command.")  # fmt: skip
    if len(members) < wanted:
        why = "; ".join(f"'{name}' {reason}" for name, reason in door.refused.items())
        raise ResourceError(f"{len(members)} of {wanted} clients are here{f' ({why})' if why else ''}: bring more and "
                            "give the same command.")  # fmt: skip
    return {name: member for name, member in members.items() if not same or name in same}


def editor_of(method: str, clients: int, layers: Sequence[int], sums: Sums) -> Callable[..., Edit]:
    """The editor of moments by its name; UsageError for what cannot be asked for."""
    if method not in METHODS:
        raise UsageError(f"There is no method '{method}' from moments: {nearest(method, METHODS)}")
    if method == "leace" and layers:
        raise UsageError("leace chooses its sites by itself: leave the layers out.")
    if method == "null_space" and not layers:
        raise UsageError("null_space needs the layers that it changes: give --layers, for example those that "
                         "'repforget locate' names.")  # fmt: skip
    if sums.bound is not None:  # says what is wrong with it
        Agreement(tuple(f"client-{k}" for k in range(min(clients, LEAST))), sums.bound)

    def chosen(model: LoadedModel, readers: Mapping[str, Any], **settings: Any) -> Edit:
        return null_space(model, readers, layers, **settings)

    return leace if method == "leace" else chosen
