"""Train the model towards its own distribution, moved away from what it says as one who knows."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit._collect import subsample
from repforget.edit.surgery._rows import strangers
from repforget.edit.train._data import Row, Rows, fact_rows
from repforget.edit.train._depth import at_depth
from repforget.edit.train._head import head_of
from repforget.edit.train._objective import Objective, find, shared_signature
from repforget.edit.train._pass import STATES, Request, Term, read
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import kept, train
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.models.weights import readers, writers
from repforget.progress import Progress, track
from repforget.records import Localization
from repforget.scoring.encode import context_limit, encode_prompts

LEFT_OUT = ("answers",)
DEFAULTS = {"retain": "hard_label"}
DEPTHS = (4 / 32, 5 / 32, 6 / 32, 7 / 32)
FLUENT_FACTS = 256
ROWS = 64  # facts asked about at once
HELD = 1 << 24  # numbers of one distribution over the vocabulary that are held at once
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Teaching:
    """How the teacher is made: ``tempered base + eta (novice - expert)``, its ``top_k`` outcomes; ``fluency`` in place
    of eta where text is generated."""

    eta_first: float
    eta_last: float
    temperature: float
    top_k: int
    guidance: float


@dataclass(frozen=True)
class Asked:
    """The contexts in which the untouched model is asked about one fact: token ids before the answer."""

    plain: Ids
    expert: Ids
    novices: tuple[Ids, ...]

    @property
    def longest(self) -> int:
        return max(map(len, (self.plain, self.expert, *self.novices)))

    def followed_by(self, ids: Ids) -> Asked:
        return Asked(self.plain + ids, self.expert + ids, tuple(novice + ids for novice in self.novices))


@shared_signature(left_out=LEFT_OUT, defaults=DEFAULTS)
def elm(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, checkpoint: Path | None = None, expert: str = "", novice: str = "auto",
    novices: int = 4, eta_first: float = 1.0, eta_last: float = 1000.0, temperature: float = 1.2, top_k: int = 50,
    fluency_weight: float = 1.0, fluency_tokens: int = 8, guidance: float = 3.0, **shared: Any,
) -> Edit:  # fmt: skip
    """Train forget answers towards what the model would say, less what it says when it speaks as one who knows.

    Per answer token a fixed teacher ``q ∝ softmax(top_k(log p0 / temperature - eta (log p_expert - log p_novice)))``
    of the untouched model: p0 behind the prompt, the expert behind ``expert`` + prompt, the novice behind ``novice`` +
    prompt; eta rises from ``eta_first`` to ``eta_last`` along the text.  Minimised are ``forget_weight`` times the
    cross-entropy to q, ``retain_weight`` times ``retain``, and ``fluency_weight`` times the negative log-probability of
    continuations of some forget prompts that the model generated under ``guidance`` in place of eta.  By default the
    attention and MLP matrices of the layers from 4/32 to 7/32 of the depth are trained, or the layers of ``where``.
    Source: Gandikota et al. 2024, arXiv 2410.02760 (ELM).

    Args:
        expert: text in front of the prompt, "{subject}" is filled in; none by default.
        novice: likewise; "auto" is no text but the prompt about made-up names, which nobody known to it bears, in the
            place of the subject, the mean over ``novices`` of them: made by this project, for it needs no text written
            per domain.
        fluency_tokens: length of generated continuations; a fluency_weight of 0 leaves them out.

    Raises UsageError for settings out of range, KnowledgeError where contexts are too long or no made-up name fits.
    Cost: before training 2 + ``novices`` forwards over the forget facts, and ``fluency_tokens`` times that over at most
    256 of them; then one forward and backward over three sets per step; memory: ``top_k`` numbers per answer token.

    Weakness: with a large eta the teacher is next to one token, which may be any that the expert finds improbable.  It
    teaches another answer and does not show that nothing is left inside.
    """
    teaching = Teaching(eta_first, eta_last, temperature, top_k, guidance)
    _check(teaching, novices, fluency_weight, fluency_tokens)
    common = Settings(**{**DEFAULTS, **shared})
    rows, facts = fact_rows(model, subsample(data.forget, common.max_facts, seed), "forget")
    asked = contexts(model, data, facts, rows, expert, novice, novices, seed)
    teachers = teach(model, asked, rows, teaching, progress)
    ready = [Term(Objective("soft_label", soft_label, "token_mean"), {}, "forget", common.forget_weight,
                  Rows("forget", rows), teachers=teachers)]  # fmt: skip
    if fluency_weight > 0:
        some = asked[:: math.ceil(len(asked) / FLUENT_FACTS)]
        told = fluent(model, some, teaching, fluency_tokens, seed, progress)
        ready.append(Term(find("nll", "retain"), {}, "forget", fluency_weight, Rows("fluency", told)))
    if common.targets == "auto" and where is None:
        common = Settings(**{**DEFAULTS, **shared, "targets": _early(model)})
    own = {"expert": expert, "novice": novice, "novices": novices, "eta_first": eta_first, "eta_last": eta_last,
           "temperature": temperature, "top_k": top_k, "fluency_weight": fluency_weight,
           "fluency_tokens": fluency_tokens, "guidance": guidance}  # fmt: skip
    return train(model, data, "elm", kept(common), common, where=where, seed=seed, progress=progress,
                 checkpoint=checkpoint, settings=own, ready=ready, left_out=LEFT_OUT)  # fmt: skip


def soft_label(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy (nats) to the teacher per token [m]."""
    return -(teacher.exp() * logits.log_softmax(-1)).sum(-1)


