"""From an unembedding trained on records to the one trained without some of them."""

from __future__ import annotations

import numpy as np

from repforget.artifact import Edit
from repforget.edit.exact import _unembedding as unembedding
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.training import chosen

TRAINED_BY = "repforget head train-unembedding"


def head_removal(
    model: LoadedModel, data: EditData, *, seed: int = 0, progress: Progress | None = None, folder: str,
    names: list[str] | None = None,
) -> Edit:  # fmt: skip
    """Give the base the unembedding that its training ends at when some records were never in it.

    ``W = argmin sum_i -log softmax(W h_i)[t_i] + lam/2 |W - W_base|^2`` over the remaining records' frozen final
    features h, by Newton's method with conjugate gradients from the trained W until the gradient vanishes.  The
    problem is strongly convex, so that the distance to the one minimiser, which a training from scratch approaches too,
    is at most |gradient| / lam (this project; the step is the influence removal of Koh & Liang 2017, arXiv 1703.04730,
    repeated to convergence).  The edit is made for the base and takes the place of the training's own edit.

    It does not show that the base does not know the records otherwise, nor change the training's folder, which still
    holds them: a later edit has to name them again, or has them in again.

    Args:
        folder: what ``repforget head train-unembedding`` wrote.
        names: ids or clusters of records; None is the clusters of the probe's forget facts.

    Raises UsageError for a name that was never trained on and for another model than the base, ArtifactError for a
    damaged folder, NoEffectError where no record is left (the base itself is then the answer).  Cost: no forward pass;
    some ten Newton steps in float64 on the tokens that are left, 6 n d V multiplications per product.
    """
    tuned = unembedding.read(folder)
    unembedding.check_base(tuned, model)
    wanted = list(dict.fromkeys(f.cluster for f in data.forget)) if names is None else names
    going = {r.id for r in chosen(tuned.records, wanted, folder)}
    kept = np.array([record.id not in going for record in tuned.records])[tuned.owner]
    for _ in track(progress, range(1), "solving for the records that are left"):
        found = unembedding.solved(model, tuned.x[kept], tuned.tokens[kept], tuned.lam, tuned.change)
    settings = {"folder": folder.rstrip("/").rpartition("/")[2], "names": None if names is None else len(wanted)}
    return Edit.build("head_removal", settings, model, data.digest, unembedding.operations(model, found.change),
                      guarantee=unembedding.claim(found, len(going)))  # fmt: skip
