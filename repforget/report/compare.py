"""Several finished runs side by side: values with limits, and paired differences from the first run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repforget.bench._records import LEVEL, Metric
from repforget.bench._run import ROW, Row, load_row
from repforget.errors import UsageError
from repforget.records import Verdict
from repforget.store import read_json

VERDICTS = ("verdict.json", "result.json")  # of the loop


@dataclass(frozen=True)
class Run:
    """One column: a row of a benchmark, or the verdict of the loop."""

    label: str
    benchmark: str
    metrics: Mapping[str, Metric]
    tokenizer: str = ""
    about: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    tables: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Difference:
    """A run minus the first one, paired by item; NaN and a reason where the two cannot be compared."""

    value: float
    low: float = math.nan
    high: float = math.nan
    note: str = ""
    verdict: str = ""  # better, worse, differs or "" (limits include zero)


@dataclass(frozen=True)
class Line:
    """One metric over all runs; ``differences`` has one entry per run after the first."""

    name: str
    values: tuple[Metric | None, ...]
    differences: tuple[Difference, ...]

    @property
    def comparable(self) -> bool:
        """True when at least two runs have a number."""
        return sum(metric is not None and not math.isnan(metric.value) for metric in self.values) > 1


@dataclass(frozen=True)
class Comparison:
    """The runs of one benchmark."""

    benchmark: str
    runs: tuple[Run, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "runs": [{"label": run.label, **dict(run.about)} for run in self.runs],
            "metrics": [{"name": line.name, "values": [None if m is None else m.to_json() for m in line.values],
                         "differences": [vars(d) for d in line.differences]} for line in self.lines],
            "notes": list(self.notes),
        }  # fmt: skip


def compare(paths: Sequence[str | Path], seed: int = 0) -> tuple[Comparison, ...]:
    """Read runs and set those of each benchmark side by side; UsageError for a path that holds no finished run."""
    runs = _labelled([read_run(path) for path in paths], paths)
    benchmarks = dict.fromkeys(run.benchmark for run in runs)
    return tuple(_side_by_side(name, [run for run in runs if run.benchmark == name], seed) for name in benchmarks)


def _side_by_side(benchmark: str, runs: Sequence[Run], seed: int) -> Comparison:
    lines = []
    for name in dict.fromkeys(name for run in runs for name in run.metrics):
        values = tuple(run.metrics.get(name) for run in runs)
        apart = [difference(runs[0], run, values[0], value, seed)
                 for run, value in zip(runs[1:], values[1:], strict=True)]  # fmt: skip
        lines.append(Line(name, values, tuple(apart)))
    return Comparison(benchmark, tuple(runs), tuple(lines), tuple(_notes(runs)))


def read_run(path: str | Path) -> Run:
    """A benchmark's row or a loop's verdict, from its folder or file."""
    given = Path(path)
    if given.is_dir():
        found = next((given / name for name in (ROW, *VERDICTS) if (given / name).is_file()), None)
        if found is None:
            raise UsageError(f"'{path}' holds none of {ROW}, {', '.join(VERDICTS)}: name the folder of a finished run.")
        given = found
    stated = read_json(given)
    if isinstance(stated, dict) and "result" not in stated and ("verdict" in stated or "claims" in stated):
        return _of_verdict(given, stated)
    return _of_row(load_row(given))


def _of_row(row: Row) -> Run:
    about = (("edit", str(row.model.get("edit") or "none")), ("data", str(row.data["where"])),
             ("dtype", str(row.model["dtype"])), ("seed", str(row.seed)),
             ("reference", str(row.reference["name"]) if row.reference else "none"))  # fmt: skip
    return Run(row.model["name"], row.result.benchmark, row.result.metrics, row.model["tokenizer"], about,
               row.result.notes, row.settings, row.data["tables"])  # fmt: skip


def _of_verdict(path: Path, stated: Mapping[str, Any]) -> Run:
    verdict = Verdict.from_json(stated.get("verdict", stated))
    metrics = {
        claim.name: Metric(claim.name, claim.rho, claim.rho_low, claim.rho_high, claim.n_items, claim.n_clusters,
                           "lower", note=f"share {'left' if claim.kind == 'knowledge' else 'lost'}: {claim.status}")
        for claim in verdict.claims
    }  # fmt: skip
    about = (("outcome", verdict.outcome), ("split", verdict.split), ("artifact", verdict.artifact),
             ("limits", "one-sided 95 %"))  # fmt: skip
    return Run(path.parent.name, "verify", metrics, about=about, notes=(verdict.sentence.rstrip("."),))


def _labelled(runs: Sequence[Run], paths: Sequence[str | Path]) -> list[Run]:
    """Runs whose labels are distinct: those that occur more than once get their path."""
    labels = [run.label for run in runs]
    named = [f"{run.label} ({path})" if labels.count(run.label) > 1 else run.label
             for run, path in zip(runs, paths, strict=True)]  # fmt: skip
    return [Run(**{**vars(run), "label": label}) for run, label in zip(runs, named, strict=True)]


def difference(first: Run, run: Run, base: Metric | None, metric: Metric | None, seed: int = 0) -> Difference:
    """``run`` minus ``first`` in one metric, with limits from resampled clusters of the paired items."""
    from repforget.verify.statistics import mean_interval

    why = _incomparable(first, run, base, metric)
    if why or base is None or metric is None:
        return Difference(math.nan, note=f"not compared, because {why}")
    if base.items is None or metric.items is None:
        return Difference(metric.value - base.value, note="no items to pair, so no limits")
    both = base.items.valid & metric.items.valid
    clusters = [name for name, ok in zip(base.items.clusters, both, strict=True) if ok]
    if not clusters:
        return Difference(math.nan, note="not compared, because no item could be scored in both")
    apart = (metric.items.values - base.items.values)[both]
    found = mean_interval(apart, clusters, alpha=LEVEL, seed=seed)
    sign = int(found.low > 0) - int(found.high < 0)
    words = {"higher": ("worse", "", "better"), "lower": ("better", "", "worse")}.get(metric.better)
    verdict = words[sign + 1] if words else "differs" if sign else ""
    return Difference(found.point, found.low, found.high, f"{int(both.sum())} paired items", verdict)


def _incomparable(first: Run, run: Run, base: Metric | None, metric: Metric | None) -> str:
    if base is None or metric is None:
        return "only one of the two runs has it"
    if np.isnan(base.value) or np.isnan(metric.value):
        return "it was not computed in one of them"
    if metric.token_based and first.tokenizer != run.tokenizer:
        return "the tokenizers differ, so that values per token are not of the same things"
    if base.items is not None and metric.items is not None and base.items.ids != metric.items.ids:
        return "the items differ"
    changed = _changed(first, run)
    return f"{changed} differ" if changed else ""


def _changed(first: Run, run: Run) -> str:
    """Which settings or tables of two runs of one benchmark differ."""
    pairs = ((first.settings or {}, run.settings or {}), (first.tables or {}, run.tables or {}))
    found = {key for a, b in pairs for key in {*a, *b} if a.get(key) != b.get(key)}
    return ", ".join(sorted(found - {"unpaired"}))


def _notes(runs: Sequence[Run]) -> list[str]:
    first, notes = runs[0], []
    for run in runs[1:]:
        if changed := _changed(first, run):
            notes.append(f"{run.label}: {changed} differ from {first.label}")
        if run.tokenizer != first.tokenizer:
            notes.append(f"{run.label} has another tokenizer than {first.label}: per-token metrics are not paired")
    common = [note for note in first.notes if len(runs) > 1 and all(note in run.notes for run in runs)]
    own = [f"{run.label}: {note}" for run in runs for note in run.notes if note not in common]
    return [*notes, *(f"every run: {note}" for note in common), *own]


def value_cell(metric: Metric | None) -> str:
    """``0.913 (0.898 to 0.927)``; a dash where the run has no such number."""
    if metric is None or math.isnan(metric.value):
        return "–"
    return _with_limits(metric.value, metric.low, metric.high, "")


def difference_cell(apart: Difference) -> str:
    """``-0.021 (-0.03 to -0.011) worse``; the reason where it was not compared."""
    if math.isnan(apart.value):
        return apart.note
    return f"{_with_limits(apart.value, apart.low, apart.high, '+')} {apart.verdict}".rstrip()


def _with_limits(value: float, low: float, high: float, sign: str) -> str:
    limits = "" if math.isnan(low) else f" ({low:.3g} to {high:.3g})"
    return f"{value:{sign}.4g}{limits}"


def value_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of all values with their limits."""
    rows = [[line.name, *map(value_cell, line.values)] for line in comparison.lines]
    return ["metric", *(run.label for run in comparison.runs)], rows