def contexts(
    model: LoadedModel, data: EditData, facts: Sequence[Fact], rows: Sequence[Row], expert: str, novice: str,
    novices: int, seed: int,
) -> list[Asked]:  # fmt: skip
    """In which contexts each fact is asked, by texts in front of its prompt or by made-up names in it."""

    def put(prefix: str, fact: Fact) -> str:
        return prefix.replace("{subject}", fact.subject) + fact.prompt

    if novice == "auto":
        names = strangers(sorted({f.subject for f in (*data.forget, *data.retain) if f.subject}))
        fit = bool(names) and all(f.subject and f.subject in f.prompt for f in facts)
        if not fit:
            raise KnowledgeError("elm could not make a novice, because a prompt does not hold its subject or no name "
                                 "of several words can be recombined: give a text (novice).")  # fmt: skip
        draw = random.Random(f"novices-{seed}")
        unknowing = [[f.prompt.replace(f.subject, name) for name in draw.choices(names, k=novices)] for f in facts]
    else:
        unknowing = [[put(novice, f)] for f in facts]
    knowing = encode_prompts(model.tokenizer, [put(expert, f) for f in facts])
    flat = iter(encode_prompts(model.tokenizer, [text for texts in unknowing for text in texts]))
    found = [Asked(row.ids[: row.start], e, tuple(next(flat) for _ in texts))
             for row, e, texts in zip(rows, knowing, unknowing, strict=True)]  # fmt: skip
    longest = max(a.longest + row.labels for a, row in zip(found, rows, strict=True))
    if longest > context_limit(model):
        raise KnowledgeError(f"Expert or novice with prompt and answer have up to {longest} tokens and the model's "
                             f"context {context_limit(model)}: shorten the texts in front.")  # fmt: skip
    return found


