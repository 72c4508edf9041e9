"""Move the model as far from one that learned the forget facts as it is from one that learned new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from repforget.artifact import Edit
from repforget.edit._collect import subsample
from repforget.edit.arithmetic._vectors import Adapter, Tuning, tuned_on
from repforget.edit.train._data import Row, Rows, fact_rows, load_rows
from repforget.edit.train._distil import Teachers, apart, noted
from repforget.edit.train._objective import find, shared_signature
from repforget.edit.train._pass import Term
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import kept, train
from repforget.edit.train.stranger_distillation import teachers_of
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

DEFAULTS: dict[str, Any] = {"retain": "kl", "retain_weight": 0.1}
LEFT_OUT = ("answers", "combine")


@shared_signature(left_out=LEFT_OUT, defaults=DEFAULTS)
def kga(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, checkpoint: Path | None = None, new: str = "strangers", helper_steps: int = 200,
    helper_lr: float | Literal["auto"] = "auto", helper_adapter: Adapter = "auto", helper_rank: int = 16,
    top_k: int = 64, **shared: Any,
) -> Edit:  # fmt: skip
    """Align the gap to a helper that learned the forget facts with the gap the model has on facts it never saw.

    Two helpers are copies of the model, tuned further on the forget answers (F) and on those of ``new`` (N).  Minimised
    is ``|KL(p_F || p)(forget) - G| + retain_weight KL(p0 || p)(retain)``, ``G = KL(p_N || p0)(new)`` a number: how far
    who learned facts is from who did not.  Means over answer tokens, in the direction of the published code, where sums
    per sequence are taken, G anew for every batch, and small models trained from nothing.  Source: Wang et al. 2023,
    arXiv 2305.06535 (KGA), published with a retain_weight of 0.1.  The notes say what G is.

    Args:
        new: what was never seen: "strangers" (as many forget statements about made-up names, answered by some
            retained answer), or a JSON-lines file of prompts and answers (or texts).
        helper_steps: steps of tuning each helper, on batches of ``batch_size``, at ``helper_lr`` (auto: 0.1 / width,
            ten times that with LoRA).
        helper_adapter: "lora" of ``helper_rank``, "none" for all parameters, "auto" by size (LoRA from 1 B on).
        top_k: outcomes per token that a helper keeps apart; it takes the rest as one.

    Raises KnowledgeError where no names can be made up (give ``new``), UsageError for settings out of range or without
    a retain term.  Cost: twice ``helper_steps`` steps of fine-tuning and two forwards over the forget and the new rows;
    then one forward and two backwards per step; memory, while a helper is tuned: its weights (or adapter), and two
    moments of them.  The ``checkpoint`` holds the last training; helpers are tuned again.

    Weakness: only the mean is at G: some answers are driven far beyond it while others stay, and the loss swings about
    G with the sign of its gradient.  A gap like that of unseen facts does not show that nothing is left inside.
    """
    common = Settings(**{**DEFAULTS, **shared})
    if new in ("forget", "retain") or top_k < 1:
        raise UsageError(f"kga was given new '{new}' and top_k {top_k}: new is data the model never saw ('strangers' "
                         "or a file), top_k is positive.")  # fmt: skip
    how = Tuning(helper_steps, helper_lr, common.batch_size, helper_adapter, helper_rank, common.max_facts)
    forget, _ = fact_rows(model, subsample(data.forget, common.max_facts, seed), "forget")
    unseen = load_rows(model, data, new, instead=None, answers="auto", max_facts=len(forget), seed=seed).own

    def told(rows: Sequence[Row]) -> Teachers:
        helper = Edit.build("kga", {}, model, data.digest, tuned_on(model, rows, how, None, seed))
        with helper.attach(model):
            return teachers_of(model, rows, top_k, progress)

    gap, _ = apart(model, unseen, told(unseen))
    teachers = told(forget)
    start, _ = apart(model, forget, teachers)
    align = dataclasses.replace(find("kl", "retain"), name="gap", role="forget")
    term = Term(align, {}, "forget", common.forget_weight, Rows("forget", forget), teachers=teachers)
    common = dataclasses.replace(common, combine={"flood": {"level": common.forget_weight * gap}})
    settings = {"new": new, "helper_steps": helper_steps, "helper_lr": helper_lr, "helper_adapter": helper_adapter,
                "helper_rank": helper_rank, "top_k": top_k}  # fmt: skip
    made = train(model, data, "kga", kept(common), common, where=where, seed=seed, progress=progress,
                 checkpoint=checkpoint, settings=settings, ready=[term], left_out=LEFT_OUT)  # fmt: skip
    with made.attach(model):
        end, _ = apart(model, forget, teachers)
    return noted(made, f"gap on facts never seen {gap:.3g} nats per token, on forget facts {start:.3g} -> {end:.3g}")
