"""FILA: LoRA that starts where the weights matter to forgetting more than to keeping.

Cha et al. 2024 (LoKU), arXiv 2408.06621.  The start is subtracted by a second, frozen adapter and not from the weights,
so that the base keeps its bits and the finished change is exactly ``B A - B0 A0``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.artifact.weights import is_conv1d, owner_of
from repforget.errors import UsageError
from repforget.training import only

TINY = 1e-5
START = "start"  # name of the adapter that subtracts the start


def squared_gradients(
    module: nn.Module, names: Sequence[str], rows: Sequence[tuple[Sequence[int], int]]
) -> dict[str, Tensor]:
    """Mean squared gradient of the answers' NLL for each named parameter, in its shape, float32 on its device.

    A row is (token ids, start): the tokens from ``start`` on carry loss, and rows weigh by how many they are.
    Cost: one forward and backward pass per row; two copies of the parameters.
    """
    table = dict(module.named_parameters(remove_duplicate=False))
    own = [table[name] for name in names]
    total = [torch.zeros_like(p, dtype=torch.float32) for p in own]
    tokens = sum(len(ids) - start for ids, start in rows)
    with only(module, own):
        for ids, start in rows:
            batch = torch.tensor([ids], device=own[0].device)
            logits = module(input_ids=batch, use_cache=False).logits[0, start - 1 : -1]
            loss = functional.cross_entropy(logits.float(), batch[0, start:].to(logits.device))
            for square, g in zip(total, torch.autograd.grad(loss, own, allow_unused=True), strict=True):
                if g is not None:
                    square.add_(g.float().square(), alpha=(len(ids) - start) / tokens)
    return dict(zip(names, total, strict=True))


def row_weights(module: nn.Module, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``sqrt(sum_j F_ij / (R_ij + 1e-5))`` of every output i of the named matrices, from squared gradients F and R."""
    out = {}
    for name, gradients in forget.items():
        ratio = gradients / (retain[name] + TINY)
        out[name] = ratio.sum(0 if is_conv1d(owner_of(module, name)[0]) else -1).sqrt()
    return out


def start_at(tuner: Any, layers: Mapping[str, Any], importance: Mapping[str, Tensor], name: str) -> None:
    """Set the LoRA layers of adapter ``name`` to the leading part of the scaled weights, and subtract it again.

    ``importance``: parameter -> row weights w [out].  With U S V' = diag(w) W and s the scale of the adapter,
    A0 = sqrt(S / s) V' and B0 = diag(1 / (w + 1e-5)) U sqrt(S / s).
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    for weight, layer in layers.items():
        if weight not in importance or not isinstance(layer.get_base_layer(), nn.Linear | _conv1d()):
            raise UsageError(f"FILA needs linear layers and their importance, and '{weight}' has not both: use adapter "
                             "'lora', or other targets.")  # fmt: skip
    tuner.peft_config[START] = tuner.peft_config[name]
    tuner.inject_adapter(tuner.model, START)
    cast_adapter_dtype(tuner.model, START)
    tuner.set_adapter([name, START])
    tuner.set_requires_grad(START, False)
    for weight, layer in layers.items():
        a, b = _start(layer, importance[weight], name)
        with torch.no_grad():
            for adapter, sign in ((name, 1), (START, -1)):
                layer.lora_A[adapter].weight[: len(a)] = a  # all of it, unless the rank exceeds that of the weight
                layer.lora_B[adapter].weight[:, : len(a)] = sign * b


def _conv1d() -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _start(layer: Any, weights: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r]."""
    base = layer.get_base_layer()
    weight = base.weight.detach().float()
    rows = weights.to(weight)[:, None]
    u, s, vh = torch.linalg.svd(rows * (weight.T if is_conv1d(base) else weight), full_matrices=False)
    size = len(layer.lora_A[name].weight)
    root = (s[:size] / layer.scaling[name]).sqrt()
    return root[:, None] * vh[:size], u[:, :size] * root / (rows + TINY)
