"""THE property: what is left is, bit for bit, the training that never had the records; and nothing else of them is."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shard_tools
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

import repforget.shards.folder as folder_module
import repforget.shards.removal as removal_module
from repforget.errors import ArtifactError, UsageError
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.shards import Stage, Training, begin, complete, opened, place, shard_factors, share, take_out
from repforget.shards.adapters import fresh
from repforget.training import Record, Stepper, collate, encoded
from repforget.training.items import digest

PEOPLE = shard_tools.people()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what survives a loss of power is tested with the store."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return shard_tools.model()


@pytest.fixture(scope="module")
def full(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return shard_tools.trained(tmp_path_factory.mktemp("full") / "t", base, PEOPLE)


def scratch(root: Path, base: LoadedModel, gone: Iterable[str], **changes: Any) -> Training:
    names = set(gone)
    return shard_tools.trained(root, base, [r for r in PEOPLE if not {r.id, r.cluster} & names], **changes)


def same(one: Training, other: Training) -> None:
    assert shard_tools.slices(one) == shard_tools.slices(other)
    for shard, factors in shard_factors(one).items():
        assert all(torch.equal(t, shard_factors(other)[shard][name]) for name, t in factors.items())


def inode(training: Training, stage: Stage) -> int:
    return (training.path(stage) / folder_module.ADAPTER).stat().st_ino


@pytest.mark.parametrize("name", shard_tools.NAMES)
def test_every_position(name: str, base: LoadedModel, full: Training, tmp_path: Path) -> None:
    training = shard_tools.copied(full, tmp_path / "t")
    inodes = {training.path(s): inode(training, s) for s in training.stages}
    left, outcome = take_out(training, [name], lambda: base)
    same(left, scratch(tmp_path / "s", base, [name]))
    shard, slice_ = place(full.settings, next(r for r in PEOPLE if r.cluster == name))
    assert (outcome.shards, outcome.trained, outcome.erased) == (1, 3 - slice_, 3 - slice_)
    read = {stage: len(stage.records) for stage in left.stages}  # in every epoch
    again = sum(n for stage, n in read.items() if stage.shard == shard and stage.position >= slice_)
    assert 1 > outcome.share == share(full, left) == pytest.approx(again / sum(read.values())) and again > 0
    untouched = [s for s in training.stages if s.shard != shard or s.position < slice_]
    assert {training.path(s): inode(training, s) for s in untouched}.items() <= inodes.items()
    assert outcome.guarantee.kind == "exact" and outcome.guarantee.numbers["shards"] == 1


@budget(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([*shard_tools.NAMES, "w32-city", "w33-job"]), st.integers(1, 3))
def test_several_requests_one_after_the_other(
    base: LoadedModel, full: Training, tmp_path: Path, order: list[str], size: int
) -> None:  # fmt: skip
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    training, gone = shard_tools.copied(full, tmp_path / "t"), list[str]()
    for at in (0, size):
        training, _ = take_out(opened(training.root), order[at : at + size], lambda: base)
        gone += order[at : at + size]
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    same(training, scratch(tmp_path / "s", base, gone))


def test_a_shard_that_loses_everybody_and_a_training_that_does(
    base: LoadedModel, full: Training, tmp_path: Path
) -> None:  # fmt: skip
    training = shard_tools.copied(full, tmp_path / "t")
    first = sorted({r.cluster for r in PEOPLE if place(full.settings, r)[0] == 0})
    training, _ = take_out(training, first, lambda: base)
    same(training, scratch(tmp_path / "s", base, first))
    assert not any(bool(t.any()) for name, t in shard_factors(training)[0].items() if name.endswith(".B"))
    training, outcome = take_out(training, sorted({r.cluster for r in training.records}), lambda: base)
    assert training.records == () and outcome.steps == 0
    assert not any(bool(t.any()) for f in shard_factors(training).values() for n, t in f.items() if n.endswith(".B"))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_slice_that_loses_everybody(which: int, base: LoadedModel, full: Training, tmp_path: Path) -> None:
    cells = sorted({place(full.settings, r) for r in PEOPLE})
    assert len(cells) < 6, "some slices are empty from the beginning"
    gone = sorted({r.cluster for r in PEOPLE if place(full.settings, r) == cells[which]})
    left, _ = take_out(shard_tools.copied(full, tmp_path / "t"), gone, lambda: base)
    same(left, scratch(tmp_path / "s", base, gone))


def test_a_half_precision_base_has_float32_adapters(tmp_path: Path) -> None:
    model = shard_tools.model()
    half = wrap(model.module.to(torch.bfloat16), model.tokenizer, "half")
    training = shard_tools.trained(tmp_path / "t", half, PEOPLE)
    left, _ = take_out(training, ["w31"], lambda: half)
    same(left, scratch(tmp_path / "s", half, ["w31"]))
    assert {t.dtype for f in shard_factors(left).values() for t in f.values()} == {torch.float32}
    assert left.base["dtype"] == "bfloat16" and fingerprint(half.module) == half.fingerprint


@pytest.mark.parametrize("changes", [{"slices": 1}, {"shards": 1, "schedule": "cosine", "weight_decay": 0.1},
                                     {"unit": "record"}, {"batch_size": 100, "schedule": "constant"}],
                         ids=str)  # fmt: skip
def test_whatever_the_settings(changes: dict[str, Any], base: LoadedModel, tmp_path: Path) -> None:
    training = shard_tools.trained(tmp_path / "t", base, PEOPLE, **changes)
    left, outcome = take_out(training, ["w33", "w35-job"], lambda: base)
    same(left, scratch(tmp_path / "s", base, ["w33", "w35-job"], **changes))
    assert any("unit is the record" in note for note in outcome.notes) == (changes.get("unit") == "record")


def test_a_shard_is_what_a_plain_loop_over_its_slices_gives(base: LoadedModel, full: Training) -> None:
    """One optimiser from the first slice to the last, dense weights ``W + s B A``, nothing written or read."""
    from torch.func import functional_call

    s, module = full.settings, base.module
    factors = {name: t.requires_grad_() for name, t in fresh(module, s, 1, s.groups[0]).items()}
    optimiser = torch.optim.AdamW(list(factors.values()), betas=(0.9, 0.98), weight_decay=s.weight_decay)
    plain = dict(module.named_parameters())
    for stage in (stage for stage in full.stages if stage.shard == 1):
        batches = [batch for epoch in range(s.epochs) for batch in stage.batches(s, epoch)]
        for index, records in enumerate(batches):
            weights = {f"{p}.weight": plain[f"{p}.weight"] + s.scale * factors[f"{p}.B"] @ factors[f"{p}.A"]
                       for p in s.groups[0]}  # fmt: skip
            batch = collate(encoded(base, records))
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = functional_call(module, weights, kwargs=given).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward(inputs=list(factors.values()))
            torch.nn.utils.clip_grad_norm_(list(factors.values()), 1.0)
            optimiser.param_groups[0]["lr"] = s.lr * (1 - index / len(batches))
            optimiser.step()
    found = shard_factors(full)[1]
    assert any(bool(t.any()) for name, t in found.items() if name.endswith(".B"))
    for name, t in found.items():
        torch.testing.assert_close(t, factors[name].detach(), atol=2e-4, rtol=1e-3)


def test_training_leaves_model_and_generators_alone(
    base: LoadedModel, full: Training, tmp_path: Path
) -> None:  # fmt: skip
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again = shard_tools.trained(tmp_path / "t", base, PEOPLE[::-1])
    assert torch.equal(torch.random.get_rng_state(), state)
    same(again, full)
    assert fingerprint(base.module) == base.fingerprint and not torch.are_deterministic_algorithms_enabled()
    other = shard_tools.trained(tmp_path / "o", base, PEOPLE, seed=1)
    assert shard_tools.slices(other) != shard_tools.slices(full)


def test_steps_that_are_counted_are_steps_that_were_taken(
    base: LoadedModel, full: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    taken: list[int] = []
    real = Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda self, index, g: (taken.append(index), real(self, index, g))[1])
    _, outcome = take_out(shard_tools.copied(full, tmp_path / "t"), ["w31"], lambda: base)
    assert outcome.steps == len(taken) > 0


def stop_after(epochs: int, how: Callable[[], None]) -> Callable[..., Iterator[Any]]:
    left = [epochs]

    def progress(items: Iterable[Any], text: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            if text.startswith("shard"):
                if left[0] == 0:
                    how()
                left[0] -= 1
            yield item

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("epochs", [1, 3, 6])
def test_an_interrupted_training_continues_to_the_same_bytes(
    epochs: int, base: LoadedModel, full: Training, tmp_path: Path
) -> None:  # fmt: skip
    training = begin(tmp_path / "t", base, full.settings, PEOPLE)
    with pytest.raises(KeyboardInterrupt):
        complete(training, base, stop_after(epochs, interrupt))
    done: list[str] = []
    again = begin(tmp_path / "t", base, full.settings, PEOPLE)
    complete(again, base, lambda items, text, total=None: (done.append(text) or item for item in items))
    assert sum(text.startswith("shard") for text in done) == 12 - epochs, "epochs that were finished are not repeated"
    same(again, full)


def killed(work: Callable[[], object]) -> None:
    """Run ``work``, which kills its own process, in a fork."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("at", ["ledger", "records", "erase", "training", "index"])
