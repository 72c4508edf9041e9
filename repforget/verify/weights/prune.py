"""Is the edit a thin layer over the knowledge, that falls off when small weights are set to zero?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.capture import Batch
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Measurement
from repforget.scoring import encode_many, token_batches
from repforget.scoring.encode import context_limit, pad_id
from repforget.scoring.forward import forward
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import Array, at_best, exam, projections, sweep

Method = Literal["magnitude", "wanda"]
_Y = "probability of the truth"
MEASURES = {
    "magnitude": MeasureInfo("knowledge", "weights", curve=("pruning by magnitude", "share of weights", _Y)),
    "wanda": MeasureInfo("knowledge", "weights", curve=("pruning by Wanda", "share of weights", _Y)),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"shares": [0.3], "texts": 8},
    "standard": {},
    "thorough": {"shares": [0.05, 0.1, 0.2, 0.3, 0.4, 0.5], "texts": 256, "alternatives": 63, "max_items": 1000},
}


def prune(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    methods: Sequence[Method] = ("magnitude", "wanda"), shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    texts: int = 64, forms: int = 1, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Set 10 to 50 % of every projection to zero, by magnitude or by Wanda, and ask again.

    ``magnitude`` drops the smallest \\|W\\| of a matrix, ``wanda`` the smallest \\|W_ij\\| x \\|x_j\\| of each output,
    where x are inputs on up to ``texts`` general texts (retain items where there are none), position 0 and padding left
    out; stacked experts go by magnitude.  Per method the truth's probability under decoding confined to the candidates,
    at the share (0 among them) with the highest mean over items, the same maximum on every arm.  Embedding, unembedding
    and norms stay.  Source: Sun et al. 2023, arXiv 2306.11695.  Cost: one float32 copy, one pass over the texts, one
    pass of questions per method and share.

    No rise does not show absence: pruning also takes from what it could uncover.
    """
    if not methods or any(not 0 <= share < 1 for share in shares):
        raise UsageError(f"Verifier 'prune' has methods {list(methods)} and shares {shares}: give at least one method, "
                         "and shares from 0 to below 1.")  # fmt: skip
    points = sorted({0.0, *shares})
    questions = exam(model, view, references, forms=forms, alternatives=alternatives, max_items=max_items, seed=seed)
    tables: dict[str, Array] = {}
    for method in methods:
        norms = input_norms(model, view, texts, seed) if method == "wanda" else {}
        tables[method] = sweep(model, questions, points, partial(drop_smallest, norms=norms),
                               progress=progress, text=f"pruning by {method}")  # fmt: skip
    return at_best(questions, tables, points, "share")


def drop_smallest(model: LoadedModel, share: float, *, norms: Mapping[str, Tensor]) -> None:
    """Zero the ``share`` of each projection with the lowest scores, per output where input norms are known."""
    for name, weight in projections(model.module).items():
        known = norms.get(name)
        score = weight.abs() if known is None else weight.abs() * known.to(weight)
        score = score.flatten(-2) if known is None else score
        count = int(share * score.shape[-1])
        lowest = score.argsort(dim=-1, stable=True)[..., :count]
        kept = torch.ones_like(score, dtype=torch.bool).scatter_(-1, lowest, False)
        weight.mul_(kept.view_as(weight))


def input_norms(model: LoadedModel, view: View, texts: int, seed: int) -> dict[str, Tensor]:
    """Projection name -> Euclidean norm of each of its inputs [in] over calibration tokens, for linear modules."""
    module = model.module
    owners = {name: name.rpartition(".")[0] for name, weight in projections(module).items() if weight.ndim == 2}
    squares: dict[str, Tensor] = {}
    current: list[Batch] = []
    with ExitStack() as stack:
        for path in dict.fromkeys(owners.values()):
            part = module.get_submodule(path)
            stack.callback(part.register_forward_pre_hook(_sums(path, squares, current)).remove)
        for batch in _calibration(model, view, texts, seed):
            current[:] = [batch]
            forward(model, batch.ids, batch.mask, batch.position_ids, 1)
    return {name: squares[path].sqrt() for name, path in owners.items() if path in squares}


def _sums(path: str, squares: dict[str, Tensor], current: Sequence[Batch]) -> Callable[..., None]:
    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            return
        rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        counted = current[0].mask.bool() & (current[0].position_ids > 0)
        if len(rows) == counted.numel():  # experts behind a router see some tokens only
            rows = rows[counted.flatten().to(rows.device)]
        found = rows.square().sum(0).cpu().double()
        squares[path] = squares[path] + found if path in squares else found

    return before


def _calibration(model: LoadedModel, view: View, texts: int, seed: int) -> list[Batch]:
    parts = [text.strip().partition(" ") for text in view.general[:texts]]
    asked = [(first, " " + rest) for first, _, rest in parts if rest.strip()]
    asked = asked or [(i.questions[0], i.continuation()) for i in ask.limited(view.support, texts, seed)]
    sequences = [e.ids for e in encode_many(model.tokenizer, asked, limit=context_limit(model)) if e.valid]
    if not sequences:
        raise UsageError("Verifier 'prune' has neither general texts nor retain items that fit the context to measure "
                         "inputs on: add some, or ask for methods: [magnitude].")  # fmt: skip
    return [batch for _, batch in token_batches(sequences, token_budget=4096, pad_id=pad_id(model.tokenizer))]
