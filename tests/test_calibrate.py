"""The judge measured: the pool is balanced, the table says what it should, and what ships is what the code has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repforget.calibration import pool, run
from repforget.calibration.plot import picture
from repforget.calibration.pool import TREATMENTS, Organism, asked, organisms
from repforget.calibration.table import markdown, table
from repforget.discover import methods
from repforget.knowledge_files import load_knowledge
from repforget.models.load import fingerprint, load
from repforget.records import ItemScores, Measurement
from repforget.verify import _calibration
from repforget.verify.battery import assemble, level, tasks

ITEMS = 20


def test_every_treatment_of_the_pool_is_given_to_knowing_and_to_never_knowing_models() -> None:
    found = [o for o in organisms() if o.role == "pool"]
    by_truth = {truth: [o for o in found if o.truth == truth] for truth in ("knows", "never knew", "neither")}
    assert len(by_truth["knows"]) == len(by_truth["never knew"]) == 11
    treated = {truth: {t for o in group for t in o.treatments} - {"misled", "taught"}
               for truth, group in by_truth.items()}  # fmt: skip
    assert treated["knows"] == treated["never knew"] == set(pool.SHARED)
    assert [o.name for o in found if "taught" in o.treatments] == ["original, misled, taught again"]
    assert {t for o in organisms() for t in o.treatments} == set(TREATMENTS)
    assert len({o.name for o in organisms()}) == len(organisms())


def _found(value: Any) -> dict[Organism, dict[str, dict[str, Any]]]:
    """Measurements of ``logit_lens`` with values made by ``value(organism)``."""
    names = [f"i{k}" for k in range(ITEMS)]
    out = {}
    for organism in organisms():
        scores = ItemScores.of(names, names, [value(organism)] * ITEMS)
        made = Measurement({"best_layer": scores, "own_decoder": scores}).to_json() | {"seconds": 1.0}
        out[organism] = {"logit_lens": made}
    return out


def test_a_measure_that_follows_the_truth_has_auc_one_and_one_that_follows_the_treatment_has_a_half() -> None:
    follows = table(_found(lambda o: 0.9 if o.truth == "knows" else 0.1))
    assert {row.auc for row in follows} == {1.0}
    assert all(0.5 < row.low < row.high == 1.0 and row.missed == () and row.rounding == 1.0 for row in follows)
    fooled = table(_found(lambda o: float(len(o.treatments[0])) if o.treatments else 0.0))
    assert all(abs(row.auc - 0.5) < 0.07 and row.low < 0.4 and row.high > 0.6 for row in fooled)


def test_what_relearning_brings_back_counts_against_a_measure() -> None:
    def value(o: Organism) -> float:
        if "refusal training" in o.treatments and o.truth == "knows":
            return 0.8 if "relearning" in o.treatments else 0.2
        return {"knows": 0.9, "never knew": 0.1}.get(o.truth, 0.5) + (0.06 if "relearning" in o.treatments else 0.0)

    row = table(_found(value))[0]
    assert row.relearning == pytest.approx(1 - (0.6 - 0.06) / (0.6 + 0.06))
    assert row.auc == 1.0
    missed = table(_found(lambda o: 0.05 if o.name == "original, noise" else value(o)))[0]
    assert missed.missed == ("original, noise",)
    assert missed.auc == pytest.approx(10 / 11)


def test_a_calibration_runs_resumes_and_says_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [o for o in organisms() if o.name in ("original", "twin-0", "original, refusal wrapper",
                                                "twin-0, refusal wrapper")]  # fmt: skip
    monkeypatch.setattr(run, "organisms", lambda: few)
    plan = run.Plan(("behaviour", "logit_lens", "tofu"), items=16, out=str(tmp_path))
    rows = {row.name: row for row in run.calibrate(plan)}
    assert rows["logit_lens.best_layer"].auc == 1.0
    assert rows["behaviour.exact_match"].missed == ("original, refusal wrapper",)
    written = (tmp_path / run.RESULT).read_bytes()
    stages = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(Organism, "open", lambda self, knowledge: pytest.fail("made again"))
    run.calibrate(plan)
    assert (tmp_path / run.RESULT).read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == stages
    found = json.loads(written)
    assert "NaN" not in markdown(found["measures"], 0.9)
    assert picture(found["measures"], found["organisms"], 0.9).count("<circle") == len(found["measures"])


@pytest.mark.parametrize("name", ["noise", "random directions", "rounded", "refusal wrapper"])
def test_a_treatment_leaves_its_base_alone_and_repeats(name: str) -> None:
    knowledge, base = load_knowledge("bios-people"), load("organism:bios")
    before = fingerprint(base.module)
    first, second = (TREATMENTS[name](base, knowledge) for _ in range(2))
    assert fingerprint(base.module) == before
    assert fingerprint(first.module) == fingerprint(second.module)
    assert first.module is not base.module


def test_the_asked_view_is_cut_and_keeps_its_kinds() -> None:
    view = asked(load_knowledge("bios-people"), 16)
    assert len(view.forget) == len(view.retain) == len(view.neighbours) == len(view.general) == 16
    assert len({item.cluster for item in view.forget}) > 8


def test_what_ships_covers_every_measure_of_a_level_and_nothing_else() -> None:
    shipped = _calibration.calibrated()
    measures = {f"{m.name}.{name}": info for m in methods("verify") for name, info in m.constant("MEASURES").items()}
    assert {name for name in shipped["measures"] if not name.startswith(f"{run.BENCHMARK}.")} <= set(measures)
    listed = {**level("thorough"), **level("thorough", held_out=True)}
    wanted = {n for n, info in measures.items() if n.split(".")[0] in listed and info.kind == "knowledge"}
    assert wanted <= set(shipped["measures"]), sorted(wanted - set(shipped["measures"]))
    assert sum(o["role"] == "pool" for o in shipped["organisms"]) >= 12
    groups = {truth: [o["name"] for o in shipped["organisms"] if o["truth"] == truth and o["role"] == "pool"]
              for truth in ("knows", "never knew")}  # fmt: skip
    for entry in shipped["measures"].values():
        knows, never = ([entry["values"][name] for name in names] for names in groups.values())
        pairs = [(a > b) + 0.5 * (a == b) for a in knows for b in never]
        assert entry["auc"] == pytest.approx(np.mean(pairs), abs=0.02), "auc and values disagree (beyond rounding)"


def test_a_measure_below_the_bar_describes_and_does_not_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _calibration.may_vote("never_heard_of.it")
    entries = {"logit_lens.best_layer": {"auc": 0.89}, "behaviour.contrastive": {"auc": 0.9}}
    monkeypatch.setattr(_calibration, "calibrated", lambda: {"measures": entries})
    assert not _calibration.may_vote("logit_lens.best_layer")
    assert _calibration.may_vote("behaviour.contrastive")
    names = ("i0", "i1")
    made = {name: ItemScores.of(names, names, [0.5, 0.6]) for name in ("best_layer", "own_decoder")}
    arms = {arm: {"logit_lens": Measurement(made)} for arm in ("original", "edit", "twin-0")}
    evidence = {e.measure: e.votes for e in assemble(arms, tasks(["logit_lens"]))}
    assert evidence == {"best_layer": False, "own_decoder": False}
    entries["logit_lens.best_layer"]["auc"] = 0.95
    assert {e.measure: e.votes for e in assemble(arms, tasks(["logit_lens"]))}["best_layer"]
