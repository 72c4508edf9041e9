"""The trainer against plain oracles: one row at a time, no cache, no padding, no shared forward."""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from contract_tools import tiny_data, tiny_model
from torch import Tensor
from torch.nn import functional

from repforget.edit._dispatch import edit
from repforget.edit.train._choose import trainable
from repforget.edit.train._data import Row
from repforget.edit.train._engine import Engine
from repforget.edit.train._objective import find
from repforget.edit.train._processes import Processes
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import Wanted, _sizes, _terms
from repforget.errors import KnowledgeError, NumericalError, RecipeError, UnknownNameError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel, fingerprint
from repforget.records import Component, Localization, RandomBand

REDUCTIONS = ("grad_ascent", "npo", "simnpo", "max_entropy", "rmu", "idk_dpo", "jensun")


@pytest.fixture(scope="module")
def data() -> EditData:
    return tiny_data()


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


class Opened:
    """An engine over a double-precision copy of the tiny model, closed at the end of a test."""

    def __init__(self, model: LoadedModel, data: EditData, wanted: list[Wanted], **shared: Any) -> None:
        module = copy.deepcopy(model.module).double()
        self.model = dataclasses.replace(model, module=module)
        self.shared = Settings(**{"steps": 3, "batch_size": 6, **shared})
        self.terms = tuple(_terms(self.model, data, wanted, self.shared, 0))
        self.stack = ExitStack()
        self.chosen = self.stack.enter_context(trainable(self.model, self.shared, self.terms, None, 0))

    def engine(self, **changes: Any) -> Engine:
        made = Engine(
            self.model, self.terms, list(self.chosen.parameters), self.chosen.originals, self.chosen.untouched,
            _sizes(self.terms, self.shared), self.shared.steps, 0, self.shared.accumulate, self.shared.teacher,
            self.shared.clamp, **changes,
        )  # fmt: skip
        made.prepare()
        return made

    def nudge(self) -> None:
        """Move away from the start, so that the trained model and the untouched one differ."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.chosen.parameters:
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def wanted(name: str, weight: float = 1.0, retain: str | None = None, **own: Any) -> list[Wanted]:
    objective = find(name)
    found = [Wanted(objective, objective.bound(own), "forget", "forget", weight)]
    if retain is not None:
        keep = find(retain, "retain")
        found.append(Wanted(keep, keep.bound({}), "retain", "retain", 0.7))
    return found


def plain_logits(opened: Opened, row: Row) -> Tensor:
    """Logits of the answer positions of one row, from the model's own forward."""
    logits: Tensor = opened.model.module(torch.tensor([row.ids])).logits[0]
    return logits[row.start - 1 : len(row.ids) - 1]


def plain_logprob(opened: Opened, row: Row) -> Tensor:
    labels = torch.tensor(row.ids[row.start :])
    return plain_logits(opened, row).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def compare(found: list[Tensor], loss: Tensor, parameters: list[Tensor], tolerance: float = 1e-9) -> None:
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert any(g is not None and float(g.abs().max()) > 1e-6 for g in expected), "nothing to compare"
    for ours, theirs in zip(found, expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=1e-7)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_with_kl_equals_its_formula_row_by_row(model: LoadedModel, data: EditData, beta: float) -> None:
    opened = Opened(model, data, wanted("npo", 0.5, "kl", beta=beta))
    with opened.stack:
        engine = opened.engine()
        _, forget, _ = engine.rows(0, 0)
        _, retain, _ = engine.rows(0, 1)
        with torch.no_grad():
            before = [plain_logprob(opened, row).sum() for row in forget]
            teacher = [plain_logits(opened, row).log_softmax(-1) for row in retain]
        opened.nudge()
        found = engine.gradients(0, ("all",))["all"]
        gap = torch.stack([plain_logprob(opened, row).sum() - b for row, b in zip(forget, before, strict=True)])
        loss = 0.5 * (-2 / beta * functional.logsigmoid(-beta * gap)).mean()
        own = torch.cat([plain_logits(opened, row).log_softmax(-1) for row in retain])
        loss = loss + 0.7 * functional.kl_div(own, torch.cat(teacher), log_target=True, reduction="none").sum(-1).mean()
        compare(found, loss, engine.parameters)
        assert sum(engine.losses.values()) == pytest.approx(loss.item(), rel=1e-6)


