"""A training as a folder: the edit, what was trained on what, and the same command as the resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from repforget.artifact import Edit, load_edit
from repforget.artifact.edit import plain
from repforget.errors import ArtifactError, UnknownNameError, UsageError, nearest
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel
from repforget.private.state import State, alone, refuse_another
from repforget.private.statement import group_report, group_rows
from repforget.private.trainer import METHOD, Echo, Privacy, requested, train
from repforget.progress import Progress
from repforget.store import write_json
from repforget.training import Record, read_records, records_of
from repforget.training.items import Forms, digest

RECORD = "train.json"
SETS = ("forget", "retain", "neighbours")


def records_for(
    data: Path | None, probe: str | None, sets: Sequence[str] | None = None, forms: Forms = "all"
) -> tuple[tuple[Record, ...], str]:
    """The records of a JSON-lines file or of sets of a probe (default: bios-people, forget), and what they are called.

    Raises UsageError where both or an unknown set are asked for, and what reading them raises.
    """
    if data is not None:
        if probe is not None or sets:
            raise UsageError("Training data were given both as --data and as a probe: give one of them.")
        return read_records(data), data.name
    wanted = tuple(sets or ("forget",))
    for name in wanted:
        if name not in SETS:
            raise UnknownNameError(f"A probe has no training set '{name}': {nearest(name, SETS)}")
    if forms not in get_args(Forms):
        raise UnknownNameError(f"Records have no forms '{forms}': {nearest(forms, get_args(Forms))}")
    knowledge = load_knowledge(probe or "bios-people")
    return records_of(knowledge, wanted, forms), f"{knowledge.name}: {', '.join(wanted)} ({forms})"


def run(
    model: LoadedModel, records: Sequence[Record], out: str | Path, *, rank: int | None = None, epochs: float = 10.0,
    lr: float = 1e-3, batch: int = 32, seed: int | None = None, private: Privacy | None = None,
    name: str = "the records given", progress: Progress | None = None, echo: Echo = lambda line: None,
) -> Edit:  # fmt: skip
    """:func:`train` into the folder ``out``: the edit, and ``train.json`` on what was trained and how.

    A folder that holds the finished training of the same request is returned as it is, an interrupted one continued
    to the same bits; UsageError where it holds another, ResourceError while another process trains into it.
    """
    out = Path(out)
    with alone(out, beside(out, "training"), echo):
        kept = State(unfinished(out), {})
        if (out / "edit.json").is_file():
            made = load_edit(out)
            asked = {**plain(requested(records, rank, epochs, lr, batch, seed, private, name)),
                     "model": model.fingerprint, "digest": digest(records)}  # fmt: skip
            held = {**made.manifest.settings, "model": made.manifest.base_fingerprint,
                    "digest": made.manifest.knowledge}  # fmt: skip
            if made.manifest.method != METHOD:
                raise UsageError(f"'{out}' holds an edit by '{made.manifest.method}': give another folder.")
            refuse_another(asked, {n: held.get(n) for n in asked}, f"'{out}' holds a finished training")
            if not (out / RECORD).is_file():
                _write(out, made, model)
            kept.discard()
            return made
        if out.is_file() or out.is_dir() and any(out.iterdir()):
            raise ArtifactError(f"'{out}' exists and is not an edit: choose an empty or new folder.")
        made = train(model, records, rank=rank, epochs=epochs, lr=lr, batch=batch, seed=seed, private=private,
                     state=kept.file, name=name, progress=progress, echo=echo)  # fmt: skip
        made.save(out)
        _write(out, made, model)
        kept.discard()  # with it goes the seed of the noise
        return made


def _write(out: Path, made: Edit, model: LoadedModel) -> None:
    write_json(out / RECORD, facts(made) | {"trained_fingerprint": made.applied_to(model).fingerprint})


def unfinished(out: Path) -> Path:
    """The file beside ``out`` in which an unfinished training is kept."""
    return beside(out, "unfinished")


def beside(out: Path, kind: str) -> Path:
    """A hidden name beside ``out``."""
    named = out if out.name not in ("", "..") else out.resolve()
    return named.parent / f".{named.name}.{kind}"


def facts(edit: Edit) -> dict[str, Any]:
    """What was trained on what, as plain data; for a private training also what it says about sets of units."""
    manifest = edit.manifest
    body: dict[str, Any] = {"model": manifest.model, "base_fingerprint": manifest.base_fingerprint,
                            "data_digest": manifest.knowledge, "edit_digest": edit.digest,
                            "weights": list(manifest.weights), "settings": dict(manifest.settings)}  # fmt: skip
    held = manifest.guarantee
    if held is not None:
        said = held.numbers["epsilon"], held.numbers["delta"]
        units, unit = int(held.numbers["units"]), manifest.settings["private"]["unit"]
        body["guarantee"] = {**dataclasses.asdict(held), "groups": group_rows(*said, units),
                             "unit_word": unit, "sentence": group_report(*said, unit, units)}  # fmt: skip
    return body
