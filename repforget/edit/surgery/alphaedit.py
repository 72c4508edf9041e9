"""Least-squares edits of many facts, projected off every direction that keys of kept text have."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from repforget.artifact import Edit
from repforget.edit.surgery._closed_form import Delta, null_space, projected
from repforget.edit.surgery._moments import key_moments, protected_texts
from repforget.edit.surgery._requests import chosen_layers, projections, requests, share_of_layers
from repforget.edit.surgery._spread import walk
from repforget.edit.surgery._values import Wish
from repforget.errors import NumericalError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def alphaedit(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layers: Literal["auto"] | list[int] = "auto",
    top_layers: int | Literal["auto"] = "auto", threshold: float = 0.1,
    objective: Literal["erase", "inject", "refuse", "lens", "entropy"] = "erase",
    token: Literal["subject_last", "last"] = "last", unit: Literal["auto", "subject", "fact", "prompt"] = "subject",
    contexts: int = 8, lens_layers: Literal["auto"] | list[int] = "auto", k: int = 4, steps: int = 20,
    step_size: float = 0.3, clamp: float = 4.0, kl_weight: float = 0.0625, decay: float = 0.0,
    ridge: float = 0.01, strangers: int = 2000,
) -> Edit:  # fmt: skip
    """Let the MLPs of some layers write something else at the forget keys, along directions that kept keys lack.

    Fang et al. 2024, arXiv 2410.02355: with P the projection on the eigenvectors of the second moment of kept keys
    (retained and general text) whose eigenvalues are small, ``Δ = R K_Pᵀ (K_P K_Pᵀ + ridge)⁻¹ P`` with K_P = P K, so
    that a kept key inside the other eigenvectors is written as before. Layers and values as in memit.

    Args:
        layers: whose MLPs change; "auto" is the ``top_layers`` best of ``where``, else those that end at
            0.28 of the depth. Values are found at the last of them. top_layers: "auto" is a sixth of all, at least 2.
        threshold: eigenvalues up to this share of the mean one count as null (published: 0.02, of whatever size).
        ridge: against large steps, as a share of the mean squared length of a key.
        objective, token, unit, contexts, lens_layers, k, steps, step_size, clamp, kl_weight, decay, strangers: as for
            rome, which explains them.

    Raises what rome raises, and NumericalError where a layer has no null space or one of fewer directions than there
    are values, with the number that fits. Cost: that of rome, and per layer one forward over the prompts and one m x m
    eigendecomposition. What is kept is kept for keys like those of the text that was read, not for others, and a low
    probability of the answer does not show that nothing is left inside.
    """
    if not 0 < threshold < 1 or ridge < 0:
        raise UsageError(f"alphaedit was given threshold {threshold} and ridge {ridge}: give a share between 0 and 1, "
                         "and 0 or more.")  # fmt: skip
    chosen = chosen_layers(model, layers, where, share_of_layers(model, top_layers))
    projections(model, "alphaedit", chosen)
    wish = Wish.of(model, chosen[-1], objective, token, lens_layers, k, steps, step_size, clamp, kl_weight, decay)
    asked = requests(model, data, token=token, unit=unit, aim=objective, contexts=contexts, seed=seed)
    moments = key_moments(model, protected_texts(model, data, strangers, seed), chosen, progress=progress)
    basis = {layer: null_space(moments[layer].second_moment, threshold) for layer in chosen}
    for layer, directions in basis.items():
        _check(layer, directions.shape[1], len(directions), len(asked.names), threshold)

    def solve(at: int, keys: Tensor, residuals: Tensor) -> Delta:
        return projected(keys, residuals, basis[at].to(keys.device), ridge)

    done = walk(model, asked, chosen, wish, solve, progress)
    room = ", ".join(f"{directions.shape[1]} in layer {layer}" for layer, directions in basis.items())
    settings = {"layers": chosen, "lens_layers": list(wish.layers)}
    notes = (*done.notes(asked, wish), f"null directions of {len(directions)}: {room}")
    return Edit.build("alphaedit", settings, model, data.digest, done.operations(model), notes=notes)


def _check(layer: int, room: int, width: int, values: int, threshold: float) -> None:
    if room == 0:
        raise NumericalError(f"Keys of kept text fill all {width} directions of layer {layer} at threshold "
                             f"{threshold:g}, so that no fact fits: give a larger threshold, or another "
                             "layer.")  # fmt: skip
    if values > room:
        raise NumericalError(f"The null space of layer {layer} has {room} directions at threshold {threshold:g}: at "
                             f"most {room} of the {values} values fit, so give a larger threshold, fewer facts, or "
                             "unit: subject.")  # fmt: skip
