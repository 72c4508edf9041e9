"""Finished runs side by side: what is paired, what is refused, and that the page is self-contained."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_run

from repforget.bench._records import BenchResult, Metric, mean_metric, not_computed
from repforget.bench._run import Row
from repforget.errors import UsageError
from repforget.records import ItemScores
from repforget.report import compare as c
from repforget.store import write_json
from repforget.verify.statistics import mean_interval

Cli = Callable[..., tuple[int, str, str]]
CLUSTERS = [f"c{k // 5}" for k in range(60)]


def items(seed: int, shift: float = 0.0, prefix: str = "q") -> ItemScores:
    """60 items whose difficulty is shared by every model, so that pairing matters."""
    hard = np.random.default_rng(9).normal(0.5, 0.2, 60)
    values = hard + shift + np.random.default_rng(seed).normal(0, 0.01, 60)
    return ItemScores.of([f"{prefix}{k}" for k in range(60)], CLUSTERS, values.tolist())


def row(name: str, seed: int, shift: float = 0.0, *, tokenizer: str = "t", prefix: str = "q", benchmark: str = "tofu",
        **changes: Any) -> Row:  # fmt: skip
    values = items(seed, shift, prefix)
    metrics = [
        mean_metric("kept.rouge", values), mean_metric("gone.rouge", values, better="lower"),
        mean_metric("like.ratio", values, better="reference", token_based=True),
        Metric("utility", 0.5 + shift, 0.4, 0.6, 60), not_computed("quality", "no <reference> was given"),
    ]  # fmt: skip
    made = Row({"name": name, "fingerprint": name, "tokenizer": tokenizer, "dtype": "float32", "edit": None},
               {"where": "data", "tables": {"forget": "1"}}, {"split": "forget10"}, 0,
               BenchResult.of(benchmark, metrics, {"questions": 60}, (f"measured <b>{name}</b>",)))  # fmt: skip
    return replace(made, **changes)


def saved(folder: Path, *rows: Row) -> list[str]:
    for k, one in enumerate(rows):
        one.save(folder / f"run-{k}")
    return [str(folder / f"run-{k}") for k in range(len(rows))]


def test_differences_are_paired_by_item(tmp_path: Path) -> None:
    paths = saved(tmp_path, row("a", 1), row("b", 2, shift=-0.02))
    (one,) = c.compare(paths)
    lines = {line.name: line for line in one.lines}
    apart = lines["kept.rouge"].differences[0]
    expected = mean_interval(items(2, -0.02).values - items(1).values, CLUSTERS, alpha=0.025)
    assert (apart.value, apart.low, apart.high) == (expected.point, expected.low, expected.high)
    # The values overlap by far: only pairing tells the two apart.
    first, second = lines["kept.rouge"].values
    assert first is not None and second is not None and second.high > first.value and apart.high < -0.01
    assert [lines[name].differences[0].verdict for name in ("kept.rouge", "gone.rouge", "like.ratio")] == [
        "worse", "better", "differs"]  # fmt: skip
    assert c.compare([paths[0], paths[0]])[0].lines[0].differences[0].verdict == ""
    assert lines["utility"].differences[0].value == pytest.approx(-0.02)
    assert math.isnan(lines["utility"].differences[0].low)
    assert "not computed in one" in lines["quality"].differences[0].note and not lines["quality"].comparable
    assert one.notes == ("a: measured <b>a</b>", "b: measured <b>b</b>")
    assert c.compare([paths[0], paths[0]])[0].notes == ("every run: measured <b>a</b>",)


@pytest.mark.parametrize(("other", "metric", "why"), [
    ({"tokenizer": "u"}, "like.ratio", "the tokenizers differ"),
    ({"prefix": "x"}, "kept.rouge", "the items differ"),
    ({"settings": {"split": "forget10", "ds_size": 300}}, "kept.rouge", "ds_size differ"),
    ({"data": {"where": "d", "tables": {"forget": "2"}}}, "kept.rouge", "forget differ"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said(other: dict[str, Any], metric: str, why: str, tmp_path: Path) -> None:
    (one,) = c.compare(saved(tmp_path, row("a", 1), row("b", 2, **other)))
    apart = {line.name: line for line in one.lines}[metric].differences[0]
    assert math.isnan(apart.value) and apart.note.startswith("not compared, because") and why in apart.note
    rouge = {line.name: line for line in one.lines}["kept.rouge"].differences[0]
    assert math.isnan(rouge.value) == (metric == "kept.rouge")  # words do not depend on the tokenizer


def test_items_that_only_one_run_could_score_are_left_out_of_both(tmp_path: Path) -> None:
    first, second = row("a", 1), row("b", 2)
    values = items(2).values.copy()
    values[:10] = np.nan
    holes = mean_metric("kept.rouge", ItemScores.of(items(2).ids, CLUSTERS, values.tolist()))
    second = replace(second, result=BenchResult.of("tofu", [holes], {}))
    line = c.compare(saved(tmp_path, first, second))[0].lines[0]
    assert line.differences[0].note == "50 paired items"
    assert line.differences[0].value == pytest.approx((items(2).values - items(1).values)[10:].mean())


def test_benchmarks_and_verdicts_stand_apart(tmp_path: Path, cli: Cli) -> None:
    paths = saved(tmp_path, row("a", 1), row("m", 3, benchmark="muse"), row("b", 2))
    write_json(tmp_path / "loop" / "verdict.json", synthetic_run.verdict("fail").to_json())
    found = c.compare([*paths, tmp_path / "loop"])
    assert [(one.benchmark, len(one.runs)) for one in found] == [("tofu", 2), ("muse", 1), ("verify", 1)]
    claims = synthetic_run.verdict("fail").claims
    assert [line.name for line in found[2].lines] == [claim.name for claim in claims]
    shown = [line.values[0].value for line in found[2].lines if line.values[0] is not None]
    assert np.array(shown) == pytest.approx(np.array([claim.rho for claim in claims]), nan_ok=True)
    code, text, _ = cli("compare", *paths, str(tmp_path / "loop"), "--json")
    assert code == 0 and [one["benchmark"] for one in json.loads(text)] == ["tofu", "muse", "verify"]


def test_the_command_prints_tables_markdown_and_a_page_without_requests(tmp_path: Path, cli: Cli) -> None:
    paths = saved(tmp_path / "x", row("a<script>", 1), row("a<script>", 2, shift=0.05))
    code, text, _ = cli("compare", *paths, "--html", "page.html")
    assert code == 0 and "Difference from a<script>" in text and "kept.rouge" in text and "better" in text
    page = Path("page.html").read_text()
    assert "<script" not in page and "<b>a" not in page.split("</header>")[1].split("<td>")[0]
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert str(paths[0]) in page and str(paths[1]) in page  # equal names are told apart by their folders
    code, text, _ = cli("compare", *paths, "--markdown")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert code == 0 and len({line.count("|") for line in tables[:6]}) == 1 and "## tofu" in text
    assert "a\\<script\\>" in text and "not computed" not in text.split("##")[2]


@pytest.mark.parametrize("wrong", ["nowhere", "empty", "broken/row.json"])
def test_what_is_no_run_is_refused(wrong: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "row.json").write_text("{}")
    code, out, said = cli("compare", wrong)
    assert code == 2 and out == "" and said.count("\n") == 1 and wrong.split("/")[0] in said
    with pytest.raises(UsageError):
        c.compare([tmp_path / wrong])
