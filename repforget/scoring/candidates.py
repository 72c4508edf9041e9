"""Log-probability of many candidate answers after each prompt, with the prompt encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.scoring.encode import Encoded, context_limit, encode_many, pad_id, token_batches
from repforget.scoring.forward import (
    LOGIT_ELEMENTS,
    forward,
    places_tokens,
    select_rows,
    shareable,
    target_logprobs,
)  # fmt: skip
from repforget.scoring.logprobs import answer_logprobs

if TYPE_CHECKING:
    from repforget.models.capture import Batch
    from repforget.models.load import LoadedModel

Stem = tuple[int, ...]
CACHED_PER_TOKEN = 2  # a token that is only read from the cache costs less than one that is computed


@dataclass
class _Prefix:
    """The tokens before all candidates of a prompt, and (candidate index, its tokens) to score after them."""

    ids: tuple[int, ...]
    tails: list[tuple[int, Stem]] = field(default_factory=list)


def candidate_logprobs(
    model: LoadedModel,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    token_budget: int = 8192,
) -> list[NDArray[np.float64]]:
    """Return for each prompt the summed log-probability (nats) of each candidate continuation.

    Equal to :func:`answer_logprobs` on every pair, but tokens shared between candidates of a prompt are
    computed once: the prompt itself through one key/value cache, and common first tokens through one row.
    Cost: one pass over the prompts plus one short row per distinct beginning of a candidate. Candidates that
    do not fit the context are NaN. Models whose state cannot be shared (recurrent layers, no position ids)
    are scored pair by pair.
    """
    if len(prompts) != len(candidates):
        raise UsageError(f"candidate_logprobs got {len(prompts)} prompts and {len(candidates)} candidate "
                         "lists: give one list of candidates per prompt.")  # fmt: skip
    pairs = list(dict.fromkeys((p, c) for p, options in zip(prompts, candidates, strict=True) for c in options))
    scores = _scores(model, pairs, token_budget) if pairs else np.zeros(0)
    index = {pair: k for k, pair in enumerate(pairs)}
    return [scores[[index[p, c] for c in options]] if len(options) else np.zeros(0)
            for p, options in zip(prompts, candidates, strict=True)]  # fmt: skip


def _scores(model: LoadedModel, pairs: Sequence[tuple[str, str]], token_budget: int) -> NDArray[np.float64]:
    if not places_tokens(model):
        return answer_logprobs(model, pairs, token_budget=token_budget).sum_logprob
    encoded = encode_many(model.tokenizer, pairs, limit=context_limit(model))
    total = np.array([0.0 if e.valid else np.nan for e in encoded])
    prefixes = _prefixes(encoded)
    batches = token_batches([p.ids for p in prefixes], token_budget=token_budget,
                            pad_id=pad_id(model.tokenizer), side="left")  # fmt: skip
    for rows, batch in batches:
        logits, past = forward(model, batch.ids, batch.mask, batch.position_ids, 1, use_cache=True)
        if not shareable(past):
            return answer_logprobs(model, pairs, token_budget=token_budget).sum_logprob
        group = [prefixes[row] for row in rows]
        first = [(k, tail[0], who) for k, prefix in enumerate(group) for who, tail in prefix.tails]
        values, _ = target_logprobs(logits[[k for k, _, _ in first], -1], torch.tensor([t for _, t, _ in first]))
        np.add.at(total, [who for _, _, who in first], values.numpy())
        _add_tails(model, total, group, batch, past, token_budget)
    return total


def _prefixes(encoded: Sequence[Encoded]) -> list[_Prefix]:
    """Group valid candidates by the exact tokens before them, which joint tokenisation may make differ."""
    found: dict[tuple[int, ...], _Prefix] = {}
    for who, e in enumerate(encoded):
        if e.valid:
            ids = e.ids[: e.start]
            found.setdefault(ids, _Prefix(ids)).tails.append((who, e.answer))
    return list(found.values())


@dataclass
class _Row:
    """One sequence to run after a cached prompt, and what to read from it: (column, token, candidate)."""

    prefix: int
    stem: Stem
    wanted: list[tuple[int, int, int]] = field(default_factory=list)


def _add_tails(
    model: LoadedModel,
    total: NDArray[np.float64],
    group: Sequence[_Prefix],
    batch: Batch,
    past: Any,
    budget: int,
) -> None:
    """Add the log-probabilities of all tokens after the first, reading the prompts from the cache."""
    width = batch.ids.shape[1]
    lengths = batch.mask.sum(1)
    for chunk in _chunks(model, group, width, budget):
        source = torch.tensor([row.prefix for row in chunk])
        ids = torch.tensor([row.stem for row in chunk])
        mask = torch.cat([batch.mask[source], torch.ones_like(ids)], 1)
        positions = lengths[source][:, None] + torch.arange(ids.shape[1])
        logits, _ = forward(model, ids, mask, positions, ids.shape[1], past=select_rows(past, source), use_cache=True)
        wanted = torch.tensor([(r, *want) for r, row in enumerate(chunk) for want in row.wanted]).T
        place = wanted[:2].to(logits.device)
        values, _ = target_logprobs(logits[place[0], place[1]], wanted[2])
        np.add.at(total, wanted[3].numpy(), values.numpy())


def _chunks(model: LoadedModel, group: Sequence[_Prefix], width: int, budget: int) -> Iterator[list[_Row]]:
    """Yield rows whose stems are equally long, so that no padding follows the prompt, within the budget."""
    by_length: dict[int, list[_Row]] = {}
    for k, prefix in enumerate(group):
        for row in _rows_of(k, prefix):
            by_length.setdefault(len(row.stem), []).append(row)
    for length, rows in sorted(by_length.items()):
        size = max(1, min(CACHED_PER_TOKEN * budget // (width + length), _most_rows(model, length)))
        for at in range(0, len(rows), size):
            yield rows[at : at + size]


def _rows_of(k: int, prefix: _Prefix) -> list[_Row]:
    """Rows for one prompt: its distinct stems (candidates without the last token), maximal ones only."""
    rows: dict[Stem, _Row] = {}
    owner: dict[Stem, _Row] = {}  # every beginning is read in exactly one row
    for stem in sorted({tail[:-1] for _, tail in prefix.tails if len(tail) > 1}, key=lambda s: (-len(s), s)):
        if stem not in owner:
            rows[stem] = _Row(k, stem)
            for j in range(1, len(stem) + 1):
                owner.setdefault(stem[:j], rows[stem])
    for who, tail in prefix.tails:
        for j in range(1, len(tail)):
            owner[tail[:j]].wanted.append((j - 1, tail[j], who))
    return list(rows.values())


def _most_rows(model: LoadedModel, columns: int) -> int:
    return max(1, LOGIT_ELEMENTS // (model.vocab_size * columns))
