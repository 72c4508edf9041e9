"""Noisy fine-tuning on retained data: whatever a training added is made indistinguishable from never having been."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repforget.artifact import BiasDelta, DenseDelta, Edit, LowRankDelta, Operation, load_edit
from repforget.errors import NumericalError, UsageError
from repforget.guarantee import Guarantee, at_most
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel, copy_of
from repforget.private import noisy as theory
from repforget.private.adapters import put_on
from repforget.private.job import RECORD
from repforget.private.trainer import GIVEN, METHOD
from repforget.private.units import Randomness
from repforget.progress import Progress, track
from repforget.store import read_json
from repforget.training import Example, Record, Stepper, batches, collate, encoded, label_loss, only

TRAINED_BY = "repforget train"
Bounded = Literal["gradient", "model", "output"]
LOOKED_AT = 64  # retained facts whose loss is noted before and after
DESTROYED = 1.0  # nats per token that the retained facts may cost more before the note says so


def noisy_finetuning(
    model: LoadedModel, data: EditData, *, seed: int = 0, progress: Progress | None = None, training: str,
    epsilon: float = 8.0, delta: float = 1e-5, bounded: Bounded = "gradient", start: float = 0.01,
    steps: int = 20, gradient: float = 1.0, lr: float | Literal["auto"] = "auto", decay: float = 0.0,
    repair: int = 200, repair_lr: float = 1e-3, batch_size: int = 32, secret: bool = True,
) -> Edit:  # fmt: skip
    """Cut what a training added to a small ball and add noise while fine-tuning on retained data.

    The end is within (``epsilon``, ``delta``) of what the same steps give from a start that never saw the data of that
    training.  Coordinates: the balanced factors of a low-rank training, the weights' differences of a full one.

    training: folder of ``repforget train``; ``model`` is its base, or the trained model itself.
    start: radius C0 to which the coordinates are cut first.  bounded: "gradient" clips the retain gradient to
    ``gradient`` (C1) and takes ``x <- x - lr (g + decay x) + noise``, ``lr`` auto being ``C0 / (C1 steps)``, the rate
    at which no other number of steps needs less noise; "model" cuts to ``start`` again after every step, just before
    the noise; "output" adds noise once (the baseline; ``steps`` has no effect).  The noise follows from the budget.
    repair: steps of AdamW at ``repair_lr`` on retained facts afterwards, without noise: what follows a release of
    noisy weights costs nothing.
    batch_size: retained facts per step.  secret: noise from the operating system, so that nobody can subtract it and
    no two calls give the same; without it the noise follows from the seed, which edit.json holds.

    Source: Koloskova et al. 2025, arXiv 2506.06985 (equations in :mod:`repforget.private.noisy`); Balle and Wang 2018,
    arXiv 1805.06530 for "output".  Cost: a pass forward and backward per step; memory: a copy of the model.  The
    retained data themselves are not protected, and nothing is said about what the base knew.  Where the noise ruins
    the model a note says what the retained facts cost now; the verdict on utility is the verifier's.
    Raises UsageError for a training of another model, a budget without meaning, or retained facts that are to be
    forgotten; NumericalError where a repair diverges.
    """
    made = load_edit(Path(training))
    base, trained = _base(model, made, Path(training))
    if shared := {f.cluster for f in data.forget} & {f.cluster for f in data.retain}:
        raise UsageError(f"'{sorted(shared)[0]}' is both to be forgotten and to be retained: the noise says nothing "
                         "about data that the steps read, so take it out of one of them.")  # fmt: skip
    if not data.retain:
        raise UsageError("Noisy fine-tuning reads retained facts and the probe has none: give some.")
    examples = encoded(model, [Record(f.id, f.cluster, f.prompt, f.answer) for f in data.retain])
    plan = _plan(bounded, epsilon, delta, start, steps, gradient, lr, decay)
    before = _loss(model.module, examples[:LOOKED_AT])
    place = _place(base.module.float(), made)
    source = Randomness.fresh() if secret else Randomness(seed)
    with only(base.module, place.values):
        _noisy(base.module, place, plan, batches(examples, batch_size, seed), source, progress)
        if repair:
            _repair(base.module, place, batches(examples, batch_size, seed + 1), repair, repair_lr)
    after = _loss(base.module, examples[:LOOKED_AT])
    return Edit.build(
        "noisy_finetuning", {"lr": plan.lr, "deviation": plan.deviation}, model, data.digest,
        _instead(made, place.changes()) if trained else place.changes(), notes=_notes(before, after),
        guarantee=_held(plan, place, epsilon, delta, secret),
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    bounded: Bounded
    start: float
    gradient: float
    lr: float
    decay: float
    steps: int
    deviation: float  # of each step's noise


def _plan(bounded: Bounded, epsilon: float, delta: float, start: float, steps: int, gradient: float,
          lr: float | Literal["auto"], decay: float) -> _Plan:  # fmt: skip
    if not (start > 0 and gradient > 0 and steps > 0 and decay >= 0):
        raise UsageError("Noisy fine-tuning needs start, gradient and steps above 0 and a decay of at least 0.")
    rate = start / (gradient * steps) if lr == "auto" else lr
    match bounded:
        case "gradient":
            deviation = theory.Descent(start, gradient, rate, steps, decay).deviation(epsilon, delta)
        case "model":
            deviation = theory.contracting_deviation(epsilon, delta, start, steps)
        case "output":
            steps, deviation = 1, theory.output_deviation(epsilon, delta, start)
    return _Plan(bounded, start, gradient, rate, decay, steps, deviation)


def _base(model: LoadedModel, made: Edit, folder: Path) -> tuple[LoadedModel, bool]:
    """A copy of the model before the training, and whether ``model`` is the one after it."""
    if made.manifest.method != METHOD:
        raise UsageError(f"'{folder}' holds an edit by '{made.manifest.method}': give a folder of {TRAINED_BY}.")
    if model.fingerprint == made.manifest.base_fingerprint:
        return copy_of(model), False
    if model.fingerprint == read_json(folder / RECORD).get("trained_fingerprint"):
        if any(p.dtype.itemsize < 4 for p in model.module.parameters() if p.is_floating_point()):
            raise UsageError("The trained model is in half precision, whose rounding keeps more of the training than "
                             "the noise covers: give the model before the training.")  # fmt: skip
        return made.inverse().applied_to(model, check=False), True
    raise UsageError(f"The training in '{folder}' is of '{made.manifest.model}' and '{model.name}' is neither that "
                     "model nor what the training made of it: give one of the two.")  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Place:
    """Trainable ``values`` on a module; coordinates are what they differ from ``centers`` by.

    ``changes`` gives what the coordinates mean for the weights of the base.
    """

    values: list[nn.Parameter]
    centers: list[Tensor]
    names: tuple[str, ...]
    changes: Callable[[], list[Operation]]

    def coordinates(self) -> list[Tensor]:
        return [p.detach() - c for p, c in zip(self.values, self.centers, strict=True)]

    @torch.no_grad()
    def put(self, coordinates: Sequence[Tensor]) -> None:
        for value, center, x in zip(self.values, self.centers, coordinates, strict=True):
            value.copy_(center + x)


def _place(module: nn.Module, made: Edit) -> _Place:
    """The training's change put on ``module`` (the base): all that the data of the training ever touched."""
    low = {op.weight: _balanced(op) for op in made.operations if isinstance(op, LowRankDelta)}
    dense = {_name(op): op.delta for op in made.operations if isinstance(op, DenseDelta | BiasDelta)}
    if len(low) + len(dense) != len(made.operations) or (low and dense):
        raise UsageError(f"The training consists of {', '.join(sorted({op.kind for op in made.operations}))} changes "
                         f"and {TRAINED_BY} makes low-rank or dense ones: train again.")  # fmt: skip
    if low:
        target = put_on(module, low)
        values = list(target.parameters.values())
        return _Place(values, [torch.zeros_like(p) for p in values], tuple(low), target.operations)
    table = dict(module.named_parameters())
    values = [table[name] for name in dense]
    place = _Place(values, [p.detach().clone() for p in values], tuple(dense), lambda: [
        BiasDelta(n, x) if n.endswith(".bias") else DenseDelta(n, x)
        for n, x in zip(dense, place.coordinates(), strict=True)
    ])  # fmt: skip
    place.put([delta.to(p.device, p.dtype) for p, delta in zip(values, dense.values(), strict=True)])
    return place


