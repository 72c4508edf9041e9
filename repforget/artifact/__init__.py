"""The Edit: a small, frozen, portable artifact to attach, fold, undo, save, compose and export."""

from __future__ import annotations

from repforget.artifact.attach import detached
from repforget.artifact.edit import ArtifactKind, Edit, EditManifest
from repforget.artifact.files import load_edit
from repforget.artifact.floor import floored, magnitude_floor
from repforget.artifact.fold import Parity, Undo
from repforget.artifact.mean import average
from repforget.artifact.operations import (
    AddVector,
    Affine,
    BiasDelta,
    ClampFeatures,
    DenseDelta,
    Gate,
    LowRankDelta,
    Operation,
    ScaleUnits,
    SparseDelta,
    Untie,
    size,
    target,
)
from repforget.artifact.placebo import placebo_of

__all__ = [
    "AddVector", "Affine", "ArtifactKind", "BiasDelta", "ClampFeatures", "DenseDelta", "Edit", "EditManifest", "Gate",
    "LowRankDelta", "Operation", "Parity", "ScaleUnits", "SparseDelta", "Undo", "Untie", "average", "detached",
    "floored", "load_edit", "magnitude_floor", "placebo_of", "size", "target",
]  # fmt: skip
