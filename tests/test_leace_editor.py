"""The editors of directions: edited sites are blind within relations, folded weights are the hooks, refusals."""

from __future__ import annotations

from typing import Any

import edit_models
import pytest
import tiny_models
import torch
from test_leace import F64, class_gap, moments
from torch import Tensor

from repforget.edit._collect import choose_sites, read_points, text_sequences
from repforget.edit._concept import answer_concept, contrast, membership_concept
from repforget.edit._contrast import contrasts
from repforget.edit.erase._leace_math import Eraser
from repforget.edit.erase.leace import leace
from repforget.edit.erase.mean_direction import mean_direction
from repforget.errors import KnowledgeError, NoEffectError, UsageError
from repforget.knowledge import Fact
from repforget.models.capture import Batch, capture, forward
from repforget.records import Component, Localization, RandomBand, Site


def eraser_of(op: Any) -> Eraser:
    """An Affine operation as a function, in float64."""
    center = None if op.center is None else op.center.double()
    return Eraser(op.left.double(), op.right.double(), center, op.left[0], op.left.shape[1], False)


def facts_at(model: Any, site: Site, facts: tuple[Fact, ...]) -> Tensor:
    points = read_points(model, facts)
    return torch.cat([
        capture(model, [site], Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)))[site]
        for ids in points.ids
    ]).double()  # fmt: skip


def within_relation_gap(x: Tensor, facts: tuple[Fact, ...]) -> float:
    worst = 0.0
    for relation in {f.relation for f in facts}:
        rows = [i for i, f in enumerate(facts) if f.relation == relation]
        answers = sorted({facts[i].answer for i in rows})
        worst = max(worst, class_gap(x[rows], torch.tensor([answers.index(facts[i].answer) for i in rows])))
    return worst


SITES = ["mlp_in.0", "attn_in.1", "mlp_in.1"]


@pytest.mark.parametrize("metric", ["text", "retain", "concept"])
@pytest.mark.parametrize("sequential", [True, False])
def test_every_edited_site_is_blind_within_relations(metric: Any, sequential: bool) -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = leace(model, data, sites=SITES, rank="full", metric=metric, sequential=sequential)
    assert edit.touched == tuple(SITES) and edit.artifact == "weights"
    before = {site: facts_at(model, Site.parse(site), data.forget) for site in SITES}
    relation = torch.tensor([f.relation == "city" for f in data.forget]).long()
    folded = edit.applied_to(model)
    for number, text in enumerate(SITES):
        site, op = Site.parse(text), edit.site_operations[number]
        x = facts_at(folded, site, data.forget)  # what the site receives, with all upstream erasers at work
        eraser = eraser_of(op)
        gap = within_relation_gap(eraser(x), data.forget)
        assert within_relation_gap(before[text], data.forget) > 0.2
        if sequential or number == 0:
            assert gap < 1e-4
        else:
            assert gap > 1e-3  # fitted on what is no longer there
        assert class_gap(eraser(x), relation) > 0.2  # which relation is asked is no knowledge, and stays


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_folded_weights_compute_what_the_hooks_do(architecture: str) -> None:
    model, data = edit_models.model(architecture), edit_models.people().for_editor()
    edit = leace(model, data, max_facts=24)
    batch = Batch.pad(tiny_models.sample_ids())
    base = forward(model, batch)
    with edit.attach(model):
        hooked = forward(model, batch)
    assert torch.equal(forward(model, batch), base)
    undo = edit.fold(model)
    folded = forward(model, batch)
    real = batch.mask.bool()
    assert float((hooked - base)[real].abs().max()) > 1e-3
    assert float((folded - hooked)[real].abs().max()) < 1e-5
    assert undo.hooked == (("mlp_in.0", "mlp_in.1") if architecture == "mixtral" else ())
    undo()
    assert torch.equal(forward(model, batch), base)


def test_membership_equals_the_two_groups_within_relations() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = leace(model, data, target="membership", sites=["mlp_in.1"], metric="concept")
    x = facts_at(model, Site("mlp_in", 1), (*data.forget, *data.retain))
    (op,) = edit.site_operations
    eraser = eraser_of(op)
    member = torch.arange(len(x)) < len(data.forget)
    for relation in ("city", "job"):
        rows = torch.tensor([f.relation == relation for f in (*data.forget, *data.retain)])
        assert class_gap(x[rows], member[rows].long()) > 0.1
        assert class_gap(eraser(x)[rows], member[rows].long()) < 1e-5


def test_subject_tokens_are_where_the_subject_ends() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    points = read_points(model, data.forget, "both")
    rows = zip(data.forget, points.ids, points.positions, points.groups, strict=True)
    for fact, ids, (last, subject), frames in rows:
        words = model.tokenizer.convert_ids_to_tokens(list(ids))
        assert last == len(ids) - 1 and words[subject] == fact.subject.split()[-1]
        assert frames == (f"{fact.relation}/last", f"{fact.relation}/subject")
    lost = Fact("x", "c", "Zoe", "city", "Ada red was born in", " Rome")
    with pytest.raises(KnowledgeError, match="does not mention its subject"):
        read_points(model, [lost], "subject")


