"""What each sender writes, how the metric depends on what each receiver reads, and their product: scores of edges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from repforget.causal import Metric, Prepared, Run, answer_metric, prepare
from repforget.errors import NumericalError, SiteError, UsageError
from repforget.locate._graph import Array, Graph
from repforget.models._names import core
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel
from repforget.models.norms import secant
from repforget.models.sites import site_map
from repforget.models.weights import WeightRef, find, get_bias, get_weight
from repforget.progress import Progress, track
from repforget.records import Site

EMBED, FIRST = Site("embed"), Site("resid_pre", 0)
VALUES_AT_ONCE = 2**26  # numbers held at once for senders and receivers (float32: 256 MiB)
Values = dict[Site, Tensor]


def final_state(graph: Graph) -> Site:
    """The state that the final norm reads."""
    return Site("resid_post", graph.n_layers - 1)


def mlp_state(graph: Graph, layer: int) -> Site:
    """The state that a layer's MLP reads."""
    return Site("resid_pre" if graph.parallel else "resid_mid", layer)


def states(graph: Graph) -> list[Site]:
    """The residual states that receivers read before their norms."""
    layers = range(graph.n_layers)
    return sorted({s for layer in layers for s in (Site("resid_pre", layer), mlp_state(graph, layer))}) + [
        final_state(graph)
    ]


def written(graph: Graph) -> list[Site]:
    """Where the senders' output is read: the heads before their output projection, for memory."""
    return [FIRST, *(Site(kind, layer) for layer in range(graph.n_layers) for kind in ("attn_z", "mlp_out"))]


def norm_of(model: LoadedModel, path: str | None) -> nn.Module | None:
    return None if path is None else core(model).get_submodule(path)


def mlp_norm(model: LoadedModel, layer: int) -> nn.Module | None:
    """The norm in front of a layer's MLP; None where it reads the stream itself."""
    body = site_map(model).anatomy
    paths = body.layers[layer]
    return norm_of(model, paths.mlp_norm or (paths.attention_norm if body.parallel else None))


def attention_norm(model: LoadedModel, layer: int) -> nn.Module | None:
    """The norm in front of a layer's attention; None where it reads the stream itself."""
    return norm_of(model, site_map(model).anatomy.layers[layer].attention_norm)


def reading_weights(model: LoadedModel, graph: Graph, layer: int) -> Tensor:
    """Rows of query, key and value of every head [n_heads + 2 n_kv_heads, head_dim, d]."""
    rows = torch.cat([get_weight(model, find(model, kind, layer)) for kind in ("q", "k", "v")])
    return rows.reshape(graph.reads, -1, rows.shape[-1])


def head_changes(model: LoadedModel, graph: Graph, layer: int, before: Tensor, after: Tensor) -> Tensor:
    """What each head writes to the stream in one run less what it writes in another [heads, b, s, d].

    ``before`` and ``after`` are the inputs of the output projection [b, s, heads * head_dim]. A norm behind the
    projection is split by its secant between the two runs, so that the heads add up to the whole change exactly and a
    head that does the same in both runs changes nothing.
    """
    ref: WeightRef = find(model, "attn_out", layer)
    matrix = get_weight(model, ref)
    before, after = before.to(matrix.dtype), after.to(matrix.dtype)
    change = (after - before).reshape(*before.shape[:2], graph.n_heads, -1)
    parts = torch.einsum("bshe,dhe->hbsd", change, matrix.reshape(len(matrix), graph.n_heads, -1))
    norm = norm_of(model, ref.post_norm)
    if norm is None:
        return parts
    bias = get_bias(model, ref)
    start, end = ((z @ matrix.T) + (0.0 if bias is None else bias) for z in (before, after))
    return secant(norm, start, end)(parts).to(parts.dtype)


def sender_changes(model: LoadedModel, graph: Graph, before: Values, after: Values, place: slice) -> Tensor:
    """What every sender writes in run ``after`` less what it writes in run ``before`` [senders, b, positions, d]."""
    device = before[FIRST].device

    def change(site: Site) -> Tensor:
        wide = torch.promote_types(before[site].dtype, torch.float32)
        return (after[site][:, place].to(wide) - before[site][:, place].to(wide))[None].to(device)

    parts = [change(FIRST)]
    for layer in range(graph.n_layers):
        z = Site("attn_z", layer)
        heads = head_changes(model, graph, layer, before[z][:, place], after[z][:, place])
        parts += [heads.to(device), change(Site("mlp_out", layer))]
    return torch.cat(parts)


def _pulled(norm: nn.Module | None, state: Tensor, gradient: Tensor) -> Tensor:
    """Gradients [receivers, b, s, d] at a norm's output taken back to its input ``state`` [b, s, d]."""
    if norm is None:
        return gradient
    with torch.enable_grad():
        leaf = state.detach().expand(gradient.shape).requires_grad_()
        out = norm(leaf)
        return torch.autograd.grad(out, leaf, gradient.to(out.dtype))[0]


def receiver_gradients(
    model: LoadedModel, graph: Graph, layer: int, state: Values, slopes: Values, place: slice
) -> Tensor:
    """dM/d(stream) through each receiver of one layer alone [receivers of the layer, b, positions, d]."""
    rows = reading_weights(model, graph, layer)
    heads = torch.cat([slopes[Site(kind, layer)][:, place] for kind in ("q", "k", "v")], dim=-1).to(rows.dtype)
    inside = torch.einsum("bshe,hed->hbsd", heads.reshape(*heads.shape[:2], *rows.shape[:2]), rows)
    attention = _pulled(attention_norm(model, layer), state[Site("resid_pre", layer)][:, place], inside)
    mlp = _pulled(mlp_norm(model, layer), state[mlp_state(graph, layer)][:, place],
                  slopes[Site("mlp_in", layer)][:, place][None])  # fmt: skip
    return torch.cat([attention.to(rows.dtype), mlp.to(rows)])


