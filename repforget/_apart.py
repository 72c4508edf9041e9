"""Sealed measurements in processes of their own: started by the loop, they read everything from disk.

Where each process has a core and all fit into memory, the untouched models are measured while the edit is still being
made, and afterwards the edit and its placebo side by side; elsewhere one process measures all arms in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from repforget._session import Session
from repforget._workers import without_launcher
from repforget.errors import RepforgetError
from repforget.progress import track

CONTROLS_ROOM = 3  # this process, the controls, and one more


@dataclass(frozen=True)
class Apart:
    """A running process and the arms it measures."""

    arms: tuple[str, ...]
    process: subprocess.Popen[str]

    def finish(self) -> None:
        """Wait for the process; RepforgetError with its own sentence where it could not measure."""
        said = self.process.communicate()[0].strip()
        if self.process.returncode != 0:
            raise RepforgetError(f"The sealed check of {', '.join(self.arms)} ended with exit code "
                                 f"{self.process.returncode}{': ' + said if said else ''}; run the command again.")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def side_by_side(session: Session) -> bool:
    """Whether several processes may measure at once."""
    return session.model.device.type == "cpu" and (os.cpu_count() or 1) >= 2 and session.room_for(CONTROLS_ROOM)


def controls(session: Session) -> tuple[str, ...]:
    """Arms that do not depend on the edit."""
    return ("original", *(f"twin-{k}" for k in range(len(session.twins))))


def share() -> int:
    """Threads of each process where two share the cores."""
    return max(1, (os.cpu_count() or 1) // 2)


@contextmanager
def one_share(together: bool) -> Iterator[None]:
    """Leave the other processes their cores, always the same number: thread counts change the last bits of sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(share() if together else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start(session: Session, arms: Sequence[str], edit: Path | None) -> Apart:
    """Begin to measure ``arms`` on the sealed split; ``edit`` is the folder of the saved edit, where they need one."""
    threads = share() if side_by_side(session) else os.cpu_count() or 1
    job = {
        "recipe": session.recipe.canonical(), "store": session.store.root.resolve().as_posix(),
        "edit": None if edit is None else edit.resolve().as_posix(), "arms": list(arms), "base": session.base,
    }  # fmt: skip
    # A session of its own: Ctrl-C reaches the run alone, which then stops this process.
    process = subprocess.Popen(
        [sys.executable, "-m", "repforget._sealed"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True, env={**without_launcher(), "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if process.stdin is not None:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        process.stdin = None  # communicate() must not write to it again
    return Apart(tuple(arms), process)


def measure_sealed(session: Session, edit: Path, ahead: Apart | None) -> None:
    """Measure every arm on the sealed split; afterwards all measurements lie in the run folder."""
    groups: tuple[tuple[str, ...], ...] = (("edit",), ("placebo", "shuffled"))
    if ahead is None:
        groups = ((*controls(session), "edit", "placebo", "shuffled"),)
    running = [start(session, group, edit) for group in groups]
    try:
        everyone = ([ahead] if ahead is not None else []) + running
        for apart in track(session.progress, everyone, "sealed check", len(everyone)):
            apart.finish()
    finally:
        for apart in running:
            apart.stop()
