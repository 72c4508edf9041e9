"""Concept vectors: MLP value vectors whose projection on the vocabulary names the answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, Literal

import numpy as np
import torch

from repforget.artifact import Edit
from repforget.causal import Run, answer_metric, prepare
from repforget.columns import concepts_of, noise_on
from repforget.errors import UsageError
from repforget.knowledge import Fact, Knowledge
from repforget.locate._exact import UNCHECKED, Array, band_of, in_second_half, ranked
from repforget.locate._pairs import Pairs, choose_facts, matched_facts, plain_runs
from repforget.locate._units import expand_nodes, heat_maps
from repforget.models.load import LoadedModel
from repforget.models.value_vectors import concept_scores, projections
from repforget.progress import Progress, track
from repforget.records import Component, Localization


def concept_vectors(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, tokens: int = 100, noise: float = 5.0, items: int = 64, contrast: float = 1.0,
    top: int | Literal["auto"] = 20, draws: int = 50,
) -> Localization:  # fmt: skip
    """Rank MLP value vectors (columns of down projections) by how well the tokens they speak of name the answers.

    A value vector is read out through the final norm and the unembedding. The answers to one relation are a concept; a
    vector scores the discounted cumulative gain of the concept's tokens among its ``tokens`` highest, each weighted by
    how few vectors have it among theirs, 0 to 1; the best concept counts.  Published with a language model as judge of
    coherence, which tokens of known answers replace.

    The band is causal: what noise of ``noise`` times a vector's root mean square, added to the ``top`` vectors that the
    answers of one half of the facts rank, takes from the answers of the other half, less ``contrast`` times what it
    takes from matched retain answers; at most ``items`` of each, against ``draws`` random selections.  (The published
    0.1 is absolute, so that its size depends on the model.)  Of four planted layers two hold its best vector (chance
    is one).

    Cost: one unembedding per neuron, and a forward per item and selection; no gradient.
    What it does not show: vectors that speak of the answer only to later layers, or, where gates make activations
    negative, by what they rank lowest; nor that a vector serves forget facts more than others with the same answers.
    Source: Hong et al. 2024, arXiv 2406.11614.
    """
    if items < 1 or tokens < 1 or noise <= 0:
        raise UsageError(f"concept_vectors was given items={items}, tokens={tokens} and noise={noise}: all three must "
                         "be positive.")  # fmt: skip
    projections(model.module)
    data = knowledge.for_editor()
    components = expand_nodes(model, ("neurons",))
    tokens = min(tokens, model.vocab_size // 2)
    late = in_second_half([fact.cluster for fact in data.forget], seed)
    first = tuple(compress(data.forget, ~late))
    held = choose_facts(tuple(compress(data.forget, late)) or data.forget, items, seed)
    pairs = [plain_runs(model.tokenizer, facts, "all") if facts else Pairs(())
             for facts in (held, matched_facts(held, data.retain, seed))]  # fmt: skip
    asked = [found.runs for found in pairs]

    def scores(facts: Sequence[Fact]) -> Array:
        concepts = concepts_of(model.tokenizer, facts)
        return np.asarray(concept_scores(model.module, concepts, tokens).flatten().numpy(), dtype=np.float64)

    base = [_answers(model, runs) for runs in asked]

    def effect(selections: Sequence[Sequence[Component]]) -> Array:
        shown = track(progress, selections, "noise on value vectors", len(selections))
        return np.array([_taken(model, asked, base, chosen, noise, contrast, seed) for chosen in shown])

    half, _ = ranked(components, scores(first))
    words = "nats that noise on the top {k}, ranked by the answers of one half, takes from the answers of the other"
    told = [note for found in pairs for note in found.notes] + ([] if late.any() else [UNCHECKED])
    band, notes = band_of(components, half, top, draws, seed, words, effect)
    values = scores(data.forget)
    order, best = ranked(components, values)
    settings: dict[str, Any] = {"tokens": tokens, "noise": noise, "items": items, "contrast": contrast, "top": top,
                                "draws": draws, "seed": seed}  # fmt: skip
    cost = {"forwards": float(sum(map(len, asked)) * (band.draws + 2)), "backwards": 0.0, "facts": float(len(held)),
            "unembeddings": 2.0 * len(components)}  # fmt: skip
    return Localization("concept_vectors", order, best, band, cost, settings,
                        heat_maps(components, values, "concept score"), (*told, *notes))  # fmt: skip


@torch.no_grad()
def _answers(model: LoadedModel, runs: Sequence[Run]) -> float:
    """Mean log-probability of the answers in nats."""
    found = [answer_metric(model, item.base, item, "logprob") for item in prepare(model, runs)]
    return float(torch.cat(found).mean()) if found else 0.0


def _taken(
    model: LoadedModel, asked: Sequence[Sequence[Run]], base: Sequence[float], chosen: Sequence[Component],
    noise: float, contrast: float, seed: int,
) -> float:  # fmt: skip
    with Edit.build("noise", {}, model, "", noise_on(model, chosen, noise, seed)).attach(model):
        forget, retain = (before - _answers(model, runs) for before, runs in zip(base, asked, strict=True))
    return forget - contrast * retain
