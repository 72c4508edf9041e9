"""What every objective on outputs owes: its reduction, its independence of padding and scale, and its bounds."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import Case, case, objectives, scores
from torch import Tensor

from repforget import discover
from repforget.edit.train._objective import Objective, Scores, find, part_names
from repforget.edit.train._settings import Settings
from repforget.errors import UsageError

ALL = objectives()
LOGITS = [made for made in ALL if "logits" in made.reads]
seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)
named = {"ids": lambda made: made.name}


def test_every_name_is_one_distinct_function_with_its_facts() -> None:
    assert {"npo", "simnpo", "flat", "jensun", "undial", "kl", "nll", "answer_preservation"} <= {o.name for o in ALL}
    names = [(role, n) for role, folder in (("forget", "objectives"), ("retain", "retain")) for n in part_names(folder)]
    found = [find(name, role) for role, name in names]  # type: ignore[arg-type]
    assert [(made.role, made.name) for made in found] == names
    assert len({made.function for made in found}) == len(names) == len({name for _, name in names})
    assert set(part_names("objectives")) <= set(discover.names("edit"))
    assert not set(part_names("retain")) & set(discover.names("edit"))


@pytest.mark.parametrize("made", ALL, **named)
def test_docstring_says_what_it_costs_and_where_it_fails(made: Objective) -> None:
    text = inspect.getdoc(made.function) or ""
    assert all(word in text for word in ("Cost:", "Weakness:", "``")), text


@pytest.mark.parametrize("made", ALL, **named)
def test_no_setting_hides_a_common_one(made: Objective) -> None:
    assert not set(made.settings) & {f.name for f in fields(Settings)}


# Half of the disagreement among published numbers comes from these: how a loss is reduced, what it is trained beside.
DECLARED = {
    "token_mean": {"grad_ascent", "grad_diff", "weighted_ascent", "token_npo", "unlikelihood", "inverted_hinge", "nll",
                   "max_entropy", "jensun", "pdu", "undial", "idk_nll", "prior_relabelling", "kl", "rkl", "js"},
    "seq_sum_batch_mean": {"npo", "idk_dpo", "altpo", "answer_preservation"},
    "seq_mean_batch_mean": {"simnpo", "flat"},
    "refusal": {"idk_nll", "idk_dpo", "jensun", "flat", "answer_preservation"},
    "alternative": {"altpo"},
    "fresh": {"prior_relabelling"},
    "defaults": {"grad_ascent": {"retain": "none"}, "grad_diff": {"retain": "nll"}, "jensun": {"retain": "js"},
                 "pdu": {"combine": "constraint"}},
    "settings": {"npo": {"beta": 0.1}, "simnpo": {"beta": 2.5, "delta": 0.0}, "idk_dpo": {"beta": 0.1},
                 "flat": {"divergence": "kl"}, "altpo": {"beta": 0.1},
                 "weighted_ascent": {"beta": 1.0, "saturation": 0.0},
                 "token_npo": {"beta": 4.0, "power": 0.0}, "answer_preservation": {"beta": 0.1}},
}  # fmt: skip
REDUCTIONS = [key for key in DECLARED if key.endswith("_mean")]


@pytest.mark.parametrize("made", [o for o in ALL if any(o.name in DECLARED[r] for r in REDUCTIONS)], **named)
def test_declarations_are_the_published_ones(made: Objective) -> None:
    assert made.name in DECLARED[made.reduction]
    assert made.instead is None or made.name in DECLARED[made.instead]
    assert made.defaults == DECLARED["defaults"].get(made.name, {})  # type: ignore[attr-defined]
    assert made.bound({}).items() >= DECLARED["settings"].get(made.name, {}).items()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("made", ALL, **named)
def test_values_come_as_the_reduction_says(made: Objective, dtype: torch.dtype) -> None:
    c = case(dtype=dtype)
    tokens = len(c.labels) if {"own", "logits"} & set(made.reads) else len(c.other_labels)
    assert c.loss(made).shape == (tokens if made.reduction == "token_mean" else 3,)
    assert c.loss(made).dtype == dtype


@pytest.mark.parametrize("made", ALL, **named)
def test_each_value_depends_on_its_own_tokens_and_on_all_of_them(made: Objective) -> None:
    c = case()
    values = c.loss(made)
    for i, value in enumerate(values):
        for logits, row, name in ((c.logits, c.row, "own"), (c.other, c.other_row, "instead")):
            (grad,) = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
            touched = torch.zeros(len(row), dtype=torch.bool) if grad is None else (grad != 0).any(-1)
            read = name in made.reads or (name == "own" and "logits" in made.reads)
            mine = torch.arange(len(row)) == i if made.reduction == "token_mean" else row == i
            assert torch.equal(touched, mine & read), (i, name)


@pytest.mark.parametrize("made", LOGITS, **named)
@few
@given(seed=seeds, shift=st.floats(-1000, 1000))
def test_a_constant_added_to_the_logits_of_a_token_changes_nothing(made: Objective, seed: int, shift: float) -> None:
    c = case(seed)
    moved = dataclasses.replace(c, logits=c.logits + shift * torch.arange(len(c.labels)).unsqueeze(-1))
    torch.testing.assert_close(moved.loss(made), c.loss(made), rtol=1e-9, atol=1e-10)


LABELLED = [made for made in ALL if {"own", "instead", "labels", "pattern"} & set(made.reads)]


@pytest.mark.parametrize("made", LABELLED, **named)
def test_other_labels_another_loss(made: Objective) -> None:
    # A loss on raw logit differences over the whole vocabulary does not see which token was right.
    c = case(scale=0.5)
    other = dataclasses.replace(c, labels=(c.labels + 2) % 7, other_labels=(c.other_labels + 2) % 7)
    assert bool(((c.loss(made) - other.loss(made)).abs() > 1e-4).all())


@pytest.mark.parametrize("made", [made for made in ALL if {"labels", "pattern"} & set(made.reads)], **named)
def test_a_masked_label_is_refused_never_an_index_from_the_end(made: Objective) -> None:
    c = case(vocabulary=150)
    arguments = c.arguments(made)
    for name in {"labels", "pattern"} & set(made.reads):
        arguments[made.reads.index(name)] = torch.full_like(c.labels, -100)
    with pytest.raises((RuntimeError, IndexError), match="(?i)out of bounds"):
        made.function(*arguments)


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions [B, T] before a label other than -100, as logits [m, V], labels [m] and rows [m]."""
    where = labels[:, 1:] != -100
    row = torch.arange(len(labels)).unsqueeze(1).expand_as(where)[where]
    return logits[:, :-1][where], labels[:, 1:][where], row


