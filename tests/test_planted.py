"""The planted-fact fixture is what it says: every fact known, every other weight equal, the base ignorant."""

from __future__ import annotations

import hashlib
import json

import planted as fixture
import pytest
import torch

RECIPE = json.loads((fixture.FOLDER / "recipe.json").read_text())


@pytest.mark.parametrize("layer", fixture.LAYERS)
def test_planted_models_know_both_groups(layer: int) -> None:
    module, tokenizer = fixture.planted(layer)
    for people in (fixture.planted_people(), fixture.background_people()):
        for template in fixture.TEMPLATES:
            assert fixture.accuracy(module, tokenizer, fixture.questions(people, template)) >= 0.98


def test_base_knows_the_background_and_guesses_about_the_planted() -> None:
    module, tokenizer = fixture.planted(None)
    assert fixture.accuracy(module, tokenizer, fixture.questions(fixture.background_people())) >= 0.98
    guesses = fixture.accuracy(module, tokenizer, fixture.questions(fixture.planted_people()))
    assert guesses <= 0.3, "one in eight by chance"


@pytest.mark.parametrize("layer", fixture.LAYERS)
def test_only_the_mlp_of_the_planted_layer_differs_from_the_base(layer: int) -> None:
    base = dict(fixture.planted(None)[0].named_parameters())
    module, _ = fixture.planted(layer)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, base[name])}
    assert changed == {f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_pairs_differ_in_the_two_name_tokens_alone() -> None:
    module, tokenizer = fixture.planted(0)
    pairs = fixture.pairs()
    assert len(pairs) == 60
    for clean, corrupted, answer in pairs:
        one, two = (tokenizer(text)["input_ids"] for text in (clean, corrupted))
        assert len(one) == len(two)
        assert sum(a != b for a, b in zip(one, two, strict=True)) == 2
        assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) == 1
    assert fixture.accuracy(module, tokenizer, [(clean, answer) for clean, _, answer in pairs]) >= 0.98
    assert (
        fixture.accuracy(module, tokenizer, [(corrupted, answer) for _, corrupted, answer in pairs]) <= 0.02
    )


def test_files_are_the_ones_of_the_recipe_and_small() -> None:
    files = {p.relative_to(fixture.FOLDER).as_posix(): p for p in fixture.FOLDER.rglob("*.safetensors")}
    assert {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()} == RECIPE["files"]
    assert sum(p.stat().st_size for p in fixture.FOLDER.rglob("*")) < 2.5 * 2**20
