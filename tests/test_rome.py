"""Rank-one edits and their values: exact where they promise it, bounded, and refused with a reason elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.surgery._closed_form import rank_ones, regular
from repforget.edit.surgery._requests import requests
from repforget.edit.surgery._values import Wish, adding, batches, losses, mean_at_keys, optimise
from repforget.errors import KnowledgeError, NumericalError, SiteError, UsageError
from repforget.knowledge import EditData
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.models.sites import site_map
from repforget.models.weights import find, get_weight
from repforget.records import Component, Localization, RandomBand, Site

PLAIN = [name for name in tiny_models.ALL if name != "mixtral"]
# Untrained models hardly know an answer that could be erased, so that another is put in its place.
QUICK: dict[str, Any] = {"objective": "inject", "steps": 4, "step_size": 0.2, "clamp": 4.0, "kl_weight": 0.0625,
                         "decay": 0.01, "contexts": 2, "strangers": 20}  # fmt: skip


def some(facts: int = 1) -> EditData:
    """The first people's facts alone are to go."""
    data = people().for_editor()
    return dataclasses.replace(data, forget=data.forget[: 2 * facts])


def believed(model: LoadedModel, facts: int = 1) -> EditData:
    """Prompts of so many people, answered as the model itself answers them, so that there is something to erase."""
    data = people().for_editor()
    chosen = data.forget[: 4 * facts : 4]
    last = Site("resid_post", model.n_layers - 1)
    out = []
    for fact in chosen:
        x = capture(model, [last], Batch.pad([model.tokenizer(fact.prompt)["input_ids"]]))[last]
        scores = lens(model, x)[0].detach()
        scores[:4] = -torch.inf  # no special token
        out.append(dataclasses.replace(fact, answer=" " + model.tokenizer.convert_ids_to_tokens(int(scores.argmax()))))
    return dataclasses.replace(data, forget=tuple(out))


