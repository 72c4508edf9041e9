"""Requests about a sharded training: its records are taken out by theorem, and nothing needs to be judged."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.knowledge_files import load_knowledge
from repforget.progress import Progress
from repforget.requests import matching
from repforget.requests.ledger import Ledger
from repforget.requests.run import Made, edit_facts, environment
from repforget.requests.stack import in_force, workplace
from repforget.requests.states import WAITING, Request, requests
from repforget.store import Store, read_json, write_json

if TYPE_CHECKING:
    from repforget.artifact import Edit
    from repforget.models.load import LoadedModel
    from repforget.shards import Training
    from repforget.training.items import Record

SCHEME = "training:"  # a source of names that is no probe


def known(request: Request, training: Path | None) -> Path | None:
    """The folder of the training that answers a request, or None where the loop does."""
    if training is not None:
        return training
    return Path(request.source.removeprefix(SCHEME)) if request.source.startswith(SCHEME) else None


def named(folder: str | Path) -> tuple[matching.Named, ...]:
    """The records of a training as what can be named; a probe's items by the id that their records begin with."""
    from repforget.shards import opened

    return _named(opened(folder).records)


def _named(records: tuple[Record, ...]) -> tuple[matching.Named, ...]:
    return tuple(matching.Named(r.id, tuple(dict.fromkeys((r.id, r.id.partition("#")[0], r.cluster))),
                                (r.prompt, r.answer)) for r in records)  # fmt: skip


def refusal(ledger: Ledger, request: Request, folder: Path) -> str | None:
    """Why nothing can be taken out for a request, or None."""
    from repforget.shards import opened

    if _pending(ledger, request).is_file():
        return None
    found, unknown = _records(ledger, request, opened(folder))
    if unknown:
        return (f"{unknown} of its {len(request.names)} names mean nothing in the training '{folder.name}': it was "
                "never trained on them, or they were taken out before.")  # fmt: skip
    return None if found else f"All of it was taken out before, or the training '{folder.name}' never had it."


def _records(ledger: Ledger, request: Request, training: Training) -> tuple[list[str], int]:
    """Ids of the records that a request means, and how many of its names never meant any.

    A request for a whole probe means what the training has of it.
    """
    names = request.names or tuple(dict.fromkeys(item.id for item in load_knowledge(request.source).forget))
    known = matching.index(_named(training.records), ledger.pseudonym)
    unknown = [name for name in request.names if name not in known and not training.was_here(name)]
    return list(matching.matched(names, known)[0]), len(unknown)


def tidy(ledger: Ledger, store: Store) -> None:
    """Discard what was kept for requests that have their answer by now."""
    for request in requests(ledger) if any(store.root.glob("pending-*.json")) else ():
        if request.state not in WAITING:
            _pending(ledger, request).unlink(missing_ok=True)


def _pending(ledger: Ledger, request: Request) -> Path:
    return workplace(ledger) / f"pending-{request.id}.json"


def take_out(ledger: Ledger, request: Request, folder: Path, store: Store, progress: Progress | None) -> Made:
    """Make the edit with the editor ``shard_removal``, then take the records out of the folder of the training.

    The edit, on the base, is all adapters without the records.  What is going is kept in a file until it is gone, so
    that a killed call finishes.  Cost: training of the affected shards from the affected slice on.
    """
    from repforget import shards
    from repforget.models.load import load
    from repforget.training.items import digest

    if any(not placed.sharded for placed in in_force(ledger)):
        raise UsageError("Edits of the loop are in force for this model, and a sharded training does not have them: "
                         "use another --ledger for the training.")  # fmt: skip
    training = shards.opened(folder)
    pending, place = _pending(ledger, request), store.root / f"edit-{request.id}"
    if not pending.is_file():
        write_json(pending, _records(ledger, request, training)[0])
    ids = list(read_json(pending))
    base = load(training.base["model"], dtype=training.base["dtype"])
    edit = _without(training, base, ids, place, progress)
    with training.store.locked():
        training, outcome = shards.take_out(training, ids, lambda: base, progress)
    held = shards.guarantee_of(training, len(ids), {**outcome.guarantee.numbers, "records": float(len(ids))})
    if edit is None and training.records:  # interrupted when the records were gone already
        edit = shards.combined(training, base)
        edit = replace(edit, manifest=replace(edit.manifest, guarantee=held, knowledge=digest(training.records)))
        edit.save(place)
    sentence = f"{len(ids)} records were taken out of the training: {held.statement}."
    body = {"outcome": "exact", "sentence": sentence, "worst": None, "controls_ok": True, "artifact": "weights",
            "split": "none", "in_force": True, "guarantee": asdict(held),
            "notes": (*outcome.notes, *_earlier(store, request))}  # fmt: skip
    events: list[tuple[str, dict[str, Any]]] = []
    if edit is not None:
        events.append(("edit", edit_facts(edit, place, store.root, (), [request.id], "sharded")))
        body |= {"result": edit.digest, "folder": place.name}
    events += [("environment", environment(base.fingerprint)), ("verdict", body)]
    return Made("exact", sentence, place.name if edit is not None else "", (request.id,), tuple(events))


def _earlier(store: Store, request: Request) -> tuple[str, ...]:
    """What is said of the edits of earlier requests, whose adapters the records of this one have taught."""
    kept = sorted(place.name for place in store.root.glob("edit-*") if place.name != f"edit-{request.id}")
    if not kept:
        return ()
    return (f"Edits of other requests ({', '.join(kept)}) stay in the ledger's folder, and those made before hold "
            "weights that these records have taught: erase them when no check needs them.",)  # fmt: skip


def _without(
    training: Training, base: LoadedModel, ids: list[str], place: Path, progress: Progress | None
) -> Edit | None:
    """The edit without the records, made by the editor or saved by an interrupted call for the very same records.

    None where the editor can make none: nothing is left, or the records are gone already.
    """
    from repforget.artifact import load_edit
    from repforget.edit._dispatch import edit
    from repforget.training.items import digest

    names = set(ids)
    left = [record for record in training.records if record.id not in names]
    wanted = digest(left)
    if place.is_dir() and (saved := load_edit(place)).manifest.knowledge == wanted:
        return saved
    if not left or len(left) == len(training.records):
        return None
    there = [record.id for record in training.records if record.id in names]
    data = EditData((), (), (), {}, wanted)
    made = edit(base, data, "shard_removal", progress=progress, folder=str(training.root), names=there)
    made.save(place)
    return made
