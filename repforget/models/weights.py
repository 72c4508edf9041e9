"""Readers and writers of the residual stream as matrices: fused, transposed, tied and batched weights
included.

A *writer* adds to the residual stream (embeddings, attention and MLP output projections), a *reader* takes
from it (query, key, value, MLP input projections, unembedding). A :class:`WeightRef` names one of them by its
parameter and shows it as the matrix it stands for, whatever way the architecture stores it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repforget.errors import SiteError, UsageError
from repforget.models._names import core, text_config
from repforget.models._structure import Anatomy, LayerPaths, Spans
from repforget.models.sites import head_spans, kind_spans, site_map

Role = Literal[
    "embed", "position", "attn_out", "mlp_out", "q", "k", "v", "mlp_gate", "mlp_up", "router", "unembed"
]  # fmt: skip
HEAD_ROLES = ("q", "k", "v", "attn_out")
NEURON_ROLES = ("mlp_gate", "mlp_up", "mlp_out")


@dataclass(frozen=True)
class WeightRef:
    """One reader or writer of the residual stream.

    ``rows`` and ``cols`` are (start, stop) ranges of the Linear-oriented matrix [out, in] that belong to it
    (None = all): a part of a fused projection, one head, one neuron. ``norm`` is the norm in front of a
    reader, ``post_norm`` the one behind a writer (sandwich norms): module paths, None where there is none.
    ``tied``: the same tensor is both embedding and unembedding. ``batched``: a stack of experts [experts,
    out, in].
    """

    name: str
    role: Role
    layer: int = -1
    rows: Spans | None = None
    cols: Spans | None = None
    conv1d: bool = False
    bias: str | None = None
    norm: str | None = None
    post_norm: str | None = None
    tied: bool = False
    batched: bool = False

    @property
    def residual_axis(self) -> int:
        """Axis of :func:`get_weight` that runs along the residual stream: -2 (out) for writers, -1 for
        readers and for embedding tables, whose rows are what is written."""
        return -2 if self.role in ("attn_out", "mlp_out") else -1


def writers(model: Any) -> tuple[WeightRef, ...]:
    """Return every weight that writes to the residual stream, in forward order.

    With a learned position table both tables are writers. On a tied model ``embed`` is the unembedding as
    well: :func:`untie` first, or an edit of one is an edit of the other.
    """
    module = core(model)
    body = site_map(module).anatomy
    return tuple(_writers(module, body))


def readers(model: Any) -> tuple[WeightRef, ...]:
    """Return every weight that reads the residual stream, in forward order, with the norm in front of it."""
    module = core(model)
    body = site_map(module).anatomy
    return tuple(_readers(module, body))


def _writers(module: nn.Module, body: Anatomy) -> Iterator[WeightRef]:
    yield _ref(module, body.embed, "embed", tied=is_tied(module))
    if body.position_embed:
        yield _ref(module, body.position_embed, "position")
    for i, layer in enumerate(body.layers):
        yield _ref(module, layer.attention_out, "attn_out", i, post_norm=layer.attention_post_norm)
        if layer.down:
            yield _ref(module, layer.down, "mlp_out", i, post_norm=layer.mlp_post_norm)
        else:
            yield WeightRef(f"{layer.experts}.down_proj", "mlp_out", i, post_norm=layer.mlp_post_norm, batched=True)


def _readers(module: nn.Module, body: Anatomy) -> Iterator[WeightRef]:
    for i, layer in enumerate(body.layers):
        for k, role in enumerate(("q", "k", "v")):
            path = layer.qkv if isinstance(layer.qkv, str) else layer.qkv[k]
            rows = kind_spans(body, role)
            yield _ref(module, path, role, i, rows=rows, norm=layer.attention_norm)  # type: ignore[arg-type]
        yield from _mlp_readers(module, body, layer, i)
    yield _ref(module, body.unembed, "unembed", norm=body.final_norm, tied=is_tied(module))


def _mlp_readers(module: nn.Module, body: Anatomy, layer: LayerPaths, i: int) -> Iterator[WeightRef]:
    norm = layer.mlp_norm or (layer.attention_norm if body.parallel else None)
    if layer.experts:
        half = body.mlp_width
        if layer.router:
            yield _ref(module, layer.router, "router", i, norm=norm)
        fused = f"{layer.experts}.gate_up_proj"
        yield WeightRef(fused, "mlp_gate", i, rows=((0, half),), norm=norm, batched=True)
        yield WeightRef(fused, "mlp_up", i, rows=((half, 2 * half),), norm=norm, batched=True)
        return
    if layer.gate or layer.gate_up:
        path = layer.gate or layer.gate_up or ""
        yield _ref(module, path, "mlp_gate", i, rows=kind_spans(body, "mlp_gate"), norm=norm)
    path = layer.up or layer.gate_up or ""
    yield _ref(module, path, "mlp_up", i, rows=kind_spans(body, "mlp_up"), norm=norm)


def _ref(module: nn.Module, path: str, role: Role, layer: int = -1, **facts: Any) -> WeightRef:
    from transformers.pytorch_utils import Conv1D

    owner = module.get_submodule(path)
    if hasattr(owner, "base_layer"):
        raise SiteError(f"Module '{path}' carries an adapter, so that its weight alone is not what the model "
                        "computes with; merge the adapter first (merge_and_unload).")  # fmt: skip
    weight = getattr(owner, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise SiteError(f"The weight of '{path}' is offloaded from memory and cannot be read or written; load the "
                        "model without offloading.")  # fmt: skip
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise SiteError(f"The weight of '{path}' is not a plain matrix (quantised or packed); dequantise the "
                        "model or load the full-precision checkpoint.")  # fmt: skip
    bias = f"{path}.bias" if getattr(owner, "bias", None) is not None else None
    return WeightRef(f"{path}.weight", role, layer, conv1d=isinstance(owner, Conv1D), bias=bias, **facts)


def find(model: Any, role: Role, layer: int = -1) -> WeightRef:
    """Return the reader or writer with this role in this layer; SiteError when the model has none."""
    for ref in (*writers(model), *readers(model)):
        if ref.role == role and ref.layer == layer:
            return ref
    raise SiteError(f"This model has no weight with role '{role}' in layer {layer}; see writers() and readers().")


def head_slice(model: Any, ref: WeightRef, head: int) -> WeightRef:
    """Return the part of ``ref`` that belongs to one head: rows of q, k, v (key/value heads for k and v),
    columns of the attention output projection (without its bias, which no head owns)."""
    places = site_map(model)
    if ref.role not in HEAD_ROLES:
        raise SiteError(f"'{ref.name}' has no heads: only {', '.join(HEAD_ROLES)} do.")
    kind = "attn_z" if ref.role == "attn_out" else ref.role
    count = places.heads_of(kind)
    if not 0 <= head < count:
        raise SiteError(f"Head {head} of '{ref.name}' does not exist: there are {count}, numbered 0 to {count - 1}.")
    spans = head_spans(places.anatomy, kind, head)
    return replace(ref, cols=spans, bias=None) if ref.role == "attn_out" else replace(ref, rows=spans)


def neuron_slice(model: Any, ref: WeightRef, neuron: int) -> WeightRef:
    """Return the part of ``ref`` that belongs to one MLP neuron: its row of gate or up, its column of the
    output projection (its *value vector*; without the bias, which no neuron owns)."""
    width = site_map(model).mlp_width
    if ref.role not in NEURON_ROLES or ref.batched:
        raise SiteError(f"'{ref.name}' has no neurons: only {', '.join(NEURON_ROLES)} of unbatched MLPs do.")
    if not 0 <= neuron < width:
        raise SiteError(f"Neuron {neuron} of '{ref.name}' does not exist: there are {width}, from 0 to {width - 1}.")
    if ref.role == "mlp_out":
        return replace(ref, cols=((neuron, neuron + 1),), bias=None)
    start = (ref.rows[0][0] if ref.rows else 0) + neuron
    return replace(ref, rows=((start, start + 1),))


def get_weight(model: Any, ref: WeightRef) -> Tensor:
    """Return a float32 copy (float64 stays) of the matrix [out, in] in Linear orientation ([experts, out, in]
    for batched experts, [rows, d] for embedding tables)."""
    matrix = _oriented(_parameter(model, ref.name), ref)
    part = matrix[..., _index(ref.rows, matrix, -2), :][..., _index(ref.cols, matrix, -1)]
    return part.detach().to(torch.promote_types(part.dtype, torch.float32), copy=True)


def set_weight(model: Any, ref: WeightRef, matrix: Tensor) -> None:
    """Write a matrix of the shape that :func:`get_weight` returns back into the parameter, cast once."""
    parameter = _parameter(model, ref.name)
    target = _oriented(parameter.data, ref)
    rows, cols = _index(ref.rows, target, -2), _index(ref.cols, target, -1)
    expected = (*target.shape[:-2], len(rows), len(cols))
    if tuple(matrix.shape) != expected:
        raise UsageError(f"'{ref.name}' ({ref.role}) needs a matrix of shape {expected}; got {tuple(matrix.shape)}.")
    target[..., rows[:, None], cols] = matrix.detach().to(target.device, target.dtype)


def get_bias(model: Any, ref: WeightRef) -> Tensor | None:
    """Return a float32 copy of the bias that belongs to ``ref`` [out], or None where there is none."""
    if ref.bias is None:
        return None
    bias = _parameter(model, ref.bias)
    part = bias[_index(ref.rows, bias, -1)]
    return part.detach().to(torch.promote_types(part.dtype, torch.float32), copy=True)


def set_bias(model: Any, ref: WeightRef, vector: Tensor) -> None:
    """Write a bias vector back; a weight without a bias is refused, since a new one would be lost on saving."""
    if ref.bias is None:
        raise SiteError(f"'{ref.name}' has no bias of its own, and one added here would be dropped on reload.")
    bias = _parameter(model, ref.bias)
    index = _index(ref.rows, bias, -1)
    if tuple(vector.shape) != (len(index),):
        raise UsageError(f"'{ref.bias}' needs a vector of {len(index)} entries; got {tuple(vector.shape)}.")
    bias.data[index] = vector.detach().to(bias.device, bias.dtype)


def is_tied(model: Any) -> bool:
    """True when embedding and unembedding are one tensor."""
    module = core(model)
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    table: Any = module.get_input_embeddings()  # type: ignore[operator]
    return head is not None and head.weight is table.weight


def untie(model: Any) -> bool:
    """Give the unembedding its own copy of a tied embedding, so that one can be edited without the other.

    Returns False when they were not tied. The model computes the same; ``tie_word_embeddings`` is set to
    False so that saving and reloading keep both. Memory: one more [V, d] tensor.
    """
    module = core(model)
    if not is_tied(module):
        return False
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    config: Any = module.config
    for part in (config, text_config(module)):
        part.tie_word_embeddings = False
    return True


def _parameter(model: Any, name: str) -> Tensor:
    module = core(model)
    try:
        return module.get_parameter(name)
    except AttributeError:
        raise SiteError(f"{type(module).__name__} has no parameter '{name}'; take names from writers() and "
                        "readers() of this model.") from None  # fmt: skip


def _oriented(parameter: Tensor, ref: WeightRef) -> Tensor:
    return parameter.T if ref.conv1d else parameter


def _index(spans: Spans | None, tensor: Tensor, axis: int) -> Tensor:
    spans = ((0, tensor.shape[axis]),) if spans is None else spans
    return torch.cat([torch.arange(start, stop, device=tensor.device) for start, stop in spans])
