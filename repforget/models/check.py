"""Proof by a forward pass that a site map is right for one model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repforget.errors import SiteError
from repforget.models._names import core
from repforget.models.capture import capture
from repforget.models.gather import Batch
from repforget.models.readout import lens
from repforget.models.sites import site_map
from repforget.records import Site

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def check_sites(model: Any, batch: Batch) -> float:
    """Check that resid_pre + attn_out + mlp_out is resid_post in every layer, and that the readout gives the
    logits.

    Returns the largest deviation relative to the largest value; raises SiteError above the rounding of the
    model's dtype. Costs one forward pass. It does not prove how a fused query-key-value projection is
    ordered.
    """
    module = core(model)
    places = site_map(module)
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    wanted = [Site(kind, layer) for layer in range(places.n_layers) for kind in kinds]
    found = capture(module, [*wanted, Site("logits")], batch, "last")
    tolerance = TOLERANCE.get(found[Site("logits")].dtype, 5e-2)
    worst = 0.0
    for layer in range(places.n_layers):
        before, attention, mlp, after = (found[Site(kind, layer)].double() for kind in kinds)
        gap = _relative(before + attention + mlp, after)
        worst = max(worst, gap)
        if gap > tolerance:
            raise SiteError(f"In layer {layer} of {type(module).__name__} resid_pre + attn_out + mlp_out "
                            f"differs from resid_post by {gap:.1e} of its size: the block adds something "
                            "that is not covered, so its sites cannot be trusted; use a covered "
                            "architecture.")  # fmt: skip
    last = Site("resid_post", places.n_layers - 1)
    gap = _relative(lens(module, found[last]).double(), found[Site("logits")].double())
    if gap > tolerance:
        raise SiteError(f"The readout of '{last}' differs from the logits of {type(module).__name__} by "
                        f"{gap:.1e} of their size: its output head is not covered; use a covered "
                        "architecture.")  # fmt: skip
    return max(worst, gap)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def probe_batch(module: nn.Module, length: int = 6) -> Batch:
    """A fixed short batch of valid token ids."""
    vocabulary = len(module.get_input_embeddings().weight)  # type: ignore[operator]
    ids = (torch.arange(2 * length).view(2, length) * 7 + 3) % vocabulary
    return Batch(ids, torch.ones_like(ids))
