"""Is the answer still readable? New classifiers on every layer of the arm itself, linear and not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.knowledge import Item, View
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.probing import fit_transfer
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.scoring import Encoded, encode_many, token_batches
from repforget.scoring.encode import context_limit, pad_id
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References

_Y = "probability of the true answer by a new classifier"
MEASURES = {
    "linear": MeasureInfo("knowledge", "white-box", curve=("fresh probes, linear", "layer", _Y)),
    "mlp": MeasureInfo("knowledge", "white-box", curve=("fresh probes, two layers", "layer", _Y)),
}
JOINS = "standard"
BUDGETS: Budgets = {
    "quick": {},
    "standard": {},
    "thorough": {"max_support": 4000, "forms": 2, "hidden": 64, "steps": 240},
}
KINDS: dict[str, Literal["logistic", "mlp"]] = {"linear": "logistic", "mlp": "mlp"}
SHARED = 2  # something is a class of a probe when at least two training rows have it
Task = Literal["auto", "answer", "candidate"]
Array = NDArray[np.float64]
Features = NDArray[np.float32]


class _Row(NamedTuple):
    """One state with its label: rows of one ``key`` share a probe; ``item`` is -1 outside the tested items.

    ``part`` counts answer tokens (task ``answer``) or candidates with the truth first (task ``candidate``).
    """

    key: str
    form: int
    text: int
    place: int
    label: str
    cluster: str
    item: int
    part: int


@dataclass(frozen=True)
class _Fitting:
    l2: float
    hidden: int
    steps: int
    seed: int


def reprobe(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    task: Task = "auto", forms: int = 1, tokens: int = 2, alternatives: int = 7, l2: float = 0.01, hidden: int = 32,
    steps: int = 40, layers: list[int] | Literal["all"] = "all", max_support: int = 600, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Train new probes on the arm's own activations and read the forget items' answers from every layer.

    Task ``answer``: the states that predict the answer's first ``tokens`` tokens (after the question, and after the
    true tokens before) are classified by that token, one probe per relation and token; value: the product of the
    truth's probabilities.  Task ``candidate``: states at the end of question and candidate, true or false; value: the
    truth's share of the odds among up to ``alternatives`` + 1 candidates.  ``auto`` takes ``answer`` where training
    items share the tokens of half of the answers.  Trained on retain items outside the judged ones and, in turn, on
    one half of the forget clusters while the other half is tested; penalty ``l2`` beside a mean loss, networks of
    ``hidden`` units for ``steps``.  Each measure takes the layer with the highest mean, the same maximum on every arm.
    ``*_prior`` is the truth's share in training (or 1 / candidates).  Source: Alain and Bengio 2016, arXiv 1610.01644;
    retrained on the edited model because a fixed probe tests a direction and not the information.
    Cost: one pass over the texts, 2 x relations x tokens x layers fits of each kind.

    Failure to read does not show erasure from other positions, and a linear failure says nothing about other readers.
    """
    tested = ask.limited(view.forget, max_items, seed)
    support = ask.limited(view.support, max_support, seed)
    chosen = list(range(model.n_layers)) if layers == "all" else sorted(layers)
    texts, rows = _rows(model, view, tested, support, task, forms, tokens, alternatives)
    x = _features(model, texts, rows, chosen, progress)
    first = {item.cluster for item in view.halves(seed)[0]}
    half = np.array([-1 if r.item < 0 else int(r.cluster in first) for r in rows])
    members: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        members.setdefault(row.key, []).append(k)
    tables = {name: np.full((len(chosen), len(rows)), np.nan) for name in KINDS}
    before = np.full(len(rows), np.nan)
    fitting = _Fitting(l2, hidden, steps, seed)
    with _one_thread():
        for key in track(progress, sorted(members), "fitting new probes"):
            mine = np.array(members[key])
            for side in (0, 1):
                _fit(x, rows, mine[half[mine] != side], mine[half[mine] == side], tables, before, fitting)
    return _measured(tested, rows, tables, before, chosen)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products: a second thread gains little, and on a busy machine the two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(
    model: LoadedModel, view: View, tested: Sequence[Item], support: Sequence[Item], task: Task, forms: int,
    tokens: int, alternatives: int,
) -> tuple[list[Encoded], list[_Row]]:  # fmt: skip
    """The texts to run and the states to take from them."""
    everything = [(k, item) for k, item in enumerate(tested)] + [(-1, item) for item in support]
    asked = [(k, item, f) for k, item in everything for f in range(len(item.questions[:forms]))]
    limit = context_limit(model)
    texts = encode_many(model.tokenizer, [(i.questions[f], i.continuation()) for _, i, f in asked], limit=limit)
    rows = [_Row(f"{item.relation}#{form}#{t}", form, n, e.start - 1 + t, str(e.answer[t]), item.cluster, k, t)
            for n, ((k, item, form), e) in enumerate(zip(asked, texts, strict=True)) if e.valid
            for t in range(min(tokens, len(e.answer)))]  # fmt: skip
    counts = Counter((r.key, r.label) for r in rows if r.item < 0)
    shared = [counts[r.key, r.label] >= SHARED for r in rows if r.item >= 0]
    if task == "answer" or (task == "auto" and sum(shared) * 2 >= len(shared)):
        return texts, rows
    pairs = [(k, item, f, place, text) for k, item, f in asked
             for place, text in enumerate(ask.options(item, view.knowledge, alternatives))]  # fmt: skip
    texts = encode_many(model.tokenizer, [(i.questions[f], text) for _, i, f, _, text in pairs], limit=limit)
    rows = [_Row(f"#{f}", f, n, len(e.ids) - 1, "false" if place else "true", item.cluster, k, place)
            for n, ((k, item, f, place, _), e) in enumerate(zip(pairs, texts, strict=True)) if e.valid]  # fmt: skip
    return texts, rows


