"""The components a locator ranks: whole sites, heads or neurons, and their heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.records import Component, Site

Node = Literal[
    "embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in", "q", "k", "v", "attn_z", "attn_out",
    "mlp_gate", "mlp_up", "mlp_post", "mlp_out", "heads", "neurons",
]  # fmt: skip
Layers = Literal["all"] | list[int]
STREAM_WIDE = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in", "attn_out", "mlp_out")


def expand_nodes(model: LoadedModel, nodes: Sequence[Node], layers: Layers = "all") -> tuple[Component, ...]:
    """All components of the given kinds: ``heads`` are slices of attn_z, ``neurons`` those of mlp_post.

    Raises SiteError for a kind this architecture does not have and UsageError for a layer that does not
    exist.
    """
    if not nodes:
        raise UsageError("There are no nodes to rank: name at least one, for example mlp_out.")
    if layers != "all":
        wrong = [k for k in layers if not 0 <= k < model.n_layers]
        if wrong or not layers:
            raise UsageError(f"Layers {wrong or layers} cannot be ranked: model '{model.name}' has layers 0 "
                             f"to {model.n_layers - 1}; name at least one of them.")  # fmt: skip
    sites = site_map(model.module)
    found: list[Component] = []
    for node in dict.fromkeys(nodes):
        whole = {"heads": "attn_z", "neurons": "mlp_post"}.get(node, node)
        for site in sites.expand(whole):
            if layers != "all" and site.layer not in (*layers, -1):
                continue
            if node == "heads":
                found += [Component(Site("attn_z", site.layer, h)) for h in range(sites.n_heads)]
            elif node == "neurons":
                found += [Component(site, n) for n in range(sites.mlp_width)]
            else:
                found.append(Component(site))
    return tuple(found)


def node_of(component: Component) -> str:
    """The node name a component belongs to: its site kind, ``heads`` or ``neurons``."""
    if component.neuron is not None:
        return "neurons"
    return "heads" if component.site.head is not None else component.site.kind


def layer_writes(component: Component) -> tuple[Component, ...]:
    """What stands for a residual state when it is patched: all that its layer writes; otherwise the component itself.

    A whole state at all positions carries everything, so that patching it would tell no two layers apart.
    """
    site = component.site
    if site.kind != "resid_post":
        return (component,)
    return Component(Site("attn_out", site.layer)), Component(Site("mlp_out", site.layer))


def size_class(component: Component) -> str:
    """Components of one class have the same number of columns and may stand for each other in a random selection."""
    node = node_of(component)
    return "residual width" if node in STREAM_WIDE else node


def heat_maps(
    components: Sequence[Component], scores: NDArray[np.float64], label: str = "score"
) -> Mapping[str, Sequence[Sequence[float]]]:
    """Rows per layer: one table ``layer x kind`` of whole sites, one ``layer x head``; the best neuron per
    layer."""
    layers = sorted({c.site.layer for c in components if c.site.layer >= 0})
    kinds = list(dict.fromkeys(node_of(c) for c in components if c.site.layer >= 0))
    whole = [k for k in kinds if k not in ("heads", "neurons")]
    value = {c: float(s) for c, s in zip(components, scores, strict=True)}
    tables: dict[str, list[list[float]]] = {}
    if whole:
        tables[f"{label} by layer: {', '.join(whole)}"] = [
            [value[Component(Site(kind, layer))] for kind in whole] for layer in layers
        ]
    if "heads" in kinds:
        heads = 1 + max(c.site.head for c in components if c.site.head is not None)
        tables[f"{label} by layer and head"] = [
            [value[Component(Site("attn_z", layer, h))] for h in range(heads)] for layer in layers
        ]
    if "neurons" in kinds:
        tables[f"{label} of the best neuron by layer"] = [
            [max(v for c, v in value.items() if c.neuron is not None and c.site.layer == layer)] for layer in layers
        ]
    return tables
