"""One forward pass of a causal language model: the wanted logits only, with or without a shared cache."""

from __future__ import annotations

import copy
import inspect
from functools import cache as memoise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repforget.errors import NumericalError
from repforget.models._names import core

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

LOGIT_ELEMENTS = 2**27  # fp32 logits held at once: 512 MiB


@memoise
def _accepted(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def places_tokens(model: LoadedModel) -> bool:
    """True where the model takes ``position_ids``, so that left padding and shared prefixes are exact."""
    return "position_ids" in _accepted(type(core(model)).forward)


def forward(
    model: LoadedModel, ids: Tensor, mask: Tensor, positions: Tensor, keep: Tensor | int, *,
    past: Any = None, use_cache: bool = False,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Run the model and return (logits [b, k, V] at the kept positions, cache or None).

    ``keep`` is either the positions of the padded batch (LongTensor [k]) or the number of last positions. The
    model's own output head runs on those positions only, so scaling, softcapping and hooks on it all apply.
    """
    accepted = _accepted(type(core(model)).forward)
    device = model.device
    inputs: dict[str, Any] = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "use_cache": use_cache,
    }
    if "position_ids" in accepted:
        inputs["position_ids"] = positions.to(device)
    if past is not None:
        inputs["past_key_values"] = past
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep if isinstance(keep, int) else keep.to(device)
    with torch.no_grad():
        output = model.module(**inputs)
        logits = output.logits
        if "logits_to_keep" not in accepted:
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep.to(logits.device)]
    return logits, getattr(output, "past_key_values", None)


def target_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target [t] under logits [t, V] (at least fp32), and whether it is the arg max.

    Rows are independent and taken in slices, so that fp32 copies of large vocabularies stay small.
    """
    targets = targets.to(logits.device)
    step = max(1, LOGIT_ELEMENTS // max(1, logits.shape[-1]))
    values, greedy = [], []
    for rows, wanted in zip(torch.split(logits, step), torch.split(targets, step), strict=True):
        exact = rows if rows.dtype == torch.float64 else rows.float()
        chosen = exact.gather(-1, wanted[:, None])[:, 0]
        values.append((chosen - exact.logsumexp(-1)).cpu().double())
        greedy.append(exact.argmax(-1) == wanted)
    result = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
    if bool(torch.isnan(result).any()):
        raise NumericalError("The model returned NaN logits where it was scored: check the edit's strength, "
                             "or load the model in float32.")  # fmt: skip
    return result, (torch.cat(greedy) if greedy else torch.zeros(0, dtype=torch.bool)).cpu()


def shareable(past: Any) -> bool:
    """True for caches of growing key/value layers only: their rows can be copied without side effects."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(past, "layers", None)
    return bool(layers) and all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers or ())


def select_rows(past: Any, rows: Tensor) -> Any:
    """A cache holding the given rows of ``past``; ``past`` itself stays as it is."""
    chosen = copy.copy(past)
    chosen.layers = [copy.copy(layer) for layer in past.layers]
    for layer in chosen.layers:
        if layer.get_seq_length() > 0:
            index = rows.to(layer.keys.device)
            layer.keys = layer.keys.index_select(0, index)
            layer.values = layer.values.index_select(0, index)
    return chosen
