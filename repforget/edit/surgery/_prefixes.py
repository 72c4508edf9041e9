"""Prefixes run once: the key/value cache of everything before the last token, so that a step costs one token.

The edit acts on what is written at the last token of a row; the tokens before it are protected, so their keys and
values are computed once, in the unedited model.  Where they would not fit into memory they are computed in each
step, in the edited model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repforget.edit.surgery._rows import Kind, Row, dense
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.models.sites import site_map
from repforget.records import Site

MEMORY = 2 << 30  # bytes of keys and values that are kept
CHUNK = 512  # rows
ELSEWHERE = 4  # every fourth of the other tokens is read


@dataclass(frozen=True)
class Prefixes:
    """Rows of one kind and length: ``tokens`` [n, t], of which the last is run in every step."""

    kind: Kind
    tokens: Tensor
    cache: tuple[tuple[Tensor, Tensor], ...] | None  # per layer keys and values [n, heads, t - 1, d]
    final: Tensor  # [n, d] last residual state in the unedited model
    priors: Tensor | None  # [n, V] for forget rows

    def __len__(self) -> int:
        return len(self.tokens)

    def target(self, model: LoadedModel, rows: Tensor) -> Tensor:
        """Distributions [len(rows), V] after the chosen rows: the prior, or what the unedited model says."""
        if self.priors is not None:
            return self.priors[rows].to(self.final.device)
        with torch.no_grad():
            return lens(model, self.final[rows]).float().softmax(-1)


def logits(model: LoadedModel, parts: Sequence[tuple[Prefixes, Tensor]]) -> Tensor:
    """Logits [rows, V] after chosen rows of prefixes of one length, from the model as it is now, with gradients."""
    from transformers import DynamicCache

    tokens = torch.cat([prefixes.tokens[rows] for prefixes, rows in parts])
    past = DynamicCache()
    held = [(prefixes.cache, rows) for prefixes, rows in parts if prefixes.cache is not None]
    if held:
        for layer in range(len(held[0][0])):
            keys, values = (torch.cat([cache[layer][side][rows] for cache, rows in held]) for side in (0, 1))
            past.update(keys, values, layer)
    else:
        with torch.no_grad():
            model.module(input_ids=tokens[:, :-1], past_key_values=past, use_cache=True, logits_to_keep=1)
    out = model.module(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
    after: Tensor = out.logits[:, -1].float()
    return after


@dataclass(frozen=True)
class Reading:
    """What one chunk gave: keys [n, m] per layer at predicting positions, and at all other tokens but the first."""

    kind: Kind
    at: dict[int, Tensor]
    elsewhere: dict[int, Tensor]


def prepare(
    model: LoadedModel, rows: Sequence[Row], layers: Sequence[int]
) -> Iterator[tuple[list[Prefixes], Reading]]:
    """Run all rows once, grouped by kind, length and place of the answer; yield prefixes and the MLP keys read.

    Prefixes of a kind, length and position may come in several pieces; :func:`merged` joins them.
    """
    keep_cache = cache_bytes(model, rows) <= MEMORY
    groups: dict[tuple[Kind, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, len(row.ids), row.start), []).append(row)
    for (kind, _, start), members in sorted(groups.items()):
        for chunk in (members[i : i + CHUNK] for i in range(0, len(members), CHUNK)):
            yield _run(model, chunk, kind, start, layers, keep_cache)


def cache_bytes(model: LoadedModel, rows: Sequence[Row]) -> int:
    places = site_map(model.module)
    per_token = 2 * places.n_layers * places.n_kv_heads * places.head_dim * torch.finfo(model.dtype).bits // 8
    return per_token * sum(len(row.ids) * (len(row.ids) - row.start + 1) for row in rows)


@torch.no_grad()
def _run(
    model: LoadedModel, rows: Sequence[Row], kind: Kind, start: int, layers: Sequence[int], keep_cache: bool
) -> tuple[list[Prefixes], Reading]:
    from transformers import DynamicCache

    last = site_map(model.module).n_layers - 1
    read: dict[Site, Tensor] = {}

    def reader(site: Site) -> Any:
        def note(x: Tensor) -> None:
            read[site] = x

        return note

    sites = [*(Site("mlp_post", layer) for layer in layers), Site("resid_post", last)]
    ids = torch.tensor([row.ids for row in rows], device=model.device)
    past = DynamicCache()
    with hooks(model, {site: reader(site) for site in sites}):
        model.module(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    final = read.pop(Site("resid_post", last))
    keys = {site.layer: x for site, x in read.items()}
    reading = Reading(
        kind, {layer: x[:, start - 1 :].flatten(0, 1) for layer, x in keys.items()},
        {layer: x[:, 1 : start - 1].flatten(0, 1)[::ELSEWHERE] for layer, x in keys.items()},
    )  # fmt: skip
    found = []
    for place in range(start - 1, ids.shape[1]):
        priors = [row.priors[place - start + 1] if kind == "forget" else {} for row in rows]
        chosen = torch.tensor([i for i, prior in enumerate(priors) if prior is not None], device=ids.device)
        if not len(chosen) or (place == 0):
            continue
        cache = None
        if keep_cache:
            cache = tuple((layer.keys[chosen, :, :place], layer.values[chosen, :, :place]) for layer in past.layers)
        wanted = dense([p for p in priors if p is not None], model.vocab_size) if kind == "forget" else None
        found.append(Prefixes(kind, ids[chosen, : place + 1], cache, final[chosen, place].clone(), wanted))
    return found, reading


def merged(pieces: Sequence[Prefixes]) -> dict[int, list[Prefixes]]:
    """Pieces by length, those of one kind and length joined into one."""
    groups: dict[tuple[int, Kind], list[Prefixes]] = {}
    for piece in pieces:
        groups.setdefault((piece.tokens.shape[1], piece.kind), []).append(piece)
    out: dict[int, list[Prefixes]] = {}
    for (length, _), group in sorted(groups.items()):
        out.setdefault(length, []).append(_joined(group))
    return out


def _joined(group: Sequence[Prefixes]) -> Prefixes:
    caches = [piece.cache for piece in group if piece.cache is not None]
    layers = zip(*caches, strict=True)
    cache = tuple((torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])) for parts in layers)
    priors = [piece.priors for piece in group if piece.priors is not None]
    return Prefixes(
        group[0].kind, torch.cat([p.tokens for p in group]), cache or None, torch.cat([p.final for p in group]),
        torch.cat(priors) if priors else None,
    )  # fmt: skip
