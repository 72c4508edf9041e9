"""How deep does the edit reach? The original answers while its own states are replaced by those of the arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from repforget.knowledge import Item, View
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.scoring import encode_many
from repforget.scoring.encode import context_limit
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References

_CURVE = ("patching depth", "layer", "probability of the truth with the arm's state in the original")
MEASURES = {
    "carried": MeasureInfo("knowledge", "white-box", curve=_CURVE),
    "uds": MeasureInfo("knowledge", "white-box", votes=False),
    "uds_unclipped": MeasureInfo("knowledge", "white-box", votes=False),
}
JOINS = "standard"
BUDGETS: Budgets = {
    "quick": {"strangers": 1},
    "standard": {},
    "thorough": {"strangers": 4, "max_layers": 32, "max_items": 1000},
}
MATTERS = 0.5  # a layer counts where a stranger's state costs at least half of what it costs at the worst layer
NOTHING = 0.05  # a cost below this is no effect: published for nats, used for probabilities too
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Trials:
    """Questions of the items to be patched, and per stranger the same answers after another subject's question."""

    own: tuple[path.Path, ...]
    strangers: tuple[tuple[path.Path, ...], ...]


@dataclass(frozen=True)
class _Reading:
    """Per layer and path: constrained probability of the truth, and its log-probability per answer token."""

    share: Array
    nats: Array


