"""Private training as prevention: what it learns, what of a person asked to be forgotten can be seen, what it costs.

The twin that never knew the 64 forget people is taught four facts of each, plainly and with DP-SGD whose unit is a
person. Then eight of them ask to be forgotten: the plain model is trained again without them, the private ones are left
as they are, since their statement was made beforehand; noisy fine-tuning takes the plain training back to within its
budget of never having been and then learns the kept people again.  The second part (population.py) trains on thousands.

    python experiments/private-training/measure.py

resumes where it was stopped (stages in --work) and writes result.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import population
import torch

from repforget.artifact import load_edit
from repforget.edit._dispatch import edit
from repforget.knowledge import Fact, Item, Knowledge, View
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel, load
from repforget.private import Privacy, train
from repforget.private.statement import group_report
from repforget.scoring import answer_logprobs
from repforget.store import Store, read_json, write_json
from repforget.training import Record, records_of
from repforget.verify.arms import References
from repforget.verify.privacy.lira import lira
from repforget.verify.privacy.membership import membership

BASE = "organism:bios/twin-0"
RELATIONS = 4  # of each person, so that the whole takes minutes
ASKED = 8  # people who ask to be forgotten
DELTA = 0.01  # below 1 / 64
STEPS: dict[str, Any] = {"rank": 4, "epochs": 30.0, "lr": 1e-2, "seed": 0}  # each on all records, in every arm
ARMS: dict[str, float | None] = {"plain": None, "plain, trained again without them": None, "epsilon 100": 100.0,
                                 "epsilon 8": 8.0, "epsilon 2": 2.0}  # fmt: skip
AFTER = "plain, then noisy fine-tuning"
NOISY: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "repair": 300, "repair_lr": 1e-2,
                         "secret": False}  # fmt: skip
SCORES = ("loss", "min_k", "min_k_plus_plus", "reference")


def questions(items: list[Item]) -> list[tuple[str, str]]:
    return [(item.questions[0], item.continuation()) for item in items]


def learned(model: LoadedModel, items: list[Item]) -> dict[str, float]:
    """Share of questions whose answer is said, and the geometric mean probability of the right answer's tokens."""
    found = answer_logprobs(model, questions(items))
    return {"said": float(found.greedy_match.mean()), "probability": float(np.exp(found.mean_logprob.mean()))}


def attacks(model: LoadedModel, view: View, references: References) -> dict[str, float]:
    """AUC of the membership scores (chance 0.5), and LiRA's two numbers (0.5: cannot tell)."""
    standing = membership(model, view, references=references, alternatives=15).scores
    placed = lira(model, view, references=references, shadows=4, steps=24).scores
    return {**{name: _mean(standing[name]) for name in SCORES if name in standing},
            "lira offline": _mean(placed["offline"]), "lira posterior": _mean(placed["posterior"])}  # fmt: skip


def _mean(scores: Any) -> float:
    return float(np.mean(scores.values))


