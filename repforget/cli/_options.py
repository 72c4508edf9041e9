"""Options that several commands share, written once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from repforget.records import Localization

Model = Annotated[str, typer.Option(help="Hub id, local folder or organism:NAME.")]
KnowledgeName = Annotated[str, typer.Option("--knowledge", help="A probe in probes/, or the path of one.")]
Twins = Annotated[list[str] | None, typer.Option("--twin", help="A model that never knew; may be repeated.")]


def _natural(value: int | None) -> int | None:
    if value is not None and value < 0:
        raise typer.BadParameter(f"{value} is negative; give 0 or more")
    return value


Seed = Annotated[int, typer.Option(callback=_natural, help="Everything random follows from it.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, no progress.")]
ShowTexts = Annotated[bool, typer.Option("--show-texts", help="Also show forget texts, which are hidden otherwise.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, name=value; repeatable.")]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Folder to write to.")]
Method = Annotated[str, typer.Argument(help="Name of the method; 'repforget methods' lists them.")]
ModelFlag = Annotated[str | None, typer.Option("--model", help="Hub id, local folder or organism:NAME.")]
KnowledgeFlag = Annotated[str | None, typer.Option("--knowledge", help="A probe in probes/, or the path of one.")]
LevelFlag = Annotated[str | None, typer.Option("--level", help="Verification: quick, standard or thorough.")]
SeedFlag = Annotated[int | None, typer.Option("--seed", callback=_natural, help="Everything random follows from it.")]
DeviceFlag = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
DtypeFlag = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
RecipeFile = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="recipe.yaml; without it the flags count.")]


def parse_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``["rank=3", "layers=[1, 2]"]`` -> settings, with values read as YAML."""
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs or ():
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"'{pair}' is not name=value", param_hint="--set")
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise typer.BadParameter(f"the value of '{name}' cannot be read: {value}", param_hint="--set") from None
    return settings


def located(where: Path | None) -> Localization | None:
    """What ``repforget locate --out`` wrote to ``where``; UsageError for another file."""
    from repforget.errors import UsageError
    from repforget.records import Localization
    from repforget.store import read_json

    if where is None:
        return None
    try:
        return Localization.from_json(read_json(where))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"'{where}' holds no localization ({type(error).__name__}: {error}): give a file that "
                         "'repforget locate --out' wrote.") from None  # fmt: skip
