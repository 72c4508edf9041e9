"""Heads with ids: requests, files that survive a kill, what is said and by which command."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repforget.cli import main
from repforget.errors import ArtifactError, ResourceError, UsageError
from repforget.guarantee import unearned
from repforget.linear import (
    Budget,
    Head,
    Table,
    fit_head,
    guarantee,
    load_head,
    opened,
    read_table,
    remove,
    save_head,
    write_table,
)  # fmt: skip
from repforget.linear import files as files_room

BUDGET = Budget(1.0, 1e-3, 5.0)
KINDS: dict[str, dict[str, Any]] = {
    "ridge": {"loss": "ridge", "lam": 1.0}, "logistic": {"loss": "logistic", "lam": 1e-2},
    "softmax": {"loss": "softmax", "lam": 1.0},
    "promise": {"loss": "logistic", "lam": 1e-1, "radius": 4.0, "intercept": True, "budget": BUDGET, "seed": 3},
}  # fmt: skip


def table(n: int = 240, classes: int = 3, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(n, 5))
    x[np.arange(n), y] += 2
    return Table(x, np.array(["ash", "bay", "elm"])[y], np.array([f"r{k}" for k in range(n)]),
                 np.array([f"c{k // 4}" for k in range(n)]), "rows")  # fmt: skip


def made(kind: str, rows: Table | None = None) -> Head:
    return fit_head(table() if rows is None else rows, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_by_id_or_cluster_is_training_without_those_rows(kind: str) -> None:
    rows = table()
    head = made(kind)
    found = remove(head, rows, ["r100", "r12", "c3"])  # r12 is of c3
    gone = [12, 13, 14, 15, 100]
    again = made(kind, rows.only(np.delete(np.arange(240), gone)))
    moved = np.linalg.norm(head.weights - again.weights)
    missed = np.linalg.norm(found.weights - again.weights)
    assert found.n == again.n == 235 and found.log[-1]["rows"] == 5
    assert missed < (0.05 if kind == "promise" else 1e-7) * moved
    claim = guarantee(found)
    assert claim.kind == ("certified" if kind == "promise" else "exact")
    if kind == "promise":
        exact = remove(head, rows, ["r100", "c3"], retrain=True)
        assert np.abs(exact.weights - again.weights).max() < 1e-10
        assert exact.model.residual < found.model.residual  # type: ignore[union-attr]
        assert claim.numbers["epsilon spent"] == pytest.approx(BUDGET.spent_epsilon(found.model.residual))  # type: ignore[union-attr]
    else:
        assert missed <= claim.numbers["distance bound"]
    with pytest.raises(UsageError, match=r"'r12' is neither a row nor a cluster of.*taken out already"):
        remove(found, rows, ["r12"])
    assert (found.predict(rows.x) == rows.y).mean() > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_every_sentence_is_earned(kind: str) -> None:
    claim = guarantee(remove(made(kind), table(), ["r1"]))
    assert unearned(" ".join(text for line in claim.lines() for text in line), [claim]) == ()


@pytest.mark.parametrize("kind", ["ridge", "logistic", "softmax"])
def test_a_class_of_which_nothing_is_left_is_no_secret(kind: str, tmp_path: Path) -> None:
    rows = table()
    head = remove(made(kind), rows, rows.ids[rows.y == "bay"][1:])
    assert "'bay'" not in " ".join(guarantee(head).assumptions) and min(head.counts) == 1
    head = load_head(save_head(remove(head, rows, rows.ids[rows.y == "bay"][:1]), tmp_path / "head"))
    assert head.counts[1] == 0 and sum(head.counts) == head.n
    assert any("Class 'bay' was a class without the rows" in text for text in guarantee(head).assumptions)


def test_a_row_and_the_cluster_of_others_may_have_one_name() -> None:
    numbers = np.arange(240)
    rows = dataclasses.replace(table(), ids=numbers.astype(np.str_), clusters=(numbers // 4).astype(np.str_))
    head = made("ridge", rows)
    assert [remove(head, rows, names).n for names in (["3"], ["100"], ["3", "12"])] == [235, 239, 231]


def test_names_and_rows_that_do_not_fit_are_refused() -> None:
    rows, head = table(), made("ridge")
    with pytest.raises(UsageError, match="never trained on"):
        remove(head, rows, ["r1", "nobody"])
    changed = dataclasses.replace(rows, x=rows.x + 1e-12)
    with pytest.raises(UsageError, match="not what was trained on"):
        remove(head, changed, ["r1"])
    with pytest.raises(UsageError, match="not in 'rows'"):
        remove(head, rows.only(np.arange(10)), ["r20"])
    with pytest.raises(UsageError, match="All 240 rows"):
        remove(head, rows, [f"c{k}" for k in range(60)])
    with pytest.raises(UsageError, match="No row is named"):
        remove(head, rows, [])
    with pytest.raises(UsageError, match="more than one row"):
        Table(rows.x[:2], rows.y[:2], np.array(["a", "a"]), np.array(["a", "b"]))
    with pytest.raises(UsageError, match="2 ids and 2 clusters"):
        Table(rows.x[:2], rows.y[:2], rows.ids[:2, None], rows.clusters[:2])
    for x, y in ((rows.x[:2].astype(np.str_), rows.y[:2]), (rows.x[:2], np.ones(2) * 1j)):
        with pytest.raises(UsageError, match="finite real numbers"):
            Table(x, y, rows.ids[:2], rows.clusters[:2])
    # the rows to take out are all that ridge and a bounded step read; others need what remains as well
    few = rows.only(np.arange(8))
    assert remove(head, few, ["r1"]).n == remove(made("promise"), few, ["r1"]).n == 239
    with pytest.raises(UsageError, match="are not in 'rows'"):
        remove(made("softmax"), few, ["r1"])


def test_a_promise_that_cannot_be_kept_is_not_made() -> None:
    with pytest.raises(UsageError, match="for the loss logistic and not for softmax"):
        fit_head(table(), "softmax", 1.0, budget=BUDGET)
    with pytest.raises(UsageError, match="exceeds 1/n"):
        fit_head(table(), "logistic", 1.0, radius=4.0, budget=Budget(1.0, 1e-2, 5.0))
    with pytest.raises(UsageError, match="give a radius"):
        fit_head(table(), "logistic", 1.0, budget=BUDGET)
    with pytest.raises(UsageError, match="no loss 'hinge'"):
        fit_head(table(), "hinge", 1.0)  # type: ignore[arg-type]
    rows = table()
    tight = fit_head(rows, "logistic", 1e-3, radius=4.0, budget=Budget(0.01, 1e-3, 0.1))
    with pytest.raises(ResourceError, match="retrain"):
        remove(tight, rows, ["c1", "c2"])
    assert remove(tight, rows, ["c1", "c2"], retrain=True).n == 232


def test_rows_are_brought_to_norm_one_each_by_itself() -> None:
    from repforget.linear.rows import prepared

    x = np.array([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]])
    lengths = np.linalg.norm(prepared(x, 10.0, True), axis=1)
    assert lengths.max() <= 1 + 1e-12
    assert np.allclose(prepared(x, 10.0, False), [[0.3, 0.4], [0.6, 0.8], [0.03, 0.04]])
    wide = np.random.default_rng(0).normal(size=(20, 41))
    many = prepared(wide, 1.0, True)
    for order in "CF":  # as a file keeps it: the hash of a row is that of its bits
        held = np.array(wide, order=order)
        assert np.array_equal(prepared(held, 1.0, True), many)
        assert all(np.array_equal(prepared(held[[k]], 1.0, True)[0], many[k]) for k in range(20))


def test_noise_is_the_systems_own_and_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.stats import kstest

    from repforget.linear import budget, draw_noise

    assert kstest(draw_noise(3.0, (4000, 5)).ravel() / 3, "norm").pvalue > 1e-6
    for ends in (b"\x00", b"\xff"):
        with monkeypatch.context() as patch:
            patch.setattr(budget.secrets, "token_bytes", lambda n, ends=ends: n * ends)
            assert (np.abs(draw_noise(1.0, (2, 3))) > 11).all(), "no tail is cut off, none is coarse"


def test_noise_differs_between_heads_and_follows_a_seed() -> None:
    rows = table()
    first, second, seeded, again = (
        fit_head(rows, "logistic", 0.1, radius=4.0, budget=BUDGET, seed=seed).model.noise  # type: ignore[union-attr]
        for seed in (None, None, 7, 7)
    )
    assert not np.array_equal(first, second) and np.array_equal(seeded, again)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_it_is_the_same_and_private(kind: str, tmp_path: Path) -> None:
    head = remove(made(kind), table(), ["r1"])
    folder = save_head(head, tmp_path / "head")
    found = load_head(folder)
    assert np.array_equal(found.weights, head.weights)
    assert guarantee(found) == guarantee(head) and found.log == head.log
    assert remove(found, table(), ["c9"]).n == 235
    assert folder.stat().st_mode & 0o077 == 0
    assert b"r17" not in b"".join(path.read_bytes() for path in folder.iterdir()), "ids are hashed"
    assert not set(map(bytes, made(kind).index.ids)) & set(map(bytes, head.index.ids)), "each head with its own key"


def test_a_kill_at_any_moment_leaves_one_whole_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before each call that touches the disk; what is found afterwards is the old head or the new one."""
    old = made("ridge")
    new = remove(old, table(), ["c3"])
    real: dict[Any, Any] = {(os, "replace"): os.replace, (os, "fsync"): os.fsync, (Path, "unlink"): Path.unlink}
    seen = set()
    for stop in range(40):
        folder = tmp_path / str(stop)
        save_head(old, folder)
        calls = 0

        def killing(name: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > stop:  # noqa: B023 (used within the turn)
                    raise KeyboardInterrupt
                return real[name](*args, **kwargs)

            return call

        for owner, name in real:
            monkeypatch.setattr(owner, name, killing((owner, name)))
        try:
            save_head(new, folder)
            ended = True
        except KeyboardInterrupt:
            ended = False
        monkeypatch.undo()
        found = load_head(folder).n
        assert found in (240, 236)
        seen.add(found)
        with opened(folder) as again:
            assert again.n == found
        assert len(list(folder.iterdir())) == 3, "the next request takes away what the killed one left"
        assert load_head(save_head(new, folder)).n == 236
        assert len(list(folder.glob("head-*.safetensors"))) == 1, "the weights from before are gone"
        if ended:
            break
    assert ended and seen == {240, 236}


def test_damage_and_strangers_are_told(tmp_path: Path) -> None:
    folder = save_head(made("ridge"), tmp_path / "head")
    tensors = next(folder.glob("*.safetensors"))
    raw = tensors.read_bytes()
    tensors.write_bytes(raw[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        load_head(folder)
    tensors.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_head(folder)
    with pytest.raises(ArtifactError, match="There is no head at"):
        load_head(folder / "head.json")
    (folder / "head.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_head(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not a head"):
        save_head(made("ridge"), tmp_path / "other")
    with pytest.raises(ArtifactError, match="There is no head"), opened(tmp_path / "other"):
        pass
    with pytest.raises(ArtifactError, match="is not a head"):
        save_head(made("ridge"), tmp_path / "other" / "notes.txt")
    (tmp_path / "cut").mkdir()
    for name in (".head.json.tmp-7", ".lock", "head-0123.safetensors"):  # of a first fit that was killed
        (tmp_path / "cut" / name).write_bytes(b"")
    assert load_head(save_head(made("ridge"), tmp_path / "cut", fresh=True)).n == 240


def test_two_requests_at_once_do_not_lose_one(tmp_path: Path) -> None:
    folder = save_head(made("ridge"), tmp_path / "head")
    with opened(folder), pytest.raises(ResourceError, match="in use"), opened(folder):
        pass
    assert files_room.JSON in os.listdir(folder)


def test_files_without_pickle(tmp_path: Path) -> None:
    path = write_table(table(), tmp_path / "rows.npz")
    assert path.stat().st_mode & 0o077 == 0  # people's data
    found = read_table(path)
    assert np.array_equal(found.x, table().x) and found.ids[3] == "r3" and found.clusters[5] == "c1"
    np.savez(tmp_path / "bad.npz", X=np.ones((2, 2)), y=np.array([{}, {}], dtype=object))
    with pytest.raises(UsageError, match="no readable"):
        read_table(tmp_path / "bad.npz")
    np.savez(tmp_path / "half.npz", X=np.ones((2, 2)))
    with pytest.raises(UsageError, match="no array 'y'"):
        read_table(tmp_path / "half.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "junk.npz").write_bytes(b"no array")
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "names.npz", X=np.ones((1, 2)), y=np.ones(1), ids=np.array([b"\xff"]))
    np.savez(tmp_path / "numbers.npz", X=np.float64(1), y=np.float64(1), ids=np.array("a"))
    for name, word in (("empty.npz", "No data left"), ("junk.npz", "no readable"), ("one.npy", "without a name"),
                       ("names.npz", "are no text"), ("numbers.npz", "one of each for every row")):  # fmt: skip
        with pytest.raises(UsageError, match=word):
            read_table(tmp_path / name)
    from safetensors.numpy import save_file

    save_file({"X": np.ones((2, 2)), "y": np.array([0.5, 1.0])}, tmp_path / "rows.safetensors")
    assert list(read_table(tmp_path / "rows.safetensors").ids) == ["0", "1"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return (int(ended.value.code or 0), *capsys.readouterr())


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_table(table(), tmp_path / "rows.npz")
    head = tmp_path / "head"
    code, out, _ = run(capsys, "head", "fit", "--out", head, "--features", rows, "--l2", 0.1, "--radius", 4,
                       "--private-noise", 5, "--epsilon", 1, "--delta", 1e-3)  # fmt: skip
    assert code == 0 and "240 rows" in out and "more single rows fit" in out and unearned(out) == ()
    code, out, _ = run(capsys, "head", "remove", head, "r1", "r2", "c30")
    assert code == 0 and "234 rows" in out and "theorem 3" in out
    assert unearned(out, [guarantee(load_head(head))]) == ()
    code, out, _ = run(capsys, "head", "remove", head, "r7", "--retrain", "--json")
    told = json.loads(out)
    assert told["taken_out"]["by"] == "newton to convergence" and told["guarantee"]["kind"] == "certified"
    assert told["budget"]["spent"] < 1e-6
    code, out, _ = run(capsys, "head", "show", head, "--weights", tmp_path / "weights.npz")
    assert code == 0 and "newton step" in out
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as held:
        assert np.array_equal(held["weights"], load_head(head).weights)
        assert "noise" not in held.files
    fit, other = ("head", "fit", "--features", rows, "--out"), tmp_path / "h"
    for arguments, word in (
        (("head", "remove", head, "r1"), "never trained on"),
        (("head", "remove", head), "No row is named"),
        (("head", "remove", tmp_path / "none", "r1"), "There is no head"),
        ((*fit, other, "--epsilon", 1), "together"),
        (("head", "fit", "--out", other), "--features"),
        ((*fit, head), "There is a head"),
        (("head", "fit", "--out", head, "--model", "none", "--site", "resid_post.0"), "There is a head"),
        ((*fit, other, "--loss", "logistics"), "did you mean 'logistic'"),
        ((*fit, other, "--output-noise", 1, "--private-noise", 1, "--epsilon", 1, "--delta", 1e-3), "one of them"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and word in " ".join(err.split()), err


def test_a_file_cut_short_is_no_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(_: Any) -> None:
        raise EOFError("No data left in file")

    monkeypatch.setattr("repforget.linear.load_head", short)
    code, _, err = run(capsys, "head", "show", tmp_path)
    assert code == 1 and "Unexpected EOFError: No data left in file" in err and "Interrupted" not in err
