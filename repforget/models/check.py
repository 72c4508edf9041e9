"""Proof by a forward pass that a site map is right for one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repforget.errors import SiteError
from repforget.models._names import core
from repforget.models.capture import capture
from repforget.models.gather import Batch
from repforget.models.readout import lens
from repforget.models.sites import SiteMap, site_map
from repforget.records import Site

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def check_sites(model: Any, batch: Batch) -> float:
    """Check by a forward pass that the site map describes this model, and return the largest relative deviation.

    In every layer resid_pre + attn_out + mlp_out must be resid_post, resid_mid must lie between them, and what
    attention and MLP read must be the norm of the state before them; the readout of the last state must be the
    logits. Raises SiteError above the rounding of the model's dtype. Costs one forward pass. It does not prove how
    a fused query-key-value projection is ordered.
    """
    module = core(model)
    places = site_map(module)
    logits = Site("logits")
    kinds = [k for k in ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
             if k in places.kinds]  # fmt: skip
    wanted = [Site(kind, layer) for layer in range(places.n_layers) for kind in kinds]
    found = capture(module, [*wanted, logits], batch, "last")
    last = Site("resid_post", places.n_layers - 1)
    claims = [("the readout of the last state", lens(module, found[last]), found[logits])]
    for layer in range(places.n_layers):
        values: dict[str, Tensor] = {kind: found[Site(kind, layer)] for kind in kinds}
        claims += [(f"{what} in layer {layer}", a, b) for what, a, b in _claims(module, places, layer, values)]
    gaps = [_relative(a.double(), b.double()) for _, a, b in claims]
    tolerance = TOLERANCE.get(found[logits].dtype, 5e-2)
    for (what, _, _), gap in zip(claims, gaps, strict=True):
        if not gap <= tolerance:
            raise SiteError(f"{type(module).__name__} is not what its module names suggest: {what} is off by {gap:.1e} "
                            "of its size, so its sites cannot be trusted; use a covered architecture.")  # fmt: skip
    return max(gaps)


def _claims(
    module: nn.Module, places: SiteMap, layer: int, values: Mapping[str, Tensor]
) -> list[tuple[str, Tensor, Tensor]]:
    """(what, expected, seen) for one layer."""
    paths = places.anatomy.layers[layer]
    before, attention, mlp = (values[kind].double() for kind in ("resid_pre", "attn_out", "mlp_out"))
    middle = values.get("resid_mid", values["resid_pre"])
    mlp_norm = paths.mlp_norm or (paths.attention_norm if places.parallel else None)
    claims = [
        ("resid_pre + attn_out + mlp_out = resid_post", before + attention + mlp, values["resid_post"]),
        ("what attention reads", _normed(module, paths.attention_norm, values["resid_pre"]), values["attn_in"]),
        ("what the MLP reads", _normed(module, mlp_norm, middle), values["mlp_in"]),
    ]
    if "resid_mid" in values:
        claims.append(("resid_pre + attn_out = resid_mid", before + attention, middle))
    return claims


def _normed(module: nn.Module, norm: str | None, state: Tensor) -> Tensor:
    return state if norm is None else module.get_submodule(norm)(state)  # type: ignore[no-any-return]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def probe_batch(module: nn.Module, length: int = 6) -> Batch:
    """A fixed short batch of valid token ids."""
    vocabulary = len(module.get_input_embeddings().weight)  # type: ignore[operator]
    ids = (torch.arange(2 * length).view(2, length) * 7 + 3) % vocabulary
    return Batch(ids, torch.ones_like(ids))