def _slopes(
    model: LoadedModel, graph: Graph, item: Prepared, metric: Metric, moved: Tensor
) -> tuple[Values, Values]:
    """Residual states, and dM/da at every site behind a receiver's norm, with the embeddings moved by ``moved``."""
    state: Values = {}
    leaves: Values = {}
    last = final_state(graph)
    wanted = [*(Site(kind, layer) for layer in range(graph.n_layers) for kind in ("q", "k", "v", "mlp_in")), last]

    def remember(site: Site) -> Callable[[Tensor], None]:
        def visit(x: Tensor) -> None:
            state[site] = x.detach().clone()

        return visit

    def probe(site: Site) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:  # a leaf of its own, so that frozen parameters do not matter
            leaves[site] = torch.zeros_like(x, requires_grad=True)
            return x + leaves[site] + (moved if site == EMBED else 0.0)

        return visit

    edits = {**{site: remember(site) for site in states(graph)}, **{site: probe(site) for site in (EMBED, *wanted)}}
    with torch.enable_grad(), hooks(model, edits):
        total = answer_metric(model, item.base, item, metric).sum()
        found = torch.autograd.grad(total, [leaves[site] for site in wanted], allow_unused=True)
    slopes = {site: torch.zeros_like(leaves[site]) if g is None else g for site, g in zip(wanted, found, strict=True)}
    return state, slopes


def check_sum(graph: Graph, before: Values, after: Values, changes: Tensor, place: slice, real: Tensor) -> None:
    """Raise SiteError unless the senders together make the whole change of the final state."""
    last = final_state(graph)
    end = after[last][:, place].to(changes) * real
    whole = end - before[last][:, place].to(changes) * real
    rounding = 100 * torch.finfo(before[last].dtype).eps * float(end.norm())
    apart = float((changes.sum(0) * real - whole).norm() / whole.norm().clamp(min=rounding))
    if apart > 0.1:
        raise SiteError(f"Embedding, heads and MLPs leave {100 * apart:.0f} % of the change of the residual stream "
                        "unexplained, so that its edges cannot be told: detach edits that write to the stream, or use "
                        "attribution_patching.")  # fmt: skip


def edge_attributions(
    model: LoadedModel, graph: Graph, runs: Sequence[Run], metric: Metric = "logprob", steps: int = 1,
    progress: Progress | None = None, *, values: int = VALUES_AT_ONCE,
) -> Iterator[tuple[tuple[int, ...], Array]]:  # fmt: skip
    """Yield (indices of runs, (a_donor - a_base) of each sender * dM/d(stream) through each receiver [b, s, r]).

    Summed over patched positions, float64, zero where there is no edge. The gradient is taken at the base (``steps=1``)
    or averaged over the midpoints of ``steps`` equal parts of the line between the token embeddings of base and donor.
    Cost: two forward and ``steps`` forward and backward passes per run; memory: about ``values`` numbers, whatever the
    length of the prompts, beside one batch's activations.
    """
    if steps < 1:
        raise UsageError(f"Attribution needs at least one gradient step, not {steps}: 1 is the plain estimate.")
    tokens = max(1, values // ((len(graph.senders) + 3 * graph.reads) * model.width))
    sites = sorted({EMBED, *written(graph), final_state(graph)})
    points = [0.0] if steps == 1 else [(k + 0.5) / steps for k in range(steps)]
    for item in track(progress, list(prepare(model, runs, token_budget=tokens)), "attributing edges"):
        donor, base = (capture(model, sites, batch, gather="all") for batch in (item.donor, item.base))
        total = np.zeros((len(item.rows), len(graph.senders), len(graph.receivers)))
        for point in points:
            state, slopes = _slopes(model, graph, item, metric, point * (donor[EMBED] - base[EMBED]))
            total += _products(model, graph, item, (base, donor), (state, slopes), tokens) / steps
        if not np.isfinite(total).all():
            raise NumericalError(f"Gradients of model '{model.name}' are not finite: load it in float32 and try again.")
        yield item.rows, total


def _products(
    model: LoadedModel, graph: Graph, item: Prepared, ends: tuple[Values, Values], at: tuple[Values, Values],
    tokens: int,
) -> Array:  # fmt: skip
    """Change of every sender times gradient of every receiver, block of positions by block [b, senders, receivers]."""
    b, s = item.base.ids.shape
    block = max(1, tokens // b)
    result = torch.zeros(b, len(graph.senders), len(graph.receivers), dtype=torch.float64)
    state, slopes = at
    for start in range(0, s, block):
        place = slice(start, min(start + block, s))
        changes = sender_changes(model, graph, *ends, place)
        real = item.base.mask[:, place, None].to(changes)
        check_sum(graph, *ends, changes, place, real)
        changes = changes.masked_fill(~item.where[:, place].to(changes.device), 0.0)

        def against(first: int, gradients: Tensor, changes: Tensor = changes) -> None:
            columns = slice(first, first + len(gradients))
            reach = graph.before[columns.stop - 1]
            found = torch.einsum("ubsd,rbsd->bur", changes[:reach], gradients.to(changes))
            result[:, :reach, columns] += found.double().cpu()

        for layer in range(graph.n_layers):
            gradients = receiver_gradients(model, graph, layer, state, slopes, place)
            against(graph.attention(layer).start, gradients[:-1])
            against(graph.mlp(layer), gradients[-1:])
        against(len(graph.receivers) - 1, slopes[final_state(graph)][:, place][None])
    return result.numpy()


