"""Neurons and heads that editors of single units take from a localisation, and their removal from the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repforget.artifact import SparseDelta
from repforget.masks import MlpPart, masks_of
from repforget.models.load import LoadedModel
from repforget.models.weights import find
from repforget.records import Component, Localization


def located(where: Localization | None, kind: str) -> tuple[Component, ...]:
    """Units of ``where`` of one kind ("neurons", "heads"), best first; () where it ranks none or is absent."""
    ranked = where.components if where is not None else ()
    if kind == "neurons":
        return tuple(c for c in ranked if c.neuron is not None)
    return tuple(c for c in ranked if c.site.kind == "attn_z" and c.site.head is not None)


def best_neurons(where: Localization | None) -> tuple[Component, ...]:
    """The neurons of ``where`` that its band was measured with: as many of the best."""
    return located(where, "neurons")[: where.band.k] if where is not None else ()


def removal(model: LoadedModel, neurons: Sequence[Component], part: MlpPart) -> list[SparseDelta]:
    """Operations that set weights (and biases) of neurons to zero: ``down`` their value vectors, ``all`` their rows of
    the gate and up projections as well."""
    if not neurons:
        return []
    found = masks_of(model, neurons, mlp_part=part).masks
    return [zeroed(model, name, mask) for name, mask in found.items()]


def channel_removal(model: LoadedModel, layer: int, columns: Sequence[int]) -> SparseDelta:
    """The operation that sets columns of a layer's attention output projection to zero."""
    ref = find(model.module, "attn_out", layer)
    weight = model.module.get_parameter(ref.name)
    chosen = torch.zeros(weight.shape[0 if ref.conv1d else 1], dtype=torch.bool)
    chosen[list(columns)] = True
    return zeroed(model, ref.name, chosen[:, None] if ref.conv1d else chosen)


def zeroed(model: LoadedModel, name: str, mask: Tensor) -> SparseDelta:
    """The operation that sets a parameter to zero where ``mask`` (which broadcasts to it) is True."""
    weight = model.module.get_parameter(name).detach()
    index = mask.to(weight.device).expand_as(weight).flatten().nonzero()[:, 0]
    return SparseDelta(name, index, -weight.flatten()[index].float())
