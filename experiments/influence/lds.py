"""Does influence foretell what retraining without records does?  The linear datamodelling score on the organism.

    python experiments/influence/lds.py [--out runs/influence] [--subsets 32] [--clusters 6]

A model that never knew the forget people (organism:bios/twin-0) is trained on two statements of each of their facts.
It is trained again on random halves of these records, each half with two seeds, and without all records of some people.
What influence at the full model foretells for questions about the facts is compared with what came.  Stages are kept:
the same command continues.  It writes result.json and lds.svg here.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from repforget.influence import curvature, linear_maps, scores
from repforget.influence.score import scores_and_likeness
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel, copy_of, load
from repforget.scoring import answer_logprobs
from repforget.store import Store, json_bytes, read_json, write_json
from repforget.training import Record, encoded, finetune, records_of
from repforget.training.items import digest

HERE = Path(__file__).parent
BASE, KNOWLEDGE = "organism:bios/twin-0", "bios-people"
FORMS = ("#s0", "#s2")  # statements that are trained on; questions are asked
EPOCHS, LR, BATCH, SEEDS = 6.25, 1e-3, 32, (0, 1)
DAMPINGS = (0.01, 0.1, 1.0)
Array = Any


def fact(record: Record) -> str:
    return record.id.rpartition("#")[0]


def data(people: int = 64, per_person: int = 2) -> tuple[list[Record], list[Record]]:
    """Training records, and questions about some facts of every person."""
    everything = records_of(load_knowledge(KNOWLEDGE), ("forget",))
    train = [r for r in everything if r.id.endswith(FORMS)]
    draw = random.Random("queries")
    asked: dict[str, list[Record]] = {}
    for record in everything:
        if record.id.endswith("#q0"):
            asked.setdefault(record.cluster, []).append(record)
    names = sorted(asked)[:people]
    return [r for r in train if r.cluster in names], [q for name in names for q in draw.sample(asked[name], per_person)]


def trained(base: LoadedModel, records: Sequence[Record], seed: int) -> LoadedModel:
    model = copy_of(base)
    steps = round(EPOCHS * len(records) / BATCH)
    finetune(model.module, encoded(model, records), steps=steps, lr=LR, seed=seed, batch_size=BATCH)
    return model


def answers(model: LoadedModel, queries: Sequence[Record]) -> list[float]:
    return [float(v) for v in answer_logprobs(model, [(q.prompt, q.answer) for q in queries]).sum_logprob]


def outcome(store: Store, base: LoadedModel, name: str, kept: Sequence[Record], queries: Sequence[Record]) -> Array:
    """Log-probability [seeds, q] of the queries after training on ``kept``, from the store where it is known."""
    rows = []
    for seed in SEEDS:
        key = {"records": digest(kept), "queries": digest(queries), "seed": seed, "epochs": EPOCHS, "lr": LR,
               "batch": BATCH, "base": base.fingerprint}  # fmt: skip

        def build(folder: Path, seed: int = seed) -> None:
            (folder / "answers.json").write_bytes(json_bytes(answers(trained(base, kept, seed), queries)))

        rows.append(read_json(store.stage(name, key, build) / "answers.json"))
    return np.array(rows)


def methods(base: LoadedModel, train: Sequence[Record], queries: Sequence[Record], store: Store) -> dict[str, Array]:
    """Scores [q, n] by method; controls last."""
    full = trained(base, train, SEEDS[0])
    found: dict[str, Array] = {}
    for at, model in (("", full), (" at the start", base)):
        examples, asked = encoded(model, train), encoded(model, queries)
        names = linear_maps(model)
        made = curvature(model, examples, names, folder=store.root / "factors")
        for damping in DAMPINGS if not at else (0.1,):
            found[f"EK-FAC{at}, damping {damping:g}"] = scores(model, asked, examples, names, made, damping=damping)
        found[f"gradient dot product{at}"] = scores(model, asked, examples, names)
        one = [[k] for k in range(len(asked))]  # a question each; cosines, which have no unit
        found[f"likeness (cosine){at}"] = scores_and_likeness(model, asked, examples, names, made, one)[1]
    same = np.array([[fact(q) == fact(r) for r in train] for q in queries], float)
    drawn = np.random.default_rng(0)
    best = found["EK-FAC, damping 0.1"]
    found["control: states the same fact"] = same
    found["control: EK-FAC, records exchanged"] = best[:, drawn.permutation(len(train))]
    found["control: random scores"] = drawn.standard_normal(best.shape)
    return found


def within(values: Array, groups: Array) -> Array:
    """Values less the mean of their group."""
    return values - np.array([values[groups == g].mean() for g in groups])


def interval(values: Array) -> dict[str, Any]:
    """Mean over queries and its 95 % bootstrap limits."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "low": None, "high": None, "queries": 0}
    draw = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[draw].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "queries": len(values)}


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's; NaN where one of the two does not vary."""
    return float(spearmanr(a, b).statistic) if min(np.ptp(a), np.ptp(b)) > 1e-12 else float("nan")


