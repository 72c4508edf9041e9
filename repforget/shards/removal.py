"""Records taken out of a sharded training: only the slices that saw them are trained again, and the old ones go.

The result is, bit for bit, what the same training without the records would have been (:mod:`repforget.shards.plan`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from repforget.errors import UsageError
from repforget.guarantee import Guarantee
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.shards.folder import ERRORS, LEDGER, Training, build, environments, opened, write_records
from repforget.shards.index import write_index
from repforget.shards.plan import Stage, place
from repforget.store import TIMINGS, read_json, write_json
from repforget.training import Record, chosen

THEOREMS = {
    "sisa": "sharded, isolated, sliced and aggregated training: every part that saw a record is trained again without "
            "it (Bourtoule et al. 2021, arXiv 1912.03817)",
    "s3t": "sequence-aware sharded and sliced training: a block trained after a record came in is dropped, the blocks "
           "before it never saw it (Chowdhury et al. 2024, arXiv 2406.16257)",
}  # fmt: skip
ASSUMPTIONS = (
    "weights, configuration and tokenizer of the base stay as they are, and it was never trained on the records",
    "ids and clusters name all that is to go: copies under other names, and other data that carry the same knowledge, "
    "stay",
    "equality in bits needs what training needed: the same software, device and number of threads",
    "requests are not chosen by looking at the models whose training they are about",
    "earlier models, exports, backups and the blocks of the disk lie outside the folder; whoever holds a model from "
    "before and one from after can compare them and find out what was taken out",
)


@dataclass(frozen=True)
class Outcome:
    """What a request did, counted: records taken out, shards and stages it touched, steps and passes of training.

    ``share``: record passes of the stages that had to be trained again, over those of the whole training; ``trained``
    stages, ``steps`` and ``passes`` are those of this call, without what an editor has trained before.  ``same_text``:
    records left that say the same, word for word.  ``notes``: what else must be said.
    """

    records: int
    shards: int
    erased: int
    trained: int
    steps: int
    passes: int
    share: float
    same_text: int
    guarantee: Guarantee
    notes: tuple[str, ...] = ()


def take_out(
    training: Training, names: Iterable[str], model: Callable[[], LoadedModel], progress: Progress | None = None
) -> tuple[Training, Outcome]:
    """Take records (ids or clusters) out of a training and of its folder; ``model`` gives the base where it is needed.

    The hashes of their names go to the ledger, the records leave ``records.jsonl``, every stage that saw one of them
    is erased, and for "sisa" the affected shards are trained again from the affected slice on.  Killed at any moment,
    the same call finishes.  UsageError for a name that was never trained on.  Hold ``training.store.locked()``.
    """
    training, names = opened(training.root, training.store.note), list(dict.fromkeys(names))
    if not names:
        raise UsageError("No name was given: give ids or clusters of the records that are to go.")
    here = {name for r in training.records for name in (r.id, r.cluster)}
    left_to_go = [name for name in names if name in here or not training.was_here(name)]
    going = chosen(training.records, left_to_go, str(training.root)) if left_to_go else ()
    left = without(training, going)
    gone, gone_clusters = _ledger(training, left, going)
    after = replace(training, records=left, gone=gone, gone_clusters=gone_clusters)
    training_again = after.settings.order == "sisa" and not all(map(after.done, after.stages))
    base = model() if training_again else None  # before anything is written
    if base is not None:
        after.check_base(base)
    write_json(after.root / LEDGER, {"records": sorted(after.gone), "clusters": sorted(after.gone_clusters)})
    write_records(after)
    erased = erase(after)
    made = [] if base is None else build(after, base, progress)
    write_index(after)
    return after, _outcome(training, after, going, erased, made)


def without(training: Training, going: Sequence[Record]) -> tuple[Record, ...]:
    gone = set(going)
    return tuple(r for r in training.records if r not in gone)


def complete(training: Training, model: LoadedModel, progress: Progress | None = None) -> list[Stage]:
    """Train what is not trained yet, erase stages of other records, write the index; returns the stages trained."""
    training = opened(training.root, training.store.note)  # as it is now, so that nothing comes back
    training.check_base(model)
    write_records(training)
    erase(training)
    made = build(training, model, progress)
    write_index(training)
    return made


def _ledger(
    training: Training, left: Sequence[Record], going: Sequence[Record]
) -> tuple[frozenset[str], frozenset[str]]:
    """The hashes of ids, and of clusters of which nothing is left, with those that are going."""
    clusters = {r.cluster for r in going} - {r.cluster for r in left}
    return (training.gone | {training.hashed("record", r.id) for r in going},
            training.gone_clusters | {training.hashed("cluster", c) for c in clusters})  # fmt: skip


def erase(training: Training) -> int:
    """Erase every stage of other records, finished or not, and what the folder keeps about it; returns how many."""
    old = training.stale()
    for path in old:
        shutil.rmtree(path)
    (training.root / ERRORS).unlink(missing_ok=True)  # a traceback may quote a record
    times = training.root / TIMINGS
    if times.is_file():
        kept = {training.path(stage).name for stage in training.stages}
        write_json(times, {name: value for name, value in read_json(times).items() if name in kept})
    return len(old)


def share(before: Training, after: Training) -> float:
    """Record passes of the stages of ``after`` that ``before`` does not share, over those of all; 0 for "s3t"."""
    known = {before.path(stage).name for stage in before.stages}
    passes = [(stage.passes(after.settings), after.path(stage).name not in known) for stage in after.stages]
    again = sum(n for n, new in passes if new and after.settings.order == "sisa")
    return again / max(1, sum(n for n, _ in passes))


def _outcome(
    before: Training, after: Training, going: Sequence[Record], erased: int, made: Sequence[Stage]
) -> Outcome:
    s = after.settings
    texts = {(r.prompt, r.answer) for r in going}
    same = sum((r.prompt, r.answer) in texts for r in after.records)
    shards = {place(s, r)[0] for r in going}
    passes = sum(stage.passes(s) for stage in made)
    cost = max(share(before, after), passes / max(1, sum(stage.passes(s) for stage in after.stages)))
    notes = []
    if same:
        notes.append(f"{same} records that are left say the same, word for word, under other names.")
    split = sum(len({place(s, r) for r in going if r.cluster == c}) > 1 for c in {r.cluster for r in going})
    if split:
        notes.append(f"The unit is the record: the records of {split} clusters lay in several shards or slices.")
    numbers = {"records": float(len(going)), "shards": float(len(shards)), "share": cost,
               "same text left": float(same)}  # fmt: skip
    return Outcome(
        records=len(going), shards=len(shards), erased=erased, trained=len(made),
        steps=sum(stage.steps(s) for stage in made), passes=passes, share=cost,
        same_text=same, guarantee=guarantee_of(after, len(after.gone), numbers), notes=tuple(notes),
    )  # fmt: skip


def guarantee_of(training: Training, records: int, numbers: Mapping[str, float]) -> Guarantee:
    """What holds for a training without ``records`` records; equal bits only where one environment trained it all."""
    s, seen = training.settings, environments(training)
    count = "1 record" if records == 1 else f"{records} records"
    same = "are, bit for bit," if seen < 2 else f"are, up to the rounding of {seen} environments,"
    left = len(training.records)  # true whatever was taken out by earlier requests, which ``records`` may not count
    whose = (f"those of a training from scratch on what is left (records: {left}), without the {count} taken out"
             if s.order == "sisa" else
             f"those of a training whose blocks never saw the {count} taken out")  # fmt: skip
    return Guarantee("exact", f"the adapters {same} {whose}", s.unit, THEOREMS[s.order], ASSUMPTIONS,
                     {**numbers, "environments": float(seen)})  # fmt: skip
