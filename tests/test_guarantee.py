"""Words that only a theorem allows, and how the theorem travels with an edit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import contract_tools
import pytest
import torch

from repforget.artifact import Edit, load_edit
from repforget.artifact.operations import DenseDelta
from repforget.errors import UsageError
from repforget.guarantee import RESERVED, Guarantee, unearned
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
