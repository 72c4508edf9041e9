"""What a server makes of its clients' updates: weighted means, adapters added up exactly, a step of Adam.

Everything is computed in float64 and in the order of the clients' names, so that the result does not depend, not by
one bit, on the order in which the updates arrive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np

from repforget.errors import NumericalError, UsageError
from repforget.federated.records import LEFT, RIGHT, RULES, Rule, Update

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Adam:
    """Settings of the rule "fedadam": server rate eta, decays beta1 and beta2, adaptivity tau."""

    rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


ADAM = Adam()


def aggregate(
    updates: Sequence[Update], rule: Rule = "fedavg", *, weights: Shapes | None = None,
    clients: Collection[str] | None = None, adam: Adam = ADAM, state: MutableMapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The change of the global weights that one round's updates make, float64, named and shaped like the updates.

    "fedavg": ``sum_k (n_k / n) delta_k`` (McMahan et al. 2017, arXiv 1602.05629).  "fedsgd": the same mean where every
    client made a single step of plain SGD on all its records; it then equals that step on all records together.
    "fedadam": that mean as the gradient of a server step (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).
    Adapters are joined, not averaged: the factors side by side, the weights in the left one, so that their product *is*
    the mean of the products, and the rank the sum of the ranks (:func:`compressed` lowers it).  Under "fedadam" they
    are multiplied out, for moments of factors mean nothing.

    Args:
        weights: shape of every parameter that an update must change; without it, what most updates hold.
        clients: names of the clients whose updates must be there. adam: settings of "fedadam".
        state: moments of "fedadam", from round to round (empty at first), changed in place; the caller keeps them.

    Raises UsageError for a round without updates, for two updates of one client, and for a missing client; and, naming
    the client, for one whose tensors are missing, unknown or of another shape; NumericalError for NaN and infinite
    entries.  Memory: one float64 copy of the result.  A mean says nothing about what a single client sent on purpose.
    """
    if rule not in RULES:
        raise UsageError(f"The aggregation rule '{rule}' is not known: use one of {', '.join(RULES)}.")
    if not updates:
        raise UsageError("A round without updates has no weight to divide by: wait for clients, or leave it out.")
    ordered = sorted(updates, key=lambda update: update.client)
    _check(ordered, weights, clients)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = _mean(ordered) if rule != "fedadam" else dense(_mean(ordered))
    for name, tensor in mean.items():
        if not np.isfinite(tensor).all():
            raise NumericalError(f"The mean of '{name}' over {len(ordered)} clients is not finite: the updates are too "
                                 "large; lower the clients' learning rate.")  # fmt: skip
    if rule != "fedadam":
        return mean
    if state is None:
        raise UsageError("FedAdam needs the moments of the rounds before: give state={} in the first round and the "
                         "same mapping in every later one.")  # fmt: skip
    return _adam(mean, adam, state)


def applied(weights: Tensors, change: Tensors, scale: float = 1.0) -> dict[str, np.ndarray]:
    """``weights + scale * change`` with adapters multiplied out, added in float64 and cast once to the weights' dtype.

    Weights that the change does not name keep their bits; a change of a weight that is not there is a UsageError.
    """
    full = dense(change)
    if unknown := sorted(full.keys() - weights.keys()):
        raise UsageError(f"The change names '{unknown[0]}', which is no weight of the global model: use the model that "
                         "the clients trained.")  # fmt: skip
    new = {name: np.array(weight) for name, weight in weights.items()}
    for name, delta in full.items():
        if new[name].shape != delta.shape:
            raise UsageError(f"The change of '{name}' has shape {delta.shape}, but the weight has {new[name].shape}.")
        new[name] = (new[name].astype(np.float64) + scale * delta).astype(new[name].dtype)
    return new


