"""One least-squares edit of many facts at once, spread over the MLPs of several layers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from repforget.artifact import Edit
from repforget.edit.surgery._closed_form import Delta, normal_equation, regular
from repforget.edit.surgery._moments import key_moments, protected_texts
from repforget.edit.surgery._requests import chosen_layers, projections, requests, share_of_layers
from repforget.edit.surgery._spread import walk
from repforget.edit.surgery._values import Wish
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def memit(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layers: Literal["auto"] | list[int] = "auto",
    top_layers: int | Literal["auto"] = "auto", weight: float = 0.5,
    objective: Literal["erase", "inject", "refuse", "lens", "entropy"] = "erase",
    token: Literal["subject_last", "last"] = "last", unit: Literal["auto", "subject", "fact", "prompt"] = "auto",
    contexts: int = 2, lens_layers: Literal["auto"] | list[int] = "auto", k: int = 4, steps: int = 20,
    step_size: float = 0.3, clamp: float = 4.0, kl_weight: float = 0.0625, decay: float = 0.0,
    ridge: float = 0.01, strangers: int = 2000,
) -> Edit:  # fmt: skip
    """Let the MLPs of some layers write something else at the keys of all forget facts, by one least-squares fit each.

    Meng et al. 2022, arXiv 2210.07229: ``Δ = R Kᵀ (λC + K Kᵀ)⁻¹`` at each layer, the lowest first, with keys K
    read again after every layer, R the equal share of what the last layer's block still lacks, and C the second
    moment of keys over retained and general text. A fact given twice counts once.

    Args:
        layers: whose MLPs change; "auto" is the ``top_layers`` best of ``where``, else those that end at
            0.28 of the depth. Values are found at the last of them. top_layers: "auto" is a sixth of all, at least 2.
        weight: how many protected keys C stands for against one for each value, in multiples of m; 0 fits the facts
            alone, more protects more (published: 15000 at m = 16384).
        objective, token, unit, contexts, lens_layers, k, steps, step_size, clamp, kl_weight, decay, ridge, strangers:
            as for rome, which explains them.

    Raises what rome raises, and UsageError for a negative weight. Cost: that of rome, and per layer one forward over
    the prompts and one m x m factorisation. A low probability of the answer does not show that nothing is left
    inside.
    """
    if weight < 0:
        raise UsageError(f"memit was given weight {weight}: give 0 (fit the facts alone) or more.")
    chosen = chosen_layers(model, layers, where, share_of_layers(model, top_layers))
    projections(model, "memit", chosen)
    wish = Wish.of(model, chosen[-1], objective, token, lens_layers, k, steps, step_size, clamp, kl_weight, decay)
    asked = requests(model, data, token=token, unit=unit, aim=objective, contexts=contexts, seed=seed)
    moments = key_moments(model, protected_texts(model, data, strangers, seed), chosen, progress=progress)

    def solve(at: int, keys: Tensor, residuals: Tensor) -> Delta:
        moment = regular(moments[at].second_moment.to(keys.device), ridge)
        return normal_equation(keys, residuals, moment, weight * len(moment))

    done = walk(model, asked, chosen, wish, solve, progress)
    settings = {"layers": chosen, "lens_layers": list(wish.layers)}
    return Edit.build("memit", settings, model, data.digest, done.operations(model), notes=done.notes(asked, wish))
