"""Methods find themselves: one file in a room is one method, and its signature is its configuration.

A method file ``repforget/locate/probe_sweep.py`` defines a function of the same name. Its keyword-only
parameters (other than the context that the caller provides) are its hyperparameters: their annotations and
defaults validate a recipe, and the docstring makes the method table. Third parties add methods through the
entry points ``repforget.locators``, ``repforget.editors`` and ``repforget.verifiers``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from repforget.errors import RecipeError, RepforgetError, UnknownNameError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

ROOMS = {"locate": "repforget.locators", "edit": "repforget.editors", "verify": "repforget.verifiers",
         "bench": "repforget.benchmarks"}  # fmt: skip
LEVELS = ("quick", "standard", "thorough")  # names of the budgets a method may offer
# Given by the caller, never by a recipe.
CONTEXT = frozenset({"seed", "where", "twins", "references", "progress", "checkpoint"})
BENCH_CONTEXT = CONTEXT | {"data", "reference", "part"}
# Parts of a room that are no method.
PRIVATE_MODULES = frozenset({"verdict", "battery", "arms", "statistics", "retain", "combine", "robust"})


@dataclass(frozen=True)
class Method:
    """A discovered method: its name, its room, the family folder it lies in, and the function itself."""

    name: str
    room: str
    family: str
    function: Callable[..., Any]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").strip().split("\n\n")[0].replace("\n", " ")

    @property
    def hyperparameters(self) -> Mapping[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters
        given = BENCH_CONTEXT if self.room == "bench" else CONTEXT
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in given}

    @property
    def context(self) -> frozenset[str]:
        return CONTEXT & set(inspect.signature(self.function).parameters)

    @property
    def shared(self) -> frozenset[str]:
        """Settings that a whole family has (the trained editors'), described once and not with each method."""
        return frozenset(getattr(self.function, "shared_settings", ()))

    def constant(self, name: str, default: Any = None) -> Any:
        """A constant of the method's file, such as MEASURES."""
        return getattr(inspect.unwrap(self.function), "__globals__", {}).get(name, default)

    @property
    def budgets(self) -> Mapping[str, Mapping[str, Any]]:
        """Named sets of settings: the constant BUDGETS of the method's file (empty where it has none)."""
        return self.constant("BUDGETS", {})  # type: ignore[no-any-return]

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Validate ``given`` against the signature and return the full settings with defaults filled in.

        ``budget`` among them names one of the method's budgets, which the other settings then override.
        """
        from pydantic import ValidationError

        fault = self._budget_fault(given)
        if fault is not None:
            raise RecipeError(f"Method '{self.name}' has no budget {fault}.")
        given = self._spelled_out(given)
        unknown = sorted(set(given) - set(self.hyperparameters))
        if unknown:
            hint = nearest(unknown[0], self.hyperparameters)
            raise RecipeError(f"Method '{self.name}' has no setting '{unknown[0]}': {hint}")
        model = self._settings_model()
        try:
            checked = model(**given)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise RecipeError(f"Settings of method '{self.name}' are wrong: {faults}.") from None
        full = {name: getattr(checked, name) for name in model.model_fields}
        for _, wrong in self._inside(full):
            raise wrong
        return full

    def faults(self, given: Mapping[str, Any]) -> tuple[tuple[tuple[str | int, ...], str], ...]:
        """Every (place, what is wrong there) of ``given``, unknown names with their nearest; empty if none."""
        from pydantic import ValidationError

        known = self.hyperparameters
        fault = self._budget_fault(given)
        if fault is not None:
            return ((("budget",), f"method '{self.name}' has no budget {fault}"),)
        given = self._spelled_out(given)
        found: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"method '{self.name}' has no such setting; {nearest(name, known)}")
            for name in given if name not in known
        ]  # fmt: skip
        try:
            checked = self._settings_model()(**{name: value for name, value in given.items() if name in known})
        except ValidationError as error:
            found += [((str(e["loc"][0]),), e["msg"][:1].lower() + e["msg"][1:]) for e in error.errors()]
        else:
            full = {name: getattr(checked, name) for name in known}
            found += [(place, str(fault).removesuffix(".")) for place, fault in self._inside(full)]
        return tuple(found)

    def _inside(self, full: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], RepforgetError]]:
        """What the method itself finds wrong inside its settings: the attribute ``faults`` of its function."""
        own: Callable[[Mapping[str, Any]], Any] | None = getattr(self.function, "faults", None)
        return () if own is None else own(full)  # type: ignore[no-any-return]

    def _budget_fault(self, given: Mapping[str, Any]) -> str | None:
        wanted = given.get("budget")
        if wanted is None or wanted in self.budgets:
            return None
        return f"'{wanted}'; {nearest(str(wanted), self.budgets) if self.budgets else 'it offers none'}".rstrip(".")

    def _spelled_out(self, given: Mapping[str, Any]) -> dict[str, Any]:
        preset = self.budgets.get(given.get("budget", ""), {})
        return {**preset, **{name: value for name, value in given.items() if name != "budget"}}

    def _settings_model(self) -> type[BaseModel]:
        from pydantic import ConfigDict, create_model

        hints = get_type_hints(self.function)
        fields: dict[str, Any] = {
            name: (hints[name], ... if p.default is p.empty else p.default) for name, p in self.hyperparameters.items()
        }
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        model: type[BaseModel] = create_model(f"{self.name}_settings", __config__=config, **fields)
        return model


def _files(room: str) -> dict[str, str]:
    """Method name -> module path for every method file in a room, without importing any of them.

    A folder appended to the room's ``__path__`` is searched too, so that a method can live outside the package.
    """
    spec = importlib.util.find_spec(f"repforget.{room}")
    found: dict[str, str] = {}
    for root in map(Path, (spec and spec.submodule_search_locations) or ()):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if any(part.startswith("_") or part in PRIVATE_MODULES for part in parts):
                continue
            found[parts[-1]] = ".".join(("repforget", room, *parts))
    return found


def names(room: str) -> tuple[str, ...]:
    """Names of all methods of a room, own and third-party, without importing them."""
    plugins = (point.name for point in entry_points(group=ROOMS[room]))
    return tuple(sorted({*_files(room), *plugins}))


@cache
def _load(room: str, module_path: str, name: str) -> Method:
    module = importlib.import_module(module_path)
    function = getattr(module, name, None)
    if not callable(function):
        raise RepforgetError(f"Method file '{module_path}' does not define a function '{name}': "
                             "name the function like its file.")  # fmt: skip
    family = module_path.split(".")[2] if module_path.count(".") > 2 else room
    return Method(name, room, family, function)


def method(room: str, name: str) -> Method:
    """Return one method by name; an unknown name is answered with the nearest valid ones."""
    files = _files(room)
    if name in files:
        return _load(room, files[name], name)
    for point in entry_points(group=ROOMS[room]):
        if point.name == name:
            return Method(name, room, point.value.split(":")[0].split(".")[0], point.load())
    raise UnknownNameError(f"There is no method '{name}' in {room}: {nearest(name, names(room))}")


def methods(room: str) -> tuple[Method, ...]:
    """Every method of a room, imported."""
    return tuple(method(room, name) for name in names(room))
