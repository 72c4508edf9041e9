"""The state of an unfinished training in one file: replaced whole, bound to what it belongs to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from repforget.errors import ArtifactError, UsageError
from repforget.store import LOCK, Store, canonical, write_atomic

SHARE = 0.05  # of the time that writing may take


@dataclass
class State:
    """The last written state of the training that ``identity`` describes; ``file`` None keeps nothing.

    Tensors and record are one file, so that a process killed at any moment leaves the state before or the one after.
    """

    file: Path | None
    identity: Mapping[str, Any]
    _rest_until: float = field(default=0.0, init=False)

    @property
    def due(self) -> bool:
        return self.file is not None and time.monotonic() >= self._rest_until

    def write(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        from safetensors.torch import save

        if self.file is None:
            return
        started = time.monotonic()
        text = json.dumps({"identity": canonical(self.identity), "record": canonical(record)})
        body = save({n: t.contiguous() for n, t in tensors.items()}, metadata={"repforget": text})
        write_atomic(self.file, body, mode=0o600)  # a private training keeps the seed of its noise here
        self._rest_until = time.monotonic() + (time.monotonic() - started) / SHARE

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and record, None where nothing was written.

        Raises UsageError for a state of another training, ArtifactError for a damaged one.
        """
        from safetensors import SafetensorError, safe_open

        if self.file is None or not self.file.exists():
            return None
        try:
            with safe_open(self.file, "pt") as opened:
                body = json.loads(opened.metadata()["repforget"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            identity, record = dict(body["identity"]), dict(body["record"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise ArtifactError(f"The state of training in '{self.file}' is damaged: remove it to start from the "
                                "beginning.") from None  # fmt: skip
        refuse_another(self.identity, identity, f"'{self.file}' holds an unfinished training")
        return tensors, record

    def discard(self) -> None:
        """Unlink the file, and what a process that was killed while writing left of it."""
        if self.file is not None:
            for left in (self.file, *self.file.parent.glob(f".{escape(self.file.name)}.tmp-*")):
                left.unlink(missing_ok=True)


@contextmanager
def alone(out: Path, beside: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the training into ``out`` against a second process, which would count its steps again (ResourceError).

    The lock lies in the folder ``beside``, for ``out`` itself is replaced whole; nothing of it stays.
    """
    store = Store(beside, note)
    try:
        with store.locked(f"The training into '{out}'"):
            try:
                yield
            finally:
                (beside / LOCK).unlink()
    finally:
        with suppress(OSError):  # another process holds it
            beside.rmdir()


def refuse_another(own: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    """UsageError where ``other`` describes another training than ``own``."""
    mine = canonical(own)
    names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
    if names:
        changes = ", ".join(f"{n} was {str(other.get(n))[:40]} and is {str(mine.get(n))[:40]}" for n in names)
        raise UsageError(f"{what} of other data or settings ({changes}): ask for the same again, give another "
                         "folder, or remove that one.")  # fmt: skip
