"""The command line: exit codes, sentences, what is printed where, and what is never imported."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import synthetic_run
import typer

from repforget import report
from repforget.cli import docs, main
from repforget.cli._app import app
from repforget.cli._options import located
from repforget.cli._progress import display, plain_progress
from repforget.errors import ControlError, MissingExtraError, ResourceError, SiteError, UsageError
from repforget.recipe import Recipe
from repforget.records import Verdict

Run = Callable[..., tuple[int, str, str]]
HEAVY = {"torch", "transformers", "numpy", "sklearn", "scipy", "datasets", "plotly", "peft", "nnsight",
         "transformer_lens"}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    verdict: Verdict
    folder: Path


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A loop that ends as told: ``outcome`` is a verdict or an exception; ``seen`` is what it was asked."""
    told: dict[str, Any] = {"outcome": synthetic_run.verdict("pass"), "seen": None}

    def run(recipe: Recipe, out: Path, *, progress: Any, echo: Any, show_texts: bool) -> Ended:
        told["seen"] = (recipe, out, show_texts)
        out.mkdir(parents=True, exist_ok=True)
        if isinstance(told["outcome"], BaseException):
            raise told["outcome"]
        list(progress(range(3), "work", 3) if progress else ())
        echo("a line of the loop")
        return Ended(told["outcome"], out)

    monkeypatch.setattr(importlib.import_module("repforget.loop"), "run", run)
    monkeypatch.setattr("repforget.recipe._method_faults", lambda data, check: [])
    return told


@pytest.mark.parametrize("command", [["-m", "repforget.cli", "--help"], ["-c", "import repforget"],
                                     ["-m", "repforget.cli", "run", "--help"]])  # fmt: skip
def test_help_and_import_load_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "repforget" in loaded and not loaded & HEAVY


def test_help_names_every_command_and_exit_code(cli: Run) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for word in ("run", "plan", "locate", "edit", "verify", "report", "methods", "organism"):
        assert word in out
    assert "10 fail" in out and "11 inconclusive" in out


@pytest.mark.parametrize(("outcome", "code"), [("pass", 0), ("fail", 10), ("inconclusive", 11)])
def test_run_ends_with_the_code_of_its_verdict(cli: Run, loop: dict[str, Any], outcome: str, code: int) -> None:
    loop["outcome"] = synthetic_run.verdict(outcome)
    ended, out, err = cli("run", "--out", "here")
    assert ended == code and loop["outcome"].sentence in out and "here/report.html" in out
    assert "a line of the loop" in err and "a line of the loop" not in out
    ended, out, err = cli("run", "--out", "here", "--json")
    assert ended == code and err == ""
    assert json.loads(out)["verdict"]["outcome"] == outcome and json.loads(out)["exit_code"] == code


def test_flags_win_over_the_file_and_the_folder_follows_from_the_recipe(
    cli: Run, loop: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "recipe.yaml").write_text("model: m\nknowledge: k\nladder: [leace]\nseed: 1\n")
    cli("run", "claim/recipe.yaml", "--seed", "7", "--twin", "t", "--level", "quick", "--show-texts")
    recipe, folder, show_texts = loop["seen"]
    assert (recipe.model, recipe.seed, recipe.twins, recipe.verify, show_texts) == ("m", 7, ("t",), "quick", True)
    assert folder == Path("runs") / f"claim-{recipe.digest[:8]}"
    cli("run", "claim/recipe.yaml")
    assert loop["seen"][0].seed == 1 and loop["seen"][1] != folder


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ResourceError("The disk is full."), 1, "The disk is full."),
        (MissingExtraError("Install it with pip install 'repforget[quant]'."), 2, "repforget[quant]"),
        (SiteError("Unknown site kind 'resid_pots': did you mean 'resid_post'?"), 2, "did you mean 'resid_post'"),
        (ControlError("The placebo came out wrong."), 1, "The placebo came out wrong."),
        (KeyboardInterrupt(), 130, "every finished stage is kept in 'here'; the same command continues"),
        (MemoryError(), 1, "Out of memory: 'repforget plan' shows"),
        (KeyError("odd"), 1, "Unexpected KeyError: 'odd' (the traceback is in 'here/error.txt'"),
    ],
)
def test_every_failure_is_one_sentence_on_stderr(
    cli: Run, loop: dict[str, Any], error: BaseException, code: int, words: str
) -> None:
    loop["outcome"] = error
    ended, out, err = cli("run", "--out", "here")
    assert ended == code and out == "" and words in err and len(err.strip().splitlines()) == 1
    assert (Path("here") / "error.txt").exists() == isinstance(error, KeyError)


