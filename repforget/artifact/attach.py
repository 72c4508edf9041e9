"""Put an edit in place for the time of a ``with`` block, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

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


@contextmanager
def attach(edit: Edit, model: LoadedModel, *, check: bool) -> Iterator[LoadedModel]:
    """Yield ``model`` with ``edit`` in place; see :meth:`repforget.artifact.Edit.attach`."""
    if check:
        edit.check_base(model)
    module = model.module
    with ExitStack() as stack:
        if any(isinstance(op, Untie) for op in edit.weight_operations):
            stack.callback(untie(module))
        for new in new_values(module, changes_by_owner(module, edit.weight_operations)):
            stack.callback(swap(new))
        hook_operations(module, edit.site_operations, stack)
        yield model
