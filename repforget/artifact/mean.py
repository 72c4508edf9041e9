"""The average of edits: the weighted sum of what they add to the weights, free of the cross terms of mean factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from repforget.artifact.edit import Edit
from repforget.artifact.operations import (
    BiasDelta,
    DenseDelta,
    LowRankDelta,
    Operation,
    SiteOperation,
    Untie,
    scaled,
    target,
)
from repforget.errors import ArtifactError


def average(edits: Sequence[Edit], weights: Sequence[float] | None = None) -> Edit:
    """The edit that adds ``sum_i weights[i] * delta_i`` to the weights (default: the mean of the edits).

    Low-rank deltas of one weight are joined, [w1 u1, w2 u2, ..] @ [v1; v2; ..]: exact up to the float32 of the stored
    factors, at the sum of the ranks.  (The product of averaged factors, mean(u) @ mean(v), is another matrix.)  The
    edits are of one base and change weights alone, or ArtifactError.  Cost: no forward pass.  An average need not
    forget what each of its edits does.
    """
    if not edits or (weights is not None and len(weights) != len(edits)):
        raise ArtifactError(f"{len(edits)} edits cannot be averaged with {len(weights or ())} weights: give at least "
                            "one edit, and one weight per edit.")  # fmt: skip
    parts = [1 / len(edits)] * len(edits) if weights is None else list(weights)
    first = edits[0].manifest
    grouped: dict[tuple[str, str], list[Operation]] = {}
    for edit, part in zip(edits, parts, strict=True):
        _check(first.base_fingerprint, edit)
        for op in edit.operations:
            grouped.setdefault((op.kind, target(op)), []).append(scaled(op, part))
    manifest = dataclasses.replace(
        first, method=f"average({', '.join(dict.fromkeys(e.manifest.method for e in edits))})",
        settings={"weights": parts, "of": [e.digest[:12] for e in edits]}, strength=1.0,
        knowledge="+".join(dict.fromkeys(e.manifest.knowledge for e in edits)),
        weights=tuple(dict.fromkeys(w for e in edits for w in e.manifest.weights)),
        notes=tuple(dict.fromkeys(note for e in edits for note in e.manifest.notes)),
    )  # fmt: skip
    return Edit(manifest, tuple(op for group in grouped.values() for op in _sum(group)))


def _check(base: str, edit: Edit) -> None:
    if edit.manifest.base_fingerprint != base:
        raise ArtifactError(f"Edit '{edit.manifest.method}' was made for other weights than the first one: average "
                            "edits of one base.")  # fmt: skip
    for op in edit.operations:
        if isinstance(op, SiteOperation):
            raise ArtifactError(f"Edit '{edit.manifest.method}' changes activations at {target(op)}, which has no "
                                "exact average: compose such edits with Edit.then.")  # fmt: skip


def _sum(group: list[Operation]) -> list[Operation]:
    """The sum of operations of one kind on one parameter, as few as it takes."""
    low = [op for op in group if isinstance(op, LowRankDelta)]
    if low:
        u, v = torch.cat([op.u for op in low], -1), torch.cat([op.v for op in low], -2)
        return [dataclasses.replace(low[0], u=u, v=v)]
    dense = [op for op in group if isinstance(op, DenseDelta | BiasDelta)]
    if dense:
        return [dataclasses.replace(dense[0], delta=torch.stack([op.delta.double() for op in dense]).sum(0).float())]
    return group[:1] if isinstance(group[0], Untie) else group
