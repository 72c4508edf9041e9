"""The loop as a user meets it: killed and resumed to the same bytes, interrupted with a sentence, refused early."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
from warm import Warm

from repforget import loop
from repforget.cli._guard import guarded
from repforget.errors import ResourceError
from repforget.recipe import Recipe, load_recipe
from repforget.report import load as load_report
from repforget.store import result_files

RECIPE = """
model: organism:bios
knowledge: bios-people
twins: [organism:bios/twin-0]
locate: [{random_sites: {draws: 20}}]
ladder:
  - {mean_direction: {sites: [resid_post.2]}}
verify:
  - {behaviour: {forms: 1, max_items: 24, samples: 1}}
  - {collateral: {forms: 1, max_items: 24, max_texts: 8}}
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def _command(recipe: Path, out: Path) -> tuple[str, ...]:
    return "run", str(recipe), "--out", str(out)


def _start(recipe: Path, out: Path) -> Warm:
    # Its hash seed is another one than that of the finished run: an order of sets would be seen in the bytes.
    code = "import sys; from repforget.cli._guard import guarded; sys.exit(guarded(sys.argv[1:]))"
    return Warm(code, _command(recipe, out), {**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert guarded(_command(recipe_file, out)) in (0, 10, 11)
    assert "report.html" in said.getvalue()
    return out


def _stages(out: Path) -> set[str]:
    found = out.glob("*/stage.json") if out.exists() else ()
    return {path.parent.name for path in found if not path.parent.name.startswith(".")}


def _kill_after(recipe: Path, out: Path, new_stages: int, with_signal: signal.Signals) -> tuple[int, str]:
    """Start the run, and send the signal as soon as it has finished ``new_stages`` further stages."""
    before = len(_stages(out))
    process = _start(recipe, out)
    while process.poll() is None and len(_stages(out)) < before + new_stages:
        time.sleep(0.02)
    process.send_signal(with_signal)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode, stderr


@pytest.mark.slow
def test_killed_anywhere_and_resumed_ends_in_the_same_bytes(recipe_file: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for stages in (1, 2, 3):  # three kills, each at another place, each in the folder the last one left
        code, _ = _kill_after(recipe_file, out, stages, signal.SIGKILL)
        if code != -signal.SIGKILL:
            break
    assert len(_stages(out)) >= 3
    process = _start(recipe_file, out)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode in (0, 10, 11), stderr
    assert result_files(out) == result_files(finished)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, stderr = _kill_after(recipe_file, out, 1, signal.SIGINT)
    assert code == 130
    assert "every finished stage is kept" in stderr and "Traceback" not in stderr
    assert _stages(out)
    assert not [p for p in out.iterdir() if ".tmp-" in p.name], "something half-written stayed"


@pytest.mark.slow
def test_the_result_names_what_was_tried_and_hides_the_forget_texts(finished: Path) -> None:
    data = load_report(finished)
    assert [rung["method"] for rung in data.rungs] == ["mean_direction"] * len(data.rungs)
    verdict = json.loads((finished / "verdict.json").read_text())
    assert verdict["split"] == "sealed" and verdict["outcome"] in ("pass", "fail", "inconclusive")
    assert {"original", "placebo", "edit", "twin-0"} <= set(data.evidence[0].arms)
    page = (finished / "report.html").read_text() + (finished / "report.md").read_text()
    for line in Path("probes/bios-people/forget.jsonl").read_text().splitlines()[::40]:
        assert json.loads(line)["subject"] not in page


def test_plan_counts_without_loading_a_weight_and_memory_is_refused_before_loading(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_loading(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("repforget.models.load.load", no_loading)
    recipe = load_recipe(recipe_file)
    planned = loop.plan(recipe)
    assert planned.fits and planned.parameters > 1_000_000
    assert [step.stage for step in planned.steps] == ["load", "knowledge", "locate", "edit", "sealed"]
    small = Recipe.default(limits={"memory": 0.001})
    with pytest.raises(ResourceError, match="smaller dtype, fewer twins"):
        loop.run(small, tmp_path / "run")
    assert not _stages(tmp_path / "run")


def test_an_editor_that_does_not_fit_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from repforget.errors import KnowledgeError, UsageError

    said: list[str] = []
    errors: dict[str, Exception] = {"lunar": KnowledgeError("No name can be made up.")}

    def edit(session: object, choice: object, where: object) -> Path:
        if choice.name in errors:  # type: ignore[attr-defined]
            raise errors[choice.name]  # type: ignore[attr-defined]
        return tmp_path / choice.name  # type: ignore[attr-defined]

    climb = lambda session, choice, folder, looks: loop.Rung(choice, folder, ())  # noqa: E731
    monkeypatch.setattr(loop, "_edit", edit)
    monkeypatch.setattr(loop, "_climb", climb)
    recipe = Recipe.default().changed(ladder=["lunar", "leace"])
    session = SimpleNamespace(recipe=recipe, echo=said.append)
    rungs, refused = loop._ladder(session, [], 0.0)  # type: ignore[arg-type]
    assert [rung.choice.name for rung in rungs] == ["leace"]
    assert [(choice.name, text) for choice, text in refused] == [("lunar", "No name can be made up.")]
    assert said == ["edit lunar was not made: No name can be made up."]
    errors["leace"] = KnowledgeError("Nothing fits.")
    with pytest.raises(KnowledgeError, match="Nothing fits"):
        loop._ladder(session, [], 0.0)  # type: ignore[arg-type]
    errors["lunar"] = UsageError("A setting is wrong.")  # the user's own fault: no other editor is tried
    with pytest.raises(UsageError, match="A setting is wrong"):
        loop._ladder(session, [], 0.0)  # type: ignore[arg-type]
