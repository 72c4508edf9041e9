"""Publishing with fresh noise: the promise against the densities themselves, what is counted, and where it ends."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from test_linear_head import run, table  # the same small rows

from repforget.errors import ResourceError, UsageError
from repforget.gaussian import gaussian_distance
from repforget.guarantee import unearned
from repforget.linear import (
    Release,
    Table,
    change_logistic,
    fit_head,
    fit_logistic,
    guarantee,
    load_head,
    publications_left,
    publish,
    remove,
    save_head,
    spent,
    utility,
    write_table,
)  # fmt: skip

E, D = 0.5, 1e-3


def told_apart(epsilon: float, distance: float) -> float:
    """The delta at ``epsilon`` of two unit Gaussians this far apart, by integrating what one has beyond the other."""
    end = distance / 2 - epsilon / distance  # one exceeds exp(epsilon) times the other below it

    def beyond(z: float) -> float:
        return (math.exp(-(z**2) / 2) - math.exp(epsilon - (z - distance) ** 2 / 2)) / math.sqrt(2 * math.pi)

    return float(integrate.quad(beyond, min(end, 0) - 12, end, epsabs=1e-14)[0])


def steep(n: int = 200, lam: float = 0.2) -> tuple[Table, np.ndarray]:
    """Rows for which the bounds are nearly met, and the places of those to take out: the few of the other class."""
    y = np.where(np.arange(n) < 0.95 * n, "yes", "no")
    rows = Table(np.ones((n, 1)), y, np.arange(n).astype(np.str_), np.arange(n).astype(np.str_))
    return rows, np.flatnonzero(y == "no")[:5]


def test_the_densities_of_a_head_that_forgot_and_of_a_retrained_one_are_as_close_as_promised() -> None:
    """With the least noise that is accepted; much less would not do, nor a step that forgets the penalty."""
    rows, gone = steep()
    x, y = np.ones((200, 1)), np.where(rows.y == "yes", 1.0, -1.0)[:, None]
    names, rest = rows.ids[gone], np.delete(np.arange(200), gone)
    again = fit_logistic(x[rest], y[rest], 0.2)
    bound = remove(fit_head(rows, "logistic", 0.2, release=Release(E, D, 1.0)), rows, names).distance
    tau = bound / gaussian_distance(E, D)
    with pytest.raises(ResourceError, match="retrain"):
        remove(fit_head(rows, "logistic", 0.2, release=Release(E, D, 0.999 * tau)), rows, names)
    found = remove(fit_head(rows, "logistic", 0.2, release=Release(E, D, 1.001 * tau)), rows, names)
    missed = float(np.linalg.norm(found.weights - again.weights))
    assert told_apart(E, missed / tau) <= D < told_apart(E, 1.2 * missed / tau)
    head = fit_logistic(x, y, 0.2)
    new, _ = change_logistic(head, x[gone], y[gone])
    whole = new.hessian[0] + 0.2 * new.n  # the step without the penalty of the rows that go
    bare = new.weights - 5 * 0.2 * head.weights / whole
    assert told_apart(E, float(np.linalg.norm(bare - again.weights)) / tau) > D
    assert told_apart(E, float(np.linalg.norm(head.weights - again.weights)) / tau) > D


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.01, 0.1, 1.0]), st.integers(2, 3))
def test_whichever_rows_go_the_distance_is_a_bound(seed: int, lam: float, classes: int) -> None:
    """Over requests for the surest rows or for the least sure ones, step upon step."""
    rows = table(60, classes, seed)
    head = fit_head(rows, "logistic", lam, radius=3.0, release=Release(1.0, 1e-3, 1e6))
    for _ in range(3):
        pull = np.abs(head.scores(rows.x)).max(1) * (1 if seed % 2 else -1)
        names = rows.ids[np.argsort(pull)[:4]]
        head = remove(head, rows, names)
        rows = rows.only(np.flatnonzero(~np.isin(rows.ids, names)))
        again = fit_head(rows, "logistic", lam, radius=3.0)
        assert np.linalg.norm(head.weights - again.weights) <= head.distance + again.distance
    assert remove(head, rows, retrain=True).distance < 1e-6 * head.distance


@pytest.mark.parametrize("loss,lam", [("ridge", 1.0), ("softmax", 1.0), ("logistic", 0.1)])
def test_every_loss_can_be_published_with_noise(loss: Any, lam: float, tmp_path: Path) -> None:
    rows = table()
    head = remove(fit_head(rows, loss, lam, radius=4.0, release=Release(1.0, 1e-3, 0.1)), rows, ["r1", "c5"])
    folder = save_head(publish(head)[0], tmp_path / "head")
    found = load_head(folder)
    assert found.release == head.release and len(found.published) == 1 and spent(found) == head.distance
    claim = guarantee(found)
    assert claim.kind == "certified" and claim.numbers["publications"] == 1
    assert claim.numbers["epsilon with the next publication"] <= 1.0
    assert unearned(" ".join(text for line in claim.lines() for text in line), [claim]) == ()
    assert "now without the 5 rows" in claim.statement


def test_a_folder_of_the_release_before_is_read(tmp_path: Path) -> None:
    folder = save_head(fit_head(table(), "ridge", 1.0), tmp_path / "head")
    body = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps({**body, "format": 1, "release": None}))
    assert load_head(folder).release is None


def test_publications_add_up_and_end() -> None:
    rows, gone = steep()
    release = Release(E, D, 1.0)
    head = remove(fit_head(rows, "logistic", 0.2, release=release), rows, rows.ids[gone])
    head = dataclasses.replace(head, release=Release(E, D, 3.01 * head.distance / gaussian_distance(E, D)))
    assert head.release is not None and publications_left(head, head.release) == 9
    for _ in range(9):
        head, _ = publish(head)
        assert head.release is not None and publications_left(head, head.release) == 9 - len(head.published)
    assert spent(head) == pytest.approx(3 * head.distance) and len(head.published) == 9
    with pytest.raises(ResourceError, match="9 publications have used"):
        publish(head)
    with pytest.raises(ResourceError):
        remove(head, rows, ["0"])
    again = remove(head, rows, retrain=True)
    assert again.n == head.n and len(publish(again)[0].published) == 10
    assert "past and next" in guarantee(again).statement


def test_publications_that_answer_to_one_another_are_no_easier_to_tell_apart() -> None:
    """Two publications, the second's distance chosen by what the first showed, their squares within the budget.

    Delta at every cut of the first, by integrating over it what the second has to give; twice the second breaks it.
    """
    whole = gaussian_distance(E, D)
    first = 0.6 * whole

    def delta(second: float, stop: float) -> float:
        def part(z: float) -> float:
            ratio = first**2 / 2 - first * z  # log of p / q at z, p centred at 0
            if z > stop:
                return float(stats.norm.pdf(z) * max(0.0, 1 - math.exp(E - ratio)))
            return float(stats.norm.pdf(z) * told_apart_any(E - ratio, second))

        return integrate.quad(part, -9, 9, points=[stop], epsabs=1e-11, limit=200)[0]

    def told_apart_any(epsilon: float, r: float) -> float:
        return float(stats.norm.cdf(r / 2 - epsilon / r) - math.exp(epsilon) * stats.norm.cdf(-r / 2 - epsilon / r))

    assert [delta(0.8 * whole, stop) <= D * (1 + 1e-6) for stop in (-1.0, 0.0, 9.0)] == [True] * 3
    assert delta(0.8 * whole, 9.0) == pytest.approx(D, rel=1e-4)
    assert delta(1.6 * whole, 0.0) > D


@pytest.mark.parametrize("epsilon,delta", [(0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-9)])
def test_the_noise_is_the_least_that_does_by_another_computation(epsilon: float, delta: float) -> None:
    found = Release(epsilon, delta, 2.0).limit
    root = optimize.brentq(lambda r: told_apart(epsilon, r) - delta, 1e-2, 20.0, xtol=1e-12)
    assert found == pytest.approx(2 * root, rel=1e-4)
    if epsilon < 1:
        assert found > 2 * epsilon / math.sqrt(2 * math.log(1.25 / delta)), "the classic rule asks for more noise"


@pytest.mark.parametrize("epsilon,delta", [(1028.0801431515447, 9.657268487290666e-12), (8.520206, 5.2234871e-14),
                                           (0.00014773337170991986, 1.2884127549681367e-14)])  # fmt: skip
def test_rounding_far_out_does_not_make_the_distance_larger(epsilon: float, delta: float) -> None:
    """Deviations at which float64 alone errs by more than one part in 10^14, against 50 digits."""
    with mpmath.workdps(50):
        e, r = mpmath.mpf(epsilon), mpmath.mpf(gaussian_distance(epsilon, delta))
        real = mpmath.ncdf(r / 2 - e / r) - mpmath.exp(e) * mpmath.ncdf(-r / 2 - e / r)
        assert delta * (1 - 1e-6) < real <= delta


def test_what_is_published_is_fresh_noise_on_a_coarse_grid() -> None:
    rows = table()
    head = fit_head(rows, "ridge", 1.0, release=Release(1.0, 1e-3, 0.3))
    seen = np.stack([publish(head)[1] for _ in range(300)])
    drawn = ((seen - head.weights) / 0.3).ravel()
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    assert len(np.unique(drawn)) > 0.7 * len(drawn), "each publication has its own"
    assert np.array_equal(seen, np.round(seen * 4096) / 4096), "a power of two near .3 / 1024"
    bare = fit_head(rows, "ridge", 1.0)
    assert publish(bare)[0] is bare and np.array_equal(publish(bare)[1], bare.weights)


def test_what_the_noise_costs_is_told() -> None:
    rows = table()
    head = fit_head(rows, "logistic", 0.1, radius=4.0, release=Release(1.0, 1e-3, 0.5))
    two = rows.only(np.flatnonzero(rows.y != "elm"))
    binary = fit_head(two, "logistic", 0.1, radius=4.0, release=Release(1.0, 1e-3, 0.5))
    found = utility(binary, two)
    from repforget.linear.rows import prepared

    held = prepared(two.x, 4.0, False)
    margin = (held @ binary.weights)[:, 0] * np.where(two.y == "bay", 1, -1)
    expected = stats.norm.cdf(margin / (0.5 * np.linalg.norm(held, axis=1))).mean()
    assert found["published"] == pytest.approx(expected, abs=0.05) and found["without noise"] == (margin > 0).mean()
    assert found["published"] < found["without noise"]
    assert utility(head, rows)["without noise"] == (head.predict(rows.x) == rows.y).mean()
    numbers = dataclasses.replace(rows, y=rows.x[:, 0] * 2)
    ridge = fit_head(numbers, "ridge", 1.0, release=Release(1.0, 1e-3, 2.0))
    lengths = (rows.x**2).sum(1).mean()
    assert utility(ridge, numbers)["published"] == pytest.approx(2 * math.sqrt(lengths), rel=0.3)


def test_promises_that_cannot_be_made() -> None:
    from repforget.linear import Budget

    for epsilon, delta, tau in ((0, 1e-3, 1), (math.inf, 1e-3, 1), (1, 0, 1), (1, 1, 1), (1, 1e-3, 0),
                                (1, 1e-3, 5e-324)):  # fmt: skip
        with pytest.raises(UsageError):
            Release(epsilon, delta, tau)
    release, rows = Release(1.0, 1e-3, 1.0), table()
    with pytest.raises(UsageError, match="give one of them"):
        fit_head(rows, "logistic", 1.0, radius=4.0, release=release, budget=Budget(1.0, 1e-3, 1.0))
    with pytest.raises(UsageError, match="exceeds 1/n"):
        fit_head(rows, "ridge", 1.0, release=Release(1.0, 1e-2, 1.0))
    with pytest.raises(UsageError, match="give a radius"):
        fit_head(rows, "logistic", 1.0, release=release)
    with pytest.raises(ResourceError, match="retrain"):
        fit_head(rows, "ridge", 1e-9, release=Release(1e-3, 1e-3, 1e-15))


def test_publishing_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    rows, folder = write_table(table(), tmp_path / "rows.npz"), tmp_path / "head"
    code, out, _ = run(capsys, "head", "fit", "--out", folder, "--features", rows, "--l2", 0.1, "--radius", 4,
                       "--output-noise", 0.02, "--epsilon", 1, "--delta", 1e-3)  # fmt: skip
    assert code == 0 and "published with noise" in out and unearned(out) == ()
    seen = []
    for name in ("a.npz", "b.npz"):
        code, out, _ = run(capsys, "head", "show", folder, "--weights", tmp_path / name)
        assert code == 0 and "one sample, counted" in out
        with np.load(tmp_path / name) as held:
            seen.append(held["weights"])
    head = load_head(folder)
    assert len(head.published) == 2 and not np.array_equal(*seen)
    assert all(0 < np.abs(each - head.weights).max() < 0.2 for each in seen)
    code, _, err = run(capsys, "head", "remove", folder, *(f"c{k}" for k in range(40)))
    assert code != 0 and "--retrain" in err and load_head(folder).n == 240
    code, out, _ = run(capsys, "head", "remove", folder, *(f"c{k}" for k in range(40)), "--retrain")
    assert code == 0 and load_head(folder).n == 80 and "still holds these rows" in out
    code, out, _ = run(capsys, "head", "remove", folder, "--retrain", "--json")
    assert code == 0 and json.loads(out)["taken_out"]["rows"] == 0
    assert json.loads(out)["release"]["publications"] == 2

    for taken, word in ((folder / "head.json", "belongs to the head"), (rows, "belongs to the head"),
                        (tmp_path, "is a folder"), (rows / "w.npz", "cannot be written"),
                        ("/proc/w.npz", "cannot be written")):  # fmt: skip
        code, _, err = run(capsys, "head", "show", folder, "--weights", taken)
        assert code != 0 and word in err and len(load_head(folder).published) == 2, "nothing shown, nothing counted"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("repforget.linear.write_weights", killed)
    run(capsys, "head", "show", folder, "--weights", tmp_path / "c.npz")
    assert len(load_head(folder).published) == 3, "counted before anybody can see it"


