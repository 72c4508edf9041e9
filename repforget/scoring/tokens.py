"""Everything teacher forcing tells about continuations, from one forward pass per sequence."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.scoring.encode import Encoded, context_limit, encode_many, pad, pad_id, token_batches
from repforget.scoring.forward import (
    CACHED_PER_TOKEN,
    LOGIT_ELEMENTS,
    forward,
    minds_prompts,
    places_tokens,
    read_logits,
    select_rows,
    shareable,
)  # fmt: skip

if TYPE_CHECKING:
    from repforget.models.capture import Batch
    from repforget.models.load import LoadedModel

Tail = tuple[int, ...]
Floats = NDArray[np.float64]
ENOUGH_TOKENS = 1024  # in a batch: more of them cost hardly less per token
SIMILAR = 0.9  # of the longest row


@dataclass(frozen=True)
class TokenScores:
    """Scores of n continuations token by token; one that exceeds the context is not ``valid``: empty, NaN sum.

    ``mu`` and ``sigma2`` are the mean and variance of log p under the model at each position (for min-k++), where
    they were asked for.
    """

    logprobs: tuple[Floats, ...]  # n arrays [T_i], nats
    hits: tuple[NDArray[np.bool_], ...]  # n arrays [T_i], the token is the arg max
    mu: tuple[Floats, ...] | None
    sigma2: tuple[Floats, ...] | None
    valid: NDArray[np.bool_]  # [n]
    eos: bool  # the last token of each continuation is the end-of-sequence token

    @property
    def n_tokens(self) -> NDArray[np.int64]:
        """Scored tokens [n], 0 where invalid."""
        return np.array([len(x) for x in self.logprobs], dtype=np.int64)

    @property
    def sum_logprob(self) -> Floats:
        """Log-probability of each continuation [n], NaN where invalid."""
        sums = np.array([x.sum() for x in self.logprobs], dtype=np.float64)
        return np.where(self.valid, sums, np.nan)

    @property
    def mean_logprob(self) -> Floats:
        """Mean log-probability per token [n], NaN where invalid."""
        return self.sum_logprob / np.maximum(self.n_tokens, 1)

    @property
    def n_invalid(self) -> int:
        return int((~self.valid).sum())


def token_scores(
    model: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    *,
    eos: bool = False,
    moments: bool | Sequence[bool] = False,
    token_budget: int = 8192,
) -> TokenScores:
    """Score every token of each continuation after its prompt by teacher forcing: one pass, all metrics.

    ``eos`` appends the end-of-sequence token to each continuation; ``moments`` reads ``mu`` and ``sigma2`` too,
    of all pairs or of those marked (NaN elsewhere). Continuations of the same prompt share its key/value cache
    and equal pairs are computed once, so ask everything about an item in one call. Values do not depend on
    batch, order, padding or sharing beyond rounding. Cost: each distinct prompt and each distinct continuation
    once; models whose state cannot be shared (recurrent layers, no position ids) run every pair whole. Raises
    :class:`KnowledgeError` for a continuation without tokens and :class:`NumericalError` for NaN logits.

    Low values show that this wording is improbable here, not that the model lacks the knowledge.
    """
    encoded = encode_many(model.tokenizer, pairs, eos=eos, limit=context_limit(model))
    marked = [moments] * len(pairs) if isinstance(moments, bool) else list(moments)
    if len(marked) != len(pairs):
        raise UsageError(f"token_scores got {len(pairs)} pairs and {len(marked)} marks for moments: give one per pair.")
    scores = score_encoded(model, encoded, share=True, moments=marked, eos=eos, token_budget=token_budget)
    return scores if moments is not False else replace(scores, mu=None, sigma2=None)


def score_encoded(
    model: LoadedModel, encoded: Sequence[Encoded], *, share: bool, moments: Sequence[bool], eos: bool,
    token_budget: int,
) -> TokenScores:  # fmt: skip
    """:func:`token_scores` of encoded pairs; ``share=False`` runs every sequence whole, unless an edit minds."""
    distinct = list(dict.fromkeys(e for e in encoded if e.valid))
    table = _Table(distinct, {e for e, marked in zip(encoded, moments, strict=True) if marked})
    groups: dict[Tail, list[int]] = {}  # what precedes the continuation -> who; joint tokenisation may differ
    for who, e in enumerate(distinct):
        groups.setdefault(e.ids[: e.start], []).append(who)
    apart = minds_prompts(model)
    shared = {ids: who for ids, who in groups.items() if apart or (share and len(who) > 1)}
    if shared and not (places_tokens(model) and _score_shared(model, table, shared, token_budget)):
        shared = {}
    _score_whole(model, table, [w for ids, who in groups.items() if ids not in shared for w in who], token_budget)
    index = {e: who for who, e in enumerate(distinct)}
    rows = [table.of(index.get(e)) for e in encoded]
    valid = np.array([e.valid for e in encoded], dtype=np.bool_)
    return TokenScores(tuple(r[0] for r in rows), tuple(r[1] > 0 for r in rows), tuple(r[2] for r in rows),
                       tuple(r[3] for r in rows), valid, eos)  # fmt: skip


class _Table:
    """What is read for every continuation token: rows of [4, all tokens], one continuation after the other."""

    def __init__(self, encoded: Sequence[Encoded], marked: set[Encoded]) -> None:
        self.encoded = encoded
        self.marked = np.array([e in marked for e in encoded], dtype=np.bool_)
        self.starts = np.concatenate([[0], np.cumsum([len(e.answer) for e in encoded])]).astype(np.int64)
        self.values = np.full((4, self.starts[-1]), np.nan)

    def of(self, who: int | None) -> Floats:
        return self.values[:, :0] if who is None else self.values[:, self.starts[who] : self.starts[who + 1]]

    def read(self, logits: Tensor, wanted: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Read from ``logits`` [b, k, V]: (row, first column, continuation, its first token, how many)."""
        for moments in (False, True):
            if these := [one for one in wanted if self.marked[one[2]] == moments]:
                row, column, who, first, count = np.array(these).T
                step = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
                place = np.repeat(self.starts[who] + first, count) + step
                tokens = [t for _, _, w, f, n in these for t in self.encoded[w].answer[f : f + n]]
                at = torch.from_numpy(np.repeat(row, count)), torch.from_numpy(np.repeat(column, count) + step)
                found = read_logits(logits, *at, torch.tensor(tokens), moments=moments)
                self.values[: len(found), place] = found