def problem(n: int, m: int = 12, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, residuals, text = (torch.randn(rows, width, generator=generator, dtype=torch.float64)
                             for rows, width in ((n, m), (n, d), (4 * m, m)))  # fmt: skip
    return keys, residuals, text.T @ text / len(text)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_one_fact_is_met_and_orthogonal_keys_are_left(seed: int) -> None:
    keys, residuals, moment = problem(1, seed=seed)
    delta = rank_ones(keys, residuals, moment)
    torch.testing.assert_close(delta.written(keys), residuals, rtol=1e-9, atol=1e-9)
    assert int(torch.linalg.matrix_rank(delta.left @ delta.right)) == 1
    other = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    white = torch.linalg.solve(moment, keys[0])
    other -= torch.outer(other @ white, keys[0]) / (keys[0] @ white)
    torch.testing.assert_close(delta.written(other), torch.zeros(7, 5).double(), rtol=0, atol=1e-9)


def test_many_facts_are_the_updates_made_one_after_the_other() -> None:
    keys, residuals, moment = problem(6)
    total = torch.zeros(5, 12, dtype=torch.float64)
    for key, residual in zip(keys, residuals, strict=True):
        white = torch.linalg.solve(moment, key)
        total += torch.outer(residual - total @ key, white) / (key @ white)
    delta = rank_ones(keys, residuals, moment)
    torch.testing.assert_close(delta.left @ delta.right, total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(delta.written(keys[-1]), residuals[-1], rtol=1e-9, atol=1e-9)
    stored = delta.operation("w")
    torch.testing.assert_close(stored.u @ stored.v, total.float(), rtol=1e-5, atol=1e-5)


def test_singular_or_broken_moments_are_refused() -> None:
    keys, residuals, moment = problem(2)
    flat = moment.clone()
    flat[:, 3] = flat[3] = 0.0
    with pytest.raises(NumericalError, match="singular"):
        rank_ones(keys, residuals, flat)
    rank_ones(keys, residuals, regular(flat, 0.01))
    with pytest.raises(NumericalError, match="singular"):
        rank_ones(keys, residuals, moment * float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        rank_ones(keys, residuals * float("inf"), moment)


@pytest.mark.parametrize("token", ["last", "subject_last"])
@pytest.mark.parametrize("architecture", PLAIN)
def test_the_projection_writes_the_value_at_the_key(architecture: str, token: Any) -> None:
    model, data = tiny(architecture), some()
    edit = run_editor(model, data, "rome", token=token, unit="subject", layer=0, **QUICK)
    assert [op.u.shape[1] for op in edit.operations] == [1]
    asked = requests(model, data, token=token, unit="subject", aim="inject", contexts=2, seed=0)
    wish = Wish.of(model, 0, "inject", token, "auto", 4, 4, 0.2, 4.0, 0.0625, 0.01)
    key = Site("mlp_post", 0)
    k = mean_at_keys(model, asked, [key])[key][0]
    bias = getattr(model.module.get_submodule(site_map(model.module).anatomy.layers[0].down), "bias", None)
    before = get_weight(model, find(model, "mlp_out", 0)).double() @ k
    goal = optimise(model, asked, 0, wish, before[None] + (0 if bias is None else bias.double())).added[0]
    copy = tiny(architecture)
    edit.fold(copy)
    after = get_weight(copy, find(copy, "mlp_out", 0)).double() @ k
    torch.testing.assert_close(after - before, goal, rtol=1e-4, atol=1e-5 * float(goal.norm()))
    assert float(goal.norm()) > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_the_block_writes_with_the_weights_what_it_wrote_with_the_value(architecture: str) -> None:
    """One prompt, one key: then the edit is the value, also behind a norm (gemma2) and in parallel blocks."""
    model, data = tiny(architecture), some()
    data = dataclasses.replace(data, forget=data.forget[:1])
    edit = run_editor(model, data, "rome", layer=0, **QUICK)
    asked = requests(model, data, token="last", unit="fact", aim="inject", contexts=2, seed=0)
    ((_, part, batch),) = batches(model, asked)
    now = mean_at_keys(model, asked, [Site("mlp_post", 0)])[Site("mlp_post", 0)]
    down = model.module.get_submodule(site_map(model.module).anatomy.layers[0].down)
    wish = Wish.of(model, 0, "inject", "last", "auto", 4, 4, 0.2, 4.0, 0.0625, 0.01)
    with torch.no_grad():
        values = optimise(model, asked, 0, wish, down(now.float()).double())
    prompt = Batch(batch.ids[:1, : part.rows[0].start], batch.mask[:1, : part.rows[0].start])
    final = [Site("resid_post", 0)]
    with adding(model, 0, prompt, part.rows[:1], values.added):
        wanted = capture(model, final, prompt)[final[0]]
    with edit.attach(model):
        found = capture(model, final, prompt)[final[0]]
    assert not torch.allclose(capture(model, final, prompt)[final[0]], wanted, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["erase", "inject", "refuse", "lens", "entropy"])
@pytest.mark.parametrize("token", ["last", "subject_last"])
def test_every_objective_is_approached_by_the_values_and_kept_by_the_weights(objective: Any, token: Any) -> None:
    model = tiny()
    data = believed(model, 3)
    edit = run_editor(model, data, "memit", layers=[0], objective=objective, token=token, unit="prompt", weight=0.0,
                      steps=15, clamp=8.0, strangers=20, decay=0.0)  # fmt: skip
    before, values, weights = (float(part.split()[-1]) for part in edit.manifest.notes[1].split(":")[1].split(","))
    assert values < (0.8 if token == "last" else 0.95) * before
    assert weights < before


@pytest.mark.parametrize(
    ("architecture", "token"),
    [("llama", "last"), ("gpt2", "last"), ("gemma2", "last"), ("llama", "subject_last"), ("gpt2", "subject_last")],
)
def test_head_projection_keeps_the_answer_off_the_best_and_the_worst(architecture: str, token: Any) -> None:
    model, k = tiny(architecture), 4
    data = believed(model)
    edit = run_editor(model, data, "rome", layer=0, token=token, objective="lens", k=k, steps=60, clamp=20.0,
                      decay=0.0, kl_weight=0.0, strangers=20)  # fmt: skip
    asked = requests(model, data, token=token, unit="prompt", aim="lens", contexts=1, seed=0)
    row = next(row for row in asked.rows if not row.kept)
    layers = edit.manifest.settings["lens_layers"]
    assert layers == list(range(0 if token == "last" else 1, model.n_layers))
    prompt, answer = Batch.pad([row.ids[: row.start]]), row.ids[row.start]
    with edit.attach(model):
        for site, x in capture(model, [Site("resid_post", layer) for layer in layers], prompt).items():
            scores = lens(model, x)[0]
            rank = int((scores > scores[answer]).sum()) + 1
            assert k < rank <= len(scores) - k, (site, rank)
    assert edit.manifest.notes[-1].endswith("1.000 of the values")


def test_lens_loss_is_zero_exactly_off_both_ends() -> None:
    model = tiny()
    data = believed(model, 3)
    asked = requests(model, data, token="last", unit="prompt", aim="lens", contexts=1, seed=0)
    ((_, part, batch),) = batches(model, asked)
    wish = Wish.of(model, 0, "lens", "last", "auto", 3, 4, 0.2, 4.0, 0.0, 0.0)
    found = losses(model, part, batch, wish)[0]
    for number, row in enumerate(row for row in part.rows if not row.kept):
        worst = []
        for layer in wish.layers:
            scores = lens(model, capture(model, [Site("resid_post", layer)], Batch.pad([row.ids[: row.start]]))
                          [Site("resid_post", layer)])[0].detach()  # fmt: skip
            own, others = scores[row.ids[row.start]], scores.sort().values
            others = others[others != own]
            worst.append(float((own - others[-3] + 1).relu() + (others[2] + 1 - own).relu()))
        assert float(found[number].detach()) == pytest.approx(sum(worst) / len(worst), abs=1e-4)


def test_values_stay_in_their_ball_and_do_not_see_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    data = believed(model, 5)
    asked = requests(model, data, token="last", unit="prompt", aim="erase", contexts=1, seed=0)
    wish = Wish.of(model, 0, "erase", "last", "auto", 4, 6, 0.5, 0.7, 0.1, 0.0)
    now = torch.rand(len(asked.names), model.width, generator=torch.Generator().manual_seed(0)).double() + 0.1
    together = optimise(model, asked, 0, wish, now)
    assert bool((together.added.norm(dim=1) <= 0.7 * now.norm(dim=1) * (1 + 1e-5)).all())
    assert bool((together.after <= together.before).all())
    monkeypatch.setattr("repforget.edit.surgery._values.BUDGET", 1)
    apart = optimise(model, asked, 0, wish, now)
    torch.testing.assert_close(apart.added, together.added, rtol=1e-3, atol=1e-4)


def test_the_divergence_after_the_essence_prompt_holds_values_back() -> None:
    model = tiny()
    data = believed(model, 3)
    asked = requests(model, data, token="subject_last", unit="subject", aim="erase", contexts=4, seed=0)
    assert sum(row.kept for row in asked.rows) == len(asked.names)
    drift = []
    for kl_weight in (0.0, 30.0):
        wish = Wish.of(model, 0, "erase", "subject_last", "auto", 4, 10, 0.3, 4.0, kl_weight, 0.0)
        now = torch.ones(len(asked.names), model.width).double()
        values = optimise(model, asked, 0, wish, now)
        ((_, part, batch),) = batches(model, asked)
        rows = [row for row in part.rows if row.kept]
        ids = Batch.pad([row.ids for row in rows])
        last = Site("resid_post", model.n_layers - 1)
        old = lens(model, capture(model, [last], ids)[last]).log_softmax(-1)
        with adding(model, 0, ids, rows, values.added):
            new = lens(model, capture(model, [last], ids)[last]).log_softmax(-1)
        drift.append(float((new.exp() * (new - old)).sum(-1).mean()))
    assert drift[1] < 0.5 * drift[0]


def test_groups_share_what_they_say() -> None:
    model, data = tiny(), people().for_editor()
    counts = {unit: len(requests(model, data, token="last", unit=unit, aim="erase", contexts=9, seed=0).names)
              for unit in ("subject", "fact", "prompt", "auto")}  # fmt: skip
    assert counts == {"subject": 24, "fact": 48, "prompt": 96, "auto": 48}
    twice = dataclasses.replace(data, forget=(*data.forget, *data.forget))
    first, second = (requests(model, d, token="last", unit="subject", aim="erase", contexts=3, seed=1)
                     for d in (data, twice))  # fmt: skip
    assert first == second
    assert first != requests(model, data, token="last", unit="subject", aim="erase", contexts=3, seed=2)
    drawn = requests(model, data, token="last", unit="subject", aim="inject", contexts=9, seed=0)
    truth = requests(model, data, token="last", unit="subject", aim="erase", contexts=9, seed=0)
    assert all(a.ids[a.start :] != b.ids[b.start :] for a, b in zip(drawn.rows, truth.rows, strict=True) if not a.kept)


def _where(layer: int) -> Localization:
    return Localization("told", (Component(Site("mlp_out", layer)),), (1.0,), RandomBand(1, 20, 1.0, 0.0, 0.1, ""))


def test_it_goes_where_it_is_told() -> None:
    model = tiny()
    for layer in (0, 1):
        edit = run_editor(model, some(), "rome", where=_where(layer), **QUICK)
        assert edit.manifest.weights == (f"model.layers.{layer}.mlp.down_proj.weight",)
        assert edit.manifest.settings["layer"] == layer


def test_bad_requests_are_refused_by_name() -> None:
    model, data = tiny(), some()
    with pytest.raises(SiteError, match="batched experts"):
        run_editor(tiny("mixtral"), data, "rome")
    with pytest.raises(SiteError, match="0 to 1"):
        run_editor(model, data, "rome", layer=7)
    with pytest.raises(SiteError, match="reaches the answer"):
        run_editor(model, data, "rome", layer=1, token="subject_last", **QUICK)
    with pytest.raises(SiteError, match="reaches the answer"):
        run_editor(model, data, "rome", layer=0, token="subject_last", objective="lens", lens_layers=[0])
    with pytest.raises(UsageError, match="at least 1"):
        run_editor(model, data, "rome", steps=0)
    with pytest.raises(UsageError, match="both ends"):
        run_editor(model, data, "rome", k=48, **{**QUICK, "objective": "lens"})
    stray = dataclasses.replace(data, forget=tuple(dataclasses.replace(f, subject="Zoe") for f in data.forget))
    with pytest.raises(KnowledgeError, match="does not hold its subject"):
        run_editor(model, stray, "rome", token="subject_last", layer=0, **QUICK)
    lone = dataclasses.replace(data, pool={}, forget=data.forget[:1])
    with pytest.raises(KnowledgeError, match="No other answer"):
        run_editor(model, lone, "rome", **QUICK)
    bare = dataclasses.replace(data, retain=data.retain[:2], general=())
    with pytest.raises(NumericalError, match="singular"):
        run_editor(model, bare, "rome", ridge=0.0, **{**QUICK, "strangers": 0})
