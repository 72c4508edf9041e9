# ruff: noqa: F811 (the fixture is imported by its name)
"""Distillation after a rollback: what it moves and what not, the texts it may see, resume, commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from scipy.special import log_softmax
from test_federated_run import data, go, model_of, plan, records, saved  # noqa: F401

from repforget.errors import NumericalError, UsageError
from repforget.federated.clients import changed, local_settings, own_layout, untouched
from repforget.federated.distil import Distillation, distilled, general_texts
from repforget.federated.forget import Weights, rollback
from repforget.federated.history import History
from repforget.federated.leave import leave
from repforget.federated.messages import Local
from repforget.federated.run import Setup, ready
from repforget.federated.sources import Source, of_probe
from repforget.guarantee import unearned
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel, fingerprint
from repforget.training import collate

HOW = Distillation(40, lr=4e-3, batch_size=8, temperature=2.0)


def texts(seed: int, count: int) -> tuple[str, ...]:
    draw = np.random.default_rng(seed)
    return tuple(" ".join(draw.choice(tiny_models.WORDS, draw.integers(4, 8))) for _ in range(count))


def some(model: LoadedModel, local: Local, seed: int, size: float = 0.05) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: (size * draw.standard_normal(value.shape)).astype(np.float32)
            for name, value in untouched(model, local).items()}  # fmt: skip


def apart(
    model: LoadedModel, local: Local, teacher: Weights, student: Weights, held: Sequence[str], heat: float = 1.0
) -> float:
    """KL per token in float64, one text at a time, by another library."""
    said: list[list[np.ndarray]] = []
    for state in (teacher, student):
        with changed(model.module, local, state), torch.no_grad():
            ids = [torch.tensor([model.tokenizer(text)["input_ids"]]) for text in held]
            said.append([log_softmax(model.module(i).logits[0, :-1].double().numpy() / heat, -1) for i in ids])
    each = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(*said, strict=True)]
    return float(np.concatenate(each).mean())


@pytest.mark.parametrize(("architecture", "rank"), [("gpt2", 2), ("llama", 0)])
def test_the_student_comes_nearer_to_its_teacher_on_texts_it_never_saw(architecture: str, rank: int) -> None:
    model = model_of(architecture)
    local = local_settings(model, rank=rank, weights=("mlp",))
    before, flags = fingerprint(model.module), [p.requires_grad for p in model.module.parameters()]
    teacher = some(model, local, 0)
    student = {name: value + some(model, local, 1)[name] for name, value in teacher.items()}
    seen, held = texts(2, 64), texts(3, 16)
    found = distilled(model, local, student, teacher, seen, HOW)
    start, end = (apart(model, local, teacher, w, held) for w in (student, found.weights))
    assert end < 0.5 * start
    assert fingerprint(model.module) == before and flags == [p.requires_grad for p in model.module.parameters()]
    assert found.weights.keys() == student.keys() and found.steps == HOW.steps and found.seconds > 0
    for name, value in found.weights.items():
        assert value.dtype == np.float32 and value.shape == student[name].shape
        assert not np.array_equal(value, student[name])
    whole = apart(model, local, teacher, student, seen), apart(model, local, teacher, found.weights, seen)
    assert f"{whole[0]:.3g} nats" in found.notes[0] and f"and {whole[1]:.3g} after" in found.notes[0]
    assert f"{len(seen)} general texts" in found.notes[0] and not unearned(found.notes[0])


def test_the_loss_is_the_softened_divergence_times_the_square_of_the_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen, found = model_of(), texts(2, 8), list[float]()
    local = local_settings(model, rank=0, weights=("down_proj",))
    student, teacher = some(model, local, 0), some(model, local, 1, 0.5)

    def fake(module: Any, stream: Any, *, loss: Any, **_: Any) -> None:
        found.append(float(loss(module, collate(next(iter(stream)), "cpu")).detach()))

    monkeypatch.setattr("repforget.federated.distil.finetune", fake)
    distilled(model, local, student, teacher, seen, Distillation(1, batch_size=len(seen), temperature=3.0))
    assert found == pytest.approx([9 * apart(model, local, teacher, student, seen, 3.0)], rel=1e-4)


def test_seed_and_temperature_decide_and_a_teacher_of_itself_moves_nothing() -> None:
    model = model_of()
    local = local_settings(model, rank=0, weights=("down_proj",))
    teacher, student, few = some(model, local, 0), some(model, local, 1), dataclasses.replace(HOW, steps=3)

    def end(how: Distillation, source: Weights = teacher) -> bytes:
        found = distilled(model, local, student, source, texts(2, 20), how).weights
        return b"".join(found[name].tobytes() for name in sorted(found))

    first = end(few)
    assert end(few) == first
    for other in ({"seed": 1}, {"temperature": 1.0}, {"lr": 1e-3}, {"batch_size": 4}):
        assert end(dataclasses.replace(few, **other)) != first
    assert end(few, student) == b"".join(student[name].tobytes() for name in sorted(student))
    broken = {name: value * np.float32(np.nan) for name, value in teacher.items()}
    with pytest.raises(NumericalError, match="lower"):
        end(few, broken)
    for wrong in ({"steps": 0}, {"temperature": 0.0}, {"lr": -1.0}, {"lr": float("nan")}):
        with pytest.raises(UsageError, match="Distillation was given"):
            dataclasses.replace(few, **wrong)


def test_texts_are_nobodys_and_never_the_judges() -> None:
    dealt = of_probe("bios-people", 8)
    probe = load_knowledge("bios-people")
    found, notes = general_texts(dealt, "client-0")
    assert found == probe.for_editor().general and not notes
    assert set(found) < set(probe.general)  # the judge keeps its own
    elsewhere = {**dealt, "client-0": dataclasses.replace(dealt["client-0"], sha256="0")}
    assert "were not searched" in general_texts(elsewhere, "client-0")[1][0]


def test_texts_that_hold_a_record_of_the_client_are_refused(data: dict[str, Source], tmp_path: Path) -> None:
    own = records("bob")[2]
    said = f"They said: {own.prompt.upper()}  {own.answer.strip()} ."
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in said)
    for text in (said, wide, said.replace(" ", "\n"), f"{own.prompt}{own.answer.strip()}"):
        file = written(tmp_path, "The fox  sleeps.", text)
        with pytest.raises(UsageError, match="hold the record 'bob-2' of client 'bob'"):
            general_texts(data, "bob", file)
    assert general_texts(data, "ann", file)[0][0] == "The fox  sleeps."
    assert "were not searched" in general_texts({}, "bob", file)[1][0]
    with pytest.raises(UsageError, match="give --texts FILE, or --no-distil"):
        general_texts(data, "bob")
    with pytest.raises(UsageError, match="holds no record"):
        general_texts(data, "bob", written(tmp_path))


def written(folder: Path, *lines: str) -> str:
    body = "\n".join(json.dumps({"id": str(i), "text": line}) for i, line in enumerate(lines))
    (folder / "texts.jsonl").write_text(body)
    return str(folder / "texts.jsonl")


def test_a_killed_request_distils_once_and_the_edit_is_what_was_distilled(
    data: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, said = model_of(), tmp_path / "run", list[str]()
    how = dataclasses.replace(HOW, steps=4, texts=written(tmp_path, *texts(5, 12)))
    go(base, plan(1, rank=1), data, run)  # of so low a rank that an edit without distillation is cut into factors
    bare = leave(base, run, "bob", "rollback", tmp_path / "bare", keep_record=True)
    with monkeypatch.context() as patched:
        patched.setattr("repforget.federated.leave.edit_of", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            leave(base, run, "bob", "rollback", tmp_path / "out", distil=how, keep_record=True)
    with monkeypatch.context() as patched:
        patched.setattr("repforget.federated.distil.finetune", lambda *a, **k: pytest.fail("distilled twice"))
        made = leave(base, run, "bob", "rollback", tmp_path / "out", distil=how, keep_record=True, note=said.append)
    history, local = History.open(run / "history"), ready(base, Setup.read(run).plan).local
    wanted = distil_again(base, history, local, how)
    after = made.applied_to(base).module
    for name, delta in own_layout(base.module, local, wanted).items():
        value = base.module.get_parameter(name) + delta
        torch.testing.assert_close(after.get_parameter(name), value, rtol=0, atol=1e-6)
    assert {op.kind for op in bare.operations} != {op.kind for op in made.operations}
    cost = json.loads((tmp_path / "out" / "forget.json").read_text())
    assert cost["distil_steps"] == 4 and cost["distil_cpu_seconds"] > 0 and cost["trainings"] == cost["up"] == 0
    assert any("that model still knows the client" in line for line in said) and not unearned(" ".join(said))
    with pytest.raises(UsageError, match="holds something other"):  # another distillation is another request
        leave(base, run, "bob", "rollback", tmp_path / "out", distil=dataclasses.replace(how, steps=5))
    with pytest.raises(UsageError, match="Only rollback distils"):
        leave(base, run, "bob", "retrain", tmp_path / "other", distil=how)


def distil_again(base: LoadedModel, history: History, local: Local, how: Distillation) -> Weights:
    lines = Path(how.texts).read_text().splitlines()
    seen = [json.loads(line)["text"] for line in lines]
    return rollback(history, "bob", distil=lambda s, t: distilled(base, local, s, t, seen, how)).weights


def test_the_command_distils_unless_told_not_to(
    data: dict[str, Source], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    run, file = tmp_path / "run", written(tmp_path, *texts(5, 12))
    base = model_of()
    go(base, dataclasses.replace(plan(1, rank=1), model=str(saved(tmp_path / "model"))), data, run)

    def forget(out: str, *more: str) -> Any:
        return cli("federated", "forget", str(run), "bob", "--out", str(tmp_path / out), "--method",
                   "rollback", "--keep-record", *more)  # fmt: skip

    code, _, err = forget("a")
    assert code == 2 and "--no-distil" in err and not (tmp_path / "a" / "forget.json").exists()
    code, out, _ = forget("b", "--texts", file, "--distil-steps", "2", "--json")
    assert code == 0 and json.loads(out)["distil_steps"] == 2
    code, out, _ = forget("c", "--no-distil", "--json")
    assert code == 0 and json.loads(out)["distil_steps"] == 0 and "were not distilled" in json.loads(out)["notes"][0]
