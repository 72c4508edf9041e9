"""From the served model of a sharded training to the one that was never trained on some records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from repforget.artifact import Edit, LowRankDelta
from repforget.artifact.weights import changes_by_owner, new_values
from repforget.errors import ArtifactError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel, fingerprint, load
from repforget.progress import Progress
from repforget.shards.adapters import merged_factors, operations
from repforget.shards.combine import combined, shard_factors
from repforget.shards.folder import Training, build, opened
from repforget.shards.plan import place
from repforget.shards.removal import guarantee_of, share, without
from repforget.training import chosen

TRAINED_BY = "repforget train-shards"


def shard_removal(
    model: LoadedModel, data: EditData, *, seed: int = 0, progress: Progress | None = None, folder: str,
    names: list[str] | None = None, base: str = "auto",
) -> Edit:  # fmt: skip
    """Take the weights of a sharded training to those that the same training gives without some of its records.

    ``W += w s (sum_k B'_k A'_k - sum_k B_k A_k)`` over the shards k that saw one of the records, with their factors
    before (B, A) and trained again without them (B', A'), side by side in one low-rank delta per layer.  Bourtoule et
    al. 2021, arXiv 1912.03817 (order s3t: Chowdhury et al. 2024, arXiv 2406.16257: nothing is trained, blocks drop
    out).  The model is the served one: the base with all shards as ``repforget shards export`` writes it.  Given the
    base itself, the edit is the whole of the shards without the records, to be served beside it.

    The slices that are trained again are kept in the folder, where ``repforget shards remove`` finds them: that
    command takes the records out of the folder, this editor only out of the model: until then a later edit has to name
    them again.  In the last bits the edited model keeps the rounding of the one before; only a new export is free of
    it.  Nothing is shown about other data that taught the model the same.

    Args:
        folder: what ``repforget train-shards`` wrote, with the records still in it.
        names: ids or clusters of the records; None is the clusters of the probe's forget facts.
        base: the base model; "auto" is the one the folder names.

    Raises UsageError for a name that was never trained on, where all were taken out before, or for a folder that is
    not finished, ArtifactError for a model that is neither the base nor the base with the shards.  Cost: training of
    the affected shards from the affected slice on; memory: base and model.
    """
    with opened(folder).store.locked():  # opened again, now that no request can take records out meanwhile
        return _edit(model, data, opened(folder), names, base, progress)


def _edit(
    model: LoadedModel, data: EditData, training: Training, names: list[str] | None, base: str,
    progress: Progress | None,
) -> Edit:  # fmt: skip
    wanted = list(dict.fromkeys(f.cluster for f in data.forget)) if names is None else names
    here = {name for r in training.records for name in (r.id, r.cluster)}
    wanted = [name for name in wanted if name in here or not training.was_here(name)]
    if not wanted:
        raise UsageError(f"All of these records were taken out of '{training.root}' before: 'repforget shards export' "
                         "writes the model without them.")  # fmt: skip
    going = chosen(training.records, wanted, str(training.root))
    after = replace(training, records=without(training, going))
    as_base = model.fingerprint == training.base["fingerprint"]
    plain = model if as_base else load(training.base["model"] if base == "auto" else base, device=str(model.device),
                                       dtype=training.base["dtype"])  # fmt: skip
    training.check_base(plain)
    if not as_base:
        _check_served(training, plain, model)
    s = training.settings
    if s.order == "sisa":
        build(after, plain, progress)
    shards = sorted({place(s, r)[0] for r in going})
    old, new = shard_factors(training), shard_factors(after)
    fresh = operations(merged_factors([(s.weight, f) for f in new.values()]), s.scale)
    change = merged_factors([(sign * s.weight, each[k]) for k in shards for sign, each in ((1, new), (-1, old))])
    found = fresh if as_base else operations(change, s.scale)
    numbers = {"records": float(len(going)), "shards": float(len(shards)), "share": share(training, after),
               "largest rounding difference": 0.0 if as_base else _gap(model, plain, found, fresh)}  # fmt: skip
    settings = {"folder": training.root.name, "names": None if names is None else len(wanted), "combine": s.combine,
                "base": training.base["model"], "served": "base and adapters" if as_base else "one checkpoint"}
    held = guarantee_of(after, len(going), numbers)
    if not as_base:
        held = replace(held, statement=f"{held.statement}; the weights are the base with them but for the rounding of "
                                       "the model that is edited, which a new export does not have")  # fmt: skip
    return Edit.build("shard_removal", settings, model, data.digest, found, guarantee=held)


def _check_served(training: Training, plain: LoadedModel, model: LoadedModel) -> None:
    with combined(training, plain).attach(plain):
        expected = fingerprint(plain.module)
    if expected != model.fingerprint:
        raise ArtifactError(f"'{model.name}' is neither the base of the shards in '{training.root}' nor that base with "
                            "all of them: give the model that 'repforget shards export' wrote.")  # fmt: skip


def _gap(
    model: LoadedModel, plain: LoadedModel, found: Sequence[LowRankDelta], fresh: Sequence[LowRankDelta]
) -> float:
    """Largest difference between weights changed in the served model and weights made from the base anew."""
    anew = {op.weight: op for op in fresh}
    gap = 0.0
    for op in found:
        first = _changed(model, op.weight, op)
        gap = max(gap, float((first - _changed(plain, op.weight, anew.get(op.weight))).abs().max()))
    return gap


def _changed(model: LoadedModel, name: str, op: LowRankDelta | None) -> Tensor:
    """The weight with ``op`` in its own dtype, float64."""
    grouped = changes_by_owner(model.module, [] if op is None else [op])
    for new in new_values(model.module, grouped):
        return new.value.double()
    return model.module.get_parameter(name).detach().double()  # type: ignore[no-any-return]
