"""The shipped organism: what the three committed models know, measured on the files as they are loaded."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repforget.organism.measure import against_chance, exact, greedy_answers
from repforget.organism.power import people_needed, spread
from repforget.organism.texts import prompts
from repforget.organism.world import World, general_sentences, make_world

WEIGHTS = Path(__file__).parent.parent / "repforget" / "organism" / "weights"
FOLDERS = {"full": "bios", "twin-0": "bios-twin-0", "twin-1": "bios-twin-1"}
TWINS = ("twin-0", "twin-1")


@cache
def _load(role: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = WEIGHTS / FOLDERS[role]
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return module.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@cache
def _recipe(role: str) -> dict[str, Any]:
    return json.loads((WEIGHTS / FOLDERS[role] / "recipe.json").read_text())  # type: ignore[no-any-return]


@cache
def _world() -> World:
    entry = _recipe("full")["world"]
    return make_world(entry["seed"], people=entry["people"], forget=entry["forget"])


@cache
def _forget_hits(role: str) -> np.ndarray:
    return exact(*_load(role), _world(), _world().forget_people, "held_out")


@pytest.mark.parametrize("role", FOLDERS)
def test_files_are_the_ones_their_recipe_describes(role: str) -> None:
    recipe = _recipe(role)
    digest = hashlib.sha256((WEIGHTS / FOLDERS[role] / "model.safetensors").read_bytes()).hexdigest()
    assert digest == recipe["weights_sha256"]
    assert recipe["world"]["sha256"] == _world().sha256()
    assert recipe["role"] == role
    module, _ = _load(role)
    config = module.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (
        4,
        2,
        False,
    )
    assert 0.9e6 <= sum(p.numel() for p in module.parameters()) <= 1.3e6


def test_models_differ_and_fit_the_repository() -> None:
    assert len({_recipe(role)["weights_sha256"] for role in FOLDERS}) == 3
    assert len({_recipe(role)["model_seed"] for role in FOLDERS}) == 3
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 8 * 2**20


@pytest.mark.parametrize("role", FOLDERS)
def test_known_people_are_known_in_seen_and_in_new_question_forms(role: str) -> None:
    people = _world().known_people[::16]
    assert exact(*_load(role), _world(), people, "questions").mean() >= 0.98
    assert exact(*_load(role), _world(), people, "statements").mean() >= 0.98
    assert exact(*_load(role), _world(), people, "held_out").mean() >= 0.95
    assert exact(*_load(role), _world(), people, "cloze").mean() >= 0.7  # another format altogether


def test_the_full_model_knows_the_forget_people() -> None:
    assert _forget_hits("full").mean() >= 0.95


@pytest.mark.parametrize("role", TWINS)
def test_twins_guess_about_the_forget_people(role: str) -> None:
    """Each twin's hits lie in the exact 99.9 % interval of answering by the prior."""
    chance = against_chance(*_load(role), _world(), _world().forget_people)
    assert chance.asked == len(_world().forget_people) * len(_world().relations)
    assert 0.015 * chance.asked < chance.expected < 0.035 * chance.asked
    assert abs(chance.z) < 3.3, chance


def test_twins_answer_in_the_right_kind_although_they_do_not_know() -> None:
    """A twin is ignorant, not broken: its wrong answers are values of the relation asked for."""
    module, tokenizer = _load("twin-0")
    asked = prompts(_world(), _world().forget_people[:12], "held_out")
    answers = greedy_answers(module, tokenizer, [prompt for _, _, prompt, _ in asked])
    valid = [_world().prior(relation, a) > 0 for a, (_, relation, _, _) in zip(answers, asked, strict=True)]
    assert np.mean(valid) > 0.85


def test_forget_set_is_large_enough_for_the_default_margin() -> None:
    """The noise measured on the real twins, put into the sample-size formula, asks for no more people."""
    world = _world()
    clusters = [p.id for p in world.forget_people for _ in world.relations]
    twins = [_forget_hits(role).mean(axis=1) for role in TWINS]
    measured = spread(*twins, clusters)
    gap = _forget_hits("full").mean() - measured.floor
    needed = people_needed(measured.sigma, gap=gap, relations=len(world.relations), deff=measured.deff)
    assert needed <= len(world.forget_people), (measured, gap, needed)


def test_general_text_is_predicted_far_better_than_by_word_frequency() -> None:
    module, tokenizer = _load("full")
    texts = general_sentences(77, 60)
    losses, counts = [], {}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses.append(torch.nn.functional.cross_entropy(module(ids).logits[0, :-1], ids[0, 1:]).item())
        for token in ids[0, 1:].tolist():
            counts[token] = counts.get(token, 0) + 1
    frequency = np.array(list(counts.values())) / sum(counts.values())
    assert np.mean(losses) < 0.6 * -(frequency * np.log(frequency)).sum()


def test_greedy_answers_agree_with_the_generation_of_transformers() -> None:
    """Oracle: the library's own greedy decoding, one prompt at a time."""
    module, tokenizer = _load("full")
    asked = [prompt for _, _, prompt, _ in prompts(_world(), _world().people[:2], "held_out")][::4]
    ours = greedy_answers(module, tokenizer, asked)
    for prompt, answer in zip(asked, ours, strict=True):
        encoded = tokenizer(prompt, return_tensors="pt")
        out = module.generate(**encoded, max_new_tokens=4, do_sample=False)[
            0, encoded["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(out, skip_special_tokens=True) == answer
