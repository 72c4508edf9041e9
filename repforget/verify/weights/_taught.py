"""Teaching a copy of a model: what the relearning attacks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.errors import NumericalError
from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel, copy_of
from repforget.scoring import encode_many
from repforget.scoring.encode import context_limit
from repforget.training import ADAPTER, Example, Optimizer, Step, collate, finetune, label_loss, low_rank_adapters
from repforget.verify import _constrained as path
from repforget.verify.arms import References
from repforget.verify.weights._altered import projections

RATE_TIMES_WIDTH = 0.04  # 3e-4 at width 128, 1e-5 at width 4096: AdamW's usual rate falls about as 1/width
PROBE = 32  # examples whose loss tells whether anything was learned
Array = NDArray[np.float64]


def teaching(model: LoadedModel, items: Sequence[Item], forms: int, *, questions: int | None = None) -> list[Example]:
    """Each item's first ``forms`` statements and ``questions`` (None: as many) with the answer, loss on the answer."""
    asked = forms if questions is None else questions
    texts = dict.fromkeys((q, item.continuation()) for item in items
                          for q in (*item.editor_prompts[:forms], *item.questions[:asked]))  # fmt: skip
    encoded = encode_many(model.tokenizer, list(texts), limit=context_limit(model))
    return [Example(e.ids, tuple(k >= e.start for k in range(len(e.ids)))) for e in encoded if e.valid]


def reading(model: LoadedModel, texts: Sequence[str]) -> list[Example]:
    """Plain texts, loss on every token after the first; cut at the context length."""
    limit = context_limit(model)
    coded = [tuple(ids[:limit]) for ids in model.tokenizer(list(texts))["input_ids"]] if texts else []
    return [Example(ids, (True,) * len(ids)) for ids in coded if len(ids) > 1]


def curve(
    model: LoadedModel, examples: Sequence[Example], examine: Callable[[LoadedModel], Array], marks: Sequence[int], *,
    lr: float | None, batch_size: int, seed: int, trainable: Callable[[str], bool] | None = None,
    optimizer: Optimizer = "adamw", rank: int = 0, alpha: float = 0.0,
) -> tuple[Array, float]:  # fmt: skip
    """What ``examine`` finds [marks, items] before and while a copy is taught, and by how much the loss falls.

    The loss (nats per token) is that of the first examples, the same before and after, for a batch's says little.

    ``rank`` > 0 trains low-rank additions to every projection instead.  Raises NumericalError where training diverges.
    """
    student = copy_of(model)
    # Low learning rates vanish in the rounding of half precision, which would look like robustness.
    student.module.float()
    rows = [examine(student)]

    def on_step(step: Step) -> None:
        if step.index in marks:
            rows.append(examine(student))
            if np.isnan(rows[-1]).sum() > np.isnan(rows[0]).sum():
                raise NumericalError(f"The answers are NaN at step {step.index}: lower the learning rate.")

    with torch.enable_grad():
        learns = label_loss(student.module, collate(examples[:1], student.device)).requires_grad
    if not learns:  # the edit lets no gradient through: nothing can be taught, and the curve is flat
        return np.stack(rows * len(marks)), 0.0
    before = _loss(student, examples)
    adapters = nullcontext()
    if rank:
        names = list(projections(student.module))
        adapters = low_rank_adapters(student.module, names, rank=rank, alpha=alpha, seed=seed)  # type: ignore[assignment]
        trainable = _of_adapters
    with adapters:
        finetune(
            student.module, examples, steps=marks[-1], lr=RATE_TIMES_WIDTH / student.width if lr is None else lr,
            seed=seed, batch_size=batch_size, schedule="constant", trainable=trainable, on_step=on_step,
            optimizer=optimizer,
        )  # fmt: skip
    return np.stack(rows), before - _loss(student, examples)


@torch.no_grad()
def _loss(model: LoadedModel, examples: Sequence[Example]) -> float:
    return float(label_loss(model.module, collate(examples[:PROBE], model.device)))


def _of_adapters(name: str) -> bool:
    return ADAPTER in name and not name.endswith(".original")


def halfway(
    references: References, items: Sequence[Item], view: View, before: Array, *, alternatives: int, forms: int
) -> float:
    """Midway between the prior and what the original answers before anything is taught, mean over items."""

    def untaught() -> Array:
        model = references.original
        chosen = path.kept_paths(references, model, items, view.knowledge, forms=forms, limit=alternatives)
        return path.probability(model, len(items), chosen)

    key = ("untaught", tuple((i.id, i.answer) for i in items), alternatives, forms)
    return (float(np.nanmean(references.once(key, untaught))) + float(before.mean())) / 2


def mean_over(marks: Sequence[int], rows: Array) -> Array:
    """Mean over the steps of curves [marks, items], joined by straight lines [items]."""
    widths = np.diff(np.asarray(marks, dtype=np.float64))
    area: Array = (widths[:, None] * (rows[1:] + rows[:-1]) / 2).sum(axis=0) / widths.sum()
    return area
