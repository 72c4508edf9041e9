"""AtP*: attribution patching with the softmax computed anew for queries and keys, and layers dropped from gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from repforget.causal import Metric, Positions, Prepared, Run, answer_metric, columns_of, patch_effects, prepare
from repforget.errors import NumericalError, UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Control, Moves, Task, exact_band, join, ranked
from repforget.locate._tasks import Mode, corrupted_tasks
from repforget.locate._units import Layers, expand_nodes, heat_maps, node_of
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site

Part = Literal["q", "k", "v", "heads", "attn_out", "mlp_out", "neurons"]
EMBED = Site("embed")
WRITES = ("attn_out", "mlp_out")
ROLES = ("tokens that differ", "later prompt tokens", "last prompt token", "answer tokens")
Values = dict[Site, Tensor]


@dataclass(frozen=True)
class Attribution:
    """Estimates of every single patch [p, n], and of all heads and the MLP of a layer at each role of token
    [sites, roles, n]; magnitudes where layers were dropped."""

    parts: Array
    sites: tuple[Site, ...]
    roles: Array


def atp_star(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Part, ...] = ("q", "k", "heads", "mlp_out"), layers: Layers = "all",
    mode: Mode = "both", positions: Positions = "all", metric: Metric = "logprob", items: int = 64, partners: int = 2,
    contrast: float = 0.0, qk_fix: bool = True, grad_drop: bool = True, steps: int = 4,
    top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank queries, keys, heads and MLPs by gradient times difference, repaired where that estimate fails.

    ``qk_fix``: for a query or key head the attention weights A are computed anew with its patched value and the score
    is sum (A_patched - A) * dM/dA, so that a saturated softmax hides nothing. ``grad_drop``: one backward pass per
    layer l with the gradient through the writes of l set to zero; a node's score is the mean of |estimate| over the
    passes times L/(L-1) (its own layer's pass gives it nothing), so that direct and indirect effects cannot cancel;
    scores are then magnitudes. Without both and with whole sites this is attribution_patching, of which ``steps``,
    pairs, ``mode``, ``positions`` and the scale are. ``contrast`` subtracts that share of the score on matched retain
    facts. Nodes q, k and v are heads (key/value heads for k and v).

    Cost: per pair five forward passes, ``steps`` more with one backward pass for each layer, and exact patches of the
    band.
    What it does not show: effects through saturated logits (their gradient is zero), nor, once layers are dropped, the
    direction of an effect. Of four planted layers it puts one first among the MLPs, as chance does, and with
    ``contrast=1`` three.
    Source: Kramar, Lieberum, Shah & Nanda 2024, arXiv 2403.00745.
    """
    components = _nodes(model, nodes, layers)
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, partners=partners, mode=mode,
                                   positions=positions, metric=metric, contrast=contrast)  # fmt: skip
    given: dict[str, Any] = {"qk_fix": qk_fix, "grad_drop": grad_drop, "steps": steps}
    found = [_estimate(task, components, given, progress) for task in tasks]
    moves = join([part for part, _ in found])
    scores = moves.scores(contrast)
    half_order, _ = ranked(components, moves.scores(contrast, seed))
    plan = BandPlan(top, draws, control, seed)
    band, band_notes, spent = exact_band(tasks, components, half_order, plan, progress, alike=_kind)
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {
        "nodes": list(nodes), "layers": layers, "mode": mode, "positions": positions, "metric": metric, "items": items,
        "partners": partners, "contrast": contrast, **given, "top": top, "draws": draws, "control": control,
        "seed": seed,
    }  # fmt: skip
    pairs = sum(len(task.forget) + len(task.retain) for task in tasks)
    passes = model.n_layers if grad_drop else 1
    cost = {"forwards": float(pairs * (5 + steps)) + spent, "backwards": float(pairs * steps * passes),
            "facts": float(len({run.id for run in tasks[0].forget}))}  # fmt: skip
    tables = {**_head_maps(components, scores), **_role_maps([part for _, part in found], float(moves.gap.mean()))}
    return Localization("atp_star", order, values, band, cost, settings, tables, (*notes, *band_notes))


