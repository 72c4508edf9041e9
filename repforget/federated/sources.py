"""Where a client's records come from: a JSON-lines file of its own, or some clusters of a probe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from repforget.errors import UsageError
from repforget.knowledge_files import load_knowledge
from repforget.training import Record, read_records, records_of
from repforget.training.items import Forms, digest


def lasting(name: str) -> str:
    """The name of a model or probe that finds it from any working directory: the whole path of a file or folder."""
    path = Path(name).expanduser()
    files = (path, path / "config.json", path / "probe.yaml")
    return str(path.resolve()) if any(file.is_file() for file in files) else name


@dataclass(frozen=True)
class Source:
    """Either ``path``, a file of records, or the records of ``clusters`` in one ``set`` of the probe ``knowledge``.

    ``sha256`` is the digest of the records as they were when the source was named: a training that goes on, or is done
    again, must be on the same ones.
    """

    path: str = ""
    knowledge: str = ""
    set: str = "forget"
    clusters: tuple[str, ...] = ()
    forms: Forms = "all"
    sha256: str = ""

    def records(self) -> tuple[Record, ...]:
        """Read them; UsageError where there are none, or others than there were."""
        if self.path:
            found = read_records(self.path)
        else:
            wanted = frozenset(self.clusters)
            known = records_of(load_knowledge(self.knowledge), (self.set,), self.forms)
            found = tuple(record for record in known if record.cluster in wanted)
        if self.sha256 and digest(found) != self.sha256:
            raise UsageError(f"The records in '{self.path or self.knowledge}' are not those that this training began "
                             "with: bring them back, or train in a new folder.")  # fmt: skip
        return found

    def marked(self) -> Source:
        """The same source with the digest of what is there now."""
        return replace(self, sha256=digest(self.records()))

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
    return {path.stem: Source(path=str(path.resolve())).marked() for path in paths}


def of_probe(
    knowledge: str, clients: int, *, set: str = "forget", forms: Forms = "all", seed: int = 0
) -> dict[str, Source]:
    """The clusters of a probe's set dealt out to ``clients`` clients, ``client-0`` and on, as evenly as can be."""
    data = load_knowledge(knowledge)
    names = sorted({item.cluster for item in getattr(data, set)})
    if not 1 <= clients <= len(names):
        raise UsageError(f"{clients} clients cannot share the {len(names)} clusters of '{knowledge}': give 1 to "
                         f"{len(names)}.")  # fmt: skip
    records = records_of(data, (set,), forms)
    order = np.random.default_rng(seed).permutation(len(names))
    found: dict[str, Source] = {}
    for k, part in enumerate(np.array_split(order, clients)):
        own = tuple(sorted(names[i] for i in part))
        sha = digest(record for record in records if record.cluster in own)
        found[f"client-{k}"] = Source(knowledge=knowledge, set=set, clusters=own, forms=forms, sha256=sha)
    return found
