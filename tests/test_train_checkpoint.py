"""Training that was killed, interrupted or refused: the same bytes after resuming, and one sentence otherwise."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import edit_models
import pytest
import torch
from warm import Warm

from repforget.edit._dispatch import edit
from repforget.edit.train import _checkpoint
from repforget.errors import ArtifactError, UsageError
from repforget.models.load import LoadedModel, fingerprint

SETTINGS: dict[str, Any] = {"steps": 12, "check_every": 3, "batch_size": 8, "lr": 1e-3}


class Killed(Exception):
    """Stands for the end of the process."""


def until(last: int, end: type[BaseException]) -> Any:
    """A progress that ends training by an exception before 0-based step ``last``."""

    def progress(items: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
        for item in items:
            if item == last:
                raise end
            yield item

    return progress


def make(model: LoadedModel, folder: Path | None = None, *, data: Any = None, seed: int = 0, progress: Any = None,
         method: str = "npo", **settings: Any) -> Any:  # fmt: skip
    return edit(model, data or edit_models.people(), method, seed=seed, progress=progress, checkpoint=folder,
                **{**SETTINGS, **settings})  # fmt: skip


@pytest.fixture(autouse=True)
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkpoint, "SHARE", 1e9)  # write at every look, however little time lies between


CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "state of a combiner": {"combine": "gru"}, "momentum": {"optimizer": "nesterov"},
    "adapter": {"adapter": "lora", "rank": 2}, "rows drawn anew": {"method": "idk_dpo", "answers": "fresh",
                                                                  "teacher": "live"},
}  # fmt: skip


@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize(("last", "end"), [(8, Killed), (8, KeyboardInterrupt)])
def test_resumed_training_ends_in_the_same_bytes(
    settings: dict[str, Any], last: int, end: type[BaseException], tmp_path: Path
) -> None:
    model, folder = edit_models.model(), tmp_path / "state"
    whole = make(model, **settings)
    with pytest.raises(end):
        make(model, folder, progress=until(last, end), **settings)
    assert fingerprint(model.module) == model.fingerprint
    # Killed, it knows what was written at the last look; Ctrl-C loses no step.
    assert json.loads((folder / "checkpoint.json").read_text())["step"] == (6 if end is Killed else 8)
    seen: list[int] = []
    again = make(model, folder, progress=lambda items, *_: (seen.append(i) or i for i in items), **settings)
    assert seen == list(range(6 if end is Killed else 8, 12))
    assert again.digest == whole.digest and again.manifest == whole.manifest
    assert fingerprint(model.module) == model.fingerprint


@pytest.mark.filterwarnings("ignore:Half-precision weights")
@pytest.mark.parametrize("precision", ["masters", "stochastic", "plain"])
def test_half_precision_resumes_to_the_same_bytes(precision: str, tmp_path: Path) -> None:
    model = edit_models.model()
    model.module.to(torch.bfloat16)
    whole = make(model, precision=precision)
    with pytest.raises(Killed):
        make(model, tmp_path / "state", progress=until(7, Killed), precision=precision)
    assert make(model, tmp_path / "state", precision=precision).digest == whole.digest


def test_an_interrupt_while_the_state_changes_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repforget.training import Stepper

    model, folder, step = edit_models.model(), tmp_path / "state", Stepper.step

    def interrupted(self: Any, index: int, gradients: Any) -> float:
        norm = step(self, index, gradients)
        if index == 7:
            raise KeyboardInterrupt
        return norm

    whole = make(model)
    monkeypatch.setattr(Stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(model, folder)
    monkeypatch.undo()
    assert json.loads((folder / "checkpoint.json").read_text())["step"] == 6
    assert make(model, folder).digest == whole.digest


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """A model, and a checkpoint of its training."""
    model, folder = edit_models.model(), tmp_path_factory.mktemp("stopped") / "state"
    with pytest.raises(KeyboardInterrupt):
        make(model, folder, progress=until(5, KeyboardInterrupt))
    return model, folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 2e-3}, r"\(lr was 0.001 and is 0.002\)"),
        ({"seed": 1}, r"seed was 0 and is 1"),
        ({"beta": 0.2}, r"beta was 0.1 and is 0.2"),
        ({"method": "simnpo"}, r"method was 'npo' and is 'simnpo'"),
        ({"adapter": "lora"}, r"adapter was 'none' and is 'lora'"),
    ],
)
def test_another_training_is_refused_with_what_differs(
    change: dict[str, Any], said: str, stopped: tuple[LoadedModel, Path]
) -> None:
    model, folder = stopped
    with pytest.raises(UsageError, match=said):
        make(model, folder, **change)


def test_other_data_and_another_model_are_refused(stopped: tuple[LoadedModel, Path]) -> None:
    model, folder = stopped
    people = edit_models.people()
    other = type(people).build("fewer", people.forget[:-2], people.retain, general=people.general)
    with pytest.raises(UsageError, match="knowledge was"):
        make(model, folder, data=other)
    with pytest.raises(UsageError, match="model was"):
        make(edit_models.model("gpt2"), folder)


def test_damage_is_one_sentence(stopped: tuple[LoadedModel, Path], tmp_path: Path) -> None:
    model, source = stopped
    state, record = next(source.glob("*.safetensors")), source / "checkpoint.json"
    flipped = bytearray(state.read_bytes())
    flipped[-5] ^= 1
    damages = {"flipped": {state.name: bytes(flipped)}, "cut": {state.name: state.read_bytes()[:-100]},
               "gone": {state.name: None}, "record": {record.name: b"{}"}}  # fmt: skip
    for name, changed in damages.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in (state, record):
            body = changed.get(path.name, path.read_bytes())
            if body is not None:
                (folder / path.name).write_bytes(body)
        with pytest.raises(ArtifactError, match="is damaged: remove the folder"):
            make(model, folder)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a folder of checkpoints"):
        make(model, tmp_path / "strange")


def test_writing_takes_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(_checkpoint, "SHARE", 0.05)
    monkeypatch.setattr(_checkpoint.time, "monotonic", lambda: clock[0])
    checkpoint = _checkpoint.Checkpoint(tmp_path / "state", {})
    checkpoint.write(1, {"x": torch.zeros(1)}, [])
    assert checkpoint.due  # it took no time
    monkeypatch.setattr(_checkpoint, "checksum", lambda path: clock.__setitem__(0, clock[0] + 10.0) or "")
    checkpoint.write(2, {"x": torch.zeros(1)}, [])
    assert not checkpoint.due
    clock[0] += 199.0
    assert not checkpoint.due
    clock[0] += 2.0
    assert checkpoint.due


def test_a_method_without_state_refuses_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keeps no state"):
        edit(edit_models.model(), edit_models.people(), "placebo", checkpoint=tmp_path)


RUN = """
import sys, time
import torch
torch.set_num_threads(1)
import edit_models, test_train_checkpoint
from pathlib import Path
from repforget.edit.train import _checkpoint
_checkpoint.SHARE = 1e9

