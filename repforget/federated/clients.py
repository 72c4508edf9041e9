"""A client: its own records, a frozen base, and local training that sends back nothing but a change of weights."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.artifact.weights import is_conv1d, owner_of
from repforget.errors import NumericalError, RepforgetError, UsageError, nearest
from repforget.federated.messages import (
    UNREADABLE,
    Introduction,
    Local,
    Packed,
    Reply,
    Task,
    pack_reply,
    shown,
    unpack_task,
)
from repforget.federated.records import LEFT, RIGHT, Update
from repforget.models._fingerprint import tokenizer_digest
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.training import ADAPTER, NO_LABEL, Example, Record, Stepper, batches, collate, encoded, low_rank_adapters
from repforget.training.finetune import only

if TYPE_CHECKING:
    from repforget.federated.secure import Party
    from repforget.knowledge import EditData

State = Mapping[str, np.ndarray]  # what is added to the base, by the name of the weight


class Worker(Protocol):
    """Who answers tasks: a :class:`Client`, or one that is made to fail."""

    @property
    def name(self) -> str: ...

    def introduce(self) -> Introduction: ...

    def work(self, task: Task) -> Reply: ...


@dataclass(frozen=True)
class Client:
    """Somebody who takes part: a name, a model that is loaded, and records and facts that stay here.

    ``minimum``: points behind every mean that it tells in the clear, whatever the server asks.
    """

    name: str
    model: LoadedModel
    examples: tuple[Example, ...]
    records: tuple[Record, ...] = ()
    data: EditData | None = None
    minimum: int = 1
    parties: dict[str, Party] = field(default_factory=dict, compare=False)  # keys of sums that are to come
    summed: dict[str, frozenset[str]] = field(default_factory=dict, compare=False)  # run of a server -> in sums with

    @classmethod
    def of(
        cls, name: str, model: LoadedModel, records: Sequence[Record], data: EditData | None = None, minimum: int = 1
    ) -> Client:
        """A client whose records are tokenized once; UsageError for a record that does not fit the model."""
        return cls(name, model, tuple(encoded(model, records)), tuple(records), data, minimum)

    def introduce(self) -> Introduction:
        """What the server is told at the join: who, how much of what, and digests of base and tokenizer."""
        tokenizer = tokenizer_digest(self.model.tokenizer)
        facts = 0 if self.data is None else len(self.data.forget) + len(self.data.retain) + len(self.data.general)
        return Introduction(self.name, len(self.examples), self.model.fingerprint, tokenizer, facts)

    def work(self, task: Task) -> Reply:
        """Do what ``task`` asks, with the own records; the model is afterwards what it was, bit for bit.

        Training and unlearning start from the task's global state; NumericalError where a loss is not finite.  Cost of
        training: the passes of ``task.local`` over the own records, and the memory of one copy of the trained weights
        on top of the training's own.
        """
        started = time.process_time()
        reply = self._answer(task)
        return replace(reply, seconds=time.process_time() - started)

    def _answer(self, task: Task) -> Reply:
        if task.kind == "train":
            tensors, loss = train_locally(self.model, self.examples, task, self.name)
            return Reply(self.name, task.round, Update(self.name, len(self.examples), tensors), loss)
        if task.kind == "unlearn":
            from repforget.federated.local import unlearned

            editor = str(task.words["editor"])
            update = unlearned(self.name, self.model, task.local, task.state, self.records, editor,
                               seed=task.local.seed)  # fmt: skip
            return Reply(self.name, task.round, update, 0.0)
        from repforget.federated.questions import told

        return Reply(self.name, task.round, told=told(self, task))


def answer(client: Worker, packed: Packed) -> Packed:
    """What a client sends back to a packed task, whatever was sent: its update, or the sentence of its refusal."""
    number = 0
    try:
        task = unpack_task(packed)
        number = task.round
        return pack_reply(client.work(task))
    except RepforgetError as error:
        why = str(error).rstrip(".")
    except (*UNREADABLE, RuntimeError) as error:  # words and tensors that another release would send
        why = (f"it cannot do what it was asked ({type(error).__name__}: {shown(str(error))}); if that does not say "
               "why, check that server and clients are of one release")  # fmt: skip
    return pack_reply(Reply(client.name, number, failed=f"failed: {why}"))


def trained_weights(model: LoadedModel, patterns: Sequence[str], rank: int) -> tuple[str, ...]:
    """Names of the parameters to train: those that a pattern finds; without one, all matrices of the blocks.

    With ``rank`` above 0 they must be matrices of linear layers that are tied to nothing.  UsageError for a pattern
    that finds none.
    """
    known = [name for name, _ in model.module.named_parameters()]
    able = [name for name in known if _linear(model.module, name)]
    if not patterns:
        blocks = tuple(f"{layer.path}." for layer in site_map(model.module).anatomy.layers)
        return tuple(name for name in able if name.startswith(blocks))
    valid = able if rank else known
    found: list[str] = []
    for pattern in patterns:
        try:
            matched = [name for name in valid if re.search(pattern, name)]
        except re.error as error:
            raise UsageError(f"'{pattern}' is no regular expression ({error}): give a part of the names of "
                             "parameters.") from None  # fmt: skip
        if not matched:
            what = "matrix of a linear layer" if rank else "parameter"
            raise UsageError(f"No {what} of '{model.name}' matches '{pattern}': {nearest(pattern, valid)}")
        found += matched
    return tuple(dict.fromkeys(found))


def _linear(module: nn.Module, name: str) -> bool:
    owner, attribute = owner_of(module, name)
    parameter = owner._parameters[attribute]
    shared = sum(p is parameter for _, p in module.named_parameters(remove_duplicate=False))
    return attribute == "weight" and shared == 1 and (isinstance(owner, nn.Linear) or is_conv1d(owner))


def shapes_of(model: LoadedModel, local: Local) -> dict[str, tuple[int, ...]]:
    """The tensors that an update must have and their shapes, by name; what the server checks replies against."""
    found: dict[str, tuple[int, ...]] = {}
    for name, value in untouched(model, local).items():
        if not local.rank:
            found[name] = value.shape
            continue
        out, inner = value.shape
        size = min(local.rank, out, inner)
        found |= {name + LEFT: (out, size), name + RIGHT: (size, inner)}
    return found


def weights_norm(model: LoadedModel, local: Local) -> float:
    """Euclidean norm of all weights that are trained, as they are in the base."""
    squares = [float(model.module.get_parameter(name).detach().double().square().sum()) for name in local.weights]
    return float(np.sqrt(sum(squares)))


def untouched(model: LoadedModel, local: Local) -> dict[str, np.ndarray]:
    """The global state before the first round: nothing (float32) is added to any trained weight.

    Under adapters the state is in Linear orientation [out, in], as their products are; else in the layout of the
    parameter.
    """
    found = {}
    for name in local.weights:
        owner, attribute = owner_of(model.module, name)
        shape = tuple(getattr(owner, attribute).shape)
        found[name] = np.zeros(shape[::-1] if local.rank and is_conv1d(owner) else shape, np.float32)
    return found


def own_layout(module: nn.Module, local: Local, state: State) -> dict[str, Tensor]:
    """The deltas of ``state`` in the layouts of their parameters."""
    found = {}
    for name, value in sorted(state.items()):
        delta = torch.from_numpy(np.array(value))
        found[name] = delta.mT if local.rank and is_conv1d(owner_of(module, name)[0]) else delta
    return found


@contextmanager
def changed(module: nn.Module, local: Local, state: State) -> Iterator[None]:
    """Add ``state`` to the trained weights, in float64; afterwards they are what they were, bit for bit."""
    before = {name: module.get_parameter(name).detach().clone() for name in local.weights}
    try:
        with torch.no_grad():
            for name, delta in own_layout(module, local, state).items():
                module.get_parameter(name).copy_(before[name].double() + delta.to(before[name].device))
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                module.get_parameter(name).copy_(value)


def train_locally(
    model: LoadedModel, examples: Sequence[Example], task: Task, client: str
) -> tuple[dict[str, np.ndarray], float]:
    """The change (float32) that local training makes to the weights of ``task``, and its mean loss in nats.

    The loss is the mean over records of the mean over labelled tokens, so that the average of the clients' gradients
    weighted by their records is the gradient on all records.  An adapter starts at zero from a draw that depends on
    seed and round alone; the order of batches depends on seed, round and client.
    """
    module, local = model.module, task.local
    with changed(module, local, task.state):
        if local.rank:
            seed = seed_of(local.seed, task.round)
            with low_rank_adapters(module, local.weights, rank=local.rank, alpha=local.alpha, seed=seed):
                loss = _fit(module, examples, task, client, lambda n: ADAPTER in n and not n.endswith("original"))
                return _factors(module, local.weights), loss
        start = {name: module.get_parameter(name).detach().clone() for name in local.weights}
        loss = _fit(module, examples, task, client, frozenset(local.weights).__contains__)
        return {name: (module.get_parameter(name).detach() - value).float().cpu().numpy()
                for name, value in start.items()}, loss  # fmt: skip


def seed_of(*parts: Any) -> int:
    """A seed that follows from ``parts`` alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _fit(
    module: nn.Module, examples: Sequence[Example], task: Task, client: str, trainable: Callable[[str], bool]
) -> float:  # fmt: skip
    local, size = task.local, task.local.batch_size
    chosen = [p for name, p in module.named_parameters() if trainable(name)]
    chunks = [list(examples[i : i + size]) for i in range(0, len(examples), size)]
    if local.rule == "fedsgd":
        steps = iter([chunks])
        count = 1
    else:
        stream = batches(examples, size, seed_of(local.seed, task.round, client))
        count = max(1, round(local.epochs * local.share * len(chunks)))
        steps = ([next(stream)] for _ in range(count))
    stepper = Stepper(chosen, steps=count, lr=local.lr, optimizer=local.optimizer, schedule="constant", clip=local.clip)
    losses = []
    with only(module, chosen):
        for index, group in enumerate(steps):
            gradients, loss = _gradients(module, chosen, group)
            if not np.isfinite(loss):
                raise NumericalError(f"The loss of client '{client}' is {loss} at step {index + 1} of round "
                                     f"{task.round}: lower the learning rate.")  # fmt: skip
            stepper.step(index, gradients)
            losses.append(loss)
    return float(np.mean(losses))


