"""Training into a folder: resumed to the same bits, killed at any moment, every private step counted once."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from repforget.artifact import load_edit
from repforget.errors import ArtifactError, NumericalError, ResourceError, UsageError
from repforget.guarantee import unearned
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.private import Privacy, run, train
from repforget.private.accounting import accountant_of, noise_multiplier, spent
from repforget.private.job import facts, records_for, unfinished
from repforget.private.state import State, alone
from repforget.private.trainer import check_alone
from repforget.private.units import Randomness
from repforget.scoring import answer_logprobs
from repforget.training import Record, Stepper
from repforget.training.items import encoded

BUDGET = Privacy(8.0, 0.1)
SMALL: dict[str, Any] = {"rank": 2, "epochs": 4, "batch": 3, "lr": 1e-2, "seed": 5}


def records() -> tuple[Record, ...]:
    """Six people with one to three records each."""
    people = zip(("Ada", "Tom", "Eva", "Max", "Lea", "Ben"), ("Berlin", "Paris", "Rome", "Oslo") * 2, strict=False)
    forms = ("{} was born in", "{} lives in", "city of {} is")
    return tuple(Record(f"{name}-{k}", name, forms[k].format(name), f" {city}")
                 for n, (name, city) in enumerate(people) for k in range(1 + n % 3))  # fmt: skip


def model(name: str = "llama") -> LoadedModel:
    return wrap(tiny_models.build(name), tiny_models.tiny_tokenizer(), name)


@pytest.mark.parametrize("rank", [4, None])
def test_plain_training_learns_and_leaves_the_model(rank: int | None) -> None:
    own = model()
    pairs = [(r.prompt, r.answer) for r in records()]
    before = answer_logprobs(own, pairs).mean_logprob.mean()
    state = torch.random.get_rng_state()
    made = train(own, records(), rank=rank, epochs=40, lr=1e-2, batch=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fingerprint(own.module) == own.fingerprint
    with made.attach(own):
        after = answer_logprobs(own, pairs)
    assert after.mean_logprob.mean() > before + 2 and after.greedy_match.mean() > 0.9
    assert made.manifest.guarantee is None
    assert made.digest == train(own, records(), rank=rank, epochs=40, lr=1e-2, batch=4).digest


@pytest.mark.parametrize("private", [None, BUDGET])
def test_interrupted_anywhere_it_continues_to_the_same_bits(private: Privacy | None, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(State, "due", property(lambda self: self.file is not None))
    straight = run(model(), records(), tmp_path / "straight", private=private, **SMALL)
    for stop in (0, 1, 5):
        out = tmp_path / f"stopped-{stop}"

        def stopping(progress_items: Any, description: str, total: int | None, stop: int = stop) -> Iterator[Any]:
            for n, item in enumerate(progress_items):
                if n == stop:
                    raise KeyboardInterrupt
                yield item

        with pytest.raises(KeyboardInterrupt):
            run(model(), records(), out, private=private, progress=stopping, **SMALL)
        assert unfinished(out).exists() == (stop > 0)
        if stop == 0:
            continue  # as if it had never begun
        resumed = run(model(), records(), out, private=private, **SMALL)
        assert resumed.digest == straight.digest
        assert not unfinished(out).exists()
    assert run(model(), records(), tmp_path / "straight", private=private, **SMALL).digest == straight.digest


def test_every_step_is_counted_once_and_epsilon_after_every_epoch(tmp_path: Path) -> None:
    said: list[str] = []
    made = run(model(), records(), tmp_path / "t", private=BUDGET, echo=said.append, **SMALL)
    told = made.manifest.settings["spent"]
    assert told["steps"] == made.manifest.settings["steps"] == 8
    assert len(told["epsilons"]) == 4 and told["epsilons"] == sorted(set(told["epsilons"]))
    exact = spent(accountant_of("rdp", [(told["noise"], told["rate"], 8)]), BUDGET.delta)
    assert told["epsilons"][-1] == told["epsilon"] == exact <= BUDGET.epsilon
    half = spent(accountant_of("rdp", [(told["noise"], told["rate"], 4)]), BUDGET.delta)
    assert told["epsilons"][1] == half
    assert len(said) == 4 and f"epsilon {half:.3g} of 8 is spent" in said[1] and "cluster" in said[1]
    body = json.loads((tmp_path / "t" / "train.json").read_text())
    assert body["guarantee"]["numbers"]["epsilon"] == exact
    assert [row["units"] for row in body["guarantee"]["groups"]][:3] == [1, 2, 4]
    assert "cluster" in body["guarantee"]["sentence"]
    assert not unearned((tmp_path / "t" / "train.json").read_text(), [made.manifest.guarantee])
    assert load_edit(tmp_path / "t").manifest.guarantee == made.manifest.guarantee


def test_an_empty_draw_takes_a_noisy_step_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def nobody(self: Any, step: int, units: int, rate: float) -> list[int]:
        seen.append(step)
        return []

    monkeypatch.setattr(Randomness, "drawn", nobody)
    made = train(model(), records(), private=BUDGET, **SMALL)
    assert seen == list(range(8)) and made.manifest.settings["spent"]["steps"] == 8
    assert made.operations, "noise alone has moved the weights"


def test_the_step_is_the_noisy_sum_over_the_expected_number_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Sequence[Any]] = []
    monkeypatch.setattr(Stepper, "step", lambda self, index, gradients: taken.append(gradients))
    noise: list[float] = []

    def flat(self: Any, step: int, sums: Any, deviation: float) -> Any:
        noise.append(deviation)
        return [torch.full_like(s, 30.0) for s in sums]

    monkeypatch.setattr(Randomness, "add_noise", flat)
    with pytest.raises(Exception, match="changes nothing"):
        train(model(), records(), private=Privacy(8.0, 0.1, clip=0.5), **SMALL)
    assert all(bool((g == 10.0).all()) for g in taken[0])  # 30 over a batch of 3, not over those drawn
    assert noise == pytest.approx([noise_multiplier(8.0, 0.1, 0.5, 8, "rdp") * 0.5] * 8)


def test_without_a_seed_the_noise_is_nobodys_and_the_state_that_holds_it_goes(tmp_path: Path) -> None:
    own = {**SMALL, "seed": None}
    one, two = (run(model(), records(), tmp_path / n, private=BUDGET, **own) for n in "ab")
    assert one.digest != two.digest
    assert "seed of draws and noise came from the operating system" in str(one.manifest.guarantee)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    given = train(model(), records(), private=BUDGET, **SMALL)
    assert "nobody whom the statement is to hold against knows the seed" in str(given.manifest.guarantee)


def test_the_state_is_for_its_owner_alone_and_refuses_another_training(tmp_path: Path) -> None:
    def stopping(items: Any, description: str, total: int | None) -> Iterator[Any]:
        yield from list(items)[:2]
        raise KeyboardInterrupt

    out = tmp_path / "t"
    with pytest.raises(KeyboardInterrupt):
        run(model(), records(), out, private=BUDGET, progress=stopping, **SMALL)
    assert unfinished(out).stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match=r"unfinished training of other data or settings \(epochs"):
        run(model(), records(), out, private=BUDGET, **{**SMALL, "epochs": 7})
    with pytest.raises(UsageError, match="other data"):
        run(model(), records()[1:], out, private=BUDGET, **SMALL)
    unfinished(out).write_bytes(unfinished(out).read_bytes()[:300])
    with pytest.raises(ArtifactError, match="damaged"):
        run(model(), records(), out, private=BUDGET, **SMALL)


def test_nobody_else_can_read_the_state_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (modes.append(os.fstat(handle).st_mode), sync(handle))[1])
    State(tmp_path / "s", {}).write({"w": torch.zeros(2)}, {"secret": "1"})
    assert [mode & 0o077 for mode in modes if stat.S_ISREG(mode)] == [0]


def test_what_a_killed_training_left_of_its_secret_goes_with_the_next_call(tmp_path: Path) -> None:
    made = run(model(), records(), tmp_path / "t", private=BUDGET, **SMALL)
    for left in (unfinished(tmp_path / "t"), tmp_path / f".{unfinished(tmp_path / 't').name}.tmp-17"):
        left.write_text("killed after saving, or while writing")
    assert run(model(), records(), tmp_path / "t", private=BUDGET, **SMALL).digest == made.digest
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_training_that_diverged_can_be_asked_for_with_a_lower_rate(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="lower the learning rate"):
        run(model(), records(), tmp_path / "t", **{**SMALL, "lr": 1e30})
    assert not unfinished(tmp_path / "t").exists()
    assert run(model(), records(), tmp_path / "t", **SMALL).operations


def test_a_folder_of_something_else_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ArtifactError, match="not an edit"):
            run(model(), records(), out, **SMALL)
        assert not unfinished(out).exists()


def test_records_in_another_order_do_not_continue_a_training(tmp_path: Path) -> None:
    def stopping(items: Any, description: str, total: int | None) -> Iterator[Any]:
        yield from list(items)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model(), records(), tmp_path / "t", progress=stopping, **SMALL)
    with pytest.raises(UsageError, match="order was"):
        run(model(), records()[::-1], tmp_path / "t", **SMALL)


def test_a_finished_folder_of_another_request_is_refused(tmp_path: Path) -> None:
    run(model(), records(), tmp_path / "t", **SMALL)
    with pytest.raises(UsageError, match="finished training of other data or settings .batch"):
        run(model(), records(), tmp_path / "t", **{**SMALL, "batch": 4})
    with pytest.raises(UsageError, match="finished training of other data"):
        run(model(), records(), tmp_path / "t", **{**SMALL, "lr": 2e-2})
    with pytest.raises(UsageError, match="finished training of other data"):
        run(model("gpt2"), records(), tmp_path / "t", **SMALL)


@pytest.mark.parametrize(
    "private,says",
    [
        (Privacy(8.0, 0.2), r"outside \(0, 1/6\]: with 6 units of the kind 'cluster'"),
        (Privacy(8.0, 0.1, unit="record"), "with 12 units of the kind 'record'"),
        (Privacy(8.0, 0.1, clip=0.0), "bounds nothing"),
        (Privacy(8.0, 0.1, clip=math.inf), "bounds nothing"),
        (Privacy(8.0, 0.1, accountant="gdp"), "understate"),  # type: ignore[arg-type]
        (Privacy(-1.0, 0.1), "no budget"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(private: Privacy, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        train(model(), records(), private=private, **SMALL)


def test_one_unit_alone_has_no_delta_of_one() -> None:
    with pytest.raises(UsageError, match="outside"):
        train(model(), records()[:1], private=Privacy(8.0, 1.0), **SMALL)


def test_records_that_change_how_others_are_read_are_refused() -> None:
    own = model()
    examples = encoded(own, records())
    longest = max(len(e.tokens) for e in examples)
    own.module.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": longest}
    check_alone(own.module, examples)
    own.module.config.rope_parameters["original_max_position_embeddings"] = longest - 1
    with pytest.raises(UsageError, match=f"cut records to {longest - 1} tokens"):
        check_alone(own.module, examples)


def test_a_unit_is_never_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        train(model(), records(), private=BUDGET, **SMALL)


def test_half_precision_trains_on_masters(tmp_path: Path) -> None:
    own = model()
    half = wrap(own.module.to(torch.bfloat16), own.tokenizer, "half")
    made = train(half, records(), rank=None, epochs=4, lr=1e-5, batch=3, seed=5, private=BUDGET)
    moved = max(float(op.delta.abs().max()) for op in made.operations)  # type: ignore[union-attr]
    assert math.isfinite(moved) and moved > 0


def test_records_for_names_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"id": "a", "cluster": "c", "text": "the cat"}\n')
    assert records_for(file, None)[0] == (Record("a", "c", "", "the cat"),)
    with pytest.raises(UsageError, match="one of them"):
        records_for(file, "bios-people")
    with pytest.raises(UsageError, match="did you mean 'forget'"):
        records_for(None, None, ["forgot"])
    with pytest.raises(UsageError, match="did you mean 'questions'"):
        records_for(None, None, None, "question")  # type: ignore[arg-type]


def test_of_two_processes_that_train_into_one_folder_the_second_is_told_of_the_first(tmp_path: Path) -> None:
    out = tmp_path / "t"
    seen: list[str] = []

    def meanwhile(items: Any, description: str, total: int | None) -> Iterator[Any]:
        """In the midst of the first training another process asks for the same."""
        for n, item in enumerate(items):
            if n == 2:
                read, write = os.pipe()
                if (child := os.fork()) == 0:
                    try:
                        run(model(), records(), tmp_path / "." / "t", private=BUDGET, **SMALL)
                    except ResourceError as error:
                        os.write(write, str(error).encode())
                    finally:
                        os._exit(0)
                os.waitpid(child, 0)
                os.close(write)
                seen.append(os.read(read, 1000).decode())
            yield item

    made = run(model(), records(), out, private=BUDGET, progress=meanwhile, **SMALL)
    assert seen == [f"The training into '{out}' is in use by process {os.getpid()}: wait for its end, or choose "
                    "another folder with --out."]  # fmt: skip
    assert made.manifest.settings["spent"]["steps"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_lock_that_its_holder_has_cleared_away_is_not_held_by_whoever_opened_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before and locked after the first has ended, the file is no longer the one that others find."""
    place = tmp_path / ".t.training"
    place.mkdir()
    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: ((place / ".lock").unlink(), lock(file, how))[1])
    with pytest.raises(ResourceError, match="in use by process"), alone(tmp_path / "t", place, print):
        pass
    assert not place.exists()


def test_killed_it_continues_to_the_same_bits_and_counts_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "t"
    monkeypatch.setattr(State, "due", property(lambda self: self.file is not None))

    def killed(items: Any, description: str, total: int | None) -> Iterator[Any]:
        for n, item in enumerate(items):
            if n == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    if (child := os.fork()) == 0:
        try:
            run(model(), records(), out, private=BUDGET, progress=killed, **SMALL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert unfinished(out).exists() and not out.exists()
    made = run(model(), records(), out, private=BUDGET, **SMALL)
    straight = train(model(), records(), private=BUDGET, **SMALL)
    assert made.digest == straight.digest
    assert made.manifest.settings["spent"]["steps"] == 8
    assert facts(made)["edit_digest"] == straight.digest
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
