"""The rows a head is fitted to: read from a file, brought to norm 1 each by itself, and known again by keyed hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.linear._arrays import Array

Hashes = NDArray[np.uint8]
SIZE = 16


@dataclass(frozen=True)
class Table:
    """Features ``x`` [n, d], targets ``y`` ([n] classes or numbers, or [n, k] numbers), and whose rows they are."""

    x: NDArray[Any]
    y: NDArray[Any]
    ids: NDArray[np.str_]
    clusters: NDArray[np.str_]
    name: str = "the rows"

    def __post_init__(self) -> None:
        n = len(np.atleast_1d(self.ids))
        shapes = (self.x.ndim, self.ids.shape, self.clusters.shape)
        if shapes != (2, (n,), (n,)) or not self.x.shape[:1] == self.y.shape[:1] == (n,) or not n:
            raise UsageError(f"'{self.name}' holds features of shape {self.x.shape}, targets of shape {self.y.shape}, "
                             f"{n} ids and {self.clusters.size} clusters: give one of each for every row, and at least "
                             "one row.")  # fmt: skip
        if len(np.unique(self.ids)) < n:
            raise UsageError(f"'{self.name}' has ids that name more than one row: give every row its own id, so that "
                             "a request can name it.")  # fmt: skip
        real = np.issubdtype(self.x.dtype, np.number) and not np.iscomplexobj(self.x) and not np.iscomplexobj(self.y)
        if not real or not np.isfinite(self.x).all():
            raise UsageError(f"'{self.name}' holds features of kind {self.x.dtype} and targets of kind {self.y.dtype}, "
                             "or NaN or infinite features: give finite real numbers.")  # fmt: skip

    def only(self, chosen: NDArray[Any]) -> Table:
        return Table(self.x[chosen], self.y[chosen], self.ids[chosen], self.clusters[chosen], self.name)


def read_table(path: str | Path) -> Table:
    """Rows from an .npz or .safetensors file with ``X`` and ``y``, and optionally ``ids`` and ``clusters``.

    Without ids a row's number is its id, without clusters its id is its cluster.  No pickle is read.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            held = dict(load_file(path))
        else:
            opened = np.load(path, allow_pickle=False)
            if isinstance(opened, np.ndarray):
                raise ValueError("one array without a name")
            with opened:
                held = {name: opened[name] for name in opened.files}
    except FileNotFoundError:
        raise UsageError(f"There is no file '{path}': give an .npz or .safetensors file with X and y.") from None
    except Exception as error:  # zip, header and pickle errors have no common class
        raise UsageError(f"'{path}' is no readable .npz or .safetensors file ({str(error).split('. ')[0]}): write "
                         "arrays of numbers and strings, without pickled objects.") from None  # fmt: skip
    missing = [name for name in ("X", "y") if name not in held]
    if missing:
        raise UsageError(f"'{path}' has no array '{missing[0]}' (it has {', '.join(sorted(held)) or 'none'}): give "
                         "features X [n, d] and targets y.")  # fmt: skip
    try:
        ids = held.get("ids", np.arange(len(np.atleast_1d(held["X"])))).astype(np.str_)
        clusters = held.get("clusters", ids).astype(np.str_)
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' has ids or clusters that are no text ({error}): write strings.") from None
    return Table(held["X"], held["y"], ids, clusters, str(path))


def write_table(table: Table, path: Path) -> Path:
    """Write the rows as .npz, whole or not at all; nobody else may read them, for they are people's data."""
    import io

    from repforget.store import write_atomic

    buffer = io.BytesIO()
    np.savez(buffer, X=table.x, y=table.y, ids=table.ids, clusters=table.clusters)
    write_atomic(path, buffer.getvalue(), 0o600)
    return path


def prepared(x: NDArray[Any], radius: float | None, intercept: bool) -> Array:
    """Rows [n, d] as a head sees them; each is a function of itself alone.

    With a ``radius`` a row is divided by it, and cut to norm 1 where it is longer.  An ``intercept`` is one more
    feature (penalised like the others), with both parts scaled by 1/sqrt(2) so that the norm stays within 1.
    """
    held = x.astype(np.float64, order="C")  # by columns a row's norm would be summed otherwise among many than alone
    if radius is not None:
        if not radius > 0:
            raise UsageError(f"The radius is {radius}: give a positive length, chosen without looking at the rows.")
        held = held / radius
        held /= np.maximum(1.0, np.linalg.norm(held, axis=1, keepdims=True))
    if intercept:
        share = 1.0 if radius is None else 1 / np.sqrt(2.0)
        held = np.concatenate([share * held, np.full((len(held), 1), share)], 1)
    return held


