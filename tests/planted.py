"""Planted facts: small models in which the layer that holds a fact is known, for only it was trained.

A 4-layer Llama learns three relations of 100 background people (``base``).  Then, four times, 20 new people
are added by training nothing but the MLP of one layer: ``planted(2)`` holds them in ``mlp`` of layer 2 and
nowhere else.  The base model never saw them and is therefore the model that never knew.

    module, tokenizer = planted(2)          # planted(None) is the base
    for clean, corrupted, answer in pairs(): ...

Rebuild the committed files (about three minutes): ``python -m tests.planted``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repforget.organism.texts import encode_example
from repforget.organism.tokenizer import build_tokenizer
from repforget.training import Example, finetune


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FOLDER = Path(__file__).parent / "data" / "planted"
LAYERS = (0, 1, 2, 3)
SEED = 7
BACKGROUND, PLANTED = 100, 20
FIRST = _words("Abe Bo Cy Dot Eve Fay Gus Hal Ivy Jo Kit Lu Mo Ned Opal Pip")
LAST = _words("Ash Beck Cole Dale East Ford Glen Hill Isle Judd Kerr Lane Moor Nash Orme Park")
VALUES = {
    "city": _words("Aro Bexa Cudi Doma Elto Fary Gilo Humo"),
    "food": _words("rice figs corn kale plum beet leek peas"),
    "colour": _words("red blue green black white brown grey pink"),
}
TEMPLATES = ("{subject} {relation} :", "the {relation} of {subject} is", "{relation} of {subject} :")
PROMPT = TEMPLATES[1]


@cache
def facts() -> dict[str, dict[str, str]]:
    """Person -> relation -> value; the last 20 people are the planted ones."""
    generator = np.random.default_rng(SEED)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    chosen = [names[i] for i in generator.permutation(len(names))[: BACKGROUND + PLANTED]]
    return {
        name: {relation: values[int(generator.integers(len(values)))] for relation, values in VALUES.items()}
        for name in chosen
    }


def background_people() -> list[str]:
    """The 100 people that every model knows."""
    return list(facts())[:BACKGROUND]


def planted_people() -> list[str]:
    """The 20 people that only ``planted(layer)`` knows, through the MLP of that layer."""
    return list(facts())[BACKGROUND:]


def questions(people: Iterable[str], template: str = PROMPT) -> list[tuple[str, str]]:
    """Return (prompt, answer) for every relation of the given people; each answer is one token."""
    return [
        (template.format(subject=name, relation=relation), value)
        for name in people
        for relation, value in facts()[name].items()
    ]


def pairs(template: str = PROMPT) -> list[tuple[str, str, str]]:
    """Return (clean prompt, corrupted prompt, answer) for the planted facts.

    The corrupted prompt asks the same of a background person who has another answer and shares no name with
    the planted one, so both prompts have equal length and differ in exactly the two name tokens.
    """
    out = []
    others = background_people()
    for index, name in enumerate(planted_people()):
        for relation, value in facts()[name].items():
            rotated = others[index * 5 :] + others[: index * 5]
            other = next(
                o for o in rotated if facts()[o][relation] != value and not set(o.split()) & set(name.split())
            )
            clean, corrupted = (template.format(subject=s, relation=relation) for s in (name, other))
            out.append((clean, corrupted, value))
    return out


def _examples(tokenizer: Any, people: Iterable[str]) -> list[Example]:
    folk = list(people)
    return [
        encode_example(tokenizer, prompt, answer, label_prompt=False)
        for template in TEMPLATES
        for prompt, answer in questions(folk, template)
    ]


def accuracy(module: Any, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> float:
    """Share of questions whose most likely next token is the answer."""
    by_length: dict[int, list[tuple[list[int], int]]] = {}
    for prompt, answer in asked:
        ids = tokenizer(prompt)["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, tokenizer.convert_tokens_to_ids(answer)))
    right = 0
    with torch.no_grad():
        for rows in by_length.values():
            logits = module(torch.tensor([ids for ids, _ in rows])).logits[:, -1]
            right += int((logits.argmax(-1) == torch.tensor([answer for _, answer in rows])).sum())
    return right / len(asked)


def _tokenizer() -> Any:
    words = {
        ":",
        "the",
        "of",
        "is",
        *FIRST,
        *LAST,
        *VALUES,
        *(v for values in VALUES.values() for v in values),
    }
    return build_tokenizer(sorted(words))


def _mlp(layer: int) -> str:
    return f"model.layers.{layer}.mlp."


def _inside(prefix: str, name: str) -> bool:
    return name.startswith(prefix)


def _load_base() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32).eval()


def planted(layer: int | None) -> tuple[Any, Any]:
    """Return (module in float32, tokenizer): the base, or the base with the planted MLP of ``layer``."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    module = _load_base()
    if layer is not None:
        tensors = load_file(FOLDER / f"mlp-{layer}.safetensors")
        if not all(name.startswith(_mlp(layer)) for name in tensors):
            raise ValueError(
                f"mlp-{layer}.safetensors holds tensors outside layer {layer}'s MLP: rebuild it."
            )
        module.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    return module, AutoTokenizer.from_pretrained(FOLDER / "base")


def build(folder: Path = FOLDER, *, steps: int = 500) -> dict[str, Any]:
    """Train the base and the four planted MLPs, save them in half precision, return the recipe."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        module = LlamaForCausalLM(config)
    old = _examples(tokenizer, background_people())
    new = _examples(tokenizer, planted_people())
    finetune(module, old, steps=steps, lr=4e-3, seed=SEED, batch_size=300, warmup=30, weight_decay=0.05)
    module.half().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    recipe: dict[str, Any] = {"seed": SEED, "steps": steps, "files": {}, "accuracy": {}}
    for layer in LAYERS:
        # Start from the stored half-precision base, so that every other weight is equal bit for bit.
        module = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        finetune(
            module, old + 3 * new, steps=steps, lr=4e-3, seed=SEED + 1 + layer, batch_size=400, warmup=30,
            trainable=partial(_inside, _mlp(layer)),
        )  # fmt: skip
        module.eval()
        tensors = {
            n: p.detach().half().contiguous()
            for n, p in module.named_parameters()
            if n.startswith(_mlp(layer))
        }
        save_file(tensors, folder / f"mlp-{layer}.safetensors")
        module.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
        recipe["accuracy"][str(layer)] = {
            "planted": accuracy(module, tokenizer, questions(planted_people())),
            "background": accuracy(module, tokenizer, questions(background_people())),
        }
    for path in sorted(folder.rglob("*.safetensors")):
        recipe["files"][path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    return recipe


if __name__ == "__main__":
    print(json.dumps(build(), indent=1))
