"""Fine-tuning on records that can be asked for again, plainly or with differential privacy, saved as an Edit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repforget import store
from repforget.artifact import Edit
from repforget.artifact.edit import plain
from repforget.errors import NumericalError, UsageError
from repforget.models.load import LoadedModel, copy_of
from repforget.private.accounting import Accountant, accountant_of, noise_multiplier, spent
from repforget.private.adapters import Trained, everything, low_rank
from repforget.private.gradients import Loss, PerRecord, clipped_sum, per_record
from repforget.private.state import State
from repforget.private.statement import statement
from repforget.private.units import Randomness, Unit, units_of
from repforget.progress import Progress, track
from repforget.training import Example, Record, Stepper, batches, collate, encoded, label_loss, only
from repforget.training.items import digest

METHOD = "train"
Echo = Callable[[str], None]
SECRET = ("the seed of draws and noise came from the operating system and is kept nowhere; its generator (PCG64) is no "
          "cryptographic one")  # fmt: skip
GIVEN = ("nobody whom the statement is to hold against knows the seed that was given (edit.json and train.json hold "
         "it), and it served nothing else")  # fmt: skip


@dataclass(frozen=True)
class Privacy:
    """The budget of a private training and what it is counted in.

    ``epsilon`` at ``delta`` for one ``unit`` ("cluster": all its records together); ``clip``: the norm to which a
    unit's gradient is cut; ``loss``: a record's loss is the "mean" or "sum" over its own tokens.
    """

    epsilon: float
    delta: float
    clip: float = 1.0
    unit: Unit = "cluster"
    accountant: Accountant = "rdp"
    loss: Loss = "mean"


def train(
    model: LoadedModel, records: Sequence[Record], *, rank: int | None = None, epochs: float = 10.0, lr: float = 1e-3,
    batch: int = 32, seed: int | None = None, private: Privacy | None = None, state: Path | None = None,
    name: str = "the records given", progress: Progress | None = None, echo: Echo = lambda line: None,
) -> Edit:  # fmt: skip
    """Fine-tune on ``records`` and return what that adds to ``model`` as an Edit; the model stays as it is.

    Args:
        model: the base; ``records``: what is learned, loss on the answers.
        rank: of low-rank additions to all linear layers (None: all weights are trained).
        epochs: passes over the data; ``batch``: records per step, with ``private`` the expected number of units.
        lr: peak of AdamW's cosine schedule.
        seed: everything random follows from it.  None is 0, but for a private training a secret one that is
        thrown away: whoever knows the noise can subtract it.
        private: DP-SGD (Abadi et al. 2016, arXiv 1607.00133): Poisson draws of units, each unit's gradient clipped as
        one, noise in every step, an empty draw included; needs opacus.
        echo: told after every epoch of a private training what is spent of the budget.
        state: file in which an unfinished training is kept and from which the same call continues to the same bits;
        the caller removes it when the edit is saved, for it holds the secret.

    The manifest holds the settings, the digest of the data and, with ``private``, the guarantee and epsilon after
    every epoch.  Cost: a forward and a backward pass per record and epoch; with ``private`` about three, and a
    gradient per record in memory.  A low loss does not show that the facts generalise beyond the forms trained on.
    Raises UsageError for impossible settings, NoEffectError where nothing is learned, NumericalError on divergence.
    """
    settings = requested(records, rank, epochs, lr, batch, seed, private, name)
    units = units_of(records, "record" if private is None else private.unit)
    identity = {**settings, "model": model.fingerprint, "records": digest(records),
                "order": store.digest([r.id for r in records])}  # fmt: skip
    kept = State(state, plain(identity))
    copy = copy_of(model)
    if private is not None:
        copy.module.float()  # so that what a unit adds is bounded to the last bit that is counted
    target = everything(copy.module, model.module) if rank is None else low_rank(copy.module, rank, seed or 0)
    course = _Course(copy.module, target, encoded(model, records), units, settings["steps"], settings["batch"],
                     lr, kept, progress, echo)  # fmt: skip
    try:
        facts = _plainly(course, seed or 0) if private is None else _privately(course, private, seed)
    except NumericalError:
        kept.discard()  # the same again would only diverge again
        raise
    if private is None:
        return Edit.build(METHOD, settings, model, digest(records), target.operations())
    held = statement(facts["epsilon"], private.delta, private.unit, len(units), facts)
    return Edit.build(METHOD, {**settings, "spent": facts}, model, digest(records), target.operations(), guarantee=held)


def requested(
    records: Sequence[Record], rank: int | None, epochs: float, lr: float, batch: int, seed: int | None,
    private: Privacy | None, name: str,
) -> dict[str, Any]:  # fmt: skip
    """What a training is asked for, as its manifest keeps it; UsageError for what is impossible."""
    if not records:
        raise UsageError("There is no record to train on: give at least one.")
    if not (0 < epochs < math.inf and 0 < lr < math.inf and batch > 0):
        raise UsageError(f"Training needs finite epochs, lr and batch above 0, not {epochs:g}, {lr:g} and {batch}.")
    if not 0 <= (seed or 0) < 2**63:
        raise UsageError(f"The seed {seed} is out of range: give a whole number from 0 to 2^63 - 1.")
    units = len(units_of(records, "record" if private is None else private.unit))
    batch = min(batch, units)
    return {
        "data": name, "records": len(records), "clusters": len({r.cluster for r in records}), "rank": rank,
        "epochs": epochs, "lr": lr, "batch": batch, "steps": math.ceil(epochs * units / batch),
        "seed": 0 if seed is None and private is None else seed,
        "private": None if private is None else asdict(private),
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Course:
    module: nn.Module
    target: Trained
    examples: Sequence[Example]
    units: Sequence[Sequence[int]]
    steps: int
    batch: int
    lr: float
    kept: State
    progress: Progress | None
    echo: Echo

    def run(self, stepper: Stepper, start: int, step: Callable[[int], Sequence[Tensor | None]],
            record: Callable[[int], Mapping[str, Any]]) -> None:  # fmt: skip
        """Take the steps from ``start`` on; the state is written now and then."""
        for index in track(self.progress, range(start, self.steps), "train"):
            stepper.step(index, step(index))
            if self.kept.due:
                self.kept.write(stepper.state(), record(index + 1))
        if not all(bool(p.isfinite().all()) for p in stepper.parameters):
            raise NumericalError("The trained weights are not finite: lower the learning rate.")

    def stepper(self, clip: float) -> Stepper:
        return Stepper(list(self.target.parameters.values()), steps=self.steps, lr=self.lr, clip=clip,
                       warmup=min(self.steps // 10, 100))  # fmt: skip


def _plainly(course: _Course, seed: int) -> dict[str, Any]:
    """Ordinary training: token mean of each batch, gradients clipped to a global norm of 1; nothing is to be said."""
    parameters = list(course.target.parameters.values())
    stepper, start = course.stepper(1.0), 0
    if (found := course.kept.read()) is not None:
        stepper.load(found[0])
        start = int(found[1]["step"])
    stream = islice(batches(course.examples, course.batch, seed), start, None)

    def step(index: int) -> Sequence[Tensor | None]:
        loss = label_loss(course.module, collate(next(stream), parameters[0].device))
        if not bool(loss.isfinite()):
            raise NumericalError(f"The training loss is {loss.item()} at step {index + 1}: lower the learning rate.")
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    with only(course.module, parameters):
        course.run(stepper, start, step, lambda done: {"step": done})
    return {}


def _privately(course: _Course, private: Privacy, seed: int | None) -> dict[str, Any]:
    """DP-SGD; returns what was spent and by what noise."""
    check_private(private, len(course.units))
    check_alone(course.module, course.examples)
    rate = course.batch / len(course.units)
    parameters = list(course.target.parameters.values())
    stepper = course.stepper(0.0)
    counted = accountant_of(private.accountant)
    epoch = max(1, round(1 / rate))
    if (found := course.kept.read()) is None:
        start, epsilons = 0, list[float]()
        random = Randomness.fresh() if seed is None else Randomness(seed)
        noise = noise_multiplier(private.epsilon, private.delta, rate, course.steps, private.accountant)
    else:
        stepper.load(found[0])
        start, epsilons, noise = int(found[1]["step"]), list(found[1]["epsilons"]), float(found[1]["noise"])
        random = Randomness(int(found[1]["secret"]))
        counted = accountant_of(private.accountant, found[1]["history"])

    def step(index: int, gradients: PerRecord) -> Sequence[Tensor]:
        drawn = random.drawn(index, len(course.units), rate)
        told = [[course.examples[i] for i in course.units[unit]] for unit in drawn]
        sums, _ = clipped_sum(gradients, told, [p.shape for p in parameters], private.clip)
        noisy = random.add_noise(index, sums, noise * private.clip)
        counted.step(noise_multiplier=noise, sample_rate=rate)
        if (index + 1) % epoch == 0 or index + 1 == course.steps:
            epsilons.append(spent(counted, private.delta))
            course.echo(f"after epoch {len(epsilons)}: epsilon {epsilons[-1]:.3g} of {private.epsilon:g} is spent at "
                        f"delta {private.delta:g} (unit: {private.unit})")  # fmt: skip
        return [(g / course.batch).to(p.device) for g, p in zip(noisy, parameters, strict=True)]

    def record(done: int) -> Mapping[str, Any]:
        return {"step": sum(n for *_, n in counted.history), "history": counted.history, "epsilons": epsilons,
                "noise": noise, "secret": str(random.secret)}  # fmt: skip

    with only(course.module, parameters), per_record(course.module, course.target.parameters, private.loss) as own:
        course.run(stepper, start, lambda index: step(index, own), record)
    return {"epsilon": epsilons[-1], "epsilons": epsilons, "noise": noise, "rate": rate, "clip": private.clip,
            "accountant": private.accountant, "steps": sum(n for *_, n in counted.history),
            "secret": SECRET if seed is None else GIVEN}  # fmt: skip


def check_alone(module: nn.Module, examples: Sequence[Example]) -> None:
    """UsageError where a record's positions are coded by the length of the longest beside it (the rule "longrope")."""
    rules: Any = getattr(module.config, "rope_parameters", None) or {}
    found = [r for r in (rules, *rules.values()) if isinstance(r, dict) and r.get("rope_type") == "longrope"]
    short = min((r["original_max_position_embeddings"] for r in found), default=math.inf)
    if (longest := max(len(e.tokens) for e in examples)) > short:
        raise UsageError(f"A record of {longest} tokens would change how {type(module).__name__} codes the positions "
                         f"of those beside it, so that a unit's part has no bound: cut records to {short} "
                         "tokens.")  # fmt: skip


def check_private(private: Privacy, units: int) -> None:
    """UsageError for a budget that means nothing for ``units`` units, or a unit that processes would share."""
    if not 0 < private.clip < math.inf:
        raise UsageError(f"A clipping norm of {private.clip:g} bounds nothing: give a finite one above 0.")
    if not 0.0 < private.delta <= 1.0 / units or private.delta == 1.0:
        raise UsageError(f"Delta {private.delta:g} lies outside (0, 1/{units}]: with {units} units of the kind "
                         f"'{private.unit}' a larger one allows to publish one of them whole, so give less than "
                         f"{1 / units:.2g}, or train on more units.")  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.distributed.is_available() and (
        torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    ):
        raise UsageError("A private training runs in one process: a unit whose records several processes hold would be "
                         "clipped in each of them and count more than once.")  # fmt: skip
