"""Is the knowledge only scrambled, so that a little noise in the weights uncovers it?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Measurement
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import at_best, exam, projections, sweep

_CURVE = ("noise in the weights", "standard deviation / rms of the matrix", "probability of the truth")
MEASURES = {"best_noise": MeasureInfo("knowledge", "weights", curve=_CURVE)}
JOINS = "thorough"
HELD_OUT = True
BUDGETS: Budgets = {
    "quick": {"sigmas": [0.02], "draws": 1},
    "standard": {},
    "thorough": {"sigmas": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2], "draws": 5, "alternatives": 63, "max_items": 1000},
}


def noise(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    sigmas: Sequence[float] = (0.005, 0.01, 0.02, 0.05), draws: int = 3, forms: int = 1, alternatives: int = 31,
    max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Add Gaussian noise of ``sigma`` x rms(W) to every projection W and ask again.

    The truth's probability under decoding confined to the candidates, mean over ``draws``; ``best_noise`` is at the
    sigma (0 among them) with the highest mean over items, the same maximum and the same draws on every arm.  Knowledge
    loses by noise what it holds; a rise (a fact) is the mark of obfuscation.  Embedding, unembedding, norms and biases
    stay.  Cost: one float32 copy, ``draws`` x sigmas passes of questions.

    No rise does not show absence: it shows that the knowledge is not hidden by something as brittle as noise.
    """
    points = sorted({0.0, *sigmas})
    questions = exam(model, view, references, forms=forms, alternatives=alternatives, max_items=max_items, seed=seed)
    tables = [
        sweep(model, questions, points, lambda copied, sigma, s=seed + k: add_noise(copied, sigma, s),  # type: ignore[misc]
              progress=progress, text="adding noise")
        for k in range(draws)
    ]  # fmt: skip
    return at_best(questions, {"best_noise": np.mean(tables, axis=0)}, points, "sigma")


def add_noise(model: LoadedModel, sigma: float, seed: int) -> None:
    """Add noise to the projections in place; a matrix gets the same draw whatever ``sigma`` is."""
    if not sigma:
        return
    for name, weight in projections(model.module).items():
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"noise-{seed}-{name}".encode()))
        draw = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
        weight.add_(sigma * weight.double().square().mean().sqrt().to(weight.dtype) * draw)
