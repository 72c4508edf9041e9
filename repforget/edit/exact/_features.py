"""What a frozen model makes of texts: the rows that a linear head is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.errors import UsageError, nearest
from repforget.knowledge import Knowledge
from repforget.linear.rows import Table
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Site
from repforget.scoring.encode import encode_prompts, pad_id, token_batches
from repforget.training import Record, encoded

Label = Literal["relation", "answer"]
LABELS: tuple[str, ...] = get_args(Label)
SETS = ("forget", "retain", "neighbours")


def probe_rows(
    model: LoadedModel, knowledge: Knowledge, site: Site, *, sets: Sequence[str] = ("forget", "retain"),
    label: Label = "relation", relation: str | None = None, progress: Progress | None = None,
) -> Table:  # fmt: skip
    """One row per statement form of each item: the activation at its last prompt token, labelled by relation or answer.

    Ids are ``<item>#s0``, clusters the items'.  ``relation`` keeps the items of one.  Cost: one forward pass up to the
    site.  Raises UsageError for an unknown set, label or relation.
    """
    for name, valid in (*((s, SETS) for s in sets), (label, LABELS)):
        if name not in valid:
            raise UsageError(f"'{name}' is not known: {nearest(name, valid)}")
    items = [item for name in sets for item in getattr(knowledge, name)]
    known = {item.relation for item in items}
    if relation is not None and relation not in known:
        raise UsageError(f"There is no relation '{relation}' in '{knowledge.name}': {nearest(relation, known)}")
    asked = [(item, k, prompt) for item in items if relation in (None, item.relation)
             for k, prompt in enumerate(item.editor_prompts)]  # fmt: skip
    ids = encode_prompts(model.tokenizer, [prompt for _, _, prompt in asked])
    x = np.empty((len(asked), 0))
    batches = list(token_batches(ids, pad_id=pad_id(model.tokenizer)))
    for rows, batch in track(progress, batches, "reading features"):
        found = capture(model, [site], batch, "last")[site].double().cpu().numpy()
        x = x if x.shape[1] else np.empty((len(asked), found.shape[1]))
        x[rows] = found
    return Table(x, np.array([getattr(item, label) for item, _, _ in asked]),
                 np.array([f"{item.id}#s{k}" for item, k, _ in asked]), np.array([i.cluster for i, _, _ in asked]),
                 f"{knowledge.name} at {site}")  # fmt: skip


def answer_rows(
    model: LoadedModel, records: Sequence[Record], progress: Progress | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What the unembedding reads where it predicts the tokens with loss: features [n, d] and those tokens [n].

    In order of the records and of their tokens.  Cost: one forward pass of the model over all records.
    """
    examples = encoded(model, records)
    site = Site("final_norm")
    found: dict[int, torch.Tensor] = {}
    batches = list(token_batches([e.tokens for e in examples], pad_id=pad_id(model.tokenizer)))
    for rows, batch in track(progress, batches, "reading features"):
        values = capture(model, [site], batch, "all")[site].double().cpu()
        for place, row in enumerate(rows):
            where = [k - 1 for k, counts in enumerate(examples[row].labelled) if counts and k]
            found[row] = values[place, where]
    tokens: list[Any] = [[t for t, counts in zip(e.tokens[1:], e.labelled[1:], strict=True) if counts]
                         for e in examples]  # fmt: skip
    return (torch.cat([found[row] for row in range(len(examples))]).numpy(), np.concatenate(tokens).astype(np.int64))