def _balanced(op: LowRankDelta) -> tuple[Tensor, Tensor]:
    """The factors of ``u v`` with the least sum of squares."""
    left, q = torch.linalg.qr(op.u.double()), torch.linalg.qr(op.v.double().mT)
    u, s, v = torch.linalg.svd(left.R @ q.R.mT, full_matrices=False)
    root = s.sqrt()
    return (left.Q @ u * root).float(), (root[:, None] * v @ q.Q.mT).float()


def _name(op: Any) -> str:
    return str(op.bias if isinstance(op, BiasDelta) else op.weight)


def _instead(made: Edit, own: Sequence[Operation]) -> list[Operation]:
    """What turns the trained model into the base changed by ``own``."""
    found: list[Operation] = []
    for op in made.operations:
        mine: Any = next((o for o in own if _name(o) == _name(op)), None)
        if isinstance(op, LowRankDelta):
            u, v = (op.u[:, :0], op.v[:0]) if mine is None else (mine.u, mine.v)
            found.append(LowRankDelta(op.weight, torch.cat([u.cpu(), -op.u], 1), torch.cat([v.cpu(), op.v])))
        elif isinstance(op, DenseDelta | BiasDelta):
            found.append(dataclasses.replace(op, delta=mine.delta.cpu() - op.delta))
    return found


