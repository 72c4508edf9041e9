"""An edit from the moments of a fleet: the same as of all data, no client's numbers seen, clients lost on the way."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import edit_models
import numpy as np
import pytest
import torch
from test_federated_moments import distance

from repforget.artifact import Edit
from repforget.edit.erase.leace import leace as leace_of_one
from repforget.errors import ResourceError, UsageError
from repforget.federated.clients import Client
from repforget.federated.dealt import dealt, fleet_of, read_part, write_part
from repforget.federated.messages import Introduction, Reply, Task, Told
from repforget.federated.moments import Local, Moments, Question, checked, leace
from repforget.federated.questions import blank, moments_of, packed, sums, unpacked
from repforget.federated.secure import Agreement
from repforget.federated.simulate import Here
from repforget.federated.together import Sums, edit_of_fleet
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.training import Record

pytest.importorskip("cryptography", reason="the extra 'federated' is not installed")
MASKED, CLEAR = Sums(1e6, 5), Sums(None, 1)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return edit_models.double()


@pytest.fixture(scope="module")
def data() -> EditData:
    return edit_models.people().for_editor()


class Fleet(Here):
    """Clients of this process of which some fail: (name, number of the task) -> how, once; and all that was told."""

    faults: dict[tuple[str, int], str]
    told: list[tuple[str, Reply]]
    away: set[str]
    refused: dict[str, str]

    @classmethod
    def of(cls, clients: dict[str, Any], wait: float = 0.0, **faults: str) -> Fleet:
        found = cls(clients, wait=wait)
        found.__dict__.update(told=[], away=set(), refused={}, faults=faults)
        return found

    def members(self) -> list[Introduction]:
        return [each for each in super().members() if each.client not in {*self.away, *self.refused}]

    def refuse(self, member: Introduction, reason: str) -> None:
        self.refused[member.client] = reason

    def ask(self, task: Task, clients: Sequence[str]) -> Iterator[Reply]:
        for name in clients:
            how = self.faults.pop(f"{name}_{task.round}", None)  # type: ignore[call-overload]
            if how == "gone":
                self.away.add(name)
            if how == "died":
                self.away.clear()  # and whoever was away comes
            if how == "late":
                self.away.clear()  # too late to be asked
                how = None
            if how in ("gone", "died"):
                yield Reply(name, task.round, failed="died before it answered")
                continue
            reply = next(super().ask(task, [name]))
            if how == "old":
                reply = dataclasses.replace(reply, round=task.round - 1)
            elif how is not None:
                assert reply.told is not None
                reply = dataclasses.replace(reply, told=spoiled(reply.told, how))
            self.told.append((task.kind, reply))
            yield reply


def spoiled(told: Told, how: str) -> Told:
    if how == "words":
        return Told({"classes": [["a"]]})
    name, value = max(told.tensors.items(), key=lambda pair: (pair[1].size, pair[0]))
    changed = {"shape": value[1:], "dtype": value.astype(np.float32), "nan": np.full_like(value, np.nan)
               if value.dtype == np.float64 else value[:0]}[how]  # fmt: skip
    return Told(told.words, {**told.tensors, name: changed})


def clients(model: LoadedModel, data: EditData, count: int = 4) -> dict[str, Client]:
    return {name.replace("-", ""): dataclasses.replace(each, name=name.replace("-", ""))
            for name, each in fleet_of(model, data, count).clients.items()}  # type: ignore[type-var]  # fmt: skip


def made(fleet: Here, model: LoadedModel, how: Sums = MASKED, count: int = 4, **more: Any) -> Edit:
    return edit_of_fleet(fleet, model, "leace", count, sums=how, **more)[0]


def equal(a: Edit, b: Edit) -> bool:
    return all(torch.equal(x.left, y.left) and torch.equal(x.right, y.right) and torch.equal(x.center, y.center)
               for x, y in zip(a.operations, b.operations, strict=True))  # fmt: skip


@dataclasses.dataclass
class Integers:
    """What the masked sums should come to, without any mask: fixed-point numbers added as Python's integers."""

    readers: list[Local]
    agreement: Agreement

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reader.name for reader in self.readers)

    def classes(self, question: Question) -> Any:
        return tuple(sorted({pair for reader in self.readers for pair in reader.classes(question)}))

    def moments(self, question: Question) -> Moments:
        told = [sums(reader.moments(dataclasses.replace(question, minimum=0))) for reader in self.readers]
        shape = blank(self.readers[0].model, question, "moments")
        scale = 2.0**self.agreement.bits
        total = {name: np.array([sum(round(float(each[name].flat[i]) * scale) for each in told) / scale
                                 for i in range(value.size)]).reshape(value.shape)
                 for name, value in told[0].items()}  # fmt: skip
        return checked("all", moments_of(shape, total, summed=True), question.minimum)

    keys = moments


