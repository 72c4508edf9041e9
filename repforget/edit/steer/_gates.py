"""The gate of steering and clamping: a linear one that opens for forget subjects and for few retained texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Gate
from repforget.edit._collect import Positions, collect, collect_text, new_statistics, read_points
from repforget.edit._concept import contrast, membership_concept
from repforget.edit.erase._leace_math import fit_eraser
from repforget.errors import NoEffectError
from repforget.knowledge import Fact
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.records import Site
from repforget.scoring.encode import pad_id, token_batches


def fit_gate(
    model: LoadedModel, site: Site, forget: Sequence[Fact], retain: Sequence[Fact], texts: Sequence[Sequence[int]],
    scope: Literal["token", "prefix"], positions: Positions, false_open: float,
) -> tuple[Gate, float]:  # fmt: skip
    """The gate at one site, and the share of forget facts that open it."""
    points = read_points(model, (*forget, *retain), positions)
    concept = membership_concept(points, frozenset(fact.id for fact in forget))
    seen, space = new_statistics(model, [site], concept.k, covariance=False), new_statistics(model, [site])
    collect(model, points, [site], lambda values, numbers: seen[site].update(values[site], concept.labels[numbers]))
    collect_text(model, texts, [site], lambda values: space[site].update(values[site]))
    difference = contrast(concept, seen[site])
    reader = fit_eraser(space[site], cross=difference[:, None]).right  # Σ⁻¹ difference, up to scale and sign
    if len(reader) == 0:
        raise NoEffectError(f"Forget and retain facts have the same mean at {site}, so no gate can tell them apart: "
                            "use gate='none', or a later site.")  # fmt: skip
    direction = reader[0] / reader[0].norm()
    direction = direction * torch.sign(direction @ difference)
    scores: list[Tensor] = []
    own = read_points(model, forget, positions)
    collect(model, own, [site], lambda values, _: scores.append(_project(values[site], direction)))
    kept = _highest(model, site, texts, direction)
    # a little above the last retained text that stays closed, so that float32 decides as float64 did
    threshold = float(torch.quantile(kept, 1.0 - false_open, interpolation="higher")) + 1e-4 * float(kept.std())
    share = float((torch.cat(scores) > threshold).double().mean())
    if share == 0.0:
        raise NoEffectError(f"No forget fact reaches the gate at {site} that at most {false_open:.1%} of retained "
                            "texts open: choose a later site, gate='none', or a larger false_open.")  # fmt: skip
    return Gate(direction, threshold, scope=scope), share


def _project(x: Tensor, direction: Tensor) -> Tensor:
    return (x.double() @ direction.to(x.device)).cpu()


def _highest(model: LoadedModel, site: Site, texts: Sequence[Sequence[int]], direction: Tensor) -> Tensor:
    """Highest score of each text over its tokens without the first, [n]."""
    out: list[Tensor] = []
    for _, batch in token_batches(texts, pad_id=pad_id(model.tokenizer)):
        scores = _project(capture(model, [site], batch, gather="all")[site], direction)
        out.append(scores.masked_fill(~batch.counted.cpu(), -torch.inf).amax(1))
    return torch.cat(out)
