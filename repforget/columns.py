"""Changes to single value vectors (columns of MLP output projections), which locators try and editors keep."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repforget.artifact import LowRankDelta
from repforget.knowledge import Fact
from repforget.models.load import LoadedModel
from repforget.models.value_vectors import projections
from repforget.models.weights import get_weight, neuron_slice
from repforget.records import Component
from repforget.scoring.encode import encode_many


def value_vector(model: LoadedModel, neuron: Component) -> Tensor:
    """The value vector [d] of a neuron, float32 on the CPU; SiteError where there is none."""
    ref = projections(model.module)[neuron.site.layer]
    return get_weight(model.module, neuron_slice(model.module, ref, neuron.neuron or 0))[:, 0].cpu()


def column_deltas(model: LoadedModel, deltas: Mapping[Component, Tensor]) -> list[LowRankDelta]:
    """One operation per layer that adds ``deltas`` [d] to the value vectors of neurons, and to nothing else."""
    refs = projections(model.module)
    found = []
    for layer in sorted({neuron.site.layer for neuron in deltas}):
        own = [neuron for neuron in deltas if neuron.site.layer == layer]
        width = get_weight(model.module, refs[layer]).shape[1]
        rows = torch.zeros(len(own), width)
        rows[range(len(own)), [neuron.neuron or 0 for neuron in own]] = 1.0
        found.append(LowRankDelta(refs[layer].name, torch.stack([deltas[n] for n in own], dim=1), rows))
    return found


def noise_on(model: LoadedModel, neurons: Sequence[Component], size: float, seed: int) -> list[LowRankDelta]:
    """Gaussian noise on value vectors, ``size`` times each one's root mean square; a vector's own depends on ``seed``
    alone."""

    def draw(neuron: Component) -> Tensor:
        vector = value_vector(model, neuron)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{neuron}-{seed}".encode()))
        return size * vector.square().mean().sqrt() * torch.randn(len(vector), generator=generator)

    return column_deltas(model, {neuron: draw(neuron) for neuron in neurons})


def concepts_of(tokenizer: Any, facts: Sequence[Fact]) -> list[list[int]]:
    """The answer tokens of each relation, every answer counted as a whole."""
    found: dict[str, set[int]] = {}
    for fact, code in zip(facts, encode_many(tokenizer, [(f.prompt, f.answer) for f in facts]), strict=True):
        found.setdefault(fact.relation, set()).update(code.answer)
    return [sorted(tokens) for tokens in found.values()]