def _score_whole(model: LoadedModel, table: _Table, chosen: Sequence[int], token_budget: int) -> None:
    """Every sequence in one piece; only positions that predict a continuation are projected to the vocabulary."""
    encoded = [table.encoded[who] for who in chosen]
    answers = sum(len(e.answer) for e in encoded)
    if not answers:
        return
    # The projected logits stay within the element limit.
    projected = int(LOGIT_ELEMENTS / model.vocab_size * sum(len(e.ids) for e in encoded) / answers)
    batches = token_batches([e.ids[:-1] for e in encoded], token_budget=min(token_budget, projected),
                            pad_id=pad_id(model.tokenizer))  # fmt: skip
    for rows, batch in batches:
        # The last token is only predicted, never read, so it is not part of the batch.
        kept = np.unique(np.concatenate([np.arange(encoded[r].start - 1, len(encoded[r].ids) - 1) for r in rows]))
        logits, _ = forward(model, batch.ids, batch.mask, batch.position_ids, torch.from_numpy(kept))
        table.read(logits, [(k, int(np.searchsorted(kept, encoded[r].start - 1)), chosen[r], 0, len(encoded[r].answer))
                            for k, r in enumerate(rows)])  # fmt: skip


@dataclass
class _Row:
    """A sequence to run after a cached prompt, and the continuations read from it."""

    prompt: int
    stem: Tail
    read: list[int] = field(default_factory=list)


def _score_shared(model: LoadedModel, table: _Table, groups: dict[Tail, list[int]], token_budget: int) -> bool:
    """Each prompt once, its continuations after its cache; False where this model's cache cannot be shared."""
    prompts = list(groups)
    for rows, batch in token_batches(prompts, token_budget=token_budget, pad_id=pad_id(model.tokenizer), side="left"):
        logits, past = forward(model, batch.ids, batch.mask, batch.position_ids, 1, use_cache=True)
        if not shareable(past):
            return False
        group = [groups[prompts[row]] for row in rows]
        table.read(logits[:, -1:], [(k, 0, who, 0, 1) for k, members in enumerate(group) for who in members])
        _score_tails(model, table, group, batch, past, token_budget)
    return True


def _score_tails(
    model: LoadedModel, table: _Table, group: Sequence[Sequence[int]], batch: Batch, past: Any, budget: int
) -> None:
    """The tokens after the first of every continuation, with the prompts read from the cache."""
    lengths = batch.mask.sum(1)
    rows = [row for k, members in enumerate(group) for row in _rows_of(table, k, members)]
    for chunk in _chunks(model, rows, batch.ids.shape[1], budget):
        source = torch.tensor([row.prompt for row in chunk])
        tails = pad([row.stem for row in chunk], pad_id(model.tokenizer))
        mask = torch.cat([batch.mask[source], tails.mask], 1)
        width = tails.ids.shape[1]
        positions = lengths[source][:, None] + torch.arange(width)
        logits, _ = forward(model, tails.ids, mask, positions, width, past=select_rows(past, source), use_cache=True)
        table.read(logits, [(r, 0, who, 1, len(table.encoded[who].answer) - 1)
                            for r, row in enumerate(chunk) for who in row.read])  # fmt: skip


def _rows_of(table: _Table, prompt: int, members: Sequence[int]) -> list[_Row]:
    """The continuations without their last token; one that begins another is read from the other's row."""
    stems = {who: table.encoded[who].answer[:-1] for who in members if len(table.encoded[who].answer) > 1}
    ordered = sorted(set(stems.values()))
    following = [*ordered[1:], ()]  # one too many where no continuation has a second token
    rows = [_Row(prompt, s) for s, after in zip(ordered, following, strict=False) if after[: len(s)] != s]
    for who, stem in stems.items():
        rows[bisect_left(rows, stem, key=lambda row: row.stem)].read.append(who)
    return rows


def _chunks(model: LoadedModel, rows: Sequence[_Row], width: int, budget: int) -> Iterator[list[_Row]]:
    """Rows of similar length, longest first, within the budget of tokens and of logits."""
    left = sorted(rows, key=lambda row: -len(row.stem))
    while left:
        length = len(left[0].stem)
        size = min(CACHED_PER_TOKEN * budget // (width + length), LOGIT_ELEMENTS // (model.vocab_size * length))
        # A batch that is large enough ends where padding would begin to cost.
        alike = next((k for k, row in enumerate(left) if k * length >= ENOUGH_TOKENS
                      and len(row.stem) < SIMILAR * length), len(left))  # fmt: skip
        size = max(1, min(size, alike))
        chunk, left = left[:size], left[size:]
        yield chunk