def the_world(knowledge: Knowledge) -> tuple[list[Item], list[Record], set[str]]:
    kinds = sorted({item.relation for item in knowledge.forget})[:RELATIONS]
    items = [item for item in knowledge.forget if item.relation in kinds]
    wanted = {f"{item.id}#{form}" for item in items for form in ("s0", "q0")}
    records = [r for r in records_of(knowledge) if r.id in wanted]
    return items, records, set(sorted({item.cluster for item in items})[:ASKED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/private-training"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    knowledge, base = load_knowledge("bios-people"), load(BASE)
    items, records, gone = the_world(knowledge)
    store = Store(given.work, note=print)
    with store.locked():
        folders = {arm: trained(store, arm, base, records, gone) for arm in ARMS}
        found = {}
        edits = {arm: load_edit(folder / "edit") for arm, folder in folders.items()}
        folders[AFTER] = edited(store, base, folders["plain"], records, gone, knowledge)
        edits[AFTER] = load_edit(folders[AFTER] / "edit")
        references = References(edits["plain"].applied_to(base), (base,))
        for arm in ("never trained", *ARMS, AFTER):
            found[arm] = measured(store, arm, edits.get(arm), base, items, gone, knowledge, references)
    for arm, folder in folders.items():
        found[arm] |= {"cpu_seconds": read_json(folder / "cost.json")["cpu_seconds"]}
        held = edits[arm].manifest.guarantee
        if held is not None:
            found[arm] |= {"statement": held.statement, "notes": list(edits[arm].manifest.notes)}
        if held is not None and held.kind == "private":
            eps, delta = held.numbers["epsilon"], held.numbers["delta"]
            found[arm] |= {"epsilon": eps, "delta": delta, "noise": held.numbers["noise"],
                           "says": group_report(eps, delta, "cluster", int(held.numbers["units"]), ASKED)}  # fmt: skip
    result = {"base": BASE, "people": len({i.cluster for i in items}), "asked": sorted(gone),
                           "records": len(records), "training": STEPS, "noisy": NOISY, "arms": found,
                           "population": population.part(given.work / "population", base)}  # fmt: skip
    write_json(given.out, result)
    print(table(result), population.table(result["population"]), sep="\n")


def table(result: dict[str, Any]) -> str:
    """The result as it stands in README.md."""
    rows = ["| model | kept people said | people who asked: said | probability | others it knew | AUC loss | min-k++ | "
            "reference | LiRA offline | CPU s |", "|" + " --- |" * 10]  # fmt: skip
    for arm in ("never trained", *ARMS, AFTER):
        found = result["arms"][arm]
        asked, seen = found["people who asked"], found["attacks"]
        cells = [arm, f"{found['kept people']['said']:.1%}", f"{asked['said']:.1%}", f"{asked['probability']:.4f}",
                 f"{found['others it knew']['said']:.1%}", *(f"{seen[name]:.2f}" for name in (
                     "loss", "min_k_plus_plus", "reference", "lira offline")),
                 f"{found['cpu_seconds']:.0f}" if "cpu_seconds" in found else ""]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def trained(store: Store, arm: str, base: LoadedModel, records: list[Record], gone: set[str]) -> Path:
    epsilon = ARMS[arm]
    own = [r for r in records if r.cluster not in gone] if "without" in arm else records
    private = None if epsilon is None else Privacy(epsilon, DELTA, accountant="prv")
    settings = {**STEPS, "batch": len(own)}  # of records, or of people: cut to their number
    key = {"arm": arm, "base": base.fingerprint, "settings": settings, "records": len(own), "epsilon": epsilon}

    def build(folder: Path) -> None:
        started = time.process_time()
        state = store.root / f".{arm.replace(' ', '-').replace(',', '')}.state"
        made = train(base, own, private=private, state=state, name=arm, **settings)
        write_json(folder / "cost.json", {"cpu_seconds": time.process_time() - started, "cores": os.cpu_count()})
        made.save(folder / "edit")
        state.unlink(missing_ok=True)

    return store.stage("train", key, build)


def edited(store: Store, base: LoadedModel, plain: Path, records: list[Record], gone: set[str],
           knowledge: Knowledge) -> Path:  # fmt: skip
    """The request answered by noisy fine-tuning, whose retained facts are the kept people and those it knew before."""
    def fact(r: Record) -> Fact:
        return Fact(r.id, r.cluster, "", "", r.prompt, r.answer)

    data = knowledge.for_editor()
    kept = [fact(r) for r in records if r.cluster not in gone]
    data = dataclasses.replace(data, forget=tuple(fact(r) for r in records if r.cluster in gone),
                               retain=(*kept, *data.retain[:: max(1, len(data.retain) // len(kept))]))  # fmt: skip

    def build(folder: Path) -> None:
        started = time.process_time()
        made = edit(base, data, "noisy_finetuning", training=str(plain / "edit"), **NOISY)
        write_json(folder / "cost.json", {"cpu_seconds": time.process_time() - started, "cores": os.cpu_count()})
        made.save(folder / "edit")

    return store.stage("edit", {"plain": plain.name, "settings": NOISY, "gone": sorted(gone)}, build)


def measured(store: Store, arm: str, made: Any, base: LoadedModel, items: list[Item], gone: set[str],
             knowledge: Knowledge, references: References) -> dict[str, Any]:  # fmt: skip
    key = {"arm": arm, "edit": None if made is None else made.digest, "gone": sorted(gone)}

    def build(folder: Path) -> None:
        model = base if made is None else made.applied_to(base)
        asked = [i for i in items if i.cluster in gone]
        view = dataclasses.replace(knowledge.view("dev"), forget=tuple(asked))
        body = {"kept people": learned(model, [i for i in items if i.cluster not in gone]),
                "people who asked": learned(model, asked),
                "others it knew": learned(model, list(knowledge.view("dev").retain)[:200]),
                "attacks": attacks(model, view, references)}  # fmt: skip
        write_json(folder / "result.json", body)

    return dict(read_json(store.stage("measure", key, build) / "result.json"))


if __name__ == "__main__":
    main()
