"""An objective is a pure function whose parameter names say what it reads; the decorator makes it an editor."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from repforget import discover
from repforget.artifact import Edit
from repforget.edit.train._settings import Settings
from repforget.errors import RepforgetError, UnknownNameError, UsageError, nearest
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

if TYPE_CHECKING:
    from collections.abc import Iterable

Reduction = Literal["token_mean", "seq_sum_batch_mean", "seq_mean_batch_mean", "whole"]
Role = Literal["forget", "retain"]
Answers = Literal["refusal", "alternative", "fresh"]
READABLE = frozenset({"own", "instead", "reference", "instead_reference", "logits", "labels", "place", "pattern",
                      "teacher", "hidden", "original", "drift", "importance"})  # fmt: skip
# Keyword-only parameters that the trainer fills in: ``done``, the share of training behind (0..1), ``norms`` [l], the
# mean length of the untouched model's states at each of the layers over (some hundred of) the forget rows, and
# ``rest``, whether the last outcome of the teacher stands for all that have none of their own.
GIVEN = frozenset({"seed", "done", "norms", "rest"})


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probabilities (nats) of the answer tokens of ``n`` sequences: ``logprob`` [m], ``row`` [m] in 0..n-1."""

    logprob: Tensor
    row: Tensor
    n: int

    @functools.cached_property
    def counts(self) -> Tensor:
        """Answer tokens of each sequence [n]."""
        return torch.bincount(self.row, minlength=self.n).to(self.logprob.dtype)

    @functools.cached_property
    def sums(self) -> Tensor:
        """Log-probability of each sequence's answer [n]."""
        return self.logprob.new_zeros(self.n).index_add(0, self.row, self.logprob)

    @functools.cached_property
    def means(self) -> Tensor:
        """Mean log-probability per answer token of each sequence [n]."""
        return self.sums / self.counts