def difference_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the differences; metrics that no run has a number for are left out."""
    rows = [[line.name, *map(difference_cell, line.differences)] for line in comparison.lines if line.comparable]
    return ["metric", *(run.label for run in comparison.runs[1:])], rows


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The tables and the notes as Markdown."""
    from repforget.report.markdown import cell, table

    lines = []
    for one in comparisons:
        heads, rows = value_table(one)
        lines += [f"## {cell(one.benchmark)}: values with 95 % limits", "", *table([*map(cell, heads)], rows)]
        if len(one.runs) > 1:
            heads, rows = difference_table(one)
            first = cell(one.runs[0].label)
            lines += [f"## {cell(one.benchmark)}: difference from {first}", "", *table([*map(cell, heads)], rows)]
        lines += [*(f"- {cell(note)}" for note in one.notes), ""]
    return "\n".join(lines).rstrip() + "\n"


def html(comparisons: Sequence[Comparison]) -> str:
    """One self-contained page without scripts or requests."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    assets = files("repforget.report") / "assets"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((assets / "compare.html.j2").read_text(encoding="utf-8"))
    style = Markup((assets / "report.css").read_text(encoding="utf-8"))
    return template.render(comparisons=comparisons, style=style, value_cell=value_cell,
                           difference_cell=difference_cell)  # fmt: skip
