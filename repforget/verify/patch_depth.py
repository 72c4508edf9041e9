"""How deep does the edit reach? The original answers while its own states are replaced by those of the arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from repforget.causal import Run, patch_scores
from repforget.errors import KnowledgeError
from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Component, Measurement, Site
from repforget.scoring import Encoded, encode_many
from repforget.scoring.encode import context_limit
from repforget.verify import _asking as ask
from repforget.verify.arms import MeasureInfo, References

_CURVE = ("patching depth", "layer", "probability of the truth with the arm's state in the original")
MEASURES = {
    "carried": MeasureInfo("knowledge", "white-box", curve=_CURVE),
    "uds": MeasureInfo("knowledge", "white-box", votes=False),
    "uds_unclipped": MeasureInfo("knowledge", "white-box", votes=False),
}
MATTERS = 0.5  # a layer counts where a stranger's state costs at least half of what it costs at the worst layer
NOTHING = 0.05  # a cost below this is no effect: published for nats, used for probabilities too
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Trials:
    """Patching runs of the items that have strangers: per run its item index and whether it is the truth's.

    ``own`` runs have the item's prompt on both sides, ``strangers`` the prompt of another subject as donor, in the
    order (stranger, run).
    """

    own: tuple[Run, ...]
    strangers: tuple[Run, ...]
    item: NDArray[np.int64]
    truth: NDArray[np.bool_]
    tokens: Array

    def share(self, logprobs: Array, count: int) -> Array:
        """Probability of the truth among the candidates: whole-answer log-probabilities [.., runs] -> [.., items]."""
        out = np.full((*logprobs.shape[:-1], count), np.nan)
        for k in np.unique(self.item):
            mine = logprobs[..., self.item == k]
            top = mine.max(axis=-1, keepdims=True)
            parts = np.exp(mine - top)
            out[..., k] = parts[..., self.truth[self.item == k]][..., 0] / parts.sum(-1)
        return out


def patch_depth(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    alternatives: int = 7, strangers: int = 2, max_layers: int = 8, max_items: int = 200,
) -> Measurement:  # fmt: skip
    """Write the arm's residual states at the answer's positions into the original and see whether it still answers.

    ``carried`` is the probability of the truth among up to ``alternatives`` other answers, averaged over the layers
    that carry the knowledge; a layer's weight is what the state of the original *on another subject* costs there, and
    only layers with at least half of the largest cost count.  That stranger's reading, per item, is the floor
    (``carried_prior``): it needs no twin and lives in the same basis, which a twin trained from another start does not.
    ``uds`` is 1 - the unlearning depth score (arXiv 2605.24614) with the first twin in stage 1, share of
    log-probability per answer token, NaN without a twin; descriptive, because it needs a twin with an aligned basis;
    ``uds_unclipped`` shows over-damage that clipping hides.  At most ``max_layers`` evenly spaced layers.
    Cost: items x (alternatives + 1) x (layers + 1) rows per arm, and (strangers + 1) times that once.

    Low values show that later layers of the original do not find the answer in these states; knowledge may have moved
    to earlier positions or into another basis.
    """
    items = ask.limited(view.forget, max_items, seed)
    original = references.original
    key = ("patch_depth", view.split, alternatives, strangers, max_layers, tuple(i.id for i in items))
    layers = sorted({round(x) for x in np.linspace(0, original.n_layers - 1, min(max_layers, original.n_layers))})
    trials = references.once((*key, "trials"), lambda: _trials(original, items, view, alternatives, strangers))
    patches = [[Component(Site("resid_post", layer))] for layer in layers]
    n = len(items)
    if not trials.own or not _comparable(model, original):
        nothing = ask.scores(items, np.full(n, np.nan))
        return Measurement(dict.fromkeys(("carried", "carried_prior", "uds", "uds_unclipped"), nothing))

    def unpatched() -> Array:
        row: Array = patch_scores(original, trials.own, [()])[0]
        return row

    def estranged() -> Array:
        rows = patch_scores(original, trials.strangers, patches, progress=progress)
        shares = [trials.share(part, n) for part in np.split(rows, strangers, axis=1)]
        mean: Array = np.stack(shares).mean(axis=0)
        return mean

    base = references.once((*key, "base"), unpatched)
    floor = references.once((*key, "floor"), estranged)
    arm = patch_scores(original, trials.own, patches, donor=model, progress=progress)
    read = trials.share(arm, n)
    ceiling = trials.share(base, n)
    weights = _weights(np.nanmean(ceiling - floor, axis=1))
    carried = {"carried": weights @ read, "carried_prior": weights @ floor}
    uds = _uds(references, trials, patches, base, arm, n, key)
    scores = {name: ask.scores(items, values) for name, values in (carried | uds).items()}
    series = {"x": tuple(float(layer) for layer in layers), "carried": tuple(map(float, np.nanmean(read, axis=1)))}
    facts = {f"weight of layer {layer}": float(w) for layer, w in zip(layers, weights, strict=True) if w > 0}
    return Measurement(scores, series, facts)


def _comparable(model: LoadedModel, original: LoadedModel) -> bool:
    shape = [(m.n_layers, m.width, m.vocab_size, type(m.module)) for m in (model, original)]
    return shape[0] == shape[1]


def _weights(cost: Array) -> Array:
    """Weights of the layers, summing to 1; NaN where no layer has an effect, so that nothing can be claimed."""
    kept = np.where(cost >= MATTERS * cost.max(), cost, 0.0)
    return kept / kept.sum() if cost.max() > NOTHING else np.full(len(cost), np.nan)


def _uds(
    references: References, trials: _Trials, patches: Sequence[Sequence[Component]], base: Array, arm: Array, n: int,
    key: tuple[object, ...],
) -> dict[str, Array]:  # fmt: skip
    """1 - UDS per item, clipped as published and unclipped."""
    nothing = np.full(n, np.nan)
    original = references.original
    if not references.twins or not _comparable(references.twins[0], original):
        return {"uds": nothing, "uds_unclipped": nothing}
    which = np.flatnonzero(trials.truth)
    runs = [trials.own[k] for k in which]
    twin = references.once((*key, "twin"), lambda: patch_scores(original, runs, patches, donor=references.twins[0]))
    first, second = ((base[which] - rows) / trials.tokens[which] for rows in (twin, arm[:, which]))
    counted = np.where(first > NOTHING, first, 0.0)
    share = np.where(counted > 0, second / np.where(counted > 0, first, 1.0), 0.0)
    total = counted.sum(0)
    out = {"uds": nothing.copy(), "uds_unclipped": nothing.copy()}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, part in (("uds", np.clip(share, 0.0, 1.0)), ("uds_unclipped", share)):
            out[name][trials.item[which]] = np.where(total > 0, 1.0 - (counted * part).sum(0) / total, np.nan)
    return out


def _trials(original: LoadedModel, items: Sequence[Item], view: View, alternatives: int, strangers: int) -> _Trials:
    """Runs of every item for which enough other subjects' prompts of equal token length exist."""
    limit = context_limit(original)
    pool = [*view.support, *view.retain, *view.neighbours]
    lengths = _lengths(original, pool, limit)
    own: list[Run] = []
    other: list[list[Run]] = [[] for _ in range(strangers)]
    index: list[int] = []
    truth: list[bool] = []
    for k, item in enumerate(items):
        mine = _lengths(original, [item], limit)[0]
        near = sorted((j for j, length in enumerate(lengths) if length == mine and _differs(pool[j], item)),
                      key=lambda j: (pool[j].relation != item.relation, j))  # fmt: skip
        # Spread the strangers over the pool: consecutive items often share one subject.
        chosen = [pool[j] for j in _spread(near, pool, item, strangers, k)]
        said = {p.answer for p in chosen}
        answers = [a for a in view.knowledge.alternatives(item) if a not in said][:alternatives]
        if len(chosen) < strangers or not answers:
            continue
        made = _runs(original, item, chosen, [item.answer, *answers], limit)
        if made is None:
            continue
        for runs in made:
            own.append(runs[0])
            for s in range(strangers):
                other[s].append(runs[1 + s])
            index.append(k)
            truth.append(runs is made[0])
    tokens = np.array([len(r.base) - r.start for r in own], dtype=np.float64)
    return _Trials(tuple(own), tuple(r for group in other for r in group), np.array(index, dtype=np.int64),
                   np.array(truth, dtype=np.bool_), tokens)  # fmt: skip