def test_debug_shows_the_traceback(cli: Run, loop: dict[str, Any]) -> None:
    loop["outcome"] = ZeroDivisionError("x")
    assert "Traceback (most recent call last)" in cli("--debug", "run", "--out", "here")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["run", "--sed", "3"], "Did you mean '--seed'"),
        (["run", "--seed", "-1"], "'--seed': -1 is negative"),
        (["run", "nowhere.yaml"], "There is no recipe 'nowhere.yaml'"),
        (["run", "--device", "toaster"], "The recipe is wrong: device"),
        (["locate", "probe_sweep", "--set", "rank"], "'rank' is not name=value"),
        (["locate", "no_such_method"], "There is no method 'no_such_method' in locate"),
        (["report", "nowhere"], "There is no file 'nowhere/result.json'"),
        (["verify", "edit", "--split", "sealedd"], "There is no split 'sealedd': did you mean 'sealed'"),
        (["methods", "locat"], "There is no stage or method 'locat': did you mean 'locate'"),
        (["edit", "leace"], "Missing option '--out'"),
    ],
)
def test_a_wrong_request_is_a_usage_error(cli: Run, arguments: list[str], words: str) -> None:
    code, out, err = cli(*arguments)
    assert code == 2 and out == "" and words in err and "Traceback" not in err


def test_report_is_written_again_and_shows_no_forget_text(cli: Run, tmp_path: Path) -> None:
    report.write(tmp_path / "done", synthetic_run.run("fail"))
    page = (tmp_path / "done" / "report.html").read_bytes()
    (tmp_path / "done" / "report.html").unlink()
    code, out, _ = cli("report", "done")
    assert code == 0 and (tmp_path / "done" / "report.html").read_bytes() == page
    assert "relearn.held_out_recovery" in out and "27.0 %" in out and "FAIL (sealed split" in out
    for word in ("original", "floor", "placebo", "edit", "rho", "status"):
        assert word in out
    assert json.loads(cli("report", "done", "--json")[1])["report"] == "done/report.html"


def test_a_wrong_control_is_printed_and_no_outcome(cli: Run, tmp_path: Path) -> None:
    report.write(tmp_path / "done", synthetic_run.run("pass", controls_ok=False))
    out = cli("report", "done")[1]
    assert "control placebo: a random edit" in out and "NO VERDICT" in out and "PASS" not in out


def test_methods_are_listed_explained_and_tabled(cli: Run) -> None:
    code, out, _ = cli("methods", "locate")
    assert code == 0 and "random_sites" in out and "must beat" in out
    code, out, _ = cli("methods", "locate", "random_sites")
    assert code == 0 and "What it does not show" in out and "draws" in out and "100" in out
    assert cli("methods", "random_sites") == (0, out, "")
    code, out, _ = cli("methods", "locate", "--markdown")
    assert "| `random_sites` | Rank components at random" in out and "`draws=100`" in out
    listed = json.loads(cli("methods", "locate", "--json")[1])["locate"]
    assert ["draws", "int", "100"] in next(m["settings"] for m in listed if m["name"] == "random_sites")


def test_schema_is_printed_as_json(cli: Run) -> None:
    code, out, _ = cli("plan", "--schema")
    assert code == 0 and json.loads(out)["required"] == ["model", "knowledge"]


def test_plain_progress_yields_everything_and_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("repforget.cli._progress.time.monotonic", lambda: float(next(clock)))
    assert list(plain_progress(range(5), "fit", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines() == ["fit: 1 of 5, about 48 s left", "fit: 3 of 5, about 16 s left"]


def test_display_is_silent_with_json_and_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with display(True) as (progress, echo):
        echo("hidden")
        assert progress is None
    with display(False) as (progress, echo):
        echo("said")
        assert progress is plain_progress
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "said\n"


def test_bars_pass_items_through_and_end_with_an_abandoned_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with display(False) as (progress, echo):
        assert progress is not None
        echo("[not markup]")
        outer = progress(range(3), "outer [x]", 3)
        assert next(outer) == 0 and list(progress("ab", "inner", None)) == ["a", "b"]
        outer.close()  # type: ignore[attr-defined]


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bogus"])
    assert ended.value.code == 2 and "No such command" in capsys.readouterr().err


def test_generated_blocks_are_filled_and_stay_the_same(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a\n<!-- generated: help -->\nold\n<!-- end generated -->\nb\n")
    assert docs.stale(tmp_path) == [tmp_path / "README.md"]
    new = docs.regenerated((tmp_path / "README.md").read_text())
    assert "`repforget verify`" in new and "\nold\n" not in new and new.startswith("a\n") and new.endswith("b\n")
    assert docs.regenerated(new) == new
    with pytest.raises(SystemExit, match="no generated block 'nothing'"):
        docs.regenerated("<!-- generated: nothing -->\n<!-- end generated -->")


def test_the_documents_of_this_repository_are_up_to_date() -> None:
    assert docs.stale(Path(__file__).parents[1]) == []


def _commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not hasattr(group, "commands"):
        return [(path, group)]
    return [found for name, command in group.commands.items() for found in _commands(command, (*path, name))]


def test_help_explains_every_argument_and_option(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 2000)
    commands = _commands(typer.main.get_command(app))
    assert len(commands) > 30
    for path, command in commands:
        shown = " ".join(cli(*path, "--help")[1].split())
        for parameter in command.params:
            told = " ".join((parameter.help or "").split())
            assert told and told in shown, f"{' '.join(path)} does not explain '{parameter.name}'"


@pytest.mark.parametrize("content", ["[]", "{}", '{"band": {}}', '{"method": "eap", "band": 3}'])
def test_another_file_is_no_localization(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UsageError, match="other.json' holds no localization"):
        located(tmp_path / "other.json")