def test_masked_sums_give_the_edit_of_added_integers_bit_for_bit_and_that_of_all_data(
    model: LoadedModel, data: EditData
) -> None:
    own = clients(model, data)
    fleet = Fleet.of(own)
    found, traffic = edit_of_fleet(fleet, model, "leace", 4, sums=MASKED)
    readers = [Local(name, model, each.data) for name, each in own.items()]  # type: ignore[arg-type]
    plain = Integers(readers, Agreement(tuple(own), 1e6))
    assert equal(found, leace(model, {"all": plain}, minimum=5))
    assert distance(found, leace_of_one(model, data)) < 1e-7
    assert distance(made(Here(own), model, CLEAR), leace_of_one(model, data)) < 1e-10
    assert traffic.keys() == own.keys() and all(min(pair) > 1000 for pair in traffic.values())
    for kind, reply in fleet.told:  # nothing but classes, a public key, and numbers that look like chance
        assert reply.told is not None
        sent = {name: value.dtype for name, value in reply.told.tensors.items()}
        assert sent == {"classes": {}, "key": {"public": np.uint8}, "masked": {"sum": np.uint64}}[kind]
        assert bool(reply.told.words) == (kind == "classes")
        if kind == "masked":
            ones = np.unpackbits(reply.told.tensors["sum"].view(np.uint8)).mean()
            assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(64 * len(reply.told.tensors["sum"]))


def test_nothing_but_counts_is_summed_below_the_minimum(model: LoadedModel, data: EditData) -> None:
    fewest = min(Counter((fact.relation, fact.answer) for fact in data.forget).values())
    fleet = Fleet.of(clients(model, data))
    with pytest.raises(UsageError, match=f"All clients together have {fewest} points of a class.*minimum={fewest}"):
        made(fleet, model, Sums(1e6, fewest + 1))
    sent = [reply.told.tensors["sum"] for kind, reply in fleet.told if kind == "masked" and reply.told is not None]
    classes = {(fact.relation, fact.answer) for fact in data.forget}
    assert len(sent) == 4 and {len(each) for each in sent} == {len(classes) + 1}
    just = Fleet.of(clients(model, data))
    assert made(just, model, Sums(1e6, fewest)) is not None
    sizes = [reply.told.tensors["sum"].size for kind, reply in just.told if kind == "masked" and reply.told is not None]
    assert sizes.count(len(classes) + 1) == 4 < len(sizes)  # counted once


def test_keys_are_counted_by_relation_and_summed(model: LoadedModel, data: EditData) -> None:
    points = min(Counter(fact.relation for fact in data.forget).values())  # far more than of an answer

    def solved(how: Sums) -> list[torch.Tensor]:
        edit, _ = edit_of_fleet(Fleet.of(clients(model, data)), model, "null_space", 4, layers=[1], sums=how)
        return [op.u @ op.v for op in edit.operations]  # type: ignore[union-attr]

    for masked, clear in zip(solved(Sums(1e6, points)), solved(CLEAR), strict=True):
        assert float((masked - clear).norm() / clear.norm()) < 1e-6
    with pytest.raises(UsageError, match=f"All clients together have {points} points"):
        solved(Sums(1e6, points + 1))


def test_a_class_of_one_client_is_said_to_be_its_own(model: LoadedModel, data: EditData) -> None:
    own, said = clients(model, data), list[str]()
    part = own["client0"].data
    assert part is not None
    only = tuple(dataclasses.replace(fact, answer="Oslo pilot") for fact in part.forget)
    own["client0"] = dataclasses.replace(own["client0"], data=dataclasses.replace(part, forget=only))
    made(Fleet.of(own), model, Sums(1e6, 1), note=said.append)
    held = Counter(pair for each in own.values() if each.data is not None
                   for pair in {(fact.relation, fact.answer) for fact in each.data.forget})  # fmt: skip
    alone = list(held.values()).count(1)
    assert alone >= 2 and said[0].startswith(f"{alone} of {len(held)} classes are with one client alone")
    made(Fleet.of(own), model, CLEAR, note=said.append)
    assert len(said) == 1


