"""What weights, neurons and heads have to do with facts: what locators and editors of single units both measure.

Gradients of one fact at a time, integrated gradients of MLP neurons, and statistics of activations over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.causal import Prepared, Run, answer_metric, prepare, prompt_run
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import Fact
from repforget.models.capture import Batch, capture, hooks, stream
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Site
from repforget.scoring.encode import pad_id, token_batches
from repforget.training.finetune import only

Statistic = Literal["mean", "rms", "std", "frequency"]
TOKENS = 8192  # per batch


def runs_of(tokenizer: Any, facts: Sequence[Fact]) -> tuple[Run, ...]:
    """Every fact's statement with its answer as a run."""
    return tuple(prompt_run(tokenizer, fact.id, fact.cluster, fact.prompt, fact.answer) for fact in facts)


def item_of(id: str) -> str:
    """The item that a fact (one statement of it) belongs to."""
    return id.rpartition("#")[0] or id


def visit_gradients(
    model: LoadedModel, runs: Sequence[Run], names: Sequence[str], visit: Callable[[Mapping[str, Tensor]], None],
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Call ``visit`` with d log p(answer) / d parameter of every run alone; the model is left as it was."""
    table = dict(model.module.named_parameters())
    own = [table[name] for name in names]
    with only(model.module, own), torch.enable_grad():
        for run in track(progress, runs, "gradients of single facts"):
            (item,) = prepare(model, [run])
            total = answer_metric(model, item.base, item, "logprob").sum()
            gradients = torch.autograd.grad(total, own, allow_unused=True)
            visit({name: torch.zeros_like(p) if g is None else g
                   for name, p, g in zip(names, own, gradients, strict=True)})  # fmt: skip
            del gradients, total  # before those of the next run are made


def integrated_gradients(
    model: LoadedModel, runs: Sequence[Run], layers: Sequence[int], *, steps: int = 20, progress: Progress | None = None
) -> Tensor:
    """Share of every neuron in the probability of each run's answer [runs, layers, neurons], float64 on the CPU.

    ``A_i = sum_t w_it mean_k dP(alpha_k w) / dw_it`` with alpha_k the midpoints of ``steps`` equal parts of [0, 1] and
    t the positions that predict the answer, where all neurons w of one layer (inputs of its down projection) are scaled
    together: their sum is P(w) - P(0), up to the rule's error (but see :func:`completeness`).  Cost: ``steps`` forwards
    and backwards per run and layer.
    """
    if steps < 1:
        raise UsageError(f"Integrated gradients were asked for in {steps} steps: take one or more, 20 as published.")
    if not runs:
        raise KnowledgeError("There is no fact whose neurons could be attributed: give one or more.")
    sites = [Site("mlp_post", layer) for layer in layers]
    found = torch.zeros(len(runs), len(layers), site_map(model.module).size(sites[0]), dtype=torch.float64)
    batches = list(prepare(model, runs, token_budget=max(1, TOKENS // steps)))
    with only(model.module, []):
        for item in track(progress, batches, "integrated gradients", len(batches)):
            values = capture(model, sites, item.base, gather="all")
            for k, site in enumerate(sites):
                found[list(item.rows), k] = _integrated(model, item, site, values[site], steps).cpu()
    return found


def completeness(model: LoadedModel) -> tuple[str, ...]:
    """A note where attributions do not add up: a norm behind the MLP makes up for any common factor of its neurons."""
    if not any(layer.mlp_post_norm for layer in site_map(model.module).anatomy.layers):
        return ()
    return ("a norm behind the MLP undoes the scaling of its neurons, so that attributions of a layer do not add up to "
            "what they bring together",)  # fmt: skip


def _integrated(model: LoadedModel, item: Prepared, site: Site, value: Tensor, steps: int) -> Tensor:
    """One layer's attributions [b, m] for the rows of ``item``, all steps in one batch."""
    where = torch.zeros(value.shape[:2], device=value.device)
    where[:, -item.weight.shape[1] :] = item.weight
    where = where.unsqueeze(-1)
    alphas = ((torch.arange(steps, device=value.device) + 0.5) / steps).reshape(-1, 1, 1, 1)
    scaled = (value * (1 - where + alphas * where).to(value)).flatten(0, 1).requires_grad_(True)
    wide = Batch(item.base.ids.repeat(steps, 1), item.base.mask.repeat(steps, 1))
    with torch.enable_grad(), hooks(model, {site: lambda _: scaled}):
        chance = answer_metric(model, wide, item, "logprob").exp().sum()
        (gradient,) = torch.autograd.grad(chance, scaled)
    mean = gradient.double().reshape(steps, *value.shape).mean(0)
    return (value.double() * where * mean).sum(1)


@dataclass(frozen=True)
class Members:
    """Which neurons each group of prompts has in common [groups, layers, neurons], and their mean share of the largest
    attribution over its prompts."""

    groups: tuple[str, ...]
    common: Tensor  # bool
    strength: Tensor  # float64

    @property
    def scores(self) -> Tensor:
        """Mean over groups of the strength of common neurons [layers, neurons]."""
        return torch.where(self.common, self.strength, 0.0).mean(0)


def knowledge_neurons(attributions: Tensor, groups: Sequence[str], threshold: float, share: float) -> Members:
    """Neurons with at least ``threshold`` of a prompt's largest attribution in at least ``share`` of a group's prompts.

    ``attributions`` [prompts, layers, neurons]; ``groups`` names each prompt's group (a fact, or one for all).
    """
    if not (0 < threshold <= 1 and 0 < share <= 1):
        raise UsageError(f"Knowledge neurons were asked for with threshold {threshold} and share {share}: both are "
                         "shares above 0 and at most 1.")  # fmt: skip
    largest = attributions.amax((1, 2), keepdim=True)
    relative = torch.where(largest > 0, attributions / largest.clamp(min=1e-300), 0.0)
    names = tuple(dict.fromkeys(groups))
    rows = [[k for k, group in enumerate(groups) if group == name] for name in names]
    kept = torch.stack([(relative[own] >= threshold).double().mean(0) for own in rows])
    return Members(names, kept >= share - 1e-9, torch.stack([relative[own].mean(0) for own in rows]))


@torch.no_grad()
def activity(
    model: LoadedModel, sequences: Sequence[Sequence[int]], sites: Sequence[Site], statistic: Statistic = "mean",
    progress: Progress | None = None,
) -> dict[Site, Tensor]:  # fmt: skip
    """A statistic of every column of the sites over all tokens but first ones [columns], float64.

    ``mean`` E|z|, ``rms`` the root of E z², ``std`` that around the mean, ``frequency`` the share of tokens with z > 0.
    Cost: one forward per sequence, up to the deepest site.
    """
    if not sequences:
        raise KnowledgeError("There is no text on which units could be active: give facts or texts.")
    total = {site: torch.zeros(4, site_map(model.module).size(site), dtype=torch.float64) for site in sites}
    count = 0
    batches = [b for _, b in token_batches(sequences, token_budget=TOKENS, pad_id=pad_id(model.tokenizer))]

    def note(values: dict[Site, Tensor], _: int) -> None:
        nonlocal count
        count += len(next(iter(values.values())))
        for site, x in values.items():
            z = x.double()
            total[site] += torch.stack([z.abs().sum(0), z.square().sum(0), z.sum(0), (z > 0).sum(0).double()]).cpu()

    stream(model, list(sites), track(progress, batches, "reading activations", len(batches)), "tokens", note)
    return {site: _statistic(sums / max(1, count), statistic) for site, sums in total.items()}


def _statistic(means: Tensor, statistic: Statistic) -> Tensor:
    size, square, mean, positive = means
    found: dict[Statistic, Tensor] = {"mean": size, "rms": square.sqrt(), "frequency": positive,
                                      "std": (square - mean.square()).clamp(min=0).sqrt()}  # fmt: skip
    return found[statistic]


def importance(forget: Tensor, retain: Tensor, damping: float = 1e-5) -> Tensor:
    """``forget / (retain + damping mean(retain))`` of the units of one site: 0 where forget text leaves a unit idle,
    and the same when all activations are scaled."""
    return forget / (retain + damping * retain.mean() + torch.finfo(retain.dtype).tiny)
