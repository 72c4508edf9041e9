"""Is the answer still readable? New classifiers on every layer of the arm itself, linear and not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.knowledge import Item, Knowledge, View
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.probing import fit_transfer
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.scoring import encode_many, token_batches
from repforget.scoring.encode import context_limit, pad_id
from repforget.verify import _asking as ask
from repforget.verify.arms import MeasureInfo, References

_Y = "probability of the true answer by a new classifier"
MEASURES = {
    "linear": MeasureInfo("knowledge", "white-box", curve=("fresh probes, linear", "layer", _Y)),
    "mlp": MeasureInfo("knowledge", "white-box", curve=("fresh probes, two layers", "layer", _Y)),
}
KINDS: dict[str, Literal["logistic", "mlp"]] = {"linear": "logistic", "mlp": "mlp"}
SHARED = 2  # an answer is a class of the probe when at least two training items have it
Task = Literal["auto", "answer", "candidate"]
Array = NDArray[np.float64]
Features = NDArray[np.float32]


@dataclass(frozen=True)
class _Example:
    """One text to be represented: ``key`` groups rows that are fitted together, ``item`` is -1 outside the tested."""

    key: str
    prompt: str
    text: str
    label: str
    cluster: str
    item: int
    place: int = 0  # candidate number, 0 = the truth


def reprobe(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    task: Task = "auto", forms: int = 1, alternatives: int = 7, l2: float = 0.01, hidden: int = 64, steps: int = 240,
    layers: list[int] | Literal["all"] = "all", max_support: int = 1600, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Train new probes on the arm's own activations and read the forget items' answers from every layer.

    Features: residual state at the last token.  Task ``answer``: after the question, predict which answer of the
    relation follows (classes are answers shared by several training items; one probe per relation); value: the
    probability given to the truth.  Task ``candidate``: after question and candidate, predict true or false; value:
    the truth's share among up to ``alternatives`` + 1 candidates.  ``auto`` takes ``answer`` where it covers half of
    the items.  Trained on retain items outside the judged ones and, in turn, on one half of the forget clusters while
    the other half is tested; penalty ``l2`` beside a mean loss, networks of ``hidden`` units for ``steps``.  Each
    measure takes the layer with the highest mean, the same maximum on every arm.  ``*_prior`` is the share of the true
    class in training (or 1 / candidates).  Source: Alain and Bengio 2016; retrained on the edited model because a fixed
    probe tests a direction and not the information.  Cost: one pass over the texts, 2 x relations x layers fits each.

    Failure to read does not show erasure from other positions, and a linear failure says nothing about other readers.
    """
    tested = ask.limited(view.forget, max_items, seed)
    support = ask.limited(view.support, max_support, seed)
    chosen = list(range(model.n_layers)) if layers == "all" else sorted(layers)
    rows = _examples(view.knowledge, tested, support, task, forms, alternatives)
    x = _features(model, rows, chosen, progress)
    first = {item.cluster for item in view.halves(seed)[0]}
    half = np.array([-1 if r.item < 0 else int(r.cluster in first) for r in rows])
    keys = sorted({r.key for r in rows if r.item >= 0})
    tables = {name: np.full((len(chosen), len(rows)), np.nan) for name in KINDS}
    before = np.full(len(rows), np.nan)
    for key in track(progress, keys, "fitting new probes"):
        mine = np.array([r.key == key for r in rows])
        for side in (0, 1):
            train, test = np.flatnonzero(mine & (half != side)), np.flatnonzero(mine & (half == side))
            _fit(x, rows, train, test, tables, before, l2=l2, hidden=hidden, steps=steps, seed=seed)
    return _measured(tested, rows, tables, before, chosen)


def _examples(
    knowledge: Knowledge, tested: Sequence[Item], support: Sequence[Item], task: Task, forms: int, alternatives: int
) -> list[_Example]:
    counts = Counter((i.relation, i.answer) for i in support)
    shared = [counts[i.relation, i.answer] >= SHARED for i in tested]
    by_answer = task == "answer" or (task == "auto" and sum(shared) * 2 >= len(shared))
    everything = [(k, item) for k, item in enumerate(tested)] + [(-1, item) for item in support]
    rows = []
    for index, item in everything:
        for form, prompt in enumerate(item.questions[:forms]):
            if by_answer:
                rows.append(_Example(f"{item.relation}#{form}", prompt, item.continuation(), item.answer, item.cluster,
                                     index))  # fmt: skip
                continue
            for place, text in enumerate(ask.options(item, knowledge, alternatives)):
                rows.append(_Example(f"#{form}", prompt + text, "", "false" if place else "true", item.cluster, index,
                                     place))  # fmt: skip
    return rows


