"""How a step is cut: every unit once, within the budget, at the least cost, equal texts together."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from repforget.edit.train._engine import _looked_up, _take
from repforget.edit.train._parts import Budget, Text, cut

TEXTS = st.tuples(st.integers(0, 2), st.integers(1, 12)).map(lambda p: (p[0],) * p[1])
UNITS = st.lists(st.lists(TEXTS, min_size=1, max_size=2), max_size=8)


def padded(units: list[list[Text]], part: list[int]) -> int:
    texts = [text for i in part for text in units[i]]
    return len(texts) * max(map(len, texts))


@given(UNITS, st.integers(1, 60), st.integers(0, 20), st.integers(1, 4))
def test_every_unit_is_in_one_part_and_no_part_that_could_be_cut_is_too_large(
    units: list[list[Text]], tokens: int, extra: int, least: int
) -> None:
    found = cut(units, Budget(tokens, extra), least)
    assert sorted(i for part in found for i in part) == list(range(len(units)))
    assert all(padded(units, part) <= tokens or len({units[i][0] for i in part}) == 1 for part in found)
    home = {}
    for number, part in enumerate(found):
        for i in part:
            assert home.setdefault(units[i][0], number) == number or len(units[i]) > 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7, unique=True), st.integers(12, 60), st.integers(0, 20))
def test_no_other_cut_by_length_costs_less(lengths: list[int], tokens: int, extra: int) -> None:
    units = [[(n,) * n] for n in lengths]
    order = sorted(range(len(units)), key=lambda i: lengths[i])

    def cost(parts: list[list[int]]) -> int:
        return sum(padded(units, part) + extra for part in parts)

    best = min(
        cost(parts)
        for k in range(len(units)) for ends in combinations(range(1, len(units)), k)
        for parts in [[order[a:b] for a, b in zip((0, *ends), (*ends, len(order)), strict=True)]]
        if all(padded(units, part) <= tokens for part in parts)
    )  # fmt: skip
    assert cost(cut(units, Budget(tokens, extra))) == best


@pytest.mark.parametrize("least", [2, 3, 5])
def test_as_many_parts_as_asked_for(least: int) -> None:
    assert len(cut([[(i,) * 7] for i in range(10)], Budget(10**6, 10**6), least)) >= least


def test_nothing_to_cut_is_no_part() -> None:
    assert cut([], Budget(10, 1)) == []


@pytest.mark.parametrize(("name", "rows_only"), [("llama", True), ("llama_tied", False), ("gpt2", False)])
def test_gradients_of_an_embedding_that_is_looked_up_add_up(name: str, rows_only: bool) -> None:
    model = tiny_models.build(name)
    ids = torch.tensor(tiny_models.sample_ids(3, 7)[::3])
    parameters = list(model.parameters())
    totals: list[torch.Tensor | None] = [None] * len(parameters)
    sparse: list[bool] = []

    def loss() -> torch.Tensor:
        return model(ids, use_cache=False).logits.float().log_softmax(-1)[..., 5].sum()

    def take(place: int, parameter: torch.Tensor) -> None:
        sparse.append(parameter.grad is not None and parameter.grad.is_sparse)
        _take(totals, place, parameter)

    for _ in range(2):
        with _looked_up(model, parameters):
            handles = [p.register_post_accumulate_grad_hook(partial(take, i)) for i, p in enumerate(parameters)]
            torch.autograd.backward(loss(), inputs=parameters)
            for handle in handles:
                handle.remove()
    assert any(sparse) == rows_only and not model.get_input_embeddings().sparse
    for total, once in zip(totals, torch.autograd.grad(loss(), parameters), strict=True):
        assert total is not None and not total.is_sparse
        torch.testing.assert_close(total, 2 * once, rtol=1e-4, atol=1e-5)
