"""An edit from moments, with the people of a probe dealt to clients of this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import numpy as np

from repforget.artifact import Edit
from repforget.errors import UsageError
from repforget.federated.moments import Local, Pooled, Reader, leace, null_space
from repforget.federated.secure import Agreement, summed
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.progress import Progress

Method = Literal["leace", "null_space"]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Sums:
    """How clients' moments are added: ``bound`` is the largest absolute entry anybody may send; None: in the clear."""

    bound: float | None = 1e8
    minimum: int = 5


def dealt(model: LoadedModel, data: EditData, clients: int, seed: int = 0) -> dict[str, Local]:
    """Clients that hold the facts about people of their own, as evenly as can be, and every n-th general text."""
    people = sorted({fact.cluster for fact in (*data.forget, *data.retain)})
    if not 1 <= clients <= len(people):
        raise UsageError(f"{clients} clients cannot share {len(people)} people: give 1 to {len(people)}.")
    order = np.random.default_rng(seed).permutation(len(people))
    home = {people[i]: k for k, part in enumerate(np.array_split(order, clients)) for i in part}

    def own(facts: Sequence[Fact], k: int) -> tuple[Fact, ...]:
        return tuple(fact for fact in facts if home[fact.cluster] == k)

    return {f"client-{k}": Local(f"client-{k}", model, replace(
        data, forget=own(data.forget, k), retain=own(data.retain, k), general=data.general[k::clients]))
        for k in range(clients)}  # fmt: skip


def from_moments(
    model: LoadedModel, data: EditData, method: Method, clients: int, *, layers: Sequence[int] = (),
    sums: Sums = Sums(), seed: int = 0, progress: Progress | None = None,
) -> Edit:  # fmt: skip
    """The edit of ``method`` on all clients' facts together; the server learns the sum of their moments alone.

    ``layers`` are those of null_space.  With a bound the sums are secure (:mod:`repforget.federated.secure`, all
    parties in this process), and the minimum of points holds for the sum; in the clear it holds for every client.
    Bytes per client stand in the notes.  Raises as :func:`repforget.federated.moments.leace`.
    """
    members: dict[str, Reader] = {**dealt(model, data, clients, seed)}
    if sums.bound is not None:
        Agreement(tuple(members), sums.bound)  # refuses what cannot be summed before anything is read
        members = {"all": Pooled(members, partial(summed, bound=sums.bound))}
    if method == "leace":
        if layers:
            raise UsageError("leace chooses its sites by itself: leave the layers out.")
        return leace(model, members, seed=seed, progress=progress, minimum=sums.minimum)
    if not layers:
        raise UsageError("null_space needs the layers that it changes: give --layers, for example those that "
                         "'repforget locate' names.")  # fmt: skip
    return null_space(model, members, layers, seed=seed, progress=progress, minimum=sums.minimum)
