"""Path patching: what one sender says to one receiver, while everything off the path stays as in the base run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from repforget.causal import (
    TOKEN_BUDGET,
    Metric,
    Prepared,
    Run,
    answer_metric,
    patch_effects,
    patch_plan,
    patch_writer,
    prepare,
)
from repforget.errors import NumericalError, UsageError
from repforget.locate._exact import Array, Moves, Task, join, moves_of
from repforget.models.capture import Batch, EditSite, capture, hooks
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Component, Site

Through = Literal["nothing", "mlps", "everything"]
Receiver = tuple[Site, ...]
Values = dict[Site, Tensor]


def receiver_of(model: LoadedModel, named: str | Sequence[str]) -> Receiver:
    """The state ``final``, one residual state (resid_pre or resid_post), or queries, keys and values of heads.

    Raises UsageError for anything else and SiteError for a site that the model does not have.
    """
    names = [named] if isinstance(named, str) else list(named)
    last = Site("resid_post", model.n_layers - 1)
    sites = tuple(dict.fromkeys(last if name == "final" else Site.parse(name) for name in names))
    residual = len(sites) == 1 and sites[0].kind in ("resid_pre", "resid_post")
    if not residual and not (sites and all(site.kind in ("q", "k", "v") for site in sites)):
        raise UsageError(f"A path cannot end in {', '.join(names) or 'nothing'}: name 'final', one resid_pre or "
                         "resid_post, or queries, keys and values of heads such as q.3.h1.")  # fmt: skip
    places = site_map(model.module)
    for site in sites:
        places.locate(site)
    return sites


def reach(site: Site) -> int:
    """The layers below this write to what the site reads."""
    return site.layer + 1 if site.kind == "resid_post" else site.layer


def path_moves(
    model: LoadedModel, runs: Sequence[Run], senders: Sequence[Component], receiver: Receiver,
    through: Through = "nothing", metric: Metric = "logprob", progress: Progress | None = None, *,
    token_budget: int = TOKEN_BUDGET,
) -> Array:  # fmt: skip
    """How far the donor's value of each sender moves the metric along its path to the receiver alone [senders, n].

    The receiver's value is computed with the sender's donor value written in and all heads, and all MLPs unless they
    are on the path, held at the base; with it in place everything behind the receiver is computed again, norms
    included. A sender that does not lie before the receiver moves exactly 0. ``through="everything"`` holds nothing.
    Cost: a forward pass of base and donor per run and one per run and sender, two where heads receive.
    """
    depth = max(map(reach, receiver))
    reaching = [k for k, c in enumerate(senders) if c.site.layer < depth]
    result = np.zeros((len(senders), len(runs)), dtype=np.float64)
    plans = {k: patch_plan(model, (senders[k],)) for k in reaching}
    written = sorted({site for plan in plans.values() for site in plan})
    held = _held(depth, through)
    for item in track(progress, list(prepare(model, runs, token_budget=max(1, token_budget // 4))), "patching paths"):
        if not reaching:
            break
        base = capture(model, held, item.base, "all") if held else {}
        donor = capture(model, written, item.donor, "all")
        with torch.no_grad():
            start = answer_metric(model, item.base, item, metric)
        group = max(1, token_budget // item.base.ids.numel())
        for first in range(0, len(reaching), group):
            some = reaching[first : first + group]
            edits = _edits(base, donor, item, [plans[k] for k in some])
            wide = Batch(item.base.ids.repeat(len(some), 1), item.base.mask.repeat(len(some), 1))
            scores = _received(model, item, wide, receiver, edits, metric).reshape(len(some), -1)
            result[np.ix_(some, item.rows)] = (scores - start).cpu().numpy()
    if not np.isfinite(result).all():
        raise NumericalError(f"Patching paths of model '{model.name}' gave values that are not finite: load it in "
                             "float32 and try again.")  # fmt: skip
    return result


def _held(depth: int, through: Through) -> list[Site]:
    """What stays at the base below the receiver; heads before their projection, so that one of them can be written."""
    kinds = {"nothing": ("attn_z", "mlp_out"), "mlps": ("attn_z",), "everything": ()}[through]
    return [Site(kind, layer) for layer in range(depth) for kind in kinds]


def _edits(
    base: Values, donor: Values, item: Prepared, plans: Sequence[dict[Site, list[int] | None]]
) -> dict[Site, EditSite]:
    """Hold every site of ``base`` in all row blocks, then write each block's own sender."""

    def edit(site: Site) -> EditSite:
        named = any(site in plan for plan in plans)
        write: Callable[[Tensor], Tensor] | None = patch_writer(donor[site], item.where, plans, site) if named else None

        def visit(x: Tensor) -> Tensor:
            kept = base[site].repeat(len(plans), 1, 1) if site in base else x
            return kept if write is None else write(kept)

        return visit

    return {site: edit(site) for site in sorted({*base, *(s for plan in plans for s in plan)})}


def _received(
    model: LoadedModel, item: Prepared, wide: Batch, receiver: Receiver, edits: dict[Site, EditSite], metric: Metric
) -> Tensor:
    """The metric with the receiver's value as the edits make it; all edits of a residual state lie before it, so that
    one pass serves, while heads receive in a run whose stream is the base's."""
    if receiver[0].kind in ("q", "k", "v"):
        with torch.no_grad(), hooks(model, edits):
            values = capture(model, receiver, wide, "all")
        edits = {site: lambda _, value=values[site]: value for site in receiver}  # type: ignore[misc]
    with torch.no_grad(), hooks(model, edits):
        return answer_metric(model, wide, item, metric)


def measure_paths(
    tasks: Sequence[Task], senders: Sequence[Component], receiver: Receiver, through: Through,
    progress: Progress | None = None,
) -> Moves:  # fmt: skip
    """:func:`path_moves` on the runs of all tasks, with the gaps that the whole prompt makes."""

    def moved(task: Task, runs: Sequence[Run]) -> Array:
        return path_moves(task.model, runs, senders, receiver, through, task.metric, progress)

    return join([moves_of(task, moved(task, task.forget),
                          patch_effects(task.model, task.forget, [], metric=task.metric).gap,
                          moved(task, task.retain) if task.retain else np.zeros((len(senders), 0)))
                 for task in tasks])  # fmt: skip


def path_passes(tasks: Sequence[Task], senders: Sequence[Component], receiver: Receiver) -> float:
    """Sequences run for :func:`measure_paths`."""
    depth, each = max(map(reach, receiver)), 2 if receiver[0].kind in ("q", "k", "v") else 1
    count = sum(c.site.layer < depth for c in senders)
    return float(sum((len(t.forget) + len(t.retain)) * (each * count + 3) + 2 * len(t.forget) for t in tasks))
