"""Restoring clean states, role of the token by role of the token, in a run whose subject was corrupted."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from repforget.causal import EMBED, Metric, Patch, Prepared, Run, patch_effects
from repforget.errors import UsageError
from repforget.locate._exact import Array, in_second_half, mean_gap
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Component

Scale = Literal["logprob", "probability", "logit_difference"]
ROLES = ("first subject token", "middle subject tokens", "last subject token", "first later token", "last prompt token")


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of standard deviation ``size`` on the subject's token embeddings, drawn ``samples`` times."""

    size: float
    samples: int
    seed: int


@dataclass(frozen=True)
class Traces:
    """What restoring moves, per role, patch and run [roles, patches, n] (NaN where a prompt has no such token), and
    how far the clean run lies above the corrupted one [n]."""

    moved: Array
    gap: Array
    clusters: tuple[str, ...]


def token_roles(run: Run) -> dict[str, tuple[int, ...]]:
    """Role -> indices, for a run whose positions are its subject's tokens; a token has at most one role.

    A subject of one token has a last token alone; a single token between subject and answer is the last of the prompt.
    """
    subject, later = run.positions, range(run.positions[-1] + 1, run.start)
    places = (subject[:1] if len(subject) > 1 else (), subject[1:-1], subject[-1:],
              later[:1] if len(later) > 1 else (), later[-1:])  # fmt: skip
    return {role: tuple(found) for role, found in zip(ROLES, places, strict=True) if found}


def windows(model: LoadedModel, components: Sequence[Component], window: int | Literal["auto"]) -> list[Patch]:
    """What is restored for each component: a state alone, or the ``window`` layers of its kind centred on it."""
    depth = model.n_layers
    wide = max(1, min(10, round(depth / 5))) if window == "auto" else window
    if not 1 <= wide <= depth:
        raise UsageError(f"A window of {wide} layers cannot be restored in a model of {depth}: choose 1 to {depth}, or "
                         "'auto'.")  # fmt: skip
    places = site_map(model.module)

    def around(component: Component) -> Patch:
        site = component.site
        if site.kind not in ("attn_out", "mlp_out"):
            return (component,)
        first = site.layer - (wide - 1) // 2
        layers = range(max(0, first), min(depth, first + wide))
        return tuple(Component(s) for s in places.expand(site.kind) if s.layer in layers)

    return [around(component) for component in components]


def embedding_scale(model: LoadedModel, runs: Sequence[Run]) -> float:
    """Standard deviation of the entries of the subjects' token embeddings, as the model scales them."""
    tokens = sorted({run.donor[p] for run in runs for p in run.positions})
    ids = torch.tensor(tokens, device=model.device)[:, None]
    value = capture(model, [EMBED], Batch(ids, torch.ones_like(ids)), "all")[EMBED]
    return float(value.double().std(correction=0))


def noise_for(model: LoadedModel, runs: Sequence[Run], noise: Noise) -> Callable[[Prepared], Tensor]:
    """Draw ``k % samples`` of the noise for the subject of run ``k`` [b, s, d], however the runs are batched."""

    def drawn(item: Prepared) -> Tensor:
        length = item.base.ids.shape[1]
        shift = torch.zeros(*item.base.ids.shape, model.width)
        for row, k in enumerate(item.rows):
            run = runs[k]
            key = zlib.crc32(f"noise-{noise.seed}-{run.id}-{k % noise.samples}".encode())
            values = torch.randn(len(run.positions), model.width, generator=torch.Generator().manual_seed(key))
            shift[row, [p + length - (len(run.base) - 1) for p in run.positions]] = noise.size * values
        return shift

    return drawn


def trace(
    model: LoadedModel, runs: Sequence[Run], patches: Sequence[Patch], scale: Scale, noise: Noise | None = None,
    progress: Progress | None = None,
) -> Traces:  # fmt: skip
    """Restore each patch at the tokens of each role, one role at a time, averaged over the draws of noise.

    ``runs`` have the corrupted prompt as base and the clean one as donor (the same with noise); their positions are the
    subject's tokens. Cost: one forward pass per run, role, patch and draw.
    """
    samples = 1 if noise is None else noise.samples
    copies = [run for run in runs for _ in range(samples)]
    metric: Metric = "logprob" if scale == "probability" else scale
    shape = len(runs), samples

    def effects(chosen: Sequence[int], restored: Sequence[Patch], role: str | None) -> tuple[Array, Array]:
        some = [copies[k] for k in chosen]
        shift = None if noise is None else noise_for(model, some, noise)
        written = some if role is None else [replace(run, positions=token_roles(run)[role]) for run in some]
        found = patch_effects(model, written, restored, metric=metric, progress=progress, shift=shift)
        parts = found.base, found.donor, found.patched
        base, donor, patched = (np.exp(p) for p in parts) if scale == "probability" else parts
        return patched - base, donor - base

    _, gap = effects(range(len(copies)), [], None)
    moved = np.full((len(ROLES), len(patches), len(copies)), np.nan)
    for place, role in enumerate(ROLES):
        chosen = [k for k, run in enumerate(copies) if role in token_roles(run)]
        if chosen:
            moved[place][:, chosen], _ = effects(chosen, patches, role)
    return Traces(moved.reshape(*moved.shape[:2], *shape).mean(-1), gap.reshape(shape).mean(-1),
                  tuple(run.cluster for run in runs))  # fmt: skip


def role_scores(forget: Traces, retain: Traces | None, contrast: float, seed: int | None = None) -> tuple[Array, Array]:
    """Share of the mean gap by role and patch, less ``contrast`` times the share on retain facts [roles, patches], NaN
    for a role that no fact has; and that of the role in which each patch moves the forget facts most [patches].

    With ``seed``, only on the first half of the clusters. Each share is of its own gap: noise costs both kinds of facts
    their answers.
    """
    shares = _shares(forget, seed)
    best = np.nanargmax(shares, axis=0)[None]
    if retain is not None:
        shares = shares - contrast * np.nan_to_num(_shares(retain, seed))
    return shares, np.take_along_axis(shares, best, axis=0)[0]


def _shares(traces: Traces, seed: int | None) -> Array:
    late = np.zeros(len(traces.gap), dtype=bool) if seed is None else in_second_half(traces.clusters, seed)
    early = ~late if not late.all() else late
    part = traces.moved[..., early]
    count = np.isfinite(part).sum(axis=-1)
    mean = np.where(count > 0, np.nan_to_num(part).sum(axis=-1) / np.maximum(count, 1), np.nan)
    return np.asarray(mean / mean_gap(traces.gap[early]), dtype=np.float64)
