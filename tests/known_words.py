"""A knowledge probe that any tiny random model answers: its answers are what the model says of that name above all."""

from __future__ import annotations

import tiny_models
import torch

from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel

FIRST = ("Ada", "Tom", "Eva", "Max", "Lea", "Ben")
NAMES = tuple(f"{first} {last}" for first in FIRST for last in ("Mia", "Jon", "red", "blue"))


def knowledge_of(model: LoadedModel, prompt: str = "the job of {subject} is") -> Knowledge:
    """Half of the names are to be forgotten; the answer is the word that this name makes most likelier than others."""
    texts = [prompt.format(subject=name) for name in NAMES]
    words = model.tokenizer.convert_tokens_to_ids(list(tiny_models.WORDS))
    with torch.no_grad():
        logits = model.module(torch.tensor(model.tokenizer(texts)["input_ids"])).logits[:, -1]
    chances = logits.log_softmax(-1)[:, words]
    own = (chances - chances.mean(0)).argmax(-1).tolist()
    items = [Item(id=name, cluster=name, subject=name, relation="job", answer=tiny_models.WORDS[answer], prompt=text,
                  statements=(text,)) for name, text, answer in zip(NAMES, texts, own, strict=True)]  # fmt: skip
    return Knowledge.build("words", items[::2], items[1::2])
