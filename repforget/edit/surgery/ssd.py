"""Selective synaptic dampening: shrink the weights that matter more to forget facts than to what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget import masks as room
from repforget.artifact import Edit, SparseDelta
from repforget.attribution import runs_of, visit_gradients
from repforget.causal import Run
from repforget.edit._collect import subsample
from repforget.errors import NumericalError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.weights import readers, writers
from repforget.progress import Progress
from repforget.records import Localization
from repforget.scoring.encode import context_limit, encode_prompts

ROLES: Mapping[str, tuple[str, ...]] = {
    "mlp": ("mlp_gate", "mlp_up", "mlp_out", "router"), "attention": ("q", "k", "v", "attn_out"),
}  # fmt: skip


def ssd(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, parameters: Literal["all", "mlp", "attention"] = "all", alpha: float = 10.0,
    dampening: float = 1.0, max_facts: int = 256,
) -> Edit:  # fmt: skip
    """Shrink every weight whose Fisher information is larger on forget facts than ``alpha`` times that on kept data.

    ``F`` is the mean over facts of the squared gradient of one fact's log p(answer), and of one general text's log p,
    both per token (released code squares the gradients of batches, which shrinks F by about the batch size and mixes
    signs).  Where F_f > alpha F_r, ``w <- min(dampening F_r / F_f, 1) w``: weights never grow, and others keep their
    bits, so that ``alpha`` below ``dampening`` takes no more of them.
    Source: Foster et al. 2023, arXiv 2308.07707.

    Args:
        parameters: all (with embeddings and norms), or the matrices of MLPs or of attention alone, since the right
            ``alpha`` differs between them.
        alpha: how many times larger F_f has to be; smaller takes more weights. dampening: of those; 0 sets to zero.
        max_facts: forget facts, and retain facts and general texts, read; chosen by seed.
        where: only the weights of its best units, as many as its band was made with (features have none).

    Raises NoEffectError where no weight is taken, NumericalError for gradients that are not finite.  Cost: a forward
    and backward per fact and text; two float32 copies of the weights.

    Weakness: made for image classifiers. Weights that kept data leave alone, such as embeddings of names that only
    forget facts have, go to zero whatever ``alpha`` is. Sensitive weights are not storing weights, so that collateral
    damage comes early, and weights that were shrunk do not show that the answer is gone.
    """
    if alpha <= 0 or dampening < 0:
        raise UsageError(f"ssd was given alpha {alpha} and dampening {dampening}: give one above 0 and one of 0 or "
                         "more.")  # fmt: skip
    names = _names(model, parameters)
    masks: Mapping[str, Tensor] = {}
    notes: list[str] = []
    if where is not None and where.components and not any(c.feature is not None for c in where.components):
        found = room.masks(model, where)
        masks, notes = found.masks, list(found.notes)
        names = [name for name in names if name in masks]
    if not names:
        raise UsageError(f"The units of the localisation have no weights among '{parameters}': choose 'all'.")
    forget = _information(model, runs_of(model.tokenizer, subsample(data.forget, max_facts, seed)), names, progress)
    kept = runs_of(model.tokenizer, subsample(data.retain, max_facts, seed)) if data.retain else ()
    kept = (*kept, *_texts(model, subsample(data.general, max_facts, seed)))
    if not kept:
        raise UsageError("ssd compares with what is kept, and there are no retain facts or general texts: give some.")
    retain = _information(model, kept, names, progress)
    operations, taken, total = [], 0, 0
    for name in names:
        weight = model.module.get_parameter(name).detach()
        factor = dampened(forget.pop(name), retain.pop(name), alpha, dampening)
        if name in masks:
            factor = torch.where(masks[name].to(factor.device), factor, 1.0)
        index = (factor != 1).flatten().nonzero()[:, 0]
        taken, total = taken + len(index), total + factor.numel()
        if len(index):
            values = (factor.flatten()[index].double() - 1) * weight.flatten()[index].double()
            operations.append(SparseDelta(name, index, values))
    notes.append(f"{taken} of {total} weights ({100 * taken / total:.2f} %) shrunk")
    return Edit.build("ssd", {}, model, data.digest, operations, notes=notes)


def dampened(forget: Tensor, retain: Tensor, alpha: float, dampening: float) -> Tensor:
    """The factor of every weight: ``min(dampening F_r / F_f, 1)`` where F_f > alpha F_r, else 1."""
    chosen = forget > alpha * retain
    factor = dampening * retain.double() / forget.double().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(chosen, factor.clamp(max=1.0), 1.0)


def _names(model: LoadedModel, parameters: str) -> list[str]:
    """Names of the parameters that may change, each tensor once."""
    every = [name for name, p in model.module.named_parameters() if p.is_floating_point()]
    if parameters == "all":
        return every
    own = {ref.name for ref in (*writers(model.module), *readers(model.module)) if ref.role in ROLES[parameters]}
    return [name for name in every if name in own]


def _texts(model: LoadedModel, texts: Sequence[str]) -> tuple[Run, ...]:
    """General texts as runs whose every token but the first is predicted."""
    limit = context_limit(model)
    rows = [ids[:limit] for ids in encode_prompts(model.tokenizer, texts)]
    return tuple(Run(f"text-{k}", "", ids, ids, 1, ()) for k, ids in enumerate(rows) if len(ids) > 1)


def _information(
    model: LoadedModel, runs: Sequence[Run], names: Sequence[str], progress: Progress | None
) -> dict[str, Tensor]:
    """Mean squared gradient of the log p per token of single runs for each parameter, float32."""
    lengths = iter(len(run.base) - run.start for run in runs)
    total = {name: torch.zeros_like(model.module.get_parameter(name), dtype=torch.float32) for name in names}

    def add(gradients: Mapping[str, Tensor]) -> None:
        share = 1 / (len(runs) * next(lengths) ** 2)
        for name, value in gradients.items():
            total[name].addcmul_(value.float(), value.float(), value=share)

    visit_gradients(model, runs, names, add, progress)
    if not all(bool(value.isfinite().all()) for value in total.values()):
        raise NumericalError("Gradients are not finite: load the model in float32 and try again.")
    return total
