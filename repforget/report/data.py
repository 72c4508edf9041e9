"""What a report is made of: records only, so that it can be written again from ``result.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repforget.errors import UsageError
from repforget.records import FORMAT_VERSION, Evidence, Localization, Verdict
from repforget.store import json_bytes, read_json, write_json

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class ReportData:
    """Everything a finished run has to say; no forget text, no time of day and no duration is in it.

    ``edits`` are manifests as plain data, the judged one last; a manifest may carry ``norms`` (site or weight ->
    size of the change relative to the weight). ``rungs`` tells what the loop tried: mappings with ``method``,
    ``settings``, ``split``, ``outcome`` and ``sentence``. ``environment`` holds versions and hashes, among them
    ``knowledge_digest``.
    """

    recipe: Mapping[str, Any]
    verdict: Verdict
    evidence: tuple[Evidence, ...]
    localizations: tuple[Localization, ...] = ()
    edits: tuple[Mapping[str, Any], ...] = ()
    rungs: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION, "recipe": dict(self.recipe), "verdict": self.verdict.to_json(),
            "evidence": [e.to_json() for e in self.evidence],
            "localizations": [loc.to_json() for loc in self.localizations],
            "edits": [dict(e) for e in self.edits], "rungs": [dict(r) for r in self.rungs],
            "environment": dict(self.environment),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReportData:
        return cls(
            data["recipe"], Verdict.from_json(data["verdict"]),
            tuple(Evidence.from_json(e) for e in data["evidence"]),
            tuple(Localization.from_json(loc) for loc in data["localizations"]),
            tuple(data["edits"]), tuple(data["rungs"]), data["environment"],
        )  # fmt: skip


def as_saved(run: ReportData) -> ReportData:
    """The run as ``result.json`` gives it back, so that a report written again has the same bytes."""
    return ReportData.from_json(json.loads(json_bytes(run.to_json())))


def save(folder: Path, run: ReportData) -> Path:
    """Write ``result.json`` atomically and return its path."""
    write_json(folder / RESULT_FILE, run.to_json())
    return folder / RESULT_FILE


def load(folder: Path) -> ReportData:
    """Read the ``result.json`` of a run folder; UsageError when it is missing, damaged or of another format."""
    data = read_json(folder / RESULT_FILE)
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"'{folder / RESULT_FILE}' is not a result of format {FORMAT_VERSION}: run the recipe again.")
    try:
        return ReportData.from_json(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{folder / RESULT_FILE}' is incomplete ({error}): run the recipe again.") from None