def _gradients(
    module: nn.Module, chosen: Sequence[nn.Parameter], chunks: Sequence[Sequence[Example]]
) -> tuple[list[Tensor], float]:
    """Gradient and value of the mean loss over the records of all ``chunks``, one chunk in memory at a time."""
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in chosen]
    records, loss = sum(map(len, chunks)), 0.0
    for chunk in chunks:
        part = record_loss(module, collate(chunk, chosen[0].device)) * (len(chunk) / records)
        for own, gradient in zip(total, torch.autograd.grad(part, chosen, allow_unused=True), strict=True):
            if gradient is not None:
                own += gradient
        loss += float(part.detach())
    return total, loss


def record_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the records of a collated batch of their mean cross-entropy (nats) per labelled token."""
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = module(**texts, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    exact = logits if logits.dtype == torch.float64 else logits.float()
    each = functional.cross_entropy(exact.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none")
    return (each.sum(1) / (labels != NO_LABEL).sum(1)).mean()


def _factors(module: nn.Module, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The adapters' factors, scale included, in Linear orientation."""
    found: dict[str, np.ndarray] = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        part: Any = owner.parametrizations[attribute][0]  # type: ignore[index, union-attr]
        left, right = (part.left.detach() * part.scale).cpu(), part.right.detach().cpu()
        if is_conv1d(owner):
            left, right = right.T, left.T
        found |= {name + LEFT: left.contiguous().numpy().copy(), name + RIGHT: right.contiguous().numpy().copy()}
    return found


def local_settings(model: LoadedModel, **settings: Any) -> Local:
    """Settings of local training with the names of the weights filled in for this model."""
    patterns = tuple(settings.pop("weights", ()))
    local = Local(**settings)
    return Local(**{**asdict(local), "weights": trained_weights(model, patterns, local.rank)})


