"""The folder of a sharded training: settings, the records that are left, one stage per slice, who was taken out.

``shards.json`` says what is trained on which base, ``records.jsonl`` holds the records that may be trained on again,
``ledger.json`` salted hashes of the names of those that were taken out, and every ``slice-<hex>`` the factors and the
state of the optimiser after one slice, under a name that follows from everything that went in.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from repforget.errors import ArtifactError, UsageError
from repforget.models._fingerprint import tokenizer_digest
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.shards.adapters import Factors
from repforget.shards.plan import STAGE, Settings, Stage, Unit, planned
from repforget.shards.train import ENVIRONMENT, Trained, train_stage
from repforget.store import TIMINGS, Store, digest, json_bytes, read_json, write_atomic, write_json
from repforget.training import Example, Record, encoded
from repforget.training.items import checked

VERSION = 1
MAIN, RECORDS, LEDGER, INDEX = "shards.json", "records.jsonl", "ledger.json", "index.json"
ADAPTER, MOMENTS, FACTS = "adapter.safetensors", "moments.safetensors", "facts.json"
ERRORS = "error.txt"  # what the command line writes of an unexpected failure


@dataclass(frozen=True)
class Training:
    """An opened folder: what is trained, the ``records`` that are left, and hashes of the names of those ``gone``."""

    store: Store
    settings: Settings
    base: dict[str, str]
    salt: str
    records: tuple[Record, ...]
    gone: frozenset[str] = frozenset()  # hashes of ids
    gone_clusters: frozenset[str] = frozenset()  # hashes of clusters of which nothing is left
    stages: tuple[Stage, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", planned(self.settings, self.base["fingerprint"], self.records))

    @property
    def root(self) -> Path:
        return self.store.root

    def hashed(self, kind: Unit, name: str) -> str:
        """The salted hash under which a name may stay in the folder; whoever holds the folder can try names."""
        return hmac.new(bytes.fromhex(self.salt), f"{kind} {name}".encode(), hashlib.sha256).hexdigest()[:32]

    def was_here(self, name: str) -> bool:
        """True for the id or the cluster of records that were taken out."""
        return self.hashed("record", name) in self.gone or self.hashed("cluster", name) in self.gone_clusters

    def has(self, name: str) -> bool:
        """True for the id or the cluster of records that are left."""
        return any(name in (r.id, r.cluster) for r in self.records)

    def path(self, stage: Stage) -> Path:
        return self.store.place(STAGE, stage.key)

    def done(self, stage: Stage) -> bool:
        return self.store.done(STAGE, stage.key)

    def stale(self) -> list[Path]:
        """Folders of stages, finished or not, that belong to other records than those that are left."""
        wanted = {path for s in self.stages for path in (self.path(s), self.store.unfinished(STAGE, s.key))}
        found = (*self.root.glob(f"{STAGE}-*"), *self.root.glob(f".{STAGE}-*"))
        return sorted(path for path in found if path not in wanted)

    def check_base(self, model: LoadedModel) -> None:
        """ArtifactError where ``model`` is not, bit for bit, the base that the shards were trained on."""
        if _base(model) != {**self.base, "model": model.name}:
            raise ArtifactError(f"The shards in '{self.root}' were trained on '{self.base['model']}' (weights "
                                f"{self.base['fingerprint'][:12]}, {self.base['dtype']}) and '{model.name}' has "
                                f"weights {model.fingerprint[:12]}, {_base(model)['dtype']}, or another tokenizer: "
                                "load the base as it was.")  # fmt: skip


def begin(
    root: str | Path, model: LoadedModel, settings: Settings, records: Sequence[Record],
    note: Callable[[str], None] = lambda sentence: None,
) -> Training:  # fmt: skip
    """Write down what is to be trained, or open the same training again to continue it; nothing is trained yet.

    Records that were taken out of the folder are left out.  UsageError where there are more shards than units, the
    folder holds something else, or a training with other settings, base or records.
    """
    root = Path(root)
    if (root / MAIN).is_file():
        return _again(opened(root, note), model, settings, records, note)
    records = checked(records, str(root))
    units = len({r.cluster if settings.unit == "cluster" else r.id for r in records})
    if settings.shards > units:
        raise UsageError(f"{settings.shards} shards were asked for and the records have {units} units "
                         f"({settings.unit}s): give at most {units} shards.")  # fmt: skip
    held = [p.name for p in root.iterdir()] if root.is_dir() else []
    others = [name for name in held if name not in (RECORDS, TIMINGS) and name[0] != "."]  # a killed start leaves those
    if others:
        raise UsageError(f"'{root}' holds '{sorted(others)[0]}' and no sharded training: choose an empty or new folder "
                         "with --out.")  # fmt: skip
    encoded(model, records)  # refuses what does not fit before anything is written
    base = _base(model)
    made = Training(Store(root, note), settings, base, os.urandom(16).hex(), tuple(sorted(records)))
    write_records(made)
    write_json(root / MAIN, {"format": VERSION, "base": base, "settings": asdict(settings), "salt": made.salt})
    return made


def _again(
    known: Training, model: LoadedModel, settings: Settings, records: Sequence[Record], note: Callable[[str], None]
) -> Training:
    known.check_base(model)
    if digest(asdict(known.settings)) != digest(asdict(settings)):
        old, new = asdict(known.settings), asdict(settings)
        name = next(n for n in old if digest(old[n]) != digest(new[n]))
        raise UsageError(f"'{known.root}' holds a training with {name} {old[name]}, not {new[name]}: give the same "
                         "settings to continue it, or choose another folder.")  # fmt: skip
    left = sorted(r for r in records if known.hashed("record", r.id) not in known.gone)
    if tuple(left) != known.records:
        raise UsageError(f"'{known.root}' holds a training on other records: give the same data to continue it, or "
                         "choose another folder.")  # fmt: skip
    if len(left) < len(records):
        note(f"{len(records) - len(left)} records were taken out of this training and are left out.")
    return known


def opened(root: str | Path, note: Callable[[str], None] = lambda sentence: None) -> Training:
    """Open the folder of a training; UsageError where there is none, or one of another version."""
    root = Path(root)
    if not (root / MAIN).is_file():
        raise UsageError(f"'{root}' holds no sharded training: name the folder that 'repforget train-shards' wrote.")
    body = read_json(root / MAIN)
    if not isinstance(body, dict) or body.get("format") != VERSION:
        found = body.get("format") if isinstance(body, dict) else None
        raise UsageError(f"The training in '{root}' has format {found} and this release reads {VERSION}: use the "
                         "release that wrote it, or train again in a new folder.")  # fmt: skip
    try:
        ledger = read_json(root / LEDGER) if (root / LEDGER).is_file() else {"records": [], "clusters": []}
        gone = (frozenset(ledger["records"]), frozenset(ledger["clusters"]))
        records = [Record(**json.loads(line)) for line in (root / RECORDS).read_bytes().splitlines()]
        settings = Settings.from_json(body["settings"])
        empty = Training(Store(root, note), settings, dict(body["base"]), str(body["salt"]), (), *gone)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"'{root}' is no whole training ({error}): take it from a backup, or train again.") from None
    # The ledger is written first, so that an interrupted request counts and the next command finishes it.
    left = tuple(sorted(r for r in records if empty.hashed("record", r.id) not in gone[0]))
    return Training(empty.store, settings, empty.base, empty.salt, left, *gone)


def write_records(training: Training) -> None:
    lines = [json.dumps(asdict(r), sort_keys=True, ensure_ascii=False) for r in training.records]
    write_atomic(training.root / RECORDS, "".join(f"{line}\n" for line in lines).encode())


def _base(model: LoadedModel) -> dict[str, str]:
    """What a base is known by; the fingerprint of its weights is the same in every precision."""
    return {"model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(model.tokenizer)[:16]}  # fmt: skip


def build(training: Training, model: LoadedModel, progress: Progress | None = None) -> list[Stage]:
    """Train every stage that is not there yet, in order; returns those that were trained."""
    training.check_base(model)
    made: list[Stage] = []
    examples: dict[str, Example] = {}
    for stage in track(progress, training.stages, "slices"):

        def write(folder: Path, stage: Stage = stage) -> None:
            if not examples:
                tokens = encoded(model, training.records) if training.records else ()
                examples.update(zip((r.id for r in training.records), tokens, strict=True))
            before = _before(training, stage)
            partial = training.store.unfinished(STAGE, stage.key)
            _write(folder, train_stage(model, training.settings, stage, examples, before, partial=partial,
                                       progress=progress))  # fmt: skip
            made.append(stage)

        training.store.stage(STAGE, stage.key, write)
    return made


def _before(training: Training, stage: Stage) -> Trained | None:
    """The state in which a stage begins: that after the one before it, for "s3t" the factors of all before it."""
    run = [s for s in training.stages if (s.shard, s.track) == (stage.shard, stage.track)]
    chain = run[: stage.position]
    if not chain:
        return None
    if training.settings.order == "s3t":
        return Trained({n: t for s in chain for n, t in _read(training, s).factors.items()}, {}, {})
    return _read(training, chain[-1])


def _write(folder: Path, trained: Trained) -> None:
    save_file(trained.factors, folder / ADAPTER)
    save_file(trained.moments, folder / MOMENTS)
    (folder / FACTS).write_bytes(json_bytes(trained.facts))


def _read(training: Training, stage: Stage) -> Trained:
    """A finished stage, its checksums checked."""

    def damaged(folder: Path) -> None:
        raise UsageError(f"The slice '{training.path(stage).name}' in '{training.root}' is missing or damaged: repeat "
                         "the command of the training, which trains it again.")  # fmt: skip

    folder = training.store.stage(STAGE, stage.key, damaged)
    return Trained(load_file(folder / ADAPTER), load_file(folder / MOMENTS), read_json(folder / FACTS))


def facts_of(training: Training, stage: Stage) -> dict[str, Any]:
    """Steps, passes over records, last loss and environment of a finished stage."""
    found: dict[str, Any] = read_json(training.path(stage) / FACTS)
    return found


def environments(training: Training) -> int:
    """In how many environments (software, device, threads) the finished stages were trained: with 1, bits compare."""
    facts = [facts_of(training, stage) for stage in training.stages if training.done(stage)]
    return len({tuple(each.get(name) for name in ENVIRONMENT) for each in facts})


def served(training: Training) -> dict[int, tuple[Stage, ...]]:
    """The stages whose factors each shard serves: the last one, for "s3t" the longest run from the first.

    UsageError where a shard of "sisa" is not finished.
    """
    found: dict[int, tuple[Stage, ...]] = {}
    for shard in range(training.settings.shards):
        own = [s for s in training.stages if s.shard == shard]
        if training.settings.order == "sisa":
            if not training.done(own[-1]):
                raise UsageError(f"Shard {shard} of '{training.root}' is not trained to its end: repeat the command "
                                 "of the training, which continues it.")  # fmt: skip
            found[shard] = (own[-1],)
            continue
        runs = [_alive(training, [s for s in own if s.track == t]) for t in range(training.settings.permutations)]
        found[shard] = max(runs, key=lambda run: len(run))
    return found


def _alive(training: Training, run: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages of a track up to the first that is not there."""
    return tuple(itertools.takewhile(training.done, run))


def factors_of(training: Training, stages: Iterable[Stage]) -> Factors:
    """The factors that stages of one shard hold together."""
    return {name: t for stage in stages for name, t in _read(training, stage).factors.items()}
