"""Does a suffix of ordinary tokens, found by gradient on some facts, make the model tell others?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models._names import core
from repforget.models.capture import Batch
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.inside import _optimise as opt

_CURVE = ("greedy coordinate gradient", "steps", "probability of the truth on the half not taught")
MEASURES = {
    "best_step": MeasureInfo("knowledge", "white-box", teaches="the other half of the forget clusters", curve=_CURVE),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"tokens": 2, "steps": 2, "checks": 1, "candidates": 8, "top": 8, "alternatives": 7, "max_taught": 4,
              "max_items": 32},
    "standard": {},
    "thorough": {"tokens": 8, "steps": 48, "checks": 4, "candidates": 64, "top": 128, "alternatives": 63},
}  # fmt: skip
AT_ONCE = 8192  # tokens of candidates scored in one pass
TRIES = 1000  # tokens tried for one place of the first suffix
Array = NDArray[np.float64]


def gcg(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    tokens: int = 6, steps: int = 24, checks: int = 3, candidates: int = 48, top: int = 64, company: float = 1.0,
    max_taught: int = 16, forms: int = 1, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Search a suffix of ``tokens`` tokens that makes known answers likely, append it to other questions and ask.

    Each step ranks replacements by the gradient of the loss with respect to the one-hot suffix, draws ``candidates``
    single replacements from the ``top`` tokens of each place, drops those that decoding and encoding would change, and
    keeps the best suffix so far.  The loss is the cross-entropy of the true answers of one half of the forget clusters
    and of ``company`` retain items for each (together ``max_taught`` texts); the other half is asked with the suffix as
    text, then the halves swap.  ``best_step`` is the truth's probability under decoding confined to the candidates
    (mean over ``forms``) at the check with the highest mean, 0 being the plain question; the same maximum, seed and
    budget on every arm.  Source: Zou et al. 2023, arXiv 2307.15043, algorithm 2; published budget: top 256, 512
    candidates, 250 steps, 20 tokens that begin as exclamation marks.
    Cost: 2 x ``steps`` passes over ``candidates`` x ``max_taught`` texts, 2 x (``checks`` + 1) passes of questions; a
    half-precision model is copied to float32.

    A suffix that fails does not show that a longer search or another start would fail too.
    """
    marks = opt.marks_of("gcg", steps, checks)
    parts, losses = [], []
    with opt.frozen(model) as exact:
        halves = opt.crossed("gcg", view, seed=seed, teach="halves", company=company, max_taught=max_taught,
                             max_items=max_items)  # fmt: skip
        for part in track(progress, halves, "searching a suffix"):
            chosen = path.kept_paths(references, exact, part.items, view.knowledge, forms=forms, limit=alternatives)
            chosen = opt.fitting(exact, chosen, 2 * tokens)
            kept = {p.item for p in chosen}
            rows = [path.probability(exact, len(part.items), chosen)]
            found, last = search(exact, part.taught, steps, tokens, candidates, top, seed)
            for mark in marks:
                suffixed = [_with(exact.tokenizer, item, found[mark]) for item in part.items]
                asked = path.paths(exact, suffixed, view.knowledge, forms=forms, limit=alternatives)
                rows.append(path.probability(exact, len(part.items), [p for p in asked if p.item in kept]))
            parts.append((part.items, np.stack(rows)))
            losses.append(last[-1])
    scores, means, best = opt.best_of("best_step", parts, view, alternatives)
    x = (0.0, *map(float, marks))
    facts = {"best step": x[best], "last loss": sum(losses) / len(losses)}
    return Measurement(scores, {"x": x, "best_step": means}, facts)


def search(
    model: LoadedModel, taught: Sequence[Item], steps: int, tokens: int, candidates: int, top: int, seed: int
) -> tuple[list[tuple[int, ...]], list[float]]:
    """The best suffix so far and its loss (nats per answer token) before and after every step, [steps + 1] each."""
    texts = opt.behind(model, opt.fitting(model, opt.told(model, taught), tokens), tokens)
    batches = opt.lots(model, texts)
    generator = torch.Generator().manual_seed(seed)
    module: Any = core(model)
    embed = module.get_input_embeddings()
    banned = sorted({*model.tokenizer.all_special_ids, *range(len(model.tokenizer), model.vocab_size)})
    suffix = _start(model, taught[0], tokens, frozenset(banned), generator)
    found, losses = [suffix], [float(_losses(model, batches, [suffix])[0])]
    for _ in range(steps):
        suffix, lowest = found[-1], losses[-1]
        with torch.no_grad():
            here: Tensor = embed(torch.tensor([suffix], device=model.device))[0]
        gradient = opt.loss(model, batches, here, opt.written)[1]
        if gradient is not None:
            rise = gradient.to(embed.weight.device) @ embed.weight.detach().T  # by the one-hot tokens, [n, V]
            rise[:, banned] = torch.inf
            best = rise.topk(min(top, rise.shape[1]), largest=False).indices.cpu()
            tried = surviving(model.tokenizer, taught[0], _drawn(suffix, best, candidates, generator))
            scored = _losses(model, batches, tried)
            if min(scored, default=lowest) < lowest:
                suffix, lowest = tried[int(scored.argmin())], float(scored.min())
        found.append(suffix)
        losses.append(lowest)
    return found, losses


