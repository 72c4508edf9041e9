"""The value side of fact-level surgery: what a projection should write at a key so that the fact is gone.

One vector per group is added to the output of one MLP projection at the key's token (before any norm behind it, so
that the value is met exactly there), and optimised for the objective. Groups do not see one another: many travel in
one batch, each with its own step, ball and loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.edit.surgery._closed_form import Delta
from repforget.edit.surgery._requests import Aim, Requests, Row, Token
from repforget.errors import NumericalError, SiteError, UsageError
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Site
from repforget.scoring.encode import pad_id

BUDGET = 8192  # padded tokens in one batch
MARGIN = 1.0  # logits by which the head-projection objective asks for more than rank k


@dataclass(frozen=True)
class Wish:
    """The objective and its constraints; see the editors' docstrings for the settings."""

    aim: Aim
    token: Token
    layers: tuple[int, ...]  # whose logit lens is read: all of them for lens and entropy, else the last alone
    k: int
    steps: int
    step_size: float
    clamp: float
    kl_weight: float
    decay: float
    margin: float = MARGIN

    @classmethod
    def of(
        cls, model: LoadedModel, layer: int, aim: Aim, token: Token, lens_layers: Literal["auto"] | Sequence[int],
        k: int, steps: int, step_size: float, clamp: float, kl_weight: float, decay: float,
    ) -> Wish:  # fmt: skip
        """Check the settings; a value at ``layer`` reaches the layers above it (and its own, at its own token)."""
        first = layer if token == "last" else layer + 1
        reached = range(first, model.n_layers)
        if aim not in ("lens", "entropy"):
            lens_layers = [model.n_layers - 1]
        wanted = list(reached) if lens_layers == "auto" else sorted(set(lens_layers))
        if not reached or not wanted or not set(wanted) <= set(reached):
            raise SiteError(f"A value written at layer {layer} at the {token.replace('_', ' ')} token reaches the "
                            f"answer through layers {first} to {model.n_layers - 1} and not all of {wanted}: "
                            "choose a lower layer, other lens_layers, or token: last.")  # fmt: skip
        if steps < 1 or k < 1 or step_size <= 0 or clamp <= 0 or kl_weight < 0 or decay < 0:
            raise UsageError("Values need steps and k of at least 1, a positive step_size and clamp, and a kl_weight "
                             "and decay of at least 0.")  # fmt: skip
        if aim == "lens" and 2 * k + 1 > model.vocab_size:
            raise UsageError(f"The answer cannot lie {k} ranks from both ends of {model.vocab_size} tokens: lower k.")
        return cls(aim, token, tuple(wanted), k, steps, step_size, clamp, kl_weight, decay)


@dataclass(frozen=True)
class Values:
    """What to write besides at the layer's projection [g, d], float64, with the objective [g] in nats at the start
    and at the end."""

    added: Tensor
    before: Tensor
    after: Tensor


