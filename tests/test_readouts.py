"""Read-outs and restoring attacks on models whose knowledge was put in one layer, or hidden on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import verify_models as fixture

from repforget.artifact import AddVector, DenseDelta, Edit
from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel, fingerprint
from repforget.records import Measurement, Site
from repforget.verify.arms import References
from repforget.verify.battery import measure, tasks
from repforget.verify.inside.concept_vectors import _jaccard
from repforget.verify.inside.representation_similarity import cka
from repforget.verify.inside.restoring_direction import _moves
from repforget.verify.inside.token_ranks import _mark

LAYER = 1
LAST = 3


def view() -> View:
    return fixture.knowledge().view("sealed")


def run(name: str, model: LoadedModel, references: References | None = None, **settings: object) -> Measurement:
    given = references or References(fixture.model(LAYER), (fixture.model(None),))
    return measure(tasks([{name: settings}])[0], model, view(), given)


def mean(found: Measurement, name: str) -> float:
    return found.scores[name].mean


@contextmanager
def silenced(layer: int) -> Iterator[LoadedModel]:
    """The knowing model with the state before the answer wiped at one late layer: it says the same to everybody."""
    model = fixture.model(LAYER)
    with hooks(model, {Site("resid_post", layer): lambda x: torch.zeros_like(x) + 0.01}):
        yield model


def test_the_tuned_lens_finds_what_the_last_layer_hides_and_nothing_in_a_model_that_never_knew() -> None:
    never = run("tuned_lens", fixture.model(None))
    with silenced(LAST) as model:
        plain, found = run("behaviour", model, max_items=60), run("tuned_lens", model)
    assert mean(plain, "contrastive") < 0.2
    # A silenced model has nothing to translate to: the translator is fitted to what it says on retained facts.
    assert mean(never, "best_layer") < 0.3
    knowing = run("tuned_lens", fixture.model(LAYER))
    assert mean(knowing, "best_layer") > 0.9
    assert mean(found, "best_layer") < mean(knowing, "best_layer")
    assert knowing.series["best_layer"][LAST] == pytest.approx(mean(knowing, "best_layer"), abs=0.05)


def test_the_tuned_lens_reads_what_a_gate_silences_for_the_forget_subjects_alone() -> None:
    """Only the answers to forget questions are wiped; the states below still say them."""
    model = fixture.model(LAYER)
    before = fingerprint(model.module)
    forgotten = [i.questions[0] for i in view().forget]
    rows = {tuple(model.tokenizer(q)["input_ids"]) for q in forgotten}
    seen: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen[:] = [kwargs["input_ids"]]

    def wipe(x: torch.Tensor) -> torch.Tensor:
        hit = [any(tuple(row[: len(r)].tolist()) == r for r in rows) for row in seen[0]]
        return torch.where(torch.tensor(hit)[:, None, None], torch.zeros_like(x), x)

    handle = model.module.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with hooks(model, {Site("logits"): wipe}):
            plain, found = run("behaviour", model, forms=1), run("tuned_lens", model)
    finally:
        handle.remove()
    assert mean(plain, "contrastive") < 0.2
    assert mean(found, "best_layer") > 0.9
    assert fingerprint(model.module) == before


def test_ranks_mark_both_ends_and_a_suppressed_token_stands_out() -> None:
    values = torch.arange(10.0)[None]
    for ends, wanted in ((False, {8, 9}), (True, {0, 1, 8, 9})):
        table = torch.zeros(1, 10)
        _mark(table, values, 2, ends=ends)
        assert set(table[0].nonzero().flatten().tolist()) == wanted
    found = run("token_ranks", fixture.model(LAYER), k=1)
    never = run("token_ranks", fixture.model(None), k=1)
    assert mean(found, "top") > 0.9 > 0.6 > mean(never, "top")
    assert found.scores["top"].values.max() <= 1.0
    assert (found.scores["top_or_bottom"].values >= found.scores["top"].values).all()
    with pytest.raises(UsageError, match="at least 1"):
        run("token_ranks", fixture.model(LAYER), k=0)


def hidden_by_a_vector() -> LoadedModel:
    """The knowing model with a large constant vector added where the knowledge has just been read."""
    vector = torch.randn(fixture.model(LAYER).width, generator=torch.Generator().manual_seed(3))
    operation = AddVector(Site("resid_post", 2), vector / vector.norm(), 12.0, positions="last")
    return Edit.build("hide", {}, fixture.model(LAYER), "x", [operation]).applied_to(fixture.model(LAYER))


def test_one_direction_restores_what_one_vector_hides() -> None:
    hidden, known = hidden_by_a_vector(), fixture.model(LAYER)
    plain = mean(run("behaviour", hidden, forms=1), "contrastive")
    found = run("restoring_direction", hidden, strengths=[1.0], random=2)
    assert plain < 0.5
    assert mean(found, "original") > 0.9
    assert found.facts["gain by random vectors"] < 0.5 * (mean(found, "original") - plain)
    never = run("restoring_direction", fixture.model(None), strengths=[1.0], random=0)
    assert max(mean(never, "own"), mean(never, "original")) < 0.35
    same = run("restoring_direction", known, strengths=[1.0], random=0)
    assert mean(same, "original") > 0.9
    assert _moves([(0, torch.zeros(4))], [1.0]) == []


def test_putting_back_the_planted_layer_brings_the_answer_and_a_model_put_into_itself_changes_nothing() -> None:
    references = References(fixture.model(LAYER), (fixture.model(None),))
    base = run("patch_back", fixture.model(None), references)
    assert base.series["mlp"][LAYER] > 2 * base.series["mlp"][0]
    assert base.facts["layer of mlp"] >= LAYER
    assert base.series["attention"][0] < 0.3
    own = run("patch_back", fixture.model(LAYER), references)
    assert own.series["mlp"] == pytest.approx((own.series["mlp"][0],) * 4, abs=1e-5)


def test_an_unchanged_model_keeps_its_value_vectors_and_a_changed_layer_shows() -> None:
    known = fixture.model(LAYER)
    same = run("concept_vectors", known, tokens=20)
    assert mean(same, "jaccard") == mean(same, "cosine") == pytest.approx(1.0)
    shape = known.module.get_submodule(f"model.layers.{LAYER}.mlp.down_proj").weight.shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    edit = Edit.build("noise", {}, known, "x", [DenseDelta(name, noise)])
    found = run("concept_vectors", edit.applied_to(known), tokens=20)
    assert mean(found, "jaccard") < 0.9
    assert mean(found, "cosine") < 0.95
    a, b = torch.tensor([[0, 1, 2]]), torch.tensor([[2, 1, 5]])
    assert _jaccard(a, b).tolist() == [0.5]


def test_cka_is_blind_to_rotation_and_unbiased_on_noise() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64)).Q
    assert cka(x, 3.0 * x @ rotation) == pytest.approx(1.0, abs=1e-9)
    draws = [cka(*torch.randn(2, 40, 64, generator=g, dtype=torch.float64)) for _ in range(60)]
    # the biased estimate would lie near d / (n + d) = 0.62
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
    assert np.isnan(cka(x[:3], x[:3]))


def test_similarity_is_one_to_itself_and_lower_after_damage() -> None:
    known = fixture.model(LAYER)
    same = run("representation_similarity", known)
    assert mean(same, "cosine") == pytest.approx(1.0)
    assert mean(same, "cka") == pytest.approx(1.0)
    assert same.facts["|cosine| of first principal directions"] == pytest.approx(1.0)
    other = run("representation_similarity", fixture.model(None))
    assert mean(other, "cosine") < 0.95