def test_the_editor_is_deterministic_and_reads_its_sites_from_the_localization() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    band = RandomBand(1, 10, 1.0, 0.0, 0.5, "test")
    where = Localization("probe", (Component(Site("resid_post", 1)),), (1.0,), band)
    edits = [leace(model, data, where=where, top_layers=1, seed=3) for _ in range(2)]
    assert edits[0].digest == edits[1].digest and edits[0].touched == ("attn_in.1", "mlp_in.1")
    everywhere = choose_sites(model, "auto", None, kinds=("attn_in",), top_layers=1)
    assert everywhere == (Site("attn_in", 0), Site("attn_in", 1))
    notes = " ".join(edits[0].manifest.notes)
    assert "fewer than 100 per feature" in notes and "only the strongest directions" in notes


def test_requests_without_effect_are_refused() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    with pytest.raises(NoEffectError, match="attn_in.0"):  # the last token alone says nothing yet
        leace(model, data, sites=["attn_in.0"])
    with pytest.raises(UsageError, match="rank 0"):
        leace(model, data, rank=0)
    with pytest.raises(UsageError, match="No site was given"):
        leace(model, data, sites=[])
    same = tuple(Fact(f.id, f.cluster, f.subject, f.relation, f.prompt, " Rome") for f in data.forget)
    with pytest.raises(KnowledgeError, match="single answer"):
        answer_concept(read_points(model, same))


def test_conditional_cross_covariance_is_the_definition() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    points = read_points(model, data.forget)
    concept = answer_concept(points)
    x = torch.randn(len(points.ids), 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    stats = moments(x, concept.labels, concept.k)
    found, means = concept.cross(stats), concept.means(stats)
    frames = concept.frames[concept.labels]
    for c in range(concept.k):
        rows, frame = concept.labels == c, frames == concept.frames[c]
        expected = rows.sum() / (len(x) - 1) * (x[rows].mean(0) - x[frame].mean(0))
        torch.testing.assert_close(found[:, c], expected)
        torch.testing.assert_close(means[c], x[rows].mean(0))


def test_sets_without_a_common_relation_are_compared_across_relations() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    cities = tuple(f for f in data.forget if f.relation == "city")
    jobs = tuple(f for f in data.retain if f.relation == "job")
    points = read_points(model, (*cities, *jobs))
    concept = membership_concept(points, frozenset(f.id for f in cities))
    assert set(concept.names) == {"last=forget", "last=retain"}
    x = torch.randn(len(points.ids), 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    difference = x[: len(cities)].mean(0) - x[len(cities) :].mean(0)
    torch.testing.assert_close(contrast(concept, moments(x, concept.labels, 2)), difference)


# ------------------------------------------------------------------ mean directions


@pytest.mark.parametrize("center", ["retain", "none"])
def test_mean_direction_leaves_no_difference_along_itself(center: Any) -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = mean_direction(model, data, sites=["mlp_in.1"], center=center)
    (op,) = edit.site_operations
    direction = op.right[0].double()  # type: ignore[union-attr]
    site = Site("mlp_in", 1)
    forget, retain = facts_at(model, site, data.forget), facts_at(model, site, data.retain)
    gaps = []
    for relation in ("city", "job"):
        a = torch.tensor([f.relation == relation for f in data.forget])
        b = torch.tensor([f.relation == relation for f in data.retain])
        gaps.append(forget[a].mean(0) - retain[b].mean(0))
    expected = (gaps[0] + gaps[1]) / 2
    torch.testing.assert_close(direction, expected / expected.norm(), rtol=1e-5, atol=1e-6)
    moved = eraser_of(op)(forget)
    level = float(retain.mean(0) @ direction) if center == "retain" else 0.0
    torch.testing.assert_close(moved @ direction, torch.full((len(moved),), level, dtype=F64), rtol=1e-5, atol=1e-5)


def test_sites_without_a_difference_are_left_alone_or_refused() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = mean_direction(model, data)  # at attn_in.0 the last token is the same for everyone
    assert edit.touched == ("mlp_in.0", "attn_in.1", "mlp_in.1")
    assert edit.manifest.notes == ("no difference of means at attn_in.0: left alone",)
    with pytest.raises(NoEffectError, match="same mean at attn_in.0"):
        mean_direction(model, data, sites=["attn_in.0", "mlp_in.1"])


def test_principal_directions_keep_the_mean_that_centring_would_remove() -> None:
    """A constant shift of the forget points is the leading uncentred direction; centred PCA cannot see it."""
    model, data = edit_models.model(), edit_models.people().for_editor()
    sites = [Site("resid_post", 1)]
    one = contrasts(model, sites, data.forget, data.retain)[sites[0]]
    many = contrasts(model, sites, data.forget, data.retain, rank=4, principal=True)[sites[0]]
    torch.testing.assert_close(many.directions @ many.directions.T, torch.eye(4, dtype=F64), rtol=1e-9, atol=1e-9)
    x = facts_at(model, sites[0], data.forget)
    frames = torch.tensor([f.relation == "city" for f in data.forget])
    retain = facts_at(model, sites[0], data.retain)
    kept = torch.tensor([f.relation == "city" for f in data.retain])
    x = x - torch.where(frames[:, None], retain[kept].mean(0), retain[~kept].mean(0))
    _, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close((many.directions * vh[:4]).sum(1).abs(), torch.ones(4, dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(one.difference, x.mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="one direction and rank=2"):
        mean_direction(model, data, rank=2)


def test_retained_text_is_whole_statements_and_general_texts() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    texts = text_sequences(model, data, data.retain)
    assert len(texts) == len(data.retain) + len(data.general)
    first = data.retain[0]
    assert model.tokenizer.decode(list(texts[0]), skip_special_tokens=True) == first.prompt + first.answer
