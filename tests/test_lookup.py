"""A trained embedding cut down to the rows of the data: the same training, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_tools import tiny_data, tiny_model

from repforget.artifact import SparseDelta
from repforget.edit._dispatch import edit
from repforget.edit.train import _lookup
from repforget.edit.train._lookup import looked_up, lookup
from repforget.edit.train._objective import find
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import Wanted, _terms
from repforget.models.load import LoadedModel

EMBEDDING = "model.embed_tokens.weight"


def opened(name: str = "llama", method: str = "npo", **shared: Any) -> tuple[LoadedModel, Any]:
    model, objective, settings = tiny_model(name), find(method), Settings(**shared)
    wanted = Wanted(objective, objective.bound({}), "forget", "forget", 1.0, settings.answers)
    terms = _terms(model, tiny_data(), [wanted], settings, 0)
    return model, lookup(model, settings, terms, [n for n, _ in model.module.named_parameters()])


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov", "adagrad", "adadelta", "sign"])
def test_training_is_that_of_the_whole_table(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, found = tiny_model("llama"), tiny_data(), []
    settings: dict[str, Any] = {"steps": 3, "batch_size": 4, "lr": 0.01, "optimizer": optimizer,
                                "targets": ["embed", "down"]}  # fmt: skip
    for worth in (1.0, 0.0):
        monkeypatch.setattr(_lookup, "WORTH", worth)
        found.append(edit(model, data, "npo", **settings))
    table = dict(model.module.named_parameters())[EMBEDDING].detach().clone()
    states = [dict(one.applied_to(model).module.named_parameters()) for one in found]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=2e-5)
    moved = (states[0][EMBEDDING] != table).any(1)
    known = {token for row in data.forget + data.retain for token in model.tokenizer(row.prompt + row.answer).input_ids}
    assert moved.any() and set(moved.nonzero()[:, 0].tolist()) <= known
    assert torch.equal(dict(model.module.named_parameters())[EMBEDDING], table)
    assert "forward" not in vars(model.module.get_input_embeddings())


def test_its_change_is_stored_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lookup, "WORTH", 1.0)
    made = edit(tiny_model("llama"), tiny_data(), "npo", steps=1, batch_size=4, targets=["embed"])
    assert [type(operation) for operation in made.operations] == [SparseDelta]


def test_texts_read_the_same_and_other_tokens_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lookup, "WORTH", 1.0)
    model, found = opened()
    assert found is not None
    other = next(i for i in range(model.vocab_size) if i not in found.tokens)
    ids = torch.tensor([[*found.tokens[:4].tolist(), other]])
    before = model.module(ids).logits
    with looked_up(found):
        with torch.no_grad():
            assert torch.equal(model.module(ids).logits, before)
        model.module(ids[:, :4]).logits.sum().backward(inputs=[found.rows])
        assert found.rows.grad is not None and bool((found.rows.grad != 0).any(1)[:4].any())
        with pytest.raises(RuntimeError, match=f"token {other}"):
            model.module(ids)


@pytest.mark.parametrize(
    ("name", "method", "shared"),
    [("llama_tied", "npo", {}), ("llama", "npo", {"weight_decay": 0.1}), ("llama", "altpo", {"answers": "fresh"})],
)
def test_where_other_rows_may_change_the_whole_table_is_trained(
    name: str, method: str, shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lookup, "WORTH", 1.0)
    assert opened(name, method, **shared)[1] is None
    assert opened()[1] is not None
