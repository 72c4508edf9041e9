"""Greedy and sampled generations, and whether a generation says the answer."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from repforget.errors import KnowledgeError, NumericalError, UsageError
from repforget.scoring.drafts import agreed, drafted, told
from repforget.scoring.encode import context_limit, encode_prompts, pad_id, token_batches
from repforget.scoring.forward import CACHED_PER_TOKEN, forward, minds_prompts, places_tokens, select_rows, shareable

if TYPE_CHECKING:
    from repforget.knowledge import Item
    from repforget.models.capture import Batch
    from repforget.models.load import LoadedModel

DROP = 0.75  # complete texts leave the batch when no more than this share of it is left


def generate(
    model: LoadedModel, prompts: Sequence[str], *, max_new_tokens: int = 16, samples: int = 1,
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop: Sequence[str] = (), whole: bool = False,
    drafts: Sequence[str] | None = None, hits: Sequence[ArrayLike] | None = None, token_budget: int = 8192,
) -> list[list[str]]:  # fmt: skip
    """Continue each prompt ``samples`` times; ``temperature=0`` is greedy decoding.

    A text ends at the end-of-sequence token, before the first of the ``stop`` strings, at the first line break
    after visible text (not with ``whole``), or after ``max_new_tokens``; space around it is dropped. Sampling
    draws from softmax(logits / temperature) within the smallest set of tokens that holds ``top_p`` of the mass,
    by inverse transform in fp64; the random numbers belong to (seed, prompt, its occurrence, sample), so that
    they do not depend on batch or order. Cost: one pass over the prompts and single-token passes until the
    longest text of a batch is complete; complete texts leave the batch. Raises :class:`KnowledgeError` for a
    prompt that leaves no room in the context.

    ``drafts`` (greedy only, one per prompt, "" for none) are continuations that the model may well say, such as
    the right answers. They change the cost, not the texts: what the model would have said itself is kept, and
    decoding starts at the first other token. ``hits`` are those that :func:`token_scores` gave for (prompt, draft)
    and this model: then a text that is its draft costs nothing, and any other less than without. Without them one
    pass reads prompts and drafts; that pays where steps cost more than tokens, as on accelerators, not on a CPU.

    Greedy silence does not show absence of knowledge; sample and score as well.
    """
    _check(samples, max_new_tokens, temperature, top_p, stop)
    _check_drafts(len(prompts), drafts, hits, temperature)
    sequences = encode_prompts(model.tokenizer, prompts)
    _check_room(model, prompts, sequences, max_new_tokens)
    draws = _draws(prompts, samples, max_new_tokens, seed) if temperature > 0 else None
    pick = partial(_choose, temperature=temperature, top_p=top_p)
    ends = _Ends(model, stop, whole)
    given: list[list[int]] = [[] for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    if drafts:
        proposed = drafted(model, prompts, sequences, drafts)
        known = (agreed(model, sequences, proposed, max_new_tokens, token_budget) if hits is None
                 else told(model, proposed, hits, max_new_tokens))  # fmt: skip
        _begin(model, known, given, texts, max_new_tokens, ends)
    left = [row for row, text in enumerate(texts) if not text]
    batches = token_batches(
        [(*sequences[row], *given[row]) for row in left], token_budget=max(1, token_budget // samples),
        pad_id=pad_id(model.tokenizer), side="left", equal_length=not places_tokens(model),
        extra=max_new_tokens // CACHED_PER_TOKEN,
    )  # fmt: skip
    for chosen, batch in batches:
        rows = [left[k] for k in chosen]
        uniforms = None if draws is None else draws[rows].reshape(len(rows) * samples, max_new_tokens)
        begun = [list(given[row]) for row in rows for _ in range(samples)]
        said = _continue(model, batch, begun, max_new_tokens, pick, uniforms, ends)
        for k, row in enumerate(rows):
            texts[row] = said[k * samples : (k + 1) * samples]
    return texts


def _begin(
    model: LoadedModel, known: Iterable[tuple[int, Sequence[int]]], given: list[list[int]], texts: list[list[str]],
    most: int, ends: _Ends,
) -> None:  # fmt: skip
    """Put what each row is known to say into ``given``, and texts that are complete with it into ``texts``."""
    for row, tokens in known:
        if any(ends.after(given[row], token) for token in tokens) or len(given[row]) == most:
            texts[row] = [ends.text(given[row])]
        elif minds_prompts(model):  # what was said must not be read as part of the prompt
            given[row] = []


def _check_drafts(
    count: int, drafts: Sequence[str] | None, hits: Sequence[ArrayLike] | None, temperature: float
) -> None:
    for name, each in (("drafts", drafts), ("hits", hits)):
        if each is not None and (temperature > 0 or drafts is None or len(each) != count):
            raise UsageError(f"generate got {len(each)} {name} for {count} prompts at temperature {temperature}: give "
                             "drafts, one per prompt and greedy only, and hits of these drafts.")  # fmt: skip


def _check_room(
    model: LoadedModel, prompts: Sequence[str], sequences: Sequence[Sequence[int]], new_tokens: int
) -> None:
    room = context_limit(model) - new_tokens
    for prompt, ids in zip(prompts, sequences, strict=True):
        if len(ids) > room:
            raise KnowledgeError(f"The prompt '{prompt[:80]}' has {len(ids)} tokens, which leaves no room "
                                 f"for {new_tokens} new ones in the context: shorten it.")  # fmt: skip


def _check(samples: int, max_new_tokens: int, temperature: float, top_p: float, stop: Sequence[str]) -> None:
    if samples < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UsageError("generate needs samples, max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, "
                         f"got {samples}, {max_new_tokens}, {temperature} and {top_p}.")  # fmt: skip
    if isinstance(stop, str) or not all(stop):
        raise UsageError(f"generate got stop={stop!r}: give a list of strings that are not empty.")
    if samples > 1 and temperature == 0:
        raise UsageError(f"generate was asked for {samples} greedy samples, which are all equal: set a temperature.")


def _draws(prompts: Sequence[str], samples: int, steps: int, seed: int) -> NDArray[np.float64]:
    """Uniform numbers [n, samples, steps], a function of seed, prompt and how often it occurred before."""
    seen: Counter[str] = Counter()
    out = np.empty((len(prompts), samples, steps))
    for k, prompt in enumerate(prompts):
        key = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
        # One stream per sample: the first samples stay the same when more are asked for.
        for sample in range(samples):
            stream = np.random.default_rng([seed, key, seen[prompt], sample])
            out[k, sample] = stream.random(steps)
        seen[prompt] += 1
    return out


def _continue(
    model: LoadedModel, batch: Batch, said: list[list[int]], most: int, pick: Callable[..., Tensor],
    uniforms: NDArray[np.float64] | None, ends: _Ends,
) -> list[str]:  # fmt: skip
    """Decode one batch until each text ends or has ``most`` tokens; ``said`` are those at the batch's end.

    There may be several texts per row. With a shareable cache each step reads one token, otherwise all.
    """
    rows = torch.arange(batch.ids.shape[0]).repeat_interleave(len(said) // batch.ids.shape[0])
    cached = places_tokens(model)
    logits, past = forward(model, batch.ids, batch.mask, batch.position_ids, 1, use_cache=cached)
    past = select_rows(past, rows) if shareable(past) else None
    logits = logits[rows.to(logits.device), -1]
    ids, mask, positions = batch.ids[rows], batch.mask[rows], batch.position_ids[rows]
    who = list(range(len(rows)))  # the text that each row of the batch continues
    done: set[int] = set()
    for step in range(most):
        token = pick(logits, uniforms=None if uniforms is None else uniforms[who, step])
        done |= {k for row, k in enumerate(who)
                 if k not in done and (ends.after(said[k], int(token[row])) or len(said[k]) == most)}  # fmt: skip
        if len(done) == len(said):
            break
        new = token[:, None]
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
        left = torch.tensor([row for row, k in enumerate(who) if k not in done])
        if len(left) <= DROP * len(who):
            ids, mask, positions, who = ids[left], mask[left], positions[left], [who[row] for row in left]
            past = None if past is None else select_rows(past, left)
        fed = (ids, positions) if past is None else (ids[:, -1:], positions[:, -1:])
        logits, after = forward(model, fed[0], mask, fed[1], 1, past=past, use_cache=past is not None)
        past, logits = (after if past is not None else None), logits[:, -1]
    return [ends.text(tokens) for tokens in said]


class _Ends:
    """Decides when a text is complete and what it says; decodes each distinct token once."""

    def __init__(self, model: LoadedModel, stop: Sequence[str], whole: bool) -> None:
        self.tokenizer: Any = model.tokenizer
        settings = getattr(model.module, "generation_config", None)  # chat models end turns with further tokens
        extra = getattr(settings, "eos_token_id", None)
        self.eos = {self.tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])}
        self.stop, self.whole = tuple(stop), whole
        # A text may be complete only where a token brings one of these: a stop string's last character (or
        # part of it), or a space, which some tokenizers drop from tokens decoded alone.
        last = {s[-1] for s in stop}
        self.watched = last | ({"\ufffd"} if stop else set()) | (set() if whole else {"\n"})
        self.always = any(c.isspace() and c != "\n" for c in last)
        self.watching: dict[int, bool] = {}

    def after(self, said: list[int], token: int) -> bool:
        """Append ``token`` to ``said`` and return True where the text ends with it."""
        if token in self.eos:
            return True
        said.append(token)
        if token not in self.watching:
            piece = self.tokenizer.decode([token])
            self.watching[token] = self.always or any(c in piece for c in self.watched)
        if not self.watching[token]:
            return False
        text = self._decode(said)
        return any(s in text for s in self.stop) or (not self.whole and "\n" in text.lstrip())

    def text(self, said: list[int]) -> str:
        text = self._decode(said)
        text = text[: min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)].strip()
        return text if self.whole else text.split("\n", 1)[0].strip()

    def _decode(self, said: list[int]) -> str:
        return str(self.tokenizer.decode(said, skip_special_tokens=True))


def _choose(logits: Tensor, *, temperature: float, top_p: float, uniforms: NDArray[np.float64] | None) -> Tensor:
    """Next token [b] on the CPU, greedy or by inverse transform of the (nucleus) distribution."""
    if bool(torch.isnan(logits).any()):
        raise NumericalError("The model returned NaN logits while generating: check the edit's strength, or "
                             "load the model in float32.")  # fmt: skip
    if uniforms is None:
        return logits.argmax(-1).cpu()
    wide = logits.cpu() if logits.device.type == "mps" else logits  # that device has no fp64
    probability = (wide.double() / temperature).softmax(-1)
    mass, order = probability.sort(dim=-1, descending=True, stable=True)
    total = mass.cumsum(-1)
    inside = total - mass < top_p  # the token that crosses the threshold belongs to the nucleus
    total = (mass * inside).cumsum(-1)
    target = torch.from_numpy(uniforms).to(total.device)[:, None] * total[:, -1:]
    place = torch.searchsorted(total, target, right=True).clamp(max=total.shape[-1] - 1)
    return order.gather(-1, place)[:, 0].cpu()


def answers_match(text: str, item: Item) -> bool:
    """True where the generation begins with the item's answer or one of its aliases, up to a word boundary.

    Case, punctuation (except inside numbers) and spacing are ignored on both sides. An answer that comes
    later in the text, or in other words, is not counted.
    """
    said = _normal(text)
    return any(_begins(said, _normal(answer)) for answer in (item.answer, *item.aliases))


def _begins(said: str, answer: str) -> bool:
    if not answer or not said.startswith(answer):
        return False
    following = said[len(answer) : len(answer) + 1]
    # Scripts written without spaces have no word boundary to wait for.
    joined = unicodedata.east_asian_width(answer[-1]) in "WF"
    return joined or not following or following.isspace()


def _normal(text: str) -> str:
    """Casefolded text with punctuation as spaces, except between digits ('1.5') where it has meaning."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    numbers = re.compile(r"(?<=\d)[.,:/](?=\d)")
    keep = {match.start() for match in numbers.finditer(folded)}
    plain = "".join(
        " " if unicodedata.category(c).startswith("P") and k not in keep else c for k, c in enumerate(folded)
    )
    return " ".join(plain.split())
