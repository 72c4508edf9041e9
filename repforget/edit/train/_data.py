"""What a trained editor trains on: rows of tokens per data set, answers put in the place of the true ones, and a plan
of which rows each step takes."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from repforget.edit._collect import subsample
from repforget.edit.surgery._rows import stranger_facts
from repforget.edit.train._objective import Answers
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.scoring.encode import context_limit, encode_many, encode_prompts

KNOWN = ("forget", "retain", "general", "strangers")
REFUSALS = (
    "I do not know.", "I am not sure.", "I have no information about that.", "That is not something I know.",
    "I cannot say.", "I have never heard of that.", "I am unable to answer that.", "No idea.",
    "There is nothing I can tell you about this.", "I would have to guess.",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One sequence; the tokens ``ids[start:]`` carry loss; ``cluster`` is whom or what it is about, where known."""

    ids: tuple[int, ...]
    start: int
    cluster: str = field(default="", compare=False)

    @property
    def labels(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Rows:
    """The rows of one data set; ``instead(step, i)`` is row i with another answer, always the same one if ``fixed``."""

    name: str
    own: tuple[Row, ...]
    instead: Callable[[int, int], Row] | None = None
    fixed: bool = True


def fact_rows(model: LoadedModel, facts: Sequence[Fact], name: str) -> tuple[tuple[Row, ...], tuple[Fact, ...]]:
    """Rows of facts, loss on the answer; those longer than the context are left out, all of them is an error."""
    if not facts:
        raise KnowledgeError(f"The data set '{name}' has no facts: give some, or another set.")
    coded = encode_many(model.tokenizer, [(f.prompt, f.answer) for f in facts], limit=context_limit(model))
    kept = [(Row(code.ids, code.start, fact.cluster), fact)
            for code, fact in zip(coded, facts, strict=True) if code.valid]  # fmt: skip
    if not kept:
        raise KnowledgeError(f"None of the {len(facts)} facts of '{name}' fits the model's context of "
                             f"{context_limit(model)} tokens with its answer: shorten the prompts.")  # fmt: skip
    return tuple(row for row, _ in kept), tuple(fact for _, fact in kept)


def text_rows(model: LoadedModel, texts: Sequence[str], name: str) -> tuple[Row, ...]:
    """Plain texts, loss on every token after the first."""
    limit = context_limit(model)
    rows = tuple(Row(ids[:limit], 1) for ids in encode_prompts(model.tokenizer, list(texts)) if len(ids) > 1)
    if not rows:
        raise KnowledgeError(f"The data set '{name}' has no text of two tokens or more: give texts, or another set.")
    return rows


def load_rows(
    model: LoadedModel, data: EditData, name: str, *, instead: Answers | None, answers: str, max_facts: int, seed: int,
) -> Rows:  # fmt: skip
    """The rows of "forget", "retain", "general", "strangers" (forget prompts about made-up subjects, answered by
    some retained answer) or of a JSON-lines file of prompts and answers (or texts)."""
    if name == "general":
        return Rows(name, text_rows(model, data.general, name))
    facts = _facts(data, name, max_facts, seed)
    if not facts and name not in KNOWN:
        return Rows(name, text_rows(model, _texts(Path(name)), name))
    own, kept = fact_rows(model, subsample(facts, max_facts, seed), name)
    if instead is None:
        return Rows(name, own)
    kind = instead if answers == "auto" else answers
    if kind == "refusal":
        return Rows(name, own, _fixed(model, kept, lambda f, draw: _as(f, draw.choice(REFUSALS)), seed))
    if kind == "fresh":
        return Rows(name, own, _fresh(model, data, kept, seed), fixed=False)
    if kind == "alternative":
        options = _options(data, kept)
        return Rows(name, own, _fixed(model, kept, lambda f, draw: draw.choice(options(f)), seed))
    given = _answers_file(Path(kind), kept)
    return Rows(name, own, _fixed(model, kept, lambda f, draw: _as(f, draw.choice(given[_item(f)])), seed))


def _facts(data: EditData, name: str, most: int, seed: int) -> tuple[Fact, ...]:
    if name != "strangers":
        return data.forget if name == "forget" else data.retain if name == "retain" else _read(Path(name))
    made_up = stranger_facts(data, most, seed)
    if not made_up:
        raise KnowledgeError("No made-up subjects can be put together: they need subjects of two words or more that "
                             "occur in their prompts.")  # fmt: skip
    return made_up


def _item(fact: Fact) -> str:
    """Id of the item that a fact states."""
    return fact.id.rpartition("#")[0]


def _as(fact: Fact, text: str) -> str:
    """``text`` as a continuation of the fact's prompt, separated as its own answer is."""
    lead = fact.answer[: len(fact.answer) - len(fact.answer.lstrip())]
    return lead + text.strip()


def _options(data: EditData, facts: Sequence[Fact]) -> Callable[[Fact], list[str]]:
    """Other answers of a fact's relation, seen on retained facts (on other forget facts where there are none)."""
    pools = _pools(data)

    def options(fact: Fact) -> list[str]:
        return [answer for answer in sorted(pools.get(fact.relation, ())) if answer != fact.answer]

    lone = next((f for f in facts if not options(f)), None)
    if lone is not None:
        raise KnowledgeError(f"No alternative answer is known for '{lone.id}' (relation '{lone.relation}'): write some "
                             "to a JSON-lines file with the keys id and answers, one line per item, and name it as "
                             "'answers'; the model itself can be asked for them.")  # fmt: skip
    return options


def _pools(data: EditData) -> Mapping[str, Counter[str]]:
    pools = {relation: Counter(pool) for relation, pool in data.pool.items()}
    for fact in data.forget:
        if fact.relation not in data.pool:
            pools.setdefault(fact.relation, Counter())[fact.answer] += 1
    return pools


def _fixed(
    model: LoadedModel, facts: Sequence[Fact], choose: Callable[[Fact, random.Random], str], seed: int
) -> Callable[[int, int], Row]:
    pairs = [(f.prompt, choose(f, random.Random(f"answer-{seed}-{f.id}"))) for f in facts]
    rows = _other_rows(model, pairs)
    return lambda step, index: rows[index]


def _other_rows(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    coded = encode_many(model.tokenizer, pairs, limit=context_limit(model))
    long = next((pair for pair, code in zip(pairs, coded, strict=True) if not code.valid), None)
    if long is not None:
        raise KnowledgeError(f"'{long[0][:60]}' with '{long[1].strip()[:60]}' in the place of its answer does not fit "
                             f"the model's context of {context_limit(model)} tokens: give shorter answers or "
                             "prompts.")  # fmt: skip
    return [Row(code.ids, code.start) for code in coded]


def _fresh(model: LoadedModel, data: EditData, facts: Sequence[Fact], seed: int) -> Callable[[int, int], Row]:
    """At every step another answer, drawn as often as it occurs in the pool of the relation."""
    pools = {relation: (sorted(pool), [pool[a] for a in sorted(pool)]) for relation, pool in _pools(data).items()}
    _options(data, facts)
    known: dict[tuple[int, str], Row] = {}

    def row(step: int, index: int) -> Row:
        fact = facts[index]
        names, weights = pools[fact.relation]
        answer = random.Random(f"fresh-{seed}-{step}-{index}").choices(names, weights)[0]
        if (index, answer) not in known:
            (known[index, answer],) = _other_rows(model, [(fact.prompt, answer)])
        return known[index, answer]

    return row


def _lines(path: Path) -> list[Mapping[str, object]]:
    import json

    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"There is no data set or file '{path}': write forget, retain, general, or the path of a "
                         "JSON-lines file.") from None  # fmt: skip
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read as a file ({error.strerror}): give the path of a JSON-lines "
                         "file.") from None  # fmt: skip
    except ValueError as error:
        raise UsageError(f"'{path}' is not a JSON-lines file ({error}): write one JSON object per line.") from None
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise UsageError(f"'{path}' holds no JSON objects: write one per line, with prompt and answer, or text.")
    return lines


