"""What fine-tuning on the forget facts changes, and how much of it can be taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import DenseDelta, LowRankDelta, Operation
from repforget.artifact.operations import apply_to_weight
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.edit._collect import subsample
from repforget.edit.train._adapters import adaptable, adapted, model_size_default
from repforget.edit.train._budget import Line, examples, longest, probability
from repforget.edit.train._data import Row, fact_rows
from repforget.edit.train._pass import swapped
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Localization
from repforget.training import finetune

TRIALS = 12
Adapter = Literal["auto", "none", "lora"]


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned further on the forget facts."""

    steps: int
    lr: float | Literal["auto"]
    batch_size: int
    adapter: Adapter
    rank: int
    max_facts: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "max_facts"):
            if getattr(self, name) < 1:
                raise UsageError(f"Fine-tuning needs a positive {name}: {getattr(self, name)} was given.")


def tuned(
    model: LoadedModel, data: EditData, how: Tuning, where: Localization | None, seed: int, scale: float = 1.0
) -> list[Operation]:
    """What changes when the model is tuned on the forget facts, at ``scale`` times the rate; it is left as it was."""
    if not data.forget:
        raise KnowledgeError("There are no facts to forget, so that there is nothing to tune the model on.")
    rows = fact_rows(model, subsample(data.forget, how.max_facts, seed), "forget")[0]
    return tuned_on(model, rows, how, where, seed, scale)


def tuned_on(
    model: LoadedModel, rows: Sequence[Row], how: Tuning, where: Localization | None, seed: int, scale: float = 1.0,
    layers: Sequence[int] = (),
) -> list[Operation]:  # fmt: skip
    """What changes when the model (or ``layers`` of it alone) is tuned on the labels of rows; it is left as it was."""
    texts = examples(rows)
    adapter = model_size_default(model.module) if how.adapter == "auto" else how.adapter
    rate = scale * ((10.0 if adapter == "lora" else 1.0) * 0.1 / model.width if how.lr == "auto" else how.lr)
    names = parameters_of(model, layers or (where.layers() if where is not None else ()))
    module = model.module
    if adapter == "lora":
        targets = [name for name in adaptable(module, names) if module.get_parameter(name).ndim == 2]
        with adapted(module, "lora", targets, rank=how.rank, seed=seed) as lora:
            finetune(module, texts, steps=how.steps, lr=rate, seed=seed, batch_size=how.batch_size,
                     trainable=lambda name: name in lora.parameters)  # fmt: skip
            return list(lora.operations())
    own = [module.get_parameter(name) for name in names]
    before = [p.data for p in own]
    after = [p.clone() for p in before]
    with swapped(own, after):
        finetune(module, texts, steps=how.steps, lr=rate, seed=seed, batch_size=how.batch_size,
                 trainable=lambda name: name in names)  # fmt: skip
    return [DenseDelta(name, now.float() - then.float()) for name, now, then in zip(names, after, before, strict=True)]


def parameters_of(model: LoadedModel, layers: Sequence[int]) -> list[str]:
    """All parameters, or those of the given layers."""
    names = [name for name, _ in model.module.named_parameters()]
    paths = site_map(model.module).anatomy.layers
    prefixes = tuple(f"{paths[layer].path}." for layer in layers)
    return [name for name in names if not layers or name.startswith(prefixes)]


def dense(model: LoadedModel, operation: Operation) -> tuple[str, Tensor]:
    """The change of one operation in the layout of its parameter, float32."""
    if not isinstance(operation, DenseDelta | LowRankDelta):
        raise UsageError(f"An operation of kind '{operation.kind}' is no fine-tuned weight.")
    owner, _ = owner_of(model.module, operation.weight)
    zero = torch.zeros_like(model.module.get_parameter(operation.weight), dtype=torch.float32)
    return operation.weight, apply_to_weight(operation, zero, transposed=is_conv1d(owner))


def negated(operation: Operation, strength: float) -> Operation:
    """``-strength`` times a change; of low-rank factors the sign goes to one alone, so that their product is exact."""
    if isinstance(operation, LowRankDelta):
        return LowRankDelta(operation.weight, -strength * operation.u, operation.v)
    if isinstance(operation, DenseDelta):
        return DenseDelta(operation.weight, -strength * operation.delta)
    raise UsageError(f"An operation of kind '{operation.kind}' is no fine-tuned weight.")


def subtracted(
    model: LoadedModel, data: EditData, changes: Sequence[Operation], strength: float | Literal["auto"], keep: float,
    seed: int, progress: Progress | None,
) -> tuple[float, list[Operation], str]:  # fmt: skip
    """The strength ("auto": the largest that leaves retained answers ``keep`` of their probability), the operations
    that take so much of the changes away, and a note of what that does."""
    if not data.retain and strength == "auto":
        raise KnowledgeError("There are no facts to keep, by which a strength could be chosen: give a number.")
    if not 0 < keep <= 1:
        raise UsageError(f"Retained answers cannot keep {keep:g} of their probability: give a share between 0 and 1.")
    changed = [dense(model, operation) for operation in changes]
    line = Line(model, [name for name, _ in changed], [-delta.to(model.device) for _, delta in changed])
    known = {"forget": probability(model, data.forget, "forget", seed)}
    if data.retain:
        known["retain"] = probability(model, data.retain, "retain", seed)
    before = {name: measure() for name, measure in known.items()}
    if strength == "auto":
        lost = longest(lambda t: 1 - line.at(t, known["retain"]) / before["retain"], 1 - keep, 1.0, TRIALS,
                       progress=progress)  # fmt: skip
        strength = lost[0]
    after = {name: line.at(strength, measure) for name, measure in known.items()}
    said = ", ".join(f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in known)
    note = f"strength {strength:.3g}: mean probability of answers, {said}"
    return strength, [negated(operation, strength) for operation in changes], note