def _kind(component: Component) -> str:
    return f"{component.site.kind} {node_of(component)}"


def _nodes(model: LoadedModel, nodes: Sequence[Part], layers: Layers) -> tuple[Component, ...]:
    """Components of the given kinds: every head of q, k and v, and what expand_nodes makes of the others."""
    found: list[Component] = []
    for node in dict.fromkeys(nodes):
        whole = expand_nodes(model, (node,), layers)
        if node in ("q", "k", "v"):
            depth = {c.site.layer for c in whole}
            whole = tuple(Component(site) for site in site_map(model.module).heads(node) if site.layer in depth)
        found += whole
    if not found:
        raise UsageError("There are no nodes to rank: name at least one, for example mlp_out.")
    return tuple(found)


def _estimate(
    task: Task, components: Sequence[Component], given: dict[str, Any], progress: Progress | None
) -> tuple[Moves, Attribution]:
    """Moves of every patch of one task; magnitudes have no direction, so the task's sign is for signed ones alone."""
    gap = task.sign * patch_effects(task.model, task.forget, [], metric=task.metric).gap
    forget = attributions(task.model, task.forget, components, task.metric, progress, **given)
    retain = np.zeros((len(components), 0))
    if task.retain:
        retain = attributions(task.model, task.retain, components, task.metric, progress, **given).parts
    sign = 1.0 if given["grad_drop"] else task.sign
    clusters = tuple(r.cluster for r in task.forget), tuple(r.cluster for r in task.retain)
    return Moves(sign * forget.parts, gap, sign * retain, *clusters), forget


def attributions(
    model: LoadedModel, runs: Sequence[Run], components: Sequence[Component], metric: Metric = "logprob",
    progress: Progress | None = None, *, qk_fix: bool = True, grad_drop: bool = True, steps: int = 1,
) -> Attribution:  # fmt: skip
    """Estimated move of every run by every patch, with the two repairs or without (see :func:`atp_star`).

    The gradient is taken at the base (``steps=1``) or averaged over the midpoints of ``steps`` parts of the line
    between the token embeddings of base and donor.  Raises UsageError for a model of one layer with ``grad_drop``.
    """
    depth = model.n_layers
    if steps < 1 or (grad_drop and depth < 2):
        raise UsageError(f"AtP* was given steps={steps} and grad_drop={grad_drop} on a model of {depth} layers: give "
                         "at least one step, and a model of two layers or grad_drop=false.")  # fmt: skip
    drops = list(range(depth)) if grad_drop else [None]
    maps = tuple(Site(kind, k) for kind in ("attn_z", "mlp_out") for k in range(depth))
    parts = np.zeros((len(components), len(runs)))
    roles = np.zeros((len(maps), len(ROLES), len(runs)))
    batches = list(prepare(model, runs, token_budget=2048))
    for item in track(progress, batches, "attributing with AtP*"):
        reader = _reader(model, item, components, maps, qk_fix)
        sums = [(np.zeros((len(components), len(item.rows))), np.zeros((*roles.shape[:2], len(item.rows))))
                for _ in drops]  # fmt: skip
        for moved in [0.0] if steps == 1 else [(k + 0.5) / steps for k in range(steps)]:
            for (one, two), slopes in zip(sums, _slopes(model, item, reader, metric, moved, drops), strict=True):
                by_part, by_role = reader.products(slopes)
                one += by_part / steps
                two += by_role / steps
        for result, k in ((parts, 0), (roles, 1)):
            values = np.stack([pair[k] for pair in sums])
            result[..., list(item.rows)] = np.abs(values).sum(0) / (depth - 1) if grad_drop else values[0]
    if not np.isfinite(parts).all():
        raise NumericalError(f"Gradients of model '{model.name}' are not finite: load it in float32 and try again.")
    return Attribution(parts, maps, roles)


