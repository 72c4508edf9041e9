"""Which record is trained on where and when: everything follows from keyed hashes of names, nothing from counts.

A plan is a pure function of settings, base model and records.  Shard and slice of a record depend on its unit alone,
its place in an epoch on its id alone, the learning rates of a stage on the records of that stage alone; so that the
plan without a record *is* the plan of a training that never had it, and a stage that it is no part of stays the same.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from torch import nn

from repforget.artifact.weights import is_conv1d
from repforget.errors import UnknownNameError, UsageError, nearest
from repforget.models.sites import site_map
from repforget.training import Record, Schedule
from repforget.training.items import digest

Unit = Literal["cluster", "record"]
Order = Literal["sisa", "s3t"]
Combination = Literal["sum", "mean"]
STAGE = "slice"  # name of the folders of stages


@dataclass(frozen=True)
class Settings:
    """How a sharded training is done; nothing here depends on the records.

    ``shards`` adapters, each trained on ``slices`` slices one after the other for ``epochs`` passes over all slices so
    far; ``groups`` are the paths of the adapted modules, for "s3t" one group of blocks per slice, from the top.
    ``permutations``: cyclic orders of the slices that "s3t" keeps.  ``schedule`` runs from the first to the last step
    of one stage, so that no stage depends on a later slice.  ``combine``: shards are served as the sum or the mean of
    their weight changes.
    """

    groups: tuple[tuple[str, ...], ...]
    shards: int = 4
    slices: int = 4
    unit: Unit = "cluster"
    order: Order = "sisa"
    permutations: int = 1
    rank: int = 8
    alpha: float = 16.0
    epochs: int = 10
    lr: float = 5e-3
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    batch_size: int = 16
    combine: Combination = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shards", "slices", "permutations", "rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: give 1 or more.")
        if not self.lr > 0 or not self.alpha > 0 or self.weight_decay < 0:
            raise UsageError(f"lr {self.lr}, alpha {self.alpha} and weight_decay {self.weight_decay} were given: the "
                             "first two must be positive, the last not negative.")  # fmt: skip
        if self.order == "sisa" and self.permutations != 1:
            raise UsageError(f"{self.permutations} permutations were asked for, which only the order s3t has: leave "
                             "them out, or give --order s3t.")  # fmt: skip
        if self.permutations > self.slices:
            raise UsageError(f"{self.permutations} cyclic permutations of {self.slices} slices were asked for: there "
                             f"are {self.slices}.")  # fmt: skip
        if len(self.groups) != (self.slices if self.order == "s3t" else 1) or not all(self.groups):
            raise UsageError(f"{len(self.groups)} groups of modules do not fit the order {self.order} with "
                             f"{self.slices} slices: make them with block_groups.")  # fmt: skip

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Settings:
        return cls(**{**body, "groups": tuple(tuple(group) for group in body["groups"])})

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> float:
        """The factor of every shard's weight change in the served model; never one that counts what is left."""
        return 1.0 if self.combine == "sum" else 1.0 / self.shards


@dataclass(frozen=True, eq=False)
class Stage:
    """One slice taken in: ``position`` of ``track`` (an order of slices) of ``shard``, over all slices so far."""

    shard: int
    track: int
    position: int
    slices: tuple[int, ...]  # in the order in which they were taken in
    records: tuple[Record, ...]  # of all of them, sorted
    key: Mapping[str, Any]  # everything that its bytes follow from

    def group(self, settings: Settings) -> tuple[str, ...]:
        """Paths of the modules whose adapters this stage trains."""
        return settings.groups[self.position if settings.order == "s3t" else 0]

    def batches(self, settings: Settings, epoch: int) -> list[tuple[Record, ...]]:
        """The records of one epoch in the order of hash(epoch, id), cut into batches."""
        rank = {r.id: keyed(settings.seed, "order", self.position, epoch, r.id) for r in self.records}
        order = sorted(self.records, key=lambda r: (rank[r.id], r.id))
        return [tuple(order[i : i + settings.batch_size]) for i in range(0, len(order), settings.batch_size)]

    def steps(self, settings: Settings) -> int:
        return settings.epochs * -(-len(self.records) // settings.batch_size)

    def passes(self, settings: Settings) -> int:
        """Records read, each counted as often as it is read: what a stage costs."""
        return settings.epochs * len(self.records)


def keyed(seed: int, *parts: str | int) -> int:
    """A 64-bit hash of ``parts`` under ``seed``."""
    body = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(body, key=str(seed).encode(), digest_size=8).digest(), "big")


