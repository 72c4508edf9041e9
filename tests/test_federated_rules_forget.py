"""Clients that leave: the record on disk and its erasure, FedEraser, rollback, unlearning at the client, the oracle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from repforget.errors import ArtifactError, UsageError
from repforget.federated.aggregate import aggregate, applied
from repforget.federated.forget import Distilled, calibrated, client_side, fed_eraser, retrain, rollback
from repforget.federated.history import History, Round, final_state
from repforget.federated.records import Update
from repforget.guarantee import unearned

Weights = Mapping[str, np.ndarray]


class World:
    """Linear regression at some clients: gradient descent from the global weights, the same each time it is asked."""

    def __init__(self, sizes: Mapping[str, int], odd: str = "") -> None:
        draw = np.random.default_rng(0)
        usual = draw.standard_normal(6)
        self.data = {}
        for name, n in sizes.items():
            x = draw.standard_normal((n, 6))
            self.data[name] = x, x @ (-3 * usual if name == odd else usual) + 0.1 * draw.standard_normal(n)

    def train(self, client: str, weights: Weights, number: int, share: float) -> Update:
        (x, y), w = self.data[client], weights["w"].astype(float)
        for _ in range(max(1, round(8 * share))):
            w = w - 0.05 * x.T @ (x @ w - y) / len(x)
        return Update(client, len(x), {"w": w - weights["w"]})

    def run(self, joins: Mapping[str, int], count: int) -> list[Round]:
        weights: Weights = {"w": np.zeros(6)}
        rounds = []
        for number in range(count):
            sent = tuple(self.train(c, weights, number, 1.0) for c in sorted(joins) if joins[c] <= number)
            rounds.append(Round(weights, sent))
            weights = applied(weights, aggregate(sent))
        return rounds


SIZES = {"ann": 30, "bob": 50, "cy": 40}
JOINS = dict.fromkeys(SIZES, 0)


def gap(a: Weights, b: Weights) -> float:
    return float(np.linalg.norm(a["w"] - b["w"]))


# ------------------------------------------------------------------ the record


def kept(folder: Path, rounds: list[Round]) -> History:
    history = History(folder)
    for each in rounds:
        history.append(each.before, each.updates)
    return history


def test_a_record_gives_back_the_same_bits(tmp_path: Path) -> None:
    rounds = World(SIZES).run(JOINS, 3)
    kept(tmp_path, rounds)
    again = History.open(tmp_path)
    assert len(again) == 3 and again.clients() == dict.fromkeys(SIZES, 3)
    for a, b in zip(again, rounds, strict=True):
        assert a.clients == b.clients and a.before["w"].tobytes() == b.before["w"].tobytes()
        for x, y in zip(a.updates, b.updates, strict=True):
            assert x.records == y.records and x.tensors["w"].tobytes() == y.tensors["w"].tobytes()
    assert np.array_equal(final_state(again)["w"], final_state(rounds)["w"])


def test_a_killed_append_leaves_no_round_and_the_next_one_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = World(SIZES).run(JOINS, 2)
    history = kept(tmp_path, rounds[:1])
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            history.append(rounds[1].before, rounds[1].updates)
    (tmp_path / ".round-0001.tmp-77").mkdir()
    (tmp_path / ".round-0001.tmp-77" / "x").write_bytes(b"half")
    again = History.open(tmp_path)
    assert len(again) == 1 and not list(tmp_path.glob(".*"))
    again.append(rounds[1].before, rounds[1].updates)
    assert len(again) == 2


def test_damage_other_rules_and_strange_folders_are_refused(tmp_path: Path) -> None:
    kept(tmp_path / "h", World(SIZES).run(JOINS, 1))
    with pytest.raises(UsageError, match="aggregated by 'fedavg'"):
        History(tmp_path / "h", "fedadam")
    victim = next((tmp_path / "h" / "round-0000").glob("client-*"))
    body = bytearray(victim.read_bytes())
    body[-3] ^= 1
    victim.write_bytes(bytes(body))
    with pytest.raises(ArtifactError, match="checksum"):
        History.open(tmp_path / "h")[0]
    victim.unlink()
    with pytest.raises(ArtifactError, match="readable"):
        History.open(tmp_path / "h")[0]
    with pytest.raises(UsageError, match="There is no file"):
        History.open(tmp_path / "nowhere")


def everything(folder: Path) -> bytes:
    return b"\n".join(p.name.encode() + b"\n" + p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


@pytest.mark.parametrize("killed", [0, 2, 3, 4, 5])  # at which replacement of a file; 0: never
def test_an_erased_client_leaves_no_bytes_and_cannot_be_computed_from_the_rest(
    tmp_path: Path, killed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = World(SIZES).run({"ann": 0, "bob": 1, "cy": 0}, 4)
    history = kept(tmp_path, rounds)
    before = everything(tmp_path)
    target = [u.tensors["w"] for r in rounds for u in r.updates if u.client == "bob"]
    states = [r.before["w"] for r in rounds]
    assert b"bob" in before and all(t.tobytes() in before for t in (*target, *states))
    if killed:
        replace, calls = os.replace, []

        def stop(a: str, b: str) -> None:
            calls.append(b)
            if len(calls) == killed:
                raise KeyboardInterrupt
            replace(a, b)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                history.erase("bob")
        assert b"bob" in everything(tmp_path)
        history = History.open(tmp_path)
    else:
        assert history.erase("bob") == 3
    after = everything(tmp_path)
    assert b"bob" not in after and not any(t.tobytes() in after for t in target)
    assert history.clients() == {"ann": 4, "cy": 4}
    # a state less the one before it, less the updates that stay, was the update that went
    assert all(state.tobytes() in after for state in states[:2]) and not any(s.tobytes() in after for s in states[2:])
    for a, b in zip(history[:], history[1:], strict=False):
        assert np.array_equal(b.before["w"], applied(a.before, aggregate(a.updates))["w"])
    with pytest.raises(UsageError, match="'bob' never took part"):
        history.erase("bob")
    assert np.array_equal(history[1].before["w"], states[1])


def test_a_round_of_one_client_stays_empty_after_its_erasure(tmp_path: Path) -> None:
    world = World(SIZES)
    rounds = world.run({"ann": 0, "bob": 2, "cy": 2}, 4)
    history = kept(tmp_path, rounds)
    history.erase("ann")
    assert [r.clients for r in history] == [(), (), ("bob", "cy"), ("bob", "cy")]
    assert np.array_equal(history[2].before["w"], rounds[0].before["w"])


# ------------------------------------------------------------------ FedEraser


def ten_clients(directions: np.ndarray) -> tuple[list[Round], object]:
    """Ten clients with independent old updates of norm sqrt(10); new ones along given directions."""
    draw = np.random.default_rng(3)
    old = draw.standard_normal((3, 10, 1000)) / 10
    sent = [tuple(Update(f"c{i}", 5, {"w": row}) for i, row in enumerate(each)) for each in old]
    rounds = [Round({"w": np.zeros(1000)}, sent[0])]
    for each in sent[1:]:
        rounds.append(Round(applied(rounds[-1].before, aggregate(rounds[-1].updates)), each))

    def train(client: str, weights: Weights, number: int, share: float) -> Update:
        return Update(client, 5, {"w": directions[int(client[1:])]})

    return rounds, train


def test_the_released_code_shrinks_the_step_that_the_paper_takes() -> None:
    same = np.tile(np.random.default_rng(4).standard_normal(1000), (10, 1))
    rounds, train = ten_clients(same)
    first = applied(rounds[0].before, aggregate(rounds[0].updates[1:]))
    for count in (1, 2):  # rounds that are calibrated; in the last the model after it is not recorded but computed
        paper = gap(fed_eraser(rounds[: count + 1], "c0", train).weights, first)  # type: ignore[arg-type]
        released = gap(fed_eraser(rounds[: count + 1], "c0", train, compat=True).weights, first)  # type: ignore[arg-type]
        assert abs(paper / count - 3.16) < 0.05 and abs(released / count - 0.333) < 0.02
    level = np.linalg.norm(aggregate(rounds[1].updates[1:])["w"])
    assert abs(level - 1.05) < 0.05


def test_each_client_is_calibrated_before_the_mean() -> None:
    directions = np.random.default_rng(5).standard_normal((10, 1000)) * np.arange(1, 11)[:, None]
    rounds, train = ten_clients(directions)
    first = applied(rounds[0].before, aggregate(rounds[0].updates[1:]))
    step = fed_eraser(rounds[:2], "c0", train).weights["w"] - first["w"]  # type: ignore[arg-type]
    turned = [np.linalg.norm(u.tensors["w"]) * d / np.linalg.norm(d)
              for u, d in zip(rounds[1].updates[1:], directions[1:], strict=True)]  # fmt: skip
    assert np.allclose(step, np.mean(turned, axis=0), atol=1e-12)


def test_calibrated_norms_of_tensors_wholes_and_adapters() -> None:
    draw = np.random.default_rng(0)
    old = Update("a", 7, {"w": draw.standard_normal(4), "u.left": draw.standard_normal((5, 2)),
                          "u.right": draw.standard_normal((2, 6))})  # fmt: skip
    new = Update("a", 3, {"w": draw.standard_normal(4), "u.left": draw.standard_normal((5, 3)),
                          "u.right": draw.standard_normal((3, 6))})  # fmt: skip

    def norms(u: Update) -> tuple[float, float]:
        return float(np.linalg.norm(u.tensors["w"])), float(np.linalg.norm(u.tensors["u.left"] @ u.tensors["u.right"]))

    whole, each = calibrated(old, new), calibrated(old, new, per_tensor=True)
    assert np.isclose(np.hypot(*norms(whole)), np.hypot(*norms(old))) and not np.allclose(norms(whole), norms(old))
    assert np.allclose(norms(each), norms(old)) and whole.records == 7
    ratio = whole.tensors["w"] / new.tensors["w"]
    assert np.allclose(ratio, ratio[0]) and np.array_equal(whole.tensors["u.right"], new.tensors["u.right"])
    still = Update("a", 3, {"w": np.zeros(4), "u.left": np.zeros((5, 3)), "u.right": np.ones((3, 6))})
    assert norms(calibrated(old, still)) == (0.0, 0.0)
    assert norms(calibrated(old, still, per_tensor=True)) == (0.0, 0.0)


def test_what_came_before_the_client_is_kept_to_the_bit() -> None:
    world = World(SIZES)
    rounds = world.run({"ann": 0, "bob": 3, "cy": 0}, 4)  # bob only in the last round
    asked: list[int] = []

    def train(client: str, weights: Weights, number: int, share: float) -> Update:
        asked.append(number)
        return world.train(client, weights, number, share)

    found = fed_eraser(rounds, "bob", train)
    assert not asked and found.trainings == 0
    assert np.array_equal(found.weights["w"], retrain(rounds, "bob", world.train).weights["w"])


def test_interval_share_and_cost_are_as_asked() -> None:
    world = World(SIZES)
    rounds = world.run(JOINS, 7)
    asked: list[tuple[str, int, float]] = []

    def train(client: str, weights: Weights, number: int, share: float) -> Update:
        asked.append((client, number, share))
        return world.train(client, weights, number, share)

    found = fed_eraser(rounds, "bob", train, interval=3)
    assert asked == [(c, n, 0.5) for n in (3, 6) for c in ("ann", "cy")] and found.trainings == 4
    for wrong in ({"interval": 0}, {"local_share": 0.0}, {"local_share": 1.5}):
        with pytest.raises(UsageError, match="interval"):
            fed_eraser(rounds, "bob", train, **wrong)  # type: ignore[arg-type]


def test_every_way_comes_nearer_to_the_oracle_than_the_model_that_knows() -> None:
    world = World(SIZES, odd="bob")
    rounds = world.run(JOINS, 8)
    oracle, knows = retrain(rounds, "bob", world.train), final_state(rounds)
    far = gap(knows, oracle.weights)
    eraser = fed_eraser(rounds, "bob", world.train)
    side = client_side(knows, "bob", lambda w: Update("bob", 50, {"w": -world.train("bob", w, 0, 1.0).tensors["w"]}),
                       ["ann", "cy"], world.train, rounds=4)  # fmt: skip
    assert far > 1
    assert gap(eraser.weights, oracle.weights) < 0.5 * far
    assert gap(side.weights, oracle.weights) < 0.5 * far
    assert side.trainings == 8


def test_the_leaving_client_s_own_step_is_applied_whole_before_the_others_go_on() -> None:
    start, step = {"w": np.arange(6.0)}, np.full(6, 0.25)
    seen: list[Weights] = []

    def train(client: str, weights: Weights, number: int, share: float) -> Update:
        seen.append(weights)
        return Update(client, 3, {"w": np.full(6, 1.0 if client == "cy" else 2.0)})

    found = client_side(start, "ann", lambda w: Update("ann", 9, {"w": step}), ["cy", "bob", "ann"], train, rounds=1)
    assert all(np.array_equal(w["w"], start["w"] + step) for w in seen) and found.trainings == 2
    assert np.allclose(found.weights["w"], start["w"] + step + 1.5)
    with pytest.raises(UsageError, match="0 rounds"):
        client_side(start, "ann", lambda w: Update("ann", 9, {"w": step}), ["cy"], train, rounds=0)


# ------------------------------------------------------------------ no effect, exactness, refusals


def silent(rounds: list[Round], client: str) -> list[Round]:
    """The same training with a client that took part and sent nothing but zeros."""
    found: list[Round] = []
    weights = rounds[0].before
    for each in rounds:
        sent = (*each.updates, Update(client, 9, {"w": np.zeros(6)}))
        found.append(Round(weights, sent))
        weights = applied(weights, aggregate(sent))
    return found


def test_a_client_that_sent_zeros_is_taken_out_without_a_trace_in_the_weights() -> None:
    world = World(SIZES)
    rounds = silent(world.run(JOINS, 3), "zoe")
    final = final_state(rounds)
    eraser = fed_eraser(rounds, "zoe", world.train)
    assert eraser.weights["w"].tobytes() == final["w"].tobytes() and eraser.trainings == 0 and eraser.notes
    assert rollback(rounds, "zoe").weights["w"].tobytes() == final["w"].tobytes()


def test_rollback_takes_off_what_was_added_and_then_distils() -> None:
    rounds = World(SIZES).run(JOINS, 4)
    share = 50 / 120
    expected = final_state(rounds)["w"] - sum(share * r.updates[1].tensors["w"] for r in rounds)
    found = rollback(rounds, "bob")
    assert np.allclose(found.weights["w"], expected, atol=1e-14) and "distilled" in found.notes[0]
    seen: list[Weights] = []

    def distil(student: Weights, teacher: Weights) -> Distilled:
        seen.extend((student, teacher))
        return Distilled({"w": student["w"] + 1}, 3, 0.5, ("so",))

    told = rollback(rounds, "bob", distil=distil)
    assert np.array_equal(told.weights["w"], found.weights["w"] + 1) and told.notes == ("so",)
    assert np.array_equal(seen[1]["w"], final_state(rounds)["w"])
    with pytest.raises(UsageError, match="FedAdam"):
        rollback(rounds, "bob", rule="fedadam")


def test_the_oracle_is_the_training_without_the_client_and_says_so() -> None:
    world = World(SIZES, odd="bob")
    found = retrain(world.run(JOINS, 5), "bob", world.train)
    never = World(SIZES, odd="bob").run({"ann": 0, "cy": 0}, 5)
    assert np.array_equal(found.weights["w"], final_state(never)["w"]) and found.trainings == 10
    assert found.guarantee is not None and found.guarantee.kind == "exact"
    assert "bob" not in repr(found.guarantee)  # who left is not told to whoever gets the result
    rounds = world.run(JOINS, 2)
    for other in (fed_eraser(rounds, "bob", world.train), rollback(rounds, "bob")):
        assert other.guarantee is None and not unearned(" ".join(other.notes))
    assert not unearned(" ".join(text for _, text in found.guarantee.lines()), [found.guarantee])


def test_fedadam_walks_with_its_moments() -> None:
    world = World(SIZES, odd="bob")
    weights: Weights = {"w": np.zeros(6)}
    state: dict[str, np.ndarray] = {}
    rounds = []
    for number in range(5):
        names = ["ann", "cy"] if number < 3 else ["ann", "bob", "cy"]
        sent = tuple(world.train(c, weights, number, 1.0) for c in names)
        rounds.append(Round(weights, sent))
        weights = applied(weights, aggregate(sent, "fedadam", state=state))
    assert np.array_equal(final_state(rounds, "fedadam")["w"], weights["w"])
    oracle = retrain(rounds, "bob", world.train, rule="fedadam").weights["w"]
    found = fed_eraser(rounds[:4], "bob", world.train, rule="fedadam").weights["w"]
    short = retrain(rounds[:4], "bob", world.train, rule="fedadam").weights["w"]
    assert np.array_equal(found, short) and not np.array_equal(short, oracle)


def test_a_stranger_and_the_only_client_are_refused() -> None:
    world = World(SIZES)
    rounds, alone = world.run(JOINS, 2), world.run({"ann": 0}, 2)
    for way in (retrain, fed_eraser):
        with pytest.raises(UsageError, match="'bobb' never took part .* did you mean 'bob'"):
            way(rounds, "bobb", world.train)
        with pytest.raises(UsageError, match="'ann' is the only one"):
            way(alone, "ann", world.train)
    with pytest.raises(UsageError, match="never took part"):
        rollback(rounds, "bobb")
    with pytest.raises(UsageError, match="the only one"):
        rollback(alone, "ann")
    with pytest.raises(UsageError, match="the only one"):
        client_side({"w": np.zeros(6)}, "ann", lambda w: world.train("ann", w, 0, 1), ["ann"], world.train)
    with pytest.raises(UsageError, match="comes from 'cy', not from 'ann'"):
        client_side({"w": np.zeros(6)}, "ann", lambda w: world.train("cy", w, 0, 1), ["cy"], world.train)
    with pytest.raises(UsageError, match="'ann' was asked to train and 'cy' answered"):
        retrain(rounds, "bob", lambda c, w, n, s: world.train("cy", w, n, s))
