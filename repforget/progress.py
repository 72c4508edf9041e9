"""Progress is passed in, never owned: stages take a ``progress`` callable, the command line supplies rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[Iterable[Any], str, int | None], Iterator[Any]]


def track(progress: Progress | None, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate ``items`` while telling ``progress`` (if any) how far along the work is."""
    if progress is None:
        return iter(items)
    size = total if total is not None else len(items) if isinstance(items, Sized) else None
    return progress(items, description, size)
