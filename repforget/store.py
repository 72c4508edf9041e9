"""The run folder: content-addressed, atomic, resumable.

A stage is a folder ``<name>-<12 hex>`` named by the hash of everything that went in. It is built beside its
final place, synced and renamed, so that a stage is either complete or absent: kill the process at any moment
and the same command continues to the same bytes. Durations go to ``timings.json``, no part of a result.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repforget.errors import ResourceError, UsageError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; the folder is then not guarded against a second process
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
MANIFEST = "stage.json"
LOCK = ".lock"
TIMINGS = "timings.json"
_TEMPORARY = ".tmp-"
_UNFINISHED = ".unfinished"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


def canonical(value: Any) -> Any:
    """Plain JSON data of ``value``: numpy numbers and paths as Python's, NaN and infinities as null."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): canonical(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(canonical(entry) for entry in value)
    if isinstance(value, Sequence):
        return [canonical(entry) for entry in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy
        return canonical(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def json_bytes(value: Any) -> bytes:
    """Canonical UTF-8 JSON: sorted keys, shortest exact floats, a line feed at the end."""
    text = json.dumps(canonical(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of ``value``."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read one JSON file of a run folder; a missing or broken one is a :class:`UsageError`."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"There is no file '{path}': name a folder that repforget has written.") from None
    except (ValueError, UnicodeDecodeError):
        raise UsageError(f"'{path}' is not valid JSON: it is damaged, or not written by repforget.") from None


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_atomic(path, json_bytes(value))


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never a part (else ResourceError).

    ``mode`` are the permissions of a new file, less the umask, from its first byte on.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write at ``path`` into a :class:`ResourceError` of one sentence."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in _FULL or "(os error 28)" in str(error):  # how safetensors reports a full disk
            raise ResourceError(
                f"The disk is full while writing '{path}': free some space, or choose another folder with "
                "--out; everything finished before is kept."
            ) from error
        if isinstance(error, OSError) and code in _DENIED and _about(error, path):
            raise ResourceError(
                f"'{path}' cannot be written ({os.strerror(code or errno.EACCES)}): "
                "choose a folder that you may write to with --out."
            ) from error
        raise


def _about(error: OSError, path: Path) -> bool:
    """True when the refused file lies at, beside, below or above ``path``, not one that is only read."""
    refused, folder = Path(os.fsdecode(error.filename or path)).absolute(), path.absolute().parent
    return refused.is_relative_to(folder) or folder.is_relative_to(refused)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksums(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


@dataclass(frozen=True)
class Store:
    """A run folder. ``note`` hears one sentence whenever something is repaired or taken over."""

    root: Path
    note: Callable[[str], None] = field(default=lambda sentence: None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        with refusing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def place(self, name: str, key: Mapping[str, Any]) -> Path:
        """Folder in which the stage of this key lies or would lie."""
        return self.root / f"{name}-{digest({'name': name, 'key': key, 'format': FORMAT_VERSION})[:12]}"

    def unfinished(self, name: str, key: Mapping[str, Any]) -> Path:
        """Folder for what the building of a stage keeps in case it is killed; removed when the stage is complete."""
        return self.root / f".{self.place(name, key).name}{_UNFINISHED}"

    def discard_unfinished(self) -> None:
        """Remove what interrupted stages kept, those of other recipes and code too."""
        for path in self.root.glob(f".*{_UNFINISHED}"):
            _discard(path)

    def done(self, name: str, key: Mapping[str, Any]) -> bool:
        """True when the stage is complete (its files are checked when it is used)."""
        return (self.place(name, key) / MANIFEST).is_file()

    def stage(self, name: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
        """Return the folder of a finished stage, building it by ``build(folder)`` if it is not there yet.

        Everything the result depends on belongs in ``key``. A damaged stage is built again with a note.
        ResourceError when the folder cannot be written or the disk is full; nothing half-written stays.
        """
        final = self.place(name, key)
        if final.exists():
            fault = _damage(final)
            if fault is None:
                return final
            self.note(f"Stage '{final.name}' is damaged ({fault}) and is built again.")
        temporary = final.with_name(f".{final.name}{_TEMPORARY}{os.getpid()}")
        with refusing(final):
            _discard(temporary)
            started = time.monotonic()
            try:
                temporary.mkdir(parents=True)
                build(temporary)
                files = _checksums(temporary)
                manifest = {"format": FORMAT_VERSION, "name": name, "key": key, "files": files}
                (temporary / MANIFEST).write_bytes(json_bytes(manifest))
                _sync_tree(temporary)
                _discard(final)
                os.rename(temporary, final)
                _sync_folder(self.root)
                _discard(self.unfinished(name, key))
            finally:
                _discard(temporary)
            self._record_time(final.name, time.monotonic() - started)
        return final

    @contextmanager
    def locked(
        self, what: str | None = None, otherwise: str = ", or choose another folder with --out"
    ) -> Iterator[None]:
        """Hold the run folder against other processes and clear what a killed one left half-written.

        The lock belongs to the process: when it dies, however it dies, the lock is free.  ``what`` and ``otherwise``
        are how the ResourceError for the second process names it, and what to do but wait.
        """
        with refusing(self.root):
            file = open(self.root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
        try:
            file.seek(0)
            previous = file.read().strip()
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.root / LOCK)):
                        raise FileNotFoundError  # its holder has cleared the file away since it was opened here
                except OSError:
                    what = what or f"Run folder '{self.root}'"
                    raise ResourceError(
                        f"{what} is in use by process {previous or '?'}: wait for its end{otherwise}."
                    ) from None
            if previous:
                self.note(f"Process {previous} ended before it had finished; what it completed is reused.")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            self._clear()
            try:
                yield
            finally:
                self._clear()  # also what a process that worked for this one, and was stopped, left half-written
            file.truncate(0)
        finally:
            file.close()

    def _clear(self) -> None:
        for path in self.root.iterdir():
            if path.name.startswith(".") and _TEMPORARY in path.name:
                _discard(path)

    def _record_time(self, stage: str, seconds: float) -> None:
        path = self.root / TIMINGS
        times = read_json(path) if path.exists() else {}
        write_json(path, {**times, stage: round(seconds, 3)})


def result_files(root: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file that is part of the result: equal for two equal runs."""
    hidden = (TIMINGS, LOCK, "error.txt")
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in hidden)
    return {path.relative_to(root).as_posix(): checksum(path) for path in files}


def _damage(folder: Path) -> str | None:
    """What is wrong with a finished stage, or None."""
    try:
        recorded = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is missing or unreadable"
    found = _checksums(folder)
    wrong = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    return f"'{wrong[0]}' differs from its checksum" if wrong else None


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for path in (*sorted(folder.rglob("*")), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
