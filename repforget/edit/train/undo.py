"""Unlearn, mix the weights with noise, and distil the unlearned model into what is left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.artifact import DenseDelta, Edit
from repforget.edit.train._choose import trained_names
from repforget.edit.train._data import Row, Rows
from repforget.edit.train._distil import Teachers, apart
from repforget.edit.train._objective import find, shared_signature
from repforget.edit.train._pass import Term, swapped
from repforget.edit.train._settings import Named, Settings, named
from repforget.edit.train._trainer import train, train_objective
from repforget.edit.train.stranger_distillation import kept_rows, own_texts, teachers_of
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

DEFAULTS: dict[str, Any] = {"adapter": "none"}
LEFT_OUT = ("mask", "quantisation_floor")
RATE_TIMES_WIDTH = 0.256  # the learning rate of distillation, times the width of the model
WARMUP = 15  # steps of distillation
CHECKED = 512  # rows on which the student is compared with the teacher
NEAR = 1e-6  # nats per token that count as none


@shared_signature(left_out=LEFT_OUT, defaults=DEFAULTS)
def undo(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, checkpoint: Path | None = None, objective: Named = "max_entropy",
    noise: float = 0.25, scale: float = 0.1, distil_steps: int = 600, distil_batch: int = 64,
    distil_lr: float | Literal["auto"] = "auto", tolerance: float = 0.05, texts: int = 4000, text_tokens: int = 20,
    top_k: int = 64, **shared: Any,
) -> Edit:  # fmt: skip
    """Unlearn by any objective, damage the weights with noise, and repair them by what the unlearned model says.

    ``theta' = (1 - noise) theta_u + noise scale xi``: theta_u the unlearned weights, xi uniform within
    ``± sqrt(6 / (fan in + fan out))`` (Xavier) for matrices and 0 for vectors.  From there KL(p_u || p) per token is
    minimised over all tokens of retained facts, of general texts and of ``texts`` that the unlearned model writes
    itself, by AdamW with a cosine, until the student's loss (its cross-entropy to the teacher) exceeds the teacher's
    own (its entropy) by at most the share ``tolerance``, or ``distil_steps`` are spent.  Source: Lee et al. 2025, arXiv
    2506.06278 (UNDO); its code has noise .1 to .7, .25 on WMDP (there with scale 0, rate 2e-5, 3000 steps), scale .1
    and rate 9e-4 on language.  This project's are the texts that the model writes.  Noise and distillation reach the
    parameters that ``where`` or ``targets`` name, else all.

    Args:
        objective: what unlearns, as ``name`` or ``{name: {settings}}``; the settings of training below are its own,
            and those left at their defaults the objective's.
        distil_batch: rows per step; ``distil_lr`` "auto" is 0.256 / width.
        texts: of at most ``text_tokens`` tokens; 0 leaves them out, as published.
        top_k: outcomes per token that the teacher keeps apart; it takes the rest as one.

    Raises UsageError for settings out of range, for an objective that does not forget, and for an adapter: noise of
    full rank cannot be repaired by one.  Cost: the objective's, generation of ``texts``, one forward over all rows, and
    one forward and backward per step on ``distil_batch`` rows; memory: three copies of what is trained and 12 x
    ``top_k`` bytes per token of all rows.  A ``checkpoint`` holds the distillation; the unlearning is done again.

    Weakness: what no text shows is damaged and not repaired, be it to be forgotten or not, so that the published
    repair takes a good part of pretraining; and what the unlearned model still says is taught again.  That the student
    is near its teacher does not show that the noise went far enough to remove anything.
    """
    common = Settings(**{**DEFAULTS, **shared})
    _check(common, noise, scale, distil_steps, distil_batch, tolerance, texts, text_tokens, top_k)
    unlearned = _unlearned(model, data, objective, common, where, seed, progress)
    rate = RATE_TIMES_WIDTH / model.width if distil_lr == "auto" else distil_lr
    table = dict(model.module.named_parameters())
    with unlearned.attach(model):
        said = own_texts(model, data, texts, text_tokens, seed) if texts else []
        rows = kept_rows(model, data, said, common.max_facts, seed)
        teachers = teachers_of(model, rows, top_k, progress)
        after = _values(table)
    term = Term(find("kl", "retain"), {}, "retain", 1.0, Rows("texts", rows), teachers=teachers)
    damaged = {**after, **noised({name: after[name] for name in trained_names(model, common, (term,), where)},
                                 noise, scale, seed)}  # fmt: skip
    how = dataclasses.replace(
        common, steps=distil_steps, retain_batch=min(distil_batch, len(rows)), lr=rate, schedule="cosine",
        warmup=WARMUP, robust="none", combine="linear", stop_probability=0.0,
    )  # fmt: skip
    settings = {"objective": objective, "noise": noise, "scale": scale, "distil_steps": distil_steps,
                "distil_batch": distil_batch, "distil_lr": rate, "tolerance": tolerance, "texts": texts,
                "text_tokens": text_tokens, "top_k": top_k}  # fmt: skip
    repaired, notes = _repaired(model, data, unlearned, damaged, term, how, _near(model, rows, teachers, tolerance),
                                settings, where, seed, progress, checkpoint)  # fmt: skip
    operations = [DenseDelta(name, delta) for name, p in table.items() if (delta := _moved(p, repaired[name])).any()]
    used = {**dataclasses.asdict(common), **unlearned.manifest.settings}
    stated = {name: used[name] for name in dataclasses.asdict(common) if name not in LEFT_OUT}
    return Edit.build("undo", {**stated, **settings}, model, data.digest, operations, notes=notes)


def _check(
    common: Settings, noise: float, scale: float, steps: int, batch: int, tolerance: float, *counts: int
) -> None:
    if not 0 <= noise <= 1 or min(scale, steps, tolerance, counts[0]) < 0 or min(batch, *counts[1:]) < 1:
        raise UsageError(
            f"undo was given noise {noise}, scale {scale}, distil_steps {steps}, distil_batch {batch}, tolerance "
            f"{tolerance} and {counts[0]} texts of {counts[1]} tokens, top_k {counts[2]}: noise is a share from 0 to "
            "1, batch, tokens and top_k are positive, the rest at least 0."
        )
    if common.adapter != "none":
        raise UsageError(f"undo adds noise to whole matrices, which adapter '{common.adapter}' cannot repair: set "
                         "adapter: none, and targets where memory is short.")  # fmt: skip


def _unlearned(
    model: LoadedModel, data: EditData, wanted: Named, common: Settings, where: Localization | None, seed: int,
    progress: Progress | None,
) -> Edit:  # fmt: skip
    """The edit of the objective, with its own defaults where nothing else was asked for."""
    name, own = named(wanted)
    found = find(name)
    if found.role != "forget":
        raise UsageError(f"undo cannot unlearn by '{name}', which keeps: give an objective that forgets, such as npo.")
    usual, given = (dataclasses.asdict(s) for s in (Settings(**DEFAULTS), common))
    asked = {key: value for key, value in given.items() if key in DEFAULTS or value != usual[key]}
    return train_objective(model, data, found, {**own, **asked}, where=where, seed=seed, progress=progress)


def noised(values: Mapping[str, Tensor], noise: float, scale: float, seed: int) -> dict[str, Tensor]:
    """``(1 - noise) value + noise scale xi`` per parameter, xi by Xavier for matrices (of stacks, each) and else 0."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in values.items():
        shrunk = (1 - noise) * value.float()
        if value.ndim > 1:
            bound = math.sqrt(6 / (value.shape[-1] + value.shape[-2]))
            drawn = (2 * torch.rand(value.shape, generator=generator) - 1) * bound
            shrunk += noise * scale * drawn.to(value.device)
        made[name] = shrunk.to(value.dtype)
    return made


