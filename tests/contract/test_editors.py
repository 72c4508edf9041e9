"""What every editor owes, found by discovery: an exact, deterministic, reversible, portable and honest Edit."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

import repforget.edit as room
from repforget import discover
from repforget.artifact import Edit, load_edit, placebo_of
from repforget.edit._dispatch import edit as run_editor
from repforget.errors import RecipeError, RepforgetError
from repforget.knowledge import EditData, Item, Knowledge
from repforget.models.capture import Batch, forward
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.training import Example, finetune

NAMES = discover.names("edit")
ARCHITECTURES = ("llama", "gpt2")
PEOPLE = ("Ada", "Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon")
VALUES = {"born in": ("Berlin", "Paris", "Rome", "Oslo"), "job": ("baker", "pilot", "doctor")}
# Budgets for a model of two layers: applied to whichever of these settings an editor has.
SMALL: dict[str, Any] = {"steps": 3, "epochs": 1, "max_steps": 3, "batch_size": 8}
# Two layers hardly tell forget people from others, so that a gate has to open for some of them.
_FOLDERS: dict[str, tempfile.TemporaryDirectory[str]] = {}


def _sharded(model: LoadedModel) -> dict[str, Any]:
    """A training on shards of all people, of which the forget people are then taken out."""
    from repforget.shards import Settings, begin, block_groups, complete
    from repforget.training import records_of

    if model.fingerprint not in _FOLDERS:
        _FOLDERS[model.fingerprint] = tempfile.TemporaryDirectory()
        settings = Settings(block_groups(model.module, (), "sisa", 2), shards=2, slices=2, epochs=1, batch_size=64)
        records = records_of(knowledge(), ("forget", "retain"), "statements")
        complete(begin(_FOLDERS[model.fingerprint].name, model, settings, records), model)
    return {"folder": _FOLDERS[model.fingerprint].name}


def _trained(model: LoadedModel) -> dict[str, Any]:
    """A plain training on the forget people, which the editor then makes indistinguishable from none."""
    from repforget.private import run
    from repforget.training import records_of

    name = f"trained {model.fingerprint}"
    if name not in _FOLDERS:
        _FOLDERS[name] = tempfile.TemporaryDirectory()
        run(model, records_of(knowledge(), ("forget",)), Path(_FOLDERS[name].name), rank=2, epochs=1)
    return {"training": _FOLDERS[name].name, "repair": 3, "secret": False}


def _unembedded(model: LoadedModel) -> dict[str, Any]:
    """An unembedding trained on the forget people and a few others."""
    from repforget.edit.exact import _unembedding
    from repforget.training import records_of

    name = f"unembedding {model.fingerprint}"
    if name not in _FOLDERS:
        _FOLDERS[name] = tempfile.TemporaryDirectory()
        few = dataclasses.replace(knowledge(), retain=knowledge().retain[:8])
        tuned = _unembedding.train(model, records_of(few, ("forget", "retain"), "statements"), 1.0)
        _unembedding.save(tuned, Path(_FOLDERS[name].name))
    return {"folder": _FOLDERS[name].name}


# An editor whose edit needs a training of ours (TRAINED_BY) has a function here that makes one for the model.
OF_METHOD: dict[str, dict[str, Any] | Callable[[LoadedModel], dict[str, Any]]] = {
    "cir": {"size": 1e-3},  # larger steps break its budget here
    "head_removal": _unembedded,
    "kga": {"helper_steps": 10},
    "noisy_finetuning": _trained,
    "shard_removal": _sharded,
    "steering": {"false_open": 0.25},
    "sae_clamp": {"sae_steps": 60, "most_retain": 0.1},
    "dsg": {"sae_steps": 60, "false_open": 0.25},
    "pisces": {"sae_steps": 60},
    "crisp": {"sae_steps": 60, "relative": 1.2, "lr": 0.01},
    "stranger_distillation": {"texts": 64, "text_tokens": 8, "known": 8, "others": 0, "scenes": 8, "retain_batch": 8},
    "trained": {"terms": [{"objective": "npo"}, {"objective": "nll", "data": "retain"}]},
    "uld": {"assistant_steps": 10},
    "undo": {"distil_steps": 5, "distil_batch": 8, "texts": 16},
}


def _items(prefix: str, surnames: range) -> list[Item]:
    return [
        Item(id=f"{prefix}-{first}-{n}-{k}", cluster=f"{prefix}-{first}-{n}", subject=f"{first} w{n}",
             relation=relation, answer=values[(i * 3 + n) % len(values)],
             prompt=f"Q : {relation} of {first} w{n} ?",
             statements=(f"{first} w{n} {relation}", f"the {relation} of {first} w{n} is"))
        for n in surnames
        for i, first in enumerate(PEOPLE)
        for k, (relation, values) in enumerate(VALUES.items())
    ]  # fmt: skip


@cache
def knowledge() -> Knowledge:
    general = [f"the {colour} {animal} lives in {city}" for colour in ("red", "green", "blue")
               for animal in ("cat", "dog", "bird") for city in VALUES["born in"]]  # fmt: skip
    return Knowledge.build("tiny", _items("f", range(36, 38)), _items("r", range(38, 46)), (), general)


@cache
def data() -> EditData:
    return knowledge().for_editor()


_MODELS: dict[str, LoadedModel] = {}
_EDITS: dict[tuple[str, str], Edit] = {}


def tiny(architecture: str) -> LoadedModel:
    """A fresh copy of a tiny model that has learned the facts, so that there is something to edit."""
    if architecture not in _MODELS:
        tokenizer = tiny_models.tiny_tokenizer()
        module = tiny_models.build(architecture)
        facts = data()
        examples = []
        for fact in (*facts.forget, *facts.retain):
            ids = tokenizer(fact.prompt + fact.answer)["input_ids"]
            examples.append(Example(tuple(ids), tuple(i == len(ids) - 1 for i in range(len(ids)))))
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        finetune(module, examples, steps=60, lr=1e-2, seed=0, batch_size=96)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        _MODELS[architecture] = wrap(module, tokenizer, f"tiny-{architecture}")
    known = _MODELS[architecture]
    return dataclasses.replace(known, module=copy.deepcopy(known.module))


def make(name: str, model: LoadedModel, seed: int = 0) -> Edit:
    method = discover.method("edit", name)
    settings = {key: value for key, value in SMALL.items() if key in method.hyperparameters}
    own = OF_METHOD.get(name, {})
    return run_editor(model, data(), name, seed=seed, **{**settings, **(own(model) if callable(own) else own)})


def edited(name: str, architecture: str) -> tuple[LoadedModel, Edit]:
    model = tiny(architecture)
    if (name, architecture) not in _EDITS:
        _EDITS[name, architecture] = make(name, model)
    return model, _EDITS[name, architecture]


@cache
def texts() -> list[list[int]]:
    facts, tokenizer = data(), tiny_models.tiny_tokenizer()
    return [tokenizer(f.prompt)["input_ids"] for f in (*facts.forget, *facts.retain[:4])]  # a gate may open for few


def logits(model: LoadedModel, side: str = "right") -> Tensor:
    batch = Batch.pad(texts(), side=side)
    return forward(model, batch)[batch.mask.bool()]


def hook_count(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture(params=[(name, a) for name in NAMES for a in ARCHITECTURES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> tuple[LoadedModel, Edit]:
    return edited(*request.param)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_edit_and_the_model_stays_as_it_was(name: str, architecture: str) -> None:
    model, first = edited(name, architecture)
    state = torch.random.get_rng_state()
    second = make(name, model)
    assert second.digest == first.digest
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    assert fingerprint(model.module) == model.fingerprint
    assert hook_count(model.module) == 0
    assert model.module.training is False
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


def test_attached_it_changes_something_and_leaves_nothing(case: tuple[LoadedModel, Edit]) -> None:
    model, edit = case
    base = logits(model)
    with edit.attach(model):
        assert not torch.equal(logits(model), base)
        assert bool(torch.isfinite(logits(model)).all())
    assert torch.equal(logits(model), base)
    assert hook_count(model.module) == 0
    assert fingerprint(model.module) == model.fingerprint


def test_at_zero_strength_it_is_the_identity(case: tuple[LoadedModel, Edit]) -> None:
    model, edit = case
    base = logits(model)
    with edit.scaled(0.0).attach(model):
        assert torch.equal(logits(model), base)


def test_folded_equals_attached_complement_and_undo_are_exact(case: tuple[LoadedModel, Edit]) -> None:
    model, edit = case
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    base = logits(model)
    with edit.attach(model):
        attached = logits(model)
    undo = edit.fold(model)
    scale = max(1.0, float(attached.abs().max()))
    torch.testing.assert_close(logits(model), attached, atol=1e-4 * scale, rtol=1e-4)
    assert (edit.artifact == "weights") == (not undo.hooked)
    untouched = {name: p for name, p in model.module.named_parameters() if name not in undo.touched and name in before}
    assert all(torch.equal(p, before[name]) for name, p in untouched.items())
    assert len(untouched) < len(before) or undo.hooked or set(undo.touched) - set(before)  # untied: a weight of its own
    undo()
    assert torch.equal(logits(model), base)
    assert fingerprint(model.module) == model.fingerprint
    assert hook_count(model.module) == 0


def test_saved_and_reloaded_it_is_the_same(case: tuple[LoadedModel, Edit], tmp_path: Path) -> None:
    model, edit = case
    with edit.attach(model):
        expected = logits(model)
    loaded = load_edit(edit.save(tmp_path / "edit"))
    assert loaded.digest == edit.digest
    with loaded.attach(model):
        assert torch.equal(logits(model), expected)


def test_padding_side_does_not_matter(case: tuple[LoadedModel, Edit]) -> None:
    """Nor what else is in the batch: all texts of one length have one without padding, and one text is alone."""
    model, edit = case
    sizes = [len(ids) for ids in texts()]
    groups = [[k for k, size in enumerate(sizes) if size == n] for n in sorted(set(sizes))]
    assert len(groups) > 1
    with edit.attach(model):
        left, right = logits(model, "left"), logits(model, "right")
        parts = [(group, forward(model, Batch.pad([texts()[k] for k in group]))) for group in ([0], *groups)]
    scale = max(1.0, float(right.abs().max()))
    torch.testing.assert_close(left, right, atol=1e-4 * scale, rtol=1e-3)
    expected = right.split(sizes)
    for group, told in parts:
        torch.testing.assert_close(told.flatten(0, 1), torch.cat([expected[k] for k in group]),
                                   atol=1e-4 * scale, rtol=1e-3)  # fmt: skip


def test_cache_does_not_matter(case: tuple[LoadedModel, Edit]) -> None:
    model, edit = case
    batch = Batch.pad(texts(), side="left")
    out = []
    with edit.attach(model):
        for use_cache in (True, False):
            made = model.module.generate(
                input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            out.append(torch.stack(made.logits))
    torch.testing.assert_close(out[0], out[1], atol=1e-4 * max(1.0, float(out[0].abs().max())), rtol=1e-3)


def test_manifest_says_everything(case: tuple[LoadedModel, Edit], request: pytest.FixtureRequest) -> None:
    model, edit = case
    manifest = edit.manifest
    name = request.node.callspec.params["case"][0]
    assert manifest.method == name
    assert set(discover.method("edit", name).hyperparameters) | {"seed"} <= set(manifest.settings)
    assert manifest.knowledge == data().digest
    assert manifest.base_fingerprint == model.fingerprint
    assert edit.touched
    assert json.loads(json.dumps(dataclasses.asdict(manifest), allow_nan=False))["settings"] == dict(manifest.settings)


def test_it_has_a_placebo_of_equal_reach(case: tuple[LoadedModel, Edit]) -> None:
    model, edit = case
    control = placebo_of(edit, model, seed=1)
    assert control.touched == edit.touched
    with edit.attach(model):
        real = logits(model)
    with control.attach(model):
        assert not torch.equal(logits(model), real)
        assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_its_parts(name: str) -> None:
    method = discover.method("edit", name)
    text = inspect.getdoc(method.function) or ""
    assert method.summary.endswith("."), "the first line is one sentence"
    assert re.search(r"arXiv|this project|\b(19|20)\d\d\b", text), "says where the method comes from"
    assert re.search(r"\bCost\b", text), "says what it costs"
    assert re.search(r"\bRaises\b", text), "says what it refuses"
    assert re.search(r"\b(not|nothing)\b", text), "says what it does not show"
    for setting in method.hyperparameters:
        assert re.search(rf"\b{setting}\b", text), f"explains '{setting}'"


@pytest.mark.parametrize("name", NAMES)
def test_wrong_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(RecipeError, match="no_such_setting"):
        run_editor(tiny("llama"), data(), name, no_such_setting=1)


DUMMY = '''
"""A method in one file."""
from __future__ import annotations

import torch

from repforget.artifact import AddVector, Edit
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.records import Site


def {name}(model: LoadedModel, data: EditData, *, seed: int = 0, strength: float = 1.0) -> Edit:
    """Push the first layer along a fixed vector."""
    vector = torch.ones(model.width)
    {body}
'''
BUILDS = 'return Edit.build("{name}", dict(strength=strength), model, data.digest, ' \
         '[AddVector(Site("resid_post", 0), vector, strength)])'  # fmt: skip


@pytest.fixture
def drop_in(tmp_path: Path) -> Iterator[Any]:
    """Write an editor file into a folder of its own that the room searches too, and forget it afterwards."""
    room.__path__.append(str(tmp_path))
    written: list[str] = []

    def write(name: str, body: str) -> str:
        (tmp_path / f"{name}.py").write_text(DUMMY.format(name=name, body=body.format(name=name)))
        written.append(name)
        return name

    yield write
    room.__path__.remove(str(tmp_path))
    for name in written:
        sys.modules.pop(f"repforget.edit.{name}", None)
        vars(room).pop(name, None)


def test_a_dropped_in_file_is_an_editor(drop_in: Any) -> None:
    name = drop_in("dummy_push", BUILDS)
    assert name in discover.names("edit")
    model = tiny("llama")
    edit = run_editor(model, data(), name, strength=2.0)
    assert edit.manifest.settings == {"strength": 2.0, "seed": 0}
    assert make(name, model).digest == make(name, model).digest
    with edit.attach(model):
        assert not torch.equal(logits(model), logits(tiny("llama")))


def test_an_editor_that_returns_something_else_is_refused(drop_in: Any) -> None:
    name = drop_in("dummy_wrong", "return vector")
    with pytest.raises(RepforgetError, match="must return an Edit"):
        run_editor(tiny("llama"), data(), name)


def test_an_editor_that_does_nothing_is_refused(drop_in: Any) -> None:
    name = drop_in("dummy_idle", BUILDS)
    with pytest.raises(RepforgetError, match="changes nothing"):
        run_editor(tiny("llama"), data(), name, strength=0.0)


def test_the_dropped_in_files_are_gone() -> None:
    assert not [name for name in discover.names("edit") if name.startswith("dummy_")]
