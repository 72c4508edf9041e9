"""Masks of localised units, their controls, bits outside a mask, and steps where both gradients agree."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from test_repselect import taught

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.train._budget import divergence, probability
from repforget.edit.train.robust.disruption_mask import disruption_mask
from repforget.errors import SiteError, UsageError
from repforget.masks import (
    Masks,
    apply_gradient_mask,
    fill,
    inverted_units,
    masks,
    masks_of,
    random_units,
    reproject,
)
from repforget.models.weights import find, get_weight, head_slice, neuron_slice
from repforget.records import Component, Localization, RandomBand


def units(*texts: str) -> tuple[Component, ...]:
    return tuple(Component.parse(text) for text in texts)


def ranked(*texts: str, k: int = 2) -> Localization:
    found = units(*texts)
    return Localization("test", found, tuple(map(float, range(len(found), 0, -1))), RandomBand(k, 5, 1, 0, 0.5, "e"))


def counted(model: Any, found: Masks) -> int:
    shapes = dict(model.module.named_parameters())
    return sum(int(mask.expand(shapes[name].shape).sum()) for name, mask in found.masks.items())


def by_role(model: Any, found: Masks) -> dict[str, int]:
    """Entries per kind of module, whatever the layer."""
    out: dict[str, int] = {}
    shapes = dict(model.module.named_parameters())
    for name, mask in found.masks.items():
        kind = ".".join(name.split(".")[3:])
        out[kind] = out.get(kind, 0) + int(mask.expand(shapes[name].shape).sum())
    return out


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt", "falcon_new"])
def test_a_head_owns_its_rows_and_columns(architecture: str) -> None:
    model = tiny(architecture)
    found = masks_of(model, units("attn_z.1.h2"))
    assert counted(model, found) == found.parameters
    group = {"llama": 2, "phi3": 2, "falcon_new": 2}.get(architecture, 1)
    for role, head in (("q", 2), ("k", 2 // group), ("v", 2 // group), ("attn_out", 2)):
        ref = head_slice(model.module, find(model.module, role, 1), head)  # type: ignore[arg-type]
        with torch.no_grad():
            model.module.get_parameter(ref.name).masked_fill_(found.masks[ref.name], 7.0)
        assert bool((get_weight(model.module, ref) == 7.0).all())
    touched = sum(int((p == 7.0).sum()) for p in model.module.parameters())
    biases = sum(int(m.sum()) for n, m in found.masks.items() if n.endswith("bias"))
    assert touched == found.parameters - biases
    assert bool(found.notes) == (group > 1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("part", ["all", "down", "up+gate"])
def test_a_neuron_owns_rows_in_and_a_column_out(architecture: str, part: str) -> None:
    model = tiny(architecture)
    found = masks_of(model, units("mlp_post.0.n5", "mlp_post.0.n6"), mlp_part=part)  # type: ignore[arg-type]
    gated = architecture != "gpt2"
    roles = {"all": ("mlp_gate", "mlp_up", "mlp_out"), "down": ("mlp_out",), "up+gate": ("mlp_gate", "mlp_up")}[part]
    total = 0
    for role in roles:
        if role == "mlp_gate" and not gated:
            continue
        ref = neuron_slice(model.module, find(model.module, role, 0), 5)  # type: ignore[arg-type]
        with torch.no_grad():
            model.module.get_parameter(ref.name).masked_fill_(found.masks[ref.name], 7.0)
        own = get_weight(model.module, ref)
        assert bool((own == 7.0).all())
        total += 2 * own.numel()
    assert sum(int((p == 7.0).sum()) for p in model.module.parameters()) == total
    assert counted(model, found) == found.parameters


def test_layers_own_their_matrices_and_the_budget_is_kept() -> None:
    model = tiny("llama")
    whole = masks_of(model, units("resid_post.1"))
    assert {name.split(".")[2] for name in whole.masks} == {"1"}
    matrices = [p for n, p in model.module.named_parameters() if ".layers.1." in n and p.ndim == 2]
    assert whole.parameters == sum(p.numel() for p in matrices) == counted(model, whole)
    assert masks_of(model, units("mlp_out.1")).parameters < whole.parameters
    where = ranked(*(f"mlp_post.0.n{n}" for n in range(20)))
    one = masks(model, where, top=1).parameters
    some = masks(model, where, budget=5 * one + 1)
    assert (some.parameters, len(some.components)) == (5 * one, 5)
    assert len(masks(model, where).components) == where.band.k
    with pytest.raises(UsageError, match="No unit fits"):
        masks(model, where, budget=one - 1)
    with pytest.raises(UsageError, match="selects no unit"):
        masks(model, where, top=0)
    with pytest.raises(SiteError, match="no weights"):
        masks_of(model, units("final_norm"))
    with pytest.raises(SiteError):
        masks_of(tiny("mixtral"), units("mlp_post.0.n1"))


@settings(max_examples=20, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=7), st.integers(0, 99))
def test_random_masks_have_the_same_size_and_kinds_of_module(heads: set[tuple[int, int]], seed: int) -> None:
    model = tiny("llama")
    own = units(*(f"attn_z.{layer}.h{head}" for layer, head in sorted(heads)), "mlp_post.0.n3", "mlp_post.1.n4")
    real = masks_of(model, own)
    drawn = random_units(model, own, seed)
    control = masks_of(model, drawn)
    assert control.parameters == real.parameters
    assert by_role(model, control) == by_role(model, real)
    assert random_units(model, own, seed) == drawn
    assert len(set(drawn)) == len(own)


def test_random_and_inverted_selections_differ_from_the_selection() -> None:
    model = tiny("gpt2")
    own = units(*(f"mlp_post.0.n{n}" for n in range(6)))
    assert len({random_units(model, own, seed) for seed in range(3)}) == 3
    where = ranked("attn_z.0.h1", *(f"mlp_post.0.n{n}" for n in range(9)), "attn_z.1.h3")
    chosen = units("attn_z.0.h1", "mlp_post.0.n0", "mlp_post.0.n1")
    assert inverted_units(where, chosen) == units("attn_z.1.h3", "mlp_post.0.n7", "mlp_post.0.n8")
    with pytest.raises(UsageError, match="too few"):
        inverted_units(where, own)
    with pytest.raises(UsageError, match="once"):
        random_units(model, units("embed"), 0)


NEURONS = tuple(f"mlp_post.{layer}.n{n}" for n in range(4) for layer in (0, 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_controls_have_the_budget_of_the_located_units(k: int, seed: int) -> None:
    model = tiny("llama")
    where = ranked(*NEURONS, *(f"attn_z.{layer}.h{head}" for layer in (0, 1) for head in (0, 2)), k=k)
    real = masks(model, where)
    for kind in ("random", "inverted"):
        control = masks(model, where, units=kind, seed=seed)
        assert control.parameters == real.parameters == counted(model, control)
        assert by_role(model, control) == by_role(model, real)
        assert control.notes[0].startswith(f"mask: {k} {kind} units of {real.parameters} parameters")


def test_inverted_units_are_the_other_end_of_the_ranking() -> None:
    model = tiny("llama")
    where = ranked(*NEURONS, k=4)
    real, other = masks(model, where), masks(model, where, units="inverted")
    assert {*real.components, *other.components} == set(where.components)
    both = masks_of(model, where.components)
    assert real.masks.keys() == other.masks.keys() == both.masks.keys()
    for name, whole in both.masks.items():
        assert torch.equal(real.masks[name] ^ other.masks[name], whole), "each entry belongs to one of them"


@pytest.mark.parametrize("kind", ["located", "random", "inverted"])
def test_a_control_is_asked_for_in_a_recipe_and_said_in_the_manifest(kind: str) -> None:
    model, data = tiny("llama"), people().for_editor()
    where = ranked(*NEURONS, k=2)

    def made(mask: Any, seed: int = 0) -> Any:
        return run_editor(model, data, "npo", where=where, mask=mask, seed=seed, steps=2, lr=1e-2, batch_size=4)

    edit = made(kind)
    assert edit.manifest.settings["mask"] == kind
    (note,) = (note for note in edit.manifest.notes if note.startswith("mask: "))
    expected = masks(model, where, units=kind, seed=0)
    assert note == expected.notes[0] and f"2 {kind} units" in note
    assert edit.digest == made(kind).digest
    changed, before = edit.applied_to(model).module, dict(model.module.named_parameters())
    entries = 0
    for name, now in changed.named_parameters():
        different = now != before[name]
        inside = expected.masks.get(name, torch.tensor(False)).expand(different.shape)
        assert not bool((different & ~inside).any()), "no bit outside the units changes"
        entries += int(different.sum())
    assert entries > 0
    if kind == "located":
        assert {op.weight for op in made(True).operations} == {op.weight for op in edit.operations}
    if kind == "random":
        notes = {tuple(masks(model, where, units="random", seed=seed).components) for seed in range(4)}
        assert len(notes) > 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_training_under_a_mask_leaves_every_other_bit(architecture: str) -> None:
    """With momentum from before the mask, decay, and NaN gradients outside it."""
    model = tiny(architecture)
    found = masks_of(model, units("attn_z.0.h1", "mlp_post.1.n7"))
    table = dict(model.module.named_parameters())
    start = {name: p.detach().clone() for name, p in table.items()}
    chosen = [table[name].requires_grad_(True) for name in found.masks]
    optimiser = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.1)
    ids = torch.tensor(tiny_models.sample_ids(2, 6)[:1])
    for step in range(3):
        loss = model.module(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        for name, mask in found.masks.items():
            gradient = table[name].grad
            assert gradient is not None
            if step:
                gradient.masked_fill_(~mask, math.nan)
                apply_gradient_mask(gradient, mask)
        optimiser.step()
        for name, mask in found.masks.items():
            reproject(table[name], start[name], mask)
    for name, parameter in table.items():
        mask = found.masks.get(name, torch.tensor(False)).expand(parameter.shape)
        assert torch.equal(parameter[~mask], start[name][~mask])
        if name in found.masks and "k_proj" not in name:
            assert not torch.equal(parameter[mask], start[name][mask])


def _step(forget: list[torch.Tensor], retain: list[torch.Tensor]) -> Any:
    return SimpleNamespace(gradients=lambda: {"forget": forget, "retain": retain})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999))
def test_a_masked_step_lowers_both_losses_in_every_entry(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    forget, retain = ([torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)] for _ in range(2))
    found = disruption_mask(_step(forget, retain))
    assert found["retain"] is retain
    for masked, f, r in zip(found["forget"], forget, retain, strict=True):
        assert torch.equal(masked != 0, f.sign() == r.sign())
        assert bool((masked * r >= 0).all()) and bool((masked * f >= 0).all())
    total = torch.cat([g.flatten() for g in found["forget"]]).norm()
    assert float(total) == pytest.approx(1.0, abs=1e-5)
    raw = disruption_mask(_step(forget, retain), norm=0.0)["forget"]
    assert all(torch.equal(a[a != 0], f[a != 0]) for a, f in zip(raw, forget, strict=True))


def test_where_nothing_agrees_nothing_is_stepped() -> None:
    gradient = [torch.tensor([1.0, -2.0])]
    assert torch.equal(disruption_mask(_step(gradient, [-gradient[0]]))["forget"][0], torch.zeros(2))


def test_in_a_trained_editor_it_forgets_at_less_damage() -> None:
    model, data = taught(), people().for_editor()
    known, damage = probability(model, data.forget, "forget", 0), divergence(model, data, 0)
    seen = {}
    for robust in ("none", "disruption_mask"):
        with run_editor(model, data, "npo", robust=robust, steps=30).attach(model):
            seen[robust] = (known(), damage())
    assert seen["disruption_mask"][0] < known() - 0.05
    assert seen["disruption_mask"][1] < 0.3 * seen["none"][1]


def test_tied_tables_are_masked_under_the_name_that_is_trained() -> None:
    model = tiny("gpt2")
    found = masks_of(model, units("logits"))
    assert set(found.masks) <= dict(model.module.named_parameters()).keys()
    assert found.parameters == counted(model, found)


@pytest.mark.parametrize("name", [*tiny_models.CONFIGS])
def test_a_budget_is_filled_by_heads_and_neurons_in_order(name: str) -> None:
    model = tiny(name)
    first, second = units("mlp_out.1", "attn_out.0")
    whole = masks_of(model, [first]).parameters
    for budget in (whole, whole + masks_of(model, [second]).parameters // 2):
        found = masks_of(model, fill(model, [first, second], budget, seed=1))
        assert budget * 0.55 < found.parameters <= budget
        assert counted(model, found) == found.parameters
        assert {c.site.layer for c in found.components if c.site.kind.startswith("mlp")} == {1}
        assert budget > whole or not any(c.site.head is not None for c in found.components)
    assert fill(model, [first, second], whole, seed=3) == fill(model, [first, second], whole, seed=3)
    with pytest.raises(UsageError, match="give more"):
        fill(model, [first], 3)
    with pytest.raises(UsageError, match="give more"):
        fill(model, units("embed"), 10**9)


def test_a_budget_below_a_site_is_filled_to_the_last_neuron() -> None:
    model = tiny("llama")
    found = masks_of(model, fill(model, units("resid_post.0"), 2000, seed=0))
    assert 2000 - 3 * 32 < found.parameters <= 2000
