"""Sums of integers from which a client is taken off bit for bit, where floats only come near."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import NumericalError, UsageError
from repforget.federated.aggregate import aggregate
from repforget.federated.exact_sum import ExactSum
from repforget.federated.records import Update


def update(number: int) -> Update:
    draw = np.random.default_rng(number)
    return Update(f"c{number}", number + 1, {"w": draw.standard_normal(50) * 10.0 ** draw.integers(-4, 3, 50)})


def total(numbers: list[int]) -> ExactSum:
    found = ExactSum()
    for number in numbers:
        found = found.plus(update(number))
    return found


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(7)), leaving=st.sets(st.integers(0, 6), max_size=6))
def test_what_leaves_was_never_there(order: list[int], leaving: set[int]) -> None:
    found = total(order)
    for number in leaving:
        found = found.minus(update(number))
    never = total([number for number in range(7) if number not in leaving])
    assert found.records == never.records and found.clients == never.clients
    assert found.tensors["w"].tobytes() == never.tensors["w"].tobytes()
    assert found.mean()["w"].tobytes() == never.mean()["w"].tobytes()
    exact = aggregate([update(number) for number in range(7) if number not in leaving])["w"]
    assert np.abs(never.mean()["w"] - exact).max() < 2.0**-40


def test_floats_do_not_come_back() -> None:
    sums = sum(update(n).records * update(n).tensors["w"] for n in range(7))
    never = sum(update(n).records * update(n).tensors["w"] for n in range(6))
    assert (sums - 7 * update(6).tensors["w"] != never).any()


def test_the_last_client_leaves_nothing_and_wrong_requests_are_refused() -> None:
    empty = total([3]).minus(update(3))
    assert not empty.tensors and not empty.records and not empty.clients
    with pytest.raises(UsageError, match="no client"):
        empty.mean()
    with pytest.raises(UsageError, match="'c3' is in the sum already"):
        total([3]).plus(update(3))
    with pytest.raises(UsageError, match="'c4' is not in the sum"):
        total([3]).minus(update(4))
    with pytest.raises(UsageError, match="'x' sent other tensors"):
        total([3]).plus(Update("x", 1, {"w": np.zeros(3)}))
    for bad in (np.nan, np.inf, 1e12):
        with pytest.raises(NumericalError, match="client 'x' to 'w' is too large"):
            total([3]).plus(Update("x", 1000, {"w": np.full(50, bad)}))


def test_what_was_added_can_be_taken_off_close_to_the_limit() -> None:
    small, large = (Update(name, 1, {"w": np.full(2, share * 2.0**22)}) for name, share in (("a", 0.6), ("b", 0.3)))
    found = ExactSum().plus(small).plus(large).minus(large)
    assert found.tensors["w"].tobytes() == ExactSum().plus(small).tensors["w"].tobytes()
    with pytest.raises(NumericalError):
        found.plus(Update("c", 1, {"w": np.full(2, 0.5 * 2.0**22)}))


def test_adapters_are_multiplied_out() -> None:
    left, right = np.ones((3, 2)), np.full((2, 4), 0.5)
    found = ExactSum().plus(Update("a", 2, {"w.left": left, "w.right": right}))
    assert np.array_equal(found.mean()["w"], left @ right)
