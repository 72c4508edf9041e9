"""The Edit: what it changes, what it leaves alone, and that every way back is exact."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import tiny_models
import torch
from artifact_tools import build, draw, hook_count, logits, projection, site_operation, tiny, weight_operation

from repforget.artifact import (
    AddVector,
    Affine,
    BiasDelta,
    DenseDelta,
    LowRankDelta,
    Operation,
    ScaleUnits,
    SparseDelta,
    Untie,
    placebo_of,
    size,
)
from repforget.errors import ArtifactError, NoEffectError, NumericalError, SiteError
from repforget.models.capture import hooks
from repforget.models.load import fingerprint
from repforget.models.sites import site_map
from repforget.records import Site

WEIGHT_KINDS = ("low_rank", "dense", "sparse", "bias")
SITE_KINDS = ("affine", "add_vector", "scale_units")
DOWN = "model.layers.1.mlp.down_proj.weight"


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def middle(kind: str) -> Operation:
    return site_operation(kind, Site("resid_post", 0), tiny_models.WIDTH)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_weight_operation_attached_equals_folded_and_leaves_nothing(architecture: str, kind: str) -> None:
    model = tiny(architecture)
    before, base = parameters(model.module), logits(model)
    edit = build(model, weight_operation(kind, model))
    assert edit.artifact == "weights"
    with edit.attach(model):
        attached = logits(model)
    assert not torch.allclose(attached, base, atol=1e-3)
    assert torch.equal(logits(model), base)
    undo = edit.fold(model)
    assert torch.equal(logits(model), attached)
    assert undo.parity.max_logit_difference == 0.0
    after = parameters(model.module)
    assert [n for n in after if n not in before or not torch.equal(after[n], before[n])] == list(undo.touched)
    assert undo.touched == edit.manifest.weights
    undo()
    undo()
    assert torch.equal(logits(model), base)
    assert fingerprint(model.module) == model.fingerprint


def test_low_rank_delta_is_in_linear_orientation_for_conv1d(tiny_gpt2: Any) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"  # stored [in, out]
    weight = tiny_gpt2.module.get_parameter(name).clone()
    u, v = draw(weight.shape[1], 3), draw(3, weight.shape[0], seed=1)
    build(tiny_gpt2, LowRankDelta(name, u, v)).fold(tiny_gpt2)
    torch.testing.assert_close(tiny_gpt2.module.get_parameter(name), weight + (u @ v).T)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_every_site_folds_exactly_or_says_that_it_does_not(architecture: str, kind: str) -> None:
    """The oracle is a plain hook that computes the operation by itself."""
    model = tiny(architecture)
    base = logits(model)
    folded = 0
    for site, d in [(s, site_map(model.module).size(s)) for s in site_map(model.module).sites]:
        operation = site_operation(kind, site, d)
        edit = build(model, operation)
        with hooks(model, {site: lambda x, op=operation: by_hand(op, x)}):
            expected = logits(model)
        constant_key = kind == "add_vector" and site.kind == "k"  # cancels in the softmax without rotation
        assert constant_key or not torch.allclose(expected, base, atol=1e-6), site
        with edit.attach(model):
            torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
        undo = edit.fold(model)
        torch.testing.assert_close(logits(model), expected, atol=5e-5, rtol=1e-4)
        assert (edit.artifact == "weights") == (not undo.hooked) == (hook_count(model.module) == 0), site
        folded += not undo.hooked
        undo()
    assert torch.equal(logits(model), base)  # which what one undo leaves behind, no other takes away
    assert folded >= 12
    assert fingerprint(model.module) == model.fingerprint
    assert hook_count(model.module) == 0


def by_hand(operation: Operation, x: torch.Tensor) -> torch.Tensor:
    if isinstance(operation, Affine):
        assert operation.center is not None
        out = x.clone()
        for left, right in zip(operation.left.T, operation.right, strict=True):
            out -= ((x - operation.center) @ right).unsqueeze(-1) * left
        return out
    if isinstance(operation, AddVector):
        return x + operation.vector
    assert isinstance(operation, ScaleUnits)
    factors = torch.ones(x.shape[-1]).index_copy(0, operation.index, operation.factor)
    return x * factors


def test_head_sites_fold_into_their_slice_only(tiny_llama: Any) -> None:
    before = parameters(tiny_llama.module)
    edit = build(tiny_llama, site_operation("affine", Site("attn_z", 1, 2), 8))
    with edit.attach(tiny_llama):
        expected = logits(tiny_llama)
    edit.fold(tiny_llama)
    torch.testing.assert_close(logits(tiny_llama), expected, atol=2e-5, rtol=1e-4)
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = (tiny_llama.module.get_parameter(name) != before[name]).any(0)
    assert changed.nonzero().flatten().tolist() == list(range(16, 24))


@pytest.mark.parametrize(("architecture", "site", "kind"), [
    ("gemma2", "mlp_out.0", "affine"),  # a norm lies between the projection and the stream
    ("olmo2", "attn_out.1", "add_vector"), ("llama", "resid_post.0", "affine"),  # the skip path passes by
    ("mixtral", "mlp_in.0", "affine"), ("gpt2", "final_norm", "affine"),  # batched experts; tied unembedding
])  # fmt: skip
def test_what_cannot_fold_stays_a_hook_and_says_so(architecture: str, site: str, kind: str) -> None:
    model = tiny(architecture)
    place = Site.parse(site)
    edit = build(model, site_operation(kind, place, site_map(model.module).size(place)))
    assert edit.artifact == "weights+hook"
    undo = edit.fold(model)
    assert undo.hooked == (site,)
    undo()
    assert hook_count(model.module) == 0


def test_operations_at_one_place_fold_together_or_not_at_all(tiny_llama: Any) -> None:
    """A vector on resid_post would fold, but not past a map at the same place that cannot."""
    vector, affine = middle("add_vector"), middle("affine")
    assert build(tiny_llama, vector).artifact == "weights"
    edit = build(tiny_llama, vector, affine)
    with edit.attach(tiny_llama):
        expected = logits(tiny_llama)
    undo = edit.fold(tiny_llama)
    assert undo.touched == ()
    torch.testing.assert_close(logits(tiny_llama), expected)


@pytest.mark.parametrize("site", ["mlp_in.1", "mlp_post.0", "attn_out.0", "mlp_gate.1"])
def test_order_of_operations_survives_folding(tiny_llama: Any, site: str) -> None:
    place = Site.parse(site)
    d = site_map(tiny_llama.module).size(place)
    first, second = site_operation("affine", place, d), site_operation("scale_units", place, d)
    results = []
    for pair in ((first, second), (second, first)):
        edit = build(tiny_llama, pair[0]).then(build(tiny_llama, pair[1]))
        with edit.attach(tiny_llama):
            results.append(logits(tiny_llama))
        undo = edit.fold(tiny_llama)
        torch.testing.assert_close(logits(tiny_llama), results[-1], atol=2e-5, rtol=1e-4)
        undo()
    assert not torch.allclose(*results, atol=1e-4)


def test_weights_and_sites_together(tiny_llama: Any) -> None:
    low_rank = LowRankDelta(DOWN, draw(32, 2), draw(2, 48, seed=1))
    edit = build(tiny_llama, site_operation("affine", Site("mlp_out", 1), 32), low_rank, middle("affine"))
    assert edit.artifact == "weights+hook"
    with edit.attach(tiny_llama):
        expected = logits(tiny_llama)
    undo = edit.fold(tiny_llama)
    assert undo.hooked == ("resid_post.0",)
    assert set(undo.touched) == {DOWN, DOWN.replace("weight", "bias")}
    torch.testing.assert_close(logits(tiny_llama), expected, atol=2e-5, rtol=1e-4)


def test_nothing_stays_behind_after_an_exception(tiny_llama: Any) -> None:
    base = logits(tiny_llama)
    edit = build(tiny_llama, middle("affine"), weight_operation("bias", tiny_llama))
    with pytest.raises(KeyError), edit.attach(tiny_llama):
        logits(tiny_llama)
        raise KeyError("from inside")
    assert torch.equal(logits(tiny_llama), base)
    assert hook_count(tiny_llama.module) == 0
    assert fingerprint(tiny_llama.module) == tiny_llama.fingerprint


def test_attached_edits_nest(tiny_llama: Any) -> None:
    outer, inner = build(tiny_llama, weight_operation("dense", tiny_llama)), build(tiny_llama, middle("affine"))
    with outer.attach(tiny_llama):
        once = logits(tiny_llama)
        with inner.attach(tiny_llama):
            both = logits(tiny_llama)
        assert torch.equal(logits(tiny_llama), once)
    with outer.then(inner).attach(tiny_llama):
        assert torch.equal(logits(tiny_llama), both)


@pytest.mark.parametrize("kind", SITE_KINDS + WEIGHT_KINDS)
def test_strength(tiny_llama: Any, kind: str) -> None:
    base = logits(tiny_llama)
    operation = middle(kind) if kind in SITE_KINDS else weight_operation(kind, tiny_llama)
    edit = build(tiny_llama, operation)
    with edit.scaled(0.0).attach(tiny_llama):
        assert torch.equal(logits(tiny_llama), base)
    edit.scaled(0.0).fold(tiny_llama)
    assert torch.equal(logits(tiny_llama), base)
    with edit.scaled(0.5).scaled(2.0).attach(tiny_llama):
        twice = logits(tiny_llama)
    with edit.attach(tiny_llama):
        torch.testing.assert_close(logits(tiny_llama), twice)
    assert edit.scaled(0.5).manifest.strength == 0.5


@pytest.mark.parametrize("kind", ("shear", "add_vector", *WEIGHT_KINDS))
def test_inverse_takes_the_edit_back(tiny_llama: Any, kind: str) -> None:
    base = logits(tiny_llama)
    if kind == "shear":
        basis = projection(32)
        operation: Operation = Affine(Site("resid_post", 0), 0.4 * basis, basis.T, draw(32))
    else:
        operation = middle(kind) if kind in SITE_KINDS else weight_operation(kind, tiny_llama)
    edit = build(tiny_llama, operation)
    with edit.then(edit.inverse()).attach(tiny_llama):
        torch.testing.assert_close(logits(tiny_llama), base, atol=1e-5, rtol=1e-5)


def test_a_projection_has_no_inverse(tiny_llama: Any) -> None:
    with pytest.raises(ArtifactError, match="projects directions away"):
        build(tiny_llama, middle("affine")).inverse()
    with pytest.raises(ArtifactError, match="multiplied by zero"):
        build(tiny_llama, middle("scale_units")).inverse()


def test_untie_lets_the_embedding_be_edited_alone(tiny_gpt2: Any) -> None:
    module = tiny_gpt2.module
    table = module.get_input_embeddings().weight.clone()
    delta = DenseDelta("transformer.wte.weight", draw(*table.shape))
    build(tiny_gpt2, delta).fold(tiny_gpt2)()
    edit = build(tiny_gpt2, Untie(), delta)
    undo = edit.fold(tiny_gpt2)
    assert torch.equal(module.get_output_embeddings().weight, table)
    assert not torch.equal(module.get_input_embeddings().weight, table)
    assert module.config.tie_word_embeddings is False
    undo()
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert module.config.tie_word_embeddings is True
    assert fingerprint(module) == tiny_gpt2.fingerprint


def test_tied_names_are_one_parameter(tiny_gpt2: Any) -> None:
    shape = tiny_gpt2.module.get_input_embeddings().weight.shape
    both = [DenseDelta(name, draw(*shape)) for name in ("transformer.wte.weight", "lm_head.weight")]
    table = tiny_gpt2.module.get_input_embeddings().weight.clone()
    build(tiny_gpt2, *both).fold(tiny_gpt2)
    torch.testing.assert_close(tiny_gpt2.module.get_input_embeddings().weight, table + 2 * draw(*shape))


def test_applied_copy_is_independent_and_keeps_its_hooks(tiny_llama: Any) -> None:
    base = logits(tiny_llama)
    edit = build(tiny_llama, middle("affine"), weight_operation("low_rank", tiny_llama))
    with edit.attach(tiny_llama):
        expected = logits(tiny_llama)
    edited = edit.applied_to(tiny_llama)
    gc.collect()
    torch.testing.assert_close(logits(edited), expected)
    torch.testing.assert_close(logits(copy.deepcopy(edited.module)), expected)
    assert torch.equal(logits(tiny_llama), base)
    assert hook_count(tiny_llama.module) == 0
    assert edited.fingerprint != tiny_llama.fingerprint
    with pytest.raises(ArtifactError, match="was made for"):
        edit.attach(edited).__enter__()


def test_half_precision_reports_what_survives_and_refuses_what_does_not() -> None:
    model = tiny("llama")
    model.module.bfloat16()
    model = type(model)(model.name, model.module, model.tokenizer, fingerprint(model.module))
    weight = model.module.get_parameter(DOWN)
    cosines = []
    for scale in (1.0, 1e-3):
        edit = build(model, LowRankDelta(DOWN, scale * draw(32, 4), draw(4, 48, seed=1)))
        undo = edit.fold(model)
        cosines.append(undo.parity.cosines[DOWN]["own"])
        undo()
        assert fingerprint(model.module) == model.fingerprint
    assert cosines[0] > 0.999 > cosines[1] > 0.3
    vanishing = build(model, DenseDelta(DOWN, weight.float() * 1e-4))
    with pytest.raises(NoEffectError, match="at the precision"):
        vanishing.fold(model)
    with build(model, middle("affine")).attach(model):
        assert logits(model).dtype == torch.bfloat16


def test_refusals(tiny_llama: Any) -> None:
    with pytest.raises(NoEffectError):
        build(tiny_llama)
    with pytest.raises(NoEffectError):
        build(tiny_llama, LowRankDelta(DOWN, torch.zeros(32, 1), draw(1, 48)))
    with pytest.raises(NoEffectError):
        build(tiny_llama, Untie())
    with pytest.raises(SiteError, match="layers"):
        build(tiny_llama, site_operation("affine", Site("resid_post", 9), 32))
    with pytest.raises(SiteError, match="down_proj"):
        build(tiny_llama, DenseDelta("model.layers.0.mlp.down.weight", draw(32, 48)))
    with pytest.raises(SiteError, match="no operation touches"):
        build(tiny_llama, middle("affine"), sites=["resid_post.0", "resid_post.1"])
    with pytest.raises(ArtifactError, match="another model"):
        build(tiny_llama, DenseDelta(DOWN, draw(48, 32)))
    with pytest.raises(ArtifactError, match="32 wide"):
        build(tiny_llama, AddVector(Site("resid_post", 0), draw(31)))
    with pytest.raises(ArtifactError, match="has 48 units"):
        build(tiny_llama, ScaleUnits(Site("mlp_post", 0), torch.tensor([48]), torch.tensor([0.0])))
    with pytest.raises(NumericalError, match="vector"):
        build(tiny_llama, AddVector(Site("resid_post", 0), draw(32) / 0))
    huge = build(tiny_llama, DenseDelta(DOWN, torch.full((32, 48), 3e38))).then(
        build(tiny_llama, DenseDelta(DOWN, torch.full((32, 48), 3e38)))
    )
    with pytest.raises(NumericalError, match=DOWN):
        huge.fold(tiny_llama)
    assert fingerprint(tiny_llama.module) == tiny_llama.fingerprint
    other = tiny("llama", seed=5)
    with pytest.raises(ArtifactError, match="was made for"):
        build(tiny_llama, middle("affine")).fold(other)
    with pytest.raises(ArtifactError, match="different weights"):
        build(tiny_llama, middle("affine")).then(build(other, middle("affine")))


def test_placebo_has_the_size_of_the_edit_and_none_of_its_directions(tiny_llama: Any) -> None:
    basis, oblique = projection(32), projection(32, seed=4)
    operations = [
        Affine(Site("resid_post", 0), basis, basis.T, draw(32)), Affine(Site("resid_post", 1), basis, oblique.T),
        AddVector(Site("mlp_out", 0), draw(32), scale=3.0), LowRankDelta(DOWN, draw(32, 3), draw(3, 48, seed=1)),
        DenseDelta(DOWN, draw(32, 48)), SparseDelta(DOWN, torch.tensor([3, 9]), draw(2)),
        BiasDelta(DOWN.replace("weight", "bias"), draw(32)),
        ScaleUnits(Site("mlp_post", 0), torch.arange(5), 2 * draw(5)),
    ]  # fmt: skip
    edit = build(tiny_llama, *operations)
    placebo = placebo_of(edit, tiny_llama, seed=3)
    assert placebo.touched == edit.touched
    assert placebo.artifact == edit.artifact
    assert placebo.manifest.method == "placebo(hand_made)"
    for real, random in zip(edit.operations, placebo.operations, strict=True):
        assert type(real) is type(random)
        assert size(random) == pytest.approx(size(real), rel=1e-5)
    maps = [op for op in placebo.operations if isinstance(op, Affine)]
    eraser = maps[0].left @ maps[0].right
    torch.testing.assert_close(eraser @ eraser, eraser, atol=1e-5, rtol=1e-4)  # an ablation stays one
    torch.testing.assert_close(maps[1].right @ maps[1].left, oblique.T @ basis, atol=1e-5, rtol=1e-4)
    assert float((maps[0].left.T @ basis).norm()) < 1.0
    assert placebo_of(edit, tiny_llama, seed=3).digest == placebo.digest
    assert placebo_of(edit, tiny_llama, seed=4).digest != placebo.digest
