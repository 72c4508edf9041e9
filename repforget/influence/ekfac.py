"""EK-FAC curvature of a model on some examples: fitted in two passes, kept by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from repforget.errors import NumericalError, UsageError
from repforget.influence.factors import Factors, Moments, Spread, slices
from repforget.influence.passes import passes, uniform
from repforget.models.load import LoadedModel, fingerprint
from repforget.progress import Progress
from repforget.store import Store
from repforget.training import Example

VERSION = "ekfac-2"  # of what is kept
FILE = "factors.safetensors"


@dataclass(frozen=True, eq=False)
class Curvature:
    """Factors of the Gauss-Newton matrix per linear map; ``predictions`` labelled tokens were read."""

    factors: Mapping[str, Factors]
    predictions: int

    @property
    def bytes(self) -> int:
        """Memory of the factors."""
        return sum(t.nbytes for f in self.factors.values() for t in vars(f).values() if t is not None)


def curvature(
    model: LoadedModel, examples: Sequence[Example], names: Sequence[str], *, seed: int = 0, draws: int = 1,
    folder: str | Path | None = None, progress: Progress | None = None,
) -> Curvature:  # fmt: skip
    """The Gauss-Newton matrix of each linear map on ``examples``, by EK-FAC.

    ``A = E[a aᵀ]`` of inputs and ``G = E[g gᵀ]`` of gradients of outputs for labels that the model draws (the true
    Fisher), their eigenvectors, and in the basis of these the mean squares of the records' gradients, all in float64
    and per prediction.  Source: George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296.

    Args:
        names: weights of linear maps [out, in], see :func:`repforget.influence.maps.linear_maps`.
        seed: from it follow the labels drawn, each by its prediction alone: batches and padding do not matter.
        draws: labels drawn per prediction, each in passes of its own.
        folder: where factors are kept by content (weights, examples, maps, seed), so that they are fitted once.

    Raises NumericalError where no prediction depends on a map.  Cost: 2 ``draws`` forward and backward passes; per map
    in² + out² + in x out float64, twice that while it is fitted, and two eigendecompositions.  It shows nothing of how
    maps depend on each other, nor of embeddings, norms and biases.
    """
    if draws < 1:
        raise UsageError(f"Curvature was asked for with {draws} draws of labels: give at least one.")
    if folder is None:
        return _fitted(model, examples, names, seed, draws, progress)
    key = {"version": VERSION, "model": fingerprint(model.module), "examples": _digest(examples), "maps": list(names),
           "seed": seed, "draws": draws}  # fmt: skip

    def build(place: Path) -> None:
        from safetensors.torch import save_file

        made = _fitted(model, examples, names, seed, draws, progress)
        tensors = {f"{name}:{part}": t.contiguous().cpu() for name, f in made.factors.items()
                   for part, t in vars(f).items()}  # fmt: skip
        save_file(tensors, str(place / FILE), metadata={"predictions": str(made.predictions)})

    return _loaded(Store(Path(folder)).stage("ekfac", key, build) / FILE, model, names)


def _fitted(
    model: LoadedModel, examples: Sequence[Example], names: Sequence[str], seed: int, draws: int,
    progress: Progress | None,
) -> Curvature:  # fmt: skip
    numbers = [uniform(examples, seed * draws + k) for k in range(draws)]
    moments = {name: Moments() for name in names}
    for number in numbers:
        for part in passes(model, examples, names, drawn=number, progress=progress, description="reading curvature"):
            for name, (inputs, gradients) in part.seen.items():
                moments[name].add(inputs.flatten(0, -2), gradients.flatten(0, -2), part.predictions)
    spreads = {name: Spread(moments.pop(name).factors(name)) for name in names}
    for number in numbers:
        for part in passes(model, examples, names, drawn=number, progress=progress, description="refitting curvature"):
            for name, (inputs, gradients) in part.seen.items():
                for rows in slices(inputs, gradients):
                    spreads[name].add(inputs[rows], gradients[rows], 0)
                spreads[name].predictions += part.predictions
    found = {name: spread.refitted() for name, spread in spreads.items()}
    flat = [name for name, f in found.items() if not bool(f.values.mean() > 0) or not bool(f.values.isfinite().all())]
    if flat:
        raise NumericalError(f"The gradients at '{flat[0]}' are 0 or not finite on all {len(examples)} examples, so "
                             "that there is no curvature: give other examples or maps.")  # fmt: skip
    return Curvature(found, spreads[names[0]].predictions // draws)


def _digest(examples: Sequence[Example]) -> str:
    body: list[Any] = [[e.tokens, e.labelled] for e in examples]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _loaded(path: Path, model: LoadedModel, names: Sequence[str]) -> Curvature:
    from safetensors import safe_open

    parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    with safe_open(str(path), "pt") as file:
        predictions = int(file.metadata()["predictions"])
        for key in file.keys():  # noqa: SIM118 (no mapping)
            name, _, part = key.rpartition(":")
            parts[name][part] = file.get_tensor(key).to(model.module.get_parameter(name).device)
    return Curvature({name: Factors(**tensors) for name, tensors in parts.items()}, predictions)
