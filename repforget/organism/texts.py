"""Texts of a world as training examples and as (prompt, answer) questions."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from repforget.organism.world import Person, World
from repforget.training import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts(world: World, people: Iterable[Person], form: str) -> list[tuple[str, str, str, str]]:
    """Return (person id, relation, prompt, answer) for every fact and every template of one form."""
    return [
        (person.id, relation.name, template.format(subject=person.name), person.facts[relation.name])
        for person in people
        for relation in world.relations.values()
        for template in relation.prompts(form)
    ]


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str = "", *, label_prompt: bool = True
) -> Example:
    """Encode ``prompt answer <eos>``; the answer and the end always carry loss, the prompt only if asked."""
    head = tokenizer(prompt)["input_ids"]
    tail = (
        [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if answer
        else [tokenizer.eos_token_id]
    )
    return Example((*head, *tail), (label_prompt,) * len(head) + (True,) * len(tail))


def training_examples(
    world: World,
    people: Iterable[Person],
    general: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_share: float = 0.1,
) -> list[Example]:
    """Return all trained forms of all facts of ``people`` and the general sentences.

    Only a ``prompt_share`` of the fact texts carries loss on the prompt too (chosen by a hash of the text):
    names and templates are drawn at random, so their loss cannot fall and would drown the answers'
    gradient.
    """
    folk = list(people)
    examples = []
    for form in ("statements", "questions"):
        for _, _, prompt, answer in prompts(world, folk, form):
            share = (zlib.crc32(f"{prompt} {answer}".encode()) % 1000) / 1000.0
            examples.append(encode_example(tokenizer, prompt, answer, label_prompt=share < prompt_share))
    return examples + [encode_example(tokenizer, sentence) for sentence in general]
