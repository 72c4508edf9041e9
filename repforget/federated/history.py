"""The record of a federated training on disk: each round's global state and updates; a client can be erased from it.

One folder per round, ``round-0000``, ...: ``before.safetensors`` (the global weights that the clients were given, and
who took part) and one file per client.  A round is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repforget.errors import ArtifactError, UsageError, nearest
from repforget.federated.aggregate import ADAM, Adam, aggregate, applied
from repforget.federated.records import Rule, Update
from repforget.store import read_json, refusing, write_atomic, write_json

FORMAT = "repforget-federated-1"
HEAD, ERASING, BEFORE = "history.json", "erasing.json", "before.safetensors"
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Round:
    """``before``: the global weights at the start of the round; ``updates``: what its clients sent, by their names."""

    before: Weights
    updates: tuple[Update, ...]

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(update.client for update in self.updates)


class History(Sequence[Round]):
    """The rounds of one federated training in ``folder``, oldest first; each is read when it is asked for.

    ``rule`` and ``adam`` are how the server aggregated.  Opening clears what a killed writer left and completes an
    interrupted erasure.  One writer at a time.  Disk: per round the weights and the updates of its clients.
    """

    def __init__(self, folder: str | Path, rule: Rule = "fedavg", adam: Adam = ADAM) -> None:
        self.folder = Path(folder)
        head = {"format": FORMAT, "rule": rule, "adam": asdict(adam)}
        with refusing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / HEAD).exists():
            held = read_json(self.folder / HEAD)
            if not isinstance(held, Mapping) or held.get("format") != FORMAT:
                raise ArtifactError(f"'{self.folder}' holds no training record of format '{FORMAT}': name another "
                                    "folder.")  # fmt: skip
            if held != head:
                raise UsageError(f"The rounds in '{self.folder}' were aggregated by '{held['rule']}' with other "
                                 f"settings than these of '{rule}': use theirs, or start a new folder.")  # fmt: skip
        else:
            write_json(self.folder / HEAD, head)
        self.rule, self.adam = rule, adam
        for leftover in list(self.folder.rglob(".*.tmp-*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if (self.folder / ERASING).exists():
            self._erase(read_json(self.folder / ERASING))

    @classmethod
    def open(cls, folder: str | Path) -> History:
        """The record that lies in ``folder``, under the rule it was written with; UsageError where there is none."""
        head = read_json(Path(folder) / HEAD)
        return cls(folder, head["rule"], Adam(**head["adam"]))

    def __len__(self) -> int:
        count = 0
        while self._place(count).is_dir():
            count += 1
        return count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        place = self._place(number)
        weights, head = _read(place / BEFORE)
        updates = []
        for client in head["clients"]:
            tensors, own = _read(place / _file(client))
            updates.append(Update(client, int(own["records"]), tensors))
        return Round(weights, tuple(updates))

    def append(self, before: Weights, updates: Sequence[Update]) -> None:
        """Write the next round: complete after a return, absent after a crash.

        Raises ResourceError when the disk is full or refuses; what was written before stays.
        """
        final = self._place(len(self))
        temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
        ordered = sorted(updates, key=lambda update: update.client)
        with refusing(final):
            try:
                for update in ordered:
                    _write(temporary / _file(update.client), update.tensors,
                           {"client": update.client, "records": update.records})  # fmt: skip
                _write(temporary / BEFORE, before, {"clients": [update.client for update in ordered]})
                os.rename(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def clients(self) -> dict[str, int]:
        """Client -> number of rounds it took part in (reads heads only)."""
        found: dict[str, int] = {}
        for number in range(len(self)):
            for client in _head(self._place(number) / BEFORE)["clients"]:
                found[client] = found.get(client, 0) + 1
        return dict(sorted(found.items()))

    def erase(self, client: str) -> int:
        """Take ``client`` out of the record: its updates, its name, and every global state that it changed.

        A state less the state before it, less the updates that stay, is the update that goes: so the states after the
        client's first round are computed anew, from the state of that round and the other clients' updates alone.
        Those updates stay as they are, and were trained on models that the client had changed: what they carry of it
        stays too.  Returns the number of rounds it was in.  Nothing of it is left in a file of this folder; copies
        elsewhere, and blocks that a disk no longer lists, are beyond it.  A killed erasure continues when the record is
        opened.  Raises UsageError for a client that never took part.
        """
        known = self.clients()
        if client not in known:
            raise UsageError(f"Client '{client}' never took part in the training in '{self.folder}', so there is "
                             f"nothing to erase: {nearest(client, known)}")  # fmt: skip
        first = next(i for i in range(len(self)) if client in _head(self._place(i) / BEFORE)["clients"])
        job = {"client": client, "first": first}
        write_json(self.folder / ERASING, job)
        self._erase(job)
        return known[client]

    def _erase(self, job: Mapping[str, Any]) -> None:
        state: dict[str, np.ndarray] = {}
        weights: Weights = {}
        for number in range(len(self)):
            place = self._place(number)
            held, head = _read(place / BEFORE)
            weights = held if number <= job["first"] else weights
            kept = [name for name in head["clients"] if name != job["client"]]
            updates = [Update(name, int(own["records"]), tensors)
                       for name in kept for tensors, own in [_read(place / _file(name))]]  # fmt: skip
            _write(place / BEFORE, weights, {"clients": kept})
            (place / _file(job["client"])).unlink(missing_ok=True)
            if updates:
                weights = applied(weights, aggregate(updates, self.rule, adam=self.adam, state=state))
        (self.folder / ERASING).unlink(missing_ok=True)

    def _place(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}"


def final_state(rounds: Sequence[Round], rule: Rule = "fedavg", adam: Adam = ADAM) -> dict[str, np.ndarray]:
    """The global weights after the last round, from its state and its updates ("fedadam": and all moments before)."""
    if not len(rounds):
        raise UsageError("The training record holds no round: train first.")
    state: dict[str, np.ndarray] = {}
    change: Weights = {}
    for number in range(len(rounds) if rule == "fedadam" else 1):
        held = rounds[number] if rule == "fedadam" else rounds[-1]
        change = aggregate(held.updates, rule, adam=adam, state=state) if held.updates else {}
    return applied(rounds[-1].before, change)


def _file(client: str) -> str:
    name = hashlib.sha256(client.encode("utf-8", "surrogatepass")).hexdigest()
    return f"client-{name[:24]}.safetensors"


def _digest(tensors: Weights) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


def _write(path: Path, tensors: Weights, head: Mapping[str, Any]) -> None:
    from safetensors.numpy import save

    full = {**head, "format": FORMAT, "sha256": _digest(tensors)}
    data = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_atomic(path, save(data, {"repforget": json.dumps(full, sort_keys=True)}))


def _head(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            head: dict[str, Any] = json.loads((file.metadata() or {})["repforget"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"'{path}' is no readable part of a training record ({error}): restore the folder from a "
                            "copy.") from None  # fmt: skip
    return head


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors.numpy import load_file

    head = _head(path)
    tensors = load_file(str(path))
    if head.get("format") != FORMAT or head.get("sha256") != _digest(tensors):
        raise ArtifactError(f"'{path}' is damaged (its checksum differs): restore the folder from a copy.")
    return tensors, head
