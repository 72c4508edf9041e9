"""Direction ablation is exact on every architecture; steering adds exactly what it says, where it says."""

from __future__ import annotations

from typing import Any

import edit_models
import pytest
import tiny_models
import torch
from torch import Tensor

from repforget.artifact import AddVector, BiasDelta, LowRankDelta, Untie
from repforget.edit._collect import collect, leftover, read_points, text_sequences
from repforget.edit._contrast import contrasts
from repforget.edit.steer._writers import ablate_writers, orthonormal
from repforget.edit.steer.direction_ablation import direction_ablation
from repforget.edit.steer.steering import steering
from repforget.errors import NoEffectError, UsageError
from repforget.models.capture import Batch, capture, forward, hooks
from repforget.models.sites import site_map
from repforget.records import Component, Localization, RandomBand, Site

SANDWICH = ("gemma2", "gemma3", "olmo2")
BATCH = Batch.pad(tiny_models.sample_ids())


def data() -> Any:
    return edit_models.people().for_editor()


def logits(model: Any) -> Tensor:
    return forward(model, BATCH)[BATCH.mask.bool()]


def stream_sites(model: Any) -> list[Site]:
    places = site_map(model.module)
    return [site for kind in ("resid_pre", "resid_post") for site in places.expand(kind)]


# ------------------------------------------------------------------ direction ablation


@pytest.mark.parametrize("architecture", tiny_models.ALL)
@pytest.mark.parametrize("rank", [1, 3])
def test_nothing_is_written_along_the_direction(architecture: str, rank: int) -> None:
    model = edit_models.model(architecture)
    edit = direction_ablation(model, data(), site="resid_post.0", rank=rank,
                              directions="mean" if rank == 1 else "principal", max_facts=24)  # fmt: skip
    basis = next(op for op in edit.operations if isinstance(op, LowRankDelta)).v.double()
    sequences = tiny_models.sample_ids(4, 9, seed=5)
    before = leftover(model, stream_sites(model), basis, sequences)
    base = logits(model)
    assert before > 0.05, "the direction must carry something before"
    with edit.attach(model):
        attached = logits(model)
        assert leftover(model, stream_sites(model), basis, sequences) < 1e-6
    assert torch.equal(logits(model), base)
    undo = edit.fold(model)
    assert edit.artifact == "weights" and undo.hooked == ()
    assert float((logits(model) - attached).abs().max()) < 1e-5
    assert float((attached - base).abs().max()) > 1e-3
    undo()
    assert torch.equal(logits(model), base)
    assert "left after" in edit.manifest.notes[0]


