"""A model in shards: every process holds its part of each parameter, and whole layers only while they run.

The cutting is PyTorch's ``fully_shard`` (FSDP2; Zhao et al. 2023, arXiv 2304.11277).  Whoever runs a part of the model
waits for the others, so that all processes make the same passes in the same order.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repforget.edit.train._pass import Term
from repforget.edit.train._processes import Processes
from repforget.edit.train._settings import Settings, named
from repforget.errors import RepforgetError, ResourceError, UsageError
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map

KINDS = ("none", "lora")


@dataclass(frozen=True, eq=False)
class Shards:
    """``model`` in shards, and of each trained parameter the rows that this process holds.

    ``parameters`` are plain tensors that share their memory with the model's, a process's part of each along the first
    dimension (none where there are fewer rows than processes); gradients are theirs.
    """

    model: LoadedModel
    parameters: list[Tensor]
    processes: Processes
    _trained: Sequence[Any]
    _held: Mapping[nn.Parameter, Any]  # parameter of the whole model, empty meanwhile -> what this process has of it

    def backward(self, loss: Tensor) -> None:
        """Leave in ``parameters`` the gradients of the sum of all processes' losses."""
        loss.backward()  # type: ignore[no-untyped-call]
        for own, cut in zip(self.parameters, self._trained, strict=True):
            own.grad, cut.grad = None if cut.grad is None else cut.grad.to_local(), None

    def own(self, whole: Tensor) -> Tensor:
        """This process's rows of a whole tensor; numbers are everybody's."""
        if whole.ndim == 0:
            return whole
        parts = whole.chunk(self.processes.world)
        return parts[self.processes.rank] if self.processes.rank < len(parts) else whole[:0]

    @torch.no_grad()
    def whole(self, own: Tensor) -> Tensor:
        """The rows of all processes, in all of them."""
        if own.ndim == 0:
            return own
        sizes = torch.zeros(self.processes.world, dtype=torch.long)
        sizes[self.processes.rank] = len(own)
        rows = self.processes.total([sizes])[0].tolist()
        padded = torch.zeros(max(rows), *own.shape[1:], dtype=own.dtype, device=self.processes.device)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather([x.view(-1).view(torch.uint8) for x in found], padded.view(-1).view(torch.uint8))
        return torch.cat([part[:n].to(own.device) for part, n in zip(found, rows, strict=True)])

    def put_back(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Make parameters (None: all) of the whole model what the processes hold of them together."""
        for parameter in self._held if parameters is None else parameters:
            parameter.data = self.whole(self._held[parameter].to_local().detach())


@contextmanager
def in_shards(model: LoadedModel, chosen: Sequence[nn.Parameter], processes: Processes) -> Iterator[Shards | None]:
    """Cut the model for as long as the block lasts; ``chosen`` are trained.  Meanwhile ``model`` itself is empty.

    Afterwards it has the values that its shards have then, unless this process alone has failed: the others do not
    answer any more, and the model stays empty.  Memory: a process's share of the parameters, and while they run the
    embeddings and one layer whole.  Yields None, and cuts nothing, where the launcher does not ask for shards.
    """
    if not processes.sharded:
        yield None
        return
    if len({p.dtype for p in chosen}) > 1:
        raise UsageError("Parameters of several precisions cannot be trained in shards (FSDP): give targets of one, or "
                         "launch without --use_fsdp.")  # fmt: skip
    names = {id(p): name for name, p in model.module.named_parameters()}
    # Modules are copied and parameters are not, so that the model's own modules keep their classes and hooks.
    cut = copy.deepcopy(model.module, {id(p): p for p in model.module.parameters()})
    _cut(cut, [layer.path for layer in site_map(model).anatomy.layers], processes)
    table = dict(cut.named_parameters())
    held = {p: table[name] for name, p in model.module.named_parameters()}
    trained = [table[names[id(p)]] for p in chosen]
    for parameter in held:
        parameter.data = parameter.data.new_empty(0)
    shards = Shards(dataclasses.replace(model, module=cut), [p.to_local().detach().requires_grad_() for p in trained],
                    processes, trained, held)  # fmt: skip
    try:
        yield shards
    except RepforgetError as error:
        if not isinstance(error, ResourceError):  # what the settings and the data cause, all processes see
            shards.put_back()
        raise
    shards.put_back()
    for own in held.values():  # what is left of the model in shards refers to itself, and would keep them for a while
        own.to_local().untyped_storage().resize_(0)


def _cut(module: Any, layers: Sequence[str], processes: Processes) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    half = any(p.dtype.itemsize < 4 for p in module.parameters() if p.requires_grad)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    parts: list[Any] = [module.get_submodule(path) for path in layers]
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in (*parts, module):
        part.set_gradient_divide_factor(1.0)  # losses are divided by counts of the whole step already
        part.set_force_sum_reduction_for_comms(True)
    module.set_reduce_scatter_unused_params(True)

    def anew(_module: nn.Module, _args: Any) -> None:
        """What a pass without gradients left whole may have changed since."""
        for part in (*parts, module):
            part.reshard()

    module.register_forward_pre_hook(anew, prepend=True)


def check_shards(model: LoadedModel, shared: Settings, terms: Sequence[Term], kind: str) -> None:
    """UsageError for settings under which a process would need more than its shards."""
    wrappers = [r for r in (shared.robust if isinstance(shared.robust, list) else [shared.robust]) if r != "none"]
    found = [
        *([f"adapter: {kind}"] if kind not in KINDS else []),
        *([f"combine: {named(shared.combine)[0]}"] if named(shared.combine)[0] != "linear" else []),
        *(f"robust: {named(wrapper)[0]}" for wrapper in wrappers),
        *(["optimizer: sophia"] if shared.optimizer == "sophia" else []),
        *(["precision: stochastic"] if shared.precision == "stochastic" else []),
        *(["teacher: live"] if shared.teacher == "live" else []),
        *(["answers: fresh"] if any(t.reads("instead_reference") and not t.data.fixed for t in terms) else []),
        *(f"retain: {t.objective.name}" for t in terms if t.reads("drift", "importance")),
    ]
    if found:
        raise UsageError(f"'{found[0]}' needs whole weights or gradients, and the launcher asks for a model in shards "
                         "(FSDP): choose another, or launch without --use_fsdp.")  # fmt: skip
    if any(p.device != model.device for p in model.module.parameters()):
        raise UsageError("A model that is spread over several devices cannot be cut into shards (FSDP): load it whole, "
                         "or launch without --use_fsdp.")  # fmt: skip
