"""Eight clients train together, one leaves by four ways, and the judge of every other edit looks at what is left.

    python experiments/federated/leave.py --out runs/federated

The clients share the 64 people of the probe; the base never saw any of them. For the judge the trained model is the
original, the leaving client's eight people are what must go, the people of the other clients are what must stay, and
the training without the client is the model that never knew. The same command continues a killed run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from repforget import verify
from repforget.artifact import Edit, load_edit
from repforget.federated.leave import leave
from repforget.federated.messages import Local
from repforget.federated.run import Setup, operations_of, simulate
from repforget.federated.server import Plan
from repforget.federated.sources import of_probe
from repforget.knowledge import Item, Knowledge
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel, load
from repforget.scoring import answer_logprobs
from repforget.store import read_json, write_json

HERE = Path(__file__).parent


def recalled(model: LoadedModel, items: Sequence[Item]) -> float:
    """Share of the items whose answer is the greedy continuation of the first question."""
    scores = answer_logprobs(model, [(item.prompt, item.continuation()) for item in items])
    return float(np.mean(scores.greedy_match))


def probe_of(knowledge: Knowledge, mine: frozenset[str]) -> Knowledge:
    """The probe whose forget set is the leaving client's people and whose retain set are those of the others."""
    forget = [item for item in knowledge.forget if item.cluster in mine]
    kept = [item for item in knowledge.forget if item.cluster not in mine]
    return Knowledge.build("leaving-client", forget, kept, knowledge.neighbours, knowledge.general, knowledge.seed)


def between(trained: LoadedModel, base: LoadedModel, made: Edit, before: Edit, local: Local) -> Edit:
    """The edit of the trained model that makes it what ``made`` makes of the base."""
    a, b = made.applied_to(base).module, before.applied_to(base).module
    state = {name: (a.get_parameter(name) - b.get_parameter(name)).detach().numpy() for name in local.weights}
    return Edit.build(made.manifest.method, {}, trained, made.manifest.knowledge, operations_of(trained, local, state))


def row(model: LoadedModel, probe: Knowledge, world: Sequence[Item]) -> dict[str, float]:
    return {"client's people": recalled(model, probe.forget), "others' people": recalled(model, probe.retain),
            "people of the base": recalled(model, world)}  # fmt: skip


def cost_of(folder: Path) -> dict[str, Any]:
    report = read_json(folder / "report.json")["totals"]
    return {"cpu_seconds": report["client_seconds"], "down": report["down"], "up": report["up"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", choices=["ray", "here"], default="ray")
    out, engine = (parsed := parser.parse_args()).out, parsed.engine
    recipe = yaml.safe_load((HERE / "recipe.yaml").read_text())
    started = time.process_time()
    base, knowledge = load(recipe["model"], device="cpu"), load_knowledge(recipe["knowledge"])
    sources = of_probe(recipe["knowledge"], recipe["clients"], seed=recipe["local"]["seed"])
    plan, leaving = Plan(recipe["model"], Local(**recipe["local"]), **recipe["plan"]), recipe["leaves"]
    training = out / "training"
    before = simulate(base, plan, sources, training, engine=engine, note=print)
    local = Setup.read(training).plan.local
    probe = probe_of(knowledge, frozenset(sources[leaving].clusters))
    world = knowledge.retain[::4]
    trained = before.applied_to(base)
    models = {"base": row(base, probe, world), "trained": {**row(trained, probe, world), **cost_of(training)}}
    result: dict[str, Any] = {"recipe": recipe, "models": models, "verdicts": {}}
    print(json.dumps(models), flush=True)
    twin: LoadedModel | None = None
    for method, settings in recipe["forget"].items():
        place = out / method
        if not (place / "forget.json").exists():
            leave(base, training, leaving, method, place, keep_record=True, note=print, **settings)
        made, cost = load_edit(place / "edit"), read_json(place / "forget.json")
        edited = made.applied_to(base)
        twin = twin or edited
        result["models"][method] = {**row(edited, probe, world), "trainings": cost["trainings"], "down": cost["down"],
                                    "up": cost["up"], "cpu_seconds": cost["cpu_seconds"]}  # fmt: skip
        print(method, json.dumps(result["models"][method]), flush=True)
        found = verify(trained, between(trained, base, made, before, local), probe, twins=[twin], split=recipe["split"],
                       verifiers=recipe["verify"])  # fmt: skip
        result["verdicts"][method] = {
            "outcome": found.verdict.outcome, "sentence": found.verdict.sentence,
            "controls": dict(found.verdict.controls),
            "claims": {c.name: [c.status, None if not np.isfinite(c.rho) else round(float(c.rho), 3)]
                       for c in found.verdict.claims}}  # fmt: skip
        result["own_cpu_seconds"] = time.process_time() - started
        write_json(out / "result.json", result)
    shutil.copyfile(out / "result.json", HERE / "result.json")


if __name__ == "__main__":
    main()


