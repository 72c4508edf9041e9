"""What a person's records touched: shards, slices, adapter files and steps, under salted hashes instead of names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repforget.errors import UsageError
from repforget.shards.folder import ADAPTER, INDEX, Training, facts_of
from repforget.shards.plan import Stage, place
from repforget.store import write_json

VERSION = 1


def step_ranges(training: Training) -> dict[Stage, tuple[int, int]]:
    """First and last step (from 1, counted per shard and track) of every finished stage."""
    found: dict[Stage, tuple[int, int]] = {}
    at: Counter[tuple[int, int]] = Counter()
    for stage in training.stages:
        if training.done(stage):
            steps = int(facts_of(training, stage)["steps"])
            before = at[stage.shard, stage.track]
            found[stage] = (before + 1, before + steps)
            at[stage.shard, stage.track] += steps
    return found


def write_index(training: Training) -> Mapping[str, Any]:
    """Write and return ``index.json``: hash of a cluster -> what its records touched; no name and no text in it."""
    ranges = step_ranges(training)
    clusters: dict[str, Counter[tuple[int, int]]] = {}
    for record in training.records:
        cells = clusters.setdefault(training.hashed("cluster", record.cluster), Counter())
        cells[place(training.settings, record)] += 1
    body = {"format": VERSION,
            "clusters": {name: [_touched(training, ranges, cell, n) for cell, n in sorted(cells.items())]
                         for name, cells in sorted(clusters.items())}}  # fmt: skip
    write_json(training.root / INDEX, body)
    return body


def _touched(
    training: Training, ranges: Mapping[Stage, tuple[int, int]], cell: tuple[int, int], records: int
) -> dict[str, Any]:
    shard, piece = cell
    adapters = [{"file": f"{training.path(stage).name}/{ADAPTER}", "track": stage.track, "position": stage.position,
                 "steps": list(steps)}
                for stage, steps in ranges.items() if stage.shard == shard and piece in stage.slices]  # fmt: skip
    return {"shard": shard, "slice": piece, "records": records, "adapters": adapters}


def touched_by(training: Training, name: str) -> list[dict[str, Any]]:
    """What the records of a cluster touched, [] for one that was taken out; UsageError for one never trained on."""
    ranges = step_ranges(training)
    cells = Counter(place(training.settings, r) for r in training.records if name in (r.cluster, r.id))
    if not cells and not training.was_here(name):
        raise UsageError(f"'{name}' is neither a record nor a cluster of '{training.root}': it was never trained on "
                         "there.")  # fmt: skip
    return [_touched(training, ranges, cell, n) for cell, n in sorted(cells.items())]


def summed_scores(training: Training, path: str | Path) -> dict[tuple[int, int], float]:
    """Influence scores per (shard, slice), from JSON lines with ``score`` and ``id`` or ``cluster``.

    'repforget influence find --clusters' writes such lines.  Records that were taken out count for nothing; any other
    name that is not in the training is refused, and so is a cluster whose records lie in several slices (unit: record).
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_bytes().splitlines() if line.strip()]
        pairs = [(str(line["id"] if "id" in line else line["cluster"]), float(line["score"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"The scores '{path}' cannot be read ({error}): give JSON lines with score, and id or "
                         "cluster.") from None  # fmt: skip
    cells: dict[str, set[tuple[int, int]]] = {}
    for record in training.records:
        for name in (record.cluster, record.id):
            cells.setdefault(name, set()).add(place(training.settings, record))
    found: dict[tuple[int, int], float] = {}
    for name, score in pairs:
        if len(cells.get(name, ())) == 1:
            (cell,) = cells[name]
            found[cell] = found.get(cell, 0.0) + score
        elif name in cells or not training.was_here(name):
            why = "lies in several slices" if name in cells else "is neither a record nor a cluster"
            raise UsageError(f"'{name}' in '{path}' {why} of '{training.root}': give scores of its records.")
    return found
