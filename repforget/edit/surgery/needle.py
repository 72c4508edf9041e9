"""Spoil or remove the MLP value vectors that speak of the answers."""

from __future__ import annotations

from typing import Literal

from repforget.artifact import Edit
from repforget.columns import column_deltas, concepts_of, noise_on, value_vector
from repforget.edit.surgery._units import best_neurons
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.value_vectors import concept_scores, projections
from repforget.progress import Progress
from repforget.records import Component, Localization, Site


def needle(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, mode: Literal["noise", "removal"] = "noise", noise: float = 5.0,
    vectors: int = 20, tokens: int = 100,
) -> Edit:  # fmt: skip
    """Add noise to the MLP value vectors that speak of the answers, or set them to zero; nothing else changes.

    The value vectors are those that the locator ``concept_vectors`` ranks highest: read out in the vocabulary, they
    name the answers to a relation. ``v + noise rms(v) N(0, 1)``, drawn once from the untouched vector (released code
    draws on top of earlier draws).  Source: Hong et al. 2024, arXiv 2406.11614, where the noise is 0.1 for all models
    and the vectors are tuned afterwards.

    Args:
        mode: "noise" or "removal" (zero).
        noise: standard deviation per entry, in units of each vector's own root mean square.
        vectors: how many; not used where ``where`` ranks neurons: then as many of its best as its band was made with.
        tokens: of each vector's readout that are looked at.

    Raises SiteError for batched experts, NoEffectError at zero noise.  Cost: one unembedding per neuron; no forward
    pass.

    Weakness: a reference more than a remedy. It knows the answers, spoils all facts that have them, kept ones as well,
    and what a vector says to later layers is not what its readout shows.
    """
    if vectors < 1 or tokens < 1 or noise < 0:
        raise UsageError(f"needle was given vectors={vectors}, tokens={tokens} and noise={noise}: give at least one "
                         "vector and token, and noise of 0 or more.")  # fmt: skip
    refs = projections(model.module)
    chosen = best_neurons(where)
    notes = [f"the {len(chosen)} best neurons of the localisation"]
    if not chosen:
        scores = concept_scores(model.module, concepts_of(model.tokenizer, data.forget),
                                min(tokens, model.vocab_size // 2))  # fmt: skip
        flat, width = scores.flatten(), scores.shape[1]
        order = flat.argsort(descending=True, stable=True)[:vectors].tolist()
        chosen = tuple(Component(Site("mlp_post", k // width), k % width) for k in order)
        notes = [f"concept scores {float(flat[order[0]]):.2f} to {float(flat[order[-1]]):.2f}, median of all "
                 f"{float(flat.median()):.2f}, in {len(refs)} layers"]  # fmt: skip
    if mode == "noise":
        operations = noise_on(model, chosen, noise, seed)
    else:
        operations = column_deltas(model, {neuron: -value_vector(model, neuron) for neuron in chosen})
    return Edit.build("needle", {"chosen": [str(c) for c in chosen]}, model, data.digest, operations, notes=notes)