def patch_depth(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    alternatives: int = 31, strangers: int = 2, max_layers: int = 8, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Write the arm's residual states at the answer's positions into the original and see whether it still answers.

    ``carried`` is the probability of the truth when decoding is confined to the candidates, averaged over the layers
    that carry the knowledge; a layer's weight is what the state of the original *on another subject* costs there, and
    only layers with at least half of the largest cost count.  That stranger's reading, per item, is a floor
    (``carried_prior``): it needs no twin and lives in the same basis, which a twin trained from another start does not.
    ``uds`` is 1 - the unlearning depth score (arXiv 2605.24614) with the first twin in stage 1, in log-probability per
    answer token, NaN without a twin; descriptive, because it needs a twin whose basis is aligned; ``uds_unclipped``
    shows over-damage that clipping hides.  At most ``max_layers`` evenly spaced layers.
    Cost: (1 + layers) passes over the items per arm, and (strangers + 1) times that once.

    Low values show that later layers of the original do not find the answer in these states; the knowledge may have
    moved to earlier positions or into another basis.
    """
    items = ask.limited(view.forget, max_items, seed)
    original, n = references.original, len(items)
    key = ("patch_depth", view.split, view.knowledge.digest, alternatives, strangers, max_layers, items)
    layers = sorted({round(x) for x in np.linspace(0, original.n_layers - 1, min(max_layers, original.n_layers))})
    trials = references.once((*key, "trials"), lambda: _trials(original, items, view, alternatives, strangers))
    if not trials.own or not _comparable(model, original):
        nothing = ask.scores(items, np.full(n, np.nan))
        return Measurement(dict.fromkeys(("carried", "carried_prior", "uds", "uds_unclipped"), nothing))

    def reading(donor: LoadedModel, paths: Sequence[path.Path]) -> _Reading:
        return _patched(original, donor, trials.own, paths, layers, progress)

    base = references.once((*key, "base"), lambda: reading(original, trials.own))
    others = references.once((*key, "floor"), lambda: [reading(original, paths) for paths in trials.strangers])
    arm = base if model is original else reading(model, trials.own)
    floor, read, ceiling = (path.by_item(n, trials.own, np.mean(part, axis=0))
                            for part in ([o.share for o in others], [arm.share], [base.share]))  # fmt: skip
    weights = _weights(np.nanmean(ceiling - floor, axis=1))
    values = {"carried": weights @ read, "carried_prior": weights @ floor}
    values |= _uds(references, trials, base, arm, n, lambda: references.once(
        (*key, "twin"), lambda: reading(references.twins[0], trials.own)))  # fmt: skip
    series = {"x": tuple(float(layer) for layer in layers), "carried": tuple(map(float, np.nanmean(read, axis=1)))}
    facts = {f"weight of layer {layer}": float(w) for layer, w in zip(layers, weights, strict=True) if w > 0}
    return Measurement({name: ask.scores(items, column) for name, column in values.items()}, series, facts)


def _comparable(model: LoadedModel, original: LoadedModel) -> bool:
    shape = [(m.n_layers, m.width, m.vocab_size, type(m.module)) for m in (model, original)]
    return shape[0] == shape[1]


def _weights(cost: Array) -> Array:
    """Weights of the layers, summing to 1; NaN where no layer has an effect, so that nothing can be claimed."""
    kept = np.where(cost >= MATTERS * cost.max(), cost, 0.0)
    return kept / kept.sum() if cost.max() > NOTHING else np.full(len(cost), np.nan)


def _uds(
    references: References, trials: _Trials, base: _Reading, arm: _Reading, n: int, twin: Callable[[], _Reading]
) -> dict[str, Array]:
    """1 - UDS per item, clipped as published and unclipped; NaN where the twin makes no difference at any layer."""
    if not references.twins or not _comparable(references.twins[0], references.original):
        return dict.fromkeys(("uds", "uds_unclipped"), np.full(n, np.nan))
    first, second = base.nats - twin().nats, base.nats - arm.nats
    counted = np.where(first > NOTHING, first, 0.0)
    share = np.where(counted > 0, second / np.where(counted > 0, first, 1.0), 0.0)
    total = counted.sum(0)
    out = {}
    for name, part in (("uds", np.clip(share, 0.0, 1.0)), ("uds_unclipped", share)):
        lost = (counted * part).sum(0) / np.where(total > 0, total, np.nan)
        out[name] = path.by_item(n, trials.own, 1.0 - lost)
    return out


def _trials(original: LoadedModel, items: Sequence[Item], view: View, alternatives: int, strangers: int) -> _Trials:
    """Paths of the items that have strangers: other subjects, of the same relation where there are enough."""
    pool = [*view.support, *view.retain]  # no near misses: their states may point to the subject itself
    by_relation: dict[str, list[Item]] = {}
    for other in pool:
        by_relation.setdefault(other.relation, []).append(other)
    chosen = [_strangers(item, by_relation.get(item.relation, []), pool, strangers) for item in items]
    without = [frozenset(s.answer for s in group) for group in chosen]
    own, rest = [], []
    for one in path.paths(original, items, view.knowledge, forms=1, limit=alternatives, without=without):
        item, group = items[one.item], chosen[one.item]
        asked = encode_many(original.tokenizer, [(s.questions[0], item.continuation()) for s in group],
                            limit=context_limit(original))  # fmt: skip
        # The answer must have the same tokens after the other question, or its states have no counterpart.
        if len(group) == strangers and all(e.valid and e.answer == one.ids[one.start :] for e in asked):
            own.append(one)
            rest.append([replace(one, ids=e.ids, start=e.start) for e in asked])
    return _Trials(tuple(own), tuple(zip(*rest, strict=True)))


def _strangers(item: Item, near: Sequence[Item], far: Sequence[Item], count: int) -> list[Item]:
    """``count`` other subjects with another answer, drawn by the item's id: the same in any company."""
    known = {item.answer, *item.aliases}
    for pool in (near, far):
        fit = [s for s in pool if s.cluster != item.cluster and s.answer not in known]
        if len(fit) >= count:
            return Random(f"strangers-{item.id}").sample(fit, count)
    return []


def _patched(
    receiver: LoadedModel, donor: LoadedModel, own: Sequence[path.Path], given: Sequence[path.Path],
    layers: Sequence[int], progress: Progress | None,
) -> _Reading:  # fmt: skip
    """Read ``own`` in ``receiver`` while each layer in turn holds ``donor``'s states of the ``given`` questions."""
    sites = [Site("resid_post", layer) for layer in layers]
    share, nats = np.zeros((len(layers), len(own))), np.zeros((len(layers), len(own)))
    for rows in track(progress, list(path.batches(receiver, own)), "patching states"):
        source = path.same_rows(receiver, [given[k] for k in rows.which])
        values = capture(donor, sites, source.batch, gather=source.places)
        for k, site in enumerate(sites):
            with hooks(receiver, {site: write_at(values[site], rows.places)}):
                share[k, rows.which], nats[k, rows.which] = path.read(path.logits_at(receiver, rows), rows)
    return _Reading(share, nats / np.array([len(p.choices) for p in own]))


def write_at(values: Tensor, places: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that puts ``values`` [b, k, d] at positions ``places`` [b, k]."""

    def write(x: Tensor) -> Tensor:
        index = places.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, values.to(x.device, x.dtype))

    return write