@pytest.mark.parametrize("made", [m for m in ALL if m.instead is None], **named)
def test_prompt_and_padding_get_no_gradient_and_change_no_value(made: Objective) -> None:
    draw = torch.Generator().manual_seed(3)
    labels = torch.full((2, 12), -100)
    labels[:, 8:] = torch.randint(150, (2, 4), generator=draw)
    logits = torch.randn(2, 12, 150, generator=draw, dtype=torch.float64)
    results = []
    for pads in (0, 6):
        padded = torch.cat([logits, torch.full((2, pads, 150), 9.0, dtype=torch.float64)], 1).requires_grad_()
        masked = torch.cat([labels, torch.full((2, pads), -100)], 1)
        own, right, row = shifted(padded, masked)
        before = own.detach().flip(-1)
        loss = Case(own, right, row, own, right, row, before, before).loss(made)
        (grad,) = torch.autograd.grad(loss.sum(), padded)
        inside = torch.zeros(2, 12 + pads, dtype=torch.bool)
        inside[:, 7:11] = True  # the distribution before each answer token, the first included, none after the last
        assert torch.equal((grad != 0).any(-1), inside)
        results.append(loss)
    assert torch.equal(*results)


BOUNDS = {"inverted_hinge": (0, 2), "jensun": (0, math.log(2)), "js": (0, math.log(2)), "kl": (0, math.inf),
          "rkl": (0, math.inf), "undial": (0, math.inf), "npo": (0, math.inf), "max_entropy": (0, math.inf),
          "pdu": (0, math.inf), "unlikelihood": (0, math.inf), "token_npo": (-math.inf, 0),
          "flat": (math.exp(-1) - 1, 1)}  # fmt: skip


@pytest.mark.parametrize("made", [made for made in ALL if made.name in BOUNDS], **named)
@few
@given(seed=seeds, scale=st.sampled_from([0.0, 0.1, 3.0, 30.0, 300.0]))
def test_losses_stay_within_their_bounds(made: Objective, seed: int, scale: float) -> None:
    low, high = BOUNDS[made.name]
    loss = case(seed, scale=scale).loss(made)
    assert bool((loss >= low - 1e-12).all() and (loss <= high + 1e-12).all())


def test_the_bounds_are_reached() -> None:
    far = torch.tensor([[60.0, 0.0, -60.0]], dtype=torch.float64)
    zero, two = torch.zeros(1, dtype=torch.long), torch.full((1,), 2)
    hinge, jensun, js = find("inverted_hinge").function, find("jensun").function, find("js", "retain").function
    assert float(hinge(far, zero)) == pytest.approx(2) and float(hinge(far, two)) == pytest.approx(0, abs=1e-12)
    assert float(jensun(far, zero)) == pytest.approx(0, abs=1e-12)
    assert float(jensun(far, two)) == pytest.approx(0.693147, abs=1e-6)
    assert float(js(far, far.flip(-1).log_softmax(-1))) == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("gap", [-200.0, -40.0, 40.0, 200.0])
