"""Put an edit in place for the time of a ``with`` block, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from repforget.artifact.operations import SiteOperation, Untie
from repforget.artifact.runtime import Pass, follow, needs_pass, needs_prompt, site_functions
from repforget.artifact.weights import changes_by_owner, new_values, swap, untie
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel

if TYPE_CHECKING:
    from repforget.artifact.edit import Edit


def hook_operations(module: nn.Module, operations: Sequence[SiteOperation], stack: ExitStack) -> None:
    """Register the hooks of site operations; closing ``stack`` removes them."""
    if not operations:
        return
    state = Pass()
    if needs_pass(operations):
        stop: Callable[[], None] = follow(module, state, prompts=needs_prompt(operations))
        stack.callback(stop)
    stack.enter_context(hooks(module, site_functions(operations, state)))


@dataclass(eq=False)
class _Attachment:
    """One edit in place on one module; closing ``stack`` takes it off."""

    edit: Edit
    stack: ExitStack


_ATTACHED: WeakKeyDictionary[nn.Module, list[_Attachment]] = WeakKeyDictionary()


def _put(edit: Edit, module: nn.Module) -> ExitStack:
    with ExitStack() as stack:
        if any(isinstance(op, Untie) for op in edit.weight_operations):
            stack.callback(untie(module))
        for new in new_values(module, changes_by_owner(module, edit.weight_operations)):
            stack.callback(swap(new))
        hook_operations(module, edit.site_operations, stack)
        return stack.pop_all()


@contextmanager
def attach(edit: Edit, model: LoadedModel, *, check: bool) -> Iterator[LoadedModel]:
    """Yield ``model`` with ``edit`` in place; see :meth:`repforget.artifact.Edit.attach`."""
    if check:
        edit.check_base(model)
    held = _ATTACHED.setdefault(model.module, [])
    entry = _Attachment(edit, _put(edit, model.module))
    held.append(entry)
    try:
        yield model
    finally:
        held.remove(entry)
        entry.stack.close()


@contextmanager
def detached(model: LoadedModel) -> Iterator[LoadedModel]:
    """Take every attached edit off while inside, so that the untouched model is at hand, and put it back afterwards."""
    held = list(_ATTACHED.get(model.module, ()))
    for entry in reversed(held):
        entry.stack.close()
    try:
        yield model
    finally:
        for entry in held:
            entry.stack = _put(entry.edit, model.module)
