"""A client that leaves: the trained global weights without what it taught them, by four ways of very different cost.

:func:`retrain` is exact and the oracle of the others.  :func:`fed_eraser` and :func:`rollback` work from the record of
the training, :func:`client_side` needs the client that leaves once more.  All but the first are approximations without
a bound: what they leave behind is measured against the oracle, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from repforget.errors import UsageError, nearest
from repforget.federated.aggregate import ADAM, Adam, aggregate, applied, dense, lengths, shares
from repforget.federated.history import Round, final_state
from repforget.federated.records import LEFT, RIGHT, Rule, Update
from repforget.guarantee import Guarantee
from repforget.progress import Progress, track

Weights = Mapping[str, np.ndarray]
# client, global weights, number of the round, share of the usual local epochs -> the update of that client
Train = Callable[[str, Weights, int, float], Update]


@dataclass(frozen=True, eq=False)
class Distilled:
    """The student's ``weights`` after distillation, the CPU ``seconds`` and steps it took, and what is to be said."""

    weights: Weights
    steps: int
    seconds: float
    notes: tuple[str, ...] = ()


Distil = Callable[[Weights, Weights], Distilled]  # of a student and its teacher, on general texts


@dataclass(frozen=True, eq=False)
class Forgotten:
    """Global ``weights`` after ``client`` left, what that cost in local trainings, and what is to be said of it."""

    method: str
    client: str
    weights: Weights
    trainings: int
    notes: tuple[str, ...] = ()
    guarantee: Guarantee | None = None
    distilled: Distilled | None = None


def retrain(
    rounds: Sequence[Round], client: str, train: Train, *, rule: Rule = "fedavg", adam: Adam = ADAM,
    progress: Progress | None = None,
) -> Forgotten:  # fmt: skip
    """Train again from the first state with the same clients in the same rounds, but for the one that leaves.

    The definition of exact unlearning.  Cost: every local training of the others again; it asks all of them.
    """
    _leaving(rounds, client)
    weights, state, trainings = dict(rounds[0].before), dict[str, np.ndarray](), 0
    for number in track(progress, range(len(rounds)), f"retraining without {client}", len(rounds)):
        updates = [_trained(train, old.client, weights, number, 1.0) for old in _kept(rounds[number], client)]
        trainings += len(updates)
        if updates:
            weights = applied(weights, aggregate(updates, rule, adam=adam, state=state))
    return Forgotten("retrain", client, weights, trainings, (), _exact(len(rounds)))


def fed_eraser(
    rounds: Sequence[Round], client: str, train: Train, *, interval: int = 1, local_share: float = 0.5,
    per_tensor: bool = False, compat: bool = False, rule: Rule = "fedavg", adam: Adam = ADAM,
    progress: Progress | None = None,
) -> Forgotten:  # fmt: skip
    """Walk the recorded rounds again without the client: old lengths, new directions (FedEraser).

    Liu et al. 2021, arXiv 2012.13891: in every ``interval``-th round each kept client trains for ``local_share`` of
    its usual epochs from the new state, and its update becomes ``|old| new / |new|``, client by client, *before* the
    updates are aggregated.  Norms are those of the whole update (``per_tensor``: of each tensor; the paper leaves it
    open).  Rounds before the client's first count as they were, and that one without calibration: until then no model
    had seen the client.  A client whose updates are all zero taught nothing, and the weights stay as they are.

    ``compat`` does what the released code does instead: one step per tensor whose length is that of the kept clients'
    mean model minus the global model *after* the old round, along the mean new update.  Where directions agree it is
    far too short (.33 against 3.16 by the paper's rule, with ten clients of independent old updates).

    Raises UsageError for a client that never took part or is the only one.  Cost: ``local_share / interval`` of the
    others' training, and a record of all updates.  Lengths come from rounds that the client had shaped, an interval
    above 1 walks a shorter way, and nothing bounds the distance to :func:`retrain`.
    """
    if interval < 1 or not 0 < local_share <= 1:
        raise UsageError(f"FedEraser was given interval {interval} and a local share of {local_share}: use an interval "
                         "of at least 1 and a share above 0 and at most 1.")  # fmt: skip
    _leaving(rounds, client)
    first = next((i for i in range(len(rounds)) if _taught(rounds[i], client)), None)
    if first is None:
        note = "every update of the client is zero: it taught the model nothing, and the weights are as they were"
        return Forgotten("fed_eraser", client, final_state(rounds, rule, adam), 0, (note,))
    state: dict[str, np.ndarray] = {}
    for number in range(first if rule == "fedadam" else 0):
        if kept := _kept(rounds[number], client):
            aggregate(kept, rule, adam=adam, state=state)
    weights, trainings, still = dict(rounds[first].before), 0, 0
    steps = range(first, len(rounds), interval)
    for number in track(progress, steps, f"calibrating without {client}", len(steps)):
        held = rounds[number]
        updates = _kept(held, client)
        if not updates:
            continue
        if number > first:
            new = [_trained(train, old.client, weights, number, local_share) for old in updates]
            trainings, still = trainings + len(new), still + sum(not _moves(update) for update in new)
            if compat:
                after = rounds[number + 1].before if number + 1 < len(rounds) else final_state(rounds, rule, adam)
                weights = applied(weights, _released(held.before, after, updates, new))
                continue
            updates = [calibrated(a, b, per_tensor=per_tensor) for a, b in zip(updates, new, strict=True)]
        weights = applied(weights, aggregate(updates, rule, adam=adam, state=state))
    notes = (f"{still} of {trainings} new updates are zero and give no direction",) if still else ()
    return Forgotten("fed_eraser", client, weights, trainings, notes)


