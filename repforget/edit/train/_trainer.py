"""The trainer of every trained editor: terms from settings, steps from gradients, an Edit from what changed."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repforget.artifact import Edit, Operation, floored
from repforget.edit._collect import subsample
from repforget.edit.train._checkpoint import Checkpoint, Keeper, identity_of
from repforget.edit.train._choose import Trainable, trainable
from repforget.edit.train._data import Row, fact_rows, load_rows
from repforget.edit.train._engine import Engine, Gradients, StepContext
from repforget.edit.train._memory import advice_for, fitting, recomputed
from repforget.edit.train._nested import part, retain_term, way, wrappers
from repforget.edit.train._objective import Objective, Role
from repforget.edit.train._pass import Term
from repforget.edit.train._settings import Settings, named
from repforget.edit.train._watch import Watch
from repforget.errors import KnowledgeError, NumericalError, UsageError
from repforget.knowledge import EditData
from repforget.masks import apply_gradient_mask
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Localization
from repforget.store import digest
from repforget.training import Stepper

RATE_TIMES_WIDTH = 0.04  # the learning rate of weights, times the width of the model
ADAPTER_RATE = 3e-4  # of low-rank adapters, whatever the width
CAUTIOUS = {"sophia": 0.2, "sign": 0.2}  # optimisers whose steps are larger than Adam's


@dataclass(frozen=True)
class Wanted:
    """A term as asked for: an objective with settings, on a data set, for one side, with a weight."""

    objective: Objective
    settings: Mapping[str, Any]
    data: str
    side: Role
    weight: float
    answers: str = "auto"


def train_objective(
    model: LoadedModel, data: EditData, objective: Objective, given: Mapping[str, Any], *,
    where: Localization | None = None, seed: int = 0, progress: Progress | None = None, checkpoint: Path | None = None,
) -> Edit:  # fmt: skip
    """An edit by one objective on the forget facts beside one retain term, as the editor of that name makes it."""
    names = {f.name for f in fields(Settings)}
    shared = Settings(**{**objective.defaults, **{k: v for k, v in given.items() if k in names}})
    own = objective.bound({k: v for k, v in given.items() if k not in names})
    wanted = [Wanted(objective, own, "forget", "forget", shared.forget_weight, shared.answers), *kept(shared)]
    return train(model, data, objective.name, wanted, shared, where=where, seed=seed, progress=progress,
                 checkpoint=checkpoint, settings=own)  # fmt: skip


def kept(shared: Settings) -> list[Wanted]:
    """The terms of the setting ``retain``, one on each of the sets ``retain_on``."""
    found = retain_term(shared.retain)
    if found is None:
        return []
    keep, bound = found
    sets = shared.retain_on[:1] if keep.reduction == "whole" else shared.retain_on  # weights are held once
    return [Wanted(keep, bound, on, "retain", shared.retain_weight) for on in sets]


def train(
    model: LoadedModel, data: EditData, method: str, wanted: Sequence[Wanted], shared: Settings, *,
    where: Localization | None = None, seed: int = 0, progress: Progress | None = None, checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None, ready: Sequence[Term] = (), left_out: Sequence[str] = (),
    enough: Callable[[], str] = str,
) -> Edit:  # fmt: skip
    """Train the terms together, those that are ``ready`` first, and return what changed; the model is left as it is.

    ``left_out`` are shared settings that the method does not have: the manifest does not claim them.  ``enough`` is
    asked at every look: what it says, if anything, is why the training ends there.
    """
    terms = (*ready, *_terms(model, data, wanted, shared, seed))
    with trainable(model, shared, terms, where, seed) as chosen:
        if chosen.shards is not None and enough is not str:
            raise UsageError(f"'{method}' looks at the whole model while it trains, and the launcher asks for a model "
                             "in shards (FSDP): choose another editor, or launch without --use_fsdp.")  # fmt: skip
        engine = Engine(
            model if chosen.shards is None else chosen.shards.model, terms, list(chosen.parameters), chosen.originals,
            chosen.untouched, _sizes(terms, shared), shared.steps, seed, shared.accumulate, shared.teacher,
            shared.clamp, shards=chosen.shards,
        )  # fmt: skip
        engine.prepare()
        rate = _rate(model, shared, chosen, terms)
        full = {**dataclasses.asdict(shared), **(settings or {}), "adapter": chosen.kind, "lr": rate}
        full = {name: value for name, value in full.items() if name not in left_out}
        state = None if checkpoint is None else Checkpoint(checkpoint, identity_of(
            method=method, settings=full, model=model.fingerprint, knowledge=data.digest, terms=_digest(terms),
            seed=seed, where=None if where is None else digest(where.to_json()), dtype=str(model.dtype),
            device=model.device.type, processes=engine.processes.name,
        ))  # fmt: skip
        facts = subsample(data.retain, shared.max_facts, seed)
        watched = fact_rows(model, facts, "retain")[0] if facts else ()
        notes = (*chosen.notes, *_steps(engine, chosen, shared, rate, seed, progress, state, watched, enough))
        operations: Sequence[Operation] = chosen.operations()
    if shared.quantisation_floor != "none":
        operations, said = floored(operations, model, shared.quantisation_floor)
        notes = (*notes, said)
    return Edit.build(method, full, model, data.digest, operations, notes=notes)


def _terms(
    model: LoadedModel, data: EditData, wanted: Sequence[Wanted], shared: Settings, seed: int
) -> Sequence[Term]:
    depth, found = model.n_layers, []
    first = next((w for w in wanted if w.side == "forget" and "layers" in w.objective.settings), None)
    for w in wanted:
        instead = w.objective.instead
        if instead is None and {"instead", "instead_reference", "pattern"} & set(w.objective.reads):
            instead = "refusal"
        if w.data == "strangers" and not {"teacher", "original"} & set(w.objective.reads):
            raise UsageError(f"'{w.objective.name}' would teach the answers made up for strangers: keep them by a term "
                             "that compares with the untouched model, such as kl.")  # fmt: skip
        rows = load_rows(model, data, w.data, instead=instead, answers=w.answers, max_facts=shared.max_facts, seed=seed)
        if not rows.fixed and "instead_reference" in w.objective.reads and shared.teacher == "cached":
            raise UsageError(f"'{w.objective.name}' compares answers that change at every step with the untouched "
                             "model, which cannot be cached: set teacher: live (or auto).")  # fmt: skip
        # A retain term without layers of its own reads those of the forget objective.
        source = first if first is not None and w.settings.get("layers") == "auto" else w
        found.append(Term(w.objective, w.settings, w.side, w.weight, rows, _layers(source, depth)))
    return found


def _layers(wanted: Wanted, depth: int) -> tuple[int, ...]:
    asked, choose = wanted.settings.get("layers", ()), wanted.objective.layers
    layers = tuple(asked) if asked != "auto" else choose(depth) if choose is not None else tuple(range(depth))
    if asked == [] or any(not 0 <= layer < depth for layer in layers):
        raise UsageError(f"'{wanted.objective.name}' was given layers {list(layers)}: give some of 0 to {depth - 1}.")
    return layers


def _sizes(terms: Sequence[Term], shared: Settings) -> tuple[int, ...]:
    """Rows per step of each term; a retain set smaller than its share is refused rather than repeated."""
    sizes = []
    for term in terms:
        have = len(term.data.own)
        if term.side == "forget":
            sizes.append(min(shared.batch_size, have))
            continue
        size = shared.retain_batch or min(shared.batch_size, sizes[0] if sizes else shared.batch_size)
        if size > have:
            raise KnowledgeError(f"Data set '{term.data.name}' has {have} rows and each step takes {size} of it: give "
                                 f"more facts to keep, or set retain_batch: {have}.")  # fmt: skip
        sizes.append(size)
    return tuple(sizes)


def _digest(terms: Sequence[Term]) -> str:
    """Hash of what the terms are and of all their rows."""
    def rows(term: Term) -> list[Row]:
        instead = term.data.instead
        return [*term.data.own, *([] if instead is None else [instead(0, i) for i in range(len(term.data.own))])]

    return digest([(t.objective.name, t.settings, t.side, t.weight, t.data.name, t.layers,
                    [(row.ids, row.start) for row in rows(t)]) for t in terms])  # fmt: skip


def _rate(model: LoadedModel, shared: Settings, chosen: Trainable, terms: Sequence[Term]) -> float:
    if shared.lr != "auto":
        return float(shared.lr)
    fastest = max((term.objective.rate for term in terms if term.side == "forget"), default=1.0)
    usual = RATE_TIMES_WIDTH / model.width if chosen.kind == "none" else ADAPTER_RATE
    return usual * fastest * CAUTIOUS.get(shared.optimizer, 1.0)


def _steps(
    engine: Engine, chosen: Trainable, shared: Settings, rate: float, seed: int, progress: Progress | None,
    checkpoint: Checkpoint | None, watched: Sequence[Row] = (), enough: Callable[[], str] = str,
) -> tuple[str, ...]:  # fmt: skip
    """Take the steps that are not behind already; returns what was seen."""
    stepper = Stepper(
        chosen.parameters, steps=shared.steps, lr=rate, optimizer=shared.optimizer, schedule=shared.schedule,
        warmup=shared.warmup, weight_decay=0.0 if chosen.masks else shared.weight_decay, clip=shared.clip,
        precision=shared.precision, seed=seed, fused=True,
        total=None if engine.shards is None else lambda x: engine.processes.total([x])[0],
    )  # fmt: skip
    carried: dict[str, Tensor] = {}
    compute = _computed(engine, shared)
    combine = _combined(engine, shared, stepper, carried)
    watch = Watch(engine.model, engine.terms, shared, chosen.parameters, chosen.originals, watched,
                  processes=engine.processes, enough=enough)  # fmt: skip
    keeper = Keeper(checkpoint, stepper, carried, watch, engine.processes, engine.shards)

    def take(index: int) -> float:
        with recomputed(engine.model, shared.checkpointing), fitting(lambda: advice_for(engine, chosen, shared)):
            found = keeper.begin(compute(index))
        for side in found.values():  # before they are combined: what cannot move is no part of their angle
            for g, mask in zip(side, chosen.masks, strict=False):
                if mask is not None:
                    apply_gradient_mask(g, mask)
        gradient = combine(found, index)
        stepper.refresh(index, engine.drawn)
        norm = stepper.step(index, gradient)
        chosen.keep_outside()
        return norm

    behind = keeper.resume()
    try:
        for index in track(progress, range(behind, shared.steps), "training", shared.steps - behind):
            norm, now = take(index), index + 1
            looks = now == shared.steps or now % shared.check_every == 0 or not math.isfinite(norm)
            if looks and not watch.look(now):
                break
            keeper.step = now
            if looks and now < shared.steps:
                keeper.write()
    except KeyboardInterrupt:
        keeper.write(always=True)
        raise
    if watch.stopped.startswith("diverged") and watch.looks[-2].step == 0:
        raise NumericalError(f"Training {watch.stopped.partition(';')[0]}, before anything good was reached: lower "
                             "lr, raise retain_weight, or look more often (check_every).")  # fmt: skip
    return watch.notes


def _computed(engine: Engine, shared: Settings) -> Callable[[int], Gradients]:
    """How the gradients of a step are made: plainly, or through wrappers, the first of the list outermost."""
    parts = [part("robust", entry) for entry in wrappers(shared.robust)]
    if not parts:
        sides: tuple[str, ...] = ("all",) if way(shared.combine) is None else ("forget", "retain")
        return lambda index: engine.gradients(index, sides)

    def compute(index: int) -> Gradients:
        inner: Callable[..., Gradients] = partial(engine.gradients, index)
        for function, settings in reversed(parts):
            inner = _wrapped(function, settings, StepContext(engine, index, inner))
        return inner(("forget", "retain"))

    return compute


def _wrapped(function: Any, settings: Mapping[str, Any], step: StepContext) -> Callable[..., Gradients]:
    return lambda sides=("forget", "retain"): {k: v for k, v in function(step, **settings).items() if k in sides}


def _combined(
    engine: Engine, shared: Settings, stepper: Stepper, state: dict[str, Tensor]
) -> Callable[[Gradients, int], list[Tensor]]:
    """How the gradients of both sides become one; ``state`` is what that carries from step to step."""
    found_way, rate = way(shared.combine), stepper.lr
    if found_way is None:
        return lambda found, index: found["all"] if "all" in found else _sum(found)
    name, _ = named(shared.combine)
    if "retain" not in engine.sides or "forget" not in engine.sides:
        raise UsageError(f"'combine: {name}' joins two gradients and there is no retain term: give 'retain', or set "
                         "combine: linear.")  # fmt: skip
    function, settings = found_way
    asked = set(inspect.signature(function).parameters)

    def combine(found: Gradients, index: int) -> list[Tensor]:
        context = {"metric": stepper.metric if "metric" in asked else None, "losses": engine.losses,
                   "probe": partial(_retained, engine, index, stepper, rate) if "probe" in asked else None}
        extra = {key: value for key, value in context.items() if key in asked}
        joined: list[Tensor] = function(found["forget"], found["retain"], state, **settings, **extra)
        if "rate" in state:  # a learning rate that was found, as a multiple of the given one
            stepper.lr = rate * float(state["rate"])
        return joined

    return combine


def _retained(
    engine: Engine, index: int, stepper: Stepper, rate: float, direction: Sequence[Tensor], steps: float
) -> float:
    """Retain loss of the rows of step ``index`` after so many ``steps`` along minus a direction."""
    step = StepContext(engine, index, partial(engine.gradients, index))
    before, metric = dict(engine.losses), stepper.metric
    with step.restored(), torch.no_grad():
        for place, (p, d) in enumerate(zip(engine.parameters, direction, strict=True)):
            p.sub_((steps * rate * (d if metric is None else d * metric[place])).to(p.dtype))
        step.gradients(("retain",))
        found, engine.losses = step.loss("retain"), before
    return found


def _sum(found: Gradients) -> list[Tensor]:
    return [torch.stack(list(parts)).sum(0) for parts in zip(*found.values(), strict=True)]
