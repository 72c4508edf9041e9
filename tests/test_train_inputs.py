"""What a trained editor refuses, each in one sentence that leaves the model as it was; and odd sizes that must work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import edit_models
import pytest
import torch

from repforget.edit._dispatch import edit
from repforget.errors import KnowledgeError, NoEffectError, NumericalError, RepforgetError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel, fingerprint
from repforget.records import Component, Localization, RandomBand, Site

SMALL: dict[str, Any] = {"steps": 2, "batch_size": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    found = edit_models.model("gpt2")
    found.module.requires_grad_(False)
    return found  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def data() -> EditData:
    return edit_models.people().for_editor()


def refused(model: LoadedModel, data: EditData, error: type[RepforgetError], words: str, method: str = "npo",
            **given: Any) -> None:  # fmt: skip
    with pytest.raises(error, match=words) as caught:
        edit(model, data, method, **{**SMALL, **given})
    said = str(caught.value)
    assert "\n" not in said and said.endswith((".", "?"))
    assert fingerprint(model.module) == model.fingerprint
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


@pytest.mark.parametrize(("given", "words"), [
    ({"lr": -1.0}, "lr -1.0"), ({"lr": float("nan")}, "lr nan"), ({"weight_decay": -0.1}, "weight_decay"),
    ({"clip": -1.0}, "clip"), ({"max_retain_rise": -1.0}, "max_retain_rise"), ({"retain_batch": 0}, "retain_batch"),
    ({"steps": -1}, "negative number of steps"), ({"check_every": 0}, "check_every"),
])  # fmt: skip
def test_numbers_out_of_range(model: LoadedModel, data: EditData, given: dict[str, Any], words: str) -> None:
    refused(model, data, UsageError, words, **given)


def test_no_facts_that_fit_the_context(model: LoadedModel, data: EditData) -> None:
    long = tuple(dataclasses.replace(fact, prompt="the cat is a dog " * 60 + fact.prompt) for fact in data.forget)
    refused(model, dataclasses.replace(data, forget=long), KnowledgeError, "fits the model's context of")


def test_an_answer_without_tokens(model: LoadedModel, data: EditData) -> None:
    empty = (dataclasses.replace(data.forget[0], answer=""), *data.forget[1:])
    refused(model, dataclasses.replace(data, forget=empty), KnowledgeError, "has no tokens")


def test_another_answer_that_is_too_long(model: LoadedModel, data: EditData, tmp_path: Path) -> None:
    ids = sorted({fact.id.rpartition("#")[0] for fact in data.forget})
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "answers": ["cat " * 300]}) for i in ids))
    refused(model, data, KnowledgeError, "in the place of its answer does not fit", "idk_nll", answers=str(path))


def test_a_localisation_without_weights(model: LoadedModel, data: EditData) -> None:
    site = Component(Site("final_norm"))
    where = Localization("probe_sweep", (site,), (1.0,), RandomBand(1, 20, 0.9, 0.1, 0.2, "recovery"))
    with pytest.raises(RepforgetError, match="weights"):
        edit(model, data, "npo", where=where, mask=True, **SMALL)
    assert fingerprint(model.module) == model.fingerprint


def test_targets_that_no_adapter_takes(model: LoadedModel, data: EditData) -> None:
    refused(model, data, UsageError, "None of the targets can carry an adapter", adapter="lora", targets=["ln_1"])


def test_nothing_changes(model: LoadedModel, data: EditData) -> None:
    refused(model, data, NoEffectError, "changes nothing", steps=0)
    refused(model, data, NoEffectError, "changes nothing", lr=0.0)


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_divergence_is_seen_at_once_where_numbers_overflow(model: LoadedModel, data: EditData, lr: float) -> None:
    refused(model, data, NumericalError, "before anything good was reached", "grad_ascent", lr=lr, steps=6, warmup=0,
            optimizer="sgd", clip=0.0)  # fmt: skip


@pytest.mark.parametrize(("facts", "settings"), [
    (1, {"batch_size": 4, "accumulate": 4}), (3, {"batch_size": 8, "accumulate": 8, "retain_batch": 1}),
    (5, {"batch_size": 3, "accumulate": 2, "combine": "pcgrad"}),
])  # fmt: skip
def test_fewer_rows_than_parts(model: LoadedModel, data: EditData, facts: int, settings: dict[str, Any]) -> None:
    few = dataclasses.replace(data, forget=data.forget[:facts])
    parted = edit(model, few, "npo", **{**SMALL, "optimizer": "sgd", **settings})
    whole = edit(model, few, "npo", **{**SMALL, "optimizer": "sgd", **settings, "accumulate": 1})
    for one, two in zip(parted.operations, whole.operations, strict=True):
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(two, name), value, rtol=1e-4, atol=1e-7)


def test_without_retained_facts_it_trains_where_nothing_is_to_be_kept_and_says_so(
    model: LoadedModel, data: EditData
) -> None:
    bare = dataclasses.replace(data, retain=(), pool={})
    made = edit(model, bare, "npo", retain="none", **{**SMALL, "steps": 30, "lr": 1e-2, "check_every": 3})
    (said,) = made.manifest.notes
    assert "mean probability of forget answers" in said and said.endswith("no retained facts to watch: what it costs "
                                                                          "was not seen")  # fmt: skip
    watched = edit(model, data, "npo", retain="none", **SMALL)
    assert "retain loss" in watched.manifest.notes[0]
    refused(model, bare, KnowledgeError, "'retain' has no facts")
    refused(model, bare, NumericalError, "forget answers became nan", "grad_ascent", retain="none", lr=1e30, clip=0.0)