def _start(
    model: LoadedModel, item: Item, tokens: int, banned: frozenset[int], generator: torch.Generator
) -> tuple[int, ...]:
    """Exclamation marks where they survive decoding and encoding, else tokens drawn by ``generator`` that do."""
    mark = _ids(model.tokenizer, [item.questions[0] + item.separator + "!"])[0][-1]
    order = [mark, *torch.randperm(len(model.tokenizer), generator=generator)[:TRIES].tolist()]
    order = [token for token in order if token not in banned]
    suffix: tuple[int, ...] = ()
    for _ in range(tokens):
        found = next((s for t in order if (s := surviving(model.tokenizer, item, [(*suffix, t)]))), None)
        if found is None:
            raise UsageError("Verifier 'gcg' finds no suffix that this tokenizer decodes and encodes to the same "
                             "tokens: use the model's fast tokenizer, or leave gcg out.")  # fmt: skip
        suffix = found[0]
    return suffix


def _drawn(suffix: Sequence[int], best: Tensor, count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """``count`` copies of the suffix with one token replaced by one of its place's ``best`` [n, k]; each once."""
    places = torch.randint(len(suffix), (count,), generator=generator)
    ranks = torch.randint(best.shape[1], (count,), generator=generator)
    tried = torch.tensor([suffix]).repeat(count, 1)
    tried[torch.arange(count), places] = best[places, ranks]
    return [c for c in dict.fromkeys(map(tuple, tried.tolist())) if c != tuple(suffix)]


def surviving(tokenizer: Any, item: Item, suffixes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The suffixes whose text, behind the item's question, has the same tokens again."""
    question = item.questions[0]
    head = tuple(_ids(tokenizer, [question])[0])
    again = _ids(tokenizer, [question + _text(tokenizer, item, s) for s in suffixes]) if suffixes else []
    return [tuple(s) for s, ids in zip(suffixes, again, strict=True) if tuple(ids) == (*head, *s)]


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


def _text(tokenizer: Any, item: Item, suffix: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(suffix), clean_up_tokenization_spaces=False)
    return text if text[:1].isspace() else item.separator + text


def _with(tokenizer: Any, item: Item, suffix: Sequence[int]) -> Item:
    """The item asked with the suffix behind every question."""
    text = _text(tokenizer, item, suffix)
    return replace(item, prompt=item.prompt + text, paraphrases=tuple(p + text for p in item.paraphrases))


def _losses(model: LoadedModel, batches: Sequence[opt.Lot], suffixes: Sequence[Sequence[int]]) -> Array:
    """Mean cross-entropy (nats per answer token) of all texts with each of the suffixes in their free places."""
    total = np.zeros(len(suffixes))
    for lot in batches:
        rows, ids = lot.rows, lot.rows.batch.ids
        size = max(1, AT_ONCE // ids.numel())
        for at in range(0, len(suffixes), size):
            part = torch.tensor(suffixes[at : at + size])
            slots = lot.first[:, None] + torch.arange(part.shape[1])
            m = len(part)
            filled = ids.repeat(m, 1).scatter(1, slots.repeat(m, 1), part.repeat_interleave(len(ids), 0))
            many = rows._replace(choices=rows.choices[..., :1].repeat(m, 1, 1), real=rows.real.repeat(m, 1))
            logits = opt.answer_logits(model, Batch(filled, rows.batch.mask.repeat(m, 1)), rows.places.repeat(m, 1))
            total[at : at + m] -= opt.nats(logits, many).double().view(m, -1).sum(1).cpu().numpy()
    total[np.isnan(total)] = np.inf
    return total / max(1, sum(int(lot.rows.real.sum()) for lot in batches))