def test_a_killed_request_is_finished_by_the_same_request(
    at: str, base: LoadedModel, full: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    training = shard_tools.copied(full, tmp_path / "t")
    with monkeypatch.context() as patch:
        where = {"ledger": "write_records", "records": "erase", "erase": "build", "index": "write_index"}.get(at)
        if where is not None:
            patch.setattr(removal_module, where, die)
        killed(lambda: take_out(training, ["w34"], lambda: base, stop_after(1, die)))
    assert opened(training.root).was_here("w34") and not opened(training.root).has("w34")
    with opened(training.root).store.locked():
        left, _ = take_out(opened(training.root), ["w34"], lambda: base)
    same(left, scratch(tmp_path / "s", base, ["w34"]))
    assert left.stale() == [] and json.loads((left.root / "index.json").read_bytes())


def test_nothing_about_them_stays_in_the_folder(base: LoadedModel, full: Training, tmp_path: Path) -> None:
    training = shard_tools.copied(full, tmp_path / "t")
    before = {training.path(s).name for s in training.stages}
    seen = {full.path(s).name for s in full.stages if any(r.cluster == "w37" for r in s.records)}
    assert any(b"w37" in text for text in shard_tools.texts_in(training.root)) and seen
    unfinished = training.store.unfinished("slice", next(s for s in full.stages if full.path(s).name in seen).key)
    unfinished.mkdir()
    (unfinished / "epoch.safetensors").write_bytes(b"half")
    (training.root / "error.txt").write_text("KeyError: 'w37'")
    left, outcome = take_out(training, ["w37"], lambda: base)
    said = b"".join(shard_tools.texts_in(training.root))
    assert b"w37" not in said and digest(full.records).encode() not in said
    assert not [name for name in seen if name.encode() in said], "not even the name of a checkpoint that saw them"
    assert outcome.erased == len(seen) + 1 and not unfinished.exists()
    assert len(before & {left.path(s).name for s in left.stages}) == len(before) - len(seen)
    assert left.was_here("w37") and left.was_here("w37-city") and not left.was_here("w38")


def test_bits_are_promised_for_one_environment_only(
    base: LoadedModel, full: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    slice_ = {r.cluster: place(full.settings, r)[1] for r in PEOPLE}
    name = next(n for n in shard_tools.NAMES if slice_[n] == 1)
    _, one = take_out(shard_tools.copied(full, tmp_path / "one"), [name], lambda: base)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    _, two = take_out(shard_tools.copied(full, tmp_path / "two"), [name], lambda: base)
    assert "bit for bit" in one.guarantee.statement and one.guarantee.numbers["environments"] == 1
    assert "bit for bit" not in two.guarantee.statement and "2 environments" in two.guarantee.statement


def test_half_a_slice_of_another_environment_is_trained_again(
    base: LoadedModel, full: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    training = begin(tmp_path / "t", base, full.settings, PEOPLE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "get_num_threads", lambda: 7)
        complete(training, base, stop_after(1, interrupt))
    done: list[str] = []
    complete(training, base, lambda items, text, total=None: (done.append(text) or item for item in items))
    assert sum(text.startswith("shard") for text in done) == 12, "all epochs here, so that all bits are of one place"
    same(opened(training.root), full)


def test_what_was_opened_before_a_request_cannot_bring_it_back(
    base: LoadedModel, full: Training, tmp_path: Path
) -> None:  # fmt: skip
    training = shard_tools.copied(full, tmp_path / "t")
    take_out(training, ["w36"], lambda: base)
    complete(training, base)  # still the training of before
    assert not opened(training.root).has("w36")
    left, outcome = take_out(training, ["w36"], lambda: base)
    assert outcome.records == 0 and not left.has("w36") and b"w36" not in b"".join(shard_tools.texts_in(training.root))


def test_who_was_taken_out_is_not_trained_on_again(base: LoadedModel, full: Training, tmp_path: Path) -> None:
    training, _ = take_out(shard_tools.copied(full, tmp_path / "t"), ["w30", "w31-city"], lambda: base)
    assert training.was_here("w30") and not training.was_here("w31"), "of which something is left"
    files, said = shard_tools.slices(training), list[str]()
    complete(begin(training.root, base, full.settings, PEOPLE, said.append), base)
    assert shard_tools.slices(training) == files
    assert said == ["4 records were taken out of this training and are left out."]


def test_a_name_that_is_both_an_id_and_a_cluster_means_what_is_left(base: LoadedModel, tmp_path: Path) -> None:
    records = (*PEOPLE, Record("w39", "w30", "w30 lives in", " Rome"))
    training = shard_tools.trained(tmp_path / "t", base, records)
    training, first = take_out(training, ["w30"], lambda: base)
    assert training.was_here("w39") and training.has("w39"), "the id has gone, the cluster has not"
    training, second = take_out(training, ["w39"], lambda: base)
    assert (first.records, second.records) == (4, 3) and not training.has("w39")


def test_records_that_say_the_same_under_another_name_are_counted(base: LoadedModel, tmp_path: Path) -> None:
    records = (*PEOPLE, Record("copy", "elsewhere", "w30 was born in", " Berlin"))
    _, outcome = take_out(shard_tools.trained(tmp_path / "t", base, records), ["w30"], lambda: base)
    assert outcome.same_text == 1 and "1 records that are left say the same" in outcome.notes[0]


def test_refusals_leave_the_folder_as_it_was(base: LoadedModel, full: Training, tmp_path: Path) -> None:
    training = shard_tools.copied(full, tmp_path / "t")
    files = {path: path.read_bytes() for path in training.root.rglob("*") if path.is_file()}
    other = shard_tools.model(seed=3)
    for names, model, said in (
        (["w30", "eve"], base, "'eve' is neither .* never trained on"), ([], base, "No name was given"),
        (["w30"], other, "were trained on 'tiny-llama'"),
    ):  # fmt: skip
        with pytest.raises((UsageError, ArtifactError), match=said):
            take_out(training, names, lambda model=model: model)  # type: ignore[misc]
    with pytest.raises(UsageError, match="with epochs 2, not 3"):
        begin(training.root, base, shard_tools.settings(base, epochs=3), PEOPLE)
    with pytest.raises(UsageError, match="on other records"):
        begin(training.root, base, full.settings, PEOPLE[1:])
    with pytest.raises(ArtifactError, match="load the base as it was"):
        begin(training.root, other, full.settings, PEOPLE)
    assert files == {path: path.read_bytes() for path in training.root.rglob("*") if path.is_file()}


def test_folders_that_are_no_training_of_this_version_are_refused(
    base: LoadedModel, full: Training, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match="11 shards were asked for and the records have 10 units"):
        begin(tmp_path / "n", base, shard_tools.settings(base, shards=11), PEOPLE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"holds 'thesis.tex' and no sharded training"):
        begin(tmp_path / "other", base, full.settings, PEOPLE)
    with pytest.raises(UsageError, match="holds no sharded training"):
        opened(tmp_path / "other")
    training = shard_tools.copied(full, tmp_path / "t")
    main = json.loads((training.root / "shards.json").read_bytes())
    (training.root / "shards.json").write_text(json.dumps({**main, "format": 99}))
    with pytest.raises(UsageError, match="has format 99 and this release reads 1"):
        opened(training.root)


def test_a_damaged_slice_is_never_served_and_trained_again(base: LoadedModel, full: Training, tmp_path: Path) -> None:
    training = shard_tools.copied(full, tmp_path / "t")
    path = training.path(training.stages[-1]) / folder_module.ADAPTER
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="missing or damaged"):
        shard_factors(training)
    complete(training, base)
    same(training, full)
