"""A run described: pydantic models read from YAML, every fault at once, with a JSON schema and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from repforget import discover
from repforget.checked_yaml import Document, Fault, Location, check, fail, read_document
from repforget.errors import RecipeError, nearest

Level = Literal["quick", "standard", "thorough"]
LEVELS: tuple[str, ...] = get_args(Level)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Name = Annotated[str, StringConstraints(min_length=1)]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
# recipe key -> room of its methods
ROOM_OF = {"locate": "locate", "ladder": "edit", "verify": "verify", "held_out": "verify"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Choice(_Strict):
    """One method and the settings given to it; written ``leace``, ``{leace: {rank: 2}}`` or ``{relearn: quick}``."""

    name: Name
    settings: dict[str, Any] = Field(default_factory=dict)


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Choice):
        return value
    if isinstance(value, Mapping) and set(value) == {"name", "settings"}:
        return dict(value)  # the canonical form
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, settings),) = value.items()
        if settings is None or isinstance(settings, Mapping):
            return {"name": name, "settings": dict(settings or {})}
        if isinstance(settings, str) and settings in LEVELS:
            return {"name": name, "settings": {"budget": settings}}
        raise ValueError(f"the settings of '{name}' must be 'key: value' pairs, found {settings!r}")
    raise ValueError("write a method as 'name' or as 'name: {setting: value}'")


def written(choice: Choice) -> str | dict[str, Any]:
    """The choice as a recipe writes it."""
    return {choice.name: dict(choice.settings)} if choice.settings else choice.name


def _several(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


_CHOICE_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "minProperties": 1, "maxProperties": 1,
         "additionalProperties": {"anyOf": [{"type": "object"}, {"type": "null"}, {"enum": list(LEVELS)}]}},
    ]
}  # fmt: skip
MethodChoice = Annotated[Choice, BeforeValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]
Choices = Annotated[tuple[MethodChoice, ...], BeforeValidator(_several)]


def _level_or_choices(value: Any) -> Any:
    """A bare word is a level; a list or mapping names verifiers."""
    if isinstance(value, str) and value not in LEVELS:
        raise ValueError(f"'{value}' is no level; {nearest(value, LEVELS)} (or give a list of verifiers)")
    if isinstance(value, str):
        return value
    if not value:
        raise ValueError("the list of verifiers is empty; name at least one, or a level such as 'standard'")
    return tuple(Choice.model_validate(_choice(entry)) for entry in _several(value))


Verify = Annotated[
    Level | tuple[Choice, ...],
    BeforeValidator(_level_or_choices),
    WithJsonSchema({"anyOf": [{"enum": list(LEVELS)}, {"type": "array", "items": _CHOICE_SCHEMA}]}),
]


class Limits(_Strict):
    """What the run may cost: quality lost on what must stay, wall-clock minutes, memory in GiB."""

    utility_drop: float = Field(default=0.02, gt=0, lt=1)
    minutes: float = Field(default=10.0, gt=0)
    memory: float | None = Field(default=None, gt=0)


class Recipe(_Strict):
    """Everything a run is asked to do. The same recipe on the same data gives the same bytes."""

    model: Name
    knowledge: Name
    twins: tuple[Name, ...] = ()
    locate: Choices = (Choice(name="probe_sweep"), Choice(name="attribution_patching"))
    ladder: Annotated[Choices, Field(min_length=1)] = (
        Choice(name="leace"),
        Choice(name="null_space_surgery", settings={"layers": "auto"}),
        Choice(name="stranger_distillation"),
    )
    verify: Verify = "standard"
    held_out: Choices | None = None  # asked on the sealed split alone; None: those of the level
    limits: Limits = Limits()
    margin: float = Field(default=0.05, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)
    device: Device = "auto"
    dtype: Dtype = "auto"

    @classmethod
    def default(
        cls, model: str = "organism:bios", knowledge: str = "bios-people",
        twins: Sequence[str] | None = None, **changes: Any,
    ) -> Recipe:  # fmt: skip
        """The recipe of a run described by flags alone; the embedded organism brings its twins, which never saw the
        people of ``bios-people`` (and know everything else)."""
        organism = model.startswith("organism:") and "/" not in model and Path(knowledge).name == "bios-people"
        own = tuple(f"{model}/twin-{k}" for k in range(2)) if organism else ()
        chosen = own if twins is None else tuple(twins)
        return build_recipe({"model": model, "knowledge": knowledge, "twins": chosen, **changes})

    def changed(self, **changes: Any) -> Recipe:
        """The same recipe with some keys replaced (command-line options win over the file)."""
        given = {key: value for key, value in changes.items() if value is not None}
        return build_recipe({**dict(self), **given}) if given else self

    def canonical(self) -> dict[str, Any]:
        """Plain JSON data with every default written out; equal recipes give equal data."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """sha256 of the canonical recipe."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    for key in ("locate", "ladder"):
        schema["properties"][key]["default"] = [written(c) for c in Recipe.model_fields[key].default]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def load_recipe(path: str | Path, *, check_settings: bool = True) -> Recipe:
    """Read a recipe file; raises one RecipeError listing every fault with its line.

    ``check_settings`` also validates the settings of each method against its signature, which imports the
    methods that the recipe names (and with them torch).
    """
    document = read_document(Path(path), "recipe")
    recipe, faults = check(document, Recipe)
    faults += _method_faults(document.value, check_settings)
    if recipe is None or faults:
        fail(document, faults)
    return recipe


def build_recipe(data: Mapping[str, Any], *, check_settings: bool = False) -> Recipe:
    """Check recipe data that comes from flags or from Python: the faults of :func:`load_recipe`, no lines."""
    recipe, faults = check(Document(Path("recipe"), dict(data), None), Recipe)
    faults += _method_faults(data, check_settings)
    if recipe is None or faults:
        listed = "; ".join(f"{'.'.join(map(str, f.location))}: {f.message}" for f in faults)
        raise RecipeError(f"The recipe is wrong: {listed}.")
    return recipe


def _method_faults(data: Mapping[str, Any], check_settings: bool) -> list[Fault]:
    """Unknown method names and wrong settings, looked up in their rooms; malformed entries are pydantic's."""
    faults: list[Fault] = []
    for key, room in ROOM_OF.items():
        if isinstance(data.get(key), str) and key == "verify":
            continue
        for location, choice in _choices(data, key):
            if choice.name not in discover.names(room):
                hint = nearest(choice.name, discover.names(room))
                faults.append(Fault(location, f"there is no method '{choice.name}' in {room}; {hint}"))
            elif check_settings and choice.settings:
                wrong = discover.method(room, choice.name).faults(choice.settings)
                faults += [Fault((*location, choice.name, *place), text) for place, text in wrong]
    return faults


def _choices(data: Mapping[str, Any], key: str) -> Iterator[tuple[Location, Choice]]:
    value = data.get(key)
    listed = isinstance(value, (list, tuple))
    for index, entry in enumerate(_several(value) if value is not None else ()):
        try:
            choice = Choice.model_validate(_choice(entry))
        except ValueError:  # reported by the model itself
            continue
        yield ((key, index) if listed else (key,)), choice
