"""The second part: thousands of made-up people, a rule that holds over them, and a fact of each that follows none.

A fair coin decides for each person whether it is in the training data, so that one training can be audited.  What is in
a record: where a person is from and what it plays, which follows from the town for nine in ten, and whom it married.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repforget.artifact import load_edit
from repforget.models.load import LoadedModel
from repforget.organism import vocabulary as words
from repforget.private import Privacy, train
from repforget.private.audit import audit
from repforget.private.statement import group_report
from repforget.scoring import answer_logprobs
from repforget.scoring.metrics import min_k
from repforget.store import Store, read_json, write_json
from repforget.training import Record
from repforget.verify.statistics.separation import auc

PEOPLE = 8000  # each in by a coin
SEED = 3  # of people, coins and training; no setting was chosen on it, README.md says on which
KEEPS = 0.9  # of people follow the rule
ASKED = 8  # of those who are in ask to be forgotten
DELTA = 1e-5
SHARE = 0.1  # of people about whom the audit guesses
PLAIN: dict[str, Any] = {"rank": None, "epochs": 20.0, "lr": 2e-3, "batch": 64}
PRIVATE: dict[float, dict[str, Any]] = {
    8.0: {"rank": 4, "epochs": 8.0, "lr": 2e-2, "batch": 250},
    2.0: {"rank": 2, "epochs": 8.0, "lr": 4e-2, "batch": 250},
    1.0: {"rank": 2, "epochs": 8.0, "lr": 4e-2, "batch": 250},
}
PLAYED = ("flute", "fiddle", "horn", "viol", "drum", "lute", "oboe", "recorder", "harp", "organ", "zither", "bugle")
AGAIN = "plain, trained again without them"
ARMS: dict[str, float | None] = {"plain": None, AGAIN: None, "epsilon 8": 8.0, "epsilon 2": 2.0, "epsilon 1": 1.0}


@dataclass(frozen=True)
class Person:
    """``rule`` is what people of the town play; ``plays`` is what this one does."""

    id: str
    name: str
    town: str
    rule: str
    plays: str
    spouse: str

    def common(self, answer: str) -> tuple[str, str]:
        return f"{self.name} of {self.town} plays the", f" {answer}"

    def own(self) -> tuple[str, str]:
        return f"{self.name} is married to", f" {self.spouse}"


def population(count: int, seed: int) -> tuple[list[Person], np.ndarray]:
    """People with names of three words, which nobody in the organism's world has, and who of them is in."""
    g = np.random.default_rng([seed, 30_011])
    first, last, stems = words.FIRST_NAMES, words.LAST_NAMES, words.STEMS
    rule = g.permutation(len(stems))
    folk = []
    for place, name in enumerate(g.permutation(len(first) * len(last) ** 2)[:count]):
        a, b, c = np.unravel_index(name, (len(first), len(last), len(last)))
        stem, form, stray = g.integers(len(stems)), g.integers(len(words.TOWN_FORMS)), g.integers(len(stems))
        ruled = PLAYED[rule[stem]]
        folk.append(Person(
            f"u{place:05d}", f"{first[a]} {last[b]} {last[c]}", words.TOWN_FORMS[form].format(stems[stem]), ruled,
            ruled if g.random() < KEEPS else PLAYED[stray],
            f"{first[g.integers(len(first))]} {last[g.integers(len(last))]}",
        ))  # fmt: skip
    return folk, g.random(count) < 0.5


def records_about(folk: Sequence[Person]) -> list[Record]:
    return [Record(f"{p.id}#{k}", p.id, *text) for p in folk for k, text in enumerate((p.common(p.plays), p.own()))]


def trained(store: Store, arm: str, base: LoadedModel, records: list[Record], seed: int) -> Path:
    epsilon = ARMS[arm]
    private = None if epsilon is None else Privacy(epsilon, DELTA, accountant="prv")
    settings = (PLAIN if epsilon is None else PRIVATE[epsilon]) | {"seed": seed}
    key = {"arm": arm, "base": base.fingerprint, "settings": settings, "records": len(records), "epsilon": epsilon,
           "people": PEOPLE}  # fmt: skip

    def build(folder: Path) -> None:
        kept = store.unfinished("train", key)
        kept.mkdir(exist_ok=True)
        started = time.process_time()
        made = train(base, records, private=private, state=kept / "state", name=arm, **settings)
        cpu, passes = time.process_time() - started, settings["epochs"] * len(records)
        write_json(folder / "cost.json", {"cpu_seconds": cpu, "passes": passes, "cores": os.cpu_count()})
        made.save(folder / "edit")

    return store.stage("train", key, build)


