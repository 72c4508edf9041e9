"""Neighbour attack: is the answer more likely after this very question than after questions almost like it?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import candidate_logprobs, encode_many, encode_prompts
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.privacy import _matched as matched

MEASURES = {"swaps": MeasureInfo("knowledge", "logits", votes=False)}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"neighbours": 4, "alternatives": 7, "max_items": 50},
    "standard": {},
    "thorough": {"neighbours": 25, "max_items": 400},
}
PART = 16  # items asked at once
WORD_MARKS = "Ġ▁ #"  # how tokenizers mark that a piece begins (or, #, does not begin) a word
Array = NDArray[np.float64]


def neighbour(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    neighbours: int = 10, swapped: float = 0.3, nearest: int = 8, alternatives: int = 31,
    asked: matched.Asked = "questions", max_items: int = 200,
) -> Measurement:  # fmt: skip
    """Compare an answer's loss with its mean loss after ``neighbours`` prompts that differ in a few tokens.

    A neighbour has a share ``swapped`` of its tokens exchanged for one of the ``nearest`` by cosine of the original's
    input embeddings (which begin a word, and end in a letter, alike); all arms are asked the same texts.  The score, in
    nats per answer token, is the mean loss after neighbours minus the loss itself, higher = member; the value is the
    share of the relation's ``alternatives`` other answers that score lower, ties half.  What an answer is worth without
    the question cancels, so the prior is 0.5.  Source: Mattern et al. 2023, arXiv 2305.18462, whose neighbours come
    from a masked language model.  Cost: items x (1 + ``neighbours``) prompts once, a short row per alternative each.

    Chance does not show absence: embedding neighbours are less fluent than a masked model's and may change nothing
    that the model reads.
    """
    if neighbours < 1 or nearest < 1 or not 0 < swapped <= 1:
        raise UsageError(f"Verifier 'neighbour' needs neighbours and nearest of at least 1 and 0 < swapped <= 1, got "
                         f"{neighbours}, {nearest} and {swapped}.")  # fmt: skip
    items = ask.limited(view.forget, max_items, seed)
    found = matched.texts(items, view.knowledge, forms=1, limit=alternatives, asked=asked)
    prompts = [found.pairs[row][0] for row in found.members]
    original = references.original
    around = references.once(("neighbours", tuple(prompts), neighbours, swapped, nearest, seed),
                             lambda: near(original, prompts, neighbours, swapped, nearest, seed))  # fmt: skip
    scores = np.full(len(found.pairs), np.nan)
    for start in track(progress, range(0, len(found.trials), PART), "asking neighbours"):
        part = found.trials[start : start + PART]
        rows = [[t.member, *t.others] for t in part]
        asks = [(k, p) for k in range(len(part)) for p in (prompts[start + k], *around[start + k])]
        options = [[found.pairs[row][1] for row in group] for group in rows]
        logs = candidate_logprobs(model, [p for _, p in asks], [options[k] for k, _ in asks])
        for k, group in enumerate(rows):
            table = np.stack([log for (owner, _), log in zip(asks, logs, strict=True) if owner == k])
            if len(table) > 1:
                # the mean of differences, so that equal values cancel exactly
                scores[group] = (table[0] - table[1:]).mean(0) / lengths(model, prompts[start + k], options[k])
    return Measurement({"swaps": ask.scores(items, matched.standing(scores, found)),
                        "swaps_prior": ask.scores(items, np.full(len(items), 0.5))},
                       facts=matched.rates("swaps", scores, found))  # fmt: skip


def lengths(model: LoadedModel, prompt: str, options: Sequence[str]) -> Array:
    """Tokens of each continuation after the prompt."""
    return np.array([len(e.answer) for e in encode_many(model.tokenizer, [(prompt, o) for o in options])], float)


def near(
    model: LoadedModel, prompts: Sequence[str], count: int, share: float, nearest: int, seed: int
) -> list[list[str]]:
    """Up to ``count`` distinct texts per prompt in which some tokens became embedding neighbours; none where a prompt
    has no token to exchange."""
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids)
    rows = [list(ids) for ids in encode_prompts(tokenizer, prompts)]
    table = _closest(model, sorted({t for ids in rows for t in ids} - special), nearest)
    out = []
    for prompt, ids in zip(prompts, rows, strict=True):
        generator = np.random.default_rng([seed, zlib.crc32(prompt.encode())])  # the same in any company
        places = [k for k, token in enumerate(ids) if table.get(token)]
        found: dict[str, None] = {}
        for _ in range(4 * count if places else 0):  # some draws repeat, or decode to the prompt itself
            changed = list(ids)
            for place in generator.choice(places, size=max(1, round(share * len(places))), replace=False):
                options = table[ids[place]]
                changed[place] = options[int(generator.integers(len(options)))]
            text = tokenizer.decode(changed, skip_special_tokens=True)
            if text != prompt:
                found.setdefault(text)
            if len(found) == count:
                break
        out.append(list(found))
    return out


def _closest(model: LoadedModel, tokens: Sequence[int], nearest: int) -> dict[int, list[int]]:
    """Token -> its nearest tokens of the same shape by cosine of the input embeddings."""
    weight = model.module.get_input_embeddings().weight.detach()
    pieces = model.tokenizer.convert_ids_to_tokens(list(range(min(len(weight), len(model.tokenizer)))))
    special = set(model.tokenizer.all_special_ids)
    shapes = [None if k in special or not piece else (piece[0] in WORD_MARKS, piece[-1].isalpha())
              for k, piece in enumerate(pieces)]  # fmt: skip
    size = weight.float().norm(dim=1).clamp_min(1e-12)
    out = {}
    for token in tokens:
        cosine = (weight @ weight[token]).float() / size  # the token's own length orders nothing
        order = torch.argsort(cosine, descending=True, stable=True)[: 16 * nearest + 1].tolist()
        same = [k for k in order if k < len(shapes) and k != token and shapes[k] == shapes[token]]
        out[token] = same[:nearest]
    return out
