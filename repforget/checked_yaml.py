"""YAML into a pydantic model: every fault at once, each with its line and the nearest valid key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from repforget.errors import RecipeError, nearest

ModelT = TypeVar("ModelT", bound=BaseModel)
Location = tuple[int | str, ...]


class _Loader(yaml.SafeLoader):
    """Safe loader that reads ``1e-4`` as a number, refuses repeated keys and refuses aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):  # aliases can grow a small file without bound
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if str(key.value) in seen:
                text = f"the key '{key.value}' was already given on line {seen[str(key.value)]}"
                raise yaml.composer.ComposerError(None, None, text, key.start_mark)
            seen[str(key.value)] = key.start_mark.line + 1
        return node


# YAML 1.1 reads 1e-4 as text for want of a dot; everyone who writes it in a recipe means a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass(frozen=True)
class Document:
    """A parsed YAML file that still knows on which line each value stands."""

    path: Path
    value: Any
    node: yaml.Node | None

    def line(self, location: Location) -> int:
        """Line (from 1) of the value at ``location``, or of its nearest parent in the file."""
        node, line = self.node, 1
        for step in location:
            found = _child(node, step)
            if found is None:
                break
            line, node = found
        return line


def _child(node: yaml.Node | None, step: int | str) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if str(key.value) == str(step):
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item.start_mark.line + 1, item
    return None


def read_text(path: Path, what: str) -> str:
    """Read a UTF-8 file; a missing, unreadable or binary one is a :class:`RecipeError` that names it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*") if p.is_file()) if path.parent.is_dir() else []
        hint = f" ({nearest(path.name, beside)})" if beside else ""
        raise RecipeError(f"There is no {what} '{path}'{hint}.") from None
    except IsADirectoryError:
        raise RecipeError(f"'{path}' is a folder, not a {what}: give the file inside it.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"The {what} '{path}' is not UTF-8 text (byte {error.start}): save it so.") from None
    except OSError as error:
        raise RecipeError(f"The {what} '{path}' cannot be read: {error.strerror}.") from None


def read_document(path: Path, what: str = "YAML file") -> Document:
    """Parse one YAML file; malformed text is a :class:`RecipeError` with line and column."""
    text = read_text(path, what)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise RecipeError(f"'{path}' is not valid YAML: {_explain(error)}.") from None
    except ValueError as error:  # e.g. an impossible date
        raise RecipeError(f"'{path}' holds a value that cannot be read: {error}.") from None
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        found = "nothing" if value is None else _kind(value)
        raise RecipeError(f"'{path}' holds {found}: a {what} is a mapping of 'key: value' lines.")
    return Document(path, value, node)


def _explain(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return where + (error.problem or error.context or "malformed").replace("\n", " ")
    return " ".join(str(error).split())


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a number",
             float: "a number", type(None): "nothing"}  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True)
class Fault:
    """One thing wrong at one place of a document."""

    location: Location
    message: str


def fail(document: Document, faults: list[Fault]) -> NoReturn:
    """Raise one :class:`RecipeError` that lists all ``faults`` by line."""
    lines = sorted({(document.line(f.location), _dotted(f.location), f.message) for f in faults})
    listed = [f"line {line}: {f'{where}: ' if where else ''}{message}" for line, where, message in lines]
    if len(listed) == 1:
        raise RecipeError(f"{document.path}, {listed[0]}.")
    raise RecipeError("\n  ".join((f"{document.path} has {len(listed)} faults:", *listed)))


def _dotted(location: Location) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def check(document: Document, model: type[ModelT]) -> tuple[ModelT | None, list[Fault]]:
    """Validate a document against ``model``; return the model (None if anything is wrong) and all faults."""
    try:
        return model.model_validate(document.value), []
    except ValidationError as error:
        return None, [_fault(entry, model) for entry in error.errors()]


def read_model(path: Path, model: type[ModelT], what: str) -> ModelT:
    """Read ``path`` into ``model`` or raise one :class:`RecipeError` listing every fault with its line."""
    document = read_document(path, what)
    checked, faults = check(document, model)
    if checked is None:
        fail(document, faults)
    return checked


def _fault(entry: Mapping[str, Any], model: type[BaseModel]) -> Fault:
    location: Location = tuple(entry["loc"])
    kind, message = entry["type"], str(entry["msg"])
    if kind == "extra_forbidden":
        valid = _keys_at(model, location[:-1])
        return Fault(location, f"unknown key; {nearest(str(location[-1]), valid)}")
    if kind == "missing":
        return Fault(location, "this key is required and missing")
    if kind == "value_error":
        return Fault(location, message.removeprefix("Value error, "))
    found = entry.get("input")
    shown = repr(found) if isinstance(found, (str, int, float)) else _kind(found)
    return Fault(location, f"{message[:1].lower()}{message[1:]} (found {shown})")


def _keys_at(model: type[BaseModel], location: Location) -> tuple[str, ...]:
    """Valid keys of the pydantic model that stands at ``location`` below ``model``."""
    current: list[Any] = [model]
    for step in location:
        found = [child for annotation in current for child in _step(annotation, step)]
        current = found or current  # a union tag in the location is no step of the document
    models = [m for annotation in current for m in _models(annotation)]
    return tuple({field.alias or name: None for m in models for name, field in m.model_fields.items()})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _models(get_args(annotation)[0])
    elif get_origin(annotation) not in (dict, list, tuple, Mapping):
        for inner in get_args(annotation):
            yield from _models(inner)


def _step(annotation: Any, step: int | str) -> Iterator[Any]:
    for model in _models(annotation):
        if step in model.model_fields:
            yield model.model_fields[str(step)].annotation
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is dict and len(arguments) == 2:
        yield arguments[1]
    elif origin in (list, tuple) and isinstance(step, int) and arguments:
        yield arguments[0]
    elif origin is not None:
        for inner in arguments:
            yield from _step(inner, step)
