"""What a request names: references to records of a probe or of a training, never their text."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from repforget.errors import RepforgetError, UsageError, nearest
from repforget.knowledge import Item, Knowledge
from repforget.knowledge_files import load_knowledge
from repforget.requests.ledger import Ledger, folded
from repforget.requests.states import Request
from repforget.store import write_atomic

HIDDEN = "[hidden]"
_WORD = re.compile(r"[^\W\d_]+")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
Index = Mapping[str, Sequence[str]]
SETS = ("forget", "retain", "neighbours")


@dataclass(frozen=True)
class Named:
    """Something that a request can name, by any of ``names`` (id, cluster, subject), and the ``texts`` in it."""

    id: str
    names: tuple[str, ...]
    texts: tuple[str, ...]


def named(source: str) -> tuple[Named, ...]:
    """What can be named in a source: a probe, or "training:" and the folder of a sharded training."""
    from repforget.requests import sharded

    if source.startswith(sharded.SCHEME):
        return sharded.named(source.removeprefix(sharded.SCHEME))
    return of_items(everything(load_knowledge(source)))


def of_items(items: Iterable[Item]) -> tuple[Named, ...]:
    """The items of a probe as what can be named."""
    return tuple(Named(i.id, (i.id, i.cluster, *([i.subject] if i.subject else [])),
                       (i.subject, i.prompt, i.answer, *i.aliases)) for i in items)  # fmt: skip


def everything(knowledge: Knowledge) -> tuple[Item, ...]:
    """All items of a probe: whatever set it is in, a request may name it."""
    return tuple(item for name in SETS for item in getattr(knowledge, name))


def references(names: Sequence[str], known: Sequence[Named], pseudonym: Callable[[str], str]) -> tuple[str, ...]:
    """The names as the ledger keeps them: one that tells who is meant (a person's name, as a cluster may be) as a
    pseudonym, any other as it is."""
    silent = {name for entry in known for name in entry.names} - _telling(known)
    return tuple(dict.fromkeys(name if name in silent else pseudonym(name) for name in names))


def _telling(known: Iterable[Named]) -> set[str]:
    """Names that stand in a text of what they mean, or share a word with it that is written with a capital."""
    found = set[str]()
    for entry in known:
        text = "\n".join(entry.texts)
        words = {word.casefold() for word in _WORD.findall(text) if word[0].isupper() and len(word) > 2}
        found |= {name for name in entry.names if name.casefold() in text.casefold()
                  or not words.isdisjoint(word.casefold() for word in _WORD.findall(_HUMP.sub(" ", name)))}
    return found


def index(known: Sequence[Named], pseudonym: Callable[[str], str]) -> Index:
    """Every name, as it is and as a pseudonym -> ids of what it means."""
    found: dict[str, list[str]] = {}
    for entry in known:
        for name in entry.names:
            for key in (name, pseudonym(name)):
                found.setdefault(key, []).append(entry.id)
    return found


def matched(names: Sequence[str], known: Index) -> tuple[tuple[str, ...], int]:
    """Ids of what ``names`` (as the ledger keeps them) mean, and how many of the names mean nothing."""
    found = dict.fromkeys(i for name in names for i in known.get(name, ()))
    return tuple(found), sum(name not in known for name in names)


def other_spellings(names: Sequence[str], kept: Sequence[str], known: Sequence[Named]) -> list[str]:
    """What to tell where a name that is kept as a pseudonym means more than one name of the source."""
    wanted = {folded(name) for name in names if name not in kept}
    alike = {name for entry in known for name in entry.names if folded(name) in wanted}
    more = len(alike) - len({folded(name) for name in alike})
    return [f"Names that differ in capitals or forms of letters alone are one to the ledger: {more} more "
            "than were given are included."] if more else []  # fmt: skip


def hint(name: str, known: Sequence[Named]) -> str:
    """The nearest names, for whoever mistyped one; nothing where none is near."""
    near = nearest(name, {other for entry in known for other in entry.names})
    return near.replace("did", "Did", 1) if near.startswith("did") else ""


def items_of(ledger: Ledger, request: Request, knowledge: Knowledge) -> tuple[Item, ...]:
    """The items of its probe that a request is about: the whole forget set where it names none."""
    if not request.names:
        return knowledge.forget
    every = everything(knowledge)
    ids = set(matched(request.names, index(of_items(every), ledger.pseudonym))[0])
    return tuple(item for item in every if item.id in ids)


def readable(source: str, pseudonym: Callable[[str], str]) -> Index | None:
    """The index of a source, with the whole forget set of a probe under no name; None where it cannot be read."""
    from repforget.requests.sharded import SCHEME

    try:
        found = dict(index(named(source), pseudonym))
        if not source.startswith(SCHEME):
            found[""] = [item.id for item in load_knowledge(source).forget]
    except RepforgetError:
        return None
    return found


def overlapping(
    source: str, names: Sequence[str], others: Iterable[Request], known: Mapping[str, Index | None]
) -> tuple[list[int], list[int]]:
    """Numbers of the other requests that are about some of what ``names`` (as the ledger keeps them) mean in
    ``source``, and of those of which nobody can know that, for their source has no index in ``known``.

    A probe and a training are compared by the ids of items, with which those of records begin.
    """
    found, unread = list[int](), list[int]()
    for request in others:
        if not set(names).isdisjoint(request.names):
            found.append(request.id)
        elif (theirs := known[request.source]) is None or (ours := known[source]) is None:
            unread.append(request.id)
        else:
            own, other = matched(names or ("",), ours)[0], matched(request.names or ("",), theirs)[0]
            if request.source != source:
                own, other = (tuple(i.partition("#")[0] or i for i in ids) for ids in (own, other))
            if not set(own).isdisjoint(other):
                found.append(request.id)
    return found, unread


def meaningless(unknown: int, names: int, source: str) -> str:
    """Why a request is refused whose names mean nothing."""
    from repforget.requests.sharded import SCHEME

    return (f"{unknown} of its {names} names mean nothing in '{Path(source.removeprefix(SCHEME)).name}': it holds no "
            "records under them now, which does not show that the model knows nothing of them.")  # fmt: skip


def carved(knowledge: Knowledge, forget: Sequence[Item], gone: Iterable[str] = ()) -> Knowledge:
    """The probe of one request: its items are to be forgotten, all others stay but those already ``gone`` (ids).

    Items of the probe's forget set that nobody asked for are retain items here.  KnowledgeError where the request
    names too few clusters to be split and judged.
    """
    own, before = {item.id for item in forget}, set(gone)
    clusters = {item.cluster for item in forget}

    def left(items: Sequence[Item]) -> list[Item]:
        return [item for item in items if item.id not in own | before]

    near = [item for item in left(knowledge.neighbours) if item.cluster not in clusters]
    return Knowledge.build(knowledge.name, forget, [*left(knowledge.retain), *left(knowledge.forget)], near,
                           knowledge.general, knowledge.seed)  # fmt: skip


def unnamed(knowledge: Knowledge, pseudonym: Callable[[str], str]) -> Knowledge:
    """The same probe, with pseudonyms for ids and clusters that tell who is meant: results of a run keep them."""
    telling = _telling(of_items(everything(knowledge)))

    def own(name: str) -> str:
        return pseudonym(name) if name in telling else name

    def hide(items: Sequence[Item]) -> list[Item]:
        return [replace(item, id=own(item.id), cluster=own(item.cluster)) for item in items]

    return Knowledge.build(knowledge.name, hide(knowledge.forget), hide(knowledge.retain), hide(knowledge.neighbours),
                           knowledge.general, knowledge.seed)  # fmt: skip


def write_probe(knowledge: Knowledge, folder: Path) -> Path:
    """Write a probe folder that loads as ``knowledge``; it holds texts and is for the time of one run."""
    separators = {item.separator for item in everything(knowledge)}
    if len(separators) > 1:
        raise UsageError(f"The probe '{knowledge.name}' joins answers in {len(separators)} ways, and a request needs "
                         "one: use one separator.")  # fmt: skip
    names = [name for name in SETS if getattr(knowledge, name)]
    lines: dict[str, list[Mapping[str, Any]]] = {name: [_line(i) for i in getattr(knowledge, name)] for name in names}
    if knowledge.general:
        lines["general"] = [{"text": text} for text in knowledge.general]
    for name, rows in lines.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / f"{name}.jsonl", text.encode())
    probe = {"name": knowledge.name, "separator": separators.pop(), "sets": {name: f"{name}.jsonl" for name in lines}}
    write_atomic(folder / "probe.yaml", json.dumps(probe).encode())  # JSON is YAML
    return folder


def _line(item: Item) -> dict[str, Any]:
    kept = {field.name for field in fields(Item)} - {"separator"}
    return {key: value for key, value in asdict(item).items() if key in kept and value not in ((), None, "")}


def hidden(text: str, known: Iterable[Named]) -> str:
    """``text`` without any name or text of what is known, nor a part of a name: what may be kept and shown."""
    text = unicodedata.normalize("NFKC", text)
    whole = {unicodedata.normalize("NFKC", word) for entry in known for word in (*entry.names, *entry.texts)}
    parts = {word for entry in known for name in entry.names for word in _WORD.findall(name) if word[0].isupper()}
    within = text.casefold()
    for word in sorted(whole | parts, key=len, reverse=True):
        if word.casefold() in within and (len(word) > 2 or not word.isascii()):
            text = text.replace(word, HIDDEN) if word in whole else text
            either = f"{re.escape(word)}|{re.escape(word.casefold())}"  # a sharp s is two letters in capitals
            text = re.sub(rf"(?<![^\W_])(?:{either})(?![^\W_])", HIDDEN, text, flags=re.IGNORECASE)
    return text
