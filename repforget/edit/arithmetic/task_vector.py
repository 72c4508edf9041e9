"""Tune the model further on the forget facts and go the other way."""

from __future__ import annotations

from typing import Literal

from repforget.artifact import Edit
from repforget.edit.arithmetic._vectors import Adapter, Tuning, subtracted, tuned
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def task_vector(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, strength: float | Literal["auto"] = "auto", keep: float = 0.95,
    steps: int = 100, lr: float | Literal["auto"] = "auto", batch_size: int = 32, adapter: Adapter = "auto",
    rank: int = 16, max_facts: int = 4000,
) -> Edit:  # fmt: skip
    """Subtract what fine-tuning on the forget facts adds: ``W - strength (W_tuned - W)``.

    Source: Ilharco et al. 2022, arXiv 2212.04089 (negated task vector); with LoRA the product of its factors is what is
    subtracted, exactly (Zhang et al. 2023, arXiv 2306.14870).  A strength of -1 is the fine-tuned model.

    Args:
        strength: "auto" is the largest found for which answers of retained facts keep ``keep`` of their probability.
        steps, lr, batch_size: of the fine-tuning (AdamW, cosine); lr "auto" is 0.1 / width, ten times that with LoRA.
        adapter: "lora" of ``rank`` on all matrices, "none" for all parameters, "auto" by size (LoRA from 1 B on); of
            the layers of ``where`` alone, where it is given.
        max_facts: facts read, chosen by seed.

    Raises KnowledgeError without facts, UsageError for settings out of range, NumericalError where no strength keeps
    enough.  Cost: ``steps`` steps of fine-tuning, then 12 evaluations of some hundred facts; memory: two copies of
    what is tuned.

    Weakness: facts known for sure leave little to learn, so that the vector holds the wording and the style of the
    texts more than their content.  A low answer probability does not show that relearning is slow.
    """
    how = Tuning(steps, lr, batch_size, adapter, rank, max_facts)
    changes = tuned(model, data, how, where, seed)
    chosen, operations, note = subtracted(model, data, changes, strength, keep, seed, progress)
    return Edit.build("task_vector", {"strength": chosen}, model, data.digest, operations, notes=[note])
