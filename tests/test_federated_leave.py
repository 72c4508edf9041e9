# ruff: noqa: F811 (the fixture is imported by its name)
"""A client leaves: what is exact is exact, what is not says nothing, and its updates go."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from test_federated_run import data, final, go, model_of, plan, same  # noqa: F401

from repforget.artifact import load_edit
from repforget.errors import UsageError
from repforget.federated.history import History
from repforget.federated.leave import leave
from repforget.federated.run import Setup
from repforget.federated.sources import Source
from repforget.guarantee import unearned
from repforget.models.load import fingerprint, wrap


def test_training_again_without_a_client_is_the_training_that_never_had_it(
    data: dict[str, Source], tmp_path: Path
) -> None:
    base, run = model_of(), tmp_path / "run"
    go(base, plan(3), data, run, "bob:2:error", "cid:3:nan")
    made = leave(base, run, "bob", "retrain", tmp_path / "kept", keep_record=True)
    others = {name: source for name, source in data.items() if name != "bob"}
    go(base, plan(3), others, tmp_path / "never", "cid:3:nan")
    assert same(final(tmp_path / "kept"), final(tmp_path / "never"))
    assert not same(final(tmp_path / "kept"), final(run))
    never = load_edit(tmp_path / "never" / "edit").operations
    for a, b in zip(made.operations, never, strict=True):
        assert a.kind == b.kind and all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("u", "v", "delta")
                                        if hasattr(a, f))  # fmt: skip
    assert made.manifest.guarantee is not None and made.manifest.guarantee.kind == "exact"
    second = leave(base, tmp_path / "kept", "cid", "retrain", tmp_path / "ann")  # what came out can be left again
    assert second.manifest.guarantee is not None
    go(base, plan(3), {"ann": data["ann"]}, tmp_path / "alone")
    assert same(final(tmp_path / "ann"), final(tmp_path / "alone"))
    assert History.open(run / "history").clients() == {"ann": 3, "bob": 2, "cid": 2}


@pytest.mark.parametrize("method", ["federaser", "rollback", "client"])
def test_other_ways_promise_nothing_and_the_updates_leave_the_record(
    method: Any, data: dict[str, Source], tmp_path: Path
) -> None:
    base, run, said = model_of(), tmp_path / "run", list[str]()
    before = fingerprint(base.module)
    go(base, plan(2, rank=0, lr=3e-3, weights=("down_proj",)), data, run)
    trained = load_edit(run / "edit")
    made = leave(base, run, "bob", method, tmp_path / "out", editor="grad_ascent", note=said.append)
    assert made.manifest.guarantee is None and made.digest != trained.digest
    assert load_edit(tmp_path / "out" / "edit").digest == made.digest and fingerprint(base.module) == before
    cost = json.loads((tmp_path / "out" / "forget.json").read_text())
    assert cost["trainings"] == {"federaser": 2, "rollback": 0, "client": 4}[method]
    assert (cost["up"] > 0) == (method != "rollback")
    assert any("the updates of 'bob' have left" in line for line in said)
    assert not any(unearned(line) for line in (*said, *made.manifest.notes))
    assert list(History.open(run / "history").clients()) == ["ann", "cid"]
    assert naming("bob", run) == naming("bob", tmp_path / "out") == []
    assert Setup.read(run).has_left("bob") and not Setup.read(run).has_left("ann")
    with pytest.raises(UsageError, match="A client was forgotten"):
        go(base, plan(2, rank=0, lr=3e-3, weights=("down_proj",)), data, run)


def naming(word: str, folder: Path) -> list[str]:
    """The files of a folder that hold a word, or are named by it."""
    return [p.name for p in folder.rglob("*") if p.is_file() and (word.encode() in p.read_bytes() or word in p.name)]


def test_calibration_trains_for_the_share_that_was_asked_for(data: dict[str, Source], tmp_path: Path) -> None:
    base, run = model_of(), tmp_path / "run"
    go(base, plan(2, rank=0, lr=3e-3, weights=("down_proj",)), data, run)
    half, whole = (leave(base, run, "bob", "federaser", tmp_path / f"{share}", local_share=share, keep_record=True)
                   for share in (0.5, 1.0))  # fmt: skip
    assert any(not torch.equal(a.delta, b.delta)  # type: ignore[union-attr]
               for a, b in zip(half.operations, whole.operations, strict=True))  # fmt: skip


def test_where_the_clients_are_elsewhere_only_the_record_can_be_used(data: dict[str, Source], tmp_path: Path) -> None:
    base, run = model_of(), tmp_path / "run"
    go(base, plan(1), data, run)
    setup = Setup.read(run)
    dataclasses.replace(setup, sources={}).write(run)
    with pytest.raises(UsageError, match="are with the client, not here"):
        leave(base, run, "bob", "retrain", tmp_path / "out")
    with pytest.raises(UsageError, match="load the same model"):
        leave(wrap(tiny_models.build("llama", seed=3), base.tokenizer), run, "bob", "rollback", tmp_path / "out")
    assert History.open(run / "history").clients()["bob"] == 1
    leave(base, run, "bob", "rollback", tmp_path / "out")
    assert "bob" not in History.open(run / "history").clients()
