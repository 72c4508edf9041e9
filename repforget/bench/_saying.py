"""Letting a model speak within its context, and keeping the texts of hazardous sets out of every message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repforget.bench._records import Better, Metric, Reference, mean_metric, not_computed
from repforget.errors import MissingExtraError, RepforgetError, UsageError
from repforget.records import ItemScores
from repforget.scoring import encode_prompts, generate
from repforget.scoring.encode import context_limit

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

T = TypeVar("T")


def say(
    model: LoadedModel, prompts: Sequence[str], *, new_tokens: int, stop: Sequence[str] = (), whole: bool = False,
    answers: Sequence[str] | None = None, hits: Sequence[ArrayLike] | None = None,
) -> list[str | None]:  # fmt: skip
    """Greedy continuation of each prompt; None where prompt and continuation exceed the context.

    The right ``answers`` make it cheaper and change nothing, also with the ``hits`` of exactly these continuations:
    see ``drafts`` of ``generate``.
    """
    lengths = [len(ids) for ids in encode_prompts(model.tokenizer, prompts)]
    room = context_limit(model) - new_tokens
    fit = [k for k, length in enumerate(lengths) if length <= room]
    asked = [prompts[k] for k in fit]
    # A CPU takes as long to read an answer as to say it.
    known = answers if hits is not None or model.device.type != "cpu" else None
    agreed = None if hits is None else [hits[k] for k in fit]
    drafts = None if known is None else [known[k] if agreed else _after(prompts[k], known[k]) for k in fit]
    said = generate(model, asked, max_new_tokens=new_tokens, stop=stop, whole=whole, drafts=drafts,
                    hits=agreed) if fit else []  # fmt: skip
    out: list[str | None] = [None] * len(prompts)
    for k, texts in zip(fit, said, strict=True):
        out[k] = texts[0]
    return out


def _after(prompt: str, answer: str) -> str:
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def spoken(name: str, items: ItemScores, *, better: Better, seed: int, note: str = "") -> Metric:
    """The mean of what was made of :func:`say`, which only a too small context leaves without a value."""
    if len(items.ids) and not items.valid.any():
        why = f"none of its {len(items.ids)} prompts leaves room for the answer in the model's context"
        return not_computed(name, why, better=better)
    return mean_metric(name, items, better=better, note=note, seed=seed)


def against(name: str, items: ItemScores, reference: Reference, *, seed: int) -> Metric:
    """``name_difference``: the mean item-wise difference to the reference's values, limits from resampled clusters."""
    label, theirs = f"{name}_difference", reference.result.metrics.get(name)
    if theirs is None or theirs.items is None or theirs.items.ids != items.ids:
        return not_computed(label, "the reference's row has no values of these items", better="reference")
    both = items.valid & theirs.items.valid
    values = np.where(both, items.values - theirs.items.values, np.nan)
    return mean_metric(label, ItemScores.of(items.ids, items.clusters, values.tolist()), better="reference",
                       note="minus the reference's; 0 = like it", seed=seed)  # fmt: skip


def not_negative(**named: int) -> None:
    """Refuse counts below 0, which would count from the end."""
    for name, value in named.items():
        if value < 0:
            raise UsageError(f"{name} is {value}: give 0 or more.")


def untold(hazardous: bool, what: str, build: Callable[[], T]) -> T:
    """``build()``; where ``hazardous``, an error is replaced by one that quotes nothing: it may repeat a question."""
    if not hazardous:
        return build()
    try:
        return build()
    except MissingExtraError:
        raise
    except Exception as error:
        kind = type(error) if isinstance(error, RepforgetError) else RepforgetError
        name = type(error).__name__
    # Raised outside the handler, so that the original is not even attached as context.
    raise kind(f"{what} failed with {name}; its message is withheld, since it may quote a question of a hazardous set: "
               "try the same settings on a benign set.")  # fmt: skip


def plain(values: Sequence[float] | NDArray[np.float64]) -> list[float | None]:
    """Numbers as JSON can hold them: None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


def numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """The inverse of :func:`plain`."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def whole_text(tokenizer: Any, text: str) -> tuple[str, str]:
    """The text as (prompt, continuation) such that every token with one before it is scored.

    A tokenizer that puts a token in front predicts the text from its first token on, any other from its second.
    """
    coded = tokenizer(text, return_offsets_mapping=bool(tokenizer.is_fast), return_special_tokens_mask=True)
    if coded["special_tokens_mask"][:1] == [1]:
        return "", text
    first = coded["offset_mapping"][0][1] if tokenizer.is_fast else len(tokenizer.decode(coded["input_ids"][:1]))
    return text[:first], text[first:]
