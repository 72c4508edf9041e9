"""Text to token ids with the exact place where the answer starts, and batches of equal token cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from repforget.errors import KnowledgeError, UsageError
from repforget.models._names import core, text_config
from repforget.models.capture import Batch

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

NO_LIMIT = 10**9  # tokenizers write "no maximum length" as an astronomically large number
REMEMBERED = 200_000  # texts per tokenizer, a few hundred bytes each
Span = tuple[tuple[int, ...], list[int] | None]
_MEMO: WeakKeyDictionary[Any, tuple[Any, dict[str, Span]]] = WeakKeyDictionary()
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


@dataclass(frozen=True)
class Encoded:
    """A prompt and its continuation as one token sequence.

    ``ids[start:]`` is the continuation (with the end-of-sequence token where ``eos``); ``valid`` is False
    where the sequence does not fit the context, so that it must not be scored.
    """

    ids: tuple[int, ...]
    start: int
    valid: bool
    eos: bool

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.start :]


def encode(tokenizer: Any, prompt: str, continuation: str, *, eos: bool = False) -> Encoded:
    """Tokenise ``prompt + continuation`` jointly and find the first token with a continuation character.

    The boundary comes from the character offsets of the joint text, so a token that straddles it belongs to
    the answer. A tokenizer without (complete) offsets is served by tokenising the prompt alone, which is
    accepted only if those ids are a prefix of the joint ids; otherwise :class:`UsageError`. A continuation
    without tokens, or one that no token precedes, raises :class:`KnowledgeError`.
    """
    return encode_many(tokenizer, [(prompt, continuation)], eos=eos)[0]


def encode_many(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], *, eos: bool = False, limit: int | None = None
) -> list[Encoded]:
    """:func:`encode` for many pairs in one tokenizer call; ``limit`` is the longest valid sequence in tokens.

    ``limit=None`` uses the tokenizer's own maximum length.
    """
    if not pairs:
        return []
    if eos and tokenizer.eos_token_id is None:
        raise UsageError("The tokenizer has no end-of-sequence token but eos=True was asked: score with eos=False.")
    longest = _tokenizer_limit(tokenizer) if limit is None else limit
    tail = (int(tokenizer.eos_token_id),) if eos else ()
    spans = _spans(tokenizer, [prompt + continuation for prompt, continuation in pairs])
    out = []
    for (prompt, continuation), (ids, ends) in zip(pairs, spans, strict=True):
        start = _boundary(tokenizer, prompt, continuation, ids, ends)
        if start >= len(ids):
            raise KnowledgeError(
                f"The answer '{continuation}' to '{prompt}' has no tokens in this tokenizer: write an answer "
                "with visible characters."
            )
        if start == 0:
            raise KnowledgeError(
                f"No token precedes the answer '{continuation}' of the prompt '{prompt}', so it has no "
                "conditional probability: give the item a longer prompt."
            )
        whole = (*ids, *tail)
        out.append(Encoded(whole, start, len(whole) <= longest, eos))
    return out


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of prompts to continue: special tokens in front stay, trailing ones are removed."""
    encoded = [ids for ids, _ in _spans(tokenizer, prompts)] if prompts else []
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise KnowledgeError(f"The prompt '{prompt}' has no tokens in this tokenizer: write a longer prompt.")
    return encoded


def _spans(tokenizer: Any, texts: Sequence[str]) -> list[Span]:
    """Ids (without trailing special tokens) and the character where each token ends, None without offsets.

    Remembered per tokenizer object: a battery asks the same texts on every arm and by several verifiers.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # anything else may not even have a length
        return _tokenised(tokenizer, texts)
    state = (len(tokenizer), getattr(tokenizer, "add_bos_token", None), getattr(tokenizer, "add_eos_token", None))
    known, memo = _MEMO.get(tokenizer, (None, {}))
    if known != state or len(memo) > REMEMBERED:
        memo = {}
        _MEMO[tokenizer] = (state, memo)
    new = [text for text in dict.fromkeys(texts) if text not in memo]
    if new:
        memo.update(zip(new, _tokenised(tokenizer, new), strict=True))
    return [memo[text] for text in texts]


def _tokenised(tokenizer: Any, texts: Sequence[str]) -> list[Span]:
    fast = bool(tokenizer.is_fast)
    coded = tokenizer(list(texts), return_offsets_mapping=fast, return_special_tokens_mask=True,
                      return_attention_mask=False, verbose=False)  # fmt: skip
    out: list[Span] = []
    for row, text in enumerate(texts):
        ids, special = coded["input_ids"][row], coded["special_tokens_mask"][row]
        stop = len(ids)
        while stop and special[stop - 1]:
            stop -= 1
        # A text of only special tokens (an empty prompt after <bos>) keeps what the tokenizer puts in front.
        stop = stop or _leading(tokenizer, ids)
        ends = [end for _, end in coded["offset_mapping"][row][:stop]] if fast else None
        # Some published tokenizers report empty offsets; then they must not be believed.
        if ends is not None and max(ends, default=0) < len(text.rstrip()):
            ends = None
        out.append((tuple(ids[:stop]), ends))
    return out


def _leading(tokenizer: Any, ids: Sequence[int]) -> int:
    return next((k for k, token in enumerate(ids) if token == tokenizer.eos_token_id
                 and token != tokenizer.bos_token_id), len(ids))  # fmt: skip


def _boundary(tokenizer: Any, prompt: str, continuation: str, ids: Sequence[int], ends: list[int] | None) -> int:
    if ends is not None:
        return next((k for k, end in enumerate(ends) if end > len(prompt)), len(ids))
    alone = _spans(tokenizer, [prompt])[0][0]
    if tuple(ids[: len(alone)]) != alone:
        raise UsageError(
            f"The tokenizer reports no character offsets and joins the answer '{continuation}' with its "
            f"prompt '{prompt}', so the answer cannot be located: use the model's fast tokenizer."
        )
    return len(alone)


def _tokenizer_limit(tokenizer: Any) -> int:
    return min(int(tokenizer.model_max_length or NO_LIMIT), NO_LIMIT)


def context_limit(model: LoadedModel) -> int:
    """Longest sequence in tokens that the model accepts: its configuration, else its tokenizer's maximum."""
    config = text_config(core(model))
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return _tokenizer_limit(model.tokenizer)


def pad_id(tokenizer: Any) -> int:
    """A token id for padding; it is masked, so any valid id serves where the tokenizer defines none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Stack token sequences [b] of different length into ids and mask [b, s]."""
    return Batch.pad(sequences, pad_id, side)


def token_batches(
    sequences: Sequence[Sequence[int]],
    *,
    token_budget: int = 8192,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    equal_length: bool = False,
    extra: int = 0,
) -> Iterator[tuple[list[int], Batch]]:
    """Yield (row indices, batch) of at most ``token_budget`` padded tokens, longest first, every row once.

    A sequence longer than the budget travels alone. ``equal_length`` forms batches without any padding, for
    architectures that cannot be told about it. ``extra`` tokens per row are counted besides: what will be added.
    """
    order = sorted(range(len(sequences)), key=lambda row: (-len(sequences[row]), row))
    groups = [list(g) for _, g in groupby(order, key=lambda row: len(sequences[row]))] if equal_length else [order]
    for group in groups:
        while group:
            size = max(1, token_budget // max(1, len(sequences[group[0]]) + extra))
            rows, group = group[:size], group[size:]
            yield rows, pad([sequences[row] for row in rows], pad_id, side)
