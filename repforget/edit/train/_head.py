"""The vocabulary projection of the wanted positions only, and never as a whole table of positions x vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from repforget.errors import NumericalError, SiteError, UsageError
from repforget.models._names import core
from repforget.models.readout import cap, logit_cap
from repforget.models.sites import site_map

DIRECT = 2**20  # logits up to here are made at once and kept for the backward pass (4 MiB in float32)
CHUNK = 2**21  # logits at a time beyond, of single labels
WHOLE = 2**23  # logits at a time beyond, of whole distributions: every chunk reads the whole head
KEPT = 2**25  # numbers of one call that may wait for the backward pass of a trained head (128 MiB in float32)
TAIL = 0.05  # largest mean probability that a teacher may leave outside its top outcomes

_sums: dict[int, tuple[list[Tensor | None], int]] = {}  # by id of a head's weight: where its gradients are added up


@dataclass(frozen=True)
class Head:
    """The output embedding ``module`` of ``model`` and what the model does to the logits behind it."""

    model: nn.Module
    module: nn.Module

    @property
    def size(self) -> int:
        """The number of outcomes V."""
        return int(getattr(self.module, "out_features", None) or self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.module.weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def plain(self) -> bool:
        """True where the module is states @ weight.T + bias and no more: no adapter, no hook, no packed weight."""
        whole = isinstance(self.module, nn.Linear) and self.weight.shape == (self.size, self.module.in_features)
        return whole and self.weight.is_floating_point() and not self.module._forward_hooks

    def logits(self, states: Tensor) -> Tensor:
        """The model's logits [m, V] of final normed states [m, d], in float32 or better."""
        return _exact(cap(self.model, self.module(states)))

    def label_logprobs(self, states: Tensor, labels: Tensor) -> Tensor:
        """Log-probability (nats) [m] of each label [m] behind the final normed states [m, d]."""
        if self.plain:
            factor, limit = logit_cap(self.model)
            return label_logprobs(states, self.weight, self.bias, labels, scale=factor, limit=limit)
        return distribution(states, self, lambda z, part: _gathered(z, labels[part]))


class Selected:
    """What :func:`select_head` caught: ``states`` [b, s, d], the final normed states of the last forward pass."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.caught: Tensor | None = None

    @property
    def states(self) -> Tensor:
        if self.caught is None:
            raise SiteError("The forward pass never reached the output embedding, so there is no state to score: "
                            "call the causal language model itself.")  # fmt: skip
        return self.caught


def head_of(model: Any) -> Head:
    """The output embedding of any model that has a site map."""
    module = core(model)
    return Head(module, module.get_submodule(site_map(module).anatomy.unembed))


@contextmanager
def select_head(model: Any) -> Iterator[Selected]:
    """Let forward passes of ``model`` skip the vocabulary: their logits come back empty, [b, 0, V].

    The states they would have been made of are ``states`` of what this yields, with gradient; score the wanted rows
    of them with its ``head``.
    """
    head = head_of(model)
    found = Selected(head)

    def catch(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.caught = args[0]
        return (args[0][:, :0], *args[1:])

    handle = head.module.register_forward_pre_hook(catch)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def summed(parameters: Sequence[Tensor], totals: list[Tensor | None]) -> Iterator[None]:
    """Inside, backward passes add the gradient of a chunked head among ``parameters`` to its place in ``totals`` (in
    float32 or better, made where it is None) and hand autograd none: no second table of vocabulary x width is held."""
    before = dict(_sums)
    _sums.update({id(p): (totals, place) for place, p in enumerate(parameters)})
    try:
        yield
    finally:
        _sums.clear()
        _sums.update(before)


def label_logprobs(
    states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *,
    chunk: int | None = None, scale: float = 1.0, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """Log-probability (nats) [m] of ``labels`` [m] under logits ``scale * (states @ weight.T + bias)``, capped.

    ``states`` [m, d], ``weight`` [V, d]; float32, or float64 where the states are.  Up to :data:`DIRECT` logits are
    made at once; beyond, ``chunk`` logits at a time, a stripe of the vocabulary for all positions: the logarithm of the
    sum and the gradient of the states are gathered in one pass (as online softmax: Milakov and Gimelshein 2018, arXiv
    1805.02867).  A trained ``weight`` costs two more products in the backward pass, one where all the exponentials may
    wait for it (:data:`KEPT`).  Memory: ``chunk`` + 2 m d numbers, and what waits.  The chunked form can be
    differentiated once.
    """
    if chunk is None and len(labels) * len(weight) <= DIRECT:
        return _gathered(_capped(_exact(functional.linear(states, weight, bias)), scale, limit), labels)
    stripe = max(1, (chunk or CHUNK) // max(1, len(labels)))
    found: Tensor = _LabelLogprobs.apply(states, weight, bias, labels, scale, limit, stripe, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return found


class _LabelLogprobs(torch.autograd.Function):
    """See :func:`label_logprobs`.

    p below is the softmax without the label, whose own 1 - p is the ``rest``: nothing cancels where a label is certain.
    t is the derivative of the capped logits by the raw ones.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float,
        limit: float | None, stripe: int, graded: bool,
    ) -> Tensor:  # fmt: skip
        wanted, trained = graded and ctx.needs_input_grad[0], graded and any(ctx.needs_input_grad[1:3])
        kind = _wide(states)
        top = torch.full((len(labels), 1), -torch.inf, dtype=kind, device=states.device)
        rest, mean = torch.zeros_like(top), states.new_zeros(states.shape if wanted else 0, dtype=kind)
        chosen, slope = torch.full_like(top, torch.nan), torch.ones_like(top)
        keeps = trained and limit is None and len(labels) * len(weight) <= KEPT
        kept: list[Tensor] = []
        for part, index, inside in _stripes(labels, len(weight), stripe):
            z, t = _raw(states, weight, bias, part, scale, limit)
            chosen = torch.where(inside, z.gather(1, index), chosen)
            if t is not None:
                slope = torch.where(inside, t.gather(1, index), slope)
            higher = torch.maximum(top, z.amax(1, keepdim=True))
            shrink, top = (top - higher).exp_(), higher
            p = z.sub_(top).exp_()
            p.scatter_(1, index, p.gather(1, index).masked_fill_(inside, 0))
            kept += [p, top] if keeps else []
            rest = rest.mul_(shrink).add_(p.sum(1, keepdim=True))
            if wanted:
                _add_product(mean.mul_(shrink), p if t is None else p.mul_(t), weight[part])
        total = rest + (chosen - top).exp()
        lse, pull = top + total.log(), slope * (rest / total * scale)
        ctx.stripe, ctx.scale, ctx.limit, ctx.kind = stripe, scale, limit, states.dtype
        unit = pull * weight[labels] - mean.mul_(scale / total) if wanted else None
        ctx.save_for_backward(unit, *((states, weight, bias, labels, lse, pull, *kept) if trained else ()))
        return (chosen - lse)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        unit, *rest = ctx.saved_tensors
        g = g[:, None]
        of_states = (unit * g).to(ctx.kind) if ctx.needs_input_grad[0] else None
        of_weight = of_bias = None
        if rest:
            states, weight, bias, labels, lse, pull, *kept = rest
            of_weight, given = _gradient(weight, ctx.needs_input_grad[1])
            of_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
            for n, (part, index, inside) in enumerate(_stripes(labels, len(weight), ctx.stripe)):
                share = -ctx.scale * g
                if kept:
                    p, share = kept[2 * n], share * (kept[2 * n + 1] - lse).exp_()
                else:
                    z, t = _raw(states, weight, bias, part, ctx.scale, ctx.limit)
                    p = z.sub_(lse).exp_()
                    p.scatter_(1, index, p.gather(1, index).masked_fill_(inside, 0))
                    p = p if t is None else p.mul_(t)
                if of_weight is not None:
                    _add_product(of_weight[part], p.to(states.dtype).T, (states * share).to(states.dtype))
                if of_bias is not None:
                    of_bias[part] = (p.T @ share)[:, 0]
            if of_weight is not None:
                of_weight.index_add_(0, labels, (states * (pull * g)).to(of_weight.dtype))
            if of_bias is not None:
                of_bias.index_add_(0, labels, (pull * g)[:, 0].to(of_bias.dtype))
            of_weight = None if of_weight is None or given else of_weight.to(ctx.kind)
        return of_states, of_weight, of_bias, None, None, None, None, None