@dataclass(frozen=True)
class _Reader:
    """How far each patch moves the sites of one batch, and how that meets their gradients.

    ``change`` [b, s, d] is donor minus base at patched positions; ``fixed`` maps a site of queries or keys to the
    change of attn_z once all its heads are patched (a head's z depends on its own query and key alone), or every head's
    site to what patching it alone changes, where a norm joins the heads.
    """

    components: Sequence[Component]
    columns: Sequence[tuple[Site, range | None]]
    maps: Sequence[Site]
    change: Values
    fixed: Values
    shift: Tensor  # of the token embeddings, from base to donor
    role: Tensor  # [b, s, roles], one where a token has the role
    head_dim: int
    group: int

    @property
    def sites(self) -> list[Site]:
        return sorted(self.change)

    def products(self, slopes: Values) -> tuple[Array, Array]:
        """Sum of change times slope per component [p, b], and per site of the map and role [sites, roles, b]."""
        plain = {site: self.change[site] * slopes[site].to(self.change[site]) for site in self.change}
        summed = {site: value.sum(dim=1) for site, value in plain.items()}
        anew = {site: (z * slopes[Site("attn_z", site.layer)].to(z)).sum(dim=1) for site, z in self.fixed.items()}
        parts = [self._part(k, summed, anew) for k in range(len(self.components))]
        roles = [torch.einsum("bsd,bsr->rb", plain[site], self.role.to(plain[site])) for site in self.maps]
        return torch.stack(parts).cpu().numpy(), torch.stack(roles).cpu().numpy()

    def _part(self, k: int, summed: Values, anew: Values) -> Tensor:
        site, columns = self.columns[k]
        if self.components[k].site in anew:
            return anew[self.components[k].site].sum(-1)
        if site in anew:  # every query head of a key's group reads it
            width = self.head_dim * (self.group if site.kind == "k" else 1)
            head = self.components[k].site.head or 0
            return anew[site][:, head * width : (head + 1) * width].sum(-1)
        part = summed[site] if columns is None else summed[site][:, columns.start : columns.stop]
        return part.sum(-1)


