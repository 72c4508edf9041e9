"""One forward hook per site: finds the tensor in a module's arguments or outputs and puts a new one back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repforget.errors import SiteError
from repforget.models.gather import Batch
from repforget.models.sites import Location

Visit = Callable[[Tensor], Tensor | None]  # the module's whole tensor -> a new one, or None to leave it


def attach(module: nn.Module, place: Location, visit: Visit) -> RemovableHandle:
    """Register ``visit`` on the tensor that passes at ``place``; the caller removes the handle."""
    target = module.get_submodule(place.path) if place.path else module
    if place.side == "out":

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            value = _output(output)
            changed = visit(value)
            return None if changed is None else _with_output(output, changed)

        return target.register_forward_hook(after)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
        if not args and key is None:
            raise SiteError(f"Module '{place.path}' was called without an input, so that its site cannot be read.")
        changed = visit(kwargs[key] if key is not None else args[0])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: changed})

    return target.register_forward_pre_hook(before, with_kwargs=True)


def _output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    value = output[0] if logits is None else logits
    return value  # type: ignore[no-any-return]


def _with_output(output: Any, value: Tensor) -> Any:
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**{**output, "logits": value})


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled parts uncompiled while hooks are attached: hooks added after compiling never fire.

    Always on once the compiler is loaded, because a wrapper made by ``torch.compile(module)`` cannot be seen
    from the module inside it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was ever compiled in this process
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@cache
def _accepts(kind: Any, argument: str) -> bool:
    return argument in inspect.signature(kind.forward).parameters  # of the class: instances may be wrapped


def input_device(module: nn.Module) -> torch.device:
    """Return the device on which token ids enter the model."""
    weight: Tensor = module.get_input_embeddings().weight  # type: ignore[operator]
    if weight.device.type != "meta":
        return weight.device
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def run_forward(module: nn.Module, batch: Batch, *, vocabulary: bool) -> Any:
    """Run the model on a batch; without ``vocabulary`` the unembedding (half of the cost) is skipped."""
    target: Any = module if vocabulary else getattr(module, str(getattr(module, "base_model_prefix", "")), module)
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
    if _accepts(target.__class__, "position_ids"):
        arguments["position_ids"] = batch.position_ids
    return target(**arguments)
