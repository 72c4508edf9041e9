"""The loop: plan -> locate -> (edit -> screen on dev -> gate) per rung -> sealed check of the saved artifact.

Every stage is content-addressed in the run folder, so the command is the resume. The sealed check runs in a fresh
process that loads the saved edit from disk; nothing of the editing process reaches it but the files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repforget._apart import Apart, controls, measure_sealed, one_share, side_by_side, start
from repforget._session import Echo, Plan, Session, open_session, plan
from repforget._workers import ask
from repforget.discover import method
from repforget.errors import KnowledgeError, NoEffectError, NumericalError, SiteError
from repforget.progress import Progress, track
from repforget.recipe import Choice, Recipe
from repforget.records import Evidence, Localization, Verdict
from repforget.store import Store, digest, read_json, write_json

__all__ = ["Plan", "RunResult", "plan", "run"]

GATE_LOOKS = 5  # spec: at most five looks at the gate, each at half the level of the one before
REPRESENTATION_FAMILIES = ("erase", "steer")
DOES_NOT_FIT = (KnowledgeError, SiteError, NumericalError, NoEffectError)  # what another editor may not mind
Refused = tuple[Choice, str]
RANK = {"pass": 2, "inconclusive": 1, "fail": 0}


@dataclass(frozen=True)
class Rung:
    """One editor tried: its saved edit, and what the judge said on dev (and on the gate, if it got there)."""

    choice: Choice
    folder: Path
    verdicts: tuple[Verdict, ...]

    @property
    def merit(self) -> tuple[int, int, float]:
        """Order of rungs when none passes: looks survived, outcome of the last, worst share left or lost."""
        last = self.verdicts[-1]
        faults = [c.rho for c in last.claims if c.status in ("pass", "fail", "inconclusive")]
        return len(self.verdicts), RANK[last.outcome], -max(faults, default=1.0)


@dataclass(frozen=True)
class RunResult:
    """What a run ends with; the report lies in ``folder``."""

    verdict: Verdict
    folder: Path
    rungs: tuple[Rung, ...]


def run(
    recipe: Recipe, out: str | Path, *, progress: Progress | None = None, echo: Echo = lambda line: None,
    show_texts: bool = False,
) -> RunResult:  # fmt: skip
    """Run a recipe in the folder ``out`` and return the sealed verdict; the same call resumes a killed run.

    Raises RepforgetError subclasses only. Cost: see :func:`plan`.
    """
    started = time.monotonic()
    store = Store(Path(out), note=echo)
    with store.locked():
        session = open_session(recipe, store, progress, echo)
        together = side_by_side(session)
        ahead = start(session, controls(session), None) if together else None
        try:
            with one_share(together):
                found = [_locate(session, choice) for choice in track(progress, recipe.locate, "locate")]
                rungs, refused = _ladder(session, found, started)
            chosen = max(rungs, key=lambda rung: rung.merit)
            verdict, evidence = _sealed(session, chosen, ahead)
        finally:
            if ahead is not None:
                ahead.stop()
        _write_report(session, chosen, rungs, refused, found, verdict, evidence, show_texts)
        store.discard_unfinished()
    return RunResult(verdict, Path(out), tuple(rungs))


def _ladder(session: Session, found: list[Localization], started: float) -> tuple[list[Rung], list[Refused]]:
    """Climb rung by rung until one passes the gate or the minutes of the recipe are used up.

    An editor that does not fit this model or probe is said and left out; an error where none fits.
    """
    limits, rungs, refused = session.recipe.limits, list[Rung](), list[Refused]()
    for choice in session.recipe.ladder:
        if rungs and time.monotonic() - started > 60 * limits.minutes:
            session.echo(f"The {limits.minutes:g} minutes of the recipe are used up; '{choice.name}' and what follows "
                         "it are not tried.")  # fmt: skip
            break
        try:
            folder = _edit(session, choice, _where_for(choice, found))
        except DOES_NOT_FIT as error:
            if not rungs and choice is session.recipe.ladder[-1]:
                raise
            session.echo(f"edit {choice.name} was not made: {error}")
            refused.append((choice, str(error)))
            continue
        rungs.append(_climb(session, choice, folder, looks=_gate_looks(rungs)))
        if _passed_gate(rungs[-1]):
            break
    return rungs, refused


def _passed_gate(rung: Rung) -> bool:
    return len(rung.verdicts) == 2 and rung.verdicts[-1].outcome == "pass"


def _gate_looks(rungs: list[Rung]) -> int:
    return sum(len(rung.verdicts) == 2 for rung in rungs)


def _locate(session: Session, choice: Choice) -> Localization:
    def build(folder: Path) -> None:
        from repforget.locate._dispatch import locate

        where = locate(session.model, session.knowledge, choice.name, twins=session.twins, seed=session.recipe.seed,
                       progress=session.progress, **choice.settings)  # fmt: skip
        write_json(folder / "localization.json", where.to_json())

    key = session.key(method=choice.name, settings=choice.settings)
    stage = session.store.stage(f"locate-{choice.name}", key, build)
    where = Localization.from_json(read_json(stage / "localization.json"))
    sign = "beats" if where.band.beats_random else "does not beat"
    session.echo(f"locate {choice.name}: best {', '.join(map(str, where.components[:3]))}; {sign} random selections "
                 f"({where.band.top:.3g} against at most {where.band.high:.3g})")  # fmt: skip
    return where


def _where_for(choice: Choice, found: list[Localization]) -> Localization | None:
    """The localisation an editor acts on: the last of the recipe that beats its random band, else none.

    Editors of representations are given what a classifier can read there, if the recipe asks for it; editors of
    weights what patching shows to be used.
    """
    trusted = [where for where in found if where.band.beats_random]
    reads = method("edit", choice.name).family in REPRESENTATION_FAMILIES
    fitting = [where for where in trusted if (where.method == "probe_sweep") == reads]
    return next(reversed(fitting or trusted), None)


def _climb(session: Session, choice: Choice, folder: Path, looks: int) -> Rung:
    """Screen one edit on dev, and let it through to the gate unless the screen found knowledge left."""
    from repforget.verify.statistics import spend_alpha

    level = session.recipe.verify
    screen = session.judge(folder, "dev", "quick" if isinstance(level, str) else level)
    session.echo(f"edit {choice.name}, screened on dev: {screen.outcome}. {screen.sentence}")
    if screen.outcome == "fail" or looks >= GATE_LOOKS:
        return Rung(choice, folder, (screen,))
    gate = session.judge(folder, "gate", level, alpha=spend_alpha(looks + 1))
    session.echo(f"edit {choice.name}, at the gate: {gate.outcome}. {gate.sentence}")
    return Rung(choice, folder, (screen, gate))


def _edit(session: Session, choice: Choice, where: Localization | None) -> Path:
    name = f"edit-{choice.name}"
    key = session.key(method=choice.name, settings=choice.settings,
                      where=None if where is None else digest(where.to_json()))  # fmt: skip
    resumes = "checkpoint" in method("edit", choice.name).context

    def build(folder: Path) -> None:
        from repforget.edit._dispatch import edit

        data, seed = session.knowledge.for_editor(), session.recipe.seed
        kept = session.store.unfinished(name, key) if resumes else None
        ask(session.model, data, choice.name, choice.settings, where=where, seed=seed, checkpoint=kept)
        made = edit(session.model, data, choice.name, where=where, seed=seed, progress=session.progress,
                    checkpoint=kept, **choice.settings)  # fmt: skip
        made.save(folder / "edit")

    return session.store.stage(name, key, build) / "edit"


def _sealed(session: Session, rung: Rung, ahead: Apart | None) -> tuple[Verdict, tuple[Evidence, ...]]:
    """Judge the saved artifact on the sealed split, measured by processes that know nothing but the files."""
    session.echo(f"sealed check of '{rung.choice.name}': reloading the saved edit in a fresh process")

    def build(folder: Path) -> None:
        measure_sealed(session, rung.folder, ahead)
        evidence = session.measure(rung.folder, "sealed", session.recipe.verify)
        write_json(folder / "evidence.json", [e.to_json() for e in evidence])
        write_json(folder / "verdict.json", session.verdict(rung.folder, evidence, "sealed").to_json())

    wanted = session.recipe.canonical()["verify"]
    stage = session.store.stage("sealed", session.key(edit=_edit_digest(rung.folder), verify=wanted), build)
    evidence = tuple(Evidence.from_json(e) for e in read_json(stage / "evidence.json"))
    return Verdict.from_json(read_json(stage / "verdict.json")), evidence


def _edit_digest(folder: Path) -> str:
    from repforget.store import checksum

    return digest({path.name: checksum(path) for path in sorted(folder.iterdir())})


def _write_report(
    session: Session, chosen: Rung, rungs: list[Rung], refused: list[Refused], found: list[Localization],
    verdict: Verdict, evidence: tuple[Evidence, ...], show_texts: bool,
) -> None:  # fmt: skip
    from repforget import report
    from repforget.report.data import ReportData

    tried = [{"method": rung.choice.name, "settings": dict(rung.choice.settings), "split": look.split,
              "outcome": look.outcome, "sentence": look.sentence}
             for rung in rungs for look in rung.verdicts]  # fmt: skip
    tried += [{"method": choice.name, "settings": dict(choice.settings), "split": "", "outcome": "not made",
               "sentence": sentence} for choice, sentence in refused]  # fmt: skip
    edits = [_manifest(session, rung.folder) for rung in sorted(rungs, key=lambda rung: rung is chosen)]
    data = ReportData(
        recipe=session.recipe.canonical(), verdict=verdict, evidence=evidence, localizations=tuple(found),
        edits=tuple(edits), rungs=tuple(tried), environment=session.environment,
    )  # fmt: skip
    report.write(session.store.root, data, show_texts=show_texts)
    write_json(session.store.root / "verdict.json", verdict.to_json())


def _manifest(session: Session, folder: Path) -> Mapping[str, Any]:
    """The manifest of a saved edit, with the size of the change (relative to the weight, absolute at a site) and what
    rounding leaves of every changed weight."""
    from repforget.artifact import load_edit, size, target

    edit = load_edit(folder)
    weights = dict(session.model.module.named_parameters(remove_duplicate=False))
    norms: dict[str, float] = {}
    for operation in edit.operations:
        name = target(operation)
        whole = float(weights[name].detach().float().norm()) if name in weights else 1.0
        norms[name] = (norms.get(name, 0.0) ** 2 + (size(operation) / whole) ** 2) ** 0.5
    undo = edit.fold(session.model)
    undo()
    return {**asdict(edit.manifest), "norms": norms, "rounding": undo.parity.cosines}
