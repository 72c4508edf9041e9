"""Words that only a theorem allows, and how the theorem travels with an edit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import contract_tools
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repforget.artifact import Edit, load_edit
from repforget.artifact.operations import DenseDelta
from repforget.errors import UsageError
from repforget.guarantee import RESERVED, SUPPORTS, Guarantee, at_least, at_most, unearned
from repforget.report import tables

EXACT = Guarantee("exact", "Equal to training without 3 records.", "record", "Somebody 2020, theorem 1",
                  ("The order of records depends on their ids alone.",), {"records": 3.0})  # fmt: skip


def an_edit(guarantee: Guarantee | None = EXACT) -> Edit:
    model = contract_tools.tiny_model("llama")
    name, weight = next((n, p) for n, p in model.module.named_parameters() if "down_proj" in n)
    delta = DenseDelta(name, torch.ones_like(weight))
    return Edit.build("shard", {}, model, "0" * 64, [delta], guarantee=guarantee)


def test_reserved_words_need_a_theorem() -> None:
    for word in RESERVED:
        assert unearned(f"The record is {word.upper()}.") == (word,)
    assert unearned("The records were removed and deleted.", [EXACT]) == ()
    assert unearned("certified and removed", [EXACT, None]) == ("certified",)
    assert unearned("undeleted, uncertified") == ()  # whole words only


def test_the_theorem_is_saved_with_the_edit(tmp_path: Path) -> None:
    edit = an_edit()
    loaded = load_edit(edit.save(tmp_path / "edit"))
    assert loaded.manifest.guarantee == EXACT
    assert loaded.digest == edit.digest != an_edit(None).digest
    assert dict(tables.guarantee_rows(asdict(loaded.manifest)))["holds"] == EXACT.statement
    assert tables.guarantee_rows(asdict(an_edit(None).manifest)) == ()


def test_no_theorem_speaks_of_a_part_or_a_sum_of_edits() -> None:
    edit = an_edit()
    assert edit.scaled(1.0).manifest.guarantee == EXACT
    for changed in (edit.scaled(0.5), edit.inverse(), edit.then(edit)):
        assert changed.manifest.guarantee is None


def test_an_empty_theorem_is_refused() -> None:
    with pytest.raises(UsageError, match="says nothing"):
        Guarantee("exact", "x", "record", "y", ())
    with pytest.raises(UsageError, match="not known"):
        Guarantee("probable", "x", "record", "y", ("z",))  # type: ignore[arg-type]


@given(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False), st.integers(1, 6))
def test_a_bound_is_printed_no_smaller_than_it_is(value: float, digits: int) -> None:
    above, below = float(at_most(value, digits)), float(at_least(value, digits))
    assert below <= value <= above
    assert above - below <= 10 * abs(value) * 10.0**-digits, "and no further off than its digits allow"


def test_printed_bounds_are_not_larger_than_they_must_be() -> None:
    assert [at_most(x) for x in (0.01, 8.0, 2.001, 7.994, 1e-5)] == ["0.01", "8", "2.01", "8", "1e-05"]
    assert [at_least(x) for x in (0.1, 2.009, 1e-5)] == ["0.1", "2", "1e-05"]


@given(st.dictionaries(st.sampled_from(["epsilon", "distance bound", *SUPPORTS]), st.floats(1e-300, 1e300)))
def test_numbers_of_a_theorem_are_rounded_against_it(numbers: dict[str, float]) -> None:
    """What a promise rests on is never printed larger than it is, what is lost never smaller, a count as it is."""
    printed = dict(Guarantee("exact", "x", "record", "y", ("z",), numbers).lines()).get("numbers", "")
    shown = {name: float(text) for name, _, text in (part.rpartition(" ") for part in printed.split(", ") if part)}
    assert set(shown) == set(numbers)
    for name, value in numbers.items():
        assert shown[name] <= value if name in SUPPORTS else shown[name] >= value
    counted = Guarantee("exact", "x", "record", "y", ("z",), {"rows left": 123456789, "noise": 7.0}).lines()[-1][1]
    assert counted == "noise 7, rows left 123456789"