def _tokens(model: LoadedModel, rows: Sequence[_Example]) -> list[tuple[int, ...]]:
    """Tokens up to where the answer starts, or the whole text where there is none to follow."""
    limit = context_limit(model)
    if all(r.text for r in rows):
        encoded = encode_many(model.tokenizer, [(r.prompt, r.text) for r in rows], limit=limit)
        found = [e.ids[: e.start] for e in encoded]
    else:
        # Any continuation marks the end of the text; the prompt is what counts.
        ends = encode_many(model.tokenizer, [(r.prompt[:-1], r.prompt[-1]) for r in rows], limit=limit)
        found = [e.ids for e in ends]
    if any(len(ids) > limit for ids in found):
        raise UsageError("A question is longer than the model's context: shorten the prompts of the probe.")
    return found


def _features(
    model: LoadedModel, rows: Sequence[_Example], layers: Sequence[int], progress: Progress | None
) -> Features:
    """Residual states [layers, rows, width] in float32."""
    sequences = _tokens(model, rows)
    sites = [Site("resid_post", layer) for layer in layers]
    out = np.zeros((len(sites), len(rows), model.width), dtype=np.float32)
    batches = list(token_batches(sequences, pad_id=pad_id(model.tokenizer)))
    for index, batch in track(progress, batches, "representing questions"):
        values = capture(model, sites, batch, gather="last")
        for k, site in enumerate(sites):
            out[k, index] = values[site].to("cpu", torch.float32).numpy()
    return out


def _fit(
    x: Features, rows: Sequence[_Example], train: NDArray[np.int64], test: NDArray[np.int64], tables: dict[str, Array],
    before: Array, *, l2: float, hidden: int, steps: int, seed: int,
) -> None:  # fmt: skip
    """Fill the columns of the tested rows whose answer is a class of the training rows; the others stay NaN."""
    counts = Counter(rows[k].label for k in train)
    train = np.array([k for k in train if counts[rows[k].label] >= SHARED], dtype=np.int64)
    classes = {rows[k].label for k in train}
    test = np.array([k for k in test if rows[k].label in classes], dtype=np.int64)
    if len(classes) < 2 or not len(test):
        return
    labels = [rows[k].label for k in train]
    before[test] = [counts[rows[k].label] / len(train) for k in test]
    for name, kind in KINDS.items():
        found = fit_transfer(x[:, train], labels, x[:, test], [rows[k].label for k in test],
                             groups=[rows[k].cluster for k in train], kind=kind, l2=l2, seed=seed, hidden=hidden,
                             steps=steps)  # fmt: skip
        tables[name][:, test] = found.probability


def _measured(
    tested: Sequence[Item], rows: Sequence[_Example], tables: dict[str, Array], before: Array, layers: Sequence[int]
) -> Measurement:
    groups = list(_groups(rows))
    scores, series, facts = {}, {"x": tuple(float(layer) for layer in layers)}, {}
    floor = np.array([np.nan if not g else float(np.mean([_chance(rows, before, m) for m in g])) for g in groups])
    for name, table in tables.items():
        values = np.array([[np.nan if not g else float(np.mean([_share(row, m) for m in g])) for g in groups]
                           for row in table])  # fmt: skip
        means = np.array([v[~np.isnan(v)].mean() if (~np.isnan(v)).any() else 0.0 for v in values])
        best = int(means.argmax())
        scores[name] = ask.scores(tested, values[best])
        scores[f"{name}_prior"] = ask.scores(tested, floor)
        series[name] = tuple(float(m) for m in means)
        facts[f"layer of {name}"] = float(layers[best])
    return Measurement(scores, series, facts)


def _groups(rows: Sequence[_Example]) -> Iterator[list[list[int]]]:
    """Per tested item, per question form: its row, or the rows of its candidates with the truth first."""
    found: dict[int, dict[str, list[int]]] = {}
    for k, row in enumerate(rows):
        if row.item >= 0:
            found.setdefault(row.item, {}).setdefault(row.key, []).append(k)
    for item in sorted(found):
        yield [sorted(members, key=lambda k: rows[k].place) for members in found[item].values()]


def _share(row: Array, members: Sequence[int]) -> float:
    """Probability of the truth: of its class, or its odds of being true among those of all candidates."""
    if len(members) == 1:
        return float(row[members[0]])
    # For a candidate the table holds the probability of its own label; the truth's is "true", the others' "false".
    true = np.clip(np.array([row[members[0]], *(1.0 - row[members[1:]])]), 1e-12, 1 - 1e-12)
    odds = true / (1.0 - true)
    return float(odds[0] / odds.sum())


def _chance(rows: Sequence[_Example], before: Array, members: Sequence[int]) -> float:
    return float(before[members[0]]) if len(members) == 1 else 1.0 / len(members)
