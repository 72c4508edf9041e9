"""Who trains when: hashes of names and nothing else; what a request costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import shard_tools
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from repforget.errors import UnknownNameError, UsageError
from repforget.shards import Settings, block_groups, expected_share, place, planned
from repforget.shards.plan import Stage, tracks
from repforget.store import digest
from repforget.training import Record

GROUP = (("layer.q",),)
MANY = tuple(Record(f"r{i}", f"c{i}", "a", " b") for i in range(600))


@pytest.mark.parametrize("changes", [
    {"lr": 0.1}, {"rank": 2}, {"alpha": 1.0}, {"epochs": 2}, {"batch_size": 3}, {"seed": 1}, {"schedule": "cosine"},
    {"weight_decay": 0.1}, {"groups": (("layer.k",),)}, {"unit": "record"},
])  # fmt: skip
def test_a_stage_is_known_by_all_that_its_bytes_follow_from(changes: dict[str, Any]) -> None:
    settings = Settings(GROUP, shards=2, slices=2)
    known = {digest(s.key) for s in planned(settings, "base", MANY[:9])}
    assert known.isdisjoint(digest(s.key) for s in planned(replace(settings, **changes), "base", MANY[:9]))
    assert known.isdisjoint(digest(s.key) for s in planned(settings, "another base", MANY[:9]))
    assert known == {digest(s.key) for s in planned(replace(settings, combine="mean"), "base", MANY[:9])}


@pytest.mark.parametrize(("shards", "slices"), [(1, 1), (1, 4), (3, 3), (4, 8)])
def test_one_request_costs_what_the_formula_says(shards: int, slices: int) -> None:
    settings = Settings(GROUP, shards=shards, slices=slices, epochs=3)
    stages = planned(settings, "base", MANY)
    before, whole = {digest(s.key) for s in stages}, sum(s.passes(settings) for s in stages)
    units: dict[tuple[int, int], list[Record]] = {}
    for record in MANY:
        units.setdefault(place(settings, record), []).append(record)
    cost = 0  # over all units: those of one shard and slice cost the same
    for same in units.values():
        left = planned(settings, "base", [r for r in MANY if r != same[0]])
        cost += len(same) * sum(s.passes(settings) for s in left if digest(s.key) not in before)
    wanted = (2 / 3 + 1 / (3 * slices)) / shards
    assert float(expected_share(settings)) == pytest.approx(wanted)
    assert cost / len(MANY) / whole == pytest.approx(wanted, rel=0.1)


def test_the_formula_is_the_mean_over_positions() -> None:
    for r in range(1, 9):
        passes = [sum(range(j, r + 1)) for j in range(1, r + 1)]  # stages j to R, over j slices each
        assert expected_share(Settings(GROUP, shards=1, slices=r)) == Fraction(sum(passes), r * passes[0])


@budget(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.sets(st.integers(0, 30), min_size=1, max_size=8))
def test_a_plan_without_records_is_the_plan_of_those_that_are_left(seed: int, gone: set[int]) -> None:
    settings = Settings(GROUP, shards=3, slices=3, seed=seed, batch_size=4, epochs=2)
    records = tuple(Record(f"r{i}-{k}", f"c{i}", "a", f" {k}") for i in range(31) for k in range(1 + i % 3))
    left = [r for r in records if int(r.cluster[1:]) not in gone]
    for one, other in zip(planned(settings, "b", records), planned(settings, "b", left), strict=True):
        for epoch in range(2):
            mine = [r for batch in one.batches(settings, epoch) for r in batch if r in left]
            assert mine == [r for batch in other.batches(settings, epoch) for r in batch]
        untouched = one.records == other.records
        assert untouched == (one.key == other.key)
    shuffled = planned(settings, "b", records[::-1])
    assert [s.key for s in shuffled] == [s.key for s in planned(settings, "b", records)]


def test_every_epoch_position_and_seed_has_an_order_of_its_own() -> None:
    settings = Settings(GROUP, shards=1, slices=2, batch_size=4, epochs=2)
    first, second = planned(settings, "b", MANY[:40])

    def order(stage: Stage, epoch: int, how: Settings = settings) -> list[Record]:
        return [r for batch in stage.batches(how, epoch) for r in batch if r in first.records]

    orders = (order(first, 0), order(first, 1), order(second, 0), order(first, 0, replace(settings, seed=1)))
    assert len({tuple(each) for each in orders}) == 4 and len({frozenset(each) for each in orders}) == 1


def test_a_unit_is_never_split_unless_the_unit_is_the_record() -> None:
    records = [Record(f"r{i}", f"c{i % 20}", "a", " b") for i in range(200)]
    settings = Settings(GROUP, shards=4, slices=4)
    assert all(len({place(settings, r) for r in records if r.cluster == f"c{k}"}) == 1 for k in range(20))
    single = replace(settings, unit="record")
    assert any(len({place(single, r) for r in records if r.cluster == f"c{k}"}) > 1 for k in range(20))
    spread = Counter(place(settings, r) for r in MANY)
    assert len(spread) == 16 and max(spread.values()) < 3 * min(spread.values())
    assert [place(settings, r) for r in MANY] != [place(replace(settings, seed=1), r) for r in MANY]


@pytest.mark.parametrize(("slices", "kept"), [(1, 1), (4, 4), (5, 3), (6, 2)])
def test_the_orders_form_a_latin_square(slices: int, kept: int) -> None:
    settings = Settings(GROUP * slices, slices=slices, order="s3t", permutations=kept)
    orders = tracks(settings)
    assert len(orders) == kept and all(sorted(order) == list(range(slices)) for order in orders)
    assert all(len(set(column)) == kept for column in zip(*orders, strict=True))


@pytest.mark.parametrize(("changes", "said"), [
    ({"shards": 0}, "shards is 0"), ({"lr": 0.0}, "lr 0.0"), ({"permutations": 2}, "only the order s3t"),
    ({"order": "s3t", "slices": 2, "permutations": 3}, "3 cyclic permutations of 2"),
    ({"order": "s3t", "slices": 2}, "1 groups of modules do not fit"), ({"groups": ((),)}, "groups of modules"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Settings(**{"groups": GROUP, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_modules_are_those_of_the_blocks_and_groups_come_from_the_top(architecture: str) -> None:
    module = shard_tools.model(architecture).module
    (every,) = block_groups(module, (), "sisa", 3)
    assert every and not any("head" in path or "embed" in path for path in every)
    top, bottom = block_groups(module, (), "s3t", 2)
    assert set(top) | set(bottom) == set(every) and not set(top) & set(bottom)
    assert all(".1." in path for path in top) and all(".0." in path for path in bottom)
    with pytest.raises(UnknownNameError, match="'quarry' matches no linear layer"):
        block_groups(module, ("quarry",), "sisa", 2)
    with pytest.raises(UsageError, match="the model has 2 blocks"):
        block_groups(module, (), "s3t", 3)


def test_a_pattern_that_leaves_a_group_empty_is_refused() -> None:
    module = shard_tools.model().module
    (one,) = block_groups(module, ("*layers.0.*.down_proj",), "sisa", 2)
    assert one == ("model.layers.0.mlp.down_proj",)
    with pytest.raises(UsageError, match="without any adapter"):
        block_groups(module, ("*layers.0.*.down_proj",), "s3t", 2)
