"""Log-probability of answers, and of many candidate answers, after their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.scoring.encode import context_limit, encode_many
from repforget.scoring.tokens import score_encoded, token_scores

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
    s = score_encoded(model, encoded, share=False, moments=[False] * len(pairs), eos=eos,
                      token_budget=token_budget)  # fmt: skip
    greedy = s.valid & np.array([hits.all() for hits in s.hits], dtype=np.bool_)
    return AnswerScores(s.sum_logprob, s.n_tokens, greedy, s.logprobs, s.valid)


def candidate_logprobs(
    model: LoadedModel,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    token_budget: int = 8192,
) -> list[NDArray[np.float64]]:
    """Return for each prompt the summed log-probability (nats) of each candidate continuation.

    Equal to :func:`answer_logprobs` on every pair, but the prompt is computed once, through its key/value
    cache, and a candidate that begins another is read from the other's row. Candidates that do not fit the
    context are NaN. Models whose state cannot be shared (recurrent layers, no position ids) are scored pair
    by pair.
    """
    if len(prompts) != len(candidates):
        raise UsageError(f"candidate_logprobs got {len(prompts)} prompts and {len(candidates)} candidate "
                         "lists: give one list of candidates per prompt.")  # fmt: skip
    pairs = [(p, c) for p, options in zip(prompts, candidates, strict=True) for c in options]
    scores = token_scores(model, pairs, token_budget=token_budget).sum_logprob
    ends = np.cumsum([0, *map(len, candidates)])
    return [scores[at:end] for at, end in pairwise(ends)]
