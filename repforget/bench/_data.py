"""Where the rows of a benchmark come from: a hub data set, or a folder of files with the same schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repforget.checked_yaml import ModelT, read_model
from repforget.errors import KnowledgeError, MissingExtraError
from repforget.store import digest

SUFFIXES = (".json", ".jsonl", ".parquet")
SHOWN = 12  # names in a message
CHARACTERS_PER_TOKEN = 4.0  # for estimates before a tokenizer is loaded


@dataclass(frozen=True)
class Source:
    """A hub id or a local folder. ``seen`` collects the digest of every table that was read: what results depend on.

    A table is named ``config`` or ``config/split`` (the split is ``train`` where none is named). In a folder it is
    the file ``config.json``, ``.jsonl`` (JSON lines or one array) or ``.parquet``, or ``config/split.json`` etc.
    """

    where: str
    seen: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.where).expanduser()
        if path.is_dir():
            return path
        if path.exists() or self.where.startswith((".", "/", "~")) or self.where.count("/") > 1:
            raise KnowledgeError(f"'{self.where}' is not a folder: give that of the benchmark's files, or a hub id.")
        return None


def rows(source: Source, name: str, columns: Iterable[str] = (), *, hazardous: bool = False) -> list[dict[str, Any]]:
    """All rows of one table, each with at least ``columns``; KnowledgeError says what was looked for and found.

    Errors name columns and row numbers, never texts; with ``hazardous`` not even the hub's own message is passed on.
    """
    folder = source.folder
    found = _hub_rows(source.where, name, hazardous) if folder is None else _file_rows(folder, name)
    wanted = tuple(columns)
    for number, row in enumerate(found, 1):
        missing = [column for column in wanted if row.get(column) is None]
        if missing:
            raise KnowledgeError(f"'{name}' of '{source.where}', row {number}, has no {_list(missing)}: found the "
                                 f"columns {_list(row)}.")  # fmt: skip
    if not found:
        raise KnowledgeError(f"'{name}' of '{source.where}' has no rows: there is nothing to evaluate.")
    source.seen[name] = digest(found)
    return found


def has(source: Source, name: str) -> bool:
    """True when the table exists; on the hub every table is taken to exist."""
    folder = source.folder
    return folder is None or _file(folder, name) is not None


def card(source: Source, name: str, kind: type[ModelT]) -> ModelT:
    """The folder's YAML file ``name``, which states how its texts are to be put; the defaults where there is none."""
    folder = source.folder
    if folder is None or not (folder / name).is_file():
        return kind()
    stated = read_model(folder / name, kind, "data card")
    source.seen[name] = digest(stated.model_dump())
    return stated


def text(row: Mapping[str, Any], column: str, place: str) -> str:
    """A column that must hold text."""
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise KnowledgeError(f"{place}: column '{column}' must hold text, found {type(value).__name__}"
                             f"{' without characters' if isinstance(value, str) else ''}.")  # fmt: skip
    return value


def texts(row: Mapping[str, Any], column: str, place: str) -> list[str]:
    """A column that must hold a list of texts (one text counts as a list of one)."""
    value = row[column]
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)) or not several or not all(isinstance(t, str) and t for t in several):
        raise KnowledgeError(f"{place}: column '{column}' must hold a list of texts, found {type(value).__name__}.")
    return list(several)


def estimated_tokens(characters: int) -> int:
    """Tokens of so many characters, at four characters each."""
    return round(characters / CHARACTERS_PER_TOKEN)


def _list(names: Iterable[Any]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _file(folder: Path, name: str) -> Path | None:
    """The file of a table; ``config/split`` may also lie in one file called after its config."""
    for stem in (name, name.partition("/")[0]):
        for suffix in SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return path
    return next(iter(sorted(folder.glob(f"{name}-*.parquet"))), None)  # as the hub stores them


def _file_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = _file(folder, name)
    if path is None:
        there = sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir()
                       if p.is_dir() or p.suffix in SUFFIXES)  # fmt: skip
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        raise KnowledgeError(f"Folder '{folder}' has no {name}.json (or .jsonl, .parquet): found "
                             f"{_list(there[:SHOWN])}{more}.")  # fmt: skip
    if path.suffix == ".parquet":
        from pyarrow import parquet

        try:
            return list(parquet.read_table(path).to_pylist())
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise KnowledgeError(f"'{path}' is not a readable parquet file ({type(error).__name__}).") from None
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise KnowledgeError(f"'{path}' is not UTF-8 text.") from None
    return _parsed(path, content)


def _parsed(path: Path, content: str) -> list[dict[str, Any]]:
    whole = content.lstrip().startswith("[")
    pieces: Sequence[str] = [content] if whole else content.split("\n")
    found: list[Any] = []
    for number, piece in enumerate(pieces, 1):
        if not piece.strip():
            continue
        try:
            value = json.loads(piece)
        except json.JSONDecodeError as error:
            line = error.lineno if whole else number
            raise KnowledgeError(f"'{path}', line {line}, is not valid JSON: {error.msg}.") from None
        found += value if whole else [value]
    wrong = next((k for k, row in enumerate(found, 1) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise KnowledgeError(f"'{path}', row {wrong}, is not a JSON object.")
    return found


def _hub_rows(where: str, name: str, hazardous: bool) -> list[dict[str, Any]]:
    config, _, split = name.partition("/")
    layout = f"a folder with {name}.json (JSON lines of the same columns) does as well, given with --data"
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("Reading a hub data set needs the package 'datasets' (pip install datasets); "
                                f"{layout}.") from None  # fmt: skip
    try:
        table = load_dataset(where, config, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors derive from these
        said = "" if hazardous else str(error).strip()
        reason = said.splitlines()[0].rstrip(".") if said else type(error).__name__
        raise KnowledgeError(f"Hub data set '{where}' ({name}) cannot be loaded: {reason}; {layout}.") from None
    return [dict(row) for row in table]
