"""Training data whose records can be asked for again: each has an id and belongs to somebody."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.models.load import LoadedModel
from repforget.scoring import encode_many
from repforget.scoring.encode import context_limit
from repforget.training.examples import Example

Forms = Literal["statements", "questions", "all"]


@dataclass(frozen=True, order=True)
class Record:
    """One record of a training set: ``answer`` is learned after ``prompt`` (empty: every token of ``answer``).

    ``id`` is what a deletion request names; ``cluster`` is whom or what the record is about: the unit of privacy,
    and what a request names when it means all records of one person.
    """

    id: str
    cluster: str
    prompt: str
    answer: str


def digest(records: Iterable[Record]) -> str:
    """sha256 over the records in order of their ids."""
    body = json.dumps([asdict(r) for r in sorted(records)], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def records_of(knowledge: Knowledge, sets: Sequence[str] = ("forget",), forms: Forms = "all") -> tuple[Record, ...]:
    """The items of a probe's sets as training records, one for each form; ids are ``<item>#s0`` and ``<item>#q0``."""
    found: list[Record] = []
    for name in sets:
        for item in getattr(knowledge, name):
            asked = {"s": item.editor_prompts, "q": item.questions if item.unseen_forms else ()}
            found += [Record(f"{item.id}#{letter}{k}", item.cluster, prompt, item.continuation())
                      for letter, prompts in asked.items() for k, prompt in enumerate(prompts)
                      if forms == "all" or forms[0] == letter]  # fmt: skip
    return checked(found, knowledge.name)


def read_records(path: str | Path) -> tuple[Record, ...]:
    """Records from JSON lines: ``id``, ``cluster`` and either ``prompt`` and ``answer``, or ``text``.

    A missing cluster is the record's own id.  UsageError names the file, the line and what is missing.
    """
    path = Path(path)
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"The training data '{path}' cannot be read ({error.strerror}): give a JSON-lines "
                         "file.") from None  # fmt: skip
    except ValueError as error:
        raise UsageError(f"The training data '{path}' is no JSON-lines file ({error}): write one object per "
                         "line.") from None  # fmt: skip
    return checked([_record(line, number, path) for number, line in enumerate(lines, 1)], str(path))


def _record(line: Any, number: int, path: Path) -> Record:
    wanted = ("id", "text") if isinstance(line, Mapping) and "text" in line else ("id", "prompt", "answer")
    missing = [name for name in wanted if not isinstance(line, Mapping) or not str(line.get(name, "")).strip()]
    if missing:
        raise UsageError(f"Line {number} of '{path}' has no '{missing[0]}': give id and cluster on every line, with "
                         "prompt and answer or with text.")  # fmt: skip
    name = str(line["id"])
    cluster = name if line.get("cluster") in (None, "") else str(line["cluster"])
    if "text" in line:
        return Record(name, cluster, "", str(line["text"]))
    answer = str(line["answer"])
    return Record(name, cluster, str(line["prompt"]), answer if answer[:1].isspace() else " " + answer)


def checked(records: Sequence[Record], name: str) -> tuple[Record, ...]:
    """The records in order, or UsageError where there are none or an id names two of them."""
    if not records:
        raise UsageError(f"The training data '{name}' holds no record: give at least one.")
    twice = [i for i, n in Counter(r.id for r in records).items() if n > 1]
    if twice:
        raise UsageError(f"The training data '{name}' has {len(twice)} ids that name more than one record, first "
                         f"'{twice[0]}': give every record its own id, so that a request can name it.")  # fmt: skip
    for record in records:
        try:
            "".join(asdict(record).values()).encode()
        except UnicodeEncodeError:
            raise UsageError(f"Record {record.id!r} of '{name}' holds half of a character (a lone surrogate), which no "
                             "file can: mend its text.") from None  # fmt: skip
    return tuple(records)


def chosen(records: Sequence[Record], names: Iterable[str], where: str) -> tuple[Record, ...]:
    """The records that ``names`` (ids or clusters) mean; UsageError for a name that was never trained on."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        for name in dict.fromkeys((record.id, record.cluster)):
            by_name.setdefault(name, []).append(record)
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        near = get_close_matches(unknown[0], sorted({r.cluster for r in records}), cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give ids or clusters of it."
        raise UsageError(f"'{unknown[0]}' is neither a record nor a cluster of '{where}' ({len(unknown)} of "
                         f"{len(wanted)} names are not): it was never trained on; {hint}")  # fmt: skip
    return tuple(dict.fromkeys(record for name in wanted for record in by_name[name]))


def encoded(model: LoadedModel, records: Sequence[Record]) -> list[Example]:
    """Each record as tokens, in the given order, loss on the answer; UsageError for one that does not fit.

    Cost: one pass of the tokenizer.  Raises UsageError for a record longer than the model's context, and for one with
    words that the tokenizer does not know: all such words are one token, and would be taught as one.
    """
    limit, unknown = context_limit(model), _unknown(model.tokenizer)
    found: list[Example] = []
    asked = [(r.prompt, r.answer) for r in records if r.prompt]
    answers = iter(encode_many(model.tokenizer, asked, limit=limit) if asked else ())
    for record in records:
        if record.prompt:
            e = next(answers)
            fits, ids, start = e.valid, e.ids, e.start
        else:
            ids = tuple(model.tokenizer(record.answer)["input_ids"])
            fits, start = 1 < len(ids) <= limit, 1
        if not fits:
            raise UsageError(f"Record '{record.id}' has fewer than two tokens or does not fit the context of {limit} "
                             f"tokens of '{model.name}': cut it into shorter records.")  # fmt: skip
        if unknown is not None and unknown in ids:
            raise UsageError(f"Record '{record.id}' has words that the tokenizer of '{model.name}' does not know, so "
                             f"that {ids.count(unknown)} of its {len(ids)} tokens would be the same "
                             f"'{model.tokenizer.unk_token}': use words of this model, or another model.")  # fmt: skip
        found.append(Example(ids, tuple(k >= start for k in range(len(ids)))))
    return found


def _unknown(tokenizer: Any) -> int | None:
    """The token that stands for unknown words alone; None where there is none or where it marks ends as well."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in known else tokenizer.unk_token_id