@pytest.mark.parametrize("made", ALL, **named)
def test_finite_where_a_token_is_certain_or_impossible_in_float32(made: Objective, gap: float) -> None:
    c = case(dtype=torch.float32)
    at = torch.nn.functional.one_hot(c.labels, 7)
    pushed = (c.logits.detach() + gap * at).requires_grad_()
    there = (c.other.detach() - gap * torch.nn.functional.one_hot(c.other_labels, 7)).requires_grad_()
    for before in (c.before, c.before + gap * at, c.before - gap * at):
        loss = dataclasses.replace(c, logits=pushed, other=there, before=before).loss(made)
        grads = torch.autograd.grad(loss.sum(), (pushed, there), allow_unused=True)
        assert bool(torch.isfinite(loss).all())
        assert all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None)


def test_a_token_known_to_rounding_is_still_pushed() -> None:
    # In float32 the log-probability of such a token is 0 exactly, and 1 - p of it lost.
    logits = torch.tensor([[40.0, 1.0, 0.0]], requires_grad=True)
    zero = torch.zeros(1, dtype=torch.long)
    assert float(logits.log_softmax(-1)[0, 0].detach()) == 0.0
    loss = find("unlikelihood").function(logits, zero, zero)
    assert float(loss.detach()) == pytest.approx(40 - math.log(math.e + 1), abs=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    rest = torch.tensor([1.0, 0.0]).softmax(-1)
    torch.testing.assert_close(grad[0], torch.cat([torch.ones(1), -rest]))
    teacher = logits.detach().log_softmax(-1)
    reached = torch.cat([torch.tensor([0.01]), 0.99 * rest]).log().unsqueeze(0)
    assert float(find("undial").function(reached, zero, teacher)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("made", [made for made in ALL if "teacher" in made.reads], **named)
def test_an_outcome_that_a_reduced_vocabulary_leaves_empty_does_no_harm(made: Objective) -> None:
    c = case()
    empty = torch.full((len(c.labels), 1), -torch.inf, dtype=torch.float64)
    teacher = torch.cat([c.before, empty], 1)
    for tail in (empty, torch.full_like(empty, -50)):
        logits = torch.cat([c.logits.detach(), tail], 1).requires_grad_()
        loss = dataclasses.replace(c, logits=logits, before=teacher).loss(made)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert bool(torch.isfinite(loss).all() and torch.isfinite(grad).all())
        if tail is empty:
            torch.testing.assert_close(loss, c.loss(made))


@pytest.mark.parametrize("made", [made for made in ALL if "beta" in made.settings], **named)
def test_a_beta_of_nothing_is_refused_where_it_divides(made: Objective) -> None:
    if made.name in ("weighted_ascent", "token_npo", "undial"):
        assert bool(torch.isfinite(case().loss(made, beta=0.0)).all())
        return
    with pytest.raises(UsageError, match="'beta' of this objective is 0.0 and must be positive"):
        case().loss(made, beta=0.0)


def test_undial_asks_for_a_probability() -> None:
    with pytest.raises(UsageError, match="target_probability of UNDIAL is 1.0"):
        case().loss(find("undial"), target_probability=1.0)


def test_what_needs_no_reference_reads_none() -> None:
    for name in ("simnpo", "weighted_ascent", "grad_ascent", "grad_diff", "idk_nll", "prior_relabelling", "flat"):
        assert not {"reference", "instead_reference", "teacher"} & set(find(name).reads), name
    assert [o.name for o in ALL if not o.bounded] == ["grad_ascent", "grad_diff"]


@few
@given(seed=seeds, beta=st.floats(0.05, 5))
def test_preferences_fall_with_the_answer_and_rise_with_the_refusal(seed: int, beta: float) -> None:
    c = case(seed)
    own, instead = scores(c.logits, c.labels, c.row), scores(c.other, c.other_labels, c.other_row)

    def slope(loss: Tensor, at: Scores) -> Tensor:
        (grad,) = torch.autograd.grad(loss.sum(), at.logprob, retain_graph=True)
        return grad

    kept = find("answer_preservation", "retain").function(own, instead, beta=beta)
    flat = find("flat").function(own, instead)
    assert bool((slope(kept, own) < 0).all() and (slope(kept, instead) > 0).all())
    assert bool((slope(flat, own) > 0).all() and (slope(flat, instead) < 0).all())
    before = Scores(own.logprob.detach() - 1, own.row, own.n)
    there = Scores(instead.logprob.detach() + 1, instead.row, instead.n)
    for name in ("idk_dpo", "altpo"):
        loss = find(name).function(own, before, instead, there, beta=beta)
        assert bool((slope(loss, own) > 0).all() and (slope(loss, instead) < 0).all())