@dataclass(frozen=True)
class Index:
    """Keyed hashes [n, 16] of the ids, clusters and contents of the rows a head holds; the key is the head's own."""

    salt: bytes
    ids: Hashes
    clusters: Hashes
    contents: Hashes

    @classmethod
    def of(cls, salt: bytes, table: Table, x: Array, y: Array) -> Index:
        """Cost: three hashes per row, some 10 s for a million rows."""
        return cls(salt, _hashed(salt, table.ids), _hashed(salt, table.clusters), _contents(salt, x, y))

    def __len__(self) -> int:
        return len(self.ids)

    def chosen(self, names: Iterable[str], where: str) -> NDArray[np.intp]:
        """Places of the rows that ``names`` (ids or clusters) mean; UsageError for a name never trained on.

        A name that is one row's id and the cluster of others means all of them.
        """
        wanted = list(dict.fromkeys(names))
        if not wanted:
            raise UsageError("No row is named: give ids or clusters of rows to take out.")
        hashes, known = _flat(_hashed(self.salt, wanted)), [_flat(self.ids), _flat(self.clusters)]
        there = np.isin(hashes, np.concatenate(known))
        unknown = [name for name, held in zip(wanted, there, strict=True) if not held]
        if unknown:
            raise UsageError(f"'{unknown[0]}' is neither a row nor a cluster of '{where}' ({len(unknown)} of "
                             f"{len(wanted)} names are not): it was never trained on, or is taken out "
                             "already.")  # fmt: skip
        return np.flatnonzero(np.isin(known[0], hashes) | np.isin(known[1], hashes))

    def rows_of(self, places: NDArray[np.intp], table: Table) -> NDArray[np.intp]:
        """For each place the number of its row in ``table``; UsageError where one is missing there."""
        there = _flat(_hashed(self.salt, table.ids))
        order = np.argsort(there)
        wanted = _flat(self.ids)[places]
        found = order[np.minimum(np.searchsorted(there[order], wanted), len(order) - 1)]
        missing = int((there[found] != wanted).sum())
        if missing:
            raise UsageError(f"{missing} of the {len(places)} rows that are needed are not in '{table.name}': give the "
                             "file that holds the rows of the training (--features).")  # fmt: skip
        return found

    def check(self, places: NDArray[np.intp], x: Array, y: Array, table: Table) -> None:
        """UsageError where a row is not bit for bit the one that was trained on."""
        changed = np.flatnonzero((_contents(self.salt, x, y) != self.contents[places]).any(1))
        if len(changed):
            raise UsageError(f"Row '{table.ids[changed[0]]}' of '{table.name}' is not what was trained on "
                             f"({len(changed)} of {len(places)} rows differ): give the file of the "
                             "training.")  # fmt: skip

    def without(self, places: NDArray[np.intp]) -> Index:
        left = np.delete(np.arange(len(self)), places)
        return Index(self.salt, self.ids[left], self.clusters[left], self.contents[left])


def _hashed(salt: bytes, names: Iterable[str]) -> Hashes:
    joined = b"".join(hashlib.blake2b(str(name).encode(), key=salt, digest_size=SIZE).digest() for name in names)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, SIZE)


def _contents(salt: bytes, x: Array, y: Array) -> Hashes:
    both = (np.ascontiguousarray(x, dtype=np.float64), np.ascontiguousarray(y, dtype=np.float64))
    joined = b"".join(hashlib.blake2b(a.tobytes() + b.tobytes(), key=salt, digest_size=SIZE).digest()
                      for a, b in zip(*both, strict=True))  # fmt: skip
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, SIZE)


def _flat(hashes: Hashes) -> NDArray[Any]:
    """Each hash as one value, for comparisons and sorting."""
    return np.ascontiguousarray(hashes).view([("", np.uint64)] * (SIZE // 8)).ravel()
