"""The tiny probe and models of the editors' contract, for other tests of editors."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from repforget.knowledge import EditData, Knowledge
from repforget.models.load import LoadedModel


@cache
def _contract() -> Any:
    path = Path(__file__).parent / "contract" / "test_editors.py"
    spec = importlib.util.spec_from_file_location("editors_contract", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["editors_contract"] = module
    spec.loader.exec_module(module)
    return module


def tiny_data() -> EditData:
    return _contract().data()  # type: ignore[no-any-return]


def tiny_knowledge() -> Knowledge:
    return _contract().knowledge()  # type: ignore[no-any-return]


def tiny_model(architecture: str) -> LoadedModel:
    return _contract().tiny(architecture)  # type: ignore[no-any-return]


def people(prefix: str, surnames: range) -> list[Any]:
    """Items about eight people per surname."""
    return _contract()._items(prefix, surnames)  # type: ignore[no-any-return]


def made(name: str, model: LoadedModel) -> Any:
    """The edit of an editor with the contract's small settings."""
    return _contract().make(name, model)
