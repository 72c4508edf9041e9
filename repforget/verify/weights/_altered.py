"""Changing the weights of a copy again and again, and asking it each time: what the attacks without training share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repforget import quantizers
from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel, copy_of
from repforget.progress import Progress, track
from repforget.records import ItemScores, Measurement
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import References

Array = NDArray[np.float64]


class Exam(NamedTuple):
    """The forget items that are asked, what the prior answers, and their answers' tokens with the rivals."""

    items: tuple[Item, ...]
    prior: Array
    paths: list[path.Path]

    def probability(self, model: LoadedModel) -> Array:
        """Per item, the truth's probability when the model's decoding is confined to the candidates."""
        return path.probability(model, len(self.items), self.paths)

    def scores(self, name: str, values: Array) -> dict[str, ItemScores]:
        """A measure and its prior."""
        return {name: ask.scores(self.items, values), f"{name}_prior": ask.scores(self.items, self.prior)}


def exam(
    model: LoadedModel, view: View, references: References, *, forms: int, alternatives: int, max_items: int, seed: int
) -> Exam:
    """The questions that every weight attack asks of this view."""
    items = ask.limited(view.forget, max_items, seed)
    paths = path.kept_paths(references, model, items, view.knowledge, forms=forms, limit=alternatives)
    return Exam(items, ask.prior(items, view.knowledge, alternatives), paths)


def wide_copy(model: LoadedModel) -> LoadedModel:
    """A copy in float32 (float64 stays), so that no change of the weights is lost in the rounding of half precision."""
    copied = copy_of(model)
    if next(copied.module.parameters()).dtype.itemsize < 4:
        copied.module.float()
    return copied


def projections(module: nn.Module) -> dict[str, Tensor]:
    """Every projection of :func:`repforget.quantizers.projections`; a model without any is an error."""
    found = quantizers.projections(module)
    if not found:
        raise UsageError("This model has no projection whose weights could be attacked: leave the verifiers of family "
                         "'weights' out of the list.")  # fmt: skip
    return found


def sweep(
    model: LoadedModel, questions: Exam, points: Sequence[float], alter: Callable[[LoadedModel, float], None], *,
    progress: Progress | None, text: str,
) -> Array:  # fmt: skip
    """Answers [points, items] of copies of ``model`` that ``alter(copy, point)`` has changed in place.

    There is one copy, set back bit for bit before every point.
    """
    copied = wide_copy(model)
    rows = []
    for point in track(progress, list(points), text):
        restore(copied.module, model.module)
        with torch.no_grad():
            alter(copied, point)
        rows.append(questions.probability(copied))
    return np.stack(rows)


@torch.no_grad()
def restore(module: nn.Module, source: nn.Module) -> None:
    """Give every parameter of ``module`` the value it has in ``source``, the model it was copied from."""
    for (_, parameter), (_, value) in zip(module.named_parameters(), source.named_parameters(), strict=True):
        parameter.copy_(value)


def pairs(module: nn.Module, other: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter with that of the same name in ``other``, zero where it has none (a bias that an edit added)."""
    there = dict(other.named_parameters(remove_duplicate=False))
    for name, parameter in module.named_parameters():
        found = there.get(name)
        yield parameter, torch.zeros_like(parameter) if found is None else found.to(parameter.device, parameter.dtype)


def alike(module: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same parameters in the same shapes, up to biases that only one of them has."""
    ours, theirs = ({n: p.shape for n, p in m.named_parameters(remove_duplicate=False)} for m in (module, other))
    return all(ours.get(name) == theirs.get(name) for name in {*ours, *theirs} if not name.endswith("bias"))


def at_best(
    questions: Exam, tables: dict[str, Array], points: Sequence[float], label: str, untouched: float = 0.0
) -> Measurement:
    """Each table's row with the highest mean over items as a measure, its curve, and how far it rises above the
    model as it is (the row at ``untouched``), which is among the rows and so the least an attacker gets."""
    out: dict[str, ItemScores] = {}
    facts = {"points of the sweep": float(len(points))}
    series: dict[str, tuple[float, ...]] = {"x": tuple(float(p) for p in points)}
    for name, table in tables.items():
        means = np.nanmean(table, axis=1)
        best = int(means.argmax())
        out |= questions.scores(name, table[best])
        series[name] = tuple(float(m) for m in means)
        facts[f"{label} of {name}"] = float(points[best])
        facts[f"rise of {name}"] = float(means[best] - means[list(points).index(untouched)])
    return Measurement(out, series, facts)
