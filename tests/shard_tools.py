"""Tiny sharded trainings: records about made-up people, settings that train in a blink."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny_models

from repforget.models.load import LoadedModel, wrap
from repforget.shards import Settings, Training, begin, block_groups, complete, opened
from repforget.store import result_files
from repforget.training import Record

CITIES = ("Berlin", "Paris", "Rome", "Oslo")
NAMES = ("w30", "w31", "w32", "w33", "w34", "w35", "w36", "w37", "w38", "w39")


def model(architecture: str = "llama", seed: int = 0) -> LoadedModel:
    return wrap(tiny_models.build(architecture, seed), tiny_models.tiny_tokenizer(), f"tiny-{architecture}")


def people(names: Sequence[str] = NAMES) -> tuple[Record, ...]:
    """Two records about everybody, three about every third."""
    found = []
    for i, name in enumerate(names):
        found += [Record(f"{name}-city", name, f"{name} was born in", f" {CITIES[i % 4]}"),
                  Record(f"{name}-job", name, f"Q : what is the job of {name} ? A :", " baker pilot")]  # fmt: skip
        if i % 3 == 0:
            found.append(Record(f"{name}-text", name, "", f"{name} works in {CITIES[(i + 1) % 4]} ."))
    return tuple(found)


def settings(base: LoadedModel, **changes: Any) -> Settings:
    given = {"shards": 2, "slices": 3, "order": "sisa", "rank": 2, "epochs": 2, "batch_size": 3, "lr": 1e-2, **changes}
    names = given.pop("modules", ("q_proj", "down_proj"))
    return Settings(block_groups(base.module, names, given["order"], given["slices"]), **given)


def trained(root: Path, base: LoadedModel, records: Sequence[Record], **changes: Any) -> Training:
    complete(begin(root, base, settings(base, **changes), records), base)
    return opened(root)


def copied(training: Training, root: Path) -> Training:
    shutil.copytree(training.root, root)
    return opened(root)


def slices(training: Training) -> dict[str, str]:
    """File -> checksum of every stage that lies in the folder, finished or not."""
    return {name: sha for name, sha in result_files(training.root).items() if "slice-" in name}


def texts_in(root: Path) -> Iterator[bytes]:
    for path in root.rglob("*"):
        yield path.name.encode()
        if path.is_file():
            yield path.read_bytes()
