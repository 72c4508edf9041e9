"""The run folder: complete or absent, reused or rebuilt, one process at a time, the same bytes after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repforget import store as module
from repforget.errors import ResourceError, UsageError
from repforget.store import Store, canonical, digest, json_bytes, read_json, result_files, write_atomic, write_json

KEY = {"model": "abc", "settings": {"rank": 2}}


def writes(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "a").mkdir()
        (folder / "a" / "value.txt").write_text(text)

    return build


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if ".tmp-" in path.name)


def test_a_stage_is_built_once_and_reused(tmp_path: Path) -> None:
    calls: list[str] = []
    store = Store(tmp_path / "run")
    first = store.stage("edit", KEY, writes("x", calls))
    assert (first / "a" / "value.txt").read_text() == "x" and store.done("edit", KEY)
    assert store.stage("edit", dict(reversed(KEY.items())), writes("x", calls)) == first
    assert calls == ["x"] and first.name.startswith("edit-") and len(first.name) == len("edit-") + 12


def test_anything_in_the_key_makes_another_stage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    places = {store.place("edit", KEY), store.place("locate", KEY), store.place("edit", {**KEY, "seed": 1}),
              store.place("edit", {**KEY, "settings": {"rank": 3}})}  # fmt: skip
    assert len(places) == 4 and not store.done("edit", KEY)


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest"])
def test_a_damaged_stage_is_noticed_said_and_built_again(tmp_path: Path, damage: str) -> None:
    notes: list[str] = []
    store = Store(tmp_path, note=notes.append)
    folder = store.stage("edit", KEY, writes("x"))
    before = result_files(tmp_path)
    target = folder / "a" / "value.txt"
    if damage == "change":
        target.write_text("y")
    elif damage == "remove":
        target.unlink()
    elif damage == "add":
        (folder / "more").write_text("z")
    else:
        (folder / "stage.json").write_text("{")
    store.stage("edit", KEY, writes("x"))
    assert result_files(tmp_path) == before and len(notes) == 1 and "built again" in notes[0]


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Store(tmp_path).stage("edit", KEY, build)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["fsync", "rename", "build", "safetensors"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object) -> None:
        if fails == "safetensors":
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    build = full if fails in ("build", "safetensors") else writes("x")
    if fails in ("fsync", "rename"):
        monkeypatch.setattr(module.os, fails, full)
    with pytest.raises(ResourceError, match=r"The disk is full while writing .*--out.*kept") as caught:
        Store(tmp_path).stage("edit", KEY, build)
    assert caught.value.exit_code == 1 and list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "f", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and leftovers(tmp_path) == []


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match="cannot be written .*--out"):
            Store(place)

    def refused(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(ResourceError, match=r"'.*run' cannot be written \(Permission denied\)"):
        Store(tmp_path / "run")


def test_a_refused_read_of_another_file_is_not_blamed_on_the_run_folder(tmp_path: Path) -> None:
    def build(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")

    with pytest.raises(PermissionError):
        Store(tmp_path / "deep" / "run").stage("edit", KEY, build)


def test_a_folder_in_use_names_the_process_and_is_free_afterwards(tmp_path: Path) -> None:
    code = ("import sys, time\nfrom pathlib import Path\nfrom repforget.store import Store\n"
            "with Store(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n    time.sleep(60)\n")  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match=f"in use by process {other.pid}"), Store(tmp_path).locked():
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close() if other.stdout else None
    notes: list[str] = []
    (tmp_path / f".edit-000.tmp-{other.pid}").mkdir()
    with Store(tmp_path, note=notes.append).locked():
        assert leftovers(tmp_path) == []
    assert len(notes) == 1 and f"Process {other.pid} ended before" in notes[0]
    with Store(tmp_path, note=notes.append).locked():
        pass
    assert len(notes) == 1  # a run that ended well leaves nothing to take over


RUN = """
import sys, time
from pathlib import Path
from repforget.store import Store, write_json
store = Store(Path(sys.argv[1]))
pause = float(sys.argv[2])
def build(k):
    def inner(folder):
        for part in range(3):
            (folder / f"{part}.txt").write_text(f"{k} {part}")
            time.sleep(pause)
    return inner
with store.locked():
    print("begun", flush=True)
    for k in range(4):
        store.stage("step", {"k": k}, build(k))
    write_json(store.root / "result.json", {"value": 0.1 + 0.2})
"""


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    def command(root: Path, pause: float) -> list[str]:
        return [sys.executable, "-c", RUN, str(root), str(pause)]

    subprocess.run(command(tmp_path / "whole", 0), check=True, capture_output=True)
    for k, wait in enumerate((0.01, 0.13, 0.42)):
        root = tmp_path / f"killed-{k}"
        started = subprocess.Popen(command(root, 0.1), stdout=subprocess.PIPE)
        assert started.stdout is not None
        started.stdout.readline()
        time.sleep(wait)
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        started.stdout.close()
        assert not (root / "result.json").exists()
        subprocess.run(command(root, 0), check=True, capture_output=True)
        assert result_files(root) == result_files(tmp_path / "whole") and len(result_files(root)) == 17
        assert leftovers(root) == []


def test_durations_are_kept_apart_from_the_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.stage("edit", KEY, writes("x"))
    assert list(read_json(tmp_path / "timings.json")) == [store.place("edit", KEY).name]
    assert "timings.json" not in result_files(tmp_path)
    write_json(tmp_path / "timings.json", {})
    assert len(result_files(tmp_path)) == 2


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_canonical_json_reads_back_exactly(value: object) -> None:
    assert json.loads(json_bytes(value)) == value and digest(value) == digest(json.loads(json_bytes(value)))


def test_canonical_data_of_numpy_paths_and_non_finite_numbers() -> None:
    value = {"a": np.float64(0.1), "b": np.arange(2), "c": float("nan"), "d": Path("x/y"), "e": {2, 1},
             3: (np.int64(4), np.bool_(True))}  # fmt: skip
    assert canonical(value) == {"a": 0.1, "b": [0, 1], "c": None, "d": "x/y", "3": [4, True], "e": [1, 2]}
    with pytest.raises(TypeError, match="object cannot be written"):
        canonical({"x": object()})


def test_missing_and_broken_json_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file .*run\.json"):
        read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_bytes(b"{\xff")
    with pytest.raises(UsageError, match="not valid JSON"):
        read_json(tmp_path / "run.json")