def calibrated(old: Update, new: Update, *, per_tensor: bool = False) -> Update:
    """``|old| new / |new|``: the new update as long as the old one; a zero update has no direction and stays zero.

    Norms are Euclidean over all tensors, an adapter's that of its product; ``per_tensor``: each tensor by itself.
    """
    sizes, targets = lengths(new), lengths(old)
    if per_tensor:
        if sizes.keys() != targets.keys():
            raise UsageError(f"Client '{new.client}' trained other tensors than its record holds: train the same.")
        factors = {name: targets[name] / length if length else 1.0 for name, length in sizes.items()}
    else:
        whole = float(np.linalg.norm(list(sizes.values())))
        scale = float(np.linalg.norm(list(targets.values()))) / whole if whole else 1.0
        factors = dict.fromkeys(sizes, scale)
    scaled = {name: tensor if name.endswith(RIGHT) and name.removesuffix(RIGHT) in factors
              else factors[name.removesuffix(LEFT)] * tensor.astype(np.float64)
              for name, tensor in new.tensors.items()}  # fmt: skip
    return Update(new.client, old.records, scaled)


def rollback(
    rounds: Sequence[Round], client: str, *, distil: Distil | None = None, rule: Rule = "fedavg",
) -> Forgotten:  # fmt: skip
    """Take the client's updates off the final weights, then let the untouched model repair the damage.

    Wu, Zhu and Mitra 2022, arXiv 2201.09441: ``theta_T - sum_t w_t delta_t`` with the client's weight w_t = n_k / n in
    round t (1/N where all N clients are of one size), then ``distil(student, teacher)`` from theta_T on general texts
    (:mod:`repforget.federated.distil`).  No client is asked.  Later updates of others were made on models that the
    client had shaped, and stay; and the teacher still knows everything, so what general texts tell of the client comes
    back.

    Raises UsageError for "fedadam" (its steps are no sums of updates), for a client that never took part and for the
    only client.  Cost: reading the record; one dense float64 copy of the changed weights; the distillation's.
    """
    if rule == "fedadam":
        raise UsageError("Rollback takes off what was added, and FedAdam adds no sum of updates: use federaser.")
    _leaving(rounds, client)
    total: dict[str, np.ndarray] = {}
    for held in (rounds[i] for i in range(len(rounds))):
        for update in held.updates:
            if update.client == client:
                for name, delta in dense(update.tensors).items():
                    total[name] = total.get(name, 0.0) + shares(held.updates)[client] * delta
    teacher = final_state(rounds, rule)
    weights: Weights = applied(teacher, total, -1.0)
    if distil is None:
        note = "the weights were not distilled afterwards: expect damage to everything else"
        return Forgotten("rollback", client, weights, 0, (note,))
    made = distil(weights, teacher)
    return Forgotten("rollback", client, made.weights, 0, made.notes, distilled=made)


