"""The folder of a federated training: what was asked for, the record of its rounds, and the edit that came out."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from repforget.artifact import DenseDelta, Edit, LowRankDelta, Operation
from repforget.errors import UsageError
from repforget.federated.aggregate import Adam
from repforget.federated.clients import State, own_layout, trained_weights
from repforget.federated.door import Fleet
from repforget.federated.faults import Fault
from repforget.federated.messages import Local
from repforget.federated.server import Plan, federate
from repforget.federated.simulate import here, on_ray
from repforget.federated.sources import Source, lasting
from repforget.guarantee import Guarantee
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.store import Store, digest, read_json, write_json

RUN, EDIT = "run.json", "edit"
FORMAT = "repforget-federation-1"
Note = Callable[[str], None]
Engine = Literal["ray", "here"]


@dataclass(frozen=True)
class Setup:
    """What a folder was made for.  Without ``sources`` the clients are elsewhere and keep their records there."""

    plan: Plan
    sources: Mapping[str, Source]
    left: tuple[str, ...] = ()  # marks of the clients that were forgotten here

    def has_left(self, client: str) -> bool:
        return any(is_mark(mark, client) for mark in self.left)

    @classmethod
    def read(cls, folder: Path) -> Setup:
        body = read_json(folder / RUN)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise UsageError(f"'{folder}' is no folder of 'repforget federated': name one that it has written.")
        plan = body["plan"]
        local, adam = Local(**plan["local"]), Adam(**plan["adam"])
        sources = {name: Source.of(source) for name, source in body["sources"].items()}
        return cls(Plan(**{**plan, "local": local, "adam": adam}), sources, tuple(body["left"]))

    def write(self, folder: Path) -> None:
        sources = {name: source.to_json() for name, source in self.sources.items()}
        write_json(folder / RUN, {"format": FORMAT, "plan": asdict(self.plan), "left": self.left, "sources": sources})

    def claim(self, folder: Path) -> None:
        """Take a fresh folder, or go on in one that was made for the same; UsageError in any other.

        More rounds, patience and another least number of clients are no other training.  Model and probes are written
        down by their whole paths.
        """
        own = self._lasting()
        if (folder / RUN).exists():
            old = Setup.read(folder)._lasting()
            if old.left:
                raise UsageError(f"A client was forgotten in '{folder}', so that its training is over: train on in a "
                                 "new folder.")  # fmt: skip
            held, asked = old.plan, own.plan
            fields = {"model": (held.model, asked.model), "strategy": (held.local.rule, asked.local.rule),
                      "local training": (held.local, asked.local), "server": (held.adam, asked.adam),
                      "clients": (dict(old.sources), dict(own.sources))}  # fmt: skip
            other = [name for name, (before, now) in fields.items() if before != now]
            if other:
                raise UsageError(f"'{folder}' holds a training that differs in its {other[0]}: choose another folder "
                                 "with --out.")  # fmt: skip
            if self.plan.rounds < old.plan.rounds:
                raise UsageError(f"'{folder}' holds a training of {old.plan.rounds} rounds and {self.plan.rounds} were "
                                 "asked for: choose another folder with --out.")  # fmt: skip
        own.write(folder)

    def _lasting(self) -> Setup:
        """The same, wherever the next command is given."""
        sources = {name: replace(source, knowledge=lasting(source.knowledge)) if source.knowledge else source
                   for name, source in self.sources.items()}  # fmt: skip
        return replace(self, plan=replace(self.plan, model=lasting(self.plan.model)), sources=sources)


def mark(client: str) -> str:
    """A salted digest of a name: whoever knows or guesses the name can tell that it is meant, nobody can read it."""
    salt = secrets.token_hex(8)
    return f"{salt}:{hashlib.sha256(f'{salt}{client}'.encode('utf-8', 'surrogatepass')).hexdigest()}"


def is_mark(text: str, client: str) -> bool:
    salt, _, found = text.partition(":")
    return found == hashlib.sha256(f"{salt}{client}".encode("utf-8", "surrogatepass")).hexdigest()


def ready(model: LoadedModel, plan: Plan) -> Plan:
    """The plan with its patterns of weights replaced by the names that they find in ``model``."""
    local = plan.local
    return replace(plan, local=replace(local, weights=trained_weights(model, local.weights, local.rank)))


def simulate(
    base: LoadedModel, plan: Plan, sources: Mapping[str, Source], folder: Path, *, engine: Engine = "ray",
    workers: int = 2, faults: Sequence[Fault] = (), note: Note = lambda line: None, progress: Progress | None = None,
) -> Edit:  # fmt: skip
    """Train with all clients on this machine; the same call continues a killed one after its last round.

    ``engine`` "ray" gives each of ``workers`` processes one core and a client at a time, "here" uses this process; both
    run the same code.  Writes ``run.json``, ``history/``, ``report.json`` and ``edit/`` into ``folder``.
    """
    plan = ready(base, plan)
    if not 1 <= plan.min_clients <= len(sources):
        raise UsageError(f"At least {plan.min_clients} clients are wanted and there are {len(sources)}: give a number "
                         f"from 1 to {len(sources)}.")  # fmt: skip
    for fault in faults:
        if fault.client not in sources:
            raise UsageError(f"There is no client '{fault.client}' to fail: they are {', '.join(sorted(sources))}.")

    def act(fleet: Fleet) -> dict[str, np.ndarray]:
        return federate(fleet, plan, base, folder, note=note, progress=progress)

    with Store(folder).locked():
        Setup(plan, sources).claim(folder)
        if engine == "here":
            state = act(here(base, sources, faults, plan.timeout))
        else:
            state = on_ray(plan.model, sources, act, workers=workers, timeout=plan.timeout, faults=faults)
        return finish(base, plan, state, folder)


def finish(base: LoadedModel, plan: Plan, state: State, folder: Path) -> Edit:
    """The edit of a training that is over, saved in ``folder``."""
    clients = len(read_json(folder / "report.json")["clients"])
    edit = edit_of(base, plan, state, "federated", {"clients": clients}, bound=highest_rank(plan, clients))
    edit.save(folder / EDIT)
    return edit


def highest_rank(plan: Plan, clients: int) -> int:
    """Rank that no global delta exceeds, when every client adds an adapter in every round; 0: unknown."""
    return 0 if plan.local.rule == "fedadam" else plan.local.rank * plan.rounds * clients


def edit_of(
    base: LoadedModel, plan: Plan, state: State, method: str, settings: Mapping[str, Any], *, bound: int = 0,
    notes: Sequence[str] = (), guarantee: Guarantee | None = None,
) -> Edit:  # fmt: skip
    """The global state as an edit of the base; ``bound`` as in :func:`operations_of`.

    Raises NoEffectError where the training changed nothing.
    """
    local = {name: value for name, value in asdict(plan.local).items() if name not in ("weights", "share")}
    own = {**local, "rounds": plan.rounds, **settings}
    return Edit.build(method, own, base, digest([plan.model, own]), operations_of(base, plan.local, state, bound),
                      notes=notes, guarantee=guarantee)  # fmt: skip


def operations_of(base: LoadedModel, local: Local, state: State, bound: int = 0) -> list[Operation]:
    """``state`` as operations; a delta of a rank of at most ``bound`` (0: unknown) is cut into factors where that is
    smaller, by a singular value decomposition."""
    found: list[Operation] = []
    own = own_layout(base.module, local, state)
    for name, value in sorted(state.items()):
        if not value.any():
            continue
        if local.rank and 0 < bound * sum(value.shape) < value.size:
            u, s, v = np.linalg.svd(value.astype(np.float64), full_matrices=False)
            left, right = u[:, :bound] * s[:bound], v[:bound]
            found.append(LowRankDelta(name, torch.from_numpy(left), torch.from_numpy(right)))
        else:
            found.append(DenseDelta(name, own[name]))
    return found