def dense(change: Tensors) -> dict[str, np.ndarray]:
    """The same change in float64 with every adapter multiplied out: ``left @ right`` under the weight's name."""
    found: dict[str, np.ndarray] = {}
    for name, part in parts(change).items():
        wide = [tensor.astype(np.float64) for tensor in part]
        found[name] = wide[0] @ wide[1] if len(wide) == 2 else wide[0]
    return found


def parts(change: Tensors) -> dict[str, tuple[np.ndarray, ...]]:
    """Weight -> (tensor,) or its adapter's (left, right), in the order of names; UsageError for half an adapter."""
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for name in sorted(change):
        weight = name.removesuffix(LEFT).removesuffix(RIGHT)
        if weight == name:
            found[name] = (change[name],)
            continue
        pair = change.get(weight + LEFT), change.get(weight + RIGHT)
        if pair[0] is None or pair[1] is None:
            raise UsageError(f"The adapter of '{weight}' has only one of its factors, '{name}': send both.")
        found[weight] = pair[0], pair[1]
    return found


def compressed(change: Tensors, rank: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The change with every adapter cut to its best ``rank``, and what that costs: weight -> relative error.

    Truncated SVD of ``left @ right`` from the QR factors of both (never the full matrix); the error is the Frobenius
    norm of what is lost over that of the whole, exact by Eckart and Young (1936).  Tensors that are no adapters stay.
    """
    if rank < 1:
        raise UsageError(f"An adapter cannot have rank {rank}: give 1 or more.")
    cut: dict[str, np.ndarray] = {}
    errors: dict[str, float] = {}
    for weight, part in parts(change).items():
        if len(part) == 1:
            cut[weight] = part[0]
            continue
        left, inner = np.linalg.qr(part[0].astype(np.float64))
        right, outer = np.linalg.qr(part[1].astype(np.float64).T)
        u, sizes, v = np.linalg.svd(inner @ outer.T, full_matrices=False)
        root = np.sqrt(sizes[:rank])
        cut[weight + LEFT], cut[weight + RIGHT] = (left @ u[:, :rank]) * root, (root[:, None] * v[:rank]) @ right.T
        whole = float(np.linalg.norm(sizes))
        errors[weight] = float(np.linalg.norm(sizes[rank:])) / whole if whole else 0.0
    return cut, errors


def shares(updates: Sequence[Update]) -> dict[str, float]:
    """Client -> its weight ``n_k / n`` in the mean of the round."""
    total = sum(update.records for update in updates)
    return {update.client: update.records / total for update in updates}


def lengths(update: Update) -> dict[str, float]:
    """Frobenius norm of every weight's change; of an adapter that of its product, without multiplying it out."""
    found = {}
    for name, part in parts(update.tensors).items():
        wide = [tensor.astype(np.float64) for tensor in part]
        if len(wide) == 1:
            found[name] = float(np.linalg.norm(wide[0]))
        else:
            squares = (wide[0].T @ wide[0]) * (wide[1] @ wide[1].T)  # |LR|^2 = <L'L, RR'>
            found[name] = float(np.sqrt(max(0.0, squares.sum())))
    return found


def _mean(ordered: Sequence[Update]) -> dict[str, np.ndarray]:
    share = shares(ordered)
    split = [(share[update.client], parts(update.tensors)) for update in ordered]
    found: dict[str, np.ndarray] = {}
    for weight, first in split[0][1].items():
        if len(first) == 2:
            found[weight + LEFT] = np.concatenate([w * p[weight][0].astype(np.float64) for w, p in split], axis=1)
            found[weight + RIGHT] = np.concatenate([p[weight][1].astype(np.float64) for _, p in split], axis=0)
            continue
        total = np.zeros(first[0].shape)
        for w, part in split:
            total += w * part[weight][0].astype(np.float64)
        found[weight] = total
    return found


def _adam(mean: Tensors, adam: Adam, state: MutableMapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``m = b1 m + (1 - b1) mean``, ``v = b2 v + (1 - b2) mean^2`` from v = tau^2; step ``rate m / (sqrt v + tau)``."""
    step: dict[str, np.ndarray] = {}
    for name, delta in mean.items():
        first = state.get(f"first.{name}", np.zeros_like(delta))
        second = state.get(f"second.{name}", np.full_like(delta, adam.tau**2))
        state[f"first.{name}"] = first = adam.beta1 * first + (1 - adam.beta1) * delta
        state[f"second.{name}"] = second = adam.beta2 * second + (1 - adam.beta2) * delta**2
        step[name] = adam.rate * first / (np.sqrt(second) + adam.tau)
    return step


def _check(ordered: Sequence[Update], weights: Shapes | None, clients: Collection[str] | None) -> None:
    names = Counter(update.client for update in ordered)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UsageError(f"Client '{twice[0]}' sent {names[twice[0]]} updates in one round: keep one.")
    if lost := sorted(set(clients or ()) - names.keys()):
        raise UsageError(f"{len(lost)} of {len(clients or ())} clients sent no update, first '{lost[0]}': wait for it, "
                         "or leave it out of the round.")  # fmt: skip
    held = [_shapes(update) for update in ordered]
    kinds = Counter(frozenset(each.items()) for each in held)
    most = max(kinds.values())
    usual = dict(next(kind for kind in (frozenset(each.items()) for each in held) if kinds[kind] == most))
    factored = {name for name, (_, pair) in usual.items() if pair}
    wanted = usual if weights is None else {name: (tuple(s), name in factored) for name, s in weights.items()}
    for update, each in zip(ordered, held, strict=True):
        if each != wanted:
            raise UsageError(_difference(update.client, each, wanted))


def _shapes(update: Update) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Weight -> (shape, is an adapter), after refusing what is no number."""
    for name, tensor in sorted(update.tensors.items()):
        if not isinstance(tensor, np.ndarray) or tensor.dtype.kind != "f":
            raise UsageError(f"Client '{update.client}' sent '{name}' as {getattr(tensor, 'dtype', type(tensor))}: "
                             "send arrays of floats.")  # fmt: skip
        if not np.isfinite(tensor).all():
            raise NumericalError(f"Client '{update.client}' sent NaN or infinite entries in '{name}': leave its update "
                                 "out, and lower its learning rate.")  # fmt: skip
    try:
        found = parts(update.tensors)
    except UsageError as error:
        raise UsageError(f"Client '{update.client}' sent half an adapter. {error}") from None
    for weight, part in found.items():
        if len(part) == 2 and (part[0].ndim != 2 or part[1].ndim != 2 or part[0].shape[1] != part[1].shape[0]):
            raise UsageError(f"Client '{update.client}' sent an adapter of '{weight}' with factors of shapes "
                             f"{part[0].shape} and {part[1].shape}: they must be [out, r] and [r, in].")  # fmt: skip
    return {weight: (part[0].shape, False) if len(part) == 1 else ((part[0].shape[0], part[1].shape[1]), True)
            for weight, part in found.items()}  # fmt: skip


def _difference(
    client: str, sent: Mapping[str, tuple[tuple[int, ...], bool]], wanted: Mapping[str, tuple[tuple[int, ...], bool]]
) -> str:
    if missing := sorted(wanted.keys() - sent.keys()):
        return f"The update of client '{client}' lacks '{missing[0]}' ({len(missing)} tensors): it must send them all."
    if extra := sorted(sent.keys() - wanted.keys()):
        return f"Client '{client}' sent '{extra[0]}', which the others did not train: train the same weights."
    name = next(name for name in sorted(wanted) if wanted[name] != sent[name])
    kinds = {True: "an adapter", False: "a tensor"}
    (shape, pair), (right, usual) = sent[name], wanted[name]
    return (f"Client '{client}' sent '{name}' as {kinds[pair]} of shape {shape}: expected {kinds[usual]} of shape "
            f"{right}.")  # fmt: skip