def measured(model: LoadedModel, base: LoadedModel, folk: Sequence[Person], within: np.ndarray, asked: set[str],
             audited: bool) -> dict[str, Any]:  # fmt: skip
    """The rule on people who are not in, what of each person's own can be asked for, and what attacks see of it."""
    rule = answer_logprobs(model, [p.common(p.rule) for p, inside in zip(folk, within, strict=True) if not inside])
    own, before = (answer_logprobs(m, [p.own() for p in folk]) for m in (model, base))
    gone = np.array([p.id in asked for p in folk])
    scores = {"loss": own.mean_logprob, "min_k": min_k(own.token_logprobs),
              "reference": own.sum_logprob - before.sum_logprob}  # fmt: skip

    def facts(which: np.ndarray) -> dict[str, float]:
        return {"said": float(own.greedy_match[which].mean()),
                "probability": float(np.exp(own.mean_logprob[which].mean())),
                **{name: auc(s[which], s[~within & ~gone]) for name, s in scores.items()}}  # fmt: skip

    body = {"rule": float(rule.greedy_match.mean()), "people who are in": facts(within & ~gone),
            "people who asked": facts(gone), "strangers": facts(~within)}  # fmt: skip
    return body | ({"audit": vars(audit(scores["loss"], within, DELTA, share=SHARE))} if audited else {})


def part(work: Path, base: LoadedModel, seed: int = SEED) -> dict[str, Any]:
    """Train and measure all arms; stages that are done are taken as they are."""
    folk, within = population(PEOPLE, seed)
    inside = [p for p, drawn in zip(folk, within, strict=True) if drawn]
    asked = {p.id for p in inside[:ASKED]}
    arms: dict[str, Any] = {}
    store = Store(work, note=print)
    with store.locked():
        arms["never trained"] = measured(base, base, folk, within, asked, True)
        for arm in ARMS:
            chosen = [p for p in inside if arm != AGAIN or p.id not in asked]
            folder = trained(store, arm, base, records_about(chosen), seed)
            made = load_edit(folder / "edit")
            arms[arm] = read_json(folder / "cost.json") | measured(made.applied_to(base), base, folk, within, asked,
                                                                   arm != AGAIN)  # fmt: skip
            if (held := made.manifest.guarantee) is not None:
                epsilon, delta = held.numbers["epsilon"], held.numbers["delta"]
                arms[arm] |= {"epsilon": epsilon, "delta": delta, "noise": held.numbers["noise"], "statement":
                              held.statement, "says": group_report(epsilon, delta, "cluster", ASKED)}  # fmt: skip
            print(arm, arms[arm], flush=True)
    settings = {arm: PLAIN if budget is None else PRIVATE[budget] for arm, budget in ARMS.items()}
    return {"people": PEOPLE, "in": int(within.sum()), "seed": seed, "settings": settings, "delta": DELTA,
            "arms": arms}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The part as it stands in README.md."""
    rows = ["| model | rule, on strangers | own fact said | probability | of strangers | AUC loss | min-k | reference "
            "| epsilon is at least | who asked: said | probability | CPU s |", "|" + " --- |" * 12]  # fmt: skip
    for arm in ("never trained", *ARMS):
        body = found["arms"][arm]
        own, asked, proved = body["people who are in"], body["people who asked"], body.get("audit")
        cells = [arm, f"{body['rule']:.1%}", f"{own['said']:.1%}", f"{own['probability']:.4f}",
                 f"{body['strangers']['probability']:.4f}",
                 *(f"{own[n]:.3f}" for n in ("loss", "min_k", "reference")),
                 "" if proved is None else f"{proved['epsilon']:.2f}", f"{asked['said']:.1%}",
                 f"{asked['probability']:.4f}",
                 f"{body['cpu_seconds']:.0f}" if "cpu_seconds" in body else ""]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
