"""Where a client's records come from: a JSON-lines file of its own, or some clusters of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repforget.errors import UsageError
from repforget.knowledge_files import load_knowledge
from repforget.training import Record, read_records, records_of
from repforget.training.items import Forms


@dataclass(frozen=True)
class Source:
    """Either ``path``, a file of records, or the records of ``clusters`` in one ``set`` of the probe ``knowledge``."""

    path: str = ""
    knowledge: str = ""
    set: str = "forget"
    clusters: tuple[str, ...] = ()
    forms: Forms = "all"

    def records(self) -> tuple[Record, ...]:
        """Read them; UsageError where there are none."""
        if self.path:
            return read_records(self.path)
        wanted = frozenset(self.clusters)
        found = records_of(load_knowledge(self.knowledge), (self.set,), self.forms)
        return tuple(record for record in found if record.cluster in wanted)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, body: dict[str, Any]) -> Source:
        return cls(**{**body, "clusters": tuple(body["clusters"])})


def of_folder(folder: str | Path) -> dict[str, Source]:
    """One client per ``*.jsonl`` in ``folder``, named like its file."""
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise UsageError(f"The folder '{folder}' holds no '*.jsonl': put one file of records per client into it.")
    return {path.stem: Source(path=str(path.resolve())) for path in paths}


def of_probe(
    knowledge: str, clients: int, *, set: str = "forget", forms: Forms = "all", seed: int = 0
) -> dict[str, Source]:
    """The clusters of a probe's set dealt out to ``clients`` clients, ``client-0`` and on, as evenly as can be."""
    data = load_knowledge(knowledge)
    names = sorted({item.cluster for item in getattr(data, set)})
    if not 1 <= clients <= len(names):
        raise UsageError(f"{clients} clients cannot share the {len(names)} clusters of '{knowledge}': give 1 to "
                         f"{len(names)}.")  # fmt: skip
    order = np.random.default_rng(seed).permutation(len(names))
    parts: list[Sequence[int]] = np.array_split(order, clients)  # type: ignore[assignment]
    return {f"client-{k}": Source(knowledge=knowledge, set=set, forms=forms,
                                  clusters=tuple(sorted(names[i] for i in part)))
            for k, part in enumerate(parts)}  # fmt: skip
