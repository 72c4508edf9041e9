"""Probe folders on disk: ``probe.yaml`` with JSONL, TOFU-style JSON lines or a hub data set -> Knowledge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from repforget.checked_yaml import read_model, read_text
from repforget.errors import KnowledgeError, MissingExtraError, UnknownNameError, nearest
from repforget.knowledge import SPLITS, Item, Knowledge

TEXT_FIELDS = ("id", "cluster", "subject", "relation", "prompt", "answer")
LIST_FIELDS = ("statements", "paraphrases", "aliases", "wrong_answers")
ITEM_FIELDS = (*TEXT_FIELDS, *LIST_FIELDS, "entity_span")
SHOWN_FAULTS = 8  # of a broken file; the rest is counted


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClusterRule(_Strict):
    """Where the cluster of an item comes from: a column of the file, or every ``rows`` consecutive rows."""

    column: str | None = None
    rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> ClusterRule:
        if (self.column is None) == (self.rows is None):
            raise ValueError("give either 'column: <name>' or 'rows: <number>'")
        return self


class SetFile(_Strict):
    """One set of a probe: a file beside ``probe.yaml`` or a hub data set, and how to read its columns."""

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)  # file column -> item field, only these
    cluster: ClusterRule | None = None
    relation: str = ""
    id_prefix: str | None = None

    @model_validator(mode="after")
    def _checked(self) -> SetFile:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either 'path: <file>' or 'hub: <data set id>'")
        valid = (*ITEM_FIELDS, "text")
        wrong = [f"column '{c}' is mapped to '{f}', which is no item field; {nearest(f, valid)}"
                 for c, f in self.columns.items() if f not in valid]  # fmt: skip
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class Templates(_Strict):
    """Sentences of one relation; ``{subject}`` is filled in and the answer follows the text."""

    questions: list[str] = Field(min_length=1)  # the first is the prompt, the others are paraphrases
    statements: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _only_subject(self) -> Templates:
        for text in (*self.questions, *self.statements):
            if set(re.findall(r"\{(.*?)\}", text)) != {"subject"}:
                raise ValueError(f"'{text}' must contain {{subject}} and no other placeholder")
        return self


def _path_or_mapping(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SetEntry = Annotated[SetFile, BeforeValidator(_path_or_mapping)]


class Sets(_Strict):
    """What must go, what must stay, near misses that must survive, and plain text."""

    forget: SetEntry
    retain: SetEntry
    neighbours: SetEntry | None = None
    general: SetEntry | None = None


class ProbeFile(_Strict):
    """``probe.yaml``: the sets, how answers are joined to prompts, and the sentences of each relation."""

    name: str = Field(min_length=1)
    about: str = ""
    ask: str = "{question}"  # what is written around every prompt and paraphrase, for example a chat template
    separator: str = " "
    sets: Sets
    templates: dict[str, Templates] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _asks(self) -> ProbeFile:
        if "{question}" not in self.ask:
            raise ValueError("'ask' must contain {question}, the place of every prompt and paraphrase")
        return self


@dataclass(frozen=True)
class _Row:
    """One record of a set and the place to name when it is wrong."""

    place: str
    number: int  # from 0, among the records of the set
    values: Mapping[str, Any]


def search_folders() -> tuple[Path, ...]:
    """Folders in which a probe name is looked up: ./probes, the repository's, the package's own copy."""
    package = Path(__file__).parent
    return Path("probes"), package.parent / "probes", package / "_probes"


def probe_names() -> tuple[str, ...]:
    """Names of all probes that can be loaded by name."""
    found = (path.parent.name for folder in search_folders() for path in sorted(folder.glob("*/probe.yaml")))
    return tuple(dict.fromkeys(found))


def find_probe(name_or_path: str | Path) -> Path:
    """Return the ``probe.yaml`` of a probe given by name, folder or file."""
    given = Path(name_or_path)
    if given.is_file():
        return given
    if (given / "probe.yaml").is_file():
        return given / "probe.yaml"
    if given.is_dir() and given.name != str(name_or_path):
        raise KnowledgeError(f"The folder '{name_or_path}' holds no probe.yaml: name another, or write one.")
    for folder in search_folders():
        if (folder / str(name_or_path) / "probe.yaml").is_file():
            return folder / str(name_or_path) / "probe.yaml"
    raise UnknownNameError(f"There is no knowledge probe '{name_or_path}' (neither a name nor a folder): "
                           f"{nearest(str(name_or_path), probe_names())}")  # fmt: skip


def load_knowledge(name_or_path: str | Path, seed: int = 0) -> Knowledge:
    """Load and check a knowledge probe; ``seed`` decides which clusters are dev, gate and sealed.

    Raises RecipeError for a faulty ``probe.yaml``, KnowledgeError for faulty items (file and line) or sets
    (empty, overlapping, duplicated, too few clusters), UnknownNameError for a name that is not found.
    """
    path = find_probe(name_or_path)
    probe = read_model(path, ProbeFile, "probe file")
    forget, retain, neighbours = (
        tuple(_items(path.parent, name, source, probe))
        for name, source in (("forget", probe.sets.forget), ("retain", probe.sets.retain),
                             ("neighbours", probe.sets.neighbours))
    )  # fmt: skip
    knowledge = Knowledge.build(probe.name, forget, retain, neighbours, _general(path.parent, probe), seed)
    unasked = [split for split in SPLITS if not knowledge.view(split).retain]
    if unasked:
        clusters = len({item.cluster for item in knowledge.retain})
        raise KnowledgeError(f"Knowledge probe '{probe.name}' cannot be used: the retain set has {clusters} "
                             f"clusters, none of them left for the {' and '.join(unasked)} split; "
                             "give it at least 6.")  # fmt: skip
    return replace(knowledge, notes=_notes(knowledge))


def _notes(knowledge: Knowledge) -> tuple[str, ...]:
    seen = sum(not item.unseen_forms for item in knowledge.forget)
    if not seen:
        return ()
    return (f"{seen} of {len(knowledge.forget)} forget items are judged on a prompt that the editor sees: "
            "give them statements or paraphrases",)  # fmt: skip


def _items(folder: Path, name: str, source: SetFile | None, probe: ProbeFile) -> Iterator[Item]:
    if source is None:
        return
    rows = list(_rows(folder, source, name))
    _check_columns(rows, source)
    faults: list[str] = []
    for row in rows:
        fields, wrong = _fields(row, source, name)
        if not wrong:
            fields, wrong = _from_template(fields, probe)
        if wrong:
            faults += [f"{row.place}: {text}" for text in wrong]
            continue
        yield Item(**_asked(fields, probe.ask), separator=probe.separator)
    if faults:
        more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        title = f"The {name} set of probe '{probe.name}' has {len(faults)} faults:"
        raise KnowledgeError("\n  ".join((title, *faults[:SHOWN_FAULTS], *more)))


def _general(folder: Path, probe: ProbeFile) -> tuple[str, ...]:
    source = probe.sets.general
    if source is None:
        return ()
    column = next((c for c, f in source.columns.items() if f == "text"), "text")
    rows = list(_rows(folder, source, "general"))
    for row in rows:
        if not isinstance(row.values.get(column), str):
            raise KnowledgeError(f"{row.place}: the general set needs a text in column '{column}'; "
                                 f"found the columns {', '.join(map(str, row.values))}.")  # fmt: skip
    return tuple(row.values[column] for row in rows)


def _rows(folder: Path, source: SetFile, name: str) -> Iterator[_Row]:
    if source.path is not None:
        yield from _file_rows(folder / source.path, f"{name} file")
    else:
        yield from _hub_rows(source)


def _file_rows(path: Path, what: str) -> Iterator[_Row]:
    """Records of a JSONL file, or of a file that is one JSON array."""
    text = read_text(path, what)
    whole = text.lstrip().startswith("[")
    lines = ((f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1))
    pieces: Iterable[tuple[str, str]] = [(str(path), text)] if whole else lines
    number = 0
    for place, piece in pieces:
        if not piece.strip():
            continue
        try:
            parsed = json.loads(piece)
        except json.JSONDecodeError as error:
            at = f"line {error.lineno}, column {error.colno}" if whole else f"column {error.colno}"
            raise KnowledgeError(f"{place} is not valid JSON: {error.msg} ({at}).") from None
        for index, values in enumerate(parsed if whole else [parsed]):
            at = f"{place}, entry {index + 1}" if whole else place
            if not isinstance(values, dict):
                raise KnowledgeError(f"{at} is not a JSON object: write one {{\"id\": ..., ...}} per line.")
            yield _Row(at, number, values)
            number += 1


def _hub_rows(source: SetFile) -> Iterator[_Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("Reading a hub data set needs the package 'datasets': "
                                "install it with  pip install datasets") from None  # fmt: skip
    try:
        table = load_dataset(source.hub, source.config, split=source.split)
    except (OSError, ValueError) as error:  # the hub's own errors derive from these two
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KnowledgeError(f"Hub data set '{source.hub}' (config {source.config}, split {source.split}) "
                             f"cannot be loaded: {reason}") from None  # fmt: skip
    for number, values in enumerate(table):
        yield _Row(f"{source.hub}, row {number + 1}", number, values)


def _check_columns(rows: list[_Row], source: SetFile) -> None:
    """Refuse a mapped column that the first record does not have (later ones may leave fields out)."""
    if not rows:
        return
    found = rows[0].values
    wanted = {column: f"to be read as '{field}'" for column, field in source.columns.items()}
    if source.cluster and source.cluster.column:
        wanted[source.cluster.column] = "to tell clusters apart"
    missing = [f"'{c}' ({why})" for c, why in wanted.items() if c not in found]
    if missing:
        raise KnowledgeError(f"{rows[0].place}: there is no column {', '.join(missing)}; "
                             f"found the columns {', '.join(map(str, found))}.")  # fmt: skip


def _fields(row: _Row, source: SetFile, name: str) -> tuple[dict[str, Any], list[str]]:
    """Item fields of one record with defaults for id, cluster and relation; and what is wrong with it."""
    faults: list[str] = []
    raw: dict[str, Any] = {}
    if source.columns:
        raw = {field: row.values[c] for c, field in source.columns.items() if row.values.get(c) is not None}
    else:
        raw = {key: value for key, value in row.values.items() if value is not None}
        unknown = [key for key in raw if key not in ITEM_FIELDS]
        extra = source.cluster.column if source.cluster else None
        faults += [f"unknown field '{key}'; {nearest(key, ITEM_FIELDS)}" for key in unknown if key != extra]
        raw = {key: value for key, value in raw.items() if key in ITEM_FIELDS}
    if source.cluster is not None:
        raw["cluster"] = _cluster(row, source.cluster, source.id_prefix or name)
    raw.setdefault("id", f"{source.id_prefix or name}-{row.number:04d}")
    raw.setdefault("relation", source.relation)
    raw.setdefault("cluster", raw.get("subject"))
    if raw["cluster"] is None:
        faults.append("no 'cluster' (a subject, an author, a document); add it, or give the set a "
                      "'cluster: {column: ...}' or 'cluster: {rows: ...}' rule")  # fmt: skip
        del raw["cluster"]
    if "answer" not in raw:
        faults.append(f"no 'answer'; found the fields {', '.join(map(str, row.values))}")
    fields: dict[str, Any] = {}
    for key, value in raw.items():
        checked, wrong = _typed(key, value)
        fields[key] = checked
        faults += [wrong] if wrong else []
    return fields, faults


def _cluster(row: _Row, rule: ClusterRule, prefix: str) -> Any:
    if rule.rows is not None:
        return f"{prefix}-{row.number // rule.rows:03d}"
    value = row.values.get(str(rule.column))
    return str(value) if isinstance(value, int) else value


def _typed(key: str, value: Any) -> tuple[Any, str | None]:
    """The value in the type of its item field, or a sentence that says what was found."""
    if key in TEXT_FIELDS:
        return (value, None) if isinstance(value, str) else (None, f"'{key}' must be text, found {value!r}")
    if key in LIST_FIELDS:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return tuple(texts), None
        return None, f"'{key}' must be a list of texts, found {value!r}"
    span = value if isinstance(value, (list, tuple)) else ()
    if len(span) == 2 and all(type(edge) is int for edge in span) and 0 <= span[0] < span[1]:
        return (span[0], span[1]), None
    return None, f"'{key}' must be [start, end] in characters with start < end, found {value!r}"


def _from_template(fields: dict[str, Any], probe: ProbeFile) -> tuple[dict[str, Any], list[str]]:
    """Fill prompt, paraphrases and statements from the relation's template; an item's own texts win."""
    template = probe.templates.get(fields["relation"])
    if template is None:
        if "prompt" in fields:
            return fields, []
        hint = nearest(fields["relation"], probe.templates) if probe.templates else "the probe has none"
        return fields, [f"no 'prompt', and relation '{fields['relation']}' has no template; {hint}"]
    subject = fields.get("subject")
    if not subject:
        return fields, [f"no 'subject', which the templates of relation '{fields['relation']}' need"]
    questions = [text.replace("{subject}", subject) for text in template.questions]
    statements = [text.replace("{subject}", subject) for text in template.statements]
    own = {"prompt": questions[0], "paraphrases": tuple(questions[1:]), "statements": tuple(statements)}
    return {**own, **fields}, []


def _asked(fields: dict[str, Any], ask: str) -> dict[str, Any]:
    """The fields with ``ask`` written around what the judge asks."""
    paraphrases = tuple(ask.replace("{question}", text) for text in fields.get("paraphrases", ()))
    return {**fields, "prompt": ask.replace("{question}", fields["prompt"]), "paraphrases": paraphrases}
