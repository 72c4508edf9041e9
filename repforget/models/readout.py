"""Any residual state -> vocabulary: the final norm, the unembedding and the model's own logit cap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repforget.models._names import core, text_config
from repforget.models.sites import site_map


def lens(model: Any, resid: Tensor) -> Tensor:
    """Return the logits [..., V] that ``model`` would give if ``resid`` [..., d] were its last residual state.

    Final norm, unembedding (with bias) and the logit cap or scale of the model, so that the readout of the last
    resid_post *is* the model's logits. ``model`` may be another one than the one ``resid`` comes from.
    Source: nostalgebraist (2020), the logit lens. A token that is not read out at a layer may still be computed
    there in another basis: absence from the lens is no evidence of absence.
    """
    module = core(model)
    places = site_map(module).anatomy
    norm, head = module.get_submodule(places.final_norm), module.get_submodule(places.unembed)
    resid = resid.to(device_of(norm, head), head.weight.dtype)  # type: ignore[arg-type]
    return cap(module, head(norm(resid).to(head.weight.device)))  # type: ignore[arg-type]


def device_of(*modules: nn.Module) -> torch.device:
    """Device of the first parameter found in ``modules``."""
    return next(p.device for module in modules for p in module.parameters())


def cap(model: Any, logits: Tensor) -> Tensor:
    """Apply what the model does to its logits after the unembedding: a scale, a soft cap, or nothing."""
    config = text_config(core(model))
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    limit = getattr(config, "final_logit_softcapping", None)
    return logits if limit is None else torch.tanh(logits / limit) * limit
