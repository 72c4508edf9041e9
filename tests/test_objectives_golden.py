"""Objectives against known values and identities, each computed here a second time in another way, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import case, scores
from torch import Tensor
from torch.nn import functional

from repforget.edit.train._objective import Scores, find
from repforget.edit.train.objectives._cheat_sheet import cheat_sheet
from repforget.edit.train.objectives.flat import CRITICS

seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)
FIRST = torch.zeros(1, dtype=torch.long)


def forget(name: str, *arguments: object, **given: object) -> Tensor:
    return find(name).function(*arguments, **given)


def retain(name: str, *arguments: object, **given: object) -> Tensor:
    return find(name, "retain").function(*arguments, **given)


def slope(loss: Tensor, at: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss.sum(), at, retain_graph=True)
    return grad


def logits_of(p: float) -> Tensor:
    """Logits [1, 3] of a token of probability ``p``; the rest is shared one to two."""
    return torch.tensor([[p, (1 - p) / 3, 2 * (1 - p) / 3]], dtype=torch.float64).log()


def one(logprob: float) -> Scores:
    return Scores(torch.tensor([logprob], dtype=torch.float64, requires_grad=True), FIRST, 1)


# NPO and its family


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 5.0])
def test_npo_starts_at_two_log_two_over_beta_as_ascent_on_sequence_sums(beta: float) -> None:
    c = case()
    own = scores(c.logits, c.labels, c.row)
    loss = forget("npo", own, own, beta=beta)
    torch.testing.assert_close(loss, torch.full((3,), 2 * math.log(2) / beta, dtype=torch.float64))
    fixed = Scores(own.logprob.detach(), own.row, own.n)
    ascent = functional.log_softmax(c.logits, -1)[range(6), c.labels].sum()
    torch.testing.assert_close(slope(forget("npo", own, fixed, beta=beta), c.logits), slope(ascent, c.logits))


def test_npo_at_the_usual_beta() -> None:
    assert float(forget("npo", one(-3.0), one(-3.0)).detach()) == pytest.approx(13.8629436, abs=1e-7)


def test_npo_nears_ascent_in_proportion_to_beta() -> None:
    c = case(scale=0.3)
    own, before = scores(c.logits, c.labels, c.row), scores(c.before, c.labels, c.row)
    ascent = slope(own.logprob, c.logits)
    apart = [float((slope(forget("npo", own, before, beta=b), c.logits) - ascent).norm()) for b in (0.1, 0.01, 0.001)]
    assert apart[0] / apart[1] == pytest.approx(10, rel=0.1) and apart[1] / apart[2] == pytest.approx(10, rel=0.01)


def losses(name: str, steps: int = 801, **given: float) -> list[float]:
    """Forget loss of one memorised token after every step of gradient descent on its logits."""
    logits = torch.tensor([[3.0, 0, 0, 0, 0]], dtype=torch.float64)
    before = scores(logits, FIRST, FIRST)
    found = []
    for _ in range(steps):
        logits.requires_grad_()
        own = scores(logits, FIRST, FIRST)
        found.append(-float(own.logprob.detach()))
        loss = forget(name, own, before, **given) if name == "npo" else forget(name, own)
        logits = logits.detach() - slope(loss, logits)
    return found


def test_ascent_grows_linearly_in_time_npo_with_its_logarithm() -> None:
    ascent, npo = losses("grad_ascent"), losses("npo", beta=1.0)
    for t in (100, 200, 400):
        assert ascent[2 * t] - ascent[t] == pytest.approx(1.25 * t, rel=1e-6)  # squared gradient 1 + 4 / 4^2
    assert npo[800] - npo[400] == pytest.approx(math.log(2), rel=0.02)
    assert npo[800] - npo[400] < npo[400] - npo[200] < npo[200] - npo[100] < 0.8


def test_simnpo_is_blind_to_length_npo_is_not() -> None:
    once = Scores(torch.tensor([-0.2, -0.7], dtype=torch.float64), torch.tensor([0, 0]), 1)
    twice = Scores(once.logprob.repeat(2), torch.zeros(4, dtype=torch.long), 1)
    nothing = [Scores(torch.zeros_like(s.logprob), s.row, 1) for s in (once, twice)]
    assert float(forget("simnpo", once)) == pytest.approx(float(forget("simnpo", twice)), abs=1e-14)
    assert float(forget("npo", once, nothing[0])) - float(forget("npo", twice, nothing[1])) > 0.1


@pytest.mark.parametrize(("loss", "weight"), [(0.05, 0.94), (2.5, 0.004)])
def test_simnpo_stops_by_itself(loss: float, weight: float) -> None:
    own = one(-loss)
    assert float(slope(forget("simnpo", own, beta=2.5), own.logprob)) == pytest.approx(weight, abs=0.003)


@few
@given(seed=seeds, beta=st.floats(0.1, 5), delta=st.floats(-1, 2))
def test_simnpo_margin_is_beta_times_delta(seed: int, beta: float, delta: float) -> None:
    c = case(seed)
    own = scores(c.logits, c.labels, c.row)
    gamma = beta * delta
    expected = [2 / beta * math.log1p(math.exp(beta * float(m) + gamma)) for m in own.means.detach()]
    torch.testing.assert_close(forget("simnpo", own, beta=beta, delta=delta).detach(),
                               torch.tensor(expected, dtype=torch.float64))  # fmt: skip
    small = slope(forget("simnpo", own, beta=1e-6, delta=delta), c.logits)
    torch.testing.assert_close(small, slope(own.means, c.logits), rtol=1e-4, atol=1e-6)


@few
@given(seed=seeds, beta=st.floats(0.05, 5))
def test_preference_losses_are_dpo_times_two_over_beta(seed: int, beta: float) -> None:
    c = case(seed)
    own, before = scores(c.logits, c.labels, c.row), scores(c.before, c.labels, c.row)
    won, won_before = (scores(x, c.other_labels, c.other_row) for x in (c.other, c.other_before))
    chosen, rejected = won.sums - won_before.sums, own.sums - before.sums
    dpo = torch.log1p(torch.exp(-beta * (chosen - rejected)))
    for name in ("idk_dpo", "altpo"):
        torch.testing.assert_close(forget(name, own, before, won, won_before, beta=beta), dpo * 2 / beta)
        start = forget(name, own, own, won, won, beta=beta)
        torch.testing.assert_close(start, torch.full_like(start, 2 * math.log(2) / beta))
        still = forget(name, own, before, won, won, beta=beta)
        torch.testing.assert_close(still, forget("npo", own, before, beta=beta))


def test_answer_preservation_at_equality_and_slope() -> None:
    own, refusal = one(-2.0), one(-2.0)
    loss = retain("answer_preservation", own, refusal, beta=0.1)
    assert float(loss.detach()) == pytest.approx(math.log(2) / 0.1)
    assert float(slope(loss, own.logprob)) == pytest.approx(-0.5)
    halves = Scores(torch.full((2,), -1.0, dtype=torch.float64), torch.zeros(2, dtype=torch.long), 1)  # sums, not means
    assert float(retain("answer_preservation", halves, refusal, beta=0.1).detach()) == pytest.approx(math.log(2) / 0.1)


# Ascent with weights


@few
@given(seed=seeds, beta=st.floats(0.2, 5))
def test_weighted_ascent_is_the_gradient_of_the_mean_power(seed: int, beta: float) -> None:
    c = case(seed)
    own = scores(c.logits, c.labels, c.row)
    power = own.logprob.exp().pow(beta) / beta
    torch.testing.assert_close(slope(forget("weighted_ascent", own, beta=beta), c.logits), slope(power, c.logits))


def test_ascent_is_weighted_ascent_without_weights() -> None:
    c = case()
    own = scores(c.logits, c.labels, c.row)
    right = -functional.cross_entropy(c.logits, c.labels, reduction="none")
    for name, given_ in (("weighted_ascent", {"beta": 0.0}), ("grad_ascent", {}), ("grad_diff", {})):
        torch.testing.assert_close(forget(name, own, **given_), right)
    torch.testing.assert_close(retain("nll", own), -right)


def test_satimp_weights() -> None:
    p = 0.3
    own = one(math.log(p))
    loss = forget("weighted_ascent", own, beta=5.0, saturation=1.0)
    assert float(slope(loss, own.logprob)) == pytest.approx(p**5 * (1 - p))
    assert float(loss.detach()) == pytest.approx(p**5 * (1 - p) * math.log(p))


@pytest.mark.parametrize("power", [0.0, 1.5])
def test_token_npo_weights(power: float) -> None:
    p, p0 = 0.3, 0.6
    own = one(math.log(p))
    weight = slope(forget("token_npo", own, one(math.log(p0)), beta=4.0, power=power), own.logprob)
    assert float(weight) == pytest.approx(2 * p**4 / (p**4 + p0**4) * p**power)


@few
@given(seed=seeds)
def test_unlikelihood_is_the_cross_entropy_to_itself_without_the_label(seed: int) -> None:
    c = case(seed)
    loss = forget("unlikelihood", c.logits, c.labels, c.place)
    torch.testing.assert_close(loss, -torch.log1p(-c.logits.softmax(-1)[range(6), c.labels]), rtol=1e-8, atol=1e-10)
    others = c.logits.detach().clone()
    others[range(6), c.labels] = -torch.inf
    cross = functional.cross_entropy(c.logits, others.softmax(-1), reduction="sum")
    grad = slope(loss, c.logits)
    torch.testing.assert_close(grad, slope(cross, c.logits), rtol=1e-12, atol=1e-14)
    assert float(grad.norm(dim=-1).max()) <= math.sqrt(2)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(6, dtype=torch.float64), atol=1e-14, rtol=0)


def test_unlikelihood_skips_the_first_tokens_of_each_answer() -> None:
    c = case()
    whole, skipped = (forget("unlikelihood", c.logits, c.labels, c.place, skip=k) for k in (0, 1))
    assert [bool(v) for v in (skipped == 0)] == [True, False, False, True, True, False]
    assert torch.equal(skipped[skipped != 0], whole[[1, 2, 5]])


CHEAT_SHEET = {  # at 0.999, 0.9, 0.5, 0.1, 0.001
    "GA": [0.001, 0.10, 0.50, 0.90, 0.999],
    "WGA": [0.001, 0.090, 0.25, 0.090, 0.001],
    "WGA, beta 5": [0.001, 0.059, 0.016, 0, 0],
    "SatImp": [0.000, 0.006, 0.008, 0, 0],
    "unlikelihood": [0.999, 0.90, 0.50, 0.10, 0.001],
    "inverted hinge": [0.002, 0.18, 0.50, 0.18, 0.002],
}


def test_the_cheat_sheet_of_gradients_comes_out_of_the_objectives() -> None:
    found = cheat_sheet()
    assert list(found) == list(CHEAT_SHEET)
    for title, expected in CHEAT_SHEET.items():
        assert found[title] == pytest.approx(expected, abs=5e-4), title


# Distributions


def test_inverted_hinge_moves_the_label_and_the_runner_up_only() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    p = logits.detach()[0].softmax(-1)
    label = torch.tensor([1])
    loss = forget("inverted_hinge", logits, label)
    assert float(loss.detach()) == pytest.approx(float(1 + p[1] - p[3]))
    unit = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(slope(loss, logits)[0], p[1] * (unit[1] - p) - p[3] * (unit[3] - p))


@few
@given(seed=seeds)
def test_max_entropy_pulls_towards_uniform(seed: int) -> None:
    c = case(seed)
    loss = forget("max_entropy", c.logits)
    uniform = torch.full((6, 7), 1 / 7, dtype=torch.float64)
    expected = functional.kl_div(c.logits.log_softmax(-1), uniform, reduction="none").sum(-1)
    torch.testing.assert_close(loss, expected)
    grad = slope(loss, c.logits)
    torch.testing.assert_close(grad, c.logits.softmax(-1) - 1 / 7)
    assert float(grad.norm(dim=-1).max()) <= math.sqrt(2)
    flat = torch.full((1, 7), 3.0, dtype=torch.float64)
    assert float(forget("max_entropy", flat)) == pytest.approx(0, abs=1e-15) and float(loss.detach().min()) > 0


def test_pdu_is_the_squared_gap_and_zero_only_where_flat() -> None:
    assert float(forget("pdu", torch.tensor([[4.0, 0.0, 2.0]]))) == 4.0
    assert float(forget("pdu", torch.full((1, 5), 7.0))) == 0.0


@few
@given(seed=seeds)
def test_jensun_is_the_divergence_to_the_one_hot_pattern(seed: int) -> None:
    c = case(seed)
    p = c.logits.detach().softmax(-1)
    target = functional.one_hot(c.labels, 7).double()
    middle = (p + target) / 2
    expected = (torch.special.xlogy(p, p / middle) + torch.special.xlogy(target, target / middle)).sum(-1) / 2
    torch.testing.assert_close(forget("jensun", c.logits, c.labels).detach(), expected)


@few
@given(seed=seeds)
def test_retain_divergences_against_their_definitions(seed: int) -> None:
    c = case(seed)
    p, p0 = c.logits.detach().softmax(-1), c.before.softmax(-1)
    middle = (p + p0) / 2
    pairs = {"kl": (p0, p), "rkl": (p, p0)}
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(retain(name, c.logits, p0.log()).detach(), (a * (a / b).log()).sum(-1))
    js = sum((a * (a / middle).log()).sum(-1) for a in (p, p0)) / 2
    torch.testing.assert_close(retain("js", c.logits, p0.log()).detach(), js)


@pytest.mark.parametrize("name", ["kl", "rkl", "js"])
def test_retain_divergences_have_no_gradient_at_the_start(name: str) -> None:
    c = case()
    loss = retain(name, c.logits, c.logits.detach().log_softmax(-1))
    assert float(loss.detach().abs().max()) < 1e-14
    assert float(slope(loss, c.logits).abs().max()) < 1e-15


def test_undial_without_a_shift_is_at_rest_and_with_an_infinite_one_is_unlikelihood() -> None:
    c = case()
    teacher = c.logits.detach().log_softmax(-1)
    still = forget("undial", c.logits, c.labels, teacher, beta=0.0)
    assert float(slope(still, c.logits).abs().max()) < 1e-15 and float(still.detach().abs().max()) < 1e-14
    full = forget("undial", c.logits, c.labels, teacher, beta=math.inf)
    unlikely = forget("unlikelihood", c.logits, c.labels, c.place)
    torch.testing.assert_close(slope(full, c.logits), slope(unlikely, c.logits))


@pytest.mark.parametrize(("p", "beta", "left", "digits"), [
    (0.999, 3.0, 0.98, 2), (0.999, 5.0, 0.87, 2), (0.999, 10.0, 0.043, 3), (1 - 1e-6, 10.0, 0.978, 3),
    (0.999, "auto", 0.01, 6), (1 - 1e-6, "auto", 0.01, 6), (0.005, "auto", 0.005, 6),
])  # fmt: skip
def test_undial_lowers_the_label_to_its_target(p: float, beta: float, left: float, digits: int) -> None:
    reached = p if left == p else 0.01 if beta == "auto" else 1 / (1 + (1 - p) / p * math.exp(beta))
    assert round(reached, digits) == left
    logits = logits_of(reached).requires_grad_()
    loss = forget("undial", logits, FIRST, logits_of(p), beta=beta)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(slope(loss, logits).abs().max()) < 1e-9
    off = forget("undial", logits_of(reached / 2), FIRST, logits_of(p), beta=beta)
    assert float(off) > 1e-4


# Template answers


GENERATORS = {
    "kl": lambda u: u * np.log(u),
    "tv": lambda u: np.abs(u - 1) / 2,
    "js": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    "pearson": lambda u: (u - 1) ** 2,
    "neyman": lambda u: (1 - u) ** 2 / u,
    "hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
}


@pytest.mark.parametrize("name", CRITICS)
def test_flat_conjugates_are_those_of_the_divergences(name: str) -> None:
    # f*(t) = sup_u (u t - f(u)), searched on a grid.
    u = np.exp(np.linspace(-12, 12, 400_001))
    f = GENERATORS[name](u)
    assert set(GENERATORS) == set(CRITICS) and float(GENERATORS[name](1.0)) == 0.0
    critic, conjugate = CRITICS[name]  # type: ignore[index]
    for p in (0.0, 0.2, 0.7, 1.0):
        v = torch.tensor(p, dtype=torch.float64)
        assert float(conjugate(v)) == pytest.approx(float(np.max(u * float(critic(v)) - f)), abs=1e-5), p


@pytest.mark.parametrize(("name", "formula"), [
    ("kl", lambda good, bad: -good + math.exp(bad - 1)),
    ("tv", lambda good, bad: -math.tanh(good) / 2 + math.tanh(bad) / 2),
])  # fmt: skip
def test_flat_reads_mean_probabilities(name: str, formula: object) -> None:
    own = Scores(torch.tensor([0.9, 0.5], dtype=torch.float64).log(), torch.tensor([0, 0]), 1)
    template = Scores(torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64).log(), torch.tensor([0, 0, 0]), 1)
    assert float(forget("flat", own, template, divergence=name)) == pytest.approx(formula(0.3, 0.7))  # type: ignore[operator]


# Refusals, relabelling and weights


@pytest.mark.parametrize("name", ["idk_nll", "prior_relabelling"])
def test_answers_put_in_the_place_are_trained_by_cross_entropy(name: str) -> None:
    c = case()
    other = scores(c.other, c.other_labels, c.other_row)
    torch.testing.assert_close(forget(name, other), functional.cross_entropy(c.other, c.other_labels, reduction="none"))


def test_answers_drawn_from_a_pool_lead_to_its_frequencies() -> None:
    frequency = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logits = frequency.log().repeat(10, 1).requires_grad_()
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    loss = forget("prior_relabelling", scores(logits, drawn, torch.arange(10)))
    torch.testing.assert_close(slope(loss, logits).sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-15, rtol=0)


def test_weight_penalties_pull_along_the_drift() -> None:
    drift = [torch.tensor([[1.0, -2.0]], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    importance = [torch.tensor([[0.5, 0.0]]), torch.tensor([2.0])]
    assert retain("l2", drift).tolist() == [7.0] and retain("ewc", drift, importance).tolist() == [9.25]
    assert {find(name, "retain").reduction for name in ("l2", "ewc")} == {"whole"}
    weighted = [f * d for f, d in zip(importance, drift, strict=True)]
    for loss, expected in ((retain("l2", drift), drift), (retain("ewc", drift, importance), weighted)):
        for part, pull in zip(drift, expected, strict=True):
            torch.testing.assert_close(slope(loss, part), pull.detach())
    with pytest.raises(ValueError, match="zip"):
        retain("ewc", drift, importance[:1])
