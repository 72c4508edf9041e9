"""Two launched processes: the sums of one, through errors and interruptions."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import edit_models
import pytest
from torch import Tensor, nn
from warm import Warm

from repforget._workers import without_launcher
from repforget.artifact import load_edit
from repforget.artifact.files import arrays
from repforget.edit._dispatch import edit
from repforget.edit.train._processes import Processes
from repforget.errors import UsageError
from repforget.models.load import load

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {"steps": 3, "check_every": 2, "batch_size": 5, "lr": 1e-3, "optimizer": "sgd", "warmup": 0}
# What could go wrong when rows are shared out: uneven parts, parts without rows, sums per sequence and per token,
# two gradients, terms without rows, a teacher, other answers, hidden states, adapters, wrappers.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("grad_diff", {}),
    "sequences in parts": ("npo", {"retain": "kl", "accumulate": 3, "retain_batch": 1}),
    "two gradients": ("simnpo", {"combine": "pcgrad"}),
    "whole": ("grad_diff", {"retain": "l2", "retain_weight": 10.0}),
    "other answers": ("idk_dpo", {"answers": "fresh", "teacher": "live"}),
    "hidden states": ("rmu", {"layers": [1]}),
    "adapter": ("npo", {"adapter": "lora", "rank": 2}),
    "wrapper": ("npo", {"robust": {"sam": {"rho": 0.01}}}),
}
SCRIPT = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
import edit_models, test_train_processes
from pathlib import Path
from repforget._workers import ask, together
from repforget.edit._dispatch import edit
from repforget.models.load import fingerprint, load
from repforget.records import Localization
from repforget.training import Stepper

folder, cases, event = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
step = Stepper.step

def eventful(self, index, gradients):
    if "error" in event and index == 2 and os.environ["RANK"] == "0":
        raise OSError("a disk is gone")
    if "measure" in event and index == 2:
        print(test_train_processes.held(), flush=True)
    if "wait" in event:
        print(index, flush=True)
        time.sleep(0.3)
    return step(self, index, gradients)

Stepper.step = eventful
with together() as first:
    if not first:
        print("served", flush=True)
        sys.exit(0)
    model, data = load(str(folder / "model"), device="cpu"), edit_models.people().for_editor()
    for name, (method, settings) in cases.items():
        kept = folder / "state" if "wait" in event else None
        where = None if (given := settings.pop("where", None)) is None else Localization.from_json(given)
        ask(model, data, method, settings, where=where, seed=0, checkpoint=kept)
        try:
            edit(model, data, method, where=where, checkpoint=kept, **settings).save(folder / name)
        except KeyboardInterrupt:
            sys.exit(130)
        assert fingerprint(model.module) == model.fingerprint, name
"""


def held() -> int:
    """Bytes of all tensors that are alive."""
    found = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in found)}.values())


def launch(folder: Path, cases: dict[str, Any], event: str = "", **env: str) -> tuple[Warm, Warm]:
    """Both processes, as a launcher would start them; with hash seeds of their own, so that orders of sets differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    common = {**without_launcher(), "PYTHONPATH": path, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **env}  # fmt: skip
    arguments = (str(folder), json.dumps(cases), event)
    first, second = ({**common, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(2))
    return Warm(SCRIPT, arguments, first), Warm(SCRIPT, arguments, second, server=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that several processes can load."""
    path, model = tmp_path_factory.mktemp("shared"), edit_models.model()
    model.module.save_pretrained(path / "model")
    model.tokenizer.save_pretrained(path / "model")
    return path


@pytest.mark.slow
def test_two_processes_train_what_one_does(folder: Path) -> None:
    cases = {name: (method, {**SMALL, **settings}) for name, (method, settings) in CASES.items()}
    both = launch(folder, cases)
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[1][0].split() == ["served"]
    model, data = load(str(folder / "model"), device="cpu"), edit_models.people().for_editor()
    for name, (method, settings) in cases.items():
        one, two = edit(model, data, method, **settings), load_edit(folder / name)
        expected, found = arrays(one.operations), arrays(two.operations)
        assert expected.keys() == found.keys(), name
        for key, value in expected.items():
            room = 1e-5 * float(value.abs().max()) + 2e-8  # and the grid of float32 weights below 0.2
            assert float((found[key] - value).abs().max()) <= room, f"{name}, {key}"


@pytest.mark.slow
def test_an_error_in_the_first_process_ends_both(folder: Path) -> None:
    both = launch(folder, {"error": ("npo", SMALL)}, "error")
    said = [process.communicate(timeout=120) for process in both]
    assert both[0].returncode == 1 and "a disk is gone" in said[0][1]
    assert both[1].returncode == 0, said[1]


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_ends_both(folder: Path) -> None:
    both = launch(folder, {"wait": ("npo", {**SMALL, "lr": 1e-6, "steps": 500})}, "wait")
    while both[0].stdout.readline().strip() != "3":
        assert both[0].poll() is None, both[0].communicate()
        time.sleep(0.02)
    for process in both:  # as a terminal does
        process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    both[0].send_signal(signal.SIGINT)  # and the launcher once more
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [130, 0], said
    assert json.loads((folder / "state" / "checkpoint.json").read_text())["step"] >= 2


def test_each_row_has_one_process() -> None:
    rows = list(range(7))
    parts = [Processes(rank, 3).share(rows) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == rows
    assert Processes(2, 3).share(rows[:2]) == []


@pytest.mark.parametrize("name, said", [
    ("ACCELERATE_USE_DEEPSPEED", "asked for DeepSpeed, .* --use_fsdp"), ("ACCELERATE_USE_FSDP", "--fsdp_version 2"),
    ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"), ("FSDP_ACTIVATION_CHECKPOINTING", "checkpointing: true"),
])  # fmt: skip
def test_what_a_launcher_may_not_ask_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    for switch in {name, *(["ACCELERATE_USE_FSDP"] if name.startswith("FSDP") else [])}:
        monkeypatch.setenv(switch, "true")
    with pytest.raises(UsageError, match=said):
        edit(edit_models.model(), edit_models.people(), "npo", **SMALL)


def test_a_process_of_its_own_knows_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("REMAINS", "1")
    found = without_launcher()
    assert found["REMAINS"] == "1"
    assert not [name for name in found if name.startswith(("WORLD", "RANK", "ACCELERATE", "TORCHELASTIC"))]
