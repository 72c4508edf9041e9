"""``repforget verify``: attack a saved edit and judge it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import EXIT_CODES, exit_with, print_json, print_verdict
from repforget.cli._progress import display


def command(
    edit: Annotated[Path, typer.Argument(help="Folder of a saved edit.")],
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    twin: o.Twins = None,
    level: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "standard",
    verifier: Annotated[list[str] | None, typer.Option(help="Only this verifier; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="dev, gate or sealed; look at sealed once, at the end.")] = "dev",
    margin: Annotated[float, typer.Option(help="Share of the knowledge that may be left.")] = 0.05,
    utility_drop: Annotated[float, typer.Option(help="Share of quality that may be lost.")] = 0.02,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Attack a saved edit beside its controls, and judge it.

    EDIT is the folder of a saved edit.
    """
    from repforget.errors import UsageError, nearest
    from repforget.knowledge import SPLITS
    from repforget.knowledge_files import load_knowledge

    chosen = next((name for name in SPLITS if name == split), None)
    if chosen is None:
        raise UsageError(f"There is no split '{split}': {nearest(split, SPLITS)}")
    probe = load_knowledge(knowledge, seed=seed)
    from repforget.artifact import load_edit
    from repforget.models.load import load
    from repforget.verify._verify import verify

    saved = load_edit(edit)
    loaded, *twins = (load(name, device=device, dtype=dtype) for name in (model, *(twin or ())))
    saved.check_base(loaded)
    with display(as_json) as (progress, _):
        result = verify(loaded, saved, probe, twins=twins, split=chosen, verifiers=verifier or level, seed=seed,
                        margin=margin, utility_margin=utility_drop, progress=progress)  # fmt: skip
    if as_json:
        evidence = [entry.to_json() for entry in result.evidence]
        code = EXIT_CODES[result.verdict.outcome]
        print_json({"verdict": result.verdict.to_json(), "evidence": evidence, "exit_code": code})
    else:
        print_verdict(result.verdict, result.evidence)
    exit_with(result.verdict)