def _lengths(model: LoadedModel, items: Sequence[Item], limit: int) -> list[int]:
    pairs = [(item.questions[0], item.continuation()) for item in items]
    return [e.start if e.valid else -1 for e in encode_many(model.tokenizer, pairs, limit=limit)]


def _differs(stranger: Item, item: Item) -> bool:
    return stranger.cluster != item.cluster and stranger.answer not in (item.answer, *item.aliases)


def _spread(near: Sequence[int], pool: Sequence[Item], item: Item, count: int, turn: int) -> list[int]:
    same = [j for j in near if pool[j].relation == item.relation] or list(near)
    if len(same) < count:
        same = list(near)
    return [same[(turn * count + s) * 7 % len(same)] for s in range(count)] if len(same) >= count else []


def _runs(
    model: LoadedModel, item: Item, strangers: Sequence[Item], answers: Sequence[str], limit: int
) -> list[list[Run]] | None:
    """Per answer: the item's own run, then one run per stranger; None where the tokens do not align."""
    prompts = [item.questions[0], *(s.questions[0] for s in strangers)]
    made = []
    for answer in answers:
        pairs = [(prompt, item.continuation(answer)) for prompt in prompts]
        encoded: list[Encoded] = encode_many(model.tokenizer, pairs, limit=limit)
        base = encoded[0]
        places = tuple(range(base.start - 1, len(base.ids) - 1))
        if any(not e.valid or e.start != base.start or e.answer != base.answer for e in encoded):
            return None
        try:
            first = Run(item.id, item.cluster, base.ids, base.ids, base.start, places)
        except KnowledgeError:
            return None
        made.append([first, *(replace(first, donor=e.ids) for e in encoded[1:])])
    return made
