"""Shards served together or one by one, blocks that drop out, and the edit of a served model."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import shard_tools
import torch
from torch import Tensor

from repforget.artifact import load_edit
from repforget.edit._dispatch import edit as run_editor
from repforget.errors import ArtifactError, NoEffectError, ResourceError, UsageError
from repforget.knowledge import EditData
from repforget.models.capture import Batch, forward
from repforget.models.load import LoadedModel, load
from repforget.scoring import answer_logprobs, generate
from repforget.shards import (
    Training,
    answers,
    begin,
    best_shard,
    combined,
    complete,
    opened,
    place,
    served,
    shard_edit,
    shard_factors,
    take_out,
)
from repforget.shards.adapters import merged_factors, worn
from repforget.shards.combine import Route

PEOPLE = shard_tools.people()
NOBODY = EditData((), (), (), {}, "none")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model on disk, so that a folder can name it."""
    made, folder = shard_tools.model(), tmp_path_factory.mktemp("base")
    made.module.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return load(str(folder))


@pytest.fixture(scope="module")
def full(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return shard_tools.trained(tmp_path_factory.mktemp("full") / "t", base, PEOPLE, epochs=6)


def logits(model: LoadedModel) -> Tensor:
    return forward(model, Batch.pad([model.tokenizer(r.prompt + r.answer)["input_ids"] for r in PEOPLE[:8]]))


def delta(factors: dict[str, Tensor], path: str) -> Tensor:
    return factors[f"{path}.B"].double() @ factors[f"{path}.A"].double()


def test_side_by_side_is_the_sum_and_averaged_factors_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [{"q.A": torch.randn(4, 16, generator=generator), "q.B": torch.randn(12, 4, generator=generator)}
             for _ in range(3)]  # fmt: skip
    exact = sum(delta(part, "q") for part in parts) / 3
    side = merged_factors([(1 / 3, part) for part in parts])
    assert side["q.A"].shape == (12, 16) and side["q.B"].shape == (12, 12)
    norm = torch.linalg.norm(exact)
    assert float(torch.linalg.norm(delta(side, "q") - exact) / norm) < 1e-6
    mean = {name: sum(part[name] for part in parts) / 3 for name in ("q.A", "q.B")}
    assert float(torch.linalg.norm(delta(mean, "q") - exact) / norm) > 0.3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_the_combined_edit_is_what_the_shards_compute_together(
    architecture: str, combine: str, tmp_path: Path
) -> None:  # fmt: skip
    model = shard_tools.model(architecture)
    names = ("c_proj", "c_attn") if architecture == "gpt2" else ("o_proj", "up_proj")
    training = shard_tools.trained(tmp_path / "t", model, PEOPLE, modules=names, combine=combine)
    edit = combined(training, model)
    parts = [(training.settings.weight, f) for f in shard_factors(training).values()]
    with worn(model.module, merged_factors(parts), training.settings.scale):
        together = logits(model)
    plain = logits(model)
    with edit.attach(model):
        torch.testing.assert_close(logits(model), together, atol=1e-4, rtol=1e-4)
    assert float((together - plain).abs().max()) > 1e-2 and torch.equal(logits(model), plain)
    assert edit.manifest.settings["combine"] == combine
    assert edit.manifest.settings["weight"] == (1.0 if combine == "sum" else 0.5)
    edit.export_peft(model, tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def _by_hand(training: Training, base: LoadedModel, prompt: str, by: str) -> int:
    """The best shard for one prompt, with each shard's edit in place and nothing batched."""
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    scores = []
    for shard in range(training.settings.shards):
        with shard_edit(training, base, shard).attach(base), torch.no_grad():
            logp = base.module(input_ids=ids).logits[0].double().log_softmax(-1)
        said = logp[:-1].gather(-1, ids[0, 1:, None]).mean()
        scores.append(float(logp[-1].max() if by == "confidence" else said))
    return max(range(len(scores)), key=lambda k: scores[k])


def _sureness(training: Training, base: LoadedModel, prompt: str, shard: int | None) -> float:
    """Largest log-probability of the next token, by a shard or by the base itself."""
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    worn = nullcontext() if shard is None else shard_edit(training, base, shard).attach(base)
    with worn, torch.no_grad():
        return float(base.module(input_ids=ids).logits[0, -1].double().log_softmax(-1).max())


def test_a_shard_learns_its_own_records(base: LoadedModel, tmp_path: Path) -> None:
    training = shard_tools.trained(tmp_path / "t", base, PEOPLE, epochs=8, rank=4, slices=1, lr=2e-2)
    shard = {r.id: place(training.settings, r)[0] for r in PEOPLE}
    pairs = {k: [(r.prompt, r.answer) for r in PEOPLE if r.prompt and shard[r.id] == k] for k in (0, 1)}
    before = {k: answer_logprobs(base, own).sum_logprob.mean() for k, own in pairs.items()}
    for k, own in pairs.items():
        edit = shard_edit(training, base, k)
        assert edit.manifest.settings["combine"] == "one" and edit.manifest.settings["shard"] == k
        with edit.attach(base):
            assert answer_logprobs(base, own).sum_logprob.mean() > before[k] + 2
    prompts = [p for own in pairs.values() for p, _ in own][::2]
    routed = {by: best_shard(training, base, prompts, by=by) for by in get_args(Route)}
    assert routed == {by: [_by_hand(training, base, prompt, by) for prompt in prompts] for by in get_args(Route)}
    assert routed["loss"] != routed["confidence"]
    alone = best_shard(training, base, [*prompts, *(f"w{k}" for k in range(20))], base=True)
    for k, own, prompt in zip(alone, routed["confidence"], prompts, strict=False):
        assert k == (own if _sureness(training, base, prompt, own) > _sureness(training, base, prompt, None) else -1)
    assert -1 in alone and set(alone) & {0, 1}
    for (k, text), prompt in zip(answers(training, base, prompts, max_new_tokens=2), prompts, strict=True):
        with shard_edit(training, base, k).attach(base):
            assert generate(base, [prompt], max_new_tokens=2)[0][0] == text
    with pytest.raises(UsageError, match="no shard 2"):
        shard_edit(training, base, 2)


def test_an_unfinished_training_and_an_empty_one_are_not_served(
    base: LoadedModel, full: Training, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match="Shard 0 .* not trained to its end"):
        combined(begin(tmp_path / "t", base, full.settings, PEOPLE), base)
    empty, _ = take_out(shard_tools.copied(full, tmp_path / "e"), shard_tools.NAMES, lambda: base)
    with pytest.raises(NoEffectError):
        combined(empty, base)
    with pytest.raises(ArtifactError, match="load the base as it was"):
        combined(full, shard_tools.model(seed=4))


# --- blocks that drop out ----------------------------------------------------------------------------------------


def never() -> LoadedModel:
    raise AssertionError("nothing may be trained")


@pytest.fixture(scope="module")
def stacked(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return shard_tools.trained(tmp_path_factory.mktemp("s3t") / "t", base, PEOPLE, order="s3t", slices=2,
                               permutations=2)  # fmt: skip


@pytest.mark.parametrize("name", shard_tools.NAMES)
def test_blocks_from_the_affected_slice_on_drop_out_without_training(
    name: str, base: LoadedModel, stacked: Training, tmp_path: Path
) -> None:  # fmt: skip
    training = shard_tools.copied(stacked, tmp_path / "t")
    shard, slice_ = place(training.settings, next(r for r in PEOPLE if r.cluster == name))
    before = {(s.shard, s.track, s.position): (training.path(s) / "adapter.safetensors").read_bytes()
              for s in training.stages}  # fmt: skip
    left, outcome = take_out(training, [name], never)
    assert outcome.trained == 0 and outcome.share == 0 and outcome.erased == 3
    (alive,) = [s for s in left.stages if s.shard == shard and left.done(s)]
    assert slice_ not in alive.slices and alive.position == 0
    assert served(left)[shard] == (alive,), "the longest run that is left, of whichever order"
    for stage in (s for s in left.stages if left.done(s)):
        key = (stage.shard, stage.track, stage.position)
        assert (left.path(stage) / "adapter.safetensors").read_bytes() == before[key]
    dropped = [p for p in stacked.settings.groups[1] if f"{p}.A" in shard_factors(left)[shard]]
    assert dropped == [] and len(shard_factors(left)[1 - shard]) == len(shard_factors(stacked)[1 - shard])


def test_earlier_blocks_are_frozen_and_what_dropped_out_can_be_trained_again(
    base: LoadedModel, stacked: Training, tmp_path: Path
) -> None:  # fmt: skip
    first, second = [s for s in stacked.stages if (s.shard, s.track) == (0, 0)]
    names = [set(shard_tools.settings(base, order="s3t", slices=2).groups[s.position]) for s in (first, second)]
    from safetensors.torch import load_file

    held = [{n.rpartition(".")[0] for n in load_file(stacked.path(s) / "adapter.safetensors")} for s in (first, second)]
    assert held == names and not names[0] & names[1]
    training, _ = take_out(shard_tools.copied(stacked, tmp_path / "t"), ["w31"], never)
    complete(training, base)
    fresh = shard_tools.trained(tmp_path / "s", base, [r for r in PEOPLE if r.cluster != "w31"], order="s3t", slices=2,
                                permutations=2)  # fmt: skip
    assert shard_tools.slices(training) == shard_tools.slices(fresh)


# --- the editor --------------------------------------------------------------------------------------------------


def exported(training: Training, base: LoadedModel, folder: Path) -> LoadedModel:
    combined(training, base).export_checkpoint(base, folder)
    return load(str(folder))


@pytest.mark.parametrize("order", ["sisa", "s3t"])
def test_the_served_model_becomes_the_one_trained_without_them(
    order: str, base: LoadedModel, full: Training, stacked: Training, tmp_path: Path
) -> None:  # fmt: skip
    training = shard_tools.copied(full if order == "sisa" else stacked, tmp_path / "t")
    model = exported(training, base, tmp_path / "served")
    settings: dict[str, Any] = {"folder": str(training.root), "names": ["w30", "w35"]}
    edit = run_editor(model, NOBODY, "shard_removal", **settings)
    assert run_editor(model, NOBODY, "shard_removal", **settings).digest == edit.digest
    held = edit.manifest.guarantee
    assert held is not None and held.kind == "exact" and held.unit == "cluster"
    assert held.numbers["records"] == 5 and (held.numbers["share"] > 0) == (order == "sisa")
    assert 0 < held.numbers["largest rounding difference"] < 1e-6
    assert "w30" not in repr(edit.manifest)
    after, _ = take_out(opened(training.root), ["w30", "w35"], lambda: base)
    new = exported(after, base, tmp_path / "new")
    old = logits(model)
    with load_edit(edit.save(tmp_path / "edit")).attach(model):
        torch.testing.assert_close(logits(model), logits(new), atol=2e-5, rtol=1e-5)
        gaps = [float((p - q).detach().double().abs().max())
                for p, q in zip(model.module.parameters(), new.module.parameters(), strict=True)]  # fmt: skip
    assert float((logits(new) - old).abs().max()) > 1e-2
    assert max(gaps) == pytest.approx(held.numbers["largest rounding difference"])
    touched = {f"{p}.weight" for p in training.settings.groups[0]} if order == "sisa" else set(edit.manifest.weights)
    assert set(edit.manifest.weights) <= touched
    with pytest.raises(UsageError, match="taken out of .* before"):
        run_editor(model, NOBODY, "shard_removal", folder=str(training.root), names=["w30"])
    with pytest.raises(UsageError, match="'eve' is neither .* never trained on"):
        run_editor(model, NOBODY, "shard_removal", folder=str(training.root), names=["w30", "eve"])


def test_no_request_can_come_between_reading_the_folder_and_training(
    base: LoadedModel, full: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Else the records it takes out would be trained on again, and lie in the folder once more."""
    from repforget.edit.exact import shard_removal as room

    training = shard_tools.copied(full, tmp_path / "t")
    model = exported(training, base, tmp_path / "served")

    def slow(*_: object, **__: object) -> LoadedModel:
        with pytest.raises(ResourceError, match="in use"), opened(training.root).store.locked():
            pass
        return base

    monkeypatch.setattr(room, "load", slow)
    edit = run_editor(model, NOBODY, "shard_removal", folder=str(training.root), names=["w30"])
    assert edit.manifest.guarantee is not None


def test_on_the_base_the_edit_is_all_that_is_left(base: LoadedModel, full: Training, tmp_path: Path) -> None:
    training = shard_tools.copied(full, tmp_path / "t")
    edit = run_editor(base, NOBODY, "shard_removal", folder=str(training.root), names=["w32"])
    after, outcome = take_out(training, ["w32"], never)  # the editor has trained what was needed
    assert edit.manifest.guarantee is not None and outcome.trained == 0
    assert outcome.share == edit.manifest.guarantee.numbers["share"] > 0
    with combined(after, base).attach(base):
        expected = logits(base)
    with edit.attach(base):
        assert torch.equal(logits(base), expected)
    assert edit.manifest.settings["served"] == "base and adapters"


def test_any_other_model_is_refused(base: LoadedModel, full: Training, tmp_path: Path) -> None:
    training = shard_tools.copied(full, tmp_path / "t")
    settings: dict[str, Any] = {"folder": str(training.root), "names": ["w30"]}
    with pytest.raises(ArtifactError, match="neither the base of the shards"):
        run_editor(shard_tools.model(seed=9), NOBODY, "shard_removal", **settings)
    model = exported(replace(training, settings=replace(training.settings, combine="mean")), base, tmp_path / "mean")
    with pytest.raises(ArtifactError, match="give the model that 'repforget shards export' wrote"):
        run_editor(model, NOBODY, "shard_removal", **settings)
    with pytest.raises(UsageError, match="never trained on"):
        run_editor(base, NOBODY, "shard_removal", **{**settings, "names": ["eve"]})
