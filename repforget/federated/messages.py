"""What server and clients say to each other, and how it is written: JSON for words, safetensors for numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from repforget.errors import UsageError, nearest
from repforget.federated.records import RULES, Rule, Update
from repforget.training.stepper import AnyOptimizer

Packed = tuple[str, bytes]
# train or unlearn on the own records; tell the classes, a public key, or moments in the clear or masked
Kind = Literal["train", "unlearn", "classes", "key", "moments", "masked"]
FAILED, TOLD = "failed", "told"  # in the head of a reply that carries no update: why, or what it tells instead
LONGEST = 100  # characters of a client's name
MOST = 10**9  # records that a client may claim, whatever a plan allows
# what JSON, numbers and tensors of a stranger can raise
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def shown(text: object, most: int = 300) -> str:
    """What a stranger sent as one line of at most ``most`` characters, with everything escaped that does not print."""
    if not isinstance(text, str):
        return f"<{type(text).__name__}>"
    line = " ".join(text[:most].split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


@dataclass(frozen=True)
class Introduction:
    """What a client says at the join; digests are sha256 (hex), ``facts`` those that moments can be read from."""

    client: str
    records: int
    base: str
    tokenizer: str
    facts: int = 0

    @property
    def fault(self) -> str | None:
        """Why this is no introduction, whatever came over the wire; None where it is one."""
        if not isinstance(self.client, str) or not (0 < len(self.client) <= LONGEST and self.client.isprintable()):
            return f"has a name that is not 1 to {LONGEST} printable characters"
        if type(self.records) is not int or type(self.facts) is not int:
            return "does not say by a whole number how many records it has"
        if not (isinstance(self.base, str) and isinstance(self.tokenizer, str)):
            return "does not say which model it has"
        return "has no records" if self.records < 1 and self.facts < 1 else None


@dataclass(frozen=True)
class Local:
    """How a client trains; decided by the server, the same for all.

    ``weights`` are parameter names.  ``rank`` 0 trains them themselves, more gives each an adapter.  "fedsgd" takes one
    plain step of size ``lr`` over all own records, whatever ``epochs``; ``clip`` 0 leaves gradients as they are.
    """

    rule: Rule = "fedavg"
    weights: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    epochs: int = 1
    batch_size: int = 32
    lr: float = 1e-3
    optimizer: AnyOptimizer = "adamw"
    clip: float = 1.0
    seed: int = 0
    share: float = 1.0  # of the epochs; calibration asks for less

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UsageError(f"There is no strategy '{self.rule}': {nearest(self.rule, RULES)}")
        if self.optimizer not in get_args(AnyOptimizer) + get_args(get_args(AnyOptimizer)[0]):
            raise UsageError(f"There is no optimiser '{self.optimizer}': use adamw or descent.")
        least = {"rank": 0, "epochs": 1, "batch_size": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)} and must be at least {low}.")
        if not (math.isfinite(self.lr) and self.lr > 0 and math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"Learning rate {self.lr} and alpha {self.alpha} must be finite and above 0.")
        object.__setattr__(self, "weights", tuple(self.weights))
        if self.rule == "fedsgd":  # the theorem is about one plain step
            object.__setattr__(self, "optimizer", "descent")
            object.__setattr__(self, "epochs", 1)
            object.__setattr__(self, "clip", 0.0)


@dataclass(frozen=True, eq=False)
class Task:
    """What the server asks of a client: ``kind`` of work number ``round``, with ``words`` and the tensors of ``state``.

    Training and unlearning start from the base plus ``state``.
    """

    round: int
    local: Local
    state: Mapping[str, np.ndarray] = field(default_factory=dict)
    kind: Kind = "train"
    words: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Told:
    """The answer to a question that is no training."""

    words: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reply:
    """What came back from a client: an update with its mean loss (nats) and CPU seconds, what it was asked to tell, or
    why there is neither."""

    client: str
    round: int
    update: Update | None = None
    loss: float = math.nan
    seconds: float = 0.0
    failed: str | None = None
    down: int = 0  # bytes that went to the client for it
    up: int = 0  # bytes that came back
    told: Told | None = None


def pack_task(task: Task) -> Packed:
    head = {"round": task.round, "local": asdict(task.local), "kind": task.kind, "words": task.words}
    return json.dumps(head), _tensors(task.state)


def unpack_task(packed: Packed) -> Task:
    head = json.loads(packed[0])
    return Task(_whole(head["round"]), Local(**head["local"]), _arrays(packed[1]), head["kind"], head["words"])


def named(packed: Packed) -> str:
    """What kind of task this is, for people; "task" where that cannot be read."""
    try:
        kind = json.loads(packed[0])["kind"]
    except UNREADABLE:
        return "task"
    return "round" if kind == "train" else shown(kind, LONGEST)


def pack_reply(reply: Reply) -> Packed:
    head: dict[str, Any] = {"client": reply.client, "round": reply.round, "seconds": reply.seconds}
    if reply.told is not None:
        return json.dumps({**head, TOLD: reply.told.words}), _tensors(reply.told.tensors)
    if reply.update is None:
        return json.dumps({**head, FAILED: reply.failed}), b""
    head |= {"records": reply.update.records, "loss": reply.loss}
    return json.dumps(head), _tensors(reply.update.tensors)


def size(packed: Packed) -> int:
    """Bytes of the payload (without what the transport adds)."""
    return len(packed[0].encode()) + len(packed[1])


def unpack_reply(packed: Packed, down: int = 0) -> Reply:
    """The reply as it was sent; one that cannot be read is a :class:`UsageError` that says so."""
    up = size(packed)
    try:
        head = json.loads(packed[0])
        who, when, seconds = shown(head["client"]), _whole(head["round"]), _amount(head["seconds"])
        if FAILED in head:
            return Reply(who, when, seconds=seconds, failed=shown(head[FAILED]), down=down, up=up)
        if TOLD in head:
            told = Told(dict(head[TOLD]), _arrays(packed[1]))
            return Reply(who, when, seconds=seconds, down=down, up=up, told=told)
        update = Update(who, _whole(head["records"]), _arrays(packed[1]))
        return Reply(who, when, update, _amount(head["loss"]), seconds, down=down, up=up)
    except UNREADABLE as error:
        raise UsageError(f"sent a reply that cannot be read ({type(error).__name__}: {shown(str(error))})") from None


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a whole number is expected")
    return value


def _amount(value: Any) -> float:
    """A finite number of at least 0: a loss in nats, or seconds."""
    if not (isinstance(value, (int, float)) and 0 <= float(value) < 1e12):
        raise ValueError("a finite number of at least 0 is expected")
    return float(value)


def _tensors(values: Mapping[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(value) for name, value in values.items()}))


def _arrays(body: bytes) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(body))
    except SafetensorError as error:
        raise ValueError(str(error)) from None