def client_side(
    weights: Weights, client: str, unlearn: Callable[[Weights], Update], kept: Sequence[str], train: Train, *,
    rounds: int = 2, rule: Rule = "fedavg", adam: Adam = ADAM, progress: Progress | None = None,
) -> Forgotten:  # fmt: skip
    """The client that leaves unlearns on its own records; then the others train on theirs for some rounds.

    The order of Oblivionis (Zhang et al. 2025, arXiv 2508.08875).  ``unlearn(weights)`` runs at the client, for example
    any trained editor (:mod:`repforget.federated.local`); its change is applied whole.  ``kept`` are the others, which
    ``train`` in ``rounds`` aggregated rounds.  Nothing checks that the client did what it says, and nothing here says
    that others' records do not teach the same.

    Cost: the client's unlearning and ``rounds`` x ``kept`` local trainings.  No record of the training is needed.
    """
    others = [name for name in dict.fromkeys(kept) if name != client]
    if not others:
        raise UsageError(f"Client '{client}' is the only one: without it there is no training to keep; start from the "
                         "initial weights.")  # fmt: skip
    if rounds < 1:
        raise UsageError(f"{rounds} rounds of the others were asked for: give 1 or more.")
    update = unlearn(weights)
    if update.client != client:
        raise UsageError(f"The unlearning update comes from '{update.client}', not from '{client}': ask that client.")
    current, state = applied(weights, update.tensors), dict[str, np.ndarray]()
    for number in track(progress, range(rounds), "rounds of the others", rounds):
        updates = [_trained(train, name, current, number, 1.0) for name in others]
        current = applied(current, aggregate(updates, rule, adam=adam, state=state))
    return Forgotten("client_side", client, current, rounds * len(others))


def _leaving(rounds: Sequence[Round], client: str) -> None:
    names = sorted({name for i in range(len(rounds)) for name in rounds[i].clients})
    if client not in names:
        raise UsageError(f"Client '{client}' never took part in the {len(rounds)} recorded rounds, so that there is "
                         f"nothing to forget: {nearest(client, names)}")  # fmt: skip
    if len(names) == 1:
        raise UsageError(f"Client '{client}' is the only one that ever took part: without it there is no training to "
                         "keep; start from the initial weights.")  # fmt: skip


def _kept(held: Round, client: str) -> list[Update]:
    return [update for update in held.updates if update.client != client]


def _trained(train: Train, client: str, weights: Weights, number: int, share: float) -> Update:
    update = train(client, weights, number, share)
    if update.client != client:
        raise UsageError(f"Client '{client}' was asked to train and '{update.client}' answered: check their names.")
    return update


def _moves(update: Update) -> bool:
    return any(lengths(update).values())


def _taught(held: Round, client: str) -> bool:
    return any(_moves(update) for update in held.updates if update.client == client)


def _released(before: Weights, after: Weights, old: Sequence[Update], new: Sequence[Update]) -> dict[str, np.ndarray]:
    """The step of the released code: per tensor ``|mean of kept models - after| mean(new) / |mean(new)|``."""
    mean, turn = dense(aggregate(old)), dense(aggregate(new))
    step = {}
    for name, direction in turn.items():
        gap = before[name].astype(np.float64) + mean[name] - after[name]
        length = float(np.linalg.norm(direction))
        step[name] = direction * (float(np.linalg.norm(gap)) / length if length else 0.0)
    return step


def _exact(rounds: int) -> Guarantee:
    """Its text travels with the edit, and does not say who left."""
    return Guarantee(
        "exact", f"The weights are those of the same {rounds} rounds of training without the client.", "client",
        "training again without the data, the definition of exact unlearning (Bourtoule et al. 2021, arXiv 1912.03817)",
        ("the weights before the first round did not depend on the client",
         "which other clients took part in a round did not depend on the client",
         "a local training follows from the global weights, the number of the round and the client's own records"),
        {"rounds": float(rounds)},
    )  # fmt: skip
