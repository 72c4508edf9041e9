"""What the edge locators share: scores of edges, a circuit cut from them, its faithfulness, components and controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from repforget.causal import Metric, Run, patch_effects
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._circuit import faithfulness, patch_edges
from repforget.locate._edges import edge_attributions
from repforget.locate._exact import (
    BandPlan,
    Control,
    Moves,
    Task,
    exact_band,
    in_second_half,
    join,
    mean_gap,
    moves_of,
    pearson,
    ranked,
)
from repforget.locate._graph import (
    Array,
    Graph,
    Growth,
    Mask,
    circuit,
    component_scores,
    edge_order,
    graph_of,
    shuffled,
)
from repforget.locate._tasks import Mode, corrupted_tasks
from repforget.locate._units import heat_maps
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Edge, Localization

RANDOM_CIRCUITS = 20
FAITHFULNESS = "faithfulness by number of edges"


@dataclass(frozen=True)
class Plan:
    """Settings of an edge locator, named as there; ``mode`` is the direction whose gradients are taken."""

    items: int
    partners: int
    mode: Mode
    metric: Metric
    contrast: float
    steps: int
    growth: Growth
    edges: int | Literal["auto"]
    faithful: float
    recheck: int
    top: int | Literal["auto"]
    draws: int
    control: Control
    seed: int


@dataclass(frozen=True)
class EdgeScores:
    """Share of the gap by edge [senders, receivers]: on all facts, on the first half of them, and mean |share|."""

    all: Array
    half: Array
    absolute: Array


def locate_edges(
    method: str, model: LoadedModel, knowledge: Knowledge, plan: Plan, fixed: str, progress: Progress | None
) -> Localization:
    """Score edges, cut a circuit, rank heads and MLPs by their edges, and measure both on other facts.

    ``fixed`` is the field of the plan that is no setting of this method.
    """
    graph = graph_of(model)
    both, notes = corrupted_tasks(model, knowledge, plan.seed, items=plan.items, partners=plan.partners, mode="both",
                                  metric=plan.metric, contrast=plan.contrast)  # fmt: skip
    tasks = {"denoise": both[:1], "noise": both[1:], "both": both}[plan.mode]
    _check(graph, plan)
    scores = score_edges(tasks, graph, plan, progress)
    components = graph.senders[1:]
    order, values = ranked(components, component_scores(graph, scores.all)[1:])
    half_order, _ = ranked(components, component_scores(graph, scores.half)[1:])
    control = BandPlan(plan.top, plan.draws, plan.control, plan.seed)
    band, band_notes, band_cost = exact_band(both, components, half_order, control, progress)
    kept, tables, told, passes = _circuits(both[1], graph, scores, plan, progress)
    checked = _recheck(both, graph, scores.all, plan.recheck, progress)
    runs = float(sum(len(task.forget) + len(task.retain) for task in tasks))
    every = float(sum(len(task.forget) + len(task.retain) for task in both))
    cost = {"forwards": runs * (plan.steps + 4) + every * (plan.recheck + 4) + passes + band_cost,
            "backwards": runs * plan.steps, "facts": float(len({run.id for run in both[0].forget}))}  # fmt: skip
    places = sorted(zip(*np.nonzero(kept), strict=True), key=lambda e: (-abs(scores.all[e]), e))
    edges = tuple(Edge(graph.senders[s], graph.receivers[r], float(scores.all[s, r])) for s, r in places)
    for label, found in (("summed |edge score|", scores.all), ("summed mean |edge score|", scores.absolute)):
        tables |= heat_maps(components, component_scores(graph, found)[1:], label)
    tables |= heat_maps(components, scores.all.sum(axis=1)[1:], "sum of edges out")
    settings = {name: value for name, value in vars(plan).items() if name != fixed}
    return Localization(method, order, values, band, cost, settings, tables, (*notes, *checked, *told, *band_notes),
                        edges)  # fmt: skip


def _check(graph: Graph, plan: Plan) -> None:
    total = int(graph.exists.sum())
    if plan.edges != "auto" and not 1 <= plan.edges <= total:
        raise UsageError(f"A circuit of {plan.edges} edges cannot be cut from a graph of {total}: ask for 1 to {total} "
                         "or 'auto'.")  # fmt: skip
    if not 0 < plan.faithful <= 1:
        raise UsageError(f"A circuit cannot be asked to be {plan.faithful} faithful: 1 is the whole model, so choose "
                         "above 0 and at most 1.")  # fmt: skip


def score_edges(tasks: Sequence[Task], graph: Graph, plan: Plan, progress: Progress | None = None) -> EdgeScores:
    """First-order shares of the gap that every edge carries, less ``contrast`` times those on retain facts."""
    seed = plan.seed
    gap = np.concatenate([task.sign * patch_effects(task.model, task.forget, [], metric=task.metric).gap
                          for task in tasks])  # fmt: skip
    early = np.concatenate([~_late(task.forget, seed) for task in tasks])
    forget = [_means(task, task.forget, graph, plan, progress) for task in tasks]
    whole, half, absolute = (np.mean([part[k] for part in forget], axis=0) for k in range(3))
    if plan.contrast:
        retain = [_means(task, task.retain, graph, plan, progress) for task in tasks if task.retain]
        whole, half = (own - plan.contrast * np.mean([part[k] for part in retain], axis=0)
                       for k, own in enumerate((whole, half)))  # fmt: skip
    return EdgeScores(whole / mean_gap(gap), half / mean_gap(gap[early]), absolute / mean_gap(gap))


def _late(runs: Sequence[Run], seed: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    late = in_second_half([run.cluster for run in runs], seed)
    return ~late if late.all() else late


def _means(task: Task, runs: Sequence[Run], graph: Graph, plan: Plan, progress: Progress | None) -> list[Array]:
    """Mean over all runs, over those of the first half of the clusters, and of the absolute value."""
    early = ~_late(runs, plan.seed)
    sums = [np.zeros(graph.exists.shape) for _ in range(3)]
    for rows, found in edge_attributions(task.model, graph, runs, task.metric, plan.steps, progress):
        parts = task.sign * found
        for total, part in zip(sums, (parts, parts[early[list(rows)]], np.abs(parts)), strict=True):
            total += part.sum(axis=0)
    return [total / count for total, count in zip(sums, (len(runs), early.sum(), len(runs)), strict=True)]


def measure_edges(tasks: Sequence[Task], graph: Graph, places: Sequence[tuple[int, int]],
                  progress: Progress | None = None) -> Moves:  # fmt: skip
    """Exact moves of patching single edges (path patching), everything behind them computed again."""
    patches = [np.zeros(graph.exists.shape, dtype=bool) for _ in range(len(places) + 1)]
    for patch, place in zip(patches[1:], places, strict=True):
        patch[place] = True

    def moved(task: Task, runs: Sequence[Run]) -> Array:
        if not runs:
            return np.zeros((len(places), 0))
        scores = patch_edges(task.model, graph, runs, patches, task.metric, progress)
        return np.asarray(scores[1:] - scores[0])

    return join([moves_of(task, moved(task, task.forget),
                          patch_effects(task.model, task.forget, [], metric=task.metric).gap, moved(task, task.retain))
                 for task in tasks])  # fmt: skip


def _recheck(
    tasks: Sequence[Task], graph: Graph, scores: Array, count: int, progress: Progress | None
) -> tuple[str, ...]:
    places = edge_order(graph, scores, "top")[:count]
    if len(places) < 2:
        return ()
    exact = measure_edges(tasks, graph, places, progress).scores(tasks[0].contrast)
    agreement = pearson([scores[place] for place in places], exact)
    return (f"Scores of edges are first-order estimates; exact patching of the {len(places)} strongest gives a Pearson "
            f"correlation of {agreement:.2f} with them.",)  # fmt: skip


def ladder(total: int) -> list[int]:
    """Sizes of circuits that are tried: 5, 10, 20, 50, ... below the whole graph."""
    sizes = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]
    return [size for size in sizes if 5 <= size < total] or [max(1, total - 1)]


def _circuits(
    task: Task, graph: Graph, scores: EdgeScores, plan: Plan, progress: Progress | None
) -> tuple[Mask, dict[str, Sequence[Sequence[float]]], tuple[str, ...], float]:
    """The circuit, tables of faithfulness on the second half of the facts, notes, and forward passes spent.

    An automatic size is the first that is faithful on the half that ranks the edges.
    """
    early, late = (task.half(second, plan.seed).forget for second in (False, True))
    held = late or task.forget
    order = edge_order(graph, scores.half, plan.growth)
    sizes = sorted({*ladder(int(graph.exists.sum())), *([] if plan.edges == "auto" else [plan.edges])})
    tried = [circuit(graph, order, n) for n in sizes]
    size, enough, asked = plan.edges, True, 0
    if size == "auto":
        values = faithfulness(task.model, graph, early, tried, task.metric, progress) >= plan.faithful
        enough, asked = bool(values.any()), len(early) * len(sizes)
        size = sizes[int(np.argmax(values)) if enough else -1]
    curve = faithfulness(task.model, graph, held, tried, task.metric, progress)
    generator = np.random.default_rng(plan.seed)
    dealt = [edge_order(graph, shuffled(graph, scores.half, generator), plan.growth) for _ in range(RANDOM_CIRCUITS)]
    chance = faithfulness(task.model, graph, held, [circuit(graph, o, size) for o in dealt], task.metric, progress)
    kept = circuit(graph, edge_order(graph, scores.all, plan.growth), size)
    reached, limits = float(curve[sizes.index(size)]), [float(f(chance)) for f in (np.min, np.median, np.max)]
    notes = [f"A circuit of at most {size} of {int(graph.exists.sum())} edges, ranked on one half of the facts, has a "
             f"faithfulness of {reached:.2f} on the other half; {RANDOM_CIRCUITS} circuits grown from shuffled scores "
             f"reach {limits[0]:z.2f} to {limits[2]:z.2f} (median {limits[1]:z.2f})."]  # fmt: skip
    if reached <= limits[2]:
        notes.append("The circuit does not beat random circuits of equal size: no circuit is claimed.")
    if not enough:
        notes.append(f"No circuit of up to {sizes[-1]} edges is {plan.faithful:g} faithful on the half of the facts "
                     "that ranked them: the largest is given.")  # fmt: skip
    names = ", ".join(map(str, sizes))
    control = f"faithfulness of {RANDOM_CIRCUITS} random circuits of {size} edges: lowest, median, highest"
    tables: dict[str, Sequence[Sequence[float]]] = {f"{FAITHFULNESS}: {names}": [curve.tolist()], control: [limits]}
    return kept, tables, tuple(notes), float(asked + len(held) * (len(sizes) + RANDOM_CIRCUITS + 4))
