"""The same items asked through many prompts: one table of probabilities, and the row that finds most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel
from repforget.verify import _constrained as path

Array = NDArray[np.float64]
Variants = Sequence[Sequence[str | None]]  # per variant one prompt per item, None where the item has no such prompt


def probabilities(
    model: LoadedModel, items: Sequence[Item], variants: Variants, knowledge: Knowledge, limit: int
) -> Array:
    """The truth's probability [variants, items] after each prompt when decoding is confined to the candidates.

    NaN where there is no prompt, no alternative, or no room in the context.  One forward pass per distinct prompt.
    """
    asked = list(dict.fromkeys((k, text) for row in variants for k, text in enumerate(row) if text is not None))
    each = [asking(items[k], text) for k, text in asked]
    found = path.probability(model, len(each), path.paths(model, each, knowledge, forms=1, limit=limit))
    value = {key: float(p) for key, p in zip(asked, found, strict=True)}
    table = [[np.nan if text is None else value[k, text] for k, text in enumerate(row)] for row in variants]
    return np.array(table, dtype=np.float64).reshape(len(variants), len(items))


def asking(item: Item, prompt: str) -> Item:
    """The item with this prompt as its only question."""
    return replace(item, prompt=prompt, paraphrases=(), statements=())


def means(table: Array) -> Array:
    """Mean over the items of each row; an item that a row could not ask counts as not found."""
    return np.asarray(np.nansum(table, axis=1) / max(1, table.shape[1]), np.float64)


def best(table: Array) -> int:
    """The row with the highest mean: the same maximum is taken on every arm."""
    return int(means(table).argmax())


def highest(table: Array) -> Array:
    """The highest value of each item over the rows; NaN where no row could be asked."""
    return np.asarray(np.fmax.reduce(table, axis=0), np.float64)


def sentence(item: Item) -> str:
    """The item as a sentence that the answer completes, for use as a text and not as a question."""
    return (item.statements or item.questions)[0]


def stated(item: Item) -> str:
    """The item as a complete statement of the fact."""
    return f"{sentence(item)}{item.continuation()}."


def names_any(text: str, item: Item) -> bool:
    """Whether a text contains the item's answer or an alias, in any case."""
    return any(answer.casefold() in text.casefold() for answer in (item.answer, *item.aliases))