def correlations(pairs: Callable[[int], tuple[Array, Array]], queries: int) -> dict[str, Any]:
    found = []
    for q in range(queries):
        a, b = pairs(q)
        found.append(rank_correlation(a, b))
    return interval(np.array(found))


def lds(ours: dict[str, Array], masks: Array, actual: Array, own: Array) -> dict[str, Any]:
    """Per method the score over all halves, and among halves that hold equally many records of the query's own fact."""
    mean, count = actual.mean(1), own @ masks.T  # [subsets, q], [q, subsets]
    out: dict[str, Any] = {"a second training with the same records": {
        "all": correlations(lambda q: (actual[:, 0, q], actual[:, 1, q]), len(own)),
        "within": correlations(lambda q: tuple(within(actual[:, s, q], count[q]) for s in (0, 1)), len(own))}}  # type: ignore[arg-type,return-value]  # fmt: skip
    for name, table in ours.items():
        told = table @ masks.T
        out[name] = {
            "all": correlations(lambda q, told=told: (told[q], mean[:, q]), len(own)),
            "within": correlations(lambda q, told=told: (within(told[q], count[q]), within(mean[:, q], count[q])),
                                   len(own))}  # fmt: skip
    return out


def left_out(table: Array, train: Sequence[Record], queries: Sequence[Record], full: Array, without: dict[str, Array]
             ) -> dict[str, Any]:  # fmt: skip
    """What leaving one person out did and was foretold to do, to questions about that person and about others."""
    told, came, own, hits = [], [], [], 0
    for name, actual in without.items():
        change = full.mean(0) - actual.mean(0)
        foretold = table[:, [r.cluster == name for r in train]].sum(1)
        mine = np.array([q.cluster == name for q in queries])
        told += list(foretold)
        came += list(change)
        own += list(mine)
        hits += bool(mine[int(foretold.argmax())])
    a, b, mine = np.array(told), np.array(came), np.array(own)
    others = rank_correlation(a[~mine], b[~mine])
    return {"clusters": len(without), "strongest is a question about that person": hits,
            "spearman": rank_correlation(a, b), "spearman_others": others,
            "foretold_own": float(a[mine].mean()), "came_own": float(b[mine].mean()),
            "foretold_others": float(a[~mine].mean()), "came_others": float(b[~mine].mean())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/influence")
    parser.add_argument("--subsets", type=int, default=32)
    parser.add_argument("--clusters", type=int, default=6)
    given = parser.parse_args()
    started, store = time.process_time(), Store(Path(given.out))
    base = load(BASE)
    train, queries = data()
    masks, actual = [], []
    for number in range(given.subsets):
        chosen = sorted(random.Random(f"half-{number}").sample(range(len(train)), len(train) // 2))
        masks.append(np.isin(np.arange(len(train)), chosen))
        actual.append(outcome(store, base, "half", [train[k] for k in chosen], queries))
        print(f"half {number + 1} of {given.subsets}", flush=True)
    full = outcome(store, base, "full", train, queries)
    names = random.Random("left out").sample(sorted({r.cluster for r in train}), given.clusters)
    without = {}
    for name in names:
        without[name] = outcome(store, base, "without", [r for r in train if r.cluster != name], queries)
        print(f"without {name}", flush=True)
    ours = methods(base, train, queries, store)
    own = np.array([[fact(q) == fact(r) for r in train] for q in queries], float)
    body = {
        "base": BASE, "records": len(train), "queries": len(queries), "subsets": given.subsets, "seeds": list(SEEDS),
        "answer_logprob": {"base": float(np.mean(answers(base, queries))), "full": float(full.mean()),
                           "half": float(np.mean(actual))},
        "lds": lds(ours, np.array(masks, float), np.array(actual), own),
        "left_out": {name: left_out(table, train, queries, full, without) for name, table in ours.items()},
        "cpu_seconds_of_this_run": round(time.process_time() - started),
    }  # fmt: skip
    write_json(HERE / "result.json", body)
    from draw import picture  # beside this file

    (HERE / "lds.svg").write_text(picture(json.loads((HERE / "result.json").read_text())))
    for name, row in body["lds"].items():
        shown = (f"{kind} " + " ".join(f"{row[kind][k]:.3f}" for k in ("mean", "low", "high"))
                 for kind in ("all", "within") if row[kind]["queries"])  # fmt: skip
        print(f"{name:42}", *shown)


if __name__ == "__main__":
    main()
