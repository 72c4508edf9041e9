"""Checked inputs of probing: finite standardised features, class numbers, groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from repforget.errors import KnowledgeError, NumericalError, UsageError


@dataclass(frozen=True)
class Labels:
    """Class numbers [n] from 0 in the order of ``classes``; -1 marks a label that is not among the classes."""

    numbers: NDArray[np.int64]
    classes: tuple[Any, ...]


def as_features(features: Any, rows: int, what: str = "features") -> Tensor:
    """Features [l, n, d] as a floating tensor (fp32, or fp64 if given so); wrong shape or NaN is an error."""
    x = torch.as_tensor(features)
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3 or x.shape[1] != rows or 0 in x.shape:
        raise UsageError(f"Probing got {what} of shape {tuple(x.shape)} for {rows} labels: give [layers, rows, "
                         "width].")  # fmt: skip
    x = x.cpu() if x.device.type == "mps" else x  # that device has no fp64
    if x.dtype != torch.float64:
        x = x.float()
    bad = ~torch.isfinite(x.sum((1, 2)))
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise NumericalError(f"The {what} of layer {first} hold NaN or infinite values, so no classifier can be "
                             "fitted: check the edit or load the model in float32.")  # fmt: skip
    return x.detach()


def as_labels(labels: ArrayLike, classes: Sequence[Any] | None = None) -> Labels:
    """Number the classes in sorted order; fewer than two classes is an error."""
    values = np.asarray(labels)
    if classes is None:
        found, numbers = np.unique(values, return_inverse=True)
        if len(found) < 2:
            raise KnowledgeError(f"Probing needs at least two classes and all {len(values)} labels are the same: "
                                 "choose another property or more items.")  # fmt: skip
        return Labels(numbers.astype(np.int64).reshape(-1), tuple(found.tolist()))
    index = {value: k for k, value in enumerate(classes)}
    return Labels(np.array([index.get(v, -1) for v in values.tolist()], dtype=np.int64), tuple(classes))


def as_groups(groups: ArrayLike | None, rows: int) -> NDArray[np.int64]:
    """Group numbers [n]; fewer than two groups is an error, since no group may be on both sides of a split."""
    values = np.arange(rows) if groups is None else np.asarray(groups)
    if len(values) != rows:
        raise UsageError(f"Probing got {len(values)} groups for {rows} labels: give one group per row.")
    found, numbers = np.unique(values, return_inverse=True)
    if len(found) < 2:
        raise KnowledgeError("Probing needs at least two clusters and all rows belong to one: give each subject its "
                             "own cluster, or more subjects.")  # fmt: skip
    return numbers.astype(np.int64).reshape(-1)


def standardise(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """Centre and scale each feature of each layer [l, n, d] by the reference rows [l, m, d] (default: all rows).

    Labels are not used.  Features that are constant in the reference become zero.  The mean is taken twice, so that
    it is exact to rounding even where it is large beside the spread.
    """
    known = x if reference is None else reference
    rough = known.mean(1, keepdim=True)
    centred = known - rough
    rest = centred.mean(1, keepdim=True)
    centred -= rest
    spread = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / centred.shape[1] ** 0.5
    # Rounding leaves a constant feature a spread of about 1e-7 of its value.
    constant = spread <= 1e-6 * rough.abs().maximum(spread).clamp(min=1e-30)
    scale = torch.where(constant, torch.zeros_like(spread), 1.0 / spread.clamp(min=1e-30))
    return (x - rough - rest if reference is not None else centred) * scale