@pytest.mark.parametrize("architecture", [a for a in tiny_models.ALL if a not in SANDWICH])
def test_weights_equal_hooks_at_every_write(architecture: str) -> None:
    """The oracle: project what is written (embedding, attention, MLP) by hooks; without norms behind the writers."""
    model = edit_models.model(architecture)
    edit = direction_ablation(model, data(), site="resid_post.1", max_facts=24)
    direction = next(op for op in edit.operations if isinstance(op, LowRankDelta)).v[0]

    def project(x: Tensor) -> Tensor:
        return x - (x @ direction)[..., None] * direction

    places = site_map(model.module)
    writes = [Site("resid_pre", 0), *places.expand("attn_out"), *places.expand("mlp_out")]
    with hooks(model, dict.fromkeys(writes, project)):
        expected = logits(model)
    edit.fold(model)
    assert float((logits(model) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("architecture", SANDWICH)
def test_plain_projection_would_leave_the_direction_behind_a_norm(architecture: str) -> None:
    """Why G is gain ⊙ r behind a norm: with plain r the gain brings the direction back."""
    model = edit_models.model(architecture)
    basis = orthonormal(torch.randn(1, model.width, generator=torch.Generator().manual_seed(0)))
    plain = []
    for op in ablate_writers(model, basis):
        if isinstance(op, LowRankDelta) and op.u.shape[-2] == model.width:
            weight = model.module.get_parameter(op.weight).detach().double()
            op = LowRankDelta(op.weight, -basis.T, basis @ weight)
        plain.append(op)
    from repforget.artifact import Edit

    edit = Edit.build("plain", {}, model, "", plain)
    with edit.attach(model):
        assert leftover(model, stream_sites(model), basis, tiny_models.sample_ids()) > 1e-3


def test_operations_are_untying_tables_weights_and_biases() -> None:
    model = edit_models.model("gpt2")
    operations = ablate_writers(model, torch.eye(model.width)[:2])
    kinds = [type(op) for op in operations]
    assert kinds[0] is Untie and kinds.count(LowRankDelta) == 2 + 2 * model.n_layers
    assert kinds.count(BiasDelta) == 2 * model.n_layers
    untied = [type(op) for op in ablate_writers(edit_models.model("llama"), torch.eye(model.width)[:1])]
    assert Untie not in untied and BiasDelta not in untied


def test_tied_unembedding_keeps_reading_the_direction() -> None:
    model = edit_models.model("llama_tied")
    head = model.module.get_output_embeddings().weight.detach().clone()
    direction_ablation(model, data(), site="resid_post.0", max_facts=24).fold(model)
    assert torch.equal(model.module.get_output_embeddings().weight, head)
    assert not torch.equal(model.module.get_input_embeddings().weight, head)


def test_ablating_twice_changes_nothing_more_and_strength_zero_nothing_at_all() -> None:
    model = edit_models.model()
    edit = direction_ablation(model, data(), site="resid_post.0", max_facts=24)
    base = logits(model)
    with edit.scaled(0.0).attach(model):
        assert torch.equal(logits(model), base)
    edited = edit.applied_to(model)
    basis = next(op for op in edit.operations if isinstance(op, LowRankDelta)).v
    assert max(float((op.u.double() @ op.v.double()).norm()) for op in ablate_writers(edited, basis)
               if isinstance(op, LowRankDelta)) < 1e-5  # fmt: skip


def test_site_choices() -> None:
    model = edit_models.model()
    band = RandomBand(1, 10, 1.0, 0.0, 0.5, "test")
    where = Localization("probe", (Component(Site("mlp_out", 1)),), (1.0,), band)
    assert direction_ablation(model, data(), where=where, max_facts=24).manifest.settings["site"] == "resid_post.1"
    assert direction_ablation(model, data(), max_facts=24).manifest.settings["site"] == "resid_post.0"
    everywhere = direction_ablation(model, data(), site="resid_post", max_facts=24).manifest.settings["site"]
    assert everywhere in ("resid_post.0", "resid_post.1")
    with pytest.raises(UsageError, match="not as wide"):
        direction_ablation(model, data(), site="mlp_post.0")
    with pytest.raises(UsageError, match="one direction and rank=2"):
        direction_ablation(model, data(), rank=2)


# ------------------------------------------------------------------ steering


def test_the_added_vector_is_exact_and_only_from_its_layer_on() -> None:
    model = edit_models.model()
    edit = steering(model, data(), sites=["resid_post.0"], gate="none", strength=2.0, max_facts=24)
    (op,) = edit.site_operations
    assert isinstance(op, AddVector) and edit.artifact == "weights"
    sites = [Site("mlp_out", 0), Site("resid_post", 0), Site("resid_post", 1)]
    before = capture(model, sites, BATCH, gather="all")
    with edit.attach(model):
        after = capture(model, sites, BATCH, gather="all")
    real = BATCH.mask.bool()
    torch.testing.assert_close(after[sites[0]], before[sites[0]], rtol=0, atol=0)
    torch.testing.assert_close(after[sites[1]][real], (before[sites[1]] + 2.0 * op.vector)[real])
    assert not torch.allclose(after[sites[2]][real], before[sites[2]][real])


def test_the_vector_moves_the_forget_mean_onto_the_retain_mean() -> None:
    model, facts = edit_models.model(), data()
    site = Site("resid_post", 0)
    (op,) = steering(model, facts, sites=[str(site)], gate="none").site_operations
    found = contrasts(model, [site], facts.forget, facts.retain)[site]
    torch.testing.assert_close(op.vector.double(), -found.difference, rtol=1e-6, atol=1e-7)  # type: ignore[union-attr]
    torch.testing.assert_close(found.directions[0], found.difference / found.difference.norm())


@pytest.mark.parametrize("scope", ["token", "prefix"])
def test_a_closed_gate_changes_no_bit_and_an_open_one_does(scope: Any) -> None:
    model, facts = edit_models.model(), data()
    edit = steering(model, facts, sites=["resid_post.1"], gate=scope, false_open=0.05)
    assert edit.artifact == "weights+hook"
    (op,) = edit.site_operations
    gate = op.gate  # type: ignore[union-attr]
    assert gate is not None

    def opens(ids: tuple[int, ...]) -> bool:
        batch = Batch.pad([ids])
        x = capture(model, [op.site], batch, gather="tokens")[op.site]
        return bool((x @ gate.direction > gate.threshold).any())

    retained, forget = text_sequences(model, facts, facts.retain), read_points(model, facts.forget).ids
    changed = {True: 0, False: 0}
    for ids in (*retained, *forget):
        batch = Batch.pad([ids])
        base = forward(model, batch)
        with edit.attach(model):
            same = torch.equal(forward(model, batch), base)
        assert same != opens(ids)
        changed[not same] += 1
    assert changed[True] > 0 and changed[False] > 0
    assert sum(opens(ids) for ids in retained) <= 0.05 * len(retained)


def test_the_stated_share_of_forget_facts_opens_the_gate() -> None:
    model, facts = edit_models.model(), data()
    edit = steering(model, facts, sites=["resid_post.1"], gate_positions="subject", false_open=0.1)
    (op,) = edit.site_operations
    gate, inside = op.gate, []  # type: ignore[union-attr]
    assert gate is not None
    points = read_points(model, facts.forget, "subject")
    collect(model, points, [op.site], lambda values, _: inside.append(values[op.site] @ gate.direction))
    share = float((torch.cat(inside) > gate.threshold).float().mean())
    assert 0 < share <= 1 and f"opens on {share:.1%}" in edit.manifest.notes[0]


def test_steering_is_the_same_with_and_without_a_cache() -> None:
    model, facts = edit_models.model(), data()
    edit = steering(model, facts, sites=["resid_post.0"], gate="prefix", strength=4.0, false_open=0.5)
    ids = torch.tensor([read_points(model, facts.forget).ids[0]])
    with edit.attach(model):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = model.module.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
        plain = model.module.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_zero_strength_is_no_edit_and_bad_shares_are_refused() -> None:
    model, facts = edit_models.model(), data()
    with pytest.raises(NoEffectError):
        steering(model, facts, gate="none", strength=0.0)
    with pytest.raises(UsageError, match="share of retained texts"):
        steering(model, facts, false_open=1.0)
