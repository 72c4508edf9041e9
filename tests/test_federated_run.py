"""A federation that runs in this process: equality with central training, rounds, faults, resume, leaving."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch.nn import functional

from repforget.artifact import load_edit
from repforget.errors import NumericalError, ResourceError, UsageError
from repforget.federated.clients import Client, changed, local_settings, own_layout, shapes_of, untouched, weights_norm
from repforget.federated.faults import TIMES, Fault, admitted, fault_of, length_of
from repforget.federated.history import History
from repforget.federated.leave import leave
from repforget.federated.messages import Introduction, Local, Reply, Task, pack_reply, unpack_reply
from repforget.federated.records import Update
from repforget.federated.run import operations_of, simulate
from repforget.federated.server import Plan
from repforget.federated.sources import Source, of_folder, of_probe
from repforget.guarantee import Guarantee, unearned
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.training import Example, Record

NAMES = ("ann", "bob", "cid")
SIZES = {"ann": 3, "bob": 5, "cid": 4}
LOCAL = {"rank": 2, "alpha": 4.0, "lr": 0.01, "batch_size": 2}


def records(name: str) -> list[Record]:
    words = tiny_models.WORDS
    shift = NAMES.index(name) * 7
    return [Record(f"{name}-{i}", f"{name}-{i % 2}", f"{words[shift + i]} was born in" + " the" * (i % 3),
                   f" {words[shift + i + 3]}" + f" {words[shift + i + 5]}" * (i % 2))  # one or two tokens
            for i in range(SIZES[name])]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Source]:
    for name in NAMES:
        lines = [json.dumps(vars(r)) for r in records(name)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return of_folder(tmp_path / "data")


def model_of(architecture: str = "llama") -> LoadedModel:
    return wrap(tiny_models.build(architecture), tiny_models.tiny_tokenizer(), "tiny")


def plan(rounds: int = 2, **settings: Any) -> Plan:
    more = {key: settings.pop(key) for key in ("min_clients", "timeout") if key in settings}
    return Plan("tiny", Local(**{**LOCAL, **settings}), rounds, **more)


def go(base: LoadedModel, asked: Plan, data: dict[str, Source], folder: Path, *faults: str) -> list[str]:
    said: list[str] = []
    simulate(base, asked, data, folder, engine="here", faults=[Fault.parse(f) for f in faults], note=said.append)
    return said


def final(folder: Path) -> dict[str, np.ndarray]:
    from repforget.federated.server import resumed

    return resumed(History.open(folder / "history"), {})[0]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def central_step(module: Any, examples: list[Example], trained: list[torch.Tensor], lr: float) -> list[torch.Tensor]:
    """One plain step on all records, written without any of the code it is to check: one record at a time."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in trained]
    for example in examples:
        ids = torch.tensor([example.tokens])
        logits = module(input_ids=ids).logits[0, :-1].double()
        marked = torch.tensor(example.labelled)[1:]
        loss = functional.cross_entropy(logits[marked], ids[0, 1:][marked])
        for own, gradient in zip(total, torch.autograd.grad(loss, trained), strict=True):
            own += gradient.double() / len(examples)
    return [-lr * own for own in total]


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_plain_step_of_all_clients_is_the_step_on_all_their_records(
    rounds: int, data: dict[str, Source], tmp_path: Path
) -> None:
    base = model_of()
    go(base, plan(rounds, rule="fedsgd", rank=0, lr=0.5, weights=("down_proj", "norm")), data, tmp_path / "run")
    state = final(tmp_path / "run")
    names = [n for n, _ in base.module.named_parameters() if "down_proj" in n or "norm" in n]
    assert sorted(state) == sorted(names)
    alone = model_of().module
    trained = [alone.get_parameter(name).requires_grad_() for name in names]
    before = [p.detach().clone() for p in trained]
    examples = [e for name in NAMES for e in Client.of(name, base, records(name)).examples]
    for _ in range(rounds):
        for parameter, step in zip(trained, central_step(alone, examples, trained, 0.5), strict=True):
            parameter.data += step
    for name, parameter, start in zip(names, trained, before, strict=True):
        wanted = (parameter.detach() - start).numpy()
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(state[name], wanted, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_plain_step_through_adapters_is_that_of_one_client_with_everything(
    architecture: str, tmp_path: Path, data: dict[str, Source]
) -> None:
    base = model_of(architecture)
    local = local_settings(base, **{**LOCAL, "rule": "fedsgd", "lr": 0.5})
    go(base, plan(1, rule="fedsgd", lr=0.5), data, tmp_path / "run")
    everything = Client.of("all", base, [r for name in NAMES for r in records(name)])
    update = everything.work(Task(1, local, untouched(base, local))).update
    assert update is not None
    from repforget.federated.aggregate import dense

    state, whole = final(tmp_path / "run"), dense(update.tensors)
    assert max(np.abs(value).max() for value in whole.values()) > 1e-3
    for name, value in whole.items():
        np.testing.assert_allclose(state[name], value, atol=1e-6)


@pytest.mark.parametrize(("architecture", "rank"), [("llama", 2), ("gpt2", 2), ("gpt2", 0)])
def test_a_client_leaves_the_model_as_it_was_and_its_edit_is_what_it_trained(
    architecture: str, rank: int, tmp_path: Path, data: dict[str, Source]
) -> None:
    base = model_of(architecture)
    before = fingerprint(base.module)
    go(base, plan(2, rank=rank), {"bob": data["bob"]}, tmp_path / "run")
    assert fingerprint(base.module) == before == load_edit(tmp_path / "run" / "edit").manifest.base_fingerprint
    local = local_settings(base, **{**LOCAL, "rank": rank})
    client = Client.of("bob", base, records("bob"))
    losses = [row["took_part"][0]["loss"] for row in report(tmp_path / "run")["rounds"]]
    later = client.work(Task(3, local, final(tmp_path / "run")))
    assert later.loss < losses[1] < losses[0]
    edited = load_edit(tmp_path / "run" / "edit").applied_to(base).module
    with changed(base.module, local, final(tmp_path / "run")):
        for name, parameter in base.module.named_parameters():
            torch.testing.assert_close(edited.get_parameter(name), parameter, atol=1e-6, rtol=0)
    assert fingerprint(base.module) == before


def report(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return body


def test_factors_of_a_small_state_are_that_state() -> None:
    base = model_of("gpt2")
    local = local_settings(base, **LOCAL)
    generator = np.random.default_rng(0)
    state = {name: (generator.normal(size=(z.shape[0], 2)) @ generator.normal(size=(2, z.shape[1]))).astype(np.float32)
             for name, z in untouched(base, local).items()}  # fmt: skip
    low, full = operations_of(base, local, state, 3), operations_of(base, local, state)
    assert {op.kind for op in low} == {"low_rank"} and {op.kind for op in full} == {"dense"}
    own = own_layout(base.module, local, state)
    for a, b in zip(low, full, strict=True):
        torch.testing.assert_close((a.u @ a.v).mT.float(), b.delta, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
        assert torch.equal(b.delta, own[b.weight])  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "words"), [
    ("nan", "NaN or infinite"), ("inf", "NaN or infinite"), ("shape", "shape"), ("error", "staged"),
    ("late", "did not answer within 0.5 s"),
])  # fmt: skip
def test_a_fault_is_named_and_the_round_is_what_it_would_have_been_without_that_client(
    kind: str, words: str, data: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_of()
    asked = plan(1, timeout=0.5 if kind == "late" else 600.0)
    clock = [0.0]  # only who sleeps is late, however slow the machine is
    monkeypatch.setattr("repforget.federated.faults.time",
                        SimpleNamespace(sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)))  # fmt: skip
    monkeypatch.setattr("repforget.federated.simulate.time", SimpleNamespace(monotonic=lambda: clock[0]))
    said = go(base, asked, data, tmp_path / "run", f"bob:1:{kind}")
    others = {name: source for name, source in data.items() if name != "bob"}
    go(base, asked, others, tmp_path / "others")
    assert same(final(tmp_path / "run"), final(tmp_path / "others"))
    row = report(tmp_path / "run")["rounds"][0]
    assert [took["client"] for took in row["took_part"]] == ["ann", "cid"]
    assert words in row["failed"]["bob"] and set(row["failed"]) == {"bob"}
    assert any("'bob'" in line and words in line and "round 1" in line for line in said)
    assert not any(unearned(line) for line in said)


def test_a_round_with_too_few_clients_is_repeated_then_refused_and_what_was_done_is_kept(
    data: dict[str, Source], tmp_path: Path
) -> None:
    base = model_of()
    with pytest.raises(ResourceError, match=r"Round 2 had too few clients 3 times: it needs 3 \('bob' .*staged"):
        go(base, plan(2, min_clients=3), data, tmp_path / "run", "bob:2:error")
    body = report(tmp_path / "run")
    assert [(r["round"], r["attempt"], r["kept"]) for r in body["rounds"]] == [
        (1, 1, True), (2, 1, False), (2, 2, False), (2, 3, False)]  # fmt: skip
    assert len(History.open(tmp_path / "run" / "history")) == 1
    go(base, plan(2, min_clients=3), data, tmp_path / "run")
    go(base, plan(2), data, tmp_path / "straight")
    assert same(final(tmp_path / "run"), final(tmp_path / "straight"))
    assert [(r["round"], r["kept"]) for r in report(tmp_path / "run")["rounds"]] == [(1, True), (2, True)]


@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
def test_a_training_goes_on_where_it_was_killed_and_gives_the_same_bytes(
    rule: str, data: dict[str, Source], tmp_path: Path
) -> None:
    base = model_of()
    go(base, plan(1, rule=rule), data, tmp_path / "parts")
    go(base, plan(3, rule=rule), data, tmp_path / "parts")
    go(base, plan(3, rule=rule), data, tmp_path / "whole")
    a, b = (load_edit(tmp_path / name / "edit") for name in ("parts", "whole"))
    assert a.digest == b.digest
    assert not same(final(tmp_path / "parts"), History.open(tmp_path / "whole" / "history")[2].before)
    with pytest.raises(UsageError, match="differs in its local training"):
        go(base, plan(3, rule=rule, lr=0.02), data, tmp_path / "whole")
    with pytest.raises(UsageError, match="differs in its clients"):
        go(base, plan(3, rule=rule), {"bob": data["bob"]}, tmp_path / "whole")


def test_a_training_goes_on_only_with_the_records_that_it_began_with(data: dict[str, Source], tmp_path: Path) -> None:
    base, run = model_of(), tmp_path / "run"
    go(base, plan(1), data, run)
    path = Path(data["cid"].path)
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(UsageError, match="differs in its clients"):
        go(base, plan(2), of_folder(path.parent), run)
    with pytest.raises(UsageError, match="not those that this training began with"):
        leave(base, run, "bob", "retrain", tmp_path / "out")
    assert "bob" in History.open(run / "history").clients() and not (tmp_path / "out" / "edit").exists()


def test_the_order_of_clients_and_other_seeds() -> None:
    base = model_of()
    local = local_settings(base, **{**LOCAL, "batch_size": 2})
    client = Client.of("bob", base, records("bob"))
    first, again = (client.work(Task(1, local, {})).update for _ in range(2))
    other = Client.of("ann", base, records("bob")).work(Task(1, local, {})).update
    later = client.work(Task(2, local, {})).update
    assert first and again and other and later
    assert same(dict(first.tensors), dict(again.tensors))
    assert not same(dict(first.tensors), dict(other.tensors)) and not same(dict(first.tensors), dict(later.tensors))


def test_another_base_or_tokenizer_is_refused_by_name() -> None:
    base = model_of()
    mine = Client.of("ann", base, records("ann")).introduce()
    moved = wrap(tiny_models.build("llama", seed=1), base.tokenizer)
    words = wrap(tiny_models.build("llama"), tiny_models.tiny_tokenizer(list(tiny_models.WORDS)[::-1]))
    strangers = [Client.of(name, model, records("bob")).introduce() for name, model in (("eve", moved), ("tom", words))]
    welcome, refused = admitted([mine, *strangers, Introduction("nil", 0, mine.base, mine.tokenizer)], mine.base,
                                mine.tokenizer)  # fmt: skip
    why = {member.client: reason for member, reason in refused}
    assert list(welcome) == ["ann"] and set(why) == {"eve", "tom", "nil"}
    assert "base model" in why["eve"] and "tokenizer" in why["tom"] and "no records" in why["nil"]


def test_a_reply_is_taken_only_as_it_was_asked() -> None:
    base = model_of()
    local = local_settings(base, **LOCAL)
    client = Client.of("bob", base, records("bob"))
    reply, me, shapes = client.work(Task(1, local, {})), client.introduce(), shapes_of(base, local)
    assert reply.update is not None
    tensors = dict(reply.update.tensors)
    norm = weights_norm(base, local)
    squares = sum(float(base.module.get_parameter(name).detach().square().sum()) for name in local.weights)
    assert norm == pytest.approx(squares**0.5)
    assert fault_of(unpack_reply(pack_reply(reply)), 1, me, shapes, norm) is None
    first = min(tensors)

    def fault(**changes: Any) -> str:
        found = fault_of(dataclasses.replace(reply, **changes), 1, me, shapes, norm)
        assert found is not None
        return found

    assert "round 2" in fault(round=2) and "'ann'" in fault(client="ann")
    assert "records" in fault(update=Update("bob", 500, tensors))
    assert first in fault(update=Update("bob", 5, {n: t for n, t in tensors.items() if n != first}))
    assert "'more'" in fault(update=Update("bob", 5, {**tensors, "more": tensors[first]}))
    assert "float16" in fault(update=Update("bob", 5, {**tensors, first: tensors[first].astype(np.float16)}))
    assert "above" in fault(update=Update("bob", 5, {**tensors, first: tensors[first] + np.float32(1e30)}))
    times = TIMES * norm / length_of(reply.update)
    longer = {n: t * np.float32(1.01 * times) if n.endswith(".left") else t for n, t in tensors.items()}
    assert "of length" in fault(update=Update("bob", 5, longer))
    shorter = Update("bob", 5, {n: t * np.float32(0.99 / 1.01) if n.endswith(".left") else t
                                for n, t in longer.items()})  # fmt: skip
    assert fault_of(dataclasses.replace(reply, update=shorter), 1, me, shapes, norm) is None
    assert "no update" in fault(update=None)
    assert fault(update=None, failed="\x1b[31mred") == "\\x1b[31mred"
    with pytest.raises(UsageError, match="cannot be read"):
        unpack_reply(("{}", b""))
    with pytest.raises(UsageError, match="cannot be read"):
        unpack_reply((pack_reply(reply)[0], b"no tensors"))
    assert unpack_reply(pack_reply(Reply("bob", 3, failed="why"))).failed == "why"


def test_a_diverging_client_says_so() -> None:
    base = model_of()
    client = Client.of("bob", base, records("bob"))
    local = local_settings(base, **{**LOCAL, "lr": 1e30, "optimizer": "descent", "clip": 0.0, "epochs": 3})
    before = fingerprint(base.module)
    with pytest.raises(NumericalError, match="'bob'.*round 1.*lower the learning rate"):
        client.work(Task(1, local, {}))
    assert fingerprint(base.module) == before


@pytest.mark.parametrize(("text", "words"), [
    ("bob", "CLIENT:ROUND:KIND"), ("bob:x:nan", "CLIENT:ROUND:KIND"), ("bob:1:nans", "did you mean 'nan'"),
])  # fmt: skip
def test_a_mistyped_fault_is_answered(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Fault.parse(text)


def test_a_probe_is_dealt_out_by_cluster() -> None:
    dealt = of_probe("bios-people", 8)
    clusters = [c for source in dealt.values() for c in source.clusters]
    assert len(dealt) == 8 and len(clusters) == len(set(clusters)) == 64
    assert {len(source.clusters) for source in dealt.values()} == {8}
    assert {r.cluster for r in dealt["client-3"].records()} == set(dealt["client-3"].clusters)
    assert of_probe("bios-people", 8, seed=1) != dealt == of_probe("bios-people", 8)
    with pytest.raises(UsageError, match="65 clients cannot share the 64 clusters"):
        of_probe("bios-people", 65)


def test_commands(data: dict[str, Source], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    model = str(saved(tmp_path / "model"))
    run, small = str(tmp_path / "run"), ("--rank", "2", "--lr", "0.01", "--rounds", "2", "--engine", "here")
    code, out, err = cli("federated", "simulate", "--model", model, "--data", str(tmp_path / "data"), "--out", run,
                         *small, "--inject", "bob:2:nan")  # fmt: skip
    assert code == 0 and "round 2: sent NaN" in out.replace("\n", "") and "'bob'" in err and not unearned(out + err)
    code, out, err = cli("federated", "forget", run, "bobb", "--out", str(tmp_path / "x"))
    assert code == 2 and "did you mean 'bob'" in err
    code, out, err = cli("federated", "forget", run, "bob", "--out", str(tmp_path / "y"), "--method",
                         "rollbak")  # fmt: skip
    assert code == 2 and "did you mean 'rollback'" in err
    code, out, err = cli("federated", "serve", "--model", model, "--out", str(tmp_path / "z"), "--address", "0.0.0.0:0")
    assert code == 2 and "Without certificates" in err and not (tmp_path / "z").exists()
    code, out, err = cli("federated", "forget", run, "bob", "--out", str(tmp_path / "g"), "--json")
    made = load_edit(tmp_path / "g" / "edit")
    assert code == 0 and json.loads(out)["trainings"] == 4 and made.manifest.guarantee is not None
    assert not unearned(out + err, [made.manifest.guarantee])
    assert Guarantee.from_json(json.loads(out)["guarantee"]) == made.manifest.guarantee  # every assumption
    assert b"bob" not in b"".join(p.read_bytes() for p in (tmp_path / "run" / "history").rglob("*") if p.is_file())


def saved(folder: Path) -> Path:
    base = model_of()
    base.module.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder
