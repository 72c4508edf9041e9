"""Ascend along what is particular to the forget facts: one gradient, its dominant components collapsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from repforget.artifact import Edit
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.edit._collect import subsample
from repforget.edit.train._adapters import adaptable, adapted
from repforget.edit.train._budget import Line, divergence, examples, longest, norm, probability
from repforget.edit.train._collapse import Form, Side, collapse, components
from repforget.edit.train._data import fact_rows
from repforget.errors import KnowledgeError, SiteError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.weights import NEURON_ROLES, readers, writers
from repforget.progress import Progress, track
from repforget.records import Localization
from repforget.training import Example, collate, finetune, label_loss, only

MOST = 512  # collapsed components of a matrix, which "auto" reaches at widths of 4096
FIRST = 1e-3  # step of the first trial, as a share of the norm of the weights


def repselect(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layers: Literal["auto"] | list[int] = "auto", top_layers: int = 4,
    collapsed: Literal["auto"] | int = "auto", form: Form = "soft", side: Side = "both",
    basis: Literal["forget", "retain"] = "forget", rank: int = 16, elicit_steps: Literal["auto"] | int = "auto",
    elicit_lr: float = 0.01, batch_size: int = 32, steps: int = 16, max_disruption: float = 0.01,
    stop_probability: float = 0.0, max_facts: int = 4000,
) -> Edit:  # fmt: skip
    """Raise the loss of forget facts along their gradient without the components that other texts share.

    A LoRA on the MLP matrices first learns the forget facts still better, so that weakly expressed knowledge has a
    gradient too; with it in place G, the gradient of their loss, is summed over all of them and the LoRA dropped.  The
    ``collapsed`` largest components of G, which most texts share, are turned small (soft) or left out (hard), and the
    weights go along the rest again and again: the longest way on that line that keeps the disruption, the divergence
    from the untouched model on retained answers or general text, whichever is larger, within ``max_disruption``.
    Source: RepSelect, 2026, arXiv 2606.17168 (single-shot form); the search for the step and the size of ``collapsed``
    at small widths are this project's own.

    Args:
        layers: layers whose MLPs change; "auto" is the ``top_layers`` best of ``where``, or all.
        collapsed: components; "auto" is an eighth of the smaller side, at most 512.
        form: soft inverts their order, hard drops them. side: on which side of the matrix: inputs, outputs or both.
        basis: whose gradient the components are taken of.
        rank: of the LoRA. elicit_steps: its steps, "auto" for one pass, 0 for none, at the rate elicit_lr (momentum).
        batch_size: facts per batch. steps: trials of the line search.
        max_disruption: nats per token. stop_probability: the search ends once forget answers are this improbable.
        max_facts: facts read per set, chosen by seed.

    Raises SiteError for layers that are not there or a LoRA that cannot be put on, UsageError for settings out of
    range, KnowledgeError without facts, NumericalError where no step stays within the budget.  Cost: two forwards and
    backwards over the forget facts, one decomposition per matrix, ``steps`` evaluations of some hundred tokens; memory:
    three float32 copies of the MLP matrices.

    Weakness: facts that the model is sure of have next to no gradient, so that the least known weigh most, and what is
    rare among the facts given is left.  A low answer probability does not show that relearning is slow: attack it.
    """
    _check(rank, batch_size, steps, collapsed, max_disruption)
    names = _names(model, layers, where, top_layers)
    texts: dict[str, list[Example]] = {p: _texts(model, data, p, max_facts, seed) for p in ("forget", basis)}
    once = -(-len(texts["forget"]) // batch_size) if elicit_steps == "auto" else elicit_steps
    found = _gradients(model, names, texts, rank=rank, once=once, lr=elicit_lr, batch_size=batch_size, seed=seed,
                       progress=progress)  # fmt: skip
    ways = [_way(model, name, g, b, collapsed, form, side, seed)
            for name, g, b in zip(names, found["forget"], found[basis], strict=True)]  # fmt: skip
    line = Line(model, names, ways)
    unit = norm(p.detach() for p in line.parameters) / max(norm(ways), torch.finfo(torch.float32).tiny)
    disruption, known = divergence(model, data, seed), probability(model, data.forget, "forget", seed)
    before = known()
    step, cost = longest(lambda t: line.at(t * unit, disruption), max_disruption, FIRST, steps,
                         enough=lambda t: stop_probability > 0 and line.at(t * unit, known) <= stop_probability,
                         progress=progress)  # fmt: skip
    note = (f"step of {step:.3g} of the norm of the weights: divergence {cost:.3g} of {max_disruption:g} nats per "
            f"token, mean probability of forget answers {before:.3g} -> {line.at(step * unit, known):.3g}")  # fmt: skip
    return Edit.build("repselect", {"elicit_steps": once}, model, data.digest, line.operations(step * unit),
                      notes=[note])  # fmt: skip


def _check(rank: int, batch_size: int, steps: int, collapsed: int | str, budget: float) -> None:
    for name, value in (("rank", rank), ("batch_size", batch_size), ("steps", steps), ("max_disruption", budget)):
        if value <= 0:
            raise UsageError(f"repselect needs a positive {name}: {value} was given.")
    if isinstance(collapsed, int) and collapsed < 0:
        raise UsageError(f"repselect cannot collapse {collapsed} components: give 0 or more.")


def _texts(model: LoadedModel, data: EditData, part: str, max_facts: int, seed: int) -> list[Example]:
    facts = data.forget if part == "forget" else data.retain
    if not facts:
        raise KnowledgeError(f"repselect was given no {part} facts, whose gradient it takes.")
    return examples(fact_rows(model, subsample(facts, max_facts, seed), part)[0])


def _names(
    model: LoadedModel, layers: Literal["auto"] | list[int], where: Localization | None, top: int
) -> list[str]:
    """The MLP matrices of the chosen layers."""
    wanted = where.layers()[:top] if layers == "auto" and where is not None else () if layers == "auto" else layers
    chosen = set(wanted or range(model.n_layers))
    if layers == [] or not chosen <= set(range(model.n_layers)):
        raise SiteError(f"Layers {layers} were asked for: give some of 0 to {model.n_layers - 1}.")
    refs = [*readers(model.module), *writers(model.module)]
    return list(dict.fromkeys(r.name for r in refs if r.role in NEURON_ROLES and r.layer in chosen))


def _gradients(
    model: LoadedModel, names: Sequence[str], texts: dict[str, list[Example]], *, rank: int, once: int, lr: float,
    batch_size: int, seed: int, progress: Progress | None,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """Gradients of the mean loss per token of each set on the weights, with the eliciting LoRA in place."""
    table = dict(model.module.named_parameters())
    own = [table[name] for name in names]
    if not once:
        return {name: gradient(model, own, part, batch_size, progress) for name, part in texts.items()}
    if set(adaptable(model.module, names)) != set(names):
        raise SiteError(f"The MLP matrices of '{model.name}' cannot carry a LoRA: set elicit_steps: 0.")
    with adapted(model.module, "lora", names, rank=rank, seed=seed) as adapter:
        finetune(model.module, texts["forget"], steps=once, lr=lr, seed=seed, batch_size=batch_size, optimizer="sgd",
                 schedule="constant", trainable=lambda name: name in adapter.parameters)  # fmt: skip
        return {name: gradient(model, own, part, batch_size, progress) for name, part in texts.items()}


def gradient(
    model: LoadedModel, own: Sequence[nn.Parameter], texts: Sequence[Example], batch_size: int,
    progress: Progress | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradient (float32) of the mean loss per labelled token on the given parameters."""
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in own]
    order = sorted(texts, key=lambda text: len(text.tokens))
    labels = sum(sum(text.labelled[1:]) for text in order)
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with only(model.module, own):
        for chunk in track(progress, chunks, "gradient of the facts"):
            share = sum(sum(text.labelled[1:]) for text in chunk) / labels
            loss = label_loss(model.module, collate(chunk, model.device)) * share
            for sum_, g in zip(total, torch.autograd.grad(loss, list(own), allow_unused=True), strict=True):
                if g is not None:
                    sum_.add_(g)
    return total


def _way(
    model: LoadedModel, name: str, own: Tensor, basis: Tensor, k: int | str, form: Form, side: Side, seed: int
) -> Tensor:
    """The gradient of one weight without its dominant components, in the layout of the parameter."""
    turned = is_conv1d(owner_of(model.module, name)[0])
    own, basis = (own.mT, basis.mT) if turned else (own, basis)
    count = min(MOST, min(own.shape[-2:]) // 8) if isinstance(k, str) else k
    way = collapse(own, components(basis, count, seed), form, side)
    return way.mT if turned else way