@dataclass(frozen=True)
class Objective:
    """A loss as declared: the pure ``function``, what it ``reads``, and how its values are reduced.

    ``bounded`` is False where training can lower the loss for ever; the trainer then watches the retained facts
    more closely.  ``layers`` chooses the layers of an objective on hidden states for a model of a given depth;
    ``targets`` names what is trained by default ("mlp_down": the MLP output projections of the ``span`` layers that
    end at the deepest of them).  ``rate`` is a multiple of the automatic learning rate of weights.
    """

    name: str
    function: Callable[..., Tensor]
    reduction: Reduction
    role: Role = "forget"
    instead: Answers | None = None
    bounded: bool = True
    layers: Callable[[int], tuple[int, ...]] | None = None
    targets: Literal["mlp_down"] | None = None
    span: int | None = None
    rate: float = 1.0
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @functools.cached_property
    def settings(self) -> Mapping[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN}

    @functools.cached_property
    def given(self) -> tuple[str, ...]:
        """Keyword-only parameters that the trainer fills in."""
        return tuple(name for name in inspect.signature(self.function).parameters if name in GIVEN)

    def bound(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings`` over the defaults, names and types checked."""
        return checked(f"Objective '{self.name}'", self.function, self.settings, settings)


class TrainedEditor(Protocol):
    """The editor that the decorator makes of an objective."""

    objective: Objective

    def __call__(self, model: LoadedModel, data: EditData, **settings: Any) -> Edit: ...


def objective(
    reduction: Reduction, *, role: Role = "forget", instead: Answers | None = None, bounded: bool = True,
    layers: Callable[[int], tuple[int, ...]] | None = None, targets: Literal["mlp_down"] | None = None,
    span: int | None = None, rate: float = 1.0, defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Tensor]], TrainedEditor]:  # fmt: skip
    """Declare an objective: the result is an editor of its name, with ``.objective`` the declaration itself.

    The editor's settings are the objective's own followed by the common ones (:class:`Settings`), some of them with
    other ``defaults``.
    """

    def declare(function: Callable[..., Tensor]) -> TrainedEditor:
        made = Objective(function.__name__, function, reduction, role, instead, bounded, layers, targets, span,
                         rate, dict(defaults or {}))  # fmt: skip
        strange = sorted(set(made.reads) - READABLE)
        if strange:
            raise RepforgetError(f"Objective '{made.name}' reads '{strange[0]}', which the trainer does not offer: "
                                 f"{nearest(strange[0], READABLE)}")  # fmt: skip
        return _editor(made)

    return declare


def _editor(made: Objective) -> TrainedEditor:
    @functools.wraps(made.function)
    def run(
        model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
        progress: Progress | None = None, checkpoint: Path | None = None, **settings: Any,
    ) -> Edit:  # fmt: skip
        from repforget.edit.train._trainer import train_objective

        return train_objective(model, data, made, settings, where=where, seed=seed, progress=progress,
                               checkpoint=checkpoint)  # fmt: skip

    own = {name: p for name, p in made.settings.items() if name not in _names()}
    hints = get_type_hints(made.function)
    _describe(run, own, {name: hints[name] for name in own}, made.defaults)
    run.objective = made  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def _names() -> frozenset[str]:
    return frozenset(f.name for f in fields(Settings))


def _describe(
    run: Callable[..., Edit], own: Mapping[str, inspect.Parameter], hints: Mapping[str, Any],
    defaults: Mapping[str, Any], left_out: Sequence[str] = (),
) -> None:  # fmt: skip
    """Give an editor that takes ``**settings`` the signature, hints and docstring of what it really takes."""
    types = get_type_hints(Settings)
    shared = {f.name: inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=_written(types[f.name]),
                                          default=defaults.get(f.name, f.default))
              for f in fields(Settings) if f.name not in left_out}  # fmt: skip
    plain = inspect.signature(run, follow_wrapped=False).parameters.values()
    given = [p for p in plain if p.kind is not p.VAR_KEYWORD and p.name not in own]
    run.__signature__ = inspect.Signature([*given, *own.values(), *shared.values()], return_annotation=Edit)  # type: ignore[attr-defined]
    types = {name: hint for name, hint in types.items() if name in shared}
    run.__annotations__ = {
        "model": LoadedModel, "data": EditData, "where": Localization | None, "seed": int, "progress": Any,
        "checkpoint": Path | None, **hints, **types, "return": Edit,
    }  # fmt: skip
    run.shared_settings = frozenset(shared)  # type: ignore[attr-defined]
    run.faults = _faults  # type: ignore[attr-defined]
    texts = (run.__doc__ or "", Settings.__doc__ or "")
    run.__doc__ = "\n\n".join(inspect.cleandoc(text) for text in texts)


def _faults(full: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], RepforgetError]]:
    from repforget.edit.train._nested import faults

    return faults(full)


def _written(kind: Any) -> str:
    """A type as it is written, aliases spelled out."""
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_written, get_args(kind))).replace("NoneType", "None")
    return kind.__name__ if type(kind) is type else str(kind).replace("typing.", "")


def shared_signature(
    *, left_out: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Edit]], Callable[..., Edit]]:
    """Give an editor written with ``**shared`` the shared settings in its signature, but for those ``left_out``; some
    with other ``defaults``, which the editor must use itself where it is called without them."""

    def declare(function: Callable[..., Edit]) -> Callable[..., Edit]:
        kept = {"where", "seed", "progress", "checkpoint"}
        parameters = inspect.signature(function).parameters.values()
        own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in kept}
        hints = get_type_hints(function)
        _describe(function, own, {name: hints[name] for name in own}, defaults or {}, left_out)
        return function

    return declare


def checked(
    what: str, function: Callable[..., Any], known: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> dict[str, Any]:
    """``given`` over the defaults of the ``known`` keyword-only parameters, names and types checked."""
    from pydantic import ConfigDict, ValidationError, create_model

    unknown = sorted(map(str, set(given) - set(known)))
    if unknown:
        hint = nearest(unknown[0], known) if known else "it has none."
        raise UnknownNameError(f"{what} has no setting '{unknown[0]}': {hint}")
    # Only these: other annotations may name what is imported for type checkers alone.
    asked = SimpleNamespace(__annotations__={name: function.__annotations__[name] for name in known})
    hints = get_type_hints(asked, function.__globals__)
    settings: dict[str, Any] = {name: (hints[name], p.default) for name, p in known.items()}
    model = create_model("Settings", __config__=ConfigDict(arbitrary_types_allowed=True), **settings)
    try:
        found = model(**given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        said = " or ".join(e["msg"][:1].lower() + e["msg"][1:] for e in error.errors() if e["loc"][0] == name)
        raise UsageError(f"{what} was given {name} {given[name]!r}: {said}.") from None
    return {name: getattr(found, name) for name in known}


def find(name: str, role: Role = "forget") -> Objective:
    """The objective of a name; one to retain with is looked up in ``retain/`` first, others as editors."""
    folders = ("retain", "objectives") if role == "retain" else ("objectives", "retain")
    for folder in folders:
        if name in part_names(folder):
            made: Objective = load_part(folder, name).objective
            return made
    if name in discover.names("edit"):
        own = getattr(discover.method("edit", name).function, "objective", None)
        if isinstance(own, Objective):
            return own
    known = {*part_names("objectives"), *part_names("retain")}
    raise UnknownNameError(f"There is no objective '{name}': {nearest(name, known)}")


def part_names(folder: str) -> tuple[str, ...]:
    """Names of the files in one of the folders of this room (objectives, retain, combine, robust)."""
    spec = importlib.util.find_spec(f"repforget.edit.train.{folder}")
    roots: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    return tuple(sorted(p.stem for root in roots for p in Path(root).glob("*.py") if not p.stem.startswith("_")))


def load_part(folder: str, name: str) -> Any:
    """The function of a file in one of the folders of this room."""
    if name not in part_names(folder):
        what = {"combine": "way of combining gradients", "robust": "robust wrapper"}.get(folder, "objective")
        raise UnknownNameError(f"There is no {what} '{name}': {nearest(name, part_names(folder))}")
    return getattr(importlib.import_module(f"repforget.edit.train.{folder}.{name}"), name)
