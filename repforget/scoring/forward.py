"""One forward pass of a causal language model: the wanted logits only, with or without a shared cache."""

from __future__ import annotations

import copy
import inspect
from functools import cache as memoise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import NumericalError
from repforget.models._names import core

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

LOGIT_ELEMENTS = 2**27  # logits of one batch: 512 MiB in fp32
CACHED_PER_TOKEN = 2  # a token that is only read from the cache costs less than one that is computed
READ_ELEMENTS = 2**22  # logits read at a time: small enough for the processor's cache


@memoise
def _accepted(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def places_tokens(model: LoadedModel) -> bool:
    """True where the model takes ``position_ids``, so that left padding and shared prefixes are exact."""
    return "position_ids" in _accepted(type(core(model)).forward)


def minds_prompts(model: LoadedModel) -> bool:
    """True where an edit in place acts by where the prompt ends: then prompt and answer must be two passes.

    :mod:`repforget.artifact.runtime` notes such edits on the module.
    """
    return bool(getattr(model.module, "_repforget_passes", ()))


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


def read_logits(
    logits: Tensor, rows: Tensor, columns: Tensor, tokens: Tensor, *, moments: bool = False
) -> NDArray[np.float64]:
    """Log-probability of each wanted token [t] under ``logits[rows, columns]``, and whether it is the arg max.

    Returns [2, t]: log p in nats, 1 where arg max; with ``moments`` [4, t]: also mean and variance of log p
    under p. The full vocabulary exists in fp32 for :data:`READ_ELEMENTS` logits at a time only.
    """
    rows, columns, tokens = (x.to(logits.device) for x in (rows, columns, tokens))
    step = max(1, READ_ELEMENTS // logits.shape[-1])
    parts = []
    for at in range(0, len(tokens), step):
        part = slice(at, at + step)
        raw, wanted = logits[rows[part], columns[part]], tokens[part]
        exact = raw if raw.dtype == torch.float64 else raw.float()
        hit = (exact.argmax(-1) == wanted).to(exact.dtype)
        if moments:
            table = exact.log_softmax(-1)
            found = [table.gather(-1, wanted[:, None])[:, 0], hit, *_moments(table)]
        else:
            found = [exact.gather(-1, wanted[:, None])[:, 0] - exact.logsumexp(-1), hit]
        parts.append(torch.stack(found).cpu().double())
    result = torch.cat(parts, 1) if parts else torch.zeros(4 if moments else 2, 0, dtype=torch.float64)
    if bool(torch.isnan(result).any()):
        raise NumericalError("The model returned NaN logits where it was scored: check the edit's strength, "
                             "or load the model in float32.")  # fmt: skip
    return result.numpy()


def _moments(logp: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of log p under p; tokens of probability 0 count nothing."""
    p = logp.exp()
    logp = logp.masked_fill(p == 0, 0)  # 0 * -inf would be NaN
    mu = torch.linalg.vecdot(p, logp)
    return mu, torch.linalg.vecdot(p, (logp - mu[..., None]).square())


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
    # What gated edits noted about the rows (repforget.artifact.runtime) goes with them.
    noted = getattr(past, "repforget_rows", {})
    chosen.repforget_rows = {state: {n: t.index_select(0, rows.to(t.device)) for n, t in by_gate.items()}
                             for state, by_gate in noted.items()}  # fmt: skip
    return chosen
