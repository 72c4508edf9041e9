"""Bases, records and folders of an unusual kind, and the same property: bit for bit as if never trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import shard_tools
import torch

from repforget.errors import ArtifactError, UsageError
from repforget.models.load import LoadedModel, wrap
from repforget.shards import begin, take_out
from repforget.training import Record

PEOPLE = shard_tools.people()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return shard_tools.model()


def test_another_precision_is_another_base(tmp_path: Path) -> None:
    """Its weights have the same fingerprint, but half of the slices would be trained on other numbers."""
    model = shard_tools.model()
    half = wrap(model.module.to(torch.bfloat16), model.tokenizer, model.name)
    training = shard_tools.trained(tmp_path / "t", half, PEOPLE)
    wide = wrap(shard_tools.model().module.to(torch.bfloat16).float(), model.tokenizer, model.name)
    assert wide.fingerprint == half.fingerprint
    with pytest.raises(ArtifactError, match=r"bfloat16\) and .* float32"):
        take_out(training, ["w31"], lambda: wide)
    with pytest.raises(ArtifactError, match="load the base as it was"):
        begin(training.root, wide, training.settings, PEOPLE)


def test_transposed_layers_and_a_module_in_training_mode(tmp_path: Path) -> None:
    base = shard_tools.model("gpt2")
    base.module.train()  # its dropout draws
    changes: dict[str, Any] = {"modules": ("c_attn", "c_proj")}
    left, _ = take_out(shard_tools.trained(tmp_path / "t", base, PEOPLE, **changes), ["w31"], lambda: base)
    again = shard_tools.trained(tmp_path / "s", base, [r for r in PEOPLE if r.cluster != "w31"], **changes)
    assert shard_tools.slices(left) == shard_tools.slices(again)


def test_whatever_characters_a_record_has(base: LoadedModel, tmp_path: Path) -> None:
    spaces = "\x0b\x85\u2028\u2029\n"
    odd = [Record(f"a{c}b", f"who{c}", f"w30{c if c in spaces else ''} works in", " Rome")
           for c in "\x0b\x1c\x85\u2028\u2029\n\\\""]  # fmt: skip
    records = (*PEOPLE, *odd, Record("caf\u00e9", "e", "who is", " Oslo"), Record("cafe\u0301", "f", "who is", " Oslo"))
    training = shard_tools.trained(tmp_path / "t", base, records)
    assert set(training.records) == set(records)
    gone = [odd[2].id, odd[3].cluster, "caf\u00e9"]
    left, outcome = take_out(training, gone, lambda: base)
    assert outcome.records == 3 and outcome.same_text == 1
    others = [r for r in records if not {r.id, r.cluster} & {*gone}]
    assert shard_tools.slices(left) == shard_tools.slices(shard_tools.trained(tmp_path / "s", base, others))
    with pytest.raises(UsageError, match="half of a character"):
        begin(tmp_path / "u", base, training.settings, (*PEOPLE, Record("a\ud800", "a", "", "it is")))
    assert not (tmp_path / "u").exists()


def test_a_start_that_was_killed_can_be_repeated(base: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".records.jsonl.tmp-4711").write_text("w30 half")
    training = begin(tmp_path / "t", base, shard_tools.settings(base), PEOPLE)
    with training.store.locked():
        assert b"half" not in b"".join(shard_tools.texts_in(training.root))