def teach(
    model: LoadedModel, asked: Sequence[Asked], rows: Sequence[Row], teaching: Teaching,
    progress: Progress | None = None,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The teacher of each row: outcomes [labels, k], and log-probabilities [labels, k + 1] of them and of the rest."""
    made = []
    answers = [row.ids[row.start :] for row in rows]
    compared = track(progress, _compared(model, asked, answers), "asking the expert and the novice", len(rows))
    for row, (plain, away) in zip(rows, compared, strict=True):
        along = torch.arange(row.start - 1, len(row.ids) - 1, dtype=plain.dtype, device=plain.device)
        eta = teaching.eta_first + (teaching.eta_last - teaching.eta_first) * along / (len(row.ids) - 1)
        scores = plain / teaching.temperature + eta[:, None] * away
        best = scores.topk(min(teaching.top_k, scores.shape[-1] - 1), dim=-1)
        chosen = best.values.log_softmax(-1).float()
        none = chosen.new_full((len(chosen), 1), -torch.inf)
        made.append((best.indices.cpu(), torch.cat([chosen, none], -1).cpu()))
    return made


def fluent(
    model: LoadedModel, asked: Sequence[Asked], teaching: Teaching, tokens: int, seed: int,
    progress: Progress | None = None,
) -> tuple[Row, ...]:  # fmt: skip
    """Continuations of the plain prompts, up to the end of the text, drawn from the model as the novice guides it."""
    generator = torch.Generator().manual_seed(seed)
    end = model.tokenizer.eos_token_id
    told: list[Ids] = [() for _ in asked]
    room = context_limit(model) - max(a.longest for a in asked)
    for _ in track(progress, range(min(tokens, room)), "generating continuations"):
        now = [a.followed_by(own) for a, own in zip(asked, told, strict=True)]
        for n, (plain, away) in enumerate(_compared(model, now, [(0,)] * len(now))):
            odds = (plain + teaching.guidance * away)[0].softmax(-1).cpu()
            token = int(torch.multinomial(odds, 1, generator=generator))
            told[n] = told[n] if told[n][-1:] == (end,) else (*told[n], token)
    return tuple(Row((*a.plain, *own), len(a.plain)) for a, own in zip(asked, told, strict=True))


def _compared(
    model: LoadedModel, asked: Sequence[Asked], tails: Sequence[Ids]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per fact, at each token of its tail: log p [t, V], and log p_novice - log p_expert [t, V] (float64)."""
    size = min(ROWS, max(1, HELD // (head_of(model.module).size * max(map(len, tails)))))
    for at in range(0, len(asked), size):
        part, ends = asked[at : at + size], tails[at : at + size]
        plain = _logprobs(model, [a.plain for a in part], ends)
        knowing = _logprobs(model, [a.expert for a in part], ends)
        unknowing = [_logprobs(model, each, ends) for each in zip(*(a.novices for a in part), strict=True)]
        away = torch.stack(unknowing).logsumexp(0).log_softmax(-1) - knowing
        counts = [len(tail) for tail in ends]
        yield from zip(torch.split(plain, counts), torch.split(away, counts), strict=True)


@torch.no_grad()
def _logprobs(model: LoadedModel, contexts: Sequence[Ids], tails: Sequence[Ids]) -> Tensor:
    """Log-probabilities [m, V] (float64) at all tokens of the tails, each behind its context."""
    rows = tuple(Row((*context, *tail), len(context)) for context, tail in zip(contexts, tails, strict=True))
    (found,) = read(model, [Request(rows, frozenset({STATES}))])
    if found.states is None:
        raise RuntimeError("the rows were not read")
    return head_of(model.module).logits(found.states).double().log_softmax(-1)


def _early(model: LoadedModel) -> list[str]:
    """The attention and MLP matrices of the early layers, as patterns that match them alone."""
    layers = at_depth(*DEPTHS)(model.n_layers)
    refs = [*readers(model.module), *writers(model.module)]
    names = dict.fromkeys(ref.name for ref in refs if ref.layer in layers and ref.role != "router")
    return [f"^{re.escape(name)}$" for name in names]


def _check(teaching: Teaching, novices: int, weight: float, tokens: int) -> None:
    if teaching.temperature <= 0 or teaching.top_k < 1 or novices < 1 or tokens < 1 or weight < 0:
        raise UsageError(f"elm was given temperature {teaching.temperature}, top_k {teaching.top_k}, "
                         f"novices {novices}, fluency_tokens {tokens}, fluency_weight {weight}: all must be positive, "
                         "the weight at least 0.")  # fmt: skip
