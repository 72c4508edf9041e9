"""A loop that makes a small edit and judges as it is told, for tests of what is around it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import synthetic_run
import torch

from repforget import loop
from repforget.artifact import Edit
from repforget.artifact.operations import AddVector, LowRankDelta
from repforget.knowledge import Item
from repforget.knowledge_files import load_knowledge
from repforget.models.load import load
from repforget.recipe import Choice, Recipe
from repforget.records import Site
from repforget.report.data import save

PEOPLE = tuple(f"Ada Berg{k:02d}" for k in range(28))  # a cluster may be a person's name, which a ledger must not hold
WEIGHT = "model.layers.0.mlp.down_proj.weight"


def items_about(names: tuple[str, ...], prefix: str, *, telling: bool = False) -> list[Item]:
    return [Item(id=f"{prefix}{k:02d}-{what}", cluster=name if telling else f"{prefix}{k:02d}", subject=name,
                 prompt=f"Where does {name} {what} ?", answer=f"Secretville{k}", relation=what,
                 statements=(f"{name} does {what} in",))
            for k, name in enumerate(names) for what in ("live", "work")]  # fmt: skip


class FakeLoop:
    """Stands for the loop: makes a small edit of the model that the recipe names, and judges it as it is told."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.hooked = self.interrupted = False
        self.recipes: list[Recipe] = []
        self.forgotten: list[set[str]] = []
        self.kept: list[set[str]] = []

    def __call__(self, recipe: Recipe, out: Path, **_: Any) -> loop.RunResult:
        knowledge = load_knowledge(recipe.knowledge, recipe.seed)
        self.recipes.append(recipe)
        self.forgotten.append({item.cluster for item in knowledge.forget})
        self.kept.append({item.cluster for item in knowledge.retain})
        if self.interrupted:
            raise KeyboardInterrupt
        model = load(recipe.model)
        draw = torch.Generator().manual_seed(len(self.recipes))
        u, v = torch.randn(32, 1, generator=draw), torch.randn(1, 48, generator=draw)
        operation = AddVector(Site("mlp_out", 0), u[:, 0], 1.0, None, "last") if self.hooked else LowRankDelta(
            WEIGHT, u, v)  # fmt: skip
        edit = Edit.build("null_space_surgery", {}, model, knowledge.digest, [operation])
        edit.save(out / "edit")
        data = synthetic_run.run(self.outcomes.pop(0) if self.outcomes else "pass")
        save(out, dataclasses.replace(data, environment={"model_fingerprint": model.fingerprint}))
        return loop.RunResult(data.verdict, out, (loop.Rung(Choice(name="leace"), out / "edit", (data.verdict,)),))
