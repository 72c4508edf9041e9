"""Unlearning at the client: an editor's change of the global model, as an update of the federation's weights."""

from __future__ import annotations

import edit_models
import numpy as np
import pytest
import torch

from repforget.errors import UsageError
from repforget.federated.aggregate import applied
from repforget.federated.clients import Client, changed, local_settings, record_loss, untouched
from repforget.federated.local import unlearned
from repforget.federated.messages import Task
from repforget.models.load import fingerprint
from repforget.training import Record, collate

RECORDS = [Record(f"r{i}", "Ada red", f"Ada red was born in {place} the cat", f" {job}")
           for i, (place, job) in enumerate([("Rome", "baker"), ("Paris", "pilot"), ("Oslo", "doctor")])]  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_clients_records_are_unlearned_in_the_weights_of_the_federation(architecture: str, rank: int) -> None:
    model = edit_models.model(architecture)
    before = fingerprint(model.module)
    weights = ("down_proj",) if architecture == "llama" else ("mlp.c_proj.weight",)
    local = local_settings(model, weights=weights, rank=rank, lr=0.02, epochs=10)
    client = Client.of("ann", model, RECORDS)
    state = untouched(model, local)
    learnt = client.work(Task(1, local, state)).update
    assert learnt is not None
    state = applied(state, learnt.tensors)
    update = unlearned("ann", model, local, state, RECORDS, "grad_ascent", steps=15, lr=1e-2, max_retain_rise=9.0)
    assert fingerprint(model.module) == before and update.client == "ann" and update.records == 3
    assert update.tensors.keys() == set(local.weights)

    def loss(weights: dict[str, np.ndarray]) -> float:
        with changed(model.module, local, weights), torch.no_grad():
            return float(record_loss(model.module, collate(client.examples, "cpu")))

    assert loss(applied(state, update.tensors)) > loss(state) + 0.05
    assert loss(applied(state, update.tensors, -1.0)) < loss(applied(state, update.tensors))


def test_hooks_other_weights_and_texts_are_refused() -> None:
    model = edit_models.model()
    local = local_settings(model, weights=("down_proj",), rank=0)
    state = untouched(model, local)
    with pytest.raises(UsageError, match="changed 'model.layers.*which the federation does not train"):
        unlearned("ann", model, local, state, RECORDS, "grad_ascent", steps=2, targets=["up_proj"])
    with pytest.raises(UsageError, match="text without a prompt"):
        unlearned("ann", model, local, state, [Record("t", "x", "", "the cat is a dog")])
    with pytest.raises(UsageError, match="leaves hooks behind"):
        people = edit_models.people()
        facts = [Record(f.id, f.cluster, f.prompt, f.answer) for f in people.for_editor().forget]
        unlearned("ann", model, local, state, facts, "leace", sites=["resid_post.0"], metric="concept", rank=1)