def place(settings: Settings, record: Record) -> tuple[int, int]:
    """(shard, slice) of a record: a hash of its unit, whatever the other records are."""
    unit = record.cluster if settings.unit == "cluster" else record.id
    return (keyed(settings.seed, "shard", unit) % settings.shards,
            keyed(settings.seed, "slice", unit) % settings.slices)  # fmt: skip


def tracks(settings: Settings) -> tuple[tuple[int, ...], ...]:
    """The orders in which slices are taken in: no two have the same slice at the same position (a Latin square)."""
    n = settings.slices
    starts = [b * n // settings.permutations for b in range(settings.permutations)]
    return tuple(tuple((start + i) % n for i in range(n)) for start in starts)


def planned(settings: Settings, base: str, records: Sequence[Record]) -> tuple[Stage, ...]:
    """Every stage of a training on ``records`` of the model with fingerprint ``base``, in the order of work."""
    cells: dict[tuple[int, int], list[Record]] = {}
    for record in sorted(records):
        cells.setdefault(place(settings, record), []).append(record)
    common = {name: value for name, value in asdict(settings).items() if name not in ("combine", "permutations")}
    found = []
    for shard in range(settings.shards):
        hashes = {i: digest(cells.get((shard, i), ())) for i in range(settings.slices)}
        for track, order in enumerate(tracks(settings)):
            for position in range(settings.slices):
                sofar = order[: position + 1]
                own = tuple(sorted(r for i in sofar for r in cells.get((shard, i), ())))
                key = {"base": base, "settings": common, "shard": shard, "slices": [[i, hashes[i]] for i in sofar]}
                found.append(Stage(shard, track, position, sofar, own, key))
    return tuple(found)


def expected_share(settings: Settings) -> Fraction:
    """Share of a full training that one deletion costs, its unit drawn uniformly: (2/3 + 1/(3R)) / K; 0 for "s3t".

    Counted in passes over slices of equal size, every stage with the same number of epochs.  Source: Bourtoule et al.
    2021, arXiv 1912.03817, whose epochs differ by stage; the formula follows from sum(R^2 - j(j - 1)) over j = 1..R.
    """
    if settings.order == "s3t":
        return Fraction(0)
    return (Fraction(2, 3) + Fraction(1, 3 * settings.slices)) / settings.shards


def block_groups(module: nn.Module, names: Sequence[str], order: Order, slices: int) -> tuple[tuple[str, ...], ...]:
    """Paths of the linear layers of the blocks that ``names`` mean (last parts of paths, or patterns; none: all).

    For "s3t" in ``slices`` groups of blocks from the top, as equal as can be.  UnknownNameError for a name that
    matches no layer, UsageError where there are fewer blocks than slices.
    """
    blocks = [layer.path for layer in site_map(module).anatomy.layers]
    inside: dict[str, list[str]] = {
        block: [f"{block}.{path}" for path, part in module.get_submodule(block).named_modules()
                if isinstance(part, nn.Linear) or is_conv1d(part)]
        for block in blocks
    }  # fmt: skip
    every = [path for paths in inside.values() for path in paths]
    for name in names:
        if not any(_means(name, path) for path in every):
            known = sorted({path.rpartition(".")[2] for path in every})
            raise UnknownNameError(f"'{name}' matches no linear layer in the blocks of this model: "
                                   f"{nearest(name, known)}")  # fmt: skip
    wanted = [[p for p in inside[b] if not names or any(_means(n, p) for n in names)] for b in reversed(blocks)]
    if order == "sisa":
        return (tuple(path for paths in reversed(wanted) for path in paths),)
    depth = len(blocks)
    if slices > depth:
        raise UsageError(f"{slices} slices need as many groups of blocks and the model has {depth} blocks: give at "
                         f"most {depth} slices, or the order sisa.")  # fmt: skip
    cuts = [depth * i // slices for i in range(slices + 1)]
    groups = tuple(tuple(p for paths in wanted[a:b] for p in paths)
                   for a, b in zip(cuts, cuts[1:], strict=False))  # fmt: skip
    if not all(groups):
        raise UsageError("The chosen modules leave a group of blocks without any adapter: name modules that every "
                         "block has.")  # fmt: skip
    return groups


def _means(name: str, path: str) -> bool:
    return path.endswith(f".{name}") or fnmatch.fnmatchcase(path, name)