def _repaired(
    model: LoadedModel, data: EditData, unlearned: Edit, damaged: Mapping[str, Tensor], term: Term, how: Settings,
    near: Callable[[], str], settings: Mapping[str, Any], where: Localization | None, seed: int,
    progress: Progress | None, checkpoint: Path | None,
) -> tuple[Mapping[str, Tensor], list[str]]:  # fmt: skip
    """The values of all parameters after distillation into ``damaged`` ones (as given where none is due), and notes."""
    notes = [f"unlearned: {note}" for note in unlearned.manifest.notes]
    table = dict(model.module.named_parameters())
    with swapped(list(table.values()), [damaged[name] for name in table]):
        if not how.steps or near():
            return damaged, notes
        made = train(model, data, "undo", [], how, where=where, seed=seed, progress=progress, checkpoint=checkpoint,
                     settings={**settings, "unlearned": unlearned.manifest.settings}, ready=[term],
                     enough=near)  # fmt: skip
        with made.attach(model):
            return _values(table), [*notes, *(f"distilled: {note}" for note in made.manifest.notes)]


def _values(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in table.items()}


def _moved(before: Tensor, after: Tensor) -> Tensor:
    return (after.float() - before.detach().float()).cpu()


def _near(model: LoadedModel, rows: Sequence[Row], teachers: Teachers, tolerance: float) -> Callable[[], str]:
    """Says how near the student is to its teacher on (some of) the rows, and nothing while that is not enough."""
    every = -(-len(rows) // CHECKED)

    def near() -> str:
        divergence, own = apart(model, rows[::every], teachers[::every])
        share = divergence / own if own else math.inf
        if divergence > max(tolerance * own, NEAR):
            return ""
        return f"the student's loss is within {share:.3g} of the teacher's {own:.3g} nats per token"

    return near
