"""``repforget calibrate``: every verifier on every organism, each pair a stage that a killed run keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from repforget._sealed import end_with_parent
from repforget._session import code_digest, versions
from repforget.calibration.pool import Organism, asked, organisms
from repforget.calibration.table import Row, table
from repforget.discover import methods
from repforget.knowledge import View
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.store import Store, read_json, write_json

KNOWLEDGE = "bios-people"
BENCHMARK = "tofu"  # measured beside the verifiers; what a benchmark says never votes
RESULT = "calibration.json"
# Measures that a small budget leaves out are measured here all the same.
WHOLE: Mapping[str, Mapping[str, Any]] = {
    "behaviour": {"samples": 4}, "quantize": {"kinds": ["int8", "nf4", "int4", "int3"]},
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a calibration does: which verifiers, with which budget, on how many forget items."""

    verifiers: tuple[str, ...]
    budget: str = "quick"
    items: int = 96
    jobs: int = 1
    out: str = "runs/calibration"
    code: str = field(default_factory=code_digest)  # the processes and the resumed run must be of the same code


def chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    """What is named, or all verifiers that measure knowledge and the benchmark."""
    known = [m.name for m in methods("verify") if any(i.kind == "knowledge" for i in m.constant("MEASURES").values())]
    return tuple([*known, BENCHMARK] if names is None else names)


def calibrate(plan: Plan, progress: Progress | None = None) -> list[Row]:
    """Measure and write ``calibration.json`` into the plan's folder; the same call resumes.

    Costs each verifier at the plan's budget on 27 models of the organism; nothing is read but the package itself.
    """
    store = Store(Path(plan.out))
    with store.locked():
        todo = list(organisms())
        if plan.jobs == 1:
            for organism in track(progress, todo, "organisms", len(todo)):
                measure(plan, organism)
        else:
            _side_by_side(plan, todo, progress)
        found = {organism: collected(plan, organism) for organism in todo}
        rows = table(found)
        write_json(store.root / RESULT, document(plan, todo, rows))
    return rows


def _side_by_side(plan: Plan, todo: Sequence[Organism], progress: Progress | None) -> None:
    with ProcessPoolExecutor(plan.jobs, get_context("spawn"), initializer=end_with_parent) as workers:
        running: list[Future[None]] = [workers.submit(measure, plan, organism) for organism in todo]
        try:
            for done in track(progress, as_completed(running), "organisms", len(running)):
                done.result()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def _key(plan: Plan, organism: Organism, verifier: str) -> dict[str, Any]:
    return {"organism": vars(organism), "verifier": verifier, "budget": plan.budget, "items": plan.items,
            "versions": versions(), "code": plan.code}  # fmt: skip


def measure(plan: Plan, organism: Organism) -> None:
    """All verifiers on one organism, one stage each; the model is made only if a stage is missing."""
    store = Store(Path(plan.out))
    missing = [name for name in plan.verifiers if not store.done("measure", _key(plan, organism, name))]
    if not missing:
        return
    import torch

    from repforget.models.load import load
    from repforget.verify.arms import References
    from repforget.verify.battery import measure as run
    from repforget.verify.battery import tasks

    torch.set_num_threads(1)
    knowledge = load_knowledge(KNOWLEDGE)
    view = asked(knowledge, plan.items)
    original, *twins = (load(f"organism:bios{suffix}") for suffix in ("", "/twin-0", "/twin-1"))
    references = References(original, tuple(twins))
    with organism.open(knowledge) as model:
        for name in missing:

            def build(folder: Path, name: str = name) -> None:
                started = time.process_time()
                if name == BENCHMARK:
                    found = benchmarked(model, view)
                else:
                    task = tasks([{name: {"budget": plan.budget, **WHOLE.get(name, {})}}])[0]
                    found = run(task, model, view, references)
                write_json(folder / "measurement.json", found.to_json() | {"seconds": time.process_time() - started})

            store.stage("measure", _key(plan, organism, name), build)


def benchmarked(model: LoadedModel, view: View) -> Measurement:
    """The forget metrics of TOFU on the view's people, each turned so that higher means more knowledge."""
    from repforget.bench._run import bench
    from repforget.organism.tofu_files import write_tofu
    from repforget.organism.world import make_world

    asked = {item.cluster for item in view.forget}
    with TemporaryDirectory() as folder:
        for path in write_tofu(make_world(0), Path(folder)):
            if path.name.endswith("_perturbed.json"):
                lines = path.read_text("utf-8").splitlines(keepends=True)
                if path.name.startswith("forget"):
                    lines = [line for line in lines if json.loads(line)["cluster"] in asked]
                path.write_text("".join(lines[: len(view.forget)]), encoding="utf-8")
        metrics = bench(model, BENCHMARK, data=folder).result.metrics
    scores = {}
    for name, metric in metrics.items():
        if name.startswith("forget.") and metric.items is not None:
            sign = 1.0 if metric.better == "lower" else -1.0
            scores[name.removeprefix("forget.")] = replace(metric.items, values=sign * metric.items.values)
    return Measurement(scores)


def collected(plan: Plan, organism: Organism) -> Mapping[str, Mapping[str, Any]]:
    """Verifier -> measurement (plain data) of one organism."""
    store = Store(Path(plan.out))
    return {name: read_json(store.place("measure", _key(plan, organism, name)) / "measurement.json")
            for name in plan.verifiers}  # fmt: skip


def document(plan: Plan, pool: Sequence[Organism], rows: Sequence[Row]) -> dict[str, Any]:
    """What ``calibration.json`` holds: how it was made, the organisms, one entry per measure."""
    return {
        "budget": plan.budget, "items": plan.items, "knowledge": KNOWLEDGE, "versions": versions(),
        "organisms": [{"name": o.name, "truth": o.truth, "role": o.role} for o in pool],
        "measures": {row.name: row.to_json() for row in rows},
    }  # fmt: skip
