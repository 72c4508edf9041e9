"""The linear maps that a localisation names, or all of the blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from repforget.errors import SiteError, UsageError
from repforget.models.load import LoadedModel
from repforget.models.weights import WeightRef, readers, writers
from repforget.records import Localization

ROLES: dict[str, tuple[str, ...]] = {
    "mlp_in": ("mlp_gate", "mlp_up"), "mlp_gate": ("mlp_gate",), "mlp_up": ("mlp_up",), "mlp_post": ("mlp_out",),
    "mlp_out": ("mlp_out",), "attn_in": ("q", "k", "v"), "q": ("q",), "k": ("k",), "v": ("v",),
    "attn_z": ("attn_out",), "attn_out": ("attn_out",),
}  # fmt: skip


def linear_maps(model: LoadedModel, where: Localization | None = None, top: int | None = None) -> tuple[str, ...]:
    """Weights of linear maps (parameter names, in forward order): all of the blocks, or those at the sites of the
    ``top`` best components of ``where`` (default: as many as its band was measured with).

    A head or neuron stands for the whole map it belongs to; mlp_out.2 for the down projection of block 2, attn_in.2 for
    its three projections.  Raises SiteError where nothing of it is linear: residual states, embeddings and logits are
    no maps of a block, and batched experts none of two dimensions.
    """
    refs = [ref for ref in (*readers(model.module), *writers(model.module)) if ref.layer >= 0 and _linear(model, ref)]
    order = {path: k for k, (path, _) in enumerate(model.module.named_modules())}
    names = dict.fromkeys(ref.name for ref in sorted(refs, key=lambda ref: order[ref.name.rpartition(".")[0]]))
    if not names:
        raise SiteError(f"'{model.name}' has no plain linear maps in its blocks: influence is read from these alone.")
    if where is None:
        return tuple(names)
    best = where.components[: where.band.k if top is None else top]
    if not best:
        raise UsageError(f"The localisation by '{where.method}' selects no component: give a larger 'top'.")
    meant = {(role, c.site.layer) for c in best for role in ROLES.get(c.site.kind, ())}
    wanted = {ref.name for ref in refs if (ref.role, ref.layer) in meant}
    if not wanted:
        raise SiteError(f"The best components of the localisation by '{where.method}' ({best[0]} first) name no linear "
                        f"map: influence is read at {', '.join(ROLES)}; locate with a method that ranks these, or "
                        "leave the localisation out.")  # fmt: skip
    return tuple(name for name in names if name in wanted)


def _linear(model: LoadedModel, ref: WeightRef) -> bool:
    from transformers.pytorch_utils import Conv1D

    owner: Any = model.module.get_submodule(ref.name.rpartition(".")[0])
    return not ref.batched and isinstance(owner, (nn.Linear, Conv1D))
