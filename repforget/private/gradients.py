"""Gradients of single records by opacus, added up over a unit and clipped as one."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.errors import MissingExtraError, UsageError
from repforget.training import NO_LABEL, Example, collate

Loss = Literal["mean", "sum"]
PerRecord = Callable[[Sequence[Example]], list[Tensor]]
BYTES = 256 * 2**20  # of gradients of single records held at a time


def record_losses(module: nn.Module, examples: Sequence[Example], loss: Loss = "mean") -> Tensor:
    """Cross-entropy [n] (nats) of each record over its own labelled tokens: their mean, or their sum."""
    batch = collate(examples, next(module.parameters()).device)
    mask = batch["attention_mask"]
    inner = getattr(module, "_module", module)
    extra = {}
    if "position_ids" in inspect.signature(inner.forward).parameters:
        # Positions of the batch's own shape: one row for all records would add their gradients up.
        extra["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    logits = module(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, **extra).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = functional.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=NO_LABEL, reduction="none")
    sums = each.sum(1)
    return sums if loss == "sum" else sums / (labels != NO_LABEL).sum(1)


@contextmanager
def per_record(module: nn.Module, parameters: Mapping[str, nn.Parameter], loss: Loss = "mean") -> Iterator[PerRecord]:
    """Inside, a function from records to their gradients, one tensor [n, *shape] per parameter.

    ``parameters`` are the ones of ``module`` that require a gradient.  The first call is checked against plain
    differentiation of its first and last record.  Source: opacus (Yousefpour et al. 2021, arXiv 2109.12298).  Cost:
    one forward and about two backward passes; memory: a gradient per record.  Raises UsageError, with what opacus
    says, for layers whose records cannot be told apart, MissingExtraError without opacus.
    """
    wrapped = _wrapped(module, parameters)
    marked = [part for part in module.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    for part in marked:
        part.training = True  # opacus looks at this flag; what drops out stays in evaluation mode
    unchecked = True

    def gradients(examples: Sequence[Example]) -> list[Tensor]:
        nonlocal unchecked
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first layer's inputs need no gradient, as opacus' hooks remark
            try:
                record_losses(wrapped, examples, loss).sum().backward()  # type: ignore[no-untyped-call]
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
                raise _refused(module, error) from error
        found = [_taken(name, p, len(examples)) for name, p in parameters.items()]
        wrapped.zero_grad(set_to_none=True)
        if unchecked:
            unchecked = False
            wrapped.disable_hooks()
            _check(module, parameters, examples, found, loss)
            wrapped.enable_hooks()
        return found

    try:
        yield gradients
    finally:
        wrapped.to_standard_module()
        for part in marked:
            part.training = False
            for kept in ("activations", "max_batch_len"):
                part.__dict__.pop(kept, None)


def _wrapped(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus import GradSampleModule
            from opacus.validators import ModuleValidator
    except ModuleNotFoundError as error:
        raise MissingExtraError("Private training needs the library opacus, which is not installed: run "
                                '`pip install "repforget[dp]"`.') from error  # fmt: skip
    if missing := [name for name, p in parameters.items() if not p.requires_grad]:
        raise UsageError(f"'{missing[0]}' takes no gradient, so that no record's can be clipped: train it, or leave "
                         "it out.")  # fmt: skip
    trained = module.training
    faults = ModuleValidator.validate(module.train(), strict=False)  # it objects to evaluation mode
    module.train(trained)
    if faults:
        raise _refused(module, faults[0])
    try:
        return GradSampleModule(module, loss_reduction="sum")
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise _refused(module, error) from error


def _refused(module: nn.Module, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:240]
    return UsageError(f"Gradients of single records cannot be taken of {type(module).__name__} (opacus: {reason}), so "
                      "that no unit's part can be bounded: train low-rank additions (--rank) in place of all weights, "
                      "or another model.")  # fmt: skip


def _taken(name: str, parameter: nn.Parameter, records: int) -> Tensor:
    found: Any = getattr(parameter, "grad_sample", None)
    if not isinstance(found, Tensor) or len(found) != records:
        got = "none" if found is None else f"{len(found)}"
        raise UsageError(f"Opacus gives {got} gradients of '{name}' for {records} records, for a layer before it mixes "
                         "them or it is used outside its own: train low-rank additions (--rank), or another "
                         "model.")  # fmt: skip
    return found.detach().float()


def _check(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], examples: Sequence[Example], found: Sequence[Tensor],
    loss: Loss,
) -> None:  # fmt: skip
    """UsageError unless the first and the last record have the gradient that differentiating each alone gives."""
    for place in {0, len(examples) - 1}:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = torch.autograd.grad(record_losses(module, [examples[place]], loss).sum(), list(parameters.values()),
                                      allow_unused=True)  # fmt: skip
        for (name, parameter), each, exact in zip(parameters.items(), found, own, strict=True):
            exact = torch.zeros_like(parameter) if exact is None else exact
            apart = float((each[place] - exact).norm())
            if not apart <= 1e-3 * float(exact.norm()) + 1e-5 and math.isfinite(float(exact.norm())):
                raise UsageError(f"The gradient of one record that opacus gives for '{name}' is not that record's own "
                                 f"(apart by {apart:.2g}): train low-rank additions (--rank), or another "
                                 "model.")  # fmt: skip


def passes(sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """(unit, first, past the last record) of each pass over units of ``sizes`` records, ``most`` records at a time.

    A unit is cut only where it alone is larger.
    """
    piece: list[tuple[int, int, int]] = []
    filled = 0
    for unit, size in enumerate(sizes):
        if filled and filled + size > most:
            yield piece
            piece, filled = [], 0
        for first in range(0, size, most):
            piece.append((unit, first, min(first + most, size)))
            filled += piece[-1][2] - first
            if first + most < size:
                yield piece
                piece, filled = [], 0
    if piece:
        yield piece


def clipped_sum(
    gradients: PerRecord, units: Sequence[Sequence[Example]], shapes: Sequence[torch.Size], clip: float,
    most: int | None = None,
) -> tuple[list[Tensor], list[float]]:  # fmt: skip
    """The units' gradients, each the mean over its records and then clipped to the norm ``clip``, summed; the norms.

    The norms are those before clipping.  A unit whose gradient is not finite adds nothing, which keeps the bound.
    ``most`` is how many records run at a time (default: what fits :data:`BYTES`).
    """
    width = sum(math.prod(shape) for shape in shapes)
    most = max(1, BYTES // (4 * width)) if most is None else most
    total: list[Tensor] | None = None
    rest: list[Tensor] | None = None  # of a unit cut into passes, what is known so far
    norms: list[float] = []
    for piece in passes([len(unit) for unit in units], most):
        found = gradients([e for unit, first, last in piece for e in units[unit][first:last]])
        own = [_by_unit(g, piece, [len(units[unit]) for unit, *_ in piece]) for g in found]
        if rest is not None:
            for part, before in zip(own, rest, strict=True):
                part[0] += before
        unit, _, last = piece[-1]
        rest = [part[-1] for part in own] if last < len(units[unit]) else None
        own = own if rest is None else [part[:-1] for part in own]
        lengths = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in own])
        whole = lengths.square().sum(0).sqrt()
        norms += whole.tolist()
        scale = (clip * (1 - 1e-6) / whole.clamp(min=1e-12)).clamp(max=1.0).where(whole.isfinite(), 0.0).float()
        cut = [scale @ (part if bool(part.isfinite().all()) else part.where(whole.isfinite()[:, None], 0.0))
               for part in own]  # fmt: skip
        total = cut if total is None else [a + b for a, b in zip(total, cut, strict=True)]
    if total is None:
        return [torch.zeros(shape) for shape in shapes], norms
    return [g.reshape(shape) for g, shape in zip(total, shapes, strict=True)], norms


def _by_unit(gradients: Tensor, piece: Sequence[tuple[int, int, int]], sizes: Sequence[int]) -> Tensor:
    """What the records of each unit in ``piece`` add to its mean over ``sizes`` records, a flat row for each."""
    counts = torch.tensor([last - first for _, first, last in piece])
    rows = torch.repeat_interleave(torch.arange(len(piece)), counts).to(gradients.device)
    sums = gradients.new_zeros(len(piece), gradients[0].numel()).index_add_(0, rows, gradients.flatten(1))
    return sums / torch.tensor(sizes, device=sums.device)[:, None]
