"""Several launched processes and one command: the first runs it, the others train along whenever it asks them to.

``accelerate launch --multi_gpu --num_processes 2 -m repforget run recipe.yaml``: everything but the training of an edit
happens once, in the first process.  Before it trains, it tells the others what (as JSON); they make the same edit from
the same model beside it, each on its share of the rows, and throw it away.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repforget.errors import ModelLoadError, RepforgetError

if TYPE_CHECKING:
    from repforget.knowledge import EditData
    from repforget.models.load import LoadedModel
    from repforget.records import Localization

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_group: list[Any] = []  # the channel of requests, in the first of several processes while it runs a command


@contextmanager
def together() -> Iterator[bool]:
    """Yield True in the process that runs the command; the others serve it first, until it ends, and get False."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    channel, first = _channel()
    if not first:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides
        _serve(channel)
        _leave()
        yield False
        return
    signal.signal(signal.SIGINT, _once)
    _group.append(channel)
    try:
        yield True
        _send(channel, {})
    finally:  # after an error the others see the connection end
        _group.clear()
        _leave()


def _leave() -> None:
    import torch

    torch.distributed.destroy_process_group()


def _once(_number: int, _frame: Any) -> None:
    """Ctrl-C arrives twice under a launcher: from the terminal and from the launcher that hands it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def without_launcher() -> dict[str, str]:
    """The environment for a process of its own that none of the others knows."""
    return {name: value for name, value in os.environ.items()
            if name not in LAUNCHER and not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}  # fmt: skip


def ask(
    model: LoadedModel, data: EditData, method: str, settings: Mapping[str, Any], *, where: Localization | None,
    seed: int, checkpoint: Path | None,
) -> None:  # fmt: skip
    """Let the other processes make this edit too, if there are others and its training can be shared."""
    from repforget.discover import method as found

    if not _group or "checkpoint" not in found("edit", method).context:
        return
    _send(_group[0], {
        "model": model.name, "fingerprint": model.fingerprint, "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."), "data": _plain(data), "method": method,
        "settings": dict(settings), "where": None if where is None else where.to_json(), "seed": seed,
        "checkpoint": None if checkpoint is None else str(checkpoint),
    })  # fmt: skip


def _channel() -> tuple[Any, bool]:
    """A group of all processes whose messages may take days, and whether this is the first of them."""
    from datetime import timedelta

    import torch

    from repforget.edit.train._processes import PATIENCE_DAYS, Processes

    processes = Processes.launched()
    processes.total([torch.zeros(1)])  # they have met
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=PATIENCE_DAYS))
    return group, processes.rank == 0


def _send(group: Any, request: Mapping[str, Any]) -> None:
    import torch
    from torch.distributed import broadcast

    body = torch.frombuffer(bytearray(json.dumps(request, allow_nan=False).encode()), dtype=torch.uint8)
    broadcast(torch.tensor([len(body)]), 0, group=group)
    broadcast(body, 0, group=group)


def _received(group: Any) -> dict[str, Any]:
    """The next request; empty where there will be none, also because the first process has ended."""
    import torch
    from torch.distributed import broadcast

    try:
        size = torch.zeros(1, dtype=torch.long)
        broadcast(size, 0, group=group)
        body = torch.empty(int(size), dtype=torch.uint8)
        broadcast(body, 0, group=group)
    except RuntimeError:
        return {}
    return dict(json.loads(bytes(body.tolist())))


def _serve(group: Any) -> None:
    """Make the edits that are asked for until no more are."""
    loaded: LoadedModel | None = None
    while request := _received(group):
        from repforget.edit._dispatch import edit
        from repforget.models.load import load
        from repforget.records import Localization

        if loaded is None or loaded.name != request["model"]:
            device = "auto" if request["device"] == "cuda" else request["device"]  # each its own
            loaded = load(request["model"], device=device, dtype=request["dtype"])
        if loaded.fingerprint != request["fingerprint"]:
            raise ModelLoadError(f"Model '{request['model']}' is not the same in all processes: give every machine the "
                                 "same files.")  # fmt: skip
        where = None if request["where"] is None else Localization.from_json(request["where"])
        kept = request["checkpoint"]
        try:
            edit(loaded, _data(request["data"]), request["method"], where=where, seed=request["seed"],
                 checkpoint=kept, **request["settings"])  # fmt: skip
        except RepforgetError:  # the first process says it
            continue
        except RuntimeError:  # it has ended in the middle of a sum
            return


def _plain(data: EditData) -> dict[str, Any]:
    facts = {name: [vars(fact) for fact in getattr(data, name)] for name in ("forget", "retain")}
    pool = {relation: dict(counts) for relation, counts in data.pool.items()}
    return {**facts, "general": list(data.general), "pool": pool, "digest": data.digest}


def _data(data: Mapping[str, Any]) -> EditData:
    from repforget.knowledge import EditData, Fact

    facts = {name: tuple(Fact(**fact) for fact in data[name]) for name in ("forget", "retain")}
    return EditData(facts["forget"], facts["retain"], tuple(data["general"]), data["pool"], data["digest"])
