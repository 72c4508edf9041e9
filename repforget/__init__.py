"""repforget: find where a language model keeps a piece of knowledge, edit it away, try to prove that wrong.

    import repforget as rf

    model = rf.load("organism:bios")
    knowledge = rf.knowledge("bios-people")
    where = rf.locate(model, knowledge, "attribution_patching")
    edit = rf.edit(model, knowledge, "null_space_surgery", where=where)
    print(rf.verify(model, edit, knowledge, twins=["organism:bios/twin-0"]).verdict)

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load": "repforget.models.load:load",
    "load_edit": "repforget.artifact:load_edit",
    "run": "repforget.loop:run",
    "plan": "repforget.loop:plan",
    "Site": "repforget.records:Site",
    "Knowledge": "repforget.knowledge:Knowledge",
    "Item": "repforget.knowledge:Item",
    "RepforgetError": "repforget.errors:RepforgetError",
}
_ROOMS = ("knowledge", "locate", "edit", "verify", "organism", "stats", "scoring", "probing", "bench", "report")

__all__ = ["__version__", *_LAZY, "knowledge", "locate", "edit", "verify"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in _ROOMS:
        return importlib.import_module(f"repforget.{name}")
    raise AttributeError(f"module 'repforget' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
