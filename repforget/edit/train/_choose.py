"""Which parameters a trained editor trains: named, located, or all; as weights, under masks, or through an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repforget.artifact import DenseDelta, Operation, SparseDelta
from repforget.artifact.weights import owner_of
from repforget.edit.train._adapters import Adapter, adaptable, adapted, model_size_default
from repforget.edit.train._fila import row_weights, squared_gradients
from repforget.edit.train._lookup import Lookup, looked_up, lookup
from repforget.edit.train._pass import Term, swapped
from repforget.edit.train._processes import Processes
from repforget.edit.train._settings import Settings
from repforget.edit.train._shards import Shards, check_shards, in_shards
from repforget.errors import SiteError, UsageError, nearest
from repforget.masks import Masks, masks, reproject
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.records import Localization, Units
from repforget.training import only

FILA_ROWS = 128  # of each side, for the importance of weights
SPARSE = 1 / 3  # share of changed entries below which a delta is stored by index


@dataclass(frozen=True)
class Trainable:
    """What is trained: tensors, their values at the start, how to see the untouched model, and the finished change.

    Where the launcher asks for ``shards``, tensors are this process's part, and theirs is the model that runs.
    """

    parameters: Sequence[Tensor]
    originals: list[Tensor]
    untouched: Callable[[], AbstractContextManager[Any]]
    operations: Callable[[], list[Operation]]
    kind: str
    notes: tuple[str, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    shards: Shards | None = None

    @torch.no_grad()
    def keep_outside(self) -> None:
        """Put everything outside the masks back to its bits."""
        for parameter, start, mask in zip(self.parameters, self.originals, self.masks, strict=False):
            if mask is not None:
                reproject(parameter, start, mask)


@contextmanager
def trainable(
    model: LoadedModel, shared: Settings, terms: Sequence[Term], where: Localization | None, seed: int
) -> Iterator[Trainable]:
    """Open the chosen parameters for training; afterwards the model is bit for bit what it was."""
    kind = model_size_default(model.module) if shared.adapter == "auto" else shared.adapter
    chosen = _masked(model, shared, where, seed) if shared.mask and where is not None else None
    if shared.mask and where is None:
        raise UsageError("A mask needs a localisation: give 'where' (or 'locate' in the recipe), or set mask: false.")
    if chosen is not None and kind != "none":
        raise UsageError(f"A mask holds single units and adapter '{kind}' changes whole matrices: set adapter: none.")
    processes = Processes.launched()
    if processes.sharded:
        check_shards(model, shared, terms, kind)
    names = trained_names(model, shared, terms, where) if chosen is None else tuple(chosen.masks)
    module = model.module
    if kind != "none":
        names = adaptable(module, names)
        if shared.targets == "auto":  # the unembedding is left alone, and stays one fused product
            names = tuple(n for n in names if owner_of(module, n)[0] is not module.get_output_embeddings())
        if not names:
            raise UsageError(f"None of the targets can carry an adapter '{kind}': name matrices, or set adapter: none.")
        importance = _importance(module, names, terms) if kind == "fila" else None
        with adapted(module, kind, names, rank=shared.rank, alpha=shared.alpha, seed=seed,
                     importance=importance) as adapter:  # fmt: skip
            own = list(adapter.parameters.values())
            with only(module, own), in_shards(model, own, processes) as shards:
                held = own if shards is None else shards.parameters
                yield Trainable(held, [p.detach().clone() for p in held], adapter.off,
                                lambda: _finished(adapter, own, shards), kind, shards=shards)  # fmt: skip
        return
    table = dict(module.named_parameters())
    rows = None if chosen is not None or processes.sharded else lookup(model, shared, terms, names)
    own = [rows.rows if rows is not None and name == rows.name else table[name] for name in names]
    marks = () if chosen is None else tuple(chosen.masks[name].to(model.device) for name in names)
    whole = [mark.expand_as(p) for mark, p in zip(marks, own, strict=False)]
    with only(module, own), looked_up(rows), in_shards(model, own, processes) as shards:
        held, marks = (own, marks) if shards is None else (shards.parameters, tuple(map(shards.own, whole)))
        start = [p.detach().clone() for p in held]
        try:
            yield Trainable(
                held, start, lambda: swapped(held, start), lambda: _deltas(names, held, start, shards, rows), kind,
                () if chosen is None else chosen.notes, marks, shards,
            )  # fmt: skip
        finally:
            with torch.no_grad():
                for parameter, original in zip(held, start, strict=True):
                    parameter.copy_(original)


def _masked(model: LoadedModel, shared: Settings, where: Localization, seed: int) -> Masks:
    units: Units = "located" if isinstance(shared.mask, bool) else shared.mask
    return masks(model, where, units=units, seed=seed)


def _finished(adapter: Adapter, own: Sequence[nn.Parameter], shards: Shards | None) -> list[Operation]:
    if shards is not None:
        shards.put_back(own)
    return adapter.operations()


def _importance(module: nn.Module, names: Sequence[str], terms: Sequence[Term]) -> dict[str, Tensor]:
    """How much more the outputs of matrices matter to what must go than to what must stay."""
    found = []
    for side in ("forget", "retain"):
        rows = next((term.data.own for term in terms if term.side == side), None)
        if rows is None:
            raise UsageError(f"Adapter 'fila' weighs forgetting against keeping and there is no {side} term: give one, "
                             "or use adapter 'lora'.")  # fmt: skip
        found.append(squared_gradients(module, names, [(row.ids, row.start) for row in rows[:FILA_ROWS]]))
    return row_weights(module, *found)


def trained_names(
    model: LoadedModel, shared: Settings, terms: Sequence[Term], where: Localization | None
) -> tuple[str, ...]:
    """Names of the parameters to train."""
    known = [name for name, _ in model.module.named_parameters()]
    if shared.targets != "auto":
        found: list[str] = []
        if not shared.targets:
            raise UsageError("An empty list of targets trains nothing: name parameters, or set targets: auto.")
        for target in shared.targets:
            try:
                matched = [name for name in known if re.search(target, name)]
            except re.error as error:
                raise UsageError(f"The target '{target}' is no regular expression ({error}): give a part of the names "
                                 "of parameters.") from None  # fmt: skip
            if not matched:
                raise UsageError(f"No parameter of '{model.name}' matches the target '{target}': "
                                 f"{nearest(target, known)}")  # fmt: skip
            found += matched
        return tuple(dict.fromkeys(found))
    deepest = max((layer for term in terms for layer in term.layers), default=None)
    fixed = next((t.objective for t in terms if t.side == "forget" and t.objective.targets == "mlp_down"), None)
    paths = site_map(model.module).anatomy.layers
    if fixed is not None and deepest is not None:
        downs = [paths[layer].down for layer in range(max(0, deepest + 1 - (fixed.span or 1)), deepest + 1)]
        if any(down is None for down in downs):
            raise SiteError(f"'{fixed.name}' trains MLP output projections and a layer has batched experts: give "
                            "'targets'.")  # fmt: skip
        return tuple(f"{down}.weight" for down in downs)
    layers = set(where.layers()[: shared.top_layers]) if where is not None else set()
    if where is not None and not layers:
        raise UsageError(f"The localisation by '{where.method}' names no layer, only "
                         f"{', '.join(map(str, where.components[:3]))}: give 'targets', or another one.")  # fmt: skip
    if all(term.reads("hidden") for term in terms) and deepest is not None:  # layers above get no gradient
        layers = {layer for layer in layers or range(deepest + 1) if layer <= deepest} or set(range(deepest + 1))
    prefixes = tuple(f"{paths[layer].path}." for layer in sorted(layers))
    return tuple(name for name in known if name.startswith(prefixes)) if prefixes else tuple(known)


def _deltas(
    names: Sequence[str], trained: Sequence[Tensor], start: Sequence[Tensor], shards: Shards | None,
    rows: Lookup | None,
) -> list[Operation]:  # fmt: skip
    """What changed, by parameter; stored by index where little of it did."""
    found: list[Operation] = []
    for name, now, before in zip(names, trained, start, strict=True):
        delta = now.detach().float().cpu() - before.float().cpu()
        delta = delta if shards is None else shards.whole(delta)
        changed, looked = int(delta.count_nonzero()), rows is not None and name == rows.name
        if changed and not looked and changed >= SPARSE * delta.numel():
            found.append(DenseDelta(name, delta))
        elif changed:
            index = delta.flatten().nonzero()[:, 0]
            place = rows.index(index) if rows is not None and looked else index
            found.append(SparseDelta(name, place, delta.flatten()[index]))
    return found