def test_at_the_start_npo_is_ascent_on_sequence_sums(model: LoadedModel, data: EditData) -> None:
    opened = Opened(model, data, wanted("npo", beta=0.3))
    with opened.stack:
        engine = opened.engine()
        found = engine.gradients(0, ("all",))["all"]
        assert engine.losses["forget"] == pytest.approx(2 * math.log(2) / 0.3, rel=1e-6)
        rows = engine.rows(0, 0)[1]
        compare(found, torch.stack([plain_logprob(opened, row).sum() for row in rows]).mean(), engine.parameters, 1e-7)


def test_hidden_states_leave_out_the_first_token_and_padding(model: LoadedModel, data: EditData) -> None:
    opened = Opened(model, data, wanted("rmu", coefficient=3.0, layers=[0]), batch_size=64)
    with opened.stack:
        engine = opened.engine()
        rows = engine.rows(0, 0)[1]
        assert len({len(row.ids) for row in rows}) > 1, "nothing is padded"
        found = engine.gradients(0, ("all",))["all"]
        states = []
        for row in rows:
            hidden = opened.model.module(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[1][0, 1:]
            states.append(hidden[:, None])
        values = find("rmu").function(torch.cat(states), coefficient=3.0, seed=0)
        compare(found, values.mean(), engine.parameters, 1e-6)  # the objective works in float32


@pytest.mark.parametrize("parts", [2, 4, 5])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradients_do_not_depend_on_how_a_step_is_cut(data: EditData, name: str, parts: int) -> None:
    model = tiny_model("gpt2")  # in double precision throughout, where Llama's norms work in float32
    found = []
    for accumulate in (1, parts):
        opened = Opened(model, data, wanted(name, 1.0, "l2" if name == "npo" else "nll"), accumulate=accumulate)
        with opened.stack:
            engine = opened.engine()
            opened.nudge()
            found.append(engine.gradients(0, ("forget", "retain")))
            found[-1]["loss"] = [torch.tensor([engine.losses[s] for s in ("forget", "retain")])]
    for side in found[0]:
        for whole, cut in zip(found[0][side], found[1][side], strict=True):
            torch.testing.assert_close(cut, whole, atol=1e-7 if name == "rmu" else 1e-9, rtol=1e-5)
    assert any(float(g.abs().max()) > 1e-6 for g in found[0]["forget"])


def test_shares_of_several_processes_add_up(model: LoadedModel, data: EditData) -> None:
    """Without a launcher: each share is computed alone and the shares are added by hand."""
    opened = Opened(model, data, wanted("npo", 1.0, "l2"), batch_size=5)
    with opened.stack:
        alone = opened.engine()
        opened.nudge()
        expected = alone.gradients(0, ("all",))["all"]

        class Share(Processes):
            def total(self, tensors: Any) -> list[Tensor]:
                return list(tensors)

        parts = []
        for rank in range(3):
            with torch.no_grad():
                for p, o in zip(opened.chosen.parameters, opened.chosen.originals, strict=True):
                    p.copy_(o)
            engine = opened.engine(processes=Share(rank, 3))
            opened.nudge()
            parts.append(engine.gradients(0, ("all",))["all"])
        for total, pieces in zip(expected, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(sum(pieces), total, atol=1e-8, rtol=1e-6)


def test_both_sides_add_up_to_all(model: LoadedModel, data: EditData) -> None:
    opened = Opened(model, data, wanted("simnpo", 1.0, "nll"))
    with opened.stack:
        engine = opened.engine()
        opened.nudge()
        both = engine.gradients(0, ("forget", "retain"))
        for a, b, c in zip(both["forget"], both["retain"], engine.gradients(0, ("all",))["all"], strict=True):
            torch.testing.assert_close(a + b, c, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["kl", "js", "hidden_state"])
def test_a_live_teacher_equals_the_cached_one(model: LoadedModel, data: EditData, name: str) -> None:
    found = []
    for teacher in ("cached", "live"):
        opened = Opened(model, data, wanted("simnpo", 1.0, name), teacher=teacher)
        with opened.stack:
            engine = opened.engine()
            opened.nudge()
            found.append(engine.gradients(0, ("retain",))["retain"])
    assert any(float(g.abs().max()) > 1e-8 for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-4)


def test_a_reduced_teacher_bounds_the_divergence_from_below(
    model: LoadedModel, data: EditData, monkeypatch: pytest.MonkeyPatch
) -> None:
    import repforget.edit.train._engine as module

    losses = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(module, "TEACHER_BYTES", limit)
        monkeypatch.setattr(module, "OUTCOMES", 60)
        opened = Opened(model, data, wanted("simnpo", 1.0, "kl"))
        with opened.stack:
            engine = opened.engine()
            opened.nudge()
            engine.gradients(0, ("retain",))
            losses.append(engine.losses["retain"])
    assert 0 < losses[1] <= losses[0] * (1 + 1e-6)
    assert losses[1] > 0.8 * losses[0]


def test_a_hard_label_is_a_token_even_where_all_the_others_together_are_likelier(
    model: LoadedModel, data: EditData, monkeypatch: pytest.MonkeyPatch
) -> None:
    import repforget.edit.train._engine as module
    import repforget.edit.train._head as head

    found = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(module, "TEACHER_BYTES", limit)
        monkeypatch.setattr(module, "OUTCOMES", 2)
        monkeypatch.setattr(head, "TAIL", 1.0)
        opened = Opened(model, data, wanted("simnpo", 1.0, "hard_label"))
        with opened.stack:
            engine = opened.engine()
            opened.nudge()
            found.append((engine.gradients(0, ("retain",))["retain"], engine.losses["retain"]))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-8, rtol=1e-4)


def test_clamped_tokens_have_no_gradient(model: LoadedModel, data: EditData) -> None:
    opened = Opened(model, data, wanted("grad_ascent"), clamp=0.0)
    with opened.stack:
        assert all(not g.any() for g in opened.engine().gradients(0, ("all",))["all"])


def where_of(*components: str) -> Localization:
    found = tuple(Component.parse(c) for c in components)
    band = RandomBand(len(found), 3, 1.0, 0.1, 0.2, "a made-up effect")
    return Localization("test", found, tuple(range(len(found), 0, -1)), band)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_outside_the_mask_no_bit_changes(model: LoadedModel, data: EditData, optimizer: str) -> None:
    made = edit(model, data, "npo", where=where_of("mlp_post.1.n3", "mlp_post.1.n7"), mask=True, steps=4, lr=1e-2,
                weight_decay=0.3, optimizer=optimizer)  # fmt: skip
    changed = made.applied_to(model).module
    before = dict(model.module.named_parameters())
    for name, now in changed.named_parameters():
        different = (now != before[name]).nonzero()
        if name.endswith("1.mlp.down_proj.weight"):
            assert set(different[:, 1].tolist()) <= {3, 7} and len(different)
        elif "1.mlp.gate_proj.weight" in name or "1.mlp.up_proj.weight" in name:
            assert set(different[:, 0].tolist()) <= {3, 7}
        else:
            assert not len(different), name


def test_a_mask_of_everything_is_training_without_one(model: LoadedModel, data: EditData) -> None:
    width = model.module.config.intermediate_size
    everything = where_of(*(f"mlp_post.1.n{n}" for n in range(width)))
    masked = edit(model, data, "npo", where=everything, mask=True, steps=3, lr=1e-3)
    names = [name.replace(".", r"\.") + "$" for name in masked.manifest.weights]
    free = edit(model, data, "npo", targets=names, steps=3, lr=1e-3)
    assert {operation.weight for operation in free.operations} == set(masked.manifest.weights)
    for a, b in zip(masked.operations, free.operations, strict=True):
        assert torch.equal(a.delta, b.delta)


def test_equal_seeds_equal_edits_whatever_the_global_generator_holds(model: LoadedModel, data: EditData) -> None:
    made = []
    for noise, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(noise)
        made.append(edit(model, data, "prior_relabelling", steps=3, batch_size=8, seed=seed).digest)
    assert made[0] == made[1] != made[2]


def test_low_probability_stops_early_and_says_so(model: LoadedModel, data: EditData) -> None:
    made = edit(model, data, "npo", steps=40, lr=1e-2, check_every=2, stop_probability=0.5, max_retain_rise=1e9)
    (line,) = [note for note in made.manifest.notes if note.startswith("stopped after step")]
    assert "at most 0.5" in line and int(line.split()[3].rstrip(":")) < 40


def test_divergence_keeps_the_last_good_state(model: LoadedModel, data: EditData) -> None:
    given: dict[str, Any] = {"retain": "nll", "retain_weight": 0.0, "lr": 3e-3, "check_every": 1, "warmup": 0}
    made = edit(model, data, "grad_ascent", steps=30, max_retain_rise=0.5, schedule="constant", **given)
    (line,) = [note for note in made.manifest.notes if note.startswith("diverged")]
    kept = int(line.rpartition("state of step ")[2].split()[0])
    assert kept >= 1
    same = edit(model, data, "grad_ascent", steps=kept, max_retain_rise=0.5, schedule="constant", **given)
    with made.attach(model):
        diverged = model.module(torch.tensor([[1, 5, 9]])).logits
    with same.attach(model):
        torch.testing.assert_close(model.module(torch.tensor([[1, 5, 9]])).logits, diverged, atol=1e-5, rtol=1e-5)


def test_divergence_before_anything_good_is_refused_and_leaves_the_model(model: LoadedModel, data: EditData) -> None:
    with pytest.raises(NumericalError, match="before anything good was reached"):
        edit(model, data, "grad_ascent", steps=5, lr=10.0, retain="nll", check_every=5)
    assert fingerprint(model.module) == model.fingerprint
    assert not any(p.requires_grad for p in model.module.parameters())


@pytest.mark.parametrize(("given", "error", "words"), [
    ({"targets": ["layers.9"]}, UsageError, "matches the target 'layers.9'"),
    ({"retain_batch": 100000}, KnowledgeError, r"retain_batch: \d+"),
    ({"retain": "nlll"}, UnknownNameError, "nll"),
    ({"retain": {"kl": {"beta": 1}}}, UnknownNameError, "has no setting 'beta'"),
    ({"combine": "gruu"}, UnknownNameError, "gru"),
    ({"combine": {"gru": {"ema": 1}}}, UsageError, "has no setting 'ema'"),
    ({"combine": "gru", "retain": "none"}, UsageError, "no retain term"),
    ({"robust": "samm"}, UnknownNameError, "sam"),
    ({"robust": {"sam": {"radius": 1}}}, UsageError, "has no setting 'radius'"),
    ({"mask": True}, UsageError, "needs a localisation"),
    ({"adapter": "lorra"}, UnknownNameError, "lora"),
    ({"accumulate": 40}, UsageError, "at least one row per part"),
    ({"optimizer": "adamv"}, RecipeError, "optimizer"),
])  # fmt: skip
def test_wrong_requests_are_refused_in_one_sentence(
    model: LoadedModel, data: EditData, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        edit(model, data, "npo", **{"steps": 1, **given})
    assert "\n" not in str(caught.value)
    assert fingerprint(model.module) == model.fingerprint


def test_lora_changes_only_its_targets_and_trains_the_same_objective(model: LoadedModel, data: EditData) -> None:
    made = edit(model, data, "npo", adapter="lora", rank=2, steps=40, lr=1e-2, targets=["mlp.down_proj"])
    assert {operation.kind for operation in made.operations} == {"low_rank"}
    assert all(name.endswith("mlp.down_proj.weight") for name in made.manifest.weights)
    first, last = (float(x) for x in made.manifest.notes[0].split("answers ")[1].split(",")[0].split(" -> "))
    assert last < 0.8 * first
    assert fingerprint(model.module) == model.fingerprint
