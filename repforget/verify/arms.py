"""What a verifier is given and what it must say about itself: references, arms and measures."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from repforget.records import Access, EvidenceKind

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

T = TypeVar("T")
Budgets = Mapping[str, Mapping[str, Any]]  # BUDGETS of a verifier: quick, standard and thorough settings


@dataclass(frozen=True)
class References:
    """The untouched original and the models that never knew; they stay as they are while any arm is open.

    :meth:`once` keeps what several arms need from the original (its lens, its patching baseline) for one battery.
    """

    original: LoadedModel
    twins: tuple[LoadedModel, ...] = ()
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``make()``, computed at most once per battery and key."""
        if key not in self.memo:
            self.memo[key] = make()
        value: T = self.memo[key]
        return value


@dataclass(frozen=True)
class Arm:
    """A model to be measured: ``original``, ``edit``, ``placebo`` or ``twin-N``, opened only while it is needed.

    ``open`` gives a context with the model; an edited arm must be another object than ``References.original``.
    A ``shuffled`` arm is asked for exchanged answers, by the attacks that teach something: what they elicit there is
    their own doing.
    """

    name: str
    open: Callable[[], AbstractContextManager[LoadedModel]]
    shuffled: bool = False


@dataclass(frozen=True)
class MeasureInfo:
    """What one measure of a verifier is.

    ``kind`` knowledge (higher = more of it) or collateral (higher = better kept); ``access`` the attacker needs;
    ``votes`` False for descriptive numbers; ``teaches`` what the attack itself tells the model; ``curve`` (title,
    x label, y label) of the series with the measure's name, drawn over the series ``x``.  A score named
    ``<measure>_prior`` is the value of answering by the prior and becomes a floor.
    """

    kind: EvidenceKind
    access: Access
    votes: bool = True
    teaches: str = "nothing"
    curve: tuple[str, str, str] | None = None
