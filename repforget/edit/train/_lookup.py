"""A trained token embedding, cut down to the rows that can change: those of the tokens that the data has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.edit.train._pass import Term
from repforget.edit.train._settings import Settings
from repforget.models.load import LoadedModel
from repforget.scoring.encode import pad_id

WORTH = 1 / 3  # share of the vocabulary in the data from which the whole table is trained, and its change stored whole


@dataclass(frozen=True, eq=False)
class Lookup:
    """``rows`` [r, d] are trained in the place of those of ``tokens`` [r] in the embedding ``module``, [V, d]."""

    name: str
    module: nn.Embedding
    tokens: Tensor
    rows: nn.Parameter

    def index(self, changed: Tensor) -> Tensor:
        """Places in the flattened embedding of places [k] in the flattened rows."""
        width = self.rows.shape[1]
        return self.tokens.to(changed.device)[changed // width] * width + changed % width


def lookup(model: LoadedModel, shared: Settings, terms: Sequence[Term], names: Sequence[str]) -> Lookup | None:
    """The rows of a trained embedding that the terms' texts read; None where others may change too, or it is not worth
    it.

    A row that is not read has no gradient, so that no optimiser here moves it; what it would get besides are decay
    and, where it is the output embedding as well, a share in every loss.
    """
    module: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    if type(module) is not nn.Embedding or "forward" in vars(module) or module.max_norm or module.scale_grad_by_freq:
        return None
    name = next((n for n, p in model.module.named_parameters() if p is module.weight), "")
    owners = sum(p is module.weight for m in model.module.modules() for p in m._parameters.values())
    if name not in names or owners > 1 or shared.weight_decay or not all(term.data.fixed for term in terms):
        return None
    rows = [row for term in terms for row in term.data.own]
    rows += [t.data.instead(0, i) for t in terms if t.data.instead is not None for i in range(len(t.data.own))]
    found = sorted({token for row in rows for token in row.ids} | {pad_id(model.tokenizer)})
    if len(found) > WORTH * len(module.weight):
        return None
    tokens = torch.tensor(found, device=module.weight.device)
    return Lookup(name, module, tokens, nn.Parameter(module.weight.detach()[tokens]))


@contextmanager
def looked_up(found: Lookup | None) -> Iterator[None]:
    """Inside, the embedding reads the trained rows; other tokens have their own rows, in passes without gradient."""
    if found is None:
        yield
        return
    module = found.module
    place = torch.full((len(module.weight),), -1, device=found.tokens.device)
    place[found.tokens] = torch.arange(len(found.tokens), device=place.device)
    vars(module)["forward"] = partial(_read, found, place)
    try:
        yield
    finally:
        del vars(module)["forward"]


def _read(found: Lookup, place: Tensor, ids: Tensor) -> Tensor:
    at, skipped = place[ids], found.module.padding_idx
    known = at >= 0
    if bool(known.all()):
        unmoved = -1 if skipped is None else int(place[skipped])
        return functional.embedding(at, found.rows, unmoved if unmoved >= 0 else None)
    if torch.is_grad_enabled():
        raise RuntimeError(f"token {int(ids[~known][0])}, in no text of the terms, was read with gradients")
    return torch.where(known[..., None], found.rows[at.clamp(min=0)], found.module.weight[ids])
