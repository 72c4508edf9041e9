"""Rank-one edits of one MLP, a fact at a time, so that it writes what makes the fact go."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from repforget.artifact import Edit
from repforget.edit.surgery._closed_form import Delta, rank_ones, regular
from repforget.edit.surgery._moments import key_moments, protected_texts
from repforget.edit.surgery._requests import chosen_layers, projections, requests
from repforget.edit.surgery._spread import walk
from repforget.edit.surgery._values import Wish
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def rome(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layer: int | Literal["auto"] = "auto",
    objective: Literal["erase", "inject", "refuse", "lens", "entropy"] = "erase",
    token: Literal["subject_last", "last"] = "last", unit: Literal["auto", "subject", "fact", "prompt"] = "auto",
    contexts: int = 2, lens_layers: Literal["auto"] | list[int] = "auto", k: int = 4, steps: int = 20,
    step_size: float = 0.3, clamp: float = 4.0, kl_weight: float = 0.0625, decay: float = 0.0,
    ridge: float = 0.01, strangers: int = 2000,
) -> Edit:  # fmt: skip
    """Let the MLP of one layer write something else at the key of each forget fact, by rank-one updates in turn.

    r-ROME (Gupta et al. 2024, arXiv 2403.07175, after Meng et al. 2022, arXiv 2202.05262):
    ``W += (v* - W k*) (C⁻¹k*)ᵀ / (k*ᵀC⁻¹k*)`` with the same averaged key k* in both places and C the second moment of
    keys over retained and general text. Values v* are optimised for a deletion objective (Patil et al. 2023,
    arXiv 2309.17410). One fact is met exactly; each later one disturbs the earlier, as far as their keys are alike
    under C⁻¹, which for hundreds of facts is often more than what was meant (compare memit).

    Args:
        layer: whose MLP changes; "auto" is the best of ``where``, else the one at 0.28 of the depth.
        objective: erase (the answer gets no likelier than a token at random), inject (another answer of the relation,
            drawn by seed), refuse ("I don't know"), lens (head projection: the first answer token stays off the ``k``
            best and the k worst of the logit lens at ``lens_layers``), entropy (that lens becomes uniform).
        token: where keys are read, the last token of the subject or of the prompt.
        unit: what shares one key and value: a subject, a fact in all its statements, or one prompt; "auto" is the
            subject at its own last token, else the fact. contexts: prompts per unit at most, drawn by seed.
        lens_layers: whose readout counts; "auto" is every layer that the value reaches. k: ranks kept clear.
        steps: of Adam on the values. step_size: length of a step, relative to what the layer writes there.
        clamp: longest added vector, in the same measure. kl_weight: of the divergence after "<subject> is a".
            decay: of the squared relative length.
        ridge: added to C, as a share of its mean diagonal. strangers: made-up facts in the text of C, so that people
            the editor is not shown are protected too.

    Raises SiteError where an MLP has no single output projection (batched experts) or the value reaches no listed
    layer, KnowledgeError where a subject is not in its prompt, NumericalError for a singular C or a solve that is not
    finite. Cost: one forward over the protected text (kept by content, see REPFORGET_CACHE), ``steps`` forwards and
    backwards over the prompts, one m x m factorisation. A low probability of the answer does not show that nothing
    is left inside.
    """
    layers = chosen_layers(model, "auto" if layer == "auto" else [layer], where, 1)
    projections(model, "rome", layers)
    wish = Wish.of(model, layers[-1], objective, token, lens_layers, k, steps, step_size, clamp, kl_weight, decay)
    asked = requests(model, data, token=token, unit=unit, aim=objective, contexts=contexts, seed=seed)
    moments = key_moments(model, protected_texts(model, data, strangers, seed), layers, progress=progress)

    def solve(at: int, keys: Tensor, residuals: Tensor) -> Delta:
        return rank_ones(keys, residuals, regular(moments[at].second_moment.to(keys.device), ridge))

    done = walk(model, asked, layers, wish, solve, progress)
    settings = {"layer": layers[0], "lens_layers": list(wish.layers)}
    return Edit.build("rome", settings, model, data.digest, done.operations(model), notes=done.notes(asked, wish))
