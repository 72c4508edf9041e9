"""Memory of a step: activations computed again in the backward pass, and what to say where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from repforget.edit.train._choose import Trainable
from repforget.edit.train._cost import Size, Work, advice
from repforget.edit.train._engine import Engine
from repforget.edit.train._parts import ACCELERATOR, BUDGETS
from repforget.edit.train._settings import Settings
from repforget.errors import ResourceError
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map


@contextmanager
def recomputed(model: LoadedModel, wanted: bool) -> Iterator[None]:
    """Inside, passes with gradients keep each layer's input alone and compute the layer again on the way back.

    The layers stay in evaluation mode, which transformers' own switch would not do, and hooks on their outputs run
    once.  Cost: one more forward.  Source: Chen et al. 2016, arXiv 1604.06174.
    """
    paths = [layer.path for layer in site_map(model.module).anatomy.layers] if wanted else []
    layers = [model.module.get_submodule(path) for path in paths]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(_again, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = own


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def fitting(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that failed, on an accelerator or a CPU, into a ResourceError with ``advice()``."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) \
                and "DefaultCPUAllocator" not in str(error):  # fmt: skip
            raise
        raise ResourceError(advice()) from error


def advice_for(engine: Engine, chosen: Trainable, shared: Settings) -> str:
    """The sentence for a step that did not fit."""
    model, adapter = engine.model, chosen.kind != "none"
    rows = [row for term in engine.terms for row in term.data.own]
    taken = sum(size if term.data.instead is None else 2 * size
                for term, size in zip(engine.terms, engine.sizes, strict=True))  # fmt: skip
    lengths = [len(row.ids) for row in rows]
    budget = BUDGETS.get(model.device.type, ACCELERATOR).tokens
    work = Work(taken, max(lengths), sum(lengths) / len(rows), sum(row.labels for row in rows) / len(rows), budget)
    trained = sum(p.numel() for p in chosen.parameters)
    lora = sum(shared.rank * sum(p.shape) for p in chosen.parameters if p.ndim == 2)
    size = Size(sum(p.numel() for p in model.module.parameters()), trained, trained if adapter else lora,
                model.n_layers, model.width, model.vocab_size, model.dtype.itemsize)  # fmt: skip
    return advice(size, shared, work, adapter=adapter, available=memory_of(model.device), device=str(model.device))


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    import psutil

    return int(psutil.virtual_memory().total)