def _gradient(weight: Tensor, wanted: bool) -> tuple[Tensor | None, bool]:
    """What the gradient of a head is added to, None if none is wanted; and whether that is where it belongs."""
    if not wanted:
        return None, False
    totals, place = _sums.get(id(weight), ([None], 0))
    if (found := totals[place]) is None:
        totals[place] = found = torch.zeros_like(weight, dtype=_wide(weight))
    return found, id(weight) in _sums


def _stripes(labels: Tensor, size: int, stripe: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of the vocabulary, at most ``stripe`` wide: the labels within them [m, 1], and which lie in them."""
    for start in range(0, size, stripe):
        part = slice(start, min(start + stripe, size))
        inside = (labels >= part.start) & (labels < part.stop)
        yield part, (labels - start).clamp(0, part.stop - start - 1)[:, None], inside[:, None]


def _raw(
    states: Tensor, weight: Tensor, bias: Tensor | None, part: slice, scale: float, limit: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits of a part of the vocabulary and, where there is a cap, their derivative by the uncapped ones."""
    z = _exact(functional.linear(states, weight[part], None if bias is None else bias[part]))
    z = z if scale == 1 else z.mul_(scale)
    if limit is None:
        return z, None
    bent = z.div_(limit).tanh_()
    return bent * limit, bent.square_().neg_().add_(1)


def _capped(z: Tensor, scale: float, limit: float | None) -> Tensor:
    z = z if scale == 1 else z * scale
    return z if limit is None else torch.tanh(z / limit) * limit


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """``into += left @ right`` in the precision of ``into``."""
    if into.dtype == left.dtype == right.dtype:
        into.addmm_(left, right)
    else:
        into.add_(left.to(right.dtype) @ right)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _gathered(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def distribution(
    states: Tensor, head: Head, function: Callable[[Tensor, slice], Tensor], *, chunk: int | None = None
) -> Tensor:
    """``function(logits [c, V], slice of the positions) -> [c]`` over all positions of ``states`` [m, d]: [m].

    Up to :data:`DIRECT` logits at once; beyond, ``chunk`` logits at a time, with their gradients in the same pass.  The
    function must treat positions independently; where it is chunked, gradients flow to the states and the head only,
    once.  Cost: as :func:`label_logprobs`; a trained head beyond :data:`KEPT` runs the function again.
    """
    size = len(states) * head.size
    if chunk is None and size <= DIRECT:
        return function(head.logits(states), slice(0, len(states)))
    step = max(1, (chunk or WHOLE) // head.size)
    if head.plain:
        factor, limit = logit_cap(head.model)

        def capped(z: Tensor, part: slice) -> Tensor:
            return function(_capped(_exact(z), factor, limit), part)

        found: Tensor = _Distribution.apply(states, head.weight, head.bias, capped, step, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return found
    parts = [slice(at, at + step) for at in range(0, len(states), step)]
    return torch.cat([checkpoint(lambda x, part=part: function(head.logits(x), part), states[part],
                                 use_reentrant=False, preserve_rng_state=False) for part in parts])  # fmt: skip


class _Distribution(torch.autograd.Function):
    """See :func:`distribution`: positions are independent, so the slope of each value is known in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None,
        function: Callable[[Tensor, slice], Tensor], step: int, graded: bool,
    ) -> Tensor:  # fmt: skip
        wanted, trained = graded and ctx.needs_input_grad[0], graded and any(ctx.needs_input_grad[1:3])
        keeps = trained and len(states) * len(weight) <= KEPT
        unit = torch.zeros_like(states, dtype=_wide(states)) if wanted else None
        kept = states.new_empty(len(states), len(weight)) if keeps else None
        found, ctx.kind = [], states.dtype
        ctx.function, ctx.parts = function, [slice(at, at + step) for at in range(0, len(states), step)]
        for part in ctx.parts:
            value, slope = _slope(function, states, weight, bias, part, wanted or keeps)
            found.append(value)
            if unit is not None:
                _add_product(unit[part], slope, weight)
            if kept is not None:
                kept[part] = slope
        ctx.save_for_backward(unit, *((states, weight, bias, kept) if trained else ()))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        unit, *rest = ctx.saved_tensors
        of_states = (unit * g[:, None]).to(ctx.kind) if ctx.needs_input_grad[0] else None
        of_weight = of_bias = None
        if rest:
            states, weight, bias, kept = rest
            of_weight, given = _gradient(weight, ctx.needs_input_grad[1])
            of_bias = torch.zeros_like(bias, dtype=_wide(bias)) if ctx.needs_input_grad[2] else None
            for part in ctx.parts if kept is None else [slice(None)]:
                slope = _slope(ctx.function, states, weight, bias, part, True)[1] if kept is None else kept
                if of_weight is not None:
                    _add_product(of_weight, slope.T, (states[part] * g[part, None]).to(slope.dtype))
                if of_bias is not None:
                    of_bias += slope.T.to(g.dtype) @ g[part]
            of_bias = None if of_bias is None else of_bias.to(ctx.kind)
            of_weight = None if of_weight is None or given else of_weight.to(ctx.kind)
        return of_states, of_weight, of_bias, None, None, None


def _slope(
    function: Callable[[Tensor, slice], Tensor], states: Tensor, weight: Tensor, bias: Tensor | None, part: slice,
    graded: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values [c] of a part of the positions and, if ``graded``, how each depends on its own logits [c, V]."""
    with torch.set_grad_enabled(graded):
        z = functional.linear(states[part].detach(), weight.detach(), None if bias is None else bias.detach())
        value = function(z.requires_grad_(graded), part)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0] if graded else z


@dataclass(frozen=True)
class Teacher:
    """The untouched model's answer positions, cut down: ``indices`` [m, k], ``logp`` [m, k + 1] with the tail last.

    ``tail`` is the mean probability outside ``indices``.
    """

    indices: Tensor
    logp: Tensor
    tail: float


@torch.no_grad()
def topk_teacher(states: Tensor, head: Head, labels: Tensor, k: int = 64, *, chunk: int | None = None) -> Teacher:
    """Keep the ``k`` most likely outcomes (the label always among them) and the rest as one, for each position.

    A divergence between such distributions never exceeds the one between the full ones (data processing).  Memory:
    12 k bytes per position.  Raises NumericalError where more than :data:`TAIL` of the probability is in the rest.
    """
    k = min(k, head.size - 1)
    if k < 1:
        raise UsageError(f"A teacher needs at least one outcome beside the rest: k is {k}.")
    step = max(1, (chunk or WHOLE) // head.size)
    indices, logp = [], []
    for at in range(0, len(states), step):
        z, own = head.logits(states[at : at + step]), labels[at : at + step, None]
        best = z.topk(k).indices
        absent = (best != own).all(1)
        best[:, -1] = torch.where(absent, own[:, 0], best[:, -1])
        indices.append(best)
        logp.append(reduced(z, best))
    made = torch.cat(logp)
    tail = float(made[:, -1].double().exp().mean()) if len(made) else 0.0
    if tail > TAIL:
        raise NumericalError(f"The {k} most likely tokens hold only {1 - tail:.1%} of the untouched model's "
                             "probability, too little to stand for it: set teacher to 'live'.")  # fmt: skip
    return Teacher(torch.cat(indices), made, tail)


def reduced(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities [m, k + 1] of the outcomes ``indices`` [m, k] and of all the others together."""
    rest = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, indices), rest], -1).log_softmax(-1)
