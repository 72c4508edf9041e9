"""Who takes part, and what comes back from them: the way of every question from a server to its clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from repforget.federated.faults import admitted
from repforget.federated.messages import MOST, Introduction, Reply, Task, shown
from repforget.models._fingerprint import tokenizer_digest
from repforget.models.load import LoadedModel

ATTEMPTS = 3  # at what too few clients answer
PAUSE = 0.2  # seconds between two looks at who is here
Members = Mapping[str, Introduction]


class Fleet(Protocol):
    """The clients as the server sees them, whatever lies between."""

    @property
    def wait(self) -> float:
        """Seconds to wait for clients that are not here; 0 where nobody comes later."""
        ...

    def members(self) -> Sequence[Introduction]:
        """Who is here now."""
        ...

    def ask(self, task: Task, clients: Sequence[str]) -> Iterator[Reply]:
        """Give ``task`` to the named clients; one reply for each, in any order, failed ones with their reason."""
        ...

    def refuse(self, member: Introduction, reason: str) -> None:
        """Tell one of the members that it may not take part."""
        ...


@dataclass(frozen=True)
class Door:
    """Lets in who has this base and tokenizer, and nothing against it by ``against``; the others are told and noted."""

    fleet: Fleet
    base: LoadedModel
    note: Callable[[str], None]
    against: Callable[[Introduction], str | None] = lambda member: None
    most: int = MOST  # records that a client may claim
    refused: dict[str, str] = field(default_factory=dict)  # client -> why

    @cached_property
    def _tokenizer(self) -> str:
        return tokenizer_digest(self.base.tokenizer)

    def members(self) -> dict[str, Introduction]:
        """Those here now who may take part, by name."""
        welcome, refused = admitted(self.fleet.members(), self.base.fingerprint, self._tokenizer, self.most)
        refused += [(member, why) for member in welcome.values() if (why := self.against(member)) is not None]
        for member, reason in refused:
            self.refuse(member, reason)
        return {name: member for name, member in welcome.items() if all(member is not other for other, _ in refused)}

    def refuse(self, member: Introduction, reason: str) -> None:
        """Tell a member, once, that it may not take part, and why."""
        client = shown(member.client)
        if self.refused.get(client) != reason:
            self.note(f"refused: client '{client}' {reason}")
        self.refused[client] = reason
        self.fleet.refuse(member, reason)

    def gathered(self, enough: Callable[[Members], bool], whom: str) -> dict[str, Introduction]:
        """:meth:`members`, once they are enough or the fleet's time to wait for ``whom`` is over."""
        end = time.monotonic() + self.fleet.wait
        told = False
        while True:
            members = self.members()
            if enough(members) or time.monotonic() >= end:
                return members
            if not told:
                self.note(f"waiting for {whom}")
            told = True
            time.sleep(PAUSE)

    def ask(
        self, task: Task, members: Members, fault: Callable[[Reply, Introduction], str | None]
    ) -> Iterator[tuple[Reply, str | None]]:
        """Every member's reply as it comes, with what is wrong with it by ``fault``."""
        for reply in self.fleet.ask(task, sorted(members)):
            yield reply, fault(reply, members[reply.client])
