"""The graph of what writes to the residual stream and what reads it, and circuits cut out of it: pure arithmetic.

Edges are entries of a matrix ``[senders, receivers]``. Senders are the embedding, every head and every MLP; receivers
are the query of every head, the key and the value of every key/value head, every MLP and the final state.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.records import Component, Site

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Growth = Literal["greedy", "top"]


@dataclass(frozen=True)
class Graph:
    """Senders and receivers of a decoder, in the order in which a forward pass reaches them."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool  # attention and MLP of one block read the same state

    @cached_property
    def senders(self) -> tuple[Component, ...]:
        """The embedding, then the heads and the MLP of each layer."""
        found = [Component(Site("embed"))]
        for layer in range(self.n_layers):
            found += [Component(Site("attn_z", layer, h)) for h in range(self.n_heads)]
            found.append(Component(Site("mlp_out", layer)))
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Component, ...]:
        """Queries, keys, values and the MLP of each layer, then the final state."""
        counts = (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads))
        found: list[Component] = []
        for layer in range(self.n_layers):
            found += [Component(Site(kind, layer, h)) for kind, count in counts for h in range(count)]
            found.append(Component(Site("mlp_in", layer)))
        return (*found, Component(Site("logits")))

    @property
    def reads(self) -> int:
        """Number of receivers in attention of one layer."""
        return self.n_heads + 2 * self.n_kv_heads

    def head(self, layer: int, head: int = 0) -> int:
        """Index of a head among the senders; one past the last head is the layer's MLP."""
        return 1 + layer * (self.n_heads + 1) + head

    def attention(self, layer: int) -> slice:
        """The receivers in attention of one layer."""
        return slice(layer * (self.reads + 1), layer * (self.reads + 1) + self.reads)

    def mlp(self, layer: int) -> int:
        """Index of a layer's MLP among the receivers."""
        return layer * (self.reads + 1) + self.reads

    @cached_property
    def before(self) -> tuple[int, ...]:
        """For each receiver, how many of the first senders it reads."""
        counts: list[int] = []
        for layer in range(self.n_layers):
            first = self.head(layer)
            counts += [first] * self.reads + [first if self.parallel else first + self.n_heads]
        return (*counts, len(self.senders))

    @cached_property
    def exists(self) -> Mask:
        """Which pairs of sender and receiver are edges [senders, receivers]."""
        return np.asarray(np.arange(len(self.senders))[:, None] < np.array(self.before)[None, :])

    def inputs(self, sender: int) -> tuple[int, ...]:
        """The receivers from which a sender computes what it writes; none for the embedding."""
        if sender == 0:
            return ()
        layer, place = divmod(sender - 1, self.n_heads + 1)
        if place == self.n_heads:
            return (self.mlp(layer),)
        start, group = self.attention(layer).start, place * self.n_kv_heads // self.n_heads
        return start + place, start + self.n_heads + group, start + self.n_heads + self.n_kv_heads + group


def graph_of(model: LoadedModel) -> Graph:
    """The graph of a model; SiteError where its anatomy is not covered."""
    places = site_map(model.module)
    return Graph(places.n_layers, places.n_heads, places.n_kv_heads, places.parallel)


def edge_order(graph: Graph, scores: Array, growth: Growth) -> list[tuple[int, int]]:
    """Edges (sender, receiver) in the order in which a circuit takes them.

    ``greedy`` starts at the final state and always takes the strongest edge into what is reached so far; ``top`` takes
    edges by strength alone.
    """
    strength = np.where(graph.exists, np.abs(scores), -1.0)
    if growth == "top":
        ranked = np.argsort(-strength, axis=None, kind="stable")[: int(graph.exists.sum())]
        return [(int(k) // strength.shape[1], int(k) % strength.shape[1]) for k in ranked]
    return _grown(graph, strength)


def _grown(graph: Graph, strength: Array) -> list[tuple[int, int]]:
    waiting: dict[int, list[int]] = {}  # receiver -> its senders, strongest last
    heap: list[tuple[float, int, int]] = []

    def offer(r: int) -> None:
        if waiting[r]:
            s = waiting[r].pop()
            heapq.heappush(heap, (-float(strength[s, r]), s, r))

    def reach(receivers: Sequence[int]) -> None:
        for r in receivers:
            if r not in waiting:
                waiting[r] = np.argsort(-strength[: graph.before[r], r], kind="stable")[::-1].tolist()
                offer(r)

    reach([len(graph.receivers) - 1])
    order: list[tuple[int, int]] = []
    while heap:
        _, s, r = heapq.heappop(heap)
        order.append((s, r))
        offer(r)
        reach(graph.inputs(s))
    return order


def pruned(graph: Graph, kept: Mask) -> Mask:
    """Only the edges on some path from the embedding to the final state; the others carry nothing."""
    kept = kept & graph.exists
    alive = np.zeros(len(graph.senders), dtype=bool)
    for s in range(len(alive)):
        alive[s] = s == 0 or any((kept[:, r] & alive).any() for r in graph.inputs(s))
    leads = np.zeros(len(graph.receivers), dtype=bool)
    leads[-1] = True
    for s in reversed(range(len(alive))):
        if (kept[s] & leads).any():
            leads[list(graph.inputs(s))] = True
    return np.asarray(kept & alive[:, None] & leads[None, :])


def circuit(graph: Graph, order: Sequence[tuple[int, int]], size: int) -> Mask:
    """The largest circuit of at most ``size`` edges whose edges are the first of ``order``, without loose ends."""

    def of(length: int) -> Mask:
        kept = np.zeros(graph.exists.shape, dtype=bool)
        if length:
            kept[tuple(np.array(order[:length]).T)] = True
        return pruned(graph, kept)

    low, high = 0, len(order)
    while low < high:  # a longer prefix never has a smaller circuit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if of(middle).sum() <= size else (low, middle - 1)
    return of(low)


def shuffled(graph: Graph, scores: Array, generator: np.random.Generator) -> Array:
    """The same scores dealt to other edges."""
    dealt = np.zeros_like(scores)
    dealt[graph.exists] = generator.permutation(scores[graph.exists])
    return dealt


def component_scores(graph: Graph, scores: Array) -> Array:
    """Summed |score| of the edges out of and into each sender [senders]; what heads share counts for each of them."""
    size = np.where(graph.exists, np.abs(scores), 0.0)
    into = size.sum(axis=0)
    return np.asarray(size.sum(axis=1) + [into[list(graph.inputs(s))].sum() for s in range(len(graph.senders))])
