"""Exact patching of edges: every receiver reads a stream of its own, and everything behind it is computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from repforget.causal import Metric, Run, answer_metric, patch_effects, prepare
from repforget.errors import NumericalError
from repforget.locate._edges import (
    FIRST,
    VALUES_AT_ONCE,
    Values,
    attention_norm,
    final_state,
    head_changes,
    mlp_norm,
    mlp_state,
    reading_weights,
    states,
    written,
)
from repforget.locate._graph import Array, Graph, Mask
from repforget.models.capture import EditSite, capture, hooks
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Site


def patch_edges(
    model: LoadedModel, graph: Graph, runs: Sequence[Run], patches: Sequence[Mask], metric: Metric = "logprob",
    progress: Progress | None = None, *, values: int = VALUES_AT_ONCE,
) -> Array:  # fmt: skip
    """Metric of every run when the edges of each patch carry what the donor writes [patches, runs], float64.

    A patch is a matrix [senders, receivers]. A receiver reads the stream of this very run with the patched senders'
    writes replaced by the donor's, at the patched positions; so no edge gives the base and all edges give the donor.
    Cost: one forward pass of the donor per run and one per run and patch, each with one projection per receiver.
    Memory: the writes of all senders at all positions of a batch, which is at least one run.
    """
    result = np.zeros((len(patches), len(runs)), dtype=np.float64)
    tokens = max(1, values // ((len(graph.senders) + 3 * graph.reads) * model.width))
    sites = sorted({*written(graph), *states(graph)})
    for item in track(progress, list(prepare(model, runs, token_budget=tokens)), "patching edges"):
        donor = capture(model, sites, item.donor, gather="all")
        for k, patch in enumerate(patches):
            edits = _Rewired(model, graph, donor, patch, item.where).edits()
            with torch.no_grad(), hooks(model, edits):
                result[k, list(item.rows)] = answer_metric(model, item.base, item, metric).cpu().numpy()
    if not np.isfinite(result).all():
        raise NumericalError(f"Patching edges of model '{model.name}' gave values that are not finite: load it in "
                             "float32 and try again.")  # fmt: skip
    return result


class _Rewired:
    """One forward pass in which every receiver reads its own stream; holds what the senders wrote so far."""

    def __init__(self, model: LoadedModel, graph: Graph, donor: Values, patch: Mask, where: Tensor) -> None:
        first = donor[FIRST]
        self.model, self.graph, self.donor, self.patch, self.where = model, graph, donor, patch, where
        wide = torch.promote_types(first.dtype, torch.float32)
        self.changes = torch.zeros(len(graph.senders), *first.shape, dtype=wide, device=first.device)
        self.state: Values = {}
        self.added: Values = {}

    def edits(self) -> Mapping[Site, EditSite]:
        """What each site does in the forward pass, in any order of attention and MLP."""
        graph, found = self.graph, dict[Site, EditSite]()
        for layer in range(graph.n_layers):
            pre = Site("resid_pre", layer)
            found[pre] = self._entered(layer)
            found |= {Site(kind, layer): self._attention_read(Site(kind, layer)) for kind in ("q", "k", "v")}
            found[Site("attn_z", layer)] = self._heads_wrote(layer)
            if mlp_state(graph, layer) != pre:
                found[mlp_state(graph, layer)] = self._remembered(mlp_state(graph, layer))
            found[Site("mlp_in", layer)] = self._mlp_read(layer)
            found[Site("mlp_out", layer)] = self._mlp_wrote(layer)
        found[final_state(graph)] = self._final_read
        return found

    def _change(self, x: Tensor, site: Site) -> Tensor:
        return x.to(self.changes.dtype) - self.donor[site].to(self.changes.dtype)

    def _streams(self, state: Tensor, site: Site, receivers: slice) -> Tensor | None:
        """What each receiver reads in place of ``state`` [receivers, b, s, d]; None where nothing is patched.

        Counted from this run or from the donor, whichever leaves fewer terms, so that both extremes are exact.
        """
        columns = self.patch[:, receivers] & self.graph.exists[:, receivers]
        if not columns.any():
            return None
        reach = max(self.graph.before[receivers])
        kept = self.graph.exists[:, receivers] & ~columns
        from_donor = kept.sum(axis=0) < columns.sum(axis=0)
        terms = np.where(from_donor, kept * 1.0, columns * -1.0)[:reach]
        weights = torch.as_tensor(terms).to(self.changes)
        shift = torch.einsum("ur,ubsd->rbsd", weights, self.changes[:reach]).to(state.device)
        chosen = torch.as_tensor(from_donor, device=state.device)[:, None, None, None]
        own, other = state.to(shift.dtype), self.donor[site].to(shift.dtype)
        return torch.where(self.where.to(state.device), torch.where(chosen, other, own) + shift, own).to(state.dtype)

    def _entered(self, layer: int) -> EditSite:
        site, graph = Site("resid_pre", layer), self.graph
        norm = attention_norm(self.model, layer)

        def visit(x: Tensor) -> None:
            self.state[site] = x
            if layer == 0:
                self.changes[0] = self._change(x, FIRST)
            streams = self._streams(x, site, graph.attention(layer))
            if streams is None:
                return
            rows = reading_weights(self.model, graph, layer)
            moved = (_normed(norm, streams) - _normed(norm, x)).to(rows.dtype)
            heads = torch.einsum("hbsd,hed->bshe", moved, rows)
            sizes = [graph.n_heads, graph.n_kv_heads, graph.n_kv_heads]
            for kind, part in zip(("q", "k", "v"), torch.split(heads, sizes, dim=2), strict=True):
                self.added[Site(kind, layer)] = part.flatten(-2)

        return visit

    def _attention_read(self, site: Site) -> EditSite:
        def visit(x: Tensor) -> Tensor | None:
            added = self.added.pop(site, None)
            return None if added is None else x + added.to(x.dtype)

        return visit

    def _heads_wrote(self, layer: int) -> EditSite:
        first = self.graph.head(layer)

        def visit(z: Tensor) -> None:
            donor = self.donor[Site("attn_z", layer)]
            self.changes[first : first + self.graph.n_heads] = head_changes(self.model, self.graph, layer, donor, z)

        return visit

    def _remembered(self, site: Site) -> Callable[[Tensor], None]:
        def visit(x: Tensor) -> None:
            self.state[site] = x

        return visit

    def _mlp_read(self, layer: int) -> EditSite:
        site, receiver = mlp_state(self.graph, layer), self.graph.mlp(layer)
        norm = mlp_norm(self.model, layer)

        def visit(x: Tensor) -> Tensor | None:
            streams = self._streams(self.state[site], site, slice(receiver, receiver + 1))
            return None if streams is None else _normed(norm, streams[0])

        return visit

    def _mlp_wrote(self, layer: int) -> EditSite:
        place = self.graph.head(layer, self.graph.n_heads)

        def visit(x: Tensor) -> None:
            self.changes[place] = self._change(x, Site("mlp_out", layer))

        return visit

    def _final_read(self, x: Tensor) -> Tensor | None:
        streams = self._streams(x, final_state(self.graph), slice(len(self.graph.receivers) - 1, None))
        return None if streams is None else streams[0]


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def faithfulness(
    model: LoadedModel, graph: Graph, runs: Sequence[Run], circuits: Sequence[Mask], metric: Metric = "logprob",
    progress: Progress | None = None,
) -> Array:  # fmt: skip
    """(M(circuit) - M(corrupted)) / (M(clean) - M(corrupted)) of every circuit, all other edges patched [circuits].

    ``runs`` have the clean prompt as base and the corrupted one as donor; a ratio of sums over runs. 1 is the whole
    graph, 0 none of it. What it does not show: that the edges left out are unused (they may carry the same thing), or
    that the circuit does what the model does on other prompts.
    """
    effects = patch_effects(model, runs, [], metric=metric)
    inside = patch_edges(model, graph, runs, [graph.exists & ~c for c in circuits], metric, progress)
    return np.asarray((inside - effects.donor).sum(axis=1) / (effects.base - effects.donor).sum())