def test_another_run_of_a_server_gets_no_sum_over_others(model: LoadedModel, data: EditData) -> None:
    own = clients(model, data)  # they stay while the server is killed, and it begins anew with three of them
    first = Fleet.of(own, client1_5="gone")
    with pytest.raises(UsageError, match="'client1' died"):
        made(first, model)
    fewer = Fleet.of({name: each for name, each in own.items() if name != "client1"})
    with pytest.raises(UsageError, match="'client0' .*has told another run of the server a sum over 4 clients"):
        made(fewer, model, count=3)
    assert [reply.failed is None for kind, reply in fewer.told if kind == "masked"] == [False] * 3
    assert made(Fleet.of(own), model) is not None  # the same ones


def test_a_question_comes_back_as_it_was(model: LoadedModel, data: EditData) -> None:
    reader = Local("all", model, data)
    asked: list[Question] = []

    class Watch:
        names = ("all",)
        classes = staticmethod(reader.classes)
        keys = staticmethod(reader.keys)

        @staticmethod
        def moments(question: Question) -> Moments:
            asked.append(question)
            return reader.moments(question)

    leace(model, {"all": Watch()}, minimum=2, seed=3)
    question = asked[-1]
    words, tensors = packed(question)
    back = unpacked(json.loads(json.dumps(words)), tensors)
    assert {**vars(back), "erasers": 0} == {**vars(question), "erasers": 0}
    assert question.erasers and back.erasers and list(back.erasers) == list(question.erasers)
    x = torch.randn(5, model.width, dtype=torch.float64)
    assert all(torch.equal(back.erasers[site](x), eraser(x)) for site, eraser in question.erasers.items())


def test_a_client_lost_before_any_sum_is_known_is_left_out(model: LoadedModel, data: EditData) -> None:
    said: list[str] = []
    own = clients(model, data)
    fleet = Fleet.of(own, 0.3, client1_3="gone")
    found = made(fleet, model, note=said.append)
    assert said == ["Client 'client1' died before it answered after the exchange of keys, so that the masks of the "
                    "others stay on: beginning again with the others"]  # fmt: skip
    fresh = clients(model, data)
    assert equal(found, made(Here({n: c for n, c in fresh.items() if n != "client1"}), model, count=3))
    assert found.manifest.settings["clients"] == 3


def test_once_a_sum_is_known_only_the_same_clients_may_be_in_another(model: LoadedModel, data: EditData) -> None:
    own, said = clients(model, data), list[str]()
    fleet = Fleet.of(own, 0.3, client2_2="died", client1_5="died")  # before a sum is known, and after
    assert equal(made(fleet, model, note=said.append), made(Here(own), model))
    assert [line.rpartition(" with ")[2] for line in said] == ["the others", "the same clients"]
    fifth = dataclasses.replace(own["client0"], name="new", parties={})
    larger = Fleet.of({**own, "new": fifth}, 0.3, client1_5="died")
    larger.away.add("new")
    assert made(larger, model).manifest.settings["clients"] == 4 and not larger.away
    with pytest.raises(ResourceError, match="'client1' did not come back in 0.3 s, and sums with it are known"):
        made(Fleet.of(own, 0.3, client1_5="gone"), model)
    small = Fleet.of(own, 0.3, client1_5="gone")
    assert made(small, model, CLEAR) is not None  # nothing is masked, and nothing is lost
    with pytest.raises(ResourceError, match="2 of 3 clients are here"):
        made(Fleet.of(clients(model, data, 3), 0.3, client1_3="gone"), model, count=3)


def test_a_sum_of_an_attempt_before_the_last_is_known_too(model: LoadedModel, data: EditData) -> None:
    """The second attempt ends before any sum of its own: who left it cannot be left out of the third."""
    fleet = Fleet.of(clients(model, data), 0.3, client1_5="died")

    def then(line: str) -> None:
        if "client1" in line:
            fleet.faults["client2_2"] = "gone"

    with pytest.raises(ResourceError, match="'client2' did not come back in 0.3 s, and sums with it are known"):
        made(fleet, model, note=then)