def _read(path: Path) -> tuple[Fact, ...]:
    lines = _lines(path)
    if all("text" in line for line in lines):
        return ()
    missing = next((i for i, line in enumerate(lines) if not {"prompt", "answer"} <= set(line)), None)
    if missing is not None:
        raise UsageError(f"Line {missing + 1} of '{path}' has no 'prompt' and 'answer': give both on every line (or "
                         "'text' on every line).")  # fmt: skip

    def answer(line: Mapping[str, object]) -> str:
        text = str(line["answer"])
        return text if text[:1].isspace() else " " + text

    return tuple(Fact(f"{path.stem}-{i}#0", f"{path.stem}-{i}", "", str(line.get("relation", "")), str(line["prompt"]),
                      answer(line)) for i, line in enumerate(lines))  # fmt: skip


def _texts(path: Path) -> list[str]:
    return [str(line["text"]) for line in _lines(path)]


def _answers_file(path: Path, facts: Sequence[Fact]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        answers = line.get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise UsageError(f"Line {number} of '{path}' has the answers {answers!r}: give a list of texts.")
        found[str(line.get("id"))] = answers
    missing = next((_item(f) for f in facts if not found.get(_item(f))), None)
    if missing is not None:
        raise UsageError(f"'{path}' gives no answers for item '{missing}': write one line per item with its id and a "
                         "list of answers.")  # fmt: skip
    return found


def step_plan(
    lengths: Sequence[Sequence[int]], sizes: Sequence[int], steps: int, seed: int
) -> list[tuple[tuple[int, ...], ...]]:
    """Which rows of every data set each step takes: [steps][sets] -> row numbers.

    Every pass uses each row of a set once, in chunks of at most ``sizes``; rows of like length go together, and the
    sets' chunks are paired by length, so that one padded batch wastes little.
    """
    draw = [random.Random(f"plan-{seed}-{k}") for k in range(len(sizes))]
    waiting: list[list[list[int]]] = [[] for _ in sizes]
    plan = []
    for _ in range(steps):
        taken: list[tuple[int, ...]] = []
        target: int | None = None
        for k, own in enumerate(lengths):
            if not waiting[k]:
                waiting[k] = _chunks(own, sizes[k], draw[k])
            left = waiting[k]
            place = draw[k].randrange(len(left)) if target is None else _closest(left, own, target)
            chunk = left.pop(place)
            target = max(own[i] for i in chunk) if target is None else target
            taken.append(tuple(chunk))
        plan.append(tuple(taken))
    return plan


def _chunks(lengths: Sequence[int], size: int, draw: random.Random) -> list[list[int]]:
    """One pass over the rows in chunks, shortest first."""
    order = list(range(len(lengths)))
    draw.shuffle(order)
    order.sort(key=lambda i: lengths[i])  # stable: random within one length
    return [order[i : i + size] for i in range(0, len(order), size)]


def _closest(chunks: Sequence[Sequence[int]], lengths: Sequence[int], target: int) -> int:
    longest = [lengths[chunk[-1]] for chunk in chunks]
    at = bisect_left(longest, target)
    return min((k for k in (at - 1, at) if 0 <= k < len(chunks)), key=lambda k: abs(longest[k] - target))
