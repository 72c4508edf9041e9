"""Rooms that can be called: ``rf.locate(model, ...)`` although ``repforget.locate`` is a package.

Importing a submodule binds its name on the parent package, so a function of the same name would be hidden by
the first import. Python allows a module to carry a class of its own; this one forwards calls.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that forwards calls to the function named by ``__call_target__`` ("module:function")."""

    __call_target__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _, function = self.__call_target__.partition(":")
        return getattr(importlib.import_module(module), function)(*args, **kwargs)


def make_callable(name: str, target: str) -> None:
    """Let the module ``name`` be called as ``target`` ("module:function", imported at the first call)."""
    module = sys.modules[name]
    module.__class__ = CallableModule
    module.__dict__["__call_target__"] = target