@pytest.mark.parametrize(("task", "how", "words"), [
    (1, "words", "cannot be read"), (2, "old", "answered question 1, not 2"),
    (2, "shape", "sent 'public' as uint8"), (3, "shape", "sent 'sum' as uint64"),
    (3, "dtype", "not as uint64")])  # fmt: skip
def test_strange_answers_are_named(model: LoadedModel, data: EditData, task: int, how: str, words: str) -> None:
    own = clients(model, data)
    with pytest.raises(UsageError, match=f"Client 'client1' .*({words})"):
        made(Fleet.of(own, **{f"client1_{task}": how}), model)
    if task == 2:
        with pytest.raises(UsageError, match="sent NaN or infinite numbers"):
            made(Fleet.of(own, client1_2="nan"), model, CLEAR)


def test_who_has_no_facts_or_will_not_tell_is_told_why_and_the_others_go_on(model: LoadedModel, data: EditData) -> None:
    own = clients(model, data)
    strict = dataclasses.replace(own["client3"], minimum=10**6)
    bare = Client.of("bare", model, [Record("a", "a", "Ada was born in", " Rome")])
    empty = Client("empty", model, (), data=EditData((), (), (), {}, ""))
    fleet = Fleet.of({**own, "client3": strict, "bare": bare, "empty": empty}, 0.3)
    found = made(fleet, model, CLEAR)
    assert "has no facts to read moments from: give --data" in fleet.refused["bare"]
    assert "points at" in fleet.refused["client3"] and fleet.refused.keys() == {"bare", "empty", "client3"}
    assert found.manifest.settings["clients"] == 3
    late = Fleet.of({**own, "bare": bare}, 0.3, client1_3="late")
    late.away.add("bare")
    assert made(late, model, CLEAR) is not None and late.refused.keys() == {"bare"}
    masked = Fleet.of({**own, "client3": strict}, 0.3)  # its own minimum is for the clear
    assert made(masked, model).manifest.settings["clients"] == 4
    with pytest.raises(UsageError, match="'client0' has a mean of"):  # fewer than five, but together
        made(Here(own), model, Sums(None, 5))
    with pytest.raises(UsageError, match="at least 3 different clients"):
        made(Here(own), model, count=2)
    with pytest.raises(ResourceError, match="4 of 5 clients are here"):
        made(Here(own), model, count=5)


def test_a_client_answers_no_sum_without_keys_and_no_unknown_question(model: LoadedModel, data: EditData) -> None:
    one = next(iter(clients(model, data).values()))
    words = {"question": packed(Question((), unused()))[0], "of": "moments", "purpose": "x", "public": {}}
    local = Task(1, _local(), {}, "masked", words)
    with pytest.raises(UsageError, match="without an exchange of keys"):
        one.work(local)
    with pytest.raises(UsageError, match="asked for 'dance', which it does not know"):
        one.work(dataclasses.replace(local, kind="dance"))  # type: ignore[arg-type]


def unused() -> Any:
    from repforget.edit.erase._scrub import Reading

    return Reading("answer", "last", [], 1, False, 10)


def _local() -> Any:
    from repforget.federated.messages import Local as Training

    return Training()


def test_a_part_comes_back_from_its_file_and_other_files_are_refused(data: EditData, tmp_path: Path) -> None:
    for name, part in dealt(data, 3).items():
        write_part(tmp_path / f"{name}.jsonl", part)
        records, back = read_part(tmp_path / f"{name}.jsonl")
        assert back is not None and (back.forget, back.retain, back.general) == (part.forget, part.retain, part.general)
        assert len(records) == len(part.forget) + len(part.retain) + len(part.general)
    line = {"id": "a", "prompt": "Ada was born in", "answer": "Rome", "relation": "city", "set": "forget"}
    for change, words in (({"set": "forgot"}, "Line 2 .* set 'forgot'"), ({"relation": ""}, "Line 2 .* no 'relation'"),
                          ({"set": ""}, "Line 2 .* of the set ''")):  # fmt: skip
        text = "\n".join(json.dumps(row) for row in (line, {**line, "id": "b", **change}))
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(UsageError, match=words):
            read_part(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(json.dumps({k: line[k] for k in ("id", "prompt", "answer")}))
    assert read_part(tmp_path / "x.jsonl")[1] is None
