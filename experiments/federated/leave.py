"""Eight clients train together, one leaves by five ways, and the judge of every other edit looks at what is left.

    python experiments/federated/leave.py --out runs/federated

The clients share the 64 people of the probe; the base never saw any of them. For the judge the trained model is the
original, the leaving client's eight people are what must go, the people of the other clients are what must stay, and
two trainings without the client are the models that never knew. The same command continues a killed run; with
``--seeds`` it does some of the seeds, so that several processes can share the work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student_t

from repforget import verify
from repforget.artifact import Edit, load_edit
from repforget.federated.distil import Distillation
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
FLOOR = ("retrain", "retrain, another seed")


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


@dataclass(frozen=True)
class Trial:
    """One seed: the clients, who of them leaves, and a folder in which every step is kept."""

    recipe: Mapping[str, Any]
    seed: int
    out: Path
    base: LoadedModel
    knowledge: Knowledge
    engine: Any

    @property
    def leaving(self) -> str:
        return str(self.recipe["leaves"][self.seed])

    @cached_property
    def sources(self) -> Any:
        return of_probe(self.recipe["knowledge"], self.recipe["clients"], seed=self.seed)

    def train(self, name: str, seed: int, sources: Any) -> Edit:
        plan = Plan(self.recipe["model"], Local(**self.recipe["local"], seed=seed), **self.recipe["plan"])
        return simulate(self.base, plan, sources, self.out / name, engine=self.engine, note=print)

    def made(self, way: str) -> Edit:
        """The edit of one way; the second retraining is a training of its own, of the others under another seed."""
        if way == FLOOR[1]:
            others = {name: source for name, source in self.sources.items() if name != self.leaving}
            return self.train("again", self.seed + self.recipe["again"], others)
        settings = dict(self.recipe["ways"][way])
        if "distil" in settings:
            settings["distil"] = Distillation(**settings["distil"], seed=self.seed)
        place = self.out / way
        if not (place / "forget.json").exists():
            leave(self.base, self.out / "training", self.leaving, out=place, keep_record=True, note=print, **settings)
        return load_edit(place / "edit")

    def cost(self, way: str) -> dict[str, float]:
        if way in ("trained", FLOOR[1]):
            totals = read_json(self.out / ("training" if way == "trained" else "again") / "report.json")["totals"]
            return {"cpu_seconds": totals["client_seconds"], "down": totals["down"], "up": totals["up"]}
        found = read_json(self.out / way / "forget.json")
        return {k: found[k] for k in ("cpu_seconds", "down", "up", "trainings", "distil_steps", "distil_cpu_seconds")}

    def told(self, way: str) -> list[str]:
        return [] if way == FLOOR[1] else read_json(self.out / way / "forget.json")["notes"]

    def known(self, model: LoadedModel, probe: Knowledge) -> dict[str, float]:
        return {"client's people": recalled(model, probe.forget), "others' people": recalled(model, probe.retain),
                "people of the base": recalled(model, self.knowledge.retain[::4])}  # fmt: skip


def step(place: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` found, from the file where an earlier run left it."""
    if not place.exists():
        started = time.process_time()
        found = work()
        write_json(place, {**found, "process_seconds": time.process_time() - started})
        print(place.stem, json.dumps(found)[:400], flush=True)
    return dict(read_json(place))


def judged(trial: Trial) -> dict[str, Any]:
    """Every way of one seed, and the models before it."""
    probe = probe_of(trial.knowledge, frozenset(trial.sources[trial.leaving].clusters))
    before = trial.train("training", trial.seed, trial.sources)
    local = Setup.read(trial.out / "training").plan.local
    base, trained = trial.base, before.applied_to(trial.base)
    rows = {"base": step(trial.out / "base.json", lambda: trial.known(base, probe)),
            "trained": step(trial.out / "trained.json", lambda: {**trial.known(trained, probe),
                                                                **trial.cost("trained")})}  # fmt: skip
    twins = {way: trial.made(way).applied_to(base) for way in FLOOR}

    def look(way: str) -> dict[str, Any]:
        made = trial.made(way)
        floor = [twin for name, twin in twins.items() if name != way]
        found = verify(trained, between(trained, base, made, before, local), probe, twins=floor,
                       split=trial.recipe["split"], verifiers=trial.recipe["verify"], seed=trial.seed)  # fmt: skip
        claims = {c.name: [c.status, None if not np.isfinite(c.rho) else round(float(c.rho), 3)]
                  for c in found.verdict.claims}  # fmt: skip
        return {**trial.known(made.applied_to(base), probe), **trial.cost(way), "outcome": found.verdict.outcome,
                "sentence": found.verdict.sentence, "controls": dict(found.verdict.controls), "claims": claims,
                "notes": trial.told(way)}  # fmt: skip

    rows |= {way: step(trial.out / f"{way}.json", lambda way=way: look(way))  # type: ignore[misc]
             for way in trial.recipe["ways"]}  # fmt: skip
    return {"leaves": trial.leaving, "rows": rows}


def interval(values: Sequence[float]) -> list[float]:
    """Mean and half the width of the 95 % interval (Student's t over the seeds)."""
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return [float(np.mean(values)), float(half)]


def summary(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals of every number and every share of a claim, way by way, and of what distillation changed."""
    flat: dict[str, list[dict[str, float]]] = {}
    for seed in seeds.values():
        for way, row in seed["rows"].items():
            shares = {name: rho for name, (_, rho) in row.get("claims", {}).items() if rho is not None}
            flat.setdefault(way, []).append({k: v for k, v in row.items() if isinstance(v, (int, float))} | shares)
    flat["distillation"] = [{key: after[key] - before[key] for key in after if key in before}
                            for before, after in zip(flat["rollback"], flat["rollback, distilled"], strict=True)]
    return {way: {key: interval([row[key] for row in rows]) for key in rows[0] if all(key in row for row in rows)}
            for way, rows in flat.items()}  # fmt: skip


def main() -> None:
    recipe = yaml.safe_load((HERE / "recipe.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", choices=["ray", "here"], default="here")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(recipe["leaves"]), choices=list(recipe["leaves"]))
    asked = parser.parse_args()
    base, knowledge = load(recipe["model"], device="cpu"), load_knowledge(recipe["knowledge"])
    for seed in asked.seeds:
        place = asked.out / f"seed-{seed}"
        write_json(place / "result.json", judged(Trial(recipe, seed, place, base, knowledge, asked.engine)))
    places = {str(seed): asked.out / f"seed-{seed}" / "result.json" for seed in recipe["leaves"]}
    if all(place.exists() for place in places.values()):
        seeds = {seed: read_json(place) for seed, place in places.items()}
        write_json(HERE / "result.json", {"recipe": recipe, "seeds": seeds, "summary": summary(seeds)})


if __name__ == "__main__":
    main()