def _features(
    model: LoadedModel, texts: Sequence[Encoded], rows: Sequence[_Row], layers: Sequence[int], progress: Progress | None
) -> Features:
    """Residual states [layers, rows, width] in float32."""
    wanted: dict[int, list[int]] = {}
    for k, row in enumerate(rows):
        wanted.setdefault(row.text, []).append(k)
    names = sorted(wanted)
    deepest = max(len(group) for group in wanted.values())
    sites = [Site("resid_post", layer) for layer in layers]
    out = np.zeros((len(sites), len(rows), model.width), dtype=np.float32)
    sequences = [texts[n].ids[: max(rows[k].place for k in wanted[n]) + 1] for n in names]
    for index, batch in track(progress, list(token_batches(sequences, pad_id=pad_id(model.tokenizer))), "representing"):
        groups = [wanted[names[n]] for n in index]
        places = torch.tensor([[rows[k].place for k in (*g, *[g[-1]] * (deepest - len(g)))] for g in groups])
        values = capture(model, sites, batch, gather=places)
        flat = [k for g in groups for k in g]
        real = torch.tensor([[j < len(g) for j in range(deepest)] for g in groups])
        for s, site in enumerate(sites):
            out[s, flat] = values[site].to("cpu", torch.float32)[real].numpy()
    return out


def _fit(
    x: Features, rows: Sequence[_Row], train: NDArray[np.int64], test: NDArray[np.int64], tables: dict[str, Array],
    before: Array, fitting: _Fitting,
) -> None:  # fmt: skip
    """Fill the columns of the tested rows whose label is a class of the training rows; the others stay NaN."""
    counts = Counter(rows[k].label for k in train)
    train = np.array([k for k in train if counts[rows[k].label] >= SHARED], dtype=np.int64)
    classes = {rows[k].label for k in train}
    test = np.array([k for k in test if rows[k].label in classes], dtype=np.int64)
    if not len(test):
        return
    before[test] = [counts[rows[k].label] / len(train) for k in test]
    if len(classes) < 2:  # nothing to tell apart: this token says nothing about the item
        for table in tables.values():
            table[:, test] = 1.0
        return
    labels, answers = ([rows[k].label for k in part] for part in (train, test))
    groups = [rows[k].cluster for k in train]
    for name, kind in KINDS.items():
        found = fit_transfer(x[:, train], labels, x[:, test], answers, groups=groups, kind=kind, l2=fitting.l2,
                             seed=fitting.seed, hidden=fitting.hidden, steps=fitting.steps)  # fmt: skip
        tables[name][:, test] = found.probability


def _measured(
    tested: Sequence[Item], rows: Sequence[_Row], tables: dict[str, Array], before: Array, layers: Sequence[int]
) -> Measurement:
    groups = list(_groups(rows, len(tested)))
    by_answer = any("#" in row.key[1:] for row in rows)
    scores, series, facts = {}, {"x": tuple(float(layer) for layer in layers)}, {}
    floor = np.array([_mean([_chance(before, m, by_answer) for m in g]) for g in groups])
    for name, table in tables.items():
        values = np.array([[_mean([_share(row, m, by_answer) for m in g]) for g in groups] for row in table])
        means = np.array([v[~np.isnan(v)].mean() if (~np.isnan(v)).any() else 0.0 for v in values])
        best = int(means.argmax())
        scores[name] = ask.scores(tested, values[best])
        scores[f"{name}_prior"] = ask.scores(tested, floor)
        series[name] = tuple(float(m) for m in means)
        facts[f"layer of {name}"] = float(layers[best])
    return Measurement(scores, series, facts)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _groups(rows: Sequence[_Row], count: int) -> Iterator[list[list[int]]]:
    """Per tested item, per question form: its rows in the order of their parts."""
    found: list[dict[int, list[int]]] = [{} for _ in range(count)]
    for k, row in enumerate(rows):
        if row.item >= 0:
            found[row.item].setdefault(row.form, []).append(k)
    for forms in found:
        yield [sorted(group, key=lambda k: rows[k].part) for group in forms.values()]


def _share(row: Array, members: Sequence[int], by_answer: bool) -> float:
    """Probability of the truth: over its tokens, or its odds of being true among those of all candidates."""
    if by_answer:
        return float(np.prod(row[members]))
    # For a candidate the table holds the probability of its own label: the truth's is "true", the others' "false".
    true = np.clip(np.array([row[members[0]], *(1.0 - row[members[1:]])]), 1e-12, 1 - 1e-12)
    odds = true / (1.0 - true)
    return float(odds[0] / odds.sum())


def _chance(before: Array, members: Sequence[int], by_answer: bool) -> float:
    return float(np.prod(before[members])) if by_answer else 1.0 / len(members)
