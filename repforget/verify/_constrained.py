"""The probability of the true answer when decoding is confined to the candidates, read at the answer's positions.

Along the true answer, each token competes only with the tokens that some candidate allows there.  The product of
these shares is a distribution over the candidates, and for a model that answers by the prior it is the prior.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.knowledge import Item, Knowledge
from repforget.models.capture import Batch
from repforget.models.load import LoadedModel
from repforget.scoring import Encoded, encode_many
from repforget.scoring.encode import context_limit, pad, pad_id
from repforget.scoring.forward import forward
from repforget.verify import _asking as ask
from repforget.verify.arms import References

Array = NDArray[np.float64]
LOGIT_ELEMENTS = 2**26  # logits of one batch held at once


@dataclass(frozen=True)
class Path:
    """A question with its true answer: the tokens, where the answer starts, and what may stand at each answer position.

    ``choices`` holds one tuple per answer token, the true token first; at least one position has a choice.
    """

    item: int
    ids: tuple[int, ...]
    start: int
    choices: tuple[tuple[int, ...], ...]

    @property
    def places(self) -> tuple[int, ...]:
        """Positions whose states predict the answer tokens."""
        return tuple(range(self.start - 1, len(self.ids) - 1))


def paths(
    model: LoadedModel, items: Sequence[Item], knowledge: Knowledge, *, forms: int, limit: int,
    without: Sequence[frozenset[str]] = (),
) -> list[Path]:  # fmt: skip
    """One path per item and question form; items without any alternative that can be told apart have none.

    ``without`` names, per item, answers that are not among the candidates.  No forward pass.
    """
    rows: list[tuple[int, str, str]] = []
    for k, item in enumerate(items):
        out = {item.continuation(a) for a in without[k]} if without else set()
        texts = [t for j, t in enumerate(ask.options(item, knowledge, limit)) if j == 0 or t not in out]
        rows += [(k, question, text) for question in item.questions[:forms] for text in texts]
    encoded = encode_many(model.tokenizer, [(q, t) for _, q, t in rows], limit=context_limit(model))
    groups: dict[tuple[int, str], list[Encoded]] = {}
    for (k, question, _), e in zip(rows, encoded, strict=True):
        groups.setdefault((k, question), []).append(e)
    made = (_path(k, group) for (k, _), group in groups.items())
    return [path for path in made if path is not None]


def _path(item: int, group: Sequence[Encoded]) -> Path | None:
    truth = group[0]
    if not truth.valid:
        return None
    head = truth.ids[: truth.start]
    # A candidate that changes the tokens of the prompt itself cannot be compared position by position.
    rivals = [e.answer for e in group[1:] if e.valid and e.ids[: e.start] == head]
    choices = []
    for t, token in enumerate(truth.answer):
        open_rivals = [r for r in rivals if len(r) > t and r[:t] == truth.answer[:t]]
        choices.append((token, *sorted({r[t] for r in open_rivals} - {token})))
    return Path(item, truth.ids, truth.start, tuple(choices)) if any(len(c) > 1 for c in choices) else None


def kept_paths(
    references: References, model: LoadedModel, items: Sequence[Item], knowledge: Knowledge, *, forms: int, limit: int
) -> list[Path]:
    """:func:`paths`, tokenised once for all arms that share a tokenizer."""
    key = ("paths", id(model.tokenizer), context_limit(model), tuple(items), knowledge.digest, forms, limit)
    return references.once(key, lambda: paths(model, items, knowledge, forms=forms, limit=limit))


class Rows(NamedTuple):
    """A right-padded batch of paths: ``places`` [b, k] predict the answer tokens, ``choices`` [b, k, c] compete there.

    ``which`` are the rows' numbers in the list of paths; ``real`` [b, k] marks positions of the row's own answer,
    ``open`` [b, k, c] real choices; the truth is choice 0.
    """

    which: list[int]
    batch: Batch
    places: Tensor
    choices: Tensor
    real: Tensor
    open: Tensor


def batches(model: LoadedModel, chosen: Sequence[Path]) -> Iterator[Rows]:
    """Cut paths into batches whose answer logits stay small."""
    longest = max((len(p.choices) for p in chosen), default=1)
    budget = min(8192, max(1, LOGIT_ELEMENTS // (model.vocab_size * longest)) * 32)
    order = sorted(range(len(chosen)), key=lambda k: (-len(chosen[k].ids), k))
    while order:
        size = max(1, budget // len(chosen[order[0]].ids))
        index, order = order[:size], order[size:]
        yield same_rows(model, [chosen[k] for k in index], index)


def same_rows(model: LoadedModel, group: Sequence[Path], index: Sequence[int] = ()) -> Rows:
    """One batch of exactly these paths in this order."""
    batch = pad([p.ids[:-1] for p in group], pad_id(model.tokenizer))  # nothing is read after the last token
    k, c = max(len(p.choices) for p in group), max(len(choice) for p in group for choice in p.choices)
    places, real = torch.zeros(len(group), k, dtype=torch.long), torch.zeros(len(group), k, dtype=torch.bool)
    choices, is_open = torch.zeros(len(group), k, c, dtype=torch.long), torch.zeros(len(group), k, c, dtype=torch.bool)
    for row, path in enumerate(group):
        n = len(path.choices)
        places[row, :n], places[row, n:] = torch.tensor(path.places), path.places[-1]
        real[row, :n] = True
        for t, options in enumerate(path.choices):
            choices[row, t, : len(options)] = torch.tensor(options)
            is_open[row, t, : len(options)] = True
    return Rows(list(index), batch, places, choices, real, is_open)


def read(logits: Tensor, rows: Rows) -> tuple[Array, Array]:
    """Logits [b, k, V] at ``rows.places`` -> the truth's constrained probability and its log-probability, each [b]."""
    wide = logits.double().cpu()
    competing = wide.gather(-1, rows.choices).masked_fill(~rows.open, -torch.inf)
    truth = competing[..., 0]
    share = torch.where(rows.real, truth - competing.logsumexp(-1), 0.0).sum(-1).exp()
    nats = torch.where(rows.real, truth - wide.logsumexp(-1), 0.0).sum(-1)
    return share.numpy(), nats.numpy()


def logits_at(model: LoadedModel, rows: Rows) -> Tensor:
    """The model's logits [b, k, V] at ``rows.places``; one forward pass."""
    kept, slot = np.unique(rows.places.numpy(), return_inverse=True)
    logits, _ = forward(model, rows.batch.ids, rows.batch.mask, rows.batch.position_ids, torch.from_numpy(kept))
    slots = torch.from_numpy(slot.reshape(rows.places.shape)).to(logits.device)
    return logits[torch.arange(len(slots), device=logits.device)[:, None], slots]


def probability(model: LoadedModel, count: int, chosen: Sequence[Path]) -> Array:
    """Per item, the truth's probability when the model's decoding is confined to the candidates [count]."""
    found = np.zeros(len(chosen))
    for rows in batches(model, chosen):
        found[rows.which] = read(logits_at(model, rows), rows)[0]
    return by_item(count, chosen, found)


def by_item(count: int, chosen: Sequence[Path], values: Array) -> Array:
    """Mean over an item's question forms [.., count] of values per path [.., paths]; NaN for items without a path."""
    total, rows = np.zeros((*values.shape[:-1], count)), np.zeros(count)
    for column, path in enumerate(chosen):
        total[..., path.item] += values[..., column]
        rows[path.item] += 1.0
    return np.where(rows > 0, total / np.maximum(rows, 1.0), np.nan)
