"""Any residual state -> vocabulary: the final norm, the unembedding and the model's own logit cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repforget.errors import SiteError, UsageError
from repforget.models._names import core, text_config
from repforget.models.norms import freeze
from repforget.models.sites import site_map
from repforget.models.weights import WeightRef, find, get_bias, get_weight


def lens(model: Any, resid: Tensor) -> Tensor:
    """Return the logits [..., V] that ``model`` would give if ``resid`` [..., d] were its last residual
    state.

    Final norm, unembedding (with bias) and the logit cap or scale of the model, so that the readout of the
    last resid_post *is* the model's logits. ``model`` may be another one than the one ``resid`` comes from.
    Source: nostalgebraist (2020), "interpreting GPT: the logit lens". A token that is not read out at a layer
    may still be computed there in another basis: absence from the lens is no evidence of absence.
    """
    module = core(model)
    norm, head = _readout(module)
    weight: Tensor = head.weight  # type: ignore[assignment]
    return cap(module, head(norm(resid.to(_device(norm, weight), weight.dtype)).to(weight.device)))


def cap(model: Any, logits: Tensor) -> Tensor:
    """Apply what the model does to its logits after the unembedding: a scale, a soft cap, or nothing."""
    scale, limit = logit_cap(model)
    logits = logits * scale
    return logits if limit is None else torch.tanh(logits / limit) * limit


def logit_cap(model: Any) -> tuple[float, float | None]:
    """Return (scale, soft cap or None) of what :func:`cap` does."""
    module = core(model)
    return _logit_scale(module), getattr(text_config(module), "final_logit_softcapping", None)


@dataclass(frozen=True)
class DirectLogits:
    """What each component adds to the logits: ``parts`` [c, ..., V] and the ``constant`` [V] of the biases
    (float64).

    ``total`` is the model's logits before any soft cap when the components add up to the last residual state.
    """

    parts: Tensor
    constant: Tensor

    @property
    def total(self) -> Tensor:
        return self.parts.sum(0) + self.constant


@torch.no_grad()
def direct_logits(
    model: Any, component_outputs: Tensor, resid_final: Tensor, tokens: Sequence[int] | None = None
) -> DirectLogits:
    """Split the logits of the state ``resid_final`` [..., d] into what each additive component wrote.

    ``component_outputs`` [c, ..., d] are writes to the residual stream (embed, attn_out, mlp_out, or single
    heads and neurons from :func:`head_writes` and :func:`neuron_writes`). The scale of the final norm is held
    at its value for ``resid_final``, which makes the readout linear (Elhage et al. 2021, "A Mathematical
    Framework for Transformer Circuits"). ``tokens`` restricts the vocabulary. It shows the *direct* path
    only: what later layers make of a write, and how a component moves the norm's scale, is not in it.
    """
    module = core(model)
    if component_outputs.shape[1:] != resid_final.shape:
        raise UsageError(f"Components need shape [c, {', '.join(map(str, resid_final.shape))}]; got "
                         f"{tuple(component_outputs.shape)}.")  # fmt: skip
    norm, head = _readout(module)
    matrix: Tensor = head.weight  # type: ignore[assignment]
    bias: Tensor | None = head.bias  # type: ignore[assignment]
    if tokens is not None:
        index = torch.as_tensor(tokens, dtype=torch.long, device=matrix.device)
        matrix, bias = matrix[index], None if bias is None else bias[index]
    device = _device(norm, matrix)
    fixed = freeze(norm, resid_final.to(device))
    columns = matrix.detach().to(device).double().T * _logit_scale(module)
    constant = fixed.bias @ columns
    if bias is not None:
        constant = constant + bias.detach().to(device).double() * _logit_scale(module)
    return DirectLogits(fixed.linear(component_outputs.to(device)) @ columns, constant)


@torch.no_grad()
def logit_direction(model: Any, resid_final: Tensor, truth: Tensor, rival: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a write to the stream is multiplied by to give its part of ``truth`` minus ``rival``, and the rest.

    With the final norm's scale held at the states ``resid_final`` [b, d], the difference of the two logits [b] (before
    any soft cap) is ``(resid_final * direction).sum(-1) + constant``; direction [b, d] and constant [b], float64. The
    direction holds the norm's gain and centring, the constant the biases of norm and unembedding.
    """
    module = core(model)
    norm, head = _readout(module)
    weight: Tensor = head.weight  # type: ignore[assignment]
    bias: Tensor | None = head.bias  # type: ignore[assignment]
    device = _device(norm, weight)
    fixed = freeze(norm, resid_final.to(device))
    one, other = (index.to(weight.device) for index in (truth, rival))
    apart = (weight[one].detach().double() - weight[other].double()).to(device) * _logit_scale(module)
    constant = apart @ fixed.bias.to(device)
    if bias is not None:
        constant = constant + (bias[one].double() - bias[other].double()).to(device) * _logit_scale(module)
    direction = apart * fixed.gain * fixed.scale
    return direction - direction.mean(-1, keepdim=True) if fixed.centred else direction, constant


@torch.no_grad()
def head_writes(model: Any, layer: int, z: Tensor) -> Tensor:
    """Return what each head writes to the residual stream [..., heads, d] (float64), from attn_z [..., heads
    * dh].

    A norm behind the attention (Gemma-2/3, OLMo-2) is held at its scale for the whole write. The heads plus
    the (normed) bias of the output projection, where there is one, add up to attn_out.
    """
    module = core(model)
    places = site_map(module)
    ref = find(module, "attn_out", layer)
    matrix = get_weight(module, ref).double()
    parts = z.to(matrix.device).double().reshape(*z.shape[:-1], places.n_heads, places.head_dim)
    blocks = matrix.reshape(len(matrix), places.n_heads, places.head_dim)  # [d, heads, dh]
    whole = z.to(matrix.device).double() @ matrix.T
    return _behind(module, ref, torch.einsum("...hk,dhk->...hd", parts, blocks), whole)


@torch.no_grad()
def neuron_writes(model: Any, layer: int, post: Tensor, neurons: Sequence[int]) -> Tensor:
    """Return what the chosen MLP neurons write to the residual stream [..., n, d] (float64), from mlp_post
    [..., m].

    A norm behind the MLP is held at its scale for the whole write.
    """
    module = core(model)
    ref = find(module, "mlp_out", layer)
    if ref.batched:
        raise SiteError("Neurons of batched experts have no site of their own; choose whole MLP writes (mlp_out).")
    matrix = get_weight(module, ref).double()
    index = torch.as_tensor(neurons, dtype=torch.long, device=matrix.device)
    post = post.to(matrix.device).double()
    return _behind(module, ref, post[..., index].unsqueeze(-1) * matrix.T[index], post @ matrix.T)


def _behind(module: nn.Module, ref: WeightRef, parts: Tensor, whole: Tensor) -> Tensor:
    """Carry additive parts [..., n, d] of a write through the norm behind it, if there is one."""
    if ref.post_norm is None:
        return parts
    norm = module.get_submodule(ref.post_norm)
    bias = get_bias(module, ref)
    whole = whole if bias is None else whole + bias.double()
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return freeze(norm, whole.to(weight.dtype).unsqueeze(-2)).linear(parts)


def _readout(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    places = site_map(module).anatomy
    return module.get_submodule(places.final_norm), module.get_submodule(places.unembed)


def _device(norm: nn.Module, weight: Tensor) -> torch.device:
    return next((p.device for p in norm.parameters()), weight.device)


def _logit_scale(module: nn.Module) -> float:
    config = text_config(module)
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
