"""From whatever a command raises to one sentence on stderr and an exit code."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import typer

from repforget.errors import RepforgetError

INTERRUPTED = 130
ERROR_FILE = "error.txt"


@dataclass
class State:
    """What the guard must know of the running command: whether to show tracebacks, and where results go.

    ``training`` is the folder in which an interrupted training keeps its state; ``interrupted`` what a command that
    keeps its results elsewhere wants to be said.
    """

    debug: bool = False
    folder: Path | None = None
    training: Path | None = None
    interrupted: str | None = None


def guarded(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    from repforget.cli._app import app

    state = State()
    try:
        code = app(list(arguments), obj=state, standalone_mode=False, prog_name="repforget")
    except click.UsageError as error:
        return _usage(error)
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # a file cut short, which typer takes for Ctrl-D
            return _unexpected(error.__cause__, state)
        return _interrupted(state)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        return _unexpected(error, state)
    if code == INTERRUPTED:  # how typer reports Ctrl-C
        return _interrupted(state)
    return code if isinstance(code, int) else 0


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


def _usage(error: click.UsageError) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        _say(error.format_message())
    else:
        path = error.ctx.command_path if error.ctx else "repforget"
        message = error.format_message()
        _say(f"{message if message.endswith('?') else message.rstrip('.') + '.'} See '{path} --help'.")
    return error.exit_code


def _interrupted(state: State) -> int:
    if state.interrupted is not None:
        _say(state.interrupted)
    elif state.training is not None and state.training.is_dir():
        _say(f"Interrupted: the state of training is kept in '{state.training}'; the same command continues from "
             "there.")  # fmt: skip
    elif state.folder is None:
        _say("Interrupted: nothing was written.")
    else:
        _say(f"Interrupted: every finished stage is kept in '{state.folder}'; the same command continues from there.")
    return INTERRUPTED


def _unexpected(error: Exception, state: State) -> int:
    if state.debug:
        traceback.print_exc()
    return _failed(error, state)


def _failed(error: Exception, state: State) -> int:
    if isinstance(error, RepforgetError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        _say("Out of memory: 'repforget plan' shows what is needed; use a smaller dtype or fewer twins.")
        return 1
    where = _record(state)
    reason = " ".join(str(error).split())
    _say(f"Unexpected {type(error).__name__}{': ' + reason if reason else ''} (the traceback is in '{where}'; "
         "'repforget --debug ...' shows it here).")  # fmt: skip
    return 1


def _record(state: State) -> Path:
    """Write the traceback into the run folder, or where that is impossible into the temporary folder."""
    text = traceback.format_exc()
    for folder in (state.folder, Path(tempfile.gettempdir())):
        if folder is not None and folder.is_dir():
            try:
                (folder / ERROR_FILE).write_text(text, encoding="utf-8")
            except OSError:
                continue
            return folder / ERROR_FILE
    return Path("nowhere: no folder could be written")
