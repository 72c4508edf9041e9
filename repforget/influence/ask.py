"""What influence is asked about: the training data, the answers in question, the forget set among the records."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from repforget.errors import UnknownNameError, UsageError, nearest
from repforget.knowledge import Item, Knowledge, Split
from repforget.training import Example, Record, chosen, read_records, records_of

SETS = ("forget", "retain", "neighbours")
FOLDER = "REPFORGET_CACHE"  # environment variable: a folder, or "none"


@dataclass(frozen=True)
class Ask:
    """One prompt and answer, or the items of a probe's ``query`` set on a split, of those clusters or ids ``of``."""

    prompt: str | None = None
    answer: str | None = None
    query: str | None = None
    split: str = "dev"
    of: tuple[str, ...] = ()


def trained_on(knowledge: Knowledge, data: Path | None, sets: Sequence[str] | None) -> tuple[Record, ...]:
    """The training records: of a JSON-lines file, or the sets of a probe as records."""
    if data is not None:
        if sets:
            raise UsageError("Training data were given both as --data and as --sets of a probe: give one of them.")
        return read_records(data)
    wanted = tuple(sets or ("forget", "retain"))
    for name in wanted:
        _known(name, SETS, "set")
    return records_of(knowledge, wanted, "statements")


def asked(knowledge: Knowledge, ask: Ask) -> tuple[Record, ...]:
    """The answers in question as records; UsageError where nothing, or both kinds, or no such item was asked for, and
    for a choice among items of a probe beside one prompt."""
    single = ask.prompt is not None and ask.answer is not None
    if single == (ask.query is not None) or (ask.prompt is None) != (ask.answer is None):
        raise UsageError("No answer was named whose sources are sought: give --prompt with --answer, or --query with a "
                         "set of the probe.")  # fmt: skip
    if single and (ask.of or ask.split != Ask.split):
        raise UsageError("One answer is asked about by --prompt, and --of and --split choose items of a set of the "
                         "probe: leave them out, or ask with --query.")  # fmt: skip
    if single:
        answer = str(ask.answer)
        return (Record("query", "query", str(ask.prompt), answer if answer[:1].isspace() else " " + answer),)
    items = _items(knowledge, _known(str(ask.query), SETS, "set"), ask.split)
    if ask.of:
        clusters = {item.cluster for item in items}
        for name in set(ask.of) - {item.id for item in items}:
            _known(name, clusters, f"item or cluster of the {ask.query} set on the split {ask.split}")
        items = tuple(item for item in items if item.cluster in ask.of or item.id in ask.of)
    if not items:
        raise UsageError(f"The {ask.query} set of '{knowledge.name}' has no items on the split {ask.split}: take "
                         "another split, or all.")  # fmt: skip
    return tuple(Record(item.id, item.cluster, item.questions[0], item.continuation()) for item in items)


def forget_set(
    knowledge: Knowledge, records: Sequence[Record], names: Sequence[str] | None, source: str
) -> tuple[Record, ...]:
    """The records of the forget set: those named by id or cluster, else those of the probe's forget clusters."""
    if names:
        return chosen(records, names, source)
    clusters = {item.cluster for item in knowledge.forget}
    found = tuple(record for record in records if record.cluster in clusters)
    if not found:
        raise UsageError(f"No record of '{source}' is about a forget cluster of '{knowledge.name}': name the forget "
                         "set by ids or clusters.")  # fmt: skip
    return found


def some(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """At most so many of the examples, drawn by seed, in their order."""
    if len(examples) <= most:
        return list(examples)
    return [examples[k] for k in sorted(random.Random(f"some-{seed}").sample(range(len(examples)), most))]


def cache_folder(named: str = "") -> Path | None:
    """Where factors are kept: ``named``, else ``REPFORGET_CACHE``, else the user's cache; None where it is "none"."""
    named = named or os.environ.get(FOLDER, "")
    if named.strip().lower() == "none":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(named).expanduser() if named else Path(base) / "repforget") / "factors"


def _items(knowledge: Knowledge, name: str, split: str) -> tuple[Item, ...]:
    splits: tuple[Split, ...] = get_args(Split)
    _known(split, (*splits, "all"), "split")
    found: tuple[Item, ...] = getattr(knowledge, name)
    for one in splits:
        if one == split:
            found = getattr(knowledge.view(one), name)
    return found


def _known(name: str, valid: Sequence[str] | set[str], kind: str) -> str:
    if name not in valid:
        raise UnknownNameError(f"There is no {kind} '{name}': {nearest(name, valid)}")
    return name
