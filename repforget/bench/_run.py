"""One benchmark on one model: planned, cached part by part, written as one row of results."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repforget import __version__, discover
from repforget.bench._data import Source
from repforget.bench._records import BenchResult, Part, Reference, Work
from repforget.errors import UsageError
from repforget.progress import Progress
from repforget.store import TIMINGS, Store, checksum, digest, json_bytes, read_json, write_json

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

FORMAT_VERSION = 1
ROW, ITEMS, REFERENCE = "row.json", "items.json", "reference"
FIELDS = ("model", "data", "settings", "seed", "reference", "environment")
PACKAGES = ("torch", "transformers", "numpy", "scipy")
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """A finished run: which model, on what, how, and what came out."""

    model: Mapping[str, Any]  # name, fingerprint, tokenizer, dtype, edit
    data: Mapping[str, Any]  # where, tables (name -> digest)
    settings: Mapping[str, Any]
    seed: int
    result: BenchResult
    reference: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, **vars(self), "result": self.result.to_json()}

    def save(self, folder: Path) -> Path:
        """Write row.json and items.json; both or the older pair stay readable."""
        write_json(folder / ITEMS, self.result.items_json())
        write_json(folder / ROW, self.to_json())
        return folder / ROW

    def as_reference(self) -> Reference:
        return Reference(self.model["name"], self.result, self.model["fingerprint"], self.model["tokenizer"])


def load_row(path: str | Path) -> Row:
    """Read a row from its folder or its ``row.json``; the items come along where ``items.json`` lies beside it."""
    file = Path(path) / ROW if Path(path).is_dir() else Path(path)
    stated = read_json(file)
    if not isinstance(stated, dict) or not {*FIELDS, "result"} <= set(stated) or stated.get("format") != FORMAT_VERSION:
        raise UsageError(f"'{file}' is no row of a benchmark in format {FORMAT_VERSION}: name a folder that "
                         "'repforget bench' has written.")  # fmt: skip
    items = file.with_name(ITEMS)
    result = BenchResult.from_json(stated["result"], read_json(items) if items.is_file() else None)
    return Row(**{name: stated[name] for name in FIELDS}, result=result)


@dataclass(frozen=True)
class Subject:
    """A model to measure. ``identity`` names its weights and its edit; None where they are not known, so not cached."""

    model: LoadedModel
    identity: str | None
    edit: str | None = None


def load_subject(name: str, *, edit: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> Subject:
    """Load a model by name, with a saved edit in place where one is given."""
    from repforget.models.load import load

    model = load(name, device=device, dtype=dtype)
    if edit is None:
        return Subject(model, model.fingerprint)
    from repforget.artifact import load_edit

    saved = load_edit(edit)
    saved.check_base(model)
    sums = digest({path.name: checksum(path) for path in sorted(Path(edit).iterdir()) if path.is_file()})
    return Subject(saved.applied_to(model), f"{model.fingerprint}+{sums}", str(edit))


def in_memory(model: LoadedModel) -> Subject:
    """A model that may have been changed since it was loaded: its weights are read again, hooks forbid a cache."""
    from repforget.models.load import fingerprint

    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    return Subject(model, None if hooked else fingerprint(model.module))


def bench(
    model: LoadedModel | str, name: str, *, data: str | None = None, reference: LoadedModel | str | None = None,
    out: str | Path | None = None, seed: int = 0, progress: Progress | None = None, **settings: Any,
) -> Row:  # fmt: skip
    """Run the benchmark ``name`` on a model and return its row of results.

    ``reference`` is a model that never knew (or the folder of its row); ``out`` keeps finished parts, so that the same
    call continues after an interruption. UnknownNameError, RecipeError or KnowledgeError in one sentence for a wrong
    name, wrong settings or wrong data.
    """

    def opened(which: LoadedModel | str) -> Callable[[], Subject]:
        return lambda: load_subject(which) if isinstance(which, str) else in_memory(which)

    other = None if reference is None else str(reference) if is_row(reference) else opened(reference)
    return run(name, opened(model), data=data, reference=other, settings=settings, seed=seed, progress=progress,
               out=None if out is None else Path(out))  # fmt: skip


def is_row(reference: Any) -> bool:
    """True for the folder or file of a row."""
    named = isinstance(reference, (str, Path))
    return named and (str(reference).endswith(".json") or (Path(reference) / ROW).is_file())


def run(
    name: str, model: Callable[[], Subject], *, data: str | None = None,
    reference: str | Callable[[], Subject] | None = None, settings: Mapping[str, Any] | None = None, seed: int = 0,
    out: Path | None = None, progress: Progress | None = None, echo: Echo = lambda line: None,
) -> Row:  # fmt: skip
    """Measure the reference first, then the model; each is opened only when its turn comes, and let go after it."""
    method = discover.method("bench", name)
    chosen = method.settings(settings or {})
    source = Source(data or _default_data(method))
    store = None if out is None else Store(out, note=echo)
    with nullcontext() if store is None else store.locked():
        never: Row | None = None
        if isinstance(reference, str):
            never = load_row(reference)
            _check_reference(never, name, chosen, reference)
        elif reference is not None:
            never = _measure(method, reference(), source, None, chosen, seed, store, progress)
            if out is not None:
                never.save(out / REFERENCE)
            gc.collect()
        row = _measure(method, model(), source, never, chosen, seed, store, progress)
        if out is not None:
            before = load_row(out) if (out / ROW).is_file() else row
            if json_bytes(before.to_json()) != json_bytes(row.to_json()):
                echo(f"The row of {before.result.benchmark} on {before.model['name']} in '{out}' is replaced.")
            row.save(out)
    return row


def _measure(
    method: discover.Method, subject: Subject, source: Source, never: Row | None, settings: Mapping[str, Any],
    seed: int, store: Store | None, progress: Progress | None,
) -> Row:  # fmt: skip
    from repforget.models._fingerprint import tokenizer_digest

    model, started = subject.model, time.monotonic()
    source = Source(source.where)
    late = method.constant("AGGREGATION", ())  # settings that no part depends on
    key = {"benchmark": method.name, "model": subject.identity, "seed": seed, "version": __version__,
           "device": model.device.type, "settings": {k: v for k, v in settings.items() if k not in late}}  # fmt: skip
    part = cached(None if subject.identity is None else store, key, source)
    given: dict[str, Any] = {"data": source, "part": part, "seed": seed, "progress": progress,
                             "reference": never.as_reference() if never else None}  # fmt: skip
    wanted = {name: value for name, value in given.items() if name in _parameters(method)}
    result: BenchResult = method.function(model, **wanted, **settings)
    theirs = never.data["tables"] if never else source.seen
    other = sorted(name for name in {*theirs, *source.seen} if theirs.get(name) != source.seen.get(name))
    if other and not settings.get("unpaired"):
        raise UsageError(f"The reference was measured on other data ({', '.join(other)} differ): measure it again.")
    if never is not None and never.model["fingerprint"] == subject.identity:
        result = result.with_notes("the reference is the model itself")
    described = {"name": model.name, "fingerprint": subject.identity or model.fingerprint, "edit": subject.edit,
                 "tokenizer": tokenizer_digest(model.tokenizer),
                 "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
    if store is not None:
        _record_cost(store, method.name, model, time.monotonic() - started)
    environment = {**{package: version(package) for package in PACKAGES}, "repforget": __version__,
                   "device": model.device.type}  # fmt: skip
    return Row(described, {"where": source.where, "tables": dict(source.seen)}, dict(settings), seed, result,
               dict(never.model) if never else None, environment)  # fmt: skip


def cached(store: Store | None, key: Mapping[str, Any], source: Source) -> Part:
    """Parts kept in ``store`` under everything they depend on; without a store they are built every time.

    What was read so far from ``source`` belongs to the key. A built part passes through JSON either way, so that a
    run in one go and a continued one see the same numbers.
    """

    def part(name: str, build: Callable[[], Any]) -> Any:
        if store is None:
            return json.loads(json_bytes(build()))
        everything = {**key, "tables": dict(source.seen)}
        name = "part-" + name.replace("/", "-")
        folder = store.stage(name, everything, lambda folder: write_json(folder / "part.json", build()))
        return read_json(folder / "part.json")

    return part


def _parameters(method: discover.Method) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(method.function).parameters)


def _default_data(method: discover.Method) -> str:
    where = method.constant("DATA")
    if where is None:
        raise UsageError(f"Benchmark '{method.name}' has no data of its own: name a folder or a hub id with --data.")
    return str(where)


def _check_reference(never: Row, name: str, settings: Mapping[str, Any], path: str) -> None:
    """Refuse a reference row of another benchmark or, unless unpaired, of other settings."""
    if never.result.benchmark != name:
        raise UsageError(f"'{path}' is a row of benchmark '{never.result.benchmark}', not '{name}'.")
    mine = {key: value for key, value in settings.items() if key != "unpaired"}
    other = sorted(key for key in mine if never.settings.get(key) != json.loads(json_bytes(mine[key])))
    if other and not settings.get("unpaired"):
        raise UsageError(f"The reference '{path}' was measured with other settings ({', '.join(other)}): measure it "
                         "again with these.")  # fmt: skip


def _record_cost(store: Store, name: str, model: LoadedModel, seconds: float) -> None:
    """Seconds and peak memory of a finished run, in the file of durations: no part of a result."""
    import torch

    peak = {}
    if model.device.type == "cuda":
        peak["peak_device_bytes"] = torch.cuda.max_memory_allocated(model.device)
    try:
        import resource

        peak["peak_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except ImportError:  # Windows
        pass
    path = store.root / TIMINGS
    times = read_json(path) if path.exists() else {}
    write_json(path, {**times, f"{name} {model.name}": {"seconds": round(seconds, 3), **peak}})


@dataclass(frozen=True)
class BenchPlan:
    """What a run will do and need; nothing was loaded for it."""

    benchmark: str
    work: Work
    models: tuple[Any, ...]  # estimates: the model, and the reference where it must be measured
    available_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The models are in memory one after the other; activations and logits come on top."""
        return max(int(size.bytes) for size in self.models)

    def to_json(self) -> dict[str, Any]:
        return {"benchmark": self.benchmark, "work": self.work.to_json(), "peak_bytes": self.peak_bytes,
                "available_bytes": self.available_bytes, "fits": self.peak_bytes <= self.available_bytes,
                "models": [vars(size) for size in self.models]}  # fmt: skip


def plan(
    name: str, model: str, *, data: str | None = None, reference: str | None = None,
    settings: Mapping[str, Any] | None = None, device: str = "auto", dtype: str = "auto",
) -> BenchPlan:  # fmt: skip
    """What the run would cost, from the data and the models' file headers alone."""
    import psutil

    from repforget.models.load import estimate

    method = discover.method("bench", name)
    chosen = method.settings(settings or {})
    work: Work = method.constant("work")(Source(data or _default_data(method)), **chosen)
    names = [model, *([reference] if reference and not is_row(reference) else [])]
    sizes = tuple(estimate(each, device=device, dtype=dtype) for each in names)
    return BenchPlan(name, work, sizes, int(psutil.virtual_memory().available))
