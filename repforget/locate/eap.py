"""Edge attribution patching: one gradient estimates the effect of every edge, and a circuit is cut from the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from repforget.causal import Metric
from repforget.knowledge import Knowledge
from repforget.locate._edge_locator import Plan, locate_edges
from repforget.locate._exact import Control
from repforget.locate._graph import Growth
from repforget.locate._tasks import Mode
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def eap(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, mode: Mode = "both", metric: Metric = "logprob", items: int = 64,
    partners: int = 2, contrast: float = 0.0, growth: Growth = "greedy", edges: int | Literal["auto"] = "auto",
    faithful: float = 0.8, recheck: int = 20, top: int | Literal["auto"] = "auto", draws: int = 100,
    control: Control = "mean",
) -> Localization:  # fmt: skip
    """Score every edge between what writes to the residual stream and what reads it; give the circuit they form.

    Senders are the embedding, every head and every MLP; receivers are query, key and value of every head (key and
    value of a group of query heads are one receiver), every MLP and the final state. Score of an edge: the sender's
    change from base to donor times dM/d(stream) as that receiver alone reads it, summed over positions, at the base;
    pairs, ``mode``, ``contrast`` and the scale are those of activation_patching. A norm behind the heads is split by
    its secant, so that what the senders write always adds up to the stream.

    ``growth`` cuts the circuit: ``greedy`` from the final state backwards, ``top`` by strength; edges on no path from
    the embedding are dropped. ``edges`` is its size, or ``auto``: the smallest that is ``faithful`` on the half of the
    facts that ranks it. Faithfulness is reported on the other half, measured exactly, with all other edges patched to
    the corrupted run, beside circuits grown from shuffled scores. Heads and MLPs are ranked by the summed |score| of
    their edges, and their band is that of activation_patching.

    With facts planted in one MLP of four and a contrast of 1, that MLP leads the other MLPs in 2 of 4 models (chance
    is 1), because many edges meet in the first MLP whatever the fact; by the signed sum of its edges out, which is in
    the tables, in 4 of 4.

    Cost: two forward passes and one forward and backward pass per pair and direction for all edges together; one
    forward pass per circuit and pair, ``recheck`` for single edges, and the band.
    What it does not show: effects through saturated attention or a sure answer (their gradient is zero, see eap_ig);
    that edges outside a faithful circuit are unused, since they may carry the same; anything about other prompts.
    Source: Syed, Rager & Conmy 2023, arXiv 2310.10348.
    """
    plan = Plan(items, partners, mode, metric, contrast, 1, growth, edges, faithful, recheck, top, draws, control, seed)
    return locate_edges("eap", model, knowledge, plan, "steps", progress)
