"""The state of an unfinished training on disk: whole or absent, bound to what it belongs to, read back bit for bit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repforget.edit.train._engine import Gradients
from repforget.edit.train._processes import Processes
from repforget.edit.train._shards import Shards
from repforget.edit.train._watch import Look, Watch
from repforget.errors import ArtifactError, ResourceError, UsageError
from repforget.store import canonical, checksum, read_json, refusing, write_json
from repforget.training import Stepper

RECORD = "checkpoint.json"
STATES = "state-*.safetensors"
FORMAT = 1
SHARE = 0.05  # of the time that writing may take


@dataclass
class Checkpoint:
    """A folder that holds the last written state of the training ``identity`` describes.

    The tensors of each state are a file of their own; the record names one, with its sha256, and is replaced last, so
    that a process killed at any moment leaves the state before or the one after.
    """

    folder: Path
    identity: Mapping[str, Any]
    _rest_until: float = field(default=0.0, init=False)
    _step: int | None = field(default=None, init=False)  # of the state that is written

    @property
    def due(self) -> bool:
        """False while writing again would take more than :data:`SHARE` of the time."""
        return time.monotonic() >= self._rest_until

    def write(self, step: int, tensors: Mapping[str, Tensor], looks: list[dict[str, Any]]) -> None:
        """Write the state after ``step`` steps; ResourceError where the disk is full or refuses."""
        from safetensors.torch import save_file

        if step == self._step:
            return
        started = time.monotonic()
        file = self.folder / f"state-{step}.safetensors"
        with refusing(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.contiguous() for name, t in tensors.items()}, file)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        write_json(self.folder / RECORD, {"format": FORMAT, "identity": self.identity, "step": step, "looks": looks,
                                          "file": file.name, "sha256": checksum(file)})  # fmt: skip
        for old in self.folder.glob(STATES):
            if old != file:
                old.unlink()
        self._step = step
        self._rest_until = time.monotonic() + (time.monotonic() - started) / SHARE

    def read(self) -> tuple[int, dict[str, Tensor], list[dict[str, Any]]] | None:
        """The state that was written, None where there is none.

        Raises UsageError where it belongs to another training, ArtifactError where it is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / RECORD
        if not path.exists():
            if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
                raise UsageError(f"'{self.folder}' is not a folder of checkpoints: give an empty or new folder.")
            return None
        damaged = f"The checkpoint in '{self.folder}' is damaged: remove the folder to start from the beginning."
        record = read_json(path)
        try:
            if record["format"] != FORMAT:
                raise ArtifactError(f"The checkpoint in '{self.folder}' has format {record['format']} and this release "
                                    f"reads {FORMAT}: remove the folder to start from the beginning.")  # fmt: skip
            self._compare(record["identity"])
            file = self.folder / record["file"]
            if checksum(file) != record["sha256"]:
                raise ArtifactError(damaged)
            self._step = int(record["step"])
            return self._step, load_file(file), list(record["looks"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError):
            raise ArtifactError(damaged) from None

    def _compare(self, other: Mapping[str, Any]) -> None:
        own = canonical(self.identity)
        names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        if names:
            changes = ", ".join(f"{n} was {_short(other.get(n))} and is {_short(own.get(n))}" for n in names)
            raise UsageError(f"The checkpoint in '{self.folder}' belongs to another training ({changes}): ask for the "
                             "same again, or give another folder.")  # fmt: skip


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _short(value: Any, limit: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def discard(folder: Path) -> None:
    """Remove a checkpoint, and its folder where nothing else lies in it."""
    for path in (folder / RECORD, *folder.glob(STATES)):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@dataclass
class Keeper:
    """What of a running training is written to ``checkpoint`` (None: nothing is), and read back into it.

    ``step`` is how many steps lie behind the present state, None while it is changing.
    """

    checkpoint: Checkpoint | None
    stepper: Stepper
    carried: dict[str, Tensor]
    watch: Watch
    processes: Processes = Processes()
    shards: Shards | None = None
    step: int | None = field(default=None, init=False)

    def begin(self, gradients: Gradients) -> Gradients:
        """From here to the next ``step`` the state is changing."""
        self.step = None
        return gradients

    def resume(self) -> int:
        """Continue from what was written; returns the steps that are behind (0 at the beginning)."""
        found = None if self.checkpoint is None else self.checkpoint.read()
        self.step = 0 if found is None else found[0]
        if self.processes.first([self.step]) != [self.step]:
            raise ResourceError("The processes do not see the same checkpoint: put it on a disk that they share.")
        if found is None:
            self.watch.look(0)
            return 0
        step, tensors, looks = found
        if self.shards is not None:
            tensors = {name: self.shards.own(t) for name, t in tensors.items()}
        parts: dict[str, dict[str, Tensor]] = {"stepper": {}, "combine": {}, "good": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.stepper.load(parts["stepper"])
        device = self.stepper.parameters[0].device
        self.carried.update({name: t.to(device) for name, t in parts["combine"].items()})
        self.watch.good = [parts["good"][str(i)] for i in range(len(parts["good"]))]
        self.watch.looks = [Look(int(look["step"]), _number(look["forget"]), _number(look["retain"])) for look in looks]
        return step

    def write(self, *, always: bool = False) -> None:
        """Write the present state, unless it is changing or the last writing is too recent."""
        first = self.processes.rank == 0
        if self.checkpoint is None or self.step is None:
            return
        if self.shards is None:
            if not first or not (always or self.checkpoint.due):
                return
        elif always or not self.processes.first([self.checkpoint.due])[0]:  # one process alone is interrupted
            return
        tensors = {f"stepper.{name}": t for name, t in self.stepper.state().items()}
        tensors |= {f"combine.{name}": t.detach().to("cpu", copy=True) for name, t in self.carried.items()}
        tensors |= {f"good.{i}": t.detach().to("cpu") for i, t in enumerate(self.watch.good)}
        for name, t in tensors.items():
            whole = t if self.shards is None else self.shards.whole(t)
            tensors[name] = whole if first else t
        if first:
            self.checkpoint.write(self.step, tensors, [asdict(look) for look in self.watch.looks])


def identity_of(**parts: Any) -> dict[str, Any]:
    """What a checkpoint belongs to: plain values by name, mappings among them spread out."""
    out: dict[str, Any] = {"torch": torch.__version__}
    for name, value in parts.items():
        out |= value if isinstance(value, Mapping) else {name: value}
    return out
