"""Clients that lie, stammer and shout; servers and requests that are killed half-way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from repforget.artifact import load_edit
from repforget.errors import UsageError
from repforget.federated.clients import Client, Worker, answer, local_settings
from repforget.federated.faults import unusual
from repforget.federated.history import History
from repforget.federated.leave import leave
from repforget.federated.messages import (
    Introduction,
    Local,
    Reply,
    Task,
    named,
    pack_reply,
    pack_task,
    shown,
    unpack_reply,
)
from repforget.federated.records import Update
from repforget.federated.run import Setup, finish, simulate
from repforget.federated.server import Plan, federate
from repforget.federated.simulate import Here, read_reply
from repforget.federated.sources import Source
from repforget.models.load import LoadedModel, wrap
from repforget.training import Record

NAMES = ("ann", "bob", "cid")
LOCAL: dict[str, Any] = {"rank": 2, "lr": 0.01, "batch_size": 4, "weights": ("down_proj",)}


def records(name: str) -> list[Record]:
    words, shift = tiny_models.WORDS, NAMES.index(name) * 7
    return [Record(f"{name}-{i}", name, f"{words[shift + i]} was born in", f" {words[shift + i + 3]}")
            for i in range(3)]  # fmt: skip


@pytest.fixture
def base() -> LoadedModel:
    return wrap(tiny_models.build("llama"), tiny_models.tiny_tokenizer(), "tiny")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Source]:
    (tmp_path / "data").mkdir()
    for name in NAMES:
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(json.dumps(vars(r)) for r in records(name)))
    return {name: Source(path=str(tmp_path / "data" / f"{name}.jsonl")).marked() for name in NAMES}


@dataclasses.dataclass
class Liar:
    """A client that says something else than it should."""

    worker: Worker
    told: Introduction | None = None
    reply: Callable[[Reply], Reply] = lambda reply: reply

    @property
    def name(self) -> str:
        return self.worker.name

    def introduce(self) -> Introduction:
        return self.told or self.worker.introduce()

    def work(self, task: Task) -> Reply:
        return self.reply(self.worker.work(task))


def trained(base: LoadedModel, folder: Path, liar: Liar | None, rounds: int = 1) -> tuple[dict[str, Any], list[str]]:
    """Two honest clients and perhaps a liar; the state at the end and what was said."""
    workers: dict[str, Worker] = {name: Client.of(name, base, records(name)) for name in NAMES[:2]}
    if liar is not None:
        told = liar.introduce().client
        workers[told if isinstance(told, str) else "cid"] = liar
    said: list[str] = []
    plan = Plan("tiny", local_settings(base, **LOCAL), rounds)
    return federate(Here(workers), plan, base, folder, note=said.append), said


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("change", "words"), [
    ({"client": ["a"]}, "'<list>' has a name that is not"), ({"client": "\ud800"}, r"'\ud800' has a name that is not"),
    ({"client": "\x1b[31m"}, r"'\x1b[31m' has a name"), ({"client": ""}, "has a name"), ({"client": "a" * 101}, "name"),
    ({"records": "many"}, "whole number"), ({"records": 2.5}, "whole number"), ({"records": True}, "whole number"),
    ({"records": 0}, "no records"), ({"records": 10**18}, "more than 1000000 records"),
    ({"base": None}, "which model"), ({"tokenizer": 3}, "which model"), ({"base": "\x1b" * 99}, r"weights \x1b"),
])  # fmt: skip
def test_a_bad_introduction_is_refused_and_the_others_train(
    change: dict[str, Any], words: str, base: LoadedModel, tmp_path: Path
) -> None:
    liar = Client.of("cid", base, records("cid"))
    state, said = trained(base, tmp_path / "run", Liar(liar, dataclasses.replace(liar.introduce(), **change)))
    alone, _ = trained(base, tmp_path / "alone", None)
    assert same(state, alone)
    assert len(said) == 1 and words in said[0] and said[0].isprintable()
    assert list(json.loads((tmp_path / "run" / "report.json").read_text())["clients"]) == ["ann", "bob"]


def grown(by: float) -> Callable[[Reply], Reply]:
    def change(reply: Reply) -> Reply:
        assert reply.update is not None
        tensors = {n: t * np.float32(by) if n.endswith(".left") else t for n, t in reply.update.tensors.items()}
        return dataclasses.replace(reply, update=dataclasses.replace(reply.update, tensors=tensors))

    return change


@pytest.mark.parametrize(("reply", "words"), [
    (grown(1e8), "a change of length"), (lambda r: dataclasses.replace(r, seconds=float("nan")), "cannot be read"),
    (lambda r: dataclasses.replace(r, seconds=-1.0), "cannot be read"),
    (lambda r: dataclasses.replace(r, loss=float("inf")), "cannot be read"),
    (lambda r: dataclasses.replace(r, update=None, failed="\x1b]0;title\x07" + "x" * 999), r"\x1b]0;title"),
    (lambda r: dataclasses.replace(r, client="ann"), "answered as 'ann'"),
    (lambda r: dataclasses.replace(r, client="nobody"), "answered as 'nobody'"),
])  # fmt: skip
def test_a_bad_reply_is_left_out_by_name(
    reply: Callable[[Reply], Reply], words: str, base: LoadedModel, tmp_path: Path
) -> None:
    state, said = trained(base, tmp_path / "run", Liar(Client.of("cid", base, records("cid")), reply=reply))
    alone, _ = trained(base, tmp_path / "alone", None)
    assert same(state, alone)
    assert len(said) == 1 and "client 'cid'" in said[0] and words in said[0]
    assert said[0].isprintable() and len(said[0]) < 400
    body = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(body["rounds"][0]["failed"]) == ["cid"] and all(v is not None for v in body["totals"].values())


@pytest.mark.parametrize("head", [
    "[" * 200_000, "3", "{}", "null", '{"client": "cid", "round": 1e999, "seconds": 0, "failed": ""}',
    '{"client": "cid", "round": 1.5, "seconds": 0, "failed": ""}', "1" * 9999,
    '{"client": "cid", "round": 1, "seconds": 1e999, "failed": "x"}',
    '{"client": "cid", "round": 1, "seconds": 0, "loss": 0, "records": 2.5}',
    '{"client": "cid", "round": 1, "seconds": 0, "loss": 0, "records": 0}',
])  # fmt: skip
def test_a_reply_of_any_bytes_is_one_failure(head: str) -> None:
    with pytest.raises(UsageError, match=r"^sent a reply that cannot be read"):
        unpack_reply((head, b""))
    assert read_reply("cid", 1, (head, b""), 7).client == "cid"


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "I64", "XX"])
def test_tensors_of_any_type_are_one_failure_or_an_update_that_is_refused(dtype: str) -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [1], "data_offsets": [0, 8 if dtype == "I64" else 2]}}).encode()
    body = len(header).to_bytes(8, "little") + header + b"\0" * (8 if dtype == "I64" else 2)
    good = pack_reply(Reply("cid", 1, Update("cid", 1, {}), 0.0, 0.0))[0]
    assert read_reply("cid", 1, (good, body), 0).client == "cid"


def test_what_a_stranger_says_is_one_line_that_prints() -> None:
    assert shown("a\nb\x1b[2J\u202e\ud800") == r"a b\x1b[2J\u202e\ud800"
    assert shown("x" * 999, 10) == "x" * 10 and shown([[]]) == "<list>" and shown("Zoë 李") == "Zoë 李"


def test_what_is_far_from_the_others_is_told_and_used() -> None:
    def of(client: str, count: int, size: float) -> Update:
        return Update(client, count, {"w": np.full((2, 2), size, np.float32)})

    usual = [of("ann", 3, 1.0), of("bob", 4, 1.0)]
    assert unusual([*usual, of("cid", 300, 50.0)]) == {}
    assert list(unusual([*usual, of("cid", 400, 1.0)])) == ["cid"]
    assert "117 times as long as the median of the others" in unusual([*usual, of("cid", 5, 117.0)])["cid"]
    assert unusual([of("ann", 1, 1.0), of("bob", 999, 999.0)]) == {}  # of two nobody knows who is right


def test_an_unusual_client_is_in_the_report_and_in_the_state(base: LoadedModel, tmp_path: Path) -> None:
    honest, said = trained(base, tmp_path / "a", Liar(Client.of("cid", base, records("cid"))))
    assert said == []
    client = Client.of("cid", base, records("cid"))

    def counts(reply: Reply) -> Reply:
        return dataclasses.replace(reply, update=dataclasses.replace(reply.update, records=999))  # type: ignore[type-var]

    liar = Liar(client, dataclasses.replace(client.introduce(), records=999), counts)
    state, said = trained(base, tmp_path / "b", liar)
    assert len(said) == 1 and "client 'cid' counts 333 times as many records" in said[0]
    assert said[0].endswith("used all the same")
    row = json.loads((tmp_path / "b" / "report.json").read_text())["rounds"][0]
    assert list(row["unusual"]) == ["cid"] and not row["failed"] and not same(state, honest)



def run_of(base: LoadedModel, data: Mapping[str, Source], folder: Path, rounds: int = 2) -> Path:
    simulate(base, Plan("tiny", Local(**LOCAL), rounds), data, folder, engine="here")
    return folder


def naming(word: str, folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and (word.encode() in p.read_bytes() or word in p.name)]


class Killed(BaseException):
    """As if the process ended here."""


def kill(*_: Any, **__: Any) -> Any:
    raise Killed


@pytest.mark.parametrize("where", ["before", "erasing", "erased", "report"])
def test_a_client_goes_whole_wherever_its_leaving_was_killed(
    where: str, base: LoadedModel, data: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_of(base, data, tmp_path / "run"), tmp_path / "out"
    erase = History.erase

    def after(self: History, client: str) -> int:
        erase(self, client)
        raise Killed

    with monkeypatch.context() as patch:
        if where == "before":
            patch.setattr(History, "erase", kill)
        elif where == "erasing":
            patch.setattr(History, "_erase", kill)
        elif where == "erased":
            patch.setattr(History, "erase", after)
        else:
            patch.setattr("repforget.federated.leave._without", kill)
        with pytest.raises(Killed):
            leave(base, run, "bob", "rollback", out)
    assert Setup.read(run).has_left("bob")
    with pytest.raises(UsageError, match="A client was forgotten"):
        run_of(base, data, run, 3)
    first = load_edit(out / "edit").digest
    for _ in range(2):  # and once more when all is done
        assert leave(base, run, "bob", "rollback", out).digest == first
        assert naming("bob", run) == naming("bob", out) == []
        assert History.open(run / "history").clients() == {"ann": 2, "cid": 2}
    assert len(Setup.read(run).left) == 1
    with pytest.raises(UsageError, match="'bob' was already forgotten"):
        leave(base, run, "bob", "rollback", tmp_path / "other")
    body = json.loads((run / "report.json").read_text())
    assert body["totals"]["client_seconds"] == pytest.approx(sum(t["seconds"] for r in body["rounds"]
                                                                 for t in r["took_part"]))  # fmt: skip


def test_a_folder_with_another_result_is_refused_and_stays(
    base: LoadedModel, data: dict[str, Source], tmp_path: Path
) -> None:
    run, out = run_of(base, data, tmp_path / "run"), tmp_path / "out"
    leave(base, run, "bob", "retrain", out, keep_record=True)
    for client, method in (("cid", "retrain"), ("bob", "rollback")):
        with pytest.raises(UsageError, match="holds something other"):
            leave(base, run, client, method, out)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds something other"):
        leave(base, run_of(base, data, tmp_path / "twin"), "bob", "retrain", out)
    assert History.open(out / "history").clients() == {"ann": 2, "cid": 2}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something other"):
        leave(base, run, "cid", "rollback", tmp_path / "mine")
    with pytest.raises(UsageError, match="cannot go into the folder of the training"):
        leave(base, run, "cid", "rollback", run)
    assert History.open(run / "history").clients() == {"ann": 2, "bob": 2, "cid": 2}


def test_a_request_that_could_not_be_answered_may_be_asked_otherwise(
    base: LoadedModel, data: dict[str, Source], tmp_path: Path
) -> None:
    run = run_of(base, data, tmp_path / "run")
    dataclasses.replace(Setup.read(run), sources={}).write(run)
    with pytest.raises(UsageError, match="use rollback"):
        leave(base, run, "bob", "retrain", tmp_path / "out")
    leave(base, run, "bob", "rollback", tmp_path / "out")
    assert naming("bob", run) == []


@pytest.mark.parametrize("method", ["retrain", "federaser", "client"])
def test_a_killed_request_does_no_training_twice_and_comes_to_the_same(
    method: Any, base: LoadedModel, data: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(base, data, tmp_path / "run")
    whole = leave(base, run, "bob", method, tmp_path / "whole", keep_record=True, editor="grad_ascent")
    trained: list[tuple[str, int]] = []
    work = Client.work

    def counted(self: Client, task: Task) -> Reply:
        trained.append((self.name, task.round))
        return work(self, task)

    def dies(self: Client, task: Task) -> Reply:
        return kill() if len(trained) == 1 else counted(self, task)

    monkeypatch.setattr(Client, "work", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Client, "work", dies)
        with pytest.raises(Killed):
            leave(base, run, "bob", method, tmp_path / "parts", keep_record=True, editor="grad_ascent")
    parts = leave(base, run, "bob", method, tmp_path / "parts", keep_record=True, editor="grad_ascent")
    assert parts.digest == whole.digest
    cost = [json.loads((tmp_path / name / "forget.json").read_text()) for name in ("whole", "parts")]
    assert len(trained) == len(set(trained)) == cost[0]["trainings"] + (method == "client") > 1  # and one unlearns
    assert cost[0]["up"] == pytest.approx(cost[1]["up"], abs=99)  # seconds are not written with equally many digits
    assert cost[0]["trainings"] == cost[1]["trainings"] and not (tmp_path / "parts" / "again").exists()
    if method == "retrain":
        one, two = (History.open(tmp_path / name / "history") for name in ("whole", "parts"))
        assert all(same(a.before, b.before) for a, b in zip(one, two, strict=True))


def test_a_server_killed_between_its_report_and_its_history_goes_on(
    base: LoadedModel, data: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k, place in enumerate((History, finish)):
        run = tmp_path / str(k)
        with monkeypatch.context() as patch:
            if place is History:
                patch.setattr(History, "append", kill)
            else:
                patch.setattr("repforget.federated.run.finish", kill)
            with pytest.raises(Killed):
                run_of(base, data, run, 1)
        run_of(base, data, run, 1)
        body = json.loads((run / "report.json").read_text())
        assert [row["round"] for row in body["rounds"]] == [1] and body["totals"]["up"] > 0


@pytest.mark.parametrize("change", [
    {"head": "no JSON"}, {"head": "[]"}, {"kind": "dance"}, {"kind": ["train"]}, {"kind": None}, {"round": "x"},
    {"local": {"speed": 1}}, {"local": {"weights": ["no.such.weight"]}}, {"words": None, "kind": "unlearn"},
    {"state": b"short"}, {"state": np.zeros((2, 3), np.float32)},
])  # fmt: skip
def test_a_task_of_another_release_is_answered_by_one_sentence(base: LoadedModel, change: dict[str, Any]) -> None:
    local = local_settings(base, rank=1)
    head, tensors = pack_task(Task(3, local))
    body = {**json.loads(head), **{name: value for name, value in change.items() if name not in ("head", "state")}}
    if (state := change.get("state")) is not None:
        tensors = state if isinstance(state, bytes) else pack_task(Task(3, local, {local.weights[0]: state}))[1]
    asked = change.get("head", json.dumps(body)), tensors
    back = unpack_reply(answer(Client.of("ann", base, [Record("a", "a", "Ada was born in", " Rome")]), asked))
    assert back.failed is not None and back.failed.startswith("failed: ") and "\n" not in back.failed
    assert "of one release" in back.failed or "same release" in back.failed
    assert isinstance(named(asked), str)


def test_what_was_trained_again_can_be_asked_for_again_from_anywhere(
    base: LoadedModel, data: dict[str, Source], tmp_path: Path, cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base.module.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    run, small = tmp_path / "run", ("--rank", "2", "--lr", "0.01", "--rounds", "1", "--engine", "here")
    train = ("federated", "simulate", "--model", "model", "--data", str(tmp_path / "data"), *small)
    monkeypatch.chdir(tmp_path)
    assert cli(*train, "--out", str(run))[0] == 0
    relative = (run / "run.json").read_text().replace(str(tmp_path / "model"), "model")
    assert relative.count('"model"') == 2
    (run / "run.json").write_text(relative)  # as it was written once
    assert cli(*train, "--out", str(run))[0] == 0
    monkeypatch.chdir(tmp_path / "data")
    forget = ("federated", "forget", str(run), "bob", "--out", str(tmp_path / "out"), "--json")
    first, second = cli(*forget), cli(*forget)
    assert first[0] == second[0] == 0 and json.loads(first[1]) == json.loads(second[1])
    assert json.loads(first[1])["client"] == "bob"
    (tmp_path / "data" / "bob.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*train, "--out", str(tmp_path / "out"))
    assert code == 0 and "0.0 MB to the clients" in out, err
