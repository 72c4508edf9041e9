"""Run a locator by name, with its settings checked against its signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repforget.discover import method as find_method
from repforget.errors import RepforgetError
from repforget.knowledge import Knowledge
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def locate(
    model: LoadedModel, knowledge: Knowledge, method: str, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, **settings: Any,
) -> Localization:  # fmt: skip
    """Rank the components of ``model`` by the locator ``method``; unknown names and settings are refused.

    Only the statements that an editor may see are looked at.  Settings are those of the method's signature.
    """
    chosen = find_method("locate", method)
    checked = chosen.settings(settings)
    given: dict[str, Any] = {"twins": tuple(twins), "seed": seed, "progress": progress}
    context = {name: value for name, value in given.items() if name in chosen.context}
    result = chosen.function(model, knowledge, **context, **checked)
    if not isinstance(result, Localization):
        raise RepforgetError(f"Locator '{method}' returned {type(result).__name__}: a locator must return a "
                             "Localization.")
    return result
