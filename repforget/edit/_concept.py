"""Which concept an eraser is to remove: integer classes for every point, compared within frames.

A prompt's relation ("was born in" or "works as") is no knowledge about the subject, and must survive. The
concept is therefore compared *within* each frame (relation and kind of position): the class means are centred on
the mean of their own frame, and only differences between answers of one frame are erased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repforget.edit._collect import Points
from repforget.errors import KnowledgeError
from repforget.stats import Statistics

Target = Literal["answer", "membership"]


@dataclass(frozen=True)
class Concept:
    """``labels`` [n·p] integer classes of the points, row after row; ``frames`` [k] the frame of each class."""

    labels: Tensor
    frames: Tensor
    names: tuple[str, ...]

    @property
    def k(self) -> int:
        return len(self.frames)

    def means(self, stats: Statistics) -> Tensor:
        """Mean of every class, [k, d] (the overall mean for classes without rows)."""
        share = stats.mean_z[:, None]
        step = stats.cross.mT * ((stats.n - 1) / stats.n)
        return stats.mean_x + torch.where(share > 0, step / share.clamp_min(1e-300), torch.zeros_like(step))

    def cross(self, stats: Statistics) -> Tensor:
        """Cross-covariance [d, k] of features and classes, conditional on the frame.

        Column c is p_c·(mean of class c - mean of its frame): linear in the unconditional one, so that a single
        pass with one-hot classes serves all frames.
        """
        share = stats.mean_z
        frames = self.frames.to(share.device)
        total = torch.zeros(int(frames.max()) + 1, dtype=share.dtype, device=share.device)
        total = total.index_add(0, frames, share)
        cross = stats.cross
        summed = torch.zeros(len(cross), len(total), dtype=cross.dtype, device=cross.device)
        summed.index_add_(1, frames, cross)
        weight = torch.where(total[frames] > 0, share / total[frames], torch.zeros_like(share))
        return cross - summed[:, frames] * weight

    def spread(self, stats: Statistics) -> float:
        """Variance of the one-hot classes within their frames, summed over classes."""
        share, frames = stats.mean_z, self.frames.to(stats.mean_z.device)
        total = torch.zeros(int(frames.max()) + 1, dtype=share.dtype, device=share.device).index_add(0, frames, share)
        inside = torch.where(total[frames] > 0, share / total[frames], torch.zeros_like(share))
        return float((share * (1 - inside)).sum())


def answer_concept(points: Points) -> Concept:
    """The concept "which answer", within each relation and kind of position."""
    labels = [[fact.answer] * len(row) for fact, row in zip(points.facts, points.groups, strict=True)]
    concept = _concept(points.groups, labels)
    if concept.k == len(set(concept.frames.tolist())):
        raise KnowledgeError("Every relation of the forget facts has a single answer, so that no answer can be "
                             "told from another: use target 'membership' or facts that differ.")  # fmt: skip
    return concept


def membership_concept(points: Points, forget: frozenset[str]) -> Concept:
    """The concept "is this one of the facts to forget", within each relation that both sets have.

    Where the sets share no relation, they are compared across relations.
    """
    labels = [["forget" if fact.id in forget else "retain"] * len(row)
              for fact, row in zip(points.facts, points.groups, strict=True)]  # fmt: skip
    concept = _concept(points.groups, labels)
    if concept.k > len(set(concept.frames.tolist())):
        return concept
    return _concept([[frame.rpartition("/")[2] for frame in row] for row in points.groups], labels)


def contrast(concept: Concept, stats: Statistics) -> Tensor:
    """Mean difference [d] of forget and retain points within frames, weighted by the forget points of each frame.

    ``concept`` is a membership concept and ``stats`` counted its one-hot labels.
    """
    means = concept.means(stats)
    number = {name: i for i, name in enumerate(concept.names)}
    total, weight = torch.zeros_like(means[0]), 0.0
    for name, i in number.items():
        frame, _, label = name.rpartition("=")
        other = number.get(f"{frame}=retain")
        share = float(stats.mean_z[i])
        if label == "forget" and other is not None and share > 0 and float(stats.mean_z[other]) > 0:
            total += share * (means[i] - means[other])
            weight += share
    if weight == 0.0:
        raise KnowledgeError("No relation has both forget and retain facts that could be read, so that there is no "
                             "difference of means: give retain facts of the same relations.")  # fmt: skip
    return total / weight


def _concept(frames: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> Concept:
    pairs = [pair for a, b in zip(frames, labels, strict=True) for pair in zip(a, b, strict=True)]
    classes = sorted(set(pairs))
    number = {pair: i for i, pair in enumerate(classes)}
    own = {frame: i for i, frame in enumerate(sorted({frame for frame, _ in classes}))}
    return Concept(
        torch.tensor([number[pair] for pair in pairs]),
        torch.tensor([own[frame] for frame, _ in classes]),
        tuple(f"{frame}={label}" for frame, label in classes),
    )
