"""Forgetting that holds at every depth: the layers above a drawn one are the untouched model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from repforget.edit.train.combine._flat import mix
from repforget.errors import UsageError
from repforget.models._names import core
from repforget.models.sites import site_map
from repforget.records import Site

if TYPE_CHECKING:
    from repforget.edit.train._engine import Gradients, StepContext


def grafting(step: StepContext, *, scale: float = 1.0) -> Gradients:
    """Add the forget gradient of the lower layers while all above a drawn layer are the untouched model's.

    At each step a layer l but the last is drawn, everything above it gets its original values, and ``scale`` times the
    forget gradient there of the embedding and layers 0 to l joins the plain gradients; the bits come back.  What the
    lower layers pass on then has to be forgotten, not only what the upper ones make of it: the states that
    ``patch_depth`` puts into the original, and the lens reads.  A wrapper of this project (model stitching: Lenc and
    Vedaldi 2015, arXiv 1411.5908; Bansal et al. 2021, arXiv 2106.07682).  Cost: one more forward and backward on the
    forget rows.  It holds retention less: what must stay shares the lower layers, so that it takes more steps.  That
    the original finds nothing in these states does not show that nothing else could.
    """
    if not scale >= 0:
        raise UsageError(f"grafting was given scale {scale}: give 0 or more.")
    found = {**step.gradients(("forget",)), **step.gradients(("retain",))}
    depth = step.model.n_layers
    if not scale or depth < 2:
        return found
    last = int(torch.randint(depth - 1, (), generator=step.generator))
    kept = _below(step, last)
    with step.restored():
        with torch.no_grad():
            for p, original, below in zip(step.parameters, step.engine.originals, kept, strict=True):
                if not below:
                    p.copy_(original)
        there = step.gradients(("forget",))["forget"]
    there = [g if below else torch.zeros_like(g) for g, below in zip(there, kept, strict=True)]
    return {**found, "forget": mix(1.0, found["forget"], scale, there)}


def _below(step: StepContext, last: int) -> list[bool]:
    """Which trained parameters belong to the embedding (one shared with the unembedding too) or a layer up to it."""
    module = core(step.model)
    places = site_map(module)
    blocks = [places.locate(Site("resid_post", layer)).path for layer in range(last + 1)]
    anatomy = places.anatomy
    paths = [path for path in (anatomy.embed, anatomy.position_embed, *blocks) if path]
    inside = {id(p) for path in paths for p in module.get_submodule(path).parameters()}
    return [id(p) in inside for p in step.parameters]
