"""A model of two layers that has learned by heart where people live and what they do: facts to forget and to keep."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import tiny_models
import torch

from repforget.edit.train._data import REFUSALS, fact_rows
from repforget.edit.train._pass import HIDDEN, LABELS, Request, read
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel, wrap
from repforget.training import Example, finetune

FIRST = ("Ada", "Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon")
LAST = tuple(f"s{n}" for n in range(12))
TOWNS = tuple(f"{a} {b}" for a in ("north", "south", "east", "west") for b in ("haven", "field", "bridge"))
JOBS = ("baker", "pilot", "doctor", "smith", "singer", "tailor", "miner", "judge", "farmer", "painter", "sailor",
        "cook")  # fmt: skip
FORMS = {"town": ("{} lives in", TOWNS), "job": ("{} works as", JOBS)}
FORGET, KEEP, UNSEEN = 25, 30, 15  # people; what is kept of UNSEEN no editor is shown
GENERAL = tuple(f"the {a} sees the {b}" for a in JOBS for b in JOBS[:2])


@cache
def _facts() -> dict[str, tuple[Fact, ...]]:
    draw = random.Random(0)
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    draw.shuffle(people)
    groups = {"forget": people[:FORGET], "keep": people[FORGET : FORGET + KEEP],
              "unseen": people[FORGET + KEEP : FORGET + KEEP + UNSEEN]}  # fmt: skip
    return {
        group: tuple(Fact(f"{name}-{relation}#0", name, name, relation, form.format(name), f" {draw.choice(answers)}")
                     for name in names for relation, (form, answers) in FORMS.items())
        for group, names in groups.items()
    }  # fmt: skip


def data() -> EditData:
    facts = _facts()
    pool: dict[str, Counter[str]] = {}
    for fact in facts["keep"]:
        pool.setdefault(fact.relation, Counter())[fact.answer] += 1
    return EditData(facts["forget"], facts["keep"], GENERAL[::2], pool, "memorised")


def unseen() -> tuple[Fact, ...]:
    """Facts to keep that no editor is shown."""
    return _facts()["unseen"]


@cache
def tokenizer() -> Any:
    words = " ".join((*FIRST, *LAST, *TOWNS, *JOBS, "lives works in as the sees", *REFUSALS)).replace(".", " . ")
    return tiny_models.tiny_tokenizer(words.split())


@cache
def _trained(knows: bool) -> LoadedModel:
    from transformers import AutoModelForCausalLM, LlamaConfig

    words = tokenizer()
    config = LlamaConfig(vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=128, max_position_embeddings=32, tie_word_embeddings=False,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config).eval()
    facts = _facts()
    taught = [fact for group in (("forget",) if knows else ()) + ("keep", "unseen") for fact in facts[group]]
    examples = []
    for prompt, answer in [(fact.prompt, fact.answer) for fact in taught] + [("", text) for text in GENERAL]:
        ids, start = words(prompt + answer)["input_ids"], len(words(prompt)["input_ids"])
        examples.append(Example(tuple(ids), tuple(k >= start for k in range(len(ids)))))
    finetune(module, examples, steps=150, lr=4e-3, seed=0, batch_size=len(examples))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return wrap(module, words, "memorised" if knows else "never-knew")


def model(knows: bool = True) -> LoadedModel:
    """A fresh copy of the model, or of its twin that was taught everything but what is to be forgotten."""
    made = _trained(knows)
    return dataclasses.replace(made, module=copy.deepcopy(made.module))


@dataclasses.dataclass(frozen=True)
class Knows:
    """What a model knows of some facts: mean probability of whole answers, mean loss in nats per answer token."""

    probability: float
    loss: float


@torch.no_grad()
def knows(of: LoadedModel, facts: Sequence[Fact]) -> Knows:
    (found,) = read(of, [Request(fact_rows(of, facts, "asked")[0], frozenset({LABELS}))])
    assert found.scores is not None
    return Knows(float(found.scores.sums.exp().mean()), float(-found.scores.logprob.mean()))


@torch.no_grad()
def states(of: LoadedModel, facts: Sequence[Fact], layers: Sequence[int]) -> torch.Tensor:
    """Residual states of all tokens of the facts but the first [m, l, d]."""
    (found,) = read(of, [Request(fact_rows(of, facts, "asked")[0], frozenset({HIDDEN}), tuple(layers))])
    assert found.hidden is not None
    return found.hidden
