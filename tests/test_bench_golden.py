"""Numbers that TOFU's authors published, from the logs that they published (tests/data/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repforget.bench import _tofu as t
from repforget.errors import UsageError
from repforget.records import ItemScores
from repforget.scoring import metrics
from repforget.verify import statistics as st

DATA = Path(__file__).parent / "data"
GOLDEN: dict[str, Any] = json.loads((DATA / "tofu_golden.json").read_text())
ARRAYS = np.load(DATA / "tofu_logs.npz")
RUNS = sorted({key.split("/")[0] for key in ARRAYS})
SETS = ("forget", *t.UTILITY_SETS)
CELLS = {"prob": "probability", "rougeL_recall": "rouge", "truth_ratio": "truth_ratio"}
LLAMA, PHI = "ft_epoch5_lr1e-05_llama2-7b_", "ft_epoch5_lr2e-05_phi_"
FIRST = {"retain99": 3960, "retain95": 3800}  # of the forget rows, in the full order
LOGGED = [row for row in GOLDEN["ks_tests"] if row["a"] in RUNS and row["b"] in RUNS]


@cache
def scored(run: str, name: str) -> t.Scored:
    """One set of one run; ids say which question a row is."""
    array = {key: ARRAYS[f"{run}/{name}/{key}"].astype(np.float64) for key in
             ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")}  # fmt: skip
    first = next((row for model, row in FIRST.items() if model in run), 3600) if name == "forget" else 0
    numbers = range(first, first + len(array["avg_gt_loss"]))
    clusters = tuple(f"{name}-{n // 20 if name in ('forget', 'retain') else n}" for n in numbers)
    return t.Scored(tuple(f"{name}-{n}" for n in numbers), clusters, array["avg_gt_loss"],
                    array["avg_paraphrased_loss"], array["average_perturb_loss"], array["rougeL_recall"])  # fmt: skip


def cells(run: str, **options: Any) -> dict[str, dict[str, ItemScores]]:
    return {name: t.cells(name, scored(run, name), **options) for name in SETS}


def utility(run: str, **options: Any) -> float:
    return t.model_utility(cells(run, **options), draws=20).value  # its limits are tested on their own


def log_ratios(run: str, rows: list[int] | None = None, **options: Any) -> ItemScores:
    group = scored(run, "forget")
    keep = slice(*rows) if rows else slice(None)
    values = t.log_truth_ratio(group, **options)[keep]
    return ItemScores.of(group.ids[keep], group.clusters[keep], values.tolist())


@pytest.mark.parametrize("run", RUNS)
def test_cells_and_model_utility_of_every_logged_run(run: str) -> None:
    stated, mine = GOLDEN["models"][run], cells(run)
    for name in SETS:
        for theirs, ours in CELLS.items():
            assert mine[name][ours].mean == pytest.approx(stated["components"][name][theirs], abs=1e-12), (name, ours)
    assert utility(run) == pytest.approx(stated["model_utility"], abs=1e-12)


@pytest.mark.parametrize("row", GOLDEN["published_rows"], ids=lambda row: f"{Path(row['csv']).stem}-{row['row']}")
def test_published_leaderboard_rows(row: dict[str, Any]) -> None:
    mine, published = cells(row["log"]), row["published"]
    compared = {f"{name}.{theirs}": mine[name][ours].mean for name in SETS for theirs, ours in CELLS.items()}
    assert len(compared) == 12
    for key, value in compared.items():
        assert value == pytest.approx(published[key], abs=1e-12), key
    assert utility(row["log"]) == pytest.approx(published["model_utility"], abs=1e-12)


@pytest.mark.parametrize("run", RUNS)
def test_the_arithmetic_mean_is_another_metric(run: str) -> None:
    stated = GOLDEN["models"][run]["arithmetic"]
    mine = cells(run, mean="arithmetic")
    for name in SETS:
        assert mine[name]["truth_ratio"].mean == pytest.approx(stated["truth_ratio"][name], abs=1e-12)
    assert utility(run, mean="arithmetic") == pytest.approx(stated["model_utility"], abs=1e-12)
    assert abs(utility(run, mean="arithmetic") - utility(run)) > 0.015


def test_harmonic_means_as_published_with_a_zero_and_a_tiny_cell() -> None:
    values = [metrics.harmonic_mean(np.array(row["cells9"])) for row in GOLDEN["hmean_rows"]]
    assert values == pytest.approx([row["published_model_utility"] for row in GOLDEN["hmean_rows"]], abs=1e-12)
    assert 0.0 in values and min(v for v in values if v) < 1e-4


@pytest.mark.parametrize("row", LOGGED, ids=lambda row: f"{row['a'][13:]}-{row['b'][13:]}-{row['n']}")
def test_ks_counts_are_exact_and_other_questions_are_refused(row: dict[str, Any]) -> None:
    a, b = log_ratios(row["a"], row["rows_a"]), log_ratios(row["b"], row["rows_b"])
    quality = t.forget_quality(a, b, unpaired=True)[0]
    assert f"h={row['h']}," in quality.note and quality.value == pytest.approx(row["p"], rel=1e-12)
    mean = {"mean": "arithmetic"}
    other = t.forget_quality(log_ratios(row["a"], row["rows_a"], **mean), log_ratios(row["b"], row["rows_b"], **mean),
                             unpaired=True)[0]  # fmt: skip
    assert f"h={row['h_arithmetic']}," in other.note
    if a.ids == b.ids:
        assert t.forget_quality(a, b)[0] == quality
    else:
        with pytest.raises(UsageError, match="same questions"):
            t.forget_quality(a, b)


def test_six_published_forget_qualities_two_of_them_on_the_same_questions() -> None:
    rows = [row for row in GOLDEN["published_rows"] if "ks" in row]
    tests = {(row["a"], row["n"], row["h"]): row for row in GOLDEN["ks_tests"]}
    paired = 0
    for row in rows:
        test = tests[row["log"], row["ks"]["n"], row["ks"]["h"]]
        a, b = log_ratios(test["a"], test["rows_a"]), log_ratios(test["b"], test["rows_b"])
        paired += a.ids == b.ids
        assert t.forget_quality(a, b, unpaired=True)[0].value == pytest.approx(
            row["published"]["forget_quality"], rel=1e-12)  # fmt: skip
    assert (len(rows), paired) == (6, 2)


def test_ks_p_values_as_printed_elsewhere() -> None:
    for n, h, p in GOLDEN["p_published"]:
        assert st.ks_p_value(h, n, n) == pytest.approx(p, rel=1e-12), (n, h)
    for n, h, printed in GOLDEN["p_open_unlearning"]:
        assert float(f"{st.ks_p_value(h, n, n):.3g}") == pytest.approx(printed, rel=6e-3), (n, h)
    assert (len(GOLDEN["p_published"]), len(GOLDEN["p_open_unlearning"])) == (65, 23)
    for row in GOLDEN["ks_tests"]:  # also those whose logs are not here
        assert st.ks_p_value(row["h"], row["n"], row["n"]) == pytest.approx(row["p"], rel=1e-12)
    for row in GOLDEN["critical"]:
        mine = st.ks_critical(row["n"], 0.05), st.ks_critical(row["n"], 0.01)
        assert mine == (row["h_crit_0.05"], row["h_crit_0.01"])


@pytest.mark.parametrize("run", list(GOLDEN["bootstrap"]))
def test_limits_of_model_utility(run: str) -> None:
    """The stated limits resample single questions, so every question is its own cluster here."""
    single = {name: {cell: ItemScores(s.ids, s.ids, s.values, s.valid) for cell, s in group.items()}
              for name, group in cells(run).items()}  # fmt: skip
    found = t.model_utility(single, seed=1)
    assert (found.low, found.high) == pytest.approx(GOLDEN["bootstrap"][run], abs=0.004)
    assert (found.n_items, found.n_clusters) == (517, 517)
    assert t.model_utility(cells(run)).n_clusters == 15 + 217


def test_separation_by_loss_and_by_truth_ratio() -> None:
    for prefix, rows in ((LLAMA, GOLDEN["attack_style"][:4]), (PHI, GOLDEN["attack_style"][4:])):
        full, never = f"{prefix}full_wd0.01", f"{prefix}retain90_wd0.01"
        pairs = [(-scored(run, "forget").loss, -scored(run, "retain").loss) for run in (full, never)]
        pairs.append((-scored(full, "forget").loss, -scored(never, "forget").loss))
        pairs.append((-log_ratios(full).values, -log_ratios(never).values))
        for (high, low), row in zip(pairs, rows, strict=True):
            assert st.auc(high, low) == pytest.approx(row["auc"], abs=1e-12), row["name"]
            assert st.tpr_at_fpr(high, low, 0.01) == pytest.approx(row["tpr_at_1pct_fpr"], abs=1e-12), row["name"]


def test_a_reference_that_knows_the_forget_set_too_is_recognised() -> None:
    def loss(run: str, name: str) -> ItemScores:
        return scored(run, name).items(scored(run, name).loss)

    for prefix in (LLAMA, PHI):
        full, never = f"{prefix}full_wd0.01", f"{prefix}retain90_wd0.01"
        assert t.knows_too(loss(never, "retain"), loss(never, "forget")) is None
        assert t.knows_too(loss(full, "retain"), loss(full, "forget")) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("row", [r for r in GOLDEN["swap"] if r["a"] in RUNS and r["b"] in RUNS],
                         ids=lambda row: f"{row['a'][13:]}-{row['b'][13:]}")  # fmt: skip
def test_label_swaps_see_what_the_iid_test_does_not(row: dict[str, Any]) -> None:
    a, b = log_ratios(row["a"]), log_ratios(row["b"])
    found = st.swap_permutation(a.values, b.values, ids_x=a.ids, ids_y=b.ids, permutations=2000, seed=3)
    assert found.statistic == row["h"]
    assert found.p == pytest.approx(row["p_paired_swap"], abs=0.04)  # two Monte-Carlo errors
    quality, swapped, difference = t.forget_quality(a, b)
    assert found.p < quality.value or row["h"] > 50  # the stated p-values swap single questions
    assert (row["h"] < 50) == (abs(difference.value) < 0.05) and difference.low < difference.value < difference.high
    assert ("cannot reach" in swapped.note) == (row["n"] == 40)  # two authors have two arrangements