def slowly(items, description, total):
    for item in items:
        print(item, flush=True)
        time.sleep(float(sys.argv[2]))
        yield item

folder = Path(sys.argv[1])
print(test_train_checkpoint.make(edit_models.model(), folder, progress=slowly).digest)
"""


def start(folder: Path, delay: float) -> Warm:
    return Warm(RUN, (str(folder), str(delay)), {**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_killed_by_the_system_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    killed = start(tmp_path / "state", 0.2)
    record, stop = tmp_path / "state" / "checkpoint.json", time.monotonic() + 120
    while not record.exists() and time.monotonic() < stop:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = start(tmp_path / "state", 0)
    lines = resumed.communicate()[0].split()
    assert resumed.returncode == 0 and int(lines[0]) >= 3
    torch.set_num_threads(1)
    assert lines[-1] == make(edit_models.model()).digest


def test_the_command_keeps_its_state_and_removes_it_at_the_end(cli: Any, tmp_path: Path) -> None:
    from repforget.training import Stepper

    arguments = ("edit", "npo", "--out", "edit", "--resume", "state", "--set", "steps=4", "--set", "check_every=2",
                 "--set", "batch_size=2", "--set", "max_facts=8")  # fmt: skip
    step = Stepper.step

    def interrupted(self: Any, index: int, gradients: Any) -> float:
        if index == 3:
            raise KeyboardInterrupt
        return step(self, index, gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", interrupted)
        code, _, said = cli(*arguments)
    assert code == 130 and "the state of training is kept in 'state'" in said
    assert not (tmp_path / "edit").exists()
    assert json.loads((tmp_path / "state" / "checkpoint.json").read_text())["step"] == 2
    code, out, said = cli(*arguments)
    assert code == 0, said
    assert (tmp_path / "edit" / "edit.json").exists() and not (tmp_path / "state").exists()


def test_an_unfinished_stage_keeps_its_folder_until_it_is_complete(tmp_path: Path) -> None:
    from repforget.store import Store

    store, key = Store(tmp_path / "run"), {"a": 1}

    def build(folder: Path) -> None:
        kept = store.unfinished("edit", key)
        if not kept.exists():
            kept.mkdir()
            (kept / "state").write_text("half")
            raise KeyboardInterrupt
        (folder / "whole").write_text((kept / "state").read_text())

    with pytest.raises(KeyboardInterrupt), store.locked():
        store.stage("edit", key, build)
    with store.locked():
        assert (store.stage("edit", key, build) / "whole").read_text() == "half"
    assert not store.unfinished("edit", key).exists()
    other = store.unfinished("edit", {"a": 2})
    other.mkdir()
    store.discard_unfinished()
    assert not other.exists() and store.done("edit", key)


@pytest.mark.slow
def test_the_loop_goes_on_in_the_middle_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget import loop
    from repforget.recipe import Choice, Recipe
    from repforget.store import Store, result_files
    from repforget.training import Stepper

    settings = {"steps": 6, "check_every": 2, "batch_size": 4, "max_facts": 16}
    ladder = (Choice(name="grad_diff", settings=settings),)
    recipe = Recipe(model="organism:bios", knowledge="bios-people", ladder=ladder)
    session = loop.open_session(recipe, Store(tmp_path / "run"), None, lambda line: None)
    taken: list[int] = []
    step = Stepper.step

    def counted(self: Any, index: int, gradients: Any) -> float:
        taken.append(index)
        if taken == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return step(self, index, gradients)

    monkeypatch.setattr(Stepper, "step", counted)
    for _ in range(2):
        try:
            folder = loop._edit(session, recipe.ladder[0], None)
        except KeyboardInterrupt:
            assert list(session.store.root.glob(".*.unfinished"))
    assert taken == [0, 1, 2, 3, 4, 4, 5]
    assert not list(session.store.root.glob(".*.unfinished"))
    fresh = loop.open_session(recipe, Store(tmp_path / "other"), None, lambda line: None)
    assert result_files(loop._edit(fresh, recipe.ladder[0], None)) == result_files(folder)
