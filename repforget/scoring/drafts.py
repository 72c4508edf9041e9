"""What a model would say itself of a given continuation, read in one pass: greedy decoding without the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from repforget.errors import NumericalError
from repforget.scoring.encode import encode_prompts, pad_id, token_batches
from repforget.scoring.forward import LOGIT_ELEMENTS, forward, minds_prompts, places_tokens

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

Ids = tuple[int, ...]


def drafted(
    model: LoadedModel, prompts: Sequence[str], sequences: Sequence[Ids], drafts: Sequence[str]
) -> list[Ids]:  # fmt: skip
    """Tokens of each draft after its prompt (``sequences``), () where the joint text begins with other tokens."""
    joint = encode_prompts(model.tokenizer, [p + d for p, d in zip(prompts, drafts, strict=True)])
    return [both[len(ids) :] if both[: len(ids)] == ids else () for ids, both in zip(sequences, joint, strict=True)]


def told(
    model: LoadedModel, drafts: Sequence[Ids], hits: Sequence[ArrayLike], most: int
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """Yield (row, tokens) of greedy decoding as far as it follows the draft, by ``hits`` of teacher forcing.

    ``hits`` may have one more entry than the draft has tokens, for the end-of-sequence token; where they have any
    other number they are of other tokens (or of none: the pair exceeded the context) and the row is left out.
    """
    for row, (draft, hit) in enumerate(zip(drafts, map(np.asarray, hits), strict=True)):
        ids = (*draft, model.tokenizer.eos_token_id)[: len(hit)]
        if draft and len(hit) in (len(draft), len(draft) + 1):
            yield row, list(ids[: len(hit) if hit.all() else int(hit.argmin())])[:most]


def agreed(
    model: LoadedModel, sequences: Sequence[Ids], drafts: Sequence[Ids], most: int, token_budget: int
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """Yield (row, tokens) of greedy decoding up to the first that is not the draft's, itself included.

    At most ``most`` tokens; no row without a draft, and none of a model that is not told positions or has an edit
    that minds where the prompt ends. The tokens are those of decoding step by step up to rounding, as between any
    two batches (Leviathan et al. 2022, arXiv 2211.17192, in the greedy case with a draft given).
    """
    if not places_tokens(model) or minds_prompts(model):
        return
    ids = [draft[: most - 1] for draft in drafts]
    rows = [row for row, draft in enumerate(ids) if draft]
    read = [(*sequences[row], *ids[row]) for row in rows]
    drafted = sum(len(ids[row]) + 1 for row in rows)
    if not drafted:
        return
    # The projected logits stay within the element limit.
    projected = max(1, int(LOGIT_ELEMENTS / model.vocab_size * sum(map(len, read)) / drafted))
    for chosen, batch in token_batches(read, token_budget=min(token_budget, projected), pad_id=pad_id(model.tokenizer)):
        group = [rows[k] for k in chosen]
        columns = sorted({c for row in group for c in range(len(sequences[row]) - 1, len(sequences[row] + ids[row]))})
        logits, _ = forward(model, batch.ids, batch.mask, batch.position_ids, torch.tensor(columns))
        best = logits.argmax(-1)
        broken = logits.gather(-1, best[..., None])[..., 0].isnan().cpu()  # NaN wins every arg max
        best = best.cpu()
        for k, row in enumerate(group):
            start = columns.index(len(sequences[row]) - 1)
            own = best[k, start : start + len(ids[row]) + 1].tolist()
            follows = next((n for n, token in enumerate(ids[row]) if own[n] != token), len(ids[row]))
            if bool(broken[k, start : start + follows + 1].any()):
                raise NumericalError("The model returned NaN logits while generating: check the edit's strength, or "
                                     "load the model in float32.")  # fmt: skip
            yield row, own[: follows + 1]
