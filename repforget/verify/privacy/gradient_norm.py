"""Gradient-norm membership: a text that was trained on pulls less at the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import encode_many
from repforget.scoring.encode import context_limit
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.privacy import _matched as matched

Norm = Literal["1", "2", "inf"]
Over = Literal["tensors", "global"]
MEASURES = {"norm": MeasureInfo("knowledge", "white-box", votes=False)}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"alternatives": 3, "max_items": 20},
    "standard": {},
    "thorough": {"alternatives": 15, "max_items": 120},
}
Array = NDArray[np.float64]


def gradient_norm(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    norm: Norm = "2", over: Over = "tensors", parameters: str = "", alternatives: int = 7,
    asked: matched.Asked = "questions", holdout: str = "", max_items: int = 60,
) -> Measurement:  # fmt: skip
    """Rank each forget item among matched non-members by the norm of its loss gradient, smaller = member.

    The score is minus the ``norm`` (1, 2 or inf) of the gradient of the mean answer loss: the mean of the norms of the
    parameter tensors, or with ``over="global"`` the norm of all of them as one vector.  ``parameters`` is a regular
    expression over parameter names (empty: all).  The value is the share of non-members (other answers to the same
    text, or ``holdout``) that score lower, ties half.  Dropout stays off and the model's own gradients are not touched.
    Source: the gradient-norm baseline of open-unlearning.  Cost: one forward and backward pass per text, items x
    (1 + ``alternatives``) of them, and one gradient of the chosen parameters in memory.

    An edit whose hooks pass no gradient gives ties, thus chance; that does not show that nothing is left.
    """
    items = ask.limited(view.forget, max_items, seed)
    found = matched.texts(items, view.knowledge, forms=1, limit=alternatives, asked=asked, holdout=holdout)
    scores = -norms(model, found.pairs, norm=norm, over=over, parameters=parameters, progress=progress)
    before = matched.prior_standing(items, view.knowledge, alternatives, holdout)
    columns = {"norm": matched.standing(scores, found), "norm_prior": before}
    return Measurement({name: ask.scores(items, c) for name, c in columns.items()},
                       facts=matched.rates("norm", scores, found))  # fmt: skip


def norms(
    model: LoadedModel, pairs: Sequence[matched.Pair], *, norm: Norm = "2", over: Over = "tensors",
    parameters: str = "", progress: Progress | None = None,
) -> Array:  # fmt: skip
    """Gradient norm of each text's mean answer loss [m]; NaN where a text does not fit the context."""
    # Detached aliases take the gradients: the model's own parameters keep flags, and no .grad appears.
    wanted = re.compile(parameters)
    chosen = {name: p.detach().requires_grad_() for name, p in model.module.named_parameters() if wanted.search(name)}
    if not chosen:
        raise UsageError(f"Verifier 'gradient_norm' finds no parameter that matches '{parameters}': check the names.")
    encoded = encode_many(model.tokenizer, list(pairs), limit=context_limit(model))
    out = np.full(len(encoded), np.nan)
    for k, e in track(progress, list(enumerate(encoded)), "taking gradients"):
        if e.valid:
            loss = _loss(model, chosen, e.ids, e.start)
            found = _gradients(loss, list(chosen.values()))
            out[k] = _size(found, float(norm), over)
    return out


def _loss(model: LoadedModel, chosen: dict[str, Tensor], ids: Sequence[int], start: int) -> Tensor:
    row = torch.tensor([ids], device=model.device)
    with torch.enable_grad():
        logits = functional_call(model.module, chosen, (), {"input_ids": row[:, :-1], "use_cache": False}).logits
        return torch.nn.functional.cross_entropy(logits[0, start - 1 :].float(), row[0, start:])


def _gradients(loss: Tensor, over: Sequence[Tensor]) -> Iterable[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in over]
    found = torch.autograd.grad(loss, list(over), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(over, found, strict=True)]


def _size(gradients: Iterable[Tensor], norm: float, over: Over) -> float:
    sizes = [float(torch.linalg.vector_norm(g.float(), norm)) for g in gradients]
    if over == "tensors":
        return math.fsum(sizes) / len(sizes)
    return float(np.linalg.norm(sizes, norm))
