"""One file is one method: found by itself, configured by its signature."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from repforget import discover
from repforget.errors import RecipeError, RepforgetError, UnknownNameError


@pytest.fixture
def dummy_method(monkeypatch: pytest.MonkeyPatch) -> discover.Method:
    from typing import Literal

    def dummy(model: object, data: object, *, seed: int = 0, strength: float = 1.0,
              mode: Literal["soft", "hard"] = "soft") -> None:  # fmt: skip
        """Do nothing.

        Longer text.
        """

    dummy.__annotations__ = {"strength": float, "mode": Literal["soft", "hard"], "seed": int}
    return discover.Method("dummy", "edit", "erase", dummy)


def test_signature_is_the_configuration(dummy_method: discover.Method) -> None:
    assert dummy_method.summary == "Do nothing."
    assert set(dummy_method.hyperparameters) == {"strength", "mode"}
    assert dummy_method.context == {"seed"}
    assert dummy_method.settings({"strength": 2}) == {"strength": 2.0, "mode": "soft"}


def test_wrong_settings_name_the_nearest_and_the_fault(dummy_method: discover.Method) -> None:
    with pytest.raises(RecipeError, match="has no setting 'strenght': did you mean 'strength'"):
        dummy_method.settings({"strenght": 1})
    with pytest.raises(RecipeError, match="mode: Input should be 'soft' or 'hard'"):
        dummy_method.settings({"mode": "loud"})


@pytest.mark.parametrize("room", list(discover.ROOMS))
def test_every_method_file_defines_its_function_with_a_documented_source(room: str) -> None:
    found = discover.methods(room)
    assert found, f"no method in {room}"
    for method in found:
        assert len(method.summary) > 20, method.name
        assert method.function.__name__ == method.name


def test_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'leace'"):
        discover.method("edit", "laece")


def test_a_dropped_in_file_is_found_and_one_without_its_function_is_named(
    tmp_path: Path,
) -> None:
    room = importlib.import_module("repforget.edit")
    room.__path__.append(str(tmp_path))
    (tmp_path / "dropped_in_editor.py").write_text(
        'def dropped_in_editor(model, data, *, strength: float = 1.0):\n    """Do nothing at all."""\n'
    )
    (tmp_path / "stray_file.py").write_text("x = 1\n")
    try:
        assert {"dropped_in_editor", "stray_file"} <= set(discover.names("edit"))
        assert discover.method("edit", "dropped_in_editor").settings({}) == {"strength": 1.0}
        with pytest.raises(RepforgetError, match="does not define a function 'stray_file'"):
            discover.method("edit", "stray_file")
    finally:
        room.__path__.remove(str(tmp_path))
