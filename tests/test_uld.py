"""ULD: the composition against plain code, the assistant against the model it is cut from, and what comes of both."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from edit_models import model as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import data, knows, model
from torch import Tensor

from repforget.artifact import Edit, LowRankDelta
from repforget.edit._dispatch import edit
from repforget.edit.train._data import fact_rows
from repforget.edit.train._settings import Settings
from repforget.edit.train.uld import _assistant, composed, shallow, teach
from repforget.errors import NoEffectError, UsageError
from repforget.models.capture import Batch, capture, forward
from repforget.models.load import LoadedModel, fingerprint
from repforget.models.readout import lens
from repforget.records import Site

USUAL: dict[str, Any] = {"steps": 60, "lr": 3e-3, "assistant_steps": 50, "assistant_lr": 1e-2, "top_k": 64,
         "retain_batch": 12}
PROPERTY = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10**6)


def drawn(seed: int, spread: float = 4.0) -> Tensor:
    return spread * torch.randn(5, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plainly(base: list[float], assistant: list[float], weight: float, top: float) -> list[float]:
    """The composed probabilities of one position, token by token."""
    p = [math.exp(z) / sum(map(math.exp, base)) for z in base]
    q = [math.exp(z) / sum(map(math.exp, assistant)) for z in assistant]
    likeliest = sorted(p, reverse=True)[: max(1, int(top * len(p)))]
    counts = [top == 0 or x >= top * max(p) or x in likeliest for x in p]
    scores = [math.log(x) + weight * math.log(y * len(p)) * c for x, y, c in zip(p, q, counts, strict=True)]
    return [math.exp(s) / sum(map(math.exp, scores)) for s in scores]


@PROPERTY
@given(seeds, st.floats(-2.0, 0.0), st.sampled_from([0.0, 0.05, 0.1, 0.4, 1.0]))
def test_the_composition_is_its_formula(seed: int, weight: float, top: float) -> None:
    base, assistant = drawn(seed), drawn(seed + 1)
    found = composed(base, assistant, weight, top).exp()
    for k in range(len(base)):
        expected = plainly(base[k].tolist(), assistant[k].tolist(), weight, top)
        np.testing.assert_allclose(found[k].numpy(), expected, rtol=1e-9, atol=1e-12)


@PROPERTY
@given(seeds, st.floats(-2.0, 0.0), st.floats(0.0, 1.0), st.floats(-50.0, 50.0))
def test_a_uniform_assistant_and_a_weight_of_zero_change_nothing(
    seed: int, weight: float, top: float, level: float
) -> None:
    base = drawn(seed)
    own = base.log_softmax(-1)
    torch.testing.assert_close(composed(base, torch.full_like(base, level), weight, top), own, atol=1e-9, rtol=0)
    torch.testing.assert_close(composed(base, drawn(seed + 1), 0.0, top), own, atol=1e-9, rtol=0)


def test_what_the_assistant_is_sure_of_goes_and_what_the_model_finds_impossible_stays_so() -> None:
    base = torch.tensor([[9.0, 2.0, 1.0, *[-9.0] * 37]])
    assistant = torch.tensor([[20.0, *[0.0] * 39]])
    found = composed(base, assistant, -1.0, 0.1).exp()[0]
    assert found[0] < 0.01 < 0.99 < base.softmax(-1)[0, 0]
    assert found[1] > 0.5 and float(found[4:].sum()) < 0.01


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox", "falcon", "mixtral", "phi"])
def test_the_assistant_is_the_lower_part_of_the_model_and_shares_its_weights(architecture: str) -> None:
    whole = tiny(architecture)
    before = fingerprint(whole.module)
    small = shallow(whole, 1)
    assert (small.n_layers, whole.n_layers) == (1, 2)
    own = {id(p) for p in small.module.parameters()}
    assert own < {id(p) for p in whole.module.parameters()}
    batch = Batch.pad([[5, 7, 9, 11], [6, 8]])
    state = capture(whole, [Site("resid_post", 0)], batch, gather="all")[Site("resid_post", 0)]
    expected, found = lens(whole, state), forward(small, batch)
    torch.testing.assert_close(found[batch.mask.bool()], expected[batch.mask.bool()], atol=1e-5, rtol=1e-4)
    assert not torch.equal(forward(whole, batch)[0], found[0])
    assert fingerprint(whole.module) == before


@cache
def done() -> Edit:
    return edit(model(), data(), "uld", **USUAL)


def helped() -> tuple[LoadedModel, LoadedModel, Edit]:
    whole = model()
    small = shallow(whole, 1)
    return whole, small, _assistant(small, data(), Settings(), 50, 1e-2, 16, 5.0, 0, None)


def test_the_teacher_is_the_composition_and_always_holds_the_true_token() -> None:
    whole, small, learned = helped()
    rows, _ = fact_rows(whole, data().forget, "forget")
    with learned.attach(small):
        made = teach(whole, small, rows, -1.0, 0.1, 9)
        plain = [m.module(input_ids=torch.tensor([rows[3].ids])).logits[0].detach() for m in (whole, small)]
        assert knows(small, data().forget).probability > 0.8, "the assistant remembers"
        assert knows(small, data().retain).loss > 2.0, "and knows nothing else"
    assert fingerprint(whole.module) == whole.fingerprint
    for row, (best, told) in zip(rows, made, strict=True):
        assert all(token in found for token, found in zip(row.ids[row.start :], best.tolist(), strict=True))
        torch.testing.assert_close(told.exp().sum(-1), torch.ones(row.labels), atol=1e-5, rtol=0)
    row, (best, told) = rows[3], made[3]
    aim = composed(*(logits[row.start - 1 : len(row.ids) - 1] for logits in plain), -1.0, 0.1)
    torch.testing.assert_close(told[:, :-1].double(), aim.gather(-1, best), atol=1e-4, rtol=1e-3)


def test_it_forgets_and_keeps_in_the_weights_alone() -> None:
    subject = model()
    assert done().artifact == "weights"
    before = knows(subject, data().forget), knows(subject, data().retain)
    with done().attach(subject):
        forget, retain = knows(subject, data().forget), knows(subject, data().retain)
    assert before[0].probability > 0.97
    assert forget.probability < 0.3
    assert retain.loss < before[1].loss + 0.3


def test_an_adapter_carries_it_too() -> None:
    made = edit(model(), data(), "uld", adapter="lora", rank=4, **{**USUAL, "steps": 3, "assistant_steps": 3})
    assert all(isinstance(op, LowRankDelta) for op in made.operations)


def test_a_weight_of_zero_has_no_effect_and_wrong_settings_are_refused() -> None:
    subject = model()
    with pytest.raises(NoEffectError, match="below 0"):
        edit(subject, data(), "uld", weight=0.0)
    for wrong in ({"weight": 0.5}, {"top": 2.0}, {"assistant_layers": 3}, {"top_k": 0}):
        with pytest.raises(UsageError, match="the weight is below 0"):
            edit(subject, data(), "uld", **wrong)
