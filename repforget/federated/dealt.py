"""A client's facts: read from its file, or dealt from a probe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from repforget.errors import UsageError, nearest
from repforget.federated.clients import Client
from repforget.federated.simulate import Here
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.store import write_atomic
from repforget.training import Record, read_records
from repforget.training.items import digest

SETS = ("forget", "retain", "general")


def read_part(path: str | Path) -> tuple[tuple[Record, ...], EditData | None]:
    """The records of a JSON-lines file, and the facts in it where every line says by ``set`` what it is.

    "forget" and "retain" lines have ``relation``, ``prompt`` and ``answer`` (and ``subject``), "general" ones ``text``.
    UsageError names the line and what is wrong with it.
    """
    records = read_records(path)
    lines = [json.loads(line) for line in Path(path).read_bytes().splitlines() if line.strip()]
    if not any("set" in line for line in lines):
        return records, None
    found: dict[str, list[Fact]] = {"forget": [], "retain": []}
    general: list[str] = []
    for number, (line, record) in enumerate(zip(lines, records, strict=True), 1):
        held = str(line.get("set", ""))
        if held not in SETS:
            raise UsageError(f"Line {number} of '{path}' is of the set '{held}': {nearest(held, SETS)}")
        if held == "general":
            general.append(record.prompt + record.answer)
            continue
        if not record.prompt or not str(line.get("relation", "")).strip():
            raise UsageError(f"Line {number} of '{path}' has no 'relation' with prompt and answer: a fact to {held} "
                             "needs all three.")  # fmt: skip
        found[held].append(Fact(record.id, record.cluster, str(line.get("subject", "")), str(line["relation"]),
                                record.prompt, record.answer))  # fmt: skip
    pool: dict[str, Counter[str]] = {}
    for fact in found["retain"]:
        pool.setdefault(fact.relation, Counter())[fact.answer] += 1
    return records, EditData(tuple(found["forget"]), tuple(found["retain"]), tuple(general), pool, digest(records))


def write_part(path: Path, data: EditData) -> None:
    """Facts and texts as the JSON lines that :func:`read_part` reads."""
    rows = [{"set": name, **vars(fact)} for name in ("forget", "retain") for fact in getattr(data, name)]
    rows += [{"set": "general", "id": f"text-{k}", "text": text} for k, text in enumerate(data.general)]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def dealt(data: EditData, clients: int, seed: int = 0) -> dict[str, EditData]:
    """Clients that hold the facts about people of their own, as evenly as can be, and every n-th general text."""
    people = sorted({fact.cluster for fact in (*data.forget, *data.retain)})
    if not 1 <= clients <= len(people):
        raise UsageError(f"{clients} clients cannot share {len(people)} people: give 1 to {len(people)}.")
    order = np.random.default_rng(seed).permutation(len(people))
    home = {people[i]: k for k, part in enumerate(np.array_split(order, clients)) for i in part}

    def own(facts: Sequence[Fact], k: int) -> tuple[Fact, ...]:
        return tuple(fact for fact in facts if home[fact.cluster] == k)

    return {f"client-{k}": replace(data, forget=own(data.forget, k), retain=own(data.retain, k),
                                   general=data.general[k::clients]) for k in range(clients)}  # fmt: skip


def fleet_of(model: LoadedModel, data: EditData, clients: int, seed: int = 0) -> Here:
    """Clients of this process around one model, to whom the people of ``data`` are dealt."""
    return Here({name: Client(name, model, (), data=part) for name, part in dealt(data, clients, seed).items()})
