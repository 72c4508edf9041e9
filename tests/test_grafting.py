"""Grafting: the forget gradient that it adds is that of the lower layers under the untouched upper ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from edit_models import model as tiny
from edit_models import people

from repforget.edit._dispatch import edit
from repforget.edit.train._engine import StepContext
from repforget.edit.train.robust.grafting import _below, grafting
from repforget.errors import UsageError
from repforget.models.load import fingerprint


class Known:
    """A step that says where its gradients were taken; all of them are 1."""

    def __init__(self, model: Any, shift: float) -> None:
        self.model, self.parameters = model, list(model.module.parameters())
        self.engine = self
        self.originals = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p in self.parameters:
                p.add_(shift)
        self.generator = torch.Generator().manual_seed(0)
        self.moved: list[list[bool]] = []

    def gradients(self, sides: tuple[str, ...]) -> dict[str, list[torch.Tensor]]:
        self.moved.append([not torch.equal(p, o) for p, o in zip(self.parameters, self.originals, strict=True)])
        return {side: [torch.ones_like(p) for p in self.parameters] for side in sides}

    restored = StepContext.restored


def test_upper_layers_are_the_untouched_ones_and_only_lower_ones_get_more() -> None:
    model = tiny()
    step: Any = Known(model, 0.5)
    shifted = fingerprint(model.module)
    found = grafting(step, scale=2.0)
    assert fingerprint(model.module) == shifted, "every bit comes back"
    names = [name for name, _ in model.module.named_parameters()]
    *plain, there = step.moved
    assert all(all(moved) for moved in plain)
    lower = {name for name, moved in zip(names, there, strict=True) if moved}
    embedding = next(name for name in names if "embed" in name)
    assert embedding in lower and any(".layers.0." in name for name in lower)
    last = f".layers.{model.n_layers - 1}."
    assert not any(last in name or "lm_head" in name or name.endswith("model.norm.weight") for name in lower)
    for name, g, kept in zip(names, found["forget"], found["retain"], strict=True):
        assert torch.equal(g, torch.full_like(g, 3.0 if name in lower else 1.0))
        assert torch.equal(kept, torch.ones_like(kept))


def test_every_layer_but_the_last_is_drawn() -> None:
    step: Any = Known(tiny(), 0.5)
    counts = {sum(_below(step, layer)) for layer in range(step.model.n_layers - 1)}
    for _ in range(20 * step.model.n_layers):
        grafting(step)
    assert {sum(moved) for moved in step.moved if not all(moved)} == counts


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_an_editor_takes_it_with_weights_and_adapters(adapter: str) -> None:
    model, data = tiny(), people().for_editor()
    before = fingerprint(model.module)
    settings: dict[str, Any] = {"steps": 3, "lr": 1e-3, "adapter": adapter, "batch_size": 8}
    data = replace(data, forget=data.forget[:16], retain=data.retain[:16])
    plain, deep = (edit(model, data, "npo", **settings, robust=robust) for robust in ("none", "grafting"))
    nothing = edit(model, data, "npo", **settings, robust={"grafting": {"scale": 0.0}})
    assert fingerprint(model.module) == before
    weights = [torch.cat([p.flatten() for p in made.applied_to(model).module.parameters()])
               for made in (plain, nothing, deep)]  # fmt: skip
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-3)
    assert (weights[2] - weights[0]).norm() > 10 * (weights[1] - weights[0]).norm()
    with pytest.raises(UsageError, match="scale"):
        edit(model, data, "npo", **settings, robust={"grafting": {"scale": -1.0}})
