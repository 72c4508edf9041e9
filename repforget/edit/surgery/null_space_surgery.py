"""Change what MLPs write for the forget facts, along directions that protected keys hardly have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.artifact import Edit, LowRankDelta
from repforget.edit._collect import subsample
from repforget.edit.surgery._keyspace import LayerKeys, best_layers, directions, separation
from repforget.edit.surgery._prefixes import Prefixes, logits, merged, prepare
from repforget.edit.surgery._rows import Kind, Row, checked, fact_rows, stranger_facts, text_rows
from repforget.errors import KnowledgeError, NumericalError, SiteError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization

SHARES: dict[Kind, float] = {"forget": 1.0, "retain": 1.0, "stranger": 0.8, "check": 0.2, "general": 0.25}
REVERSE = 0.5  # weight of the reverse divergence on forget facts
FLOOR = 1e-3  # probability shared by all tokens in its target
WARMUP = 10  # steps
MAX_RANK = 1024
SMALL_WIDTH = 512
GATE = 0.6  # separation below which the notes warn


def null_space_surgery(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layers: Literal["auto"] | list[int] = "auto", top_layers: int = 4,
    rank: int | Literal["auto"] = "auto", ridge: float = 0.01, steps: int = 600, step_size: float = 0.1,
    batch_size: int = 192, keep_weight: float = 1.0, strangers: int = 12000, max_facts: int = 6000,
) -> Edit:  # fmt: skip
    """Make MLP output weights write the prior for forget facts, along directions that protected keys hardly have.

    ``W += U V`` at the MLP output projections. The key side V [r, m] is closed form: generalised eigenvectors of
    forget keys against the second moment of protected keys, which is the metric of MEMIT's normal equation and a
    soft form of AlphaEdit's null space. Their one-step values do not separate people here (experiments/LOG.md), so
    the value side U [d, r] is this project's own: optimised over all layers at once, so that the answer distribution
    of forget facts goes to the prior over answers of their relation and that of everything protected stays.

    Protected are the retain facts, general text, all other tokens of the prompts, and *strangers*: names nobody
    bears, recombined from the parts of real ones, which stand for people the editor is not shown. Keys are read
    where answers are predicted, so what earlier tokens hold about a subject is not touched, and a low answer
    probability does not show that nothing is left inside.

    Args:
        layers: layers to change; "auto" is the ``top_layers`` that tell forget keys from protected ones best,
            among those of ``where`` or all (the area under the ROC of each is in the notes).
        rank: key directions per layer; "auto" is all of them, at most 1024.
        ridge: added to the protected metric, as a share of its mean variance.
        steps: optimisation steps on U.
        step_size: step of Adam, relative to the smallest of what the layers write for forget facts.
        batch_size: rows per step. keep_weight: weight of what must stay, against 1 for what must go.
        strangers: made-up facts that are protected. max_facts: facts read per set, chosen by seed.

    Raises SiteError where an MLP has no two-dimensional output projection (batched experts), KnowledgeError without
    forget or retain rows that fit the context, NumericalError on divergence. Cost: one forward over all rows, then
    ``steps`` forwards and backwards over ``batch_size`` single tokens on cached prefixes (up to 2 GiB; beyond that
    prefixes are run in every step); m x m float64 per layer.
    """
    _check(model, steps, batch_size, rank, top_layers)
    candidates = _candidates(model, layers, where)
    rows = _rows(model, data, strangers, max_facts, seed)
    with _threads(model):
        keys, pieces = _read(model, rows, candidates, progress)
        areas = {layer: separation(keys[layer], ridge) for layer in candidates}
        chosen = candidates if layers != "auto" else best_layers(list(areas.items()), top_layers)
        limit = min(site_map(model.module).mlp_width, MAX_RANK) if rank == "auto" else rank
        basis = {layer: directions(keys[layer], limit, ridge) for layer in chosen}
        scale = min(_written(model, keys[layer], layer) for layer in chosen)
        values, losses = _optimise(
            model, merged(pieces), basis, steps=steps, step=step_size * scale, batch_size=batch_size,
            keep_weight=keep_weight, seed=seed, progress=progress,
        )  # fmt: skip
        operations = [_delta(_weight(model, layer), values[layer], basis[layer].cpu()) for layer in chosen]
    settings = {"layers": chosen, "rank": limit}
    return Edit.build("null_space_surgery", settings, model, data.digest, operations,
                      notes=_notes(areas, losses, rows))  # fmt: skip


def _read(
    model: LoadedModel, rows: Sequence[Row], layers: Sequence[int], progress: Progress | None
) -> tuple[dict[int, LayerKeys], list[Prefixes]]:
    """The MLP keys of every row at the given layers, and the prefixes on which values are optimised."""
    keys = {layer: LayerKeys() for layer in layers}
    pieces: list[Prefixes] = []
    for found, reading in track(progress, prepare(model, rows, layers), "reading keys"):
        pieces.extend(found)
        for layer in layers:
            keys[layer].add(reading, layer)
    return keys, pieces


def _delta(weight: str, u: Tensor, v: Tensor) -> LowRankDelta:
    """``u v`` with as few factors as it has rank."""
    left, sizes, right = torch.linalg.svd(u.double() @ v.double(), full_matrices=False)
    r = max(1, int((sizes > sizes[0] * 1e-6).sum()))
    root = sizes[:r].sqrt()
    return LowRankDelta(weight, (left[:, :r] * root).float(), (root[:, None] * right[:r]).float())


def _check(model: LoadedModel, steps: int, batch_size: int, rank: int | str, top_layers: int) -> None:
    numbers = {"steps": steps, "batch_size": batch_size, "top_layers": top_layers}
    wrong = [name for name, value in numbers.items() if value < 1]
    if wrong or (isinstance(rank, int) and rank < 1):
        raise UsageError(f"null_space_surgery needs a positive {wrong[0] if wrong else 'rank'}: give 1 or more.")
    for layer, paths in enumerate(site_map(model.module).anatomy.layers):
        if paths.down is None:
            raise SiteError(f"Layer {layer} of '{model.name}' has batched experts and no two-dimensional MLP output "
                            "projection, which null_space_surgery changes: choose an editor that trains.")  # fmt: skip


def _weight(model: LoadedModel, layer: int) -> str:
    return f"{site_map(model.module).anatomy.layers[layer].down}.weight"


def _candidates(
    model: LoadedModel, layers: Literal["auto"] | Sequence[int], where: Localization | None
) -> list[int]:
    depth = model.n_layers
    wanted = (where.layers() if where is not None else ()) or range(depth) if layers == "auto" else layers
    if not wanted or not all(0 <= layer < depth for layer in wanted):
        raise SiteError(f"Layers {list(wanted)} were asked for: give some of 0 to {depth - 1}.")
    return sorted(set(wanted))


def _rows(model: LoadedModel, data: EditData, strangers: int, max_facts: int, seed: int) -> list[Row]:
    forget, retain = subsample(data.forget, max_facts, seed), subsample(data.retain, max_facts, seed)
    made_up = stranger_facts(data, strangers, seed)
    aside = checked(made_up or retain)
    rows = fact_rows(model, data, forget, "forget")
    rows += fact_rows(model, data, retain, "retain", frozenset() if made_up else aside)
    rows += fact_rows(model, data, made_up, "stranger", aside)
    rows += text_rows(model, data.general)
    kinds = {row.kind for row in rows}
    missing = [kind for kind in ("forget", "check") if kind not in kinds]
    if missing:
        what = "forget" if missing[0] == "forget" else "retain"
        raise KnowledgeError(f"null_space_surgery found no usable {what} facts: it needs facts to forget and facts to "
                             "keep that are short enough for the model's context.")  # fmt: skip
    return rows


@torch.no_grad()
def _written(model: LoadedModel, keys: LayerKeys, layer: int) -> float:
    """Root mean square entry of what the layer's projection writes for forget keys."""
    down = model.module.get_submodule(site_map(model.module).anatomy.layers[layer].down)
    return float(down(torch.cat(keys.forget)[:512]).float().pow(2).mean().sqrt())


