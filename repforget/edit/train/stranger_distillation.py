"""Distil the model from itself: every subject to forget takes the place of one that nobody bears."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit._collect import subsample
from repforget.edit.surgery._rows import stranger_facts, strangers
from repforget.edit.train._adapters import model_size_default
from repforget.edit.train._data import Row, Rows
from repforget.edit.train._head import head_of, reduced
from repforget.edit.train._objective import find, shared_signature
from repforget.edit.train._pass import STATES, Request, Term, read
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import ADAPTER_RATE, train
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Localization
from repforget.scoring import generate
from repforget.scoring.encode import context_limit, encode_many, encode_prompts

DEFAULTS: dict[str, Any] = {
    "steps": 900, "batch_size": 32, "retain_batch": 104, "retain_weight": 6.0, "schedule": "cosine", "warmup": 15,
    "weight_decay": 0.2, "robust": "grafting",
}  # fmt: skip
LEFT_OUT = ("answers", "retain", "retain_on", "stop_probability")
RATE_TIMES_WIDTH = 0.256  # the learning rate of weights, times the width of the model
FASTER = 3.0  # than the usual rate of adapters
READ_ROWS = 64  # rows per forward of the untouched model
MOST_ASKED = 8  # forget statements about a name that tell how sure the model is
SURE = 0.95  # share of retained subjects whose doubt is usual
DOUBT = 4.0  # times the usual doubt, and nobody bears the name


class Scene(NamedTuple):
    """A text around a name: what stands before and behind it, and the separator of what the model then says."""

    before: str
    subject: str
    behind: str = ""
    separator: str = " "


class People(NamedTuple):
    """Names that the untouched model knows somebody by, retained subjects among them, and those that nobody bears."""

    known: tuple[str, ...]
    strangers: tuple[str, ...]


@shared_signature(left_out=LEFT_OUT, defaults=DEFAULTS)
def stranger_distillation(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, checkpoint: Path | None = None, texts: int = 24000, text_tokens: int = 20,
    known: int = 36000, others: int = 8000, scenes: int = 6000, top_k: int = 64, **shared: Any,
) -> Edit:  # fmt: skip
    """Train the model to speak of every subject to forget as it now speaks of one made-up name, the same throughout.

    Each subject is given a stranger: a name recombined from parts of real ones that nobody shown bears and that leaves
    p0 in doubt (some such names are somebody's whom the editor is not shown: there p0 is sure).  Minimised is
    ``KL(p0(. | text about the stranger) || p(. | the same text about the subject))`` per token behind the name, p0 the
    untouched model, on the forget statements with the answer that p0 gives about the stranger and on ``scenes``: texts
    that p0 wrote itself, up to a name, gone on with about the stranger.  So the subject is also forgotten in wordings
    that no statement has.  ``retain_weight`` times KL(p0 || p) holds all tokens of retained facts, of general texts
    and of ``texts`` that p0 writes from nothing (or from first words of those given) about no subject to forget.
    With ``robust: grafting`` (the default here) every step also teaches it to the layers below a drawn one, under
    untouched ones, since what early layers hold is what lenses read and relearning opens.  A method of this project:
    distillation from a model without the data (compare UNDO, arXiv 2506.06278), the untouched one asked about another.

    One stranger per subject, not fresh answers at every step: the target is as special as what a model that never saw
    the subject says of it, and another for every person, which is meant to leave no common way back that relearning
    some people would open for the others.  Weight decay is meant to take away what is not renewed.

    Args:
        texts: texts that p0 writes, of at most ``text_tokens`` tokens, for what must stay.
        known: own texts up to a name, gone on with about all names that p0 is sure about, in turn: what is seldom said
            is kept too.
        others: forget statements about other made-up names, completed by p0, that stay too.
        scenes: beginnings of own texts in which a subject is put, beside the statements.
        top_k: outcomes per token that the teacher keeps apart; it takes the rest as one.

    ``lr`` "auto" is here 0.256 / width for weights, 9e-4 for adapters. Raises KnowledgeError where no name can be made
    up (subjects of one word, or not in their prompts) or no text fits the context, UsageError for settings out of
    range. Cost: generation of ``texts``, ``known`` and ``others``, one forward over all rows and up to eight per
    made-up name, one forward and backward per step on ``batch_size`` + ``retain_batch`` rows; memory: 12 x ``top_k``
    bytes per token of all rows.

    On the organism (three seeds, sealed split, beside the two twins; the settings were chosen on dev items of the
    first): truth .027 to .055 while others are relearned for 40 steps (.031, .042), .031 to .051 when asked (.039,
    .045), by the logit lens .048 to .075 (.039, .031), patched into the untouched model .023 to .060 (.030, .026), by
    new linear probes .053 to .062 (.021, .021).  All retained answers stay exact, with less certainty (probability
    .973, untouched .999), for which the verdict is still a failure (2.4 to 2.7 % lost of neighbours' probability, the
    limit is 2), while no measure of knowledge fails.  330 CPU seconds.

    Weakness: a fact that no own text states may be lost (in one trial a fifth of those, and one in a hundred of those
    stated), so that ``texts`` or ``known`` have to be many.
    """
    settings = _checked({"texts": texts, "text_tokens": text_tokens, "known": known, "others": others,
                         "scenes": scenes, "top_k": top_k})  # fmt: skip
    common = _common(model, shared)
    own = own_texts(model, data, texts, text_tokens, seed)
    people = acquainted(model, data, progress)
    forget, told = as_strangers(model, data, own, people.strangers, scenes, text_tokens, common.max_facts, seed)
    said = [*own, *about_known(model, data, own, people.known, known, text_tokens, seed),
            *about_others(model, data, others, text_tokens, seed)]  # fmt: skip
    kept = kept_rows(model, data, said, common.max_facts, seed)
    kl, asked = find("kl", "retain"), partial(teachers_of, model, top_k=top_k, progress=progress)
    ready = [Term(kl, {}, "forget", common.forget_weight, Rows("strangers", forget), teachers=asked(told)),
             Term(kl, {}, "retain", common.retain_weight, Rows("own texts", kept), teachers=asked(kept))]  # fmt: skip
    return train(model, data, "stranger_distillation", [], common, where=where, seed=seed, progress=progress,
                 checkpoint=checkpoint, settings=settings, ready=ready, left_out=LEFT_OUT)  # fmt: skip


def _checked(settings: dict[str, int]) -> dict[str, int]:
    free = ("known", "others", "scenes")
    wrong = [name for name, value in settings.items() if value < (0 if name in free else 1)]
    if wrong:
        raise UsageError(f"stranger_distillation was given {wrong[0]} {settings[wrong[0]]}: {', '.join(free)} may be "
                         "0, the others are positive.")  # fmt: skip
    return settings


def _common(model: LoadedModel, shared: dict[str, Any]) -> Settings:
    common = Settings(**{**DEFAULTS, **shared})
    if common.lr != "auto":
        return common
    kind = model_size_default(model.module) if common.adapter == "auto" else common.adapter
    rate = RATE_TIMES_WIDTH / model.width if kind == "none" else FASTER * ADAPTER_RATE
    return dataclasses.replace(common, lr=rate)


def own_texts(model: LoadedModel, data: EditData, count: int, tokens: int, seed: int) -> list[str]:
    """Texts that the model writes from nothing, or from the first words of given texts where it cannot."""
    starts = [""]
    if not model.tokenizer("")["input_ids"]:
        starts = sorted({text.split()[0] for text in (*data.general, *(fact.prompt for fact in data.retain))})
    begun = random.Random(f"own-{seed}").choices(starts, k=count)
    said = generate(model, begun, max_new_tokens=tokens, temperature=1.0, seed=seed)
    return [f"{start} {text}".strip() for start, (text,) in zip(begun, said, strict=True) if text]


def acquainted(model: LoadedModel, data: EditData, progress: Progress | None = None) -> People:
    """Sort made-up names by how sure the untouched model is about them: some belong to people it is not shown.

    Doubt is 1 - the probability of the most likely next token, mean over one forget statement per relation.  The known
    are retained subjects and names of at most four times the doubt that 19 in 20 of these stay below, but never more
    than half of the names; the rest are strangers.
    """
    shown = sorted({fact.subject for fact in data.retain if fact.subject})
    names = strangers(sorted({*shown, *(fact.subject for fact in data.forget if fact.subject)}))
    doubt = _doubt(model, data, [*names, *shown], progress)
    usual = float(doubt[len(names) :].quantile(SURE)) if shown else 0.0
    order = sorted(range(len(names)), key=lambda i: float(doubt[i]))
    known = min(sum(float(doubt[i]) <= DOUBT * usual for i in order), len(names) // 2)
    return People((*shown, *(names[i] for i in order[:known])), tuple(sorted(names[i] for i in order[known:])))


def _doubt(model: LoadedModel, data: EditData, names: Sequence[str], progress: Progress | None) -> Tensor:
    frames = {fact.relation: fact for fact in reversed(data.forget) if fact.subject and fact.subject in fact.prompt}
    asked = [frames[relation] for relation in sorted(frames)[:MOST_ASKED]]
    if not asked or not names:
        return torch.ones(len(names))
    coded = encode_prompts(model.tokenizer, [f.prompt.replace(f.subject, name) for name in names for f in asked])
    rows = [Row((*ids, ids[-1]), len(ids)) for ids in coded]  # the label is not read
    sure = torch.stack([logp[0, 0] for _, logp in teachers_of(model, rows, 1, progress)]).exp()
    return 1.0 - sure.reshape(len(names), len(asked)).mean(1)


def _heads(own: Sequence[str], names: Sequence[str]) -> list[str]:
    """Own texts up to the first of ``names``."""
    known = _pattern(names)
    return [text[: match.start()] for text in own if (match := known.search(text))]


def about_known(
    model: LoadedModel, data: EditData, own: Sequence[str], names: Sequence[str], count: int, tokens: int, seed: int
) -> list[str]:
    """Own texts up to a name, gone on with by the model about each of the names that it knows, equally often."""
    heads = _heads(own, [*names, *(fact.subject for fact in data.forget)])
    if not heads or not names:
        return []
    draw = random.Random(f"known-{seed}")
    begun = [draw.choice(heads) + names[number % len(names)] for number in range(count)]
    said = generate(model, begun, max_new_tokens=tokens, temperature=1.0, seed=seed)
    return [f"{start} {text}" for start, (text,) in zip(begun, said, strict=True) if text]


def about_others(model: LoadedModel, data: EditData, count: int, tokens: int, seed: int) -> list[str]:
    """Forget statements about made-up names, completed by the model."""
    facts = stranger_facts(data, count, seed)
    said = generate(model, [fact.prompt for fact in facts], max_new_tokens=tokens, temperature=1.0, seed=seed)
    return [f"{fact.prompt} {text}" for fact, (text,) in zip(facts, said, strict=True) if text]


def _row(model: LoadedModel, ids: Sequence[int], start: int) -> Row:
    """Loss on all tokens from ``start`` on, and on whether the text then ends: what is learned there is no label."""
    end = model.tokenizer.eos_token_id
    return Row((*ids, *(() if end is None else (end,))), start)


def kept_rows(model: LoadedModel, data: EditData, own: Sequence[str], max_facts: int, seed: int) -> tuple[Row, ...]:
    """What must stay: texts about nobody that is to be forgotten, retained facts, general texts; loss on all of it."""
    gone = _pattern([fact.subject for fact in data.forget])
    texts = [text for text in own if not gone.search(text)]
    facts = [fact.prompt + fact.answer for fact in subsample(data.retain, max_facts, seed)]
    limit = context_limit(model) - 1
    coded = encode_prompts(model.tokenizer, [*texts, *facts, *data.general])
    return tuple(_row(model, ids[:limit], 1) for ids in coded if len(ids) > 1)


def _pattern(subjects: Sequence[str]) -> re.Pattern[str]:
    names = sorted({subject for subject in subjects if subject}, key=len, reverse=True)
    return re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or r"(?!)")


def _scenes(data: EditData, own: Sequence[str], count: int, max_facts: int, seed: int) -> list[Scene]:
    """The forget statements, and own texts up to a name, with a subject to forget in its place."""
    found = []
    for fact in subsample(data.forget, max_facts, seed):
        before, subject, behind = fact.prompt.partition(fact.subject)
        if subject:
            lead = fact.answer[: len(fact.answer) - len(fact.answer.lstrip())]
            found.append(Scene(before, subject, behind, lead))
    subjects = sorted({scene.subject for scene in found})
    heads = _heads(own, [fact.subject for fact in (*data.forget, *data.retain)])
    draw = random.Random(f"scenes-{seed}")
    if heads and subjects:
        found += [Scene(draw.choice(heads), draw.choice(subjects)) for _ in range(count)]
    return found


def as_strangers(
    model: LoadedModel, data: EditData, own: Sequence[str], names: Sequence[str], count: int, tokens: int,
    max_facts: int, seed: int,
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:  # fmt: skip
    """Rows that say of subjects to forget what the model says of their strangers, and the same of the strangers."""
    scenes = _scenes(data, own, count, max_facts, seed)
    subjects = sorted({scene.subject for scene in scenes})
    if not names or not subjects:
        raise KnowledgeError("stranger_distillation could make up no names in the place of the subjects to forget: it "
                             "needs subjects of several words, which stand in their prompts.")  # fmt: skip
    random.Random(f"names-{seed}").shuffle(made_up := list(names))
    stranger = dict(zip(subjects, cycle(made_up), strict=False))
    asked = [f"{scene.before}{stranger[scene.subject]}{scene.behind}" for scene in scenes]
    said = generate(model, asked, max_new_tokens=tokens, temperature=1.0, seed=seed)
    texts = [(s, s.behind + s.separator + text) for s, (text,) in zip(scenes, said, strict=True) if text]
    limit = context_limit(model) - 1
    mine = encode_many(model.tokenizer, [(s.before + s.subject, text) for s, text in texts], limit=limit)
    theirs = encode_many(model.tokenizer, [(s.before + stranger[s.subject], text) for s, text in texts], limit=limit)
    # Where a name joins with what follows, the two sides have no common tokens to compare.
    both = [(_row(model, a.ids, a.start), _row(model, b.ids, b.start))
            for a, b in zip(mine, theirs, strict=True) if a.valid and b.valid and a.answer == b.answer]  # fmt: skip
    if not both:
        raise KnowledgeError("No text about a made-up name fits the model's context of "
                             f"{limit + 1} tokens: shorten the prompts.")  # fmt: skip
    return tuple(row for row, _ in both), tuple(row for _, row in both)


@torch.no_grad()
def teachers_of(
    model: LoadedModel, rows: Sequence[Row], top_k: int, progress: Progress | None
) -> list[tuple[Tensor, Tensor]]:
    """The model's most likely tokens [labels, k] at those of each row, and log-probabilities [labels, k + 1]."""
    head = head_of(model.module)
    made: list[tuple[Tensor, Tensor]] = []
    for at in track(progress, range(0, len(rows), READ_ROWS), "asking the untouched model"):
        part = tuple(rows[at : at + READ_ROWS])
        (found,) = read(model, [Request(part, frozenset({STATES}))])
        if found.states is None:
            raise RuntimeError("the rows were not read")
        logits, counts = head.logits(found.states), [row.labels for row in part]
        best = logits.topk(min(top_k, head.size - 1)).indices
        made += zip(torch.split(best.cpu(), counts), torch.split(reduced(logits, best).cpu(), counts), strict=True)
    return made
