"""The loop: plan -> locate -> (edit -> screen on dev -> gate) per rung -> sealed check of the saved artifact.

Every stage is content-addressed in the run folder, so the command is the resume. The sealed check runs in a fresh
process that loads the saved edit from disk; nothing of the editing process reaches it but the files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repforget._session import Echo, Plan, Session, open_session, plan
from repforget.errors import RepforgetError
from repforget.progress import Progress, track
from repforget.recipe import Choice, Recipe
from repforget.records import Evidence, Localization, Verdict
from repforget.store import Store, digest, read_json, write_json

__all__ = ["Plan", "RunResult", "plan", "run"]

GATE_LOOKS = 5  # spec: at most five looks at the gate, each at half the level of the one before
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
        found = [_locate(session, choice) for choice in track(progress, recipe.locate, "locate")]
        rungs: list[Rung] = []
        for choice in recipe.ladder:
            if rungs and time.monotonic() - started > 60 * recipe.limits.minutes:
                echo(f"The {recipe.limits.minutes:g} minutes of the recipe are used up; '{choice.name}' and what "
                     "follows it are not tried.")  # fmt: skip
                break
            rungs.append(_climb(session, choice, _where_for(choice, found), looks=_gate_looks(rungs)))
            if _passed_gate(rungs[-1]):
                break
        chosen = max(rungs, key=lambda rung: rung.merit)
        verdict, evidence = _sealed(session, chosen)
        _write_report(session, chosen, rungs, found, verdict, evidence, show_texts)
    return RunResult(verdict, Path(out), tuple(rungs))


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
    """The localisation an editor acts on: the last of the recipe that beats its random band, else none."""
    return next((where for where in reversed(found) if where.band.beats_random), None)


def _climb(session: Session, choice: Choice, where: Localization | None, looks: int) -> Rung:
    """Make one edit, screen it on dev, and let it through to the gate unless the screen found knowledge left."""
    folder = _edit(session, choice, where)
    level = session.recipe.verify
    screen = session.judge(folder, "dev", "quick" if isinstance(level, str) else level)
    session.echo(f"edit {choice.name}, screened on dev: {screen.outcome}. {screen.sentence}")
    if screen.outcome == "fail" or looks >= GATE_LOOKS:
        return Rung(choice, folder, (screen,))
    gate = session.judge(folder, "gate", level)
    session.echo(f"edit {choice.name}, at the gate: {gate.outcome}. {gate.sentence}")
    return Rung(choice, folder, (screen, gate))


def _edit(session: Session, choice: Choice, where: Localization | None) -> Path:
    def build(folder: Path) -> None:
        from repforget.edit._dispatch import edit

        made = edit(session.model, session.knowledge, choice.name, where=where, seed=session.recipe.seed,
                    progress=session.progress, **choice.settings)  # fmt: skip
        made.save(folder / "edit")

    key = session.key(method=choice.name, settings=choice.settings,
                      where=None if where is None else digest(where.to_json()))  # fmt: skip
    return session.store.stage(f"edit-{choice.name}", key, build) / "edit"


def _sealed(session: Session, rung: Rung) -> tuple[Verdict, tuple[Evidence, ...]]:
    """Judge the saved artifact on the sealed split, measured by processes that know nothing but the files."""
    session.echo(f"sealed check of '{rung.choice.name}': reloading the saved edit in a fresh process")
    twins = [f"twin-{k}" for k in range(len(session.twins))]
    groups = [["original", *twins], ["edit", "placebo"]]
    if not _side_by_side(session):
        groups = [[arm for group in groups for arm in group]]

    def build(folder: Path) -> None:
        _measure_apart(session, rung, groups, folder)
        evidence = session.measure(rung.folder, "sealed", session.recipe.verify)
        write_json(folder / "evidence.json", [e.to_json() for e in evidence])
        write_json(folder / "verdict.json", session.verdict(rung.folder, evidence, "sealed").to_json())

    wanted = session.recipe.canonical()["verify"]
    key = session.key(edit=_edit_digest(rung.folder), verify=wanted, processes=len(groups))
    stage = session.store.stage("sealed", key, build)
    evidence = tuple(Evidence.from_json(e) for e in read_json(stage / "evidence.json"))
    return Verdict.from_json(read_json(stage / "verdict.json")), evidence


def _side_by_side(session: Session) -> bool:
    """Two processes at once where each has a core of its own and both fit into memory."""
    return session.model.device.type == "cpu" and (os.cpu_count() or 1) >= 2 and session.room_for(2)


def _measure_apart(session: Session, rung: Rung, groups: list[list[str]], folder: Path) -> None:
    threads = str(max(1, (os.cpu_count() or 1) // len(groups)))
    running = []
    for number, arms in enumerate(groups):
        job = folder / f"job-{number}.json"
        write_json(job, {"recipe": session.recipe.canonical(), "store": session.store.root.resolve().as_posix(),
                         "edit": rung.folder.resolve().as_posix(), "arms": arms, "base": session.base})  # fmt: skip
        # A session of its own: Ctrl-C reaches this process alone, which then ends the others.
        running.append(subprocess.Popen([sys.executable, "-m", "repforget._sealed", str(job)], text=True,
                                        stdout=subprocess.PIPE, start_new_session=True,
                                        env={**os.environ, "OMP_NUM_THREADS": threads}))  # fmt: skip
    try:
        for process in track(session.progress, running, "sealed check", len(running)):
            said = process.communicate()[0].strip()
            if process.returncode != 0:
                raise RepforgetError(f"The sealed check of '{rung.choice.name}' ended with exit code "
                                     f"{process.returncode}{': ' + said if said else ''}; run the command again.")
    finally:
        for process in running:
            process.kill()
            process.wait()
    for job in folder.glob("job-*.json"):
        job.unlink()


def _edit_digest(folder: Path) -> str:
    from repforget.store import checksum

    return digest({path.name: checksum(path) for path in sorted(folder.iterdir())})


def _write_report(
    session: Session, chosen: Rung, rungs: list[Rung], found: list[Localization], verdict: Verdict,
    evidence: tuple[Evidence, ...], show_texts: bool,
) -> None:  # fmt: skip
    from repforget import report
    from repforget.report.data import ReportData

    tried = [{"method": rung.choice.name, "settings": dict(rung.choice.settings), "split": look.split,
              "outcome": look.outcome, "sentence": look.sentence}
             for rung in rungs for look in rung.verdicts]  # fmt: skip
    edits = [_manifest(session, rung.folder) for rung in sorted(rungs, key=lambda rung: rung is chosen)]
    data = ReportData(
        recipe=session.recipe.canonical(), verdict=verdict, evidence=evidence, localizations=tuple(found),
        edits=tuple(edits), rungs=tuple(tried), environment=session.environment,
    )  # fmt: skip
    report.write(session.store.root, data, show_texts=show_texts)
    write_json(session.store.root / "verdict.json", verdict.to_json())


def _manifest(session: Session, folder: Path) -> Mapping[str, Any]:
    """The manifest of a saved edit, with the size of the change: relative to the weight, absolute at a site."""
    from repforget.artifact import load_edit, size, target

    edit = load_edit(folder)
    weights = dict(session.model.module.named_parameters(remove_duplicate=False))
    norms: dict[str, float] = {}
    for operation in edit.operations:
        name = target(operation)
        whole = float(weights[name].detach().float().norm()) if name in weights else 1.0
        norms[name] = (norms.get(name, 0.0) ** 2 + (size(operation) / whole) ** 2) ** 0.5
    return {**asdict(edit.manifest), "norms": norms}