def _reader(
    model: LoadedModel, item: Prepared, components: Sequence[Component], maps: Sequence[Site], qk_fix: bool
) -> _Reader:
    places, columns = site_map(model.module), [columns_of(model, c) for c in components]
    anew = sorted({site for site, _ in columns if qk_fix and site.kind in ("q", "k")})
    plain = sorted({EMBED, *maps, *(site for site, _ in columns)})
    donor, base = (capture(model, plain, batch, gather="all") for batch in (item.donor, item.base))
    change = {site: ((donor[site] - base[site]).double() * item.where.to(base[site].device)) for site in plain}
    fixed: Values = {}
    for kind in ("q", "k"):
        chosen = [site for site in anew if site.kind == kind]
        heads = range(places.heads_of(kind)) if chosen and _norm_joins_heads(model, chosen[0].layer) else [None]
        for head in heads if chosen else ():
            fixed |= _moved_attention(model, item, [replace(site, head=head) for site in chosen], donor, base)
    return _Reader(components, columns, maps, {s: v for s, v in change.items() if s != EMBED and s not in anew}, fixed,
                   donor[EMBED] - base[EMBED], _roles(item), places.head_dim,
                   places.n_heads // places.n_kv_heads)  # fmt: skip


def _norm_joins_heads(model: LoadedModel, layer: int) -> bool:
    """Whether queries and keys of all heads are normed together (OLMo-2), so that they depend on each other."""
    places = site_map(model.module)
    attention = model.module.get_submodule(places.anatomy.layers[layer].attention)
    return any("norm" in name and p.numel() > places.head_dim for name, p in attention.named_parameters())


def _moved_attention(model: LoadedModel, item: Prepared, sites: Sequence[Site], donor: Values, base: Values) -> Values:
    """Change of attn_z [b, s, d] in every layer once the given queries (or keys) are the donor's at patched positions.

    All layers share one forward pass: each gives on the base's attn_z, so that no layer sees another's patch.
    """
    found: Values = {}
    places = site_map(model.module)
    real = item.base.mask.unsqueeze(-1)

    def write(site: Site) -> Callable[[Tensor], Tensor]:
        value, width = donor[replace(site, head=None)], places.head_dim
        if site.head is not None:
            value = value[..., site.head * width : (site.head + 1) * width]
        return lambda x: torch.where(item.where.to(x.device), value.to(x), x)

    def restore(site: Site) -> Callable[[Tensor], Tensor]:
        def visit(z: Tensor) -> Tensor:
            old = base[Site("attn_z", site.layer)].to(z)
            found[site] = (z - old).double().masked_fill(real.to(z.device) == 0, 0.0)
            return old

        return visit

    edits = {**{site: write(site) for site in sites}, **{Site("attn_z", s.layer): restore(s) for s in sites}}
    with torch.no_grad(), hooks(model, edits):
        capture(model, [Site("attn_out", max(site.layer for site in sites))], item.base)
    return found


def _roles(item: Prepared) -> Tensor:
    """Which tokens differ between base and donor, come later in the prompt, end it or answer it [b, s, 4]."""
    differs = item.base.ids != item.donor.ids
    length, device = differs.shape[1], differs.device
    place = torch.arange(length, device=device)[None]
    last = length - item.weight.sum(1, keepdim=True).long()  # the first token that predicts a part of the answer
    later = ~differs & (place < last)
    return torch.stack([differs, later, place == last, place > last], dim=-1).double() * item.base.mask.unsqueeze(-1)


def _slopes(
    model: LoadedModel, item: Prepared, reader: _Reader, metric: Metric, moved: float, drops: Sequence[int | None]
) -> Iterator[Values]:
    """dM/da at every site [b, s, d], once for each layer whose writes pass no gradient on (None: all pass it)."""
    shift: Values = {}
    now: list[int | None] = [None]
    every = {EMBED, *reader.sites, *(Site(kind, k) for kind in WRITES for k in range(model.n_layers))}

    def probe(site: Site) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:  # a leaf of its own, so that frozen parameters do not matter
            shift[site] = torch.zeros_like(x, requires_grad=True)
            out = x + shift[site] + (moved * reader.shift if site == EMBED else 0.0)
            if site.kind in WRITES:
                out.register_hook(  # type: ignore[no-untyped-call]
                    lambda g: torch.zeros_like(g) if now[0] == site.layer else g)  # fmt: skip
            return out

        return visit

    with torch.enable_grad(), hooks(model, {site: probe(site) for site in sorted(every)}):
        total = answer_metric(model, item.base, item, metric).sum()
    for k, layer in enumerate(drops):
        now[0] = layer
        found = torch.autograd.grad(total, [shift[site] for site in reader.sites], allow_unused=True,
                                    retain_graph=k + 1 < len(drops))  # fmt: skip
        yield {site: torch.zeros_like(shift[site]) if gradient is None else gradient
               for site, gradient in zip(reader.sites, found, strict=True)}  # fmt: skip


def _head_maps(components: Sequence[Component], scores: Array) -> dict[str, Sequence[Sequence[float]]]:
    """Layer by head for queries, keys, values and heads; MLPs by layer."""
    tables: dict[str, Sequence[Sequence[float]]] = {}
    words = {"q": "query", "k": "key", "v": "value"}
    for kind in dict.fromkeys(map(_kind, components)):
        own = [k for k, c in enumerate(components) if _kind(c) == kind]
        name = kind.partition(" ")[0]
        shown = [components[k] for k in own]
        if name in words:  # drawn as heads
            shown = [Component(Site("attn_z", c.site.layer, c.site.head)) for c in shown]
        label = f"AtP* of the {words[name]}" if name in words else "AtP*"
        tables |= heat_maps(shown, scores[own], label)
    return tables


def _role_maps(found: Sequence[Attribution], gap: float) -> dict[str, Sequence[Sequence[float]]]:
    """Layer by role of token, for all heads together and for the MLP: mean |estimate| as a share of the gap."""
    mean = np.abs(np.concatenate([part.roles for part in found], axis=2)).mean(axis=2) / gap
    names = ", ".join(ROLES)
    words = {"attn_z": "all heads", "mlp_out": "MLP"}
    return {f"mean |AtP*| of {word} by layer: {names}":
            [row.tolist() for row, site in zip(mean, found[0].sites, strict=True) if site.kind == kind]
            for kind, word in words.items()}  # fmt: skip
