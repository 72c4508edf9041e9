"""Runs verifiers on arms: which verifiers, which arms, and measurements put side by side as evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from repforget.discover import LEVELS, Method, method, methods
from repforget.errors import RecipeError, RepforgetError, UsageError, nearest
from repforget.knowledge import Split, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Curve, Evidence, Measurement
from repforget.verify._calibration import may_vote
from repforget.verify.arms import Arm, MeasureInfo, References

Settings = Mapping[str, Any]
Request = str | Sequence[str | Mapping[str, Any]]
FAMILIES = ("text", "privacy", "inside", "weights")  # cheapest first; what belongs to none of them comes last


@dataclass(frozen=True)
class Task:
    """One verifier with its complete settings."""

    name: str
    settings: Settings
    method: Method = field(compare=False)

    @property
    def measures(self) -> Mapping[str, MeasureInfo]:
        """What the verifier says about its measures: the constant MEASURES of its file."""
        found = self.method.constant("MEASURES")
        if not found:
            raise RepforgetError(f"Verifier '{self.name}' does not describe its measures: give its file a constant "
                                 "MEASURES = {name: MeasureInfo(...)}.")  # fmt: skip
        return found  # type: ignore[no-any-return]

    @property
    def teaches(self) -> bool:
        """Whether the attack itself could put an answer there."""
        return any(info.teaches != "nothing" for info in self.measures.values())


def _joins(found: Method) -> str | None:
    """The cheapest level that includes a verifier: the constant JOINS of its file."""
    joined: str | None = found.constant("JOINS")
    return joined


@cache
def level(name: str, *, held_out: bool = False) -> Mapping[str, Settings]:
    """Verifiers (cheapest family first) and their budgets at "quick", "standard" or "thorough".

    ``held_out``: those that are kept for the sealed split instead (HELD_OUT in their file), so that no editor, ladder
    or person who tunes on dev and gate has ever seen them.
    """
    if name not in LEVELS:
        raise UsageError(f"There is no verification level '{name}': {nearest(name, LEVELS)}")
    wanted = LEVELS[: LEVELS.index(name) + 1]
    chosen = [found for found in methods("verify")
              if _joins(found) in wanted and bool(found.constant("HELD_OUT")) == held_out]  # fmt: skip
    order = {family: place for place, family in enumerate(FAMILIES)}
    chosen.sort(key=lambda found: (order.get(found.family, len(order)), found.name))
    return {found.name: found.budgets.get(name, {}) for found in chosen}


def tasks(request: Request) -> tuple[Task, ...]:
    """Turn ``"quick"``, ``"standard"``, ``"thorough"`` or a list of names and ``{name: settings}`` into tasks.

    The settings may be the name of one of the verifier's budgets (``{relearn: thorough}``).  They are validated
    against each verifier's signature; a name asked for twice is an error.
    """
    if isinstance(request, str):
        wanted = list(level(request).items())
    else:
        wanted = [pair for entry in request for pair in _pairs(entry)]
    if not wanted:
        raise UsageError("The list of verifiers is empty: name at least one, or a level such as 'standard'.")
    names = [name for name, _ in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"Verifier '{twice}' is listed twice: list it once, with the larger budget.")
    made = []
    for name, settings in wanted:
        found = method("verify", name)
        made.append(Task(name, found.settings(settings), found))
    return tuple(made)


def ready(
    verifiers: Request | Sequence[Task], split: Split = "dev", held_out: Request | None = None
) -> tuple[Task, ...]:
    """Tasks as they are, or a level or list turned into tasks; on the sealed split with the held-out ones.

    ``held_out`` None means those of the level, and none beside a list.
    """
    if not isinstance(verifiers, str) and verifiers and all(isinstance(v, Task) for v in verifiers):
        return tuple(v for v in verifiers if isinstance(v, Task))
    shown = tasks(verifiers)  # type: ignore[arg-type]
    if split != "sealed":
        return shown
    if held_out is None:
        held_out = [dict(level(verifiers, held_out=True))] if isinstance(verifiers, str) else []
    seen = {task.name for task in shown}
    kept = tasks(held_out) if held_out and any(held_out) else ()
    return (*shown, *(task for task in kept if task.name not in seen))


def asks_shuffled(verifiers: Any, requested: Sequence[Task]) -> bool:
    """Whether exchanged answers are asked too: in a thorough check, or one that was listed, of attacks that teach."""
    return verifiers not in ("quick", "standard") and any(task.teaches for task in requested)


def _pairs(entry: str | Mapping[str, Any]) -> list[tuple[str, Settings]]:
    if isinstance(entry, str):
        return [(entry, {})]
    return [(name, {"budget": value} if isinstance(value, str) else value or {}) for name, value in entry.items()]


def measure(
    task: Task, model: LoadedModel, view: View, references: References, *, seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:  # fmt: skip
    """Run one verifier on one model; the result is plain data and may be cached by the caller.

    An undeclared or misaligned measure is an error of the verifier and is said so.
    """
    context = {"references": references, "seed": seed, "progress": progress}
    given = {name: value for name, value in context.items() if name in task.method.context}
    result: Measurement = task.method.function(model, view, **given, **task.settings)
    known = {*task.measures, *(f"{name}_prior" for name in task.measures)}
    strange = sorted(set(result.scores) - known)
    if strange:
        raise RepforgetError(f"Verifier '{task.name}' returned a measure '{strange[0]}' that its MEASURES does not "
                             "name: declare it there.")  # fmt: skip
    return result


def measure_arm(
    arm: Arm, view: View, requested: Sequence[Task], references: References, *, seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Measurement]:  # fmt: skip
    """Run every verifier on one arm: verifier name -> measurement. The arm is open for the time of this call."""
    if arm.shuffled:
        view, requested = view.shuffled(seed), [task for task in requested if task.teaches]
        references = References(references.original, references.twins)  # its memory is of the true answers
    with arm.open() as model:
        return {task.name: measure(task, model, view, references, seed=seed, progress=progress) for task in requested}


def assemble(measured: Mapping[str, Mapping[str, Measurement]], requested: Sequence[Task]) -> tuple[Evidence, ...]:
    """Put the measurements of all arms side by side (arm -> verifier -> measurement), one Evidence per measure."""
    if "original" not in measured:
        raise UsageError("Evidence needs the arm 'original': measure the untouched model with the same verifiers.")
    out = []
    for task in requested:
        per_arm = {arm: found[task.name] for arm, found in measured.items() if task.name in found or arm != "shuffled"}
        for name, info in task.measures.items():
            if name in per_arm["original"].scores:
                out.append(_evidence(task, name, info, per_arm))
    return tuple(out)


def _evidence(task: Task, name: str, info: MeasureInfo, per_arm: Mapping[str, Measurement]) -> Evidence:
    first = per_arm["original"]
    missing = sorted(arm for arm, found in per_arm.items() if name not in found.scores)
    if missing:
        raise RepforgetError(f"Verifier '{task.name}' measured '{name}' on the original and not on arm '{missing[0]}': "
                             "return the same measures for every model.")  # fmt: skip
    plain = {key: value for key, value in task.settings.items() if isinstance(value, int | float)}
    numbers = {key: float(value) for key, value in plain.items() if not isinstance(value, bool)}
    numbers |= {f"{key} tried": float(len(v)) for key, v in task.settings.items() if isinstance(v, list | tuple)}
    others = tuple(f"{other}: " for other in task.measures if other != name)  # facts may be of one measure alone
    facts = {arm: {k: v for k, v in found.facts.items() if not k.startswith(others)} for arm, found in per_arm.items()}
    return Evidence(
        verifier=task.name, measure=name, kind=info.kind, access=info.access,
        votes=info.votes and (info.kind == "collateral" or may_vote(f"{task.name}.{name}")),
        arms={arm: found.scores[name] for arm, found in per_arm.items()}, prior=first.scores.get(f"{name}_prior"),
        budget=numbers | {"items": float(len(first.scores[name].ids))}, teaches=info.teaches,
        curves=_curves(name, info, per_arm), facts={arm: found for arm, found in facts.items() if found},
    )  # fmt: skip


def _curves(name: str, info: MeasureInfo, per_arm: Mapping[str, Measurement]) -> tuple[Curve, ...]:
    x = per_arm["original"].series.get("x")
    if info.curve is None or x is None or name not in per_arm["original"].series:
        return ()
    # A twin of another depth has other layers and no place on this axis.
    y = {arm: found.series[name] for arm, found in per_arm.items() if found.series.get("x") == x}
    return (Curve(*info.curve, x, y),)


def run_battery(
    arms: Sequence[Arm], view: View, verifiers: Request | Sequence[Task], references: References, *, seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Evidence, ...]:  # fmt: skip
    """Run every verifier on every arm and return the evidence; deterministic for a seed.

    ``arms`` must contain "original"; twins are named "twin-0", "twin-1", ... Costs the sum of the verifiers' costs
    times the number of arms, which are opened one after the other.
    """
    requested = ready(verifiers)
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise UsageError(f"Two arms have the same name ({', '.join(names)}): name each once.")
    measured = {arm.name: measure_arm(arm, view, requested, references, seed=seed, progress=progress) for arm in arms}
    return assemble(measured, requested)