def _clipped(values: Sequence[Tensor], limit: float) -> list[Tensor]:
    """``values`` cut together to the norm ``limit``; zeros where they are not finite, which the bound allows."""
    norm = math.sqrt(sum(float(v.double().square().sum()) for v in values))
    if not math.isfinite(norm):
        return [torch.zeros_like(v) for v in values]
    return [v * min(1.0, limit * (1 - 1e-6) / max(norm, 1e-30)) for v in values]


def _noisy(
    module: nn.Module, place: _Place, plan: _Plan, stream: Iterator[list[Example]], source: Randomness,
    progress: Progress | None,
) -> None:  # fmt: skip
    """The steps of the theorem, from the training's change to its noisy end."""
    place.put(_clipped(place.coordinates(), plan.start))
    for index in track(progress, range(plan.steps), "noisy steps"):
        x = place.coordinates()
        if plan.bounded != "output":
            loss = label_loss(module, collate(next(stream), x[0].device))
            found = torch.autograd.grad(loss, place.values, allow_unused=True)
            own = [torch.zeros_like(v) if g is None else g for g, v in zip(found, x, strict=True)]
            own = _clipped(own, plan.gradient)
            x = [v - plan.lr * (g + plan.decay * v) for v, g in zip(x, own, strict=True)]
        if plan.bounded == "model":
            x = _clipped(x, plan.start)
        place.put(source.add_noise(index, x, plan.deviation))


def _repair(module: nn.Module, place: _Place, stream: Iterator[list[Example]], steps: int, lr: float) -> None:
    """Ordinary training on retained facts; what is computed from a noisy release alone costs no budget."""
    stepper = Stepper(place.values, steps=steps, lr=lr)
    for index in range(steps):
        loss = label_loss(module, collate(next(stream), place.values[0].device))
        if not bool(loss.isfinite()):
            raise NumericalError(f"The loss is {loss.item()} at repair step {index + 1}: lower repair_lr, or cut the "
                                 "training to a smaller start, which needs less noise.")  # fmt: skip
        stepper.step(index, torch.autograd.grad(loss, place.values, allow_unused=True))


@torch.no_grad()
def _loss(module: nn.Module, examples: Sequence[Example]) -> float:
    return float(label_loss(module, collate(examples, next(module.parameters()).device)))


def _notes(before: float, after: float) -> tuple[str, ...]:
    told = f"Retained facts cost {before:.3g} nats per token before and {after:.3g} now"
    if not after < before + DESTROYED:
        return (f"{told}: the noise that the budget needs ruins the model, so expect the utility to fail; a smaller "
                "start or a larger epsilon needs less.",)  # fmt: skip
    return (f"{told}.",)


def _held(plan: _Plan, place: _Place, epsilon: float, delta: float, secret: bool) -> Guarantee:
    how = {
        "gradient": "Koloskova et al. 2025, arXiv 2506.06985 (gradient clipping); Bun and Steinke 2016, arXiv "
                    "1605.02065, Proposition 1.3",
        "model": "Koloskova et al. 2025, arXiv 2506.06985 (model clipping)",
        "output": "Balle and Wang 2018, arXiv 1805.06530, Theorem 8",
    }[plan.bounded]  # fmt: skip
    return Guarantee(
        kind="certified",
        statement=f"The weights are ({at_most(epsilon)}, {at_most(delta)})-indistinguishable from what the same steps "
                  "give when they start from weights that never saw the data of the training.",
        unit="the training: all of its records together",
        theorem=how,
        assumptions=(
            "the model before the training never saw what is to be forgotten",
            f"the training touched nothing but {len(place.names)} weights, those changed by its edit",
            "the retained facts that the steps read neither hold nor were chosen by what is to be forgotten; they are "
            "not protected themselves",
            "settings (start, steps, rates, budget) were chosen without looking at the trained weights",
            "neither the trained model is released nor an edit made on it, which holds the training's own change, and "
            "this is done once per training",
            "the noise is drawn from the operating system and kept nowhere" if secret else GIVEN,
            "arithmetic of real numbers: rounding of weights and noise is not accounted for",
        ),
        numbers={"epsilon": epsilon, "delta": delta, "start": plan.start, "deviation": plan.deviation,
                 "steps": float(plan.steps), "coordinates": float(sum(p.numel() for p in place.values))},
    )  # fmt: skip