@contextmanager
def adding(model: LoadedModel, layer: int, batch: Batch, rows: Sequence[Row], vectors: Tensor) -> Iterator[None]:
    """While inside, ``vectors`` [g, d] are added to what the layer's projection writes at each row's key."""
    at = torch.tensor([row.at for row in rows])
    group = torch.tensor([row.group for row in rows])

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        whole = output.view(*batch.ids.shape, -1)  # some blocks merge batch and position
        place = torch.arange(len(rows), device=output.device), at.to(output.device)
        more = vectors[group.to(vectors.device)].to(output)
        return (whole + torch.zeros_like(whole).index_put(place, more)).view_as(output)

    down = model.module.get_submodule(site_map(model.module).anatomy.layers[layer].down)
    handle = down.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def written(model: LoadedModel, deltas: Mapping[int, Delta]) -> Iterator[None]:
    """While inside, the projections of some layers have their deltas added."""
    handles = []
    for layer, delta in deltas.items():
        down = model.module.get_submodule(site_map(model.module).anatomy.layers[layer].down)

        def add(_module: Any, args: tuple[Tensor, ...], output: Tensor, delta: Delta = delta) -> Tensor:
            left, right = (x.to(output.device, torch.float32) for x in (delta.left, delta.right))
            return output + (args[0].float() @ right.T @ left.T).to(output)

        handles.append(down.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(model: LoadedModel, asked: Requests) -> Iterator[tuple[list[int], Requests, Batch]]:
    """Groups in batches of about BUDGET padded tokens: their numbers, their rows, and the rows padded."""
    rows: dict[int, list[Row]] = {}
    for row in asked.rows:
        rows.setdefault(row.group, []).append(row)
    taken: list[int] = []
    for group in sorted(rows):
        bigger = [row for g in (*taken, group) for row in rows[g]]
        if taken and len(bigger) * max(len(row.ids) for row in bigger) > BUDGET:
            yield _batch(model, asked, taken)
            taken = []
        taken.append(group)
    yield _batch(model, asked, taken)


def _batch(model: LoadedModel, asked: Requests, groups: list[int]) -> tuple[list[int], Requests, Batch]:
    part = asked.of(groups)
    return list(groups), part, Batch.pad([row.ids for row in part.rows], pad_id(model.tokenizer)).to(model.device)


def mean_at_keys(
    model: LoadedModel, asked: Requests, sites: Sequence[Site], vectors: tuple[int, Tensor] | None = None
) -> dict[Site, Tensor]:
    """The mean over each group's prompts of ``sites`` at the key [g, d], float64; with ``vectors`` (layer, [g, d])
    added there."""
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for groups, part, batch in batches(model, asked):
        more = adding(model, vectors[0], batch, part.rows, vectors[1][groups]) if vectors else nullcontext()
        with more:
            values = capture(model, sites, batch, torch.tensor([row.at for row in part.rows]))
        for site, x in values.items():
            found[site].append(_group_means(x.cpu().double(), part))
    return {site: torch.cat(parts) for site, parts in found.items()}


def _group_means(x: Tensor, part: Requests) -> Tensor:
    """Means [g, ...] over the rows [n, ...] of each group, without its ESSENCE row."""
    of = torch.tensor([[float(row.group == g and not row.kept) for row in part.rows] for g in range(len(part.names))])
    share = (of / of.sum(1, keepdim=True)).to(x)
    return (share @ x.flatten(1)).view(len(part.names), *x.shape[1:])


def optimise(
    model: LoadedModel, asked: Requests, layer: int, wish: Wish, now: Tensor, progress: Progress | None = None
) -> Values:
    """Values for every group; ``now`` [g, d] is what the projection writes at the keys now, which sets the scale.

    Cost: ``steps`` forwards and backwards over all rows.
    """
    added: list[Tensor] = []
    before: list[Tensor] = []
    after: list[Tensor] = []
    parts = list(batches(model, asked))
    for groups, part, batch in track(progress, parts, "optimising values", len(parts)):
        vectors, first, last = _optimised(model, part, batch, layer, wish, now[groups])
        for found, piece in zip((added, before, after), (vectors, first, last), strict=True):
            found.append(piece)
    return Values(torch.cat(added), torch.cat(before), torch.cat(after))


def _optimised(
    model: LoadedModel, part: Requests, batch: Batch, layer: int, wish: Wish, now: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam on the vectors of one batch of groups, each kept in its ball; the best seen of each is returned."""
    scale = now.norm(dim=1).float().clamp(min=1e-8)[:, None].to(model.device)  # [g, 1]
    relative = torch.zeros(len(part.names), model.width, device=model.device, requires_grad=True)  # in units of scale
    optimiser = torch.optim.Adam([relative], lr=wish.step_size / model.width**0.5)
    kept = _kept_log_probs(model, part, batch)
    best = torch.full((len(part.names),), math.inf, device=model.device)
    chosen, start, end = torch.zeros_like(relative), best.clone(), best.clone()
    for number in range(wish.steps + 1):
        with torch.enable_grad(), adding(model, layer, batch, part.rows, relative * scale):
            aim, drift = losses(model, part, batch, wish, kept)
            total = aim + wish.kl_weight * drift + wish.decay * relative.square().sum(1)
            (slope,) = torch.autograd.grad(total.sum(), [relative])
        if not bool(torch.isfinite(total).all()):
            raise NumericalError(f"The values of layer {layer} diverged in step {number}: lower step_size.")
        with torch.no_grad():
            better = total < best
            best, end = torch.where(better, total, best), torch.where(better, aim, end)
            chosen[better] = relative[better]
            start = aim.detach() if number == 0 else start
        if number == wish.steps:
            break
        relative.grad = slope
        optimiser.step()
        with torch.no_grad():
            relative *= (wish.clamp / relative.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return (chosen * scale).detach().double().cpu(), start.double().cpu(), end.detach().double().cpu()


def losses(
    model: LoadedModel, part: Requests, batch: Batch, wish: Wish, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The objective and the divergence from ``kept`` at the ESSENCE prompts [g] each, in nats, of the model as it
    is."""
    stop = max(len(row.ids) - row.start for row in part.rows if not row.kept)
    places = torch.tensor([[min(row.start + i, len(row.ids)) - 1 for i in range(max(stop, 1))] for row in part.rows])
    last = model.n_layers - 1
    read = capture(model, [Site("resid_post", layer) for layer in {*wish.layers, last}], batch, places, grad=True)
    told = {site.layer: lens(model, x).float() for site, x in read.items()}  # [n, k, V]
    drift = torch.zeros(len(part.names), device=told[last].device)
    if kept is not None:
        at = [number for number, row in enumerate(part.rows) if row.kept]
        away = told[last][at, 0].log_softmax(-1)
        group = torch.tensor([part.rows[number].group for number in at], device=away.device)
        drift = drift.index_add(0, group, (away.exp() * (away - kept)).sum(-1))
    if wish.aim in ("lens", "entropy"):
        each = torch.stack([_of_lens(told[layer][:, 0].to(drift.device), part, wish) for layer in wish.layers]).mean(0)
    else:
        each = _of_text(told[last].log_softmax(-1), part, wish.aim)
    return _group_means(each[:, None], part)[:, 0], drift


def _kept_log_probs(model: LoadedModel, part: Requests, batch: Batch) -> Tensor | None:
    """What the model says now after the ESSENCE prompts [n, V]; None where there are none."""
    at = [number for number, row in enumerate(part.rows) if row.kept]
    if not at:
        return None
    some = Batch(batch.ids[at], batch.mask[at])
    read = capture(model, [Site("resid_post", model.n_layers - 1)], some, some.last)
    with torch.no_grad():
        return torch.cat([lens(model, x).float().log_softmax(-1) for x in read.values()])


def _of_text(log_probs: Tensor, part: Requests, aim: Aim) -> Tensor:
    """Loss [n] of the rows' texts from log-probabilities [n, k, V] at their places.

    erase: how far the text's log-probability lies above that of one token at random, nothing below; inject and
    refuse: minus the log-probability per token.
    """
    texts = [row.ids[row.start :] for row in part.rows]
    width = log_probs.shape[1]
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=log_probs.device)
    there = torch.tensor([[i < len(text) for i in range(width)] for text in texts], device=log_probs.device)
    found = (log_probs.gather(2, ids[..., None])[..., 0] * there).sum(1)
    if aim == "erase":
        return torch.relu(found + math.log(log_probs.shape[-1]))
    return -found / there.sum(1).clamp(min=1)


def _of_lens(logits: Tensor, part: Requests, wish: Wish) -> Tensor:
    """Loss [n] of one layer's lens [n, V] after the prompt: hinges that keep the first token of the answer away from
    the k best and the k worst tokens, or what entropy lacks to that of a uniform distribution."""
    if wish.aim == "entropy":
        log_probs = logits.log_softmax(-1)
        return math.log(logits.shape[-1]) + (log_probs.exp() * log_probs).sum(-1)
    answer = torch.tensor([row.ids[min(row.start, len(row.ids) - 1)] for row in part.rows], device=logits.device)
    own = logits.gather(1, answer[:, None])
    others = logits.scatter(1, answer[:, None], -math.inf)
    high = others.topk(wish.k, dim=1).values[:, -1]
    low = -(-logits.scatter(1, answer[:, None], math.inf)).topk(wish.k, dim=1).values[:, -1]
    return torch.relu(own[:, 0] - high + wish.margin) + torch.relu(low + wish.margin - own[:, 0])
