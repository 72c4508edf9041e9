"""Log-probability of answers after their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.scoring.encode import Encoded, context_limit, encode_many, pad_id, token_batches
from repforget.scoring.forward import LOGIT_ELEMENTS, forward, target_logprobs

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel


@dataclass(frozen=True)
class AnswerScores:
    """Scores of n answers in nats; answers longer than the context are not ``valid``: NaN, and counted."""

    sum_logprob: NDArray[np.float64]  # [n] sum over the answer's tokens
    n_tokens: NDArray[np.int64]  # [n] scored tokens
    greedy_match: NDArray[np.bool_]  # [n] every answer token is the arg max: greedy decoding would say the answer
    token_logprobs: tuple[NDArray[np.float64], ...]  # n arrays, one value per answer token
    valid: NDArray[np.bool_]  # [n]

    @property
    def mean_logprob(self) -> NDArray[np.float64]:
        """Mean log-probability per answer token [n], NaN where invalid."""
        return self.sum_logprob / np.maximum(self.n_tokens, 1)

    @property
    def n_invalid(self) -> int:
        return int((~self.valid).sum())


def answer_logprobs(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], *, eos: bool = False, token_budget: int = 8192
) -> AnswerScores:
    """Score each continuation after its prompt by teacher forcing: log p(continuation | prompt), in nats.

    Only answer positions are projected to the vocabulary; log-softmax runs in at least fp32 and sums in fp64,
    so the value does not depend on batch shape, order or padding beyond rounding. One forward pass over all
    tokens. Raises :class:`KnowledgeError` for an answer without tokens and :class:`NumericalError` for NaN
    logits.

    A low value shows that this wording of the answer is improbable here; it does not show that the model
    lacks the knowledge.
    """
    encoded = encode_many(model.tokenizer, pairs, eos=eos, limit=context_limit(model))
    values: list[NDArray[np.float64]] = [np.zeros(0)] * len(encoded)
    greedy = np.zeros(len(encoded), dtype=np.bool_)
    valid = np.array([e.valid for e in encoded], dtype=np.bool_)
    scored = np.flatnonzero(valid)
    chosen = [encoded[k] for k in scored]
    budget = min(token_budget, _logit_budget(model, chosen))
    batches = token_batches([e.ids[:-1] for e in chosen], token_budget=budget, pad_id=pad_id(model.tokenizer))
    for rows, batch in batches:
        # The last token is only predicted, never read, so it is not part of the batch.
        group = [chosen[row] for row in rows]
        row_of = np.repeat(np.arange(len(group)), [len(e.answer) for e in group])
        position = np.concatenate([np.arange(e.start - 1, len(e.ids) - 1) for e in group])
        kept, slot = np.unique(position, return_inverse=True)
        logits, _ = forward(model, batch.ids, batch.mask, batch.position_ids, torch.from_numpy(kept))
        picked = logits[torch.from_numpy(row_of).to(logits.device), torch.from_numpy(slot).to(logits.device)]
        found, top = target_logprobs(picked, torch.tensor([t for e in group for t in e.answer]))
        for k, row in enumerate(rows):
            mine = row_of == k
            values[scored[row]] = found.numpy()[mine]
            greedy[scored[row]] = bool(top.numpy()[mine].all())
    sums = np.array([v.sum() if ok else np.nan for v, ok in zip(values, valid, strict=True)], dtype=np.float64)
    return AnswerScores(sums, np.array([len(v) for v in values], dtype=np.int64), greedy, tuple(values), valid)


def _logit_budget(model: LoadedModel, encoded: Sequence[Encoded]) -> int:
    """Token budget that keeps the projected logits within the element limit."""
    answers = sum(len(e.answer) for e in encoded)
    tokens = sum(len(e.ids) for e in encoded)
    return int(LOGIT_ELEMENTS / model.vocab_size * tokens / answers) if answers else 1
