"""One step that influence functions foretell for leaving the forget facts out of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repforget.artifact import DenseDelta, Edit
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.edit.train._climb import Split, longest, measure, put, split_rows, uphill
from repforget.errors import NumericalError, UsageError
from repforget.influence import Curvature, curvature, linear_maps
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization
from repforget.training import Example, only


def influence_removal(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, max_divergence: float = 0.02, damping: float = 0.1, draws: int = 1,
    floor: float = 0.0, max_facts: int = 2000,
) -> Edit:  # fmt: skip
    """Take the one damped inverse-curvature step by which a training without the forget facts would differ.

    ``W += s (H + λ)⁻¹ ∇_W L_F`` at the linear maps of the blocks, or those that ``where`` names: influence functions
    upweight each forget fact by -1 (Koh and Liang 2017, ICML), with H the EK-FAC Gauss-Newton matrix of
    retained facts and general text (George et al. 2018, arXiv 1806.03884) and L_F the mean negative log-probability of
    the forget answers.  How many predictions the training had is not known, so that the length s is the longest whose
    measured divergence from the unedited model stays within ``max_divergence``, on every fifth retained cluster (no
    part of H) and on general text, whichever is more; the notes say how often the foretold length that is.

    It differs from k_fade in that the gradient is taken once, at the unedited model; that the eigenvalues are refitted
    and labels drawn from the model as it is (the true Fisher, no temperature); and that attention takes part.  What one
    linear step does not reach it leaves.

    Args:
        max_divergence: divergence in nats per token that may be spent.
        damping: λ as a share of the mean eigenvalue of each map; large values are one step of plain gradient ascent.
        draws: labels drawn per prediction for the curvature.
        floor: a fact at or below this answer probability does not push.
        max_facts: facts read per set, chosen by seed.

    Raises SiteError where ``where`` names no linear map, KnowledgeError without usable facts on both sides,
    NumericalError where no length is within the budget.  Cost: 2 ``draws`` forwards and backwards over the retained
    rows, one over the forget rows, up to eight forwards over those set aside; per map the float64 factors.  It is no
    retraining: nothing bounds how far the result is from a model that never saw the facts.
    """
    if min(max_divergence, damping) <= 0:
        raise UsageError(f"influence_removal was given a divergence of {max_divergence} and a damping of {damping}: "
                         "give positive numbers.")  # fmt: skip
    rows = split_rows(model, data, max_facts, seed, "influence_removal")
    names = linear_maps(model, where)
    examples = [Example(row.ids, tuple(k >= row.start for k in range(len(row.ids)))) for row in rows.kept]
    made = curvature(model, examples, names, seed=seed, draws=draws, progress=progress)
    deltas, notes = _stepped(model, rows, names, made, max_divergence, damping, floor)
    operations = [DenseDelta(name, delta.cpu()) for name, delta in deltas.items()]
    settings = {"max_divergence": max_divergence, "damping": damping, "draws": draws, "floor": floor,
                "max_facts": max_facts}  # fmt: skip
    return Edit.build("influence_removal", settings, model, data.digest, operations, notes=notes)


def _stepped(
    model: LoadedModel, rows: Split, names: tuple[str, ...], made: Curvature, budget: float, damping: float,
    floor: float,
) -> tuple[dict[str, Tensor], list[str]]:  # fmt: skip
    """The change of every map, and what was seen; the model is left as it was."""
    trained = {name: model.module.get_parameter(name) for name in names}
    originals = {name: p.detach().clone() for name, p in trained.items()}
    divergence = measure(model, rows.aside)
    try:
        with only(model.module, list(trained.values())):
            gradients, before, left = uphill(model, rows.forget, trained, floor)
            if not left:
                raise UsageError(f"No forget fact has an answer probability above {floor:g}, so that nothing pushes: "
                                 "lower 'floor'.")  # fmt: skip
            moves, predicted = {}, 0.0
            for name, gradient in gradients.items():
                turned = is_conv1d(owner_of(model.module, name)[0])
                move = made.factors[name].natural(gradient.T if turned else gradient, damping)
                predicted += made.factors[name].divergence(move)
                moves[name] = (move.T if turned else move).float()

            def at(size: float) -> float:
                put(trained, originals, {name: size * move for name, move in moves.items()})
                return divergence()

            size, spent = longest(at, budget, math.sqrt(budget / predicted))
            if size == 0:
                raise NumericalError(f"No length of the step stays within {budget:g} nats of divergence: allow more, "
                                     "or raise 'damping'.")  # fmt: skip
            _, after, _ = uphill(model, rows.forget, trained, floor)
    finally:
        put(trained, originals, None)
    foretold = len(rows.forget) / made.predictions
    notes = [f"mean answer probability of forget facts {before:.3g} before and {after:.3g} after, divergence "
             f"{spent:.3g} nats", f"the step is {size / foretold:.3g} times what is foretold for as many facts among "
             f"{made.predictions} predictions"]  # fmt: skip
    return {name: torch.mul(move, size) for name, move in moves.items()}, notes
