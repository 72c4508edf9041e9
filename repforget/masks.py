"""From the units a localisation ranks to masks of the parameters that are theirs, and the control selections.

A mask alone does not keep the rest as it is: weight decay and old momentum move masked entries too.  So the optimiser
is made after the mask, without decay on partly masked tensors, and :func:`reproject` follows every step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from repforget.artifact.weights import canonical
from repforget.errors import SiteError, UsageError
from repforget.models.load import LoadedModel
from repforget.models.sites import SiteMap, site_map
from repforget.models.weights import WeightRef, head_slice, neuron_slice, readers, writers
from repforget.records import GLOBAL_KINDS, HEAD_KINDS, Component, Localization, Site, Units

MlpPart = Literal["all", "down", "up+gate"]
ATTENTION = ("q", "k", "v", "attn_out")
MLP: Mapping[MlpPart, tuple[str, ...]] = {
    "all": ("mlp_gate", "mlp_up", "mlp_out", "router"), "down": ("mlp_out",), "up+gate": ("mlp_gate", "mlp_up"),
}  # fmt: skip
BY_COLUMNS = ("attn_out", "mlp_out")  # a unit owns columns of these, rows of all others
ALONE = {"q": ("q",), "k": ("k",), "v": ("v",), "mlp_gate": ("mlp_gate",), "mlp_up": ("mlp_up",),
         "embed": ("embed", "position"), "logits": ("unembed",)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Masks:
    """Parameter name -> bool mask that broadcasts to it (True: may change); parameters without one are frozen."""

    masks: Mapping[str, Tensor]
    components: tuple[Component, ...]
    parameters: int  # how many entries may change
    notes: tuple[str, ...] = ()


def masks(
    model: LoadedModel, where: Localization, *, top: int | None = None, budget: int | None = None,
    mlp_part: MlpPart = "all", units: Units = "located", seed: int = 0,
) -> Masks:  # fmt: skip
    """Masks of the best units of ``where``: as many as its band was measured with, or ``top``, or those whose
    parameters fit into ``budget``.

    ``mlp_part`` says what of an MLP may change: ``up+gate`` decide when a neuron fires, ``down`` what it writes.
    ``units`` "random" (drawn by ``seed``) or "inverted" (ranked lowest) takes as many others in their place: what
    editing those does as well is not owed to the localisation.  Raises UsageError where nothing is selected, SiteError
    for units that own no parameter.
    """
    chosen = where.components[: (where.band.k if top is None else top) if budget is None else None]
    if not chosen:
        raise UsageError(f"The localisation by '{where.method}' selects no unit: give a larger 'top', or train without "
                         "a mask.")  # fmt: skip
    found = masks_of(model, chosen, mlp_part=mlp_part, budget=budget)
    if units == "located":
        return replace(found, notes=(_said(found, units), *found.notes))
    own = found.components
    others = random_units(model, own, seed) if units == "random" else inverted_units(where, own)
    control = masks_of(model, others, mlp_part=mlp_part)
    compared = f"{_said(control, units)}, in the place of {len(own)} located ones of {found.parameters}: a control"
    return replace(control, notes=(compared, *control.notes))


def _said(found: Masks, units: Units) -> str:
    return f"mask: {len(found.components)} {units} units of {found.parameters} parameters"


def masks_of(
    model: LoadedModel, components: Sequence[Component], *, mlp_part: MlpPart = "all", budget: int | None = None
) -> Masks:
    """Masks of the given units; with ``budget``, of the first of them that have no more parameters in all.

    Biases of output projections belong to no unit and stay frozen.
    """
    module, places = model.module, site_map(model.module)
    refs = (*writers(module), *readers(module))
    units: dict[str, tuple[WeightRef, Tensor]] = {}
    count, taken = 0, 0
    for component in components:
        grown, added = dict(units), 0
        for ref in weights_of(module, places, refs, component, mlp_part):
            vector, entries = _marked(module, ref, grown)
            grown[ref.name], added = (ref, vector), added + entries
        if budget is not None and count + added > budget:
            break
        units, count, taken = grown, count + added, taken + 1
    if not count:
        raise UsageError(f"No unit fits into {budget} parameters: the first, {components[0]}, has {added}.")
    chosen = tuple(components[:taken])
    return Masks(_masks(module, units), chosen, count, _notes(places, chosen))


def fill(
    model: LoadedModel, components: Sequence[Component], budget: int, *, mlp_part: MlpPart = "all", seed: int = 0
) -> tuple[Component, ...]:
    """Heads and neurons of ``components`` in order until their parameters come to ``budget``.

    So that locators of any grain are compared at one budget: of the last component only as many neurons or heads are
    taken, drawn by seed, as still fit; the embedding and the logits have none.  UsageError where nothing fits.
    """
    module, places = model.module, site_map(model.module)
    refs, draw = (*writers(module), *readers(module)), random.Random(f"fill-{seed}")
    units: dict[str, tuple[WeightRef, Tensor]] = {}
    taken: dict[Component, None] = {}
    left = budget
    for component in components:
        atoms = [atom for atom in _atoms(module, places, component) if atom not in taken]
        for atom in draw.sample(atoms, len(atoms)):
            grown, added = dict(units), 0
            for ref in weights_of(module, places, refs, atom, mlp_part):
                vector, entries = _marked(module, ref, grown)
                grown[ref.name], added = (ref, vector), added + entries
            if added <= left:
                units, left = grown, left - added
                taken[atom] = None
    if not taken:
        raise UsageError(f"No head or neuron of {len(components)} components fits into {budget} parameters: give more.")
    return tuple(taken)


def _atoms(module: nn.Module, places: SiteMap, component: Component) -> list[Component]:
    """The heads and neurons a component is made of; a stack of experts is one."""
    site = component.site
    if site.layer < 0 or component.neuron is not None or site.head is not None:
        return [component] if site.layer >= 0 and component.feature is None else []
    heads = [Component(Site("attn_z", site.layer, h)) for h in range(places.n_heads)]
    batched = places.anatomy.layers[site.layer].down is None
    neurons = [Component(Site("mlp_post", site.layer), n) for n in range(0 if batched else places.mlp_width)]
    neurons = neurons or [Component(Site("mlp_out", site.layer))]
    if site.kind.startswith(("attn", "mlp")):
        return heads if site.kind.startswith("attn") else neurons
    return heads if site.kind in HEAD_KINDS else [*heads, *neurons]


def weights_of(
    module: nn.Module, places: SiteMap, refs: Sequence[WeightRef], component: Component, mlp_part: MlpPart = "all"
) -> list[WeightRef]:
    """Those of ``refs`` (all readers and writers), or parts of them, that belong to a unit; SiteError for none."""
    site = component.site
    places.locate(site)
    roles = ALONE.get(site.kind) or _roles(site, mlp_part)
    own = [ref for ref in refs if ref.role in roles and ref.layer == site.layer]
    if component.neuron is not None:
        return [neuron_slice(module, ref, component.neuron) for ref in own]
    if site.head is not None:
        group = places.n_heads // places.n_kv_heads if site.kind == "attn_z" else 1
        own = [head_slice(module, r, site.head // group if r.role in ("k", "v") else site.head) for r in own]
    if not own:
        raise SiteError(f"'{component}' has no weights that could be masked: choose heads, neurons or layers.")
    return own


def _roles(site: Site, mlp_part: MlpPart) -> tuple[str, ...]:
    if site.kind.startswith("attn"):
        return ATTENTION
    if site.kind.startswith("mlp"):
        return MLP[mlp_part]
    return (*ATTENTION, *MLP[mlp_part]) if site.layer >= 0 else ()


def _marked(module: nn.Module, ref: WeightRef, units: Mapping[str, tuple[WeightRef, Tensor]]) -> tuple[Tensor, int]:
    """The rows (or columns) of the weight that may change once ``ref`` may, and how many entries that adds."""
    shape = module.get_parameter(ref.name).shape
    outs, ins = (shape[-1], shape[-2]) if ref.conv1d else (shape[-2], shape[-1])
    size, spans = (ins, ref.cols) if ref.role in BY_COLUMNS else (outs, ref.rows)
    vector = units[ref.name][1].clone() if ref.name in units else torch.zeros(size, dtype=torch.bool)
    before = int(vector.sum())
    for start, stop in spans or ((0, size),):
        vector[start:stop] = True
    per_unit = shape.numel() // size + (1 if ref.bias and ref.role not in BY_COLUMNS else 0)
    return vector, (int(vector.sum()) - before) * per_unit


def _masks(module: nn.Module, units: Mapping[str, tuple[WeightRef, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (ref, vector) in units.items():
        parameter = module.get_parameter(name)
        along = ref.role in BY_COLUMNS
        mask = vector[None, :] if along != ref.conv1d else vector[:, None]
        found[canonical(module, name)] = mask.to(parameter.device)
        if ref.bias and not along:
            found[ref.bias] = vector.to(parameter.device)
    return found


def _notes(places: SiteMap, components: Sequence[Component]) -> tuple[str, ...]:
    """What a mask reaches beyond the units: heads that share keys and values with a chosen one."""
    group = places.n_heads // places.n_kv_heads
    chosen = {(c.site.layer, c.site.head) for c in components if c.site.kind == "attn_z" and c.site.head is not None}
    groups = {(layer, head // group) for layer, head in chosen if head is not None}
    shared = len(groups) * group - len(chosen)
    if not shared:
        return ()
    return (f"{shared} heads outside the selection share the keys and values of {len(groups)} masked groups",)


def random_units(model: LoadedModel, components: Sequence[Component], seed: int) -> tuple[Component, ...]:
    """As many units of the same kinds, drawn anywhere in the model: equal in parameters and in modules.

    Query heads keep the pattern in which they share keys and values, so that grouped heads come out equal too.
    """
    places, draw = site_map(model.module), random.Random(f"mask-{seed}")
    found: list[Component] = []
    for (kind, headed, single), own in _by_kind(components).items():
        if kind in GLOBAL_KINDS:
            raise UsageError(f"'{kind}' exists once, so that there is no random selection in its place.")
        layers = [site.layer for site in places.expand(kind)]
        if single:
            drawn = draw.sample([(layer, n) for layer in layers for n in range(places.size(Site(kind, layers[0])))],
                                len(own))  # fmt: skip
            found += [Component(Site(kind, layer), n) for layer, n in drawn]
        elif headed:
            found += _random_heads(places, kind, layers, own, draw)
        else:
            found += [Component(Site(kind, layer)) for layer in draw.sample(layers, len(own))]
    return tuple(sorted(found))


def _random_heads(
    places: SiteMap, kind: str, layers: Sequence[int], own: Sequence[Component], draw: random.Random
) -> list[Component]:
    group = places.n_heads // places.n_kv_heads if kind == "attn_z" else 1
    pattern = Counter((c.site.layer, (c.site.head or 0) // group) for c in own)
    groups = [(layer, g) for layer in layers for g in range(places.heads_of(kind) // group)]
    return [Component(Site(kind, layer, g * group + h))
            for (layer, g), n in zip(draw.sample(groups, len(pattern)), pattern.values(), strict=True)
            for h in draw.sample(range(group), n)]  # fmt: skip


def inverted_units(where: Localization, components: Sequence[Component]) -> tuple[Component, ...]:
    """The units that ``where`` ranks lowest, as many of each kind as there are in ``components``."""
    found: list[Component] = []
    for key, own in _by_kind(components).items():
        ranked = _by_kind(where.components).get(key, [])
        if len(ranked) < 2 * len(own):
            raise UsageError(f"The localisation ranks {len(ranked)} units of kind '{key[0]}', too few for {len(own)} "
                             "others at its end: localise with all units ranked.")  # fmt: skip
        found += ranked[-len(own) :]
    return tuple(found)


def _by_kind(components: Sequence[Component]) -> dict[tuple[str, bool, bool], list[Component]]:
    groups: dict[tuple[str, bool, bool], list[Component]] = {}
    for c in components:
        groups.setdefault((c.site.kind, c.site.head is not None, c.neuron is not None), []).append(c)
    return groups


def apply_gradient_mask(gradient: Tensor, mask: Tensor) -> None:
    """Set the gradient to zero, in place, wherever the mask is False (NaN there included)."""
    gradient.masked_fill_(~mask, 0.0)


@torch.no_grad()
def reproject(parameter: Tensor, start: Tensor, mask: Tensor) -> None:
    """Give the parameter, in place, the bits of ``start`` wherever the mask is False."""
    parameter.copy_(torch.where(mask, parameter, start))