@contextmanager
def _threads(model: LoadedModel) -> Iterator[None]:
    """One thread while matrices are small: more of them mostly wait for one another, and rounding depends on them."""
    before = torch.get_num_threads()
    if model.device.type == "cpu" and model.width <= SMALL_WIDTH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _edited(model: LoadedModel, basis: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> Iterator[None]:
    """The projections with ``U V`` added, so that gradients reach U; the projections' own outputs otherwise."""
    paths = site_map(model.module).anatomy.layers

    def hook(layer: int) -> Any:
        def add(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + ((args[0].float() @ basis[layer].T) @ values[layer].T).to(output.dtype)

        return add

    with ExitStack() as stack:
        for layer in basis:
            down = model.module.get_submodule(paths[layer].down)
            stack.callback(down.register_forward_hook(hook(layer)).remove)
        yield


def _optimise(
    model: LoadedModel, groups: Mapping[int, list[Prefixes]], basis: Mapping[int, Tensor], *, steps: int,
    step: float, batch_size: int, keep_weight: float, seed: int, progress: Progress | None,
) -> tuple[dict[int, Tensor], tuple[float, float]]:  # fmt: skip
    """Values U [d, r] per layer that minimise the loss, and the mean divergences (forget, kept) of the last steps."""
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(basis.values())).device
    values = {layer: torch.zeros(model.width, len(v), device=device, requires_grad=True) for layer, v in basis.items()}
    groups = {length: parts for length, parts in groups.items() if length > 1}
    weights = _row_weights(groups, keep_weight)
    odds = torch.tensor([sum(weights[p.kind] * len(p) for p in parts) for parts in groups.values()])
    optimiser = torch.optim.Adam(list(values.values()), lr=step, betas=(0.9, 0.98))
    last: list[tuple[float, float]] = []
    with _edited(model, basis, values), torch.enable_grad():
        for number in track(progress, range(steps), "optimising values", steps):
            rate = min(1.0, (number + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * number / steps))
            for group in optimiser.param_groups:
                group["lr"] = step * rate
            pick = int(torch.multinomial(odds, 1, generator=generator))
            loss, told = _loss(model, list(groups.values())[pick], weights, float(odds[pick] / odds.sum()),
                               batch_size, generator)  # fmt: skip
            if not math.isfinite(loss.item()):
                raise NumericalError(f"The loss of null_space_surgery is not finite in step {number}: lower "
                                     "step_size.")  # fmt: skip
            for value, gradient in zip(values.values(), torch.autograd.grad(loss, list(values.values())), strict=True):
                value.grad = gradient
            optimiser.step()
            last = [*last[-19:], told]
    forget, kept = zip(*last, strict=True)
    found = {layer: value.detach().cpu() for layer, value in values.items()}
    return found, (_mean(forget), _mean(kept))


def _mean(numbers: Sequence[float]) -> float:
    known = [n for n in numbers if not math.isnan(n)]
    return sum(known) / len(known) if known else math.nan


def _row_weights(groups: Mapping[int, list[Prefixes]], keep_weight: float) -> dict[Kind, float]:
    """Weight of one row of each kind in the loss."""
    counts: dict[Kind, int] = {}
    for parts in groups.values():
        for part in parts:
            counts[part.kind] = counts.get(part.kind, 0) + len(part)
    return {k: SHARES[k] * (1.0 if k == "forget" else keep_weight) / n for k, n in counts.items()}


def _loss(
    model: LoadedModel, parts: Sequence[Prefixes], weights: Mapping[Kind, float], chance: float, batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, tuple[float, float]]:  # fmt: skip
    """An unbiased estimate of the loss from rows of one length, and its mean divergences (forget, kept) in nats."""
    share = [weights[p.kind] * len(p) for p in parts]
    sizes = [min(len(p), max(4, round(batch_size * s / sum(share)))) for p, s in zip(parts, share, strict=True)]
    drawn = [(p, torch.randperm(len(p), generator=generator)[:n]) for p, n in zip(parts, sizes, strict=True)]
    log_probs = logits(model, drawn).log_softmax(-1)
    targets = torch.cat([p.target(model, rows) for p, rows in drawn])
    pieces = []
    for (part, _), target, told in zip(drawn, torch.split(targets, sizes), torch.split(log_probs, sizes), strict=True):
        away = (target * (target.clamp(min=1e-12).log() - told)).sum(-1)
        pieces.append(away + REVERSE * _reverse(target, told) if part.kind == "forget" else away)
    loss = torch.stack([(s / chance) * d.mean() for s, d in zip(share, pieces, strict=True)]).sum()
    gone = [float(d.detach().mean()) for (p, _), d in zip(drawn, pieces, strict=True) if p.kind == "forget"]
    stays = [float(d.detach().mean()) for (p, _), d in zip(drawn, pieces, strict=True) if p.kind != "forget"]
    return loss, (_mean(gone), _mean(stays))


def _reverse(target: Tensor, log_probs: Tensor) -> Tensor:
    """Divergence [n] of the model's distribution from the target, which is given a floor: punishes a true answer that
    stays likelier than its prior, where the other direction hardly notices."""
    floor = ((1 - FLOOR) * target + FLOOR / target.shape[-1]).log()
    return (log_probs.exp() * (log_probs - floor)).sum(-1)


def _notes(areas: Mapping[int, float], losses: tuple[float, float], rows: Sequence[Row]) -> tuple[str, ...]:
    table = ", ".join(f"layer {layer} {area:.3f}" for layer, area in areas.items())
    notes = [f"separation of forget keys from keys set aside (area under ROC): {table}",
             f"mean divergence after the last steps: forget facts from their prior {losses[0]:.3f} nats, "
             f"kept facts from the unedited model {losses[1]:.3f} nats"]  # fmt: skip
    if not any(row.kind == "stranger" for row in rows):
        notes.append("no strangers could be made from the subjects: people the editor is not shown are less protected")
    if max(areas.values()) < GATE:
        notes.append("no layer tells forget keys from kept ones: expect damage to what must stay")
    return tuple(notes)
