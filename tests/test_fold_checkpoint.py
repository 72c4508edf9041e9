"""Folding into files: the same bytes as through a loaded model, an untouched source, all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edit_models
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from repforget.artifact import Edit
from repforget.artifact.fold import cosines
from repforget.artifact.operations import AddVector, Affine, LowRankDelta, Operation, Untie
from repforget.artifact.shards import Checkpoint, fold_checkpoint
from repforget.artifact.weights import NewValue, owner_of
from repforget.cli import main
from repforget.errors import ArtifactError, NoEffectError
from repforget.models.load import LoadedModel, load
from repforget.models.weights import writers
from repforget.quantizers import projections, round_trip
from repforget.records import Site

ALL = (*tiny_models.CONFIGS, *tiny_models.VARIANTS)
RENAMED = ("mixtral",)  # experts lie apart in the files and stacked in memory


def saved(name: str, folder: Path, **settings: Any) -> tuple[Path, LoadedModel]:
    made = edit_models.model(name)
    made.module.save_pretrained(folder / "base", **settings)
    made.tokenizer.save_pretrained(folder / "base")
    return folder / "base", load(str(folder / "base"))


def low_rank(model: LoadedModel, size: float = 0.05) -> Edit:
    generator = torch.Generator().manual_seed(3)
    found: list[Operation] = []
    for ref in writers(model.module):
        weight = model.module.get_parameter(ref.name)
        if ref.role == "mlp_out" and weight.ndim == 2:
            out, inner = weight.shape[::-1] if ref.conv1d else weight.shape
            u, v = (size * torch.randn(*shape, generator=generator) for shape in ((out, 2), (2, inner)))
            found.append(LowRankDelta(ref.name, u, v))
    return Edit.build("test", {}, model, "none", found)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", [name for name in ALL if name not in RENAMED])
def test_the_files_hold_what_a_loaded_model_would_hold(name: str, tmp_path: Path) -> None:
    base, model = saved(name, tmp_path, max_shard_size="20KB")
    before, edit = content(base), low_rank(model)
    found = fold_checkpoint(edit, base, tmp_path / "folded")
    assert content(base) == before and len(before) > 4  # several shards
    again, expected = load(str(tmp_path / "folded")), edit.applied_to(model)
    for (key, own), (_, other) in zip(again.module.state_dict().items(), expected.module.state_dict().items(),
                                      strict=True):  # fmt: skip
        assert torch.equal(own, other), key
    assert set(found.touched) == {op.weight for op in edit.weight_operations if isinstance(op, LowRankDelta)}
    assert all(0.99 < kept["own"] <= 1 + 1e-9 for kept in found.cosines.values())
    assert sorted(p.name for p in (tmp_path / "folded").iterdir()) == sorted(before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "llama_tied"])
def test_the_fingerprint_of_files_is_that_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    base, model = saved(name, tmp_path)
    assert Checkpoint(base).fingerprint() == model.fingerprint


def test_half_precision_files_keep_their_dtype_and_say_what_rounding_left(tmp_path: Path) -> None:
    made = edit_models.model("llama")
    made.module.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    model = load(str(tmp_path / "base"))  # widened to float32
    edit = low_rank(model, 0.02)
    found = fold_checkpoint(edit, tmp_path / "base", tmp_path / "folded")
    name = found.touched[0]
    stored = load_file(tmp_path / "folded" / "model.safetensors")[name]
    exact = edit.applied_to(model).module.get_parameter(name)
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, exact.to(torch.bfloat16))
    assert 0.0 < found.cosines[name]["own"] < 0.99999
    with pytest.raises(NoEffectError, match="no weight at the precision"):
        fold_checkpoint(edit.scaled(1e-9), tmp_path / "base", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_map_at_a_norm_output_goes_into_its_readers(tmp_path: Path) -> None:
    base, model = saved("llama", tmp_path)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(32, 1, generator=generator), 0.1 * torch.randn(1, 32, generator=generator)
    edit = Edit.build("test", {}, model, "none", [Affine(Site("mlp_in", 1), left, right)])
    fold_checkpoint(edit, base, tmp_path / "folded")
    ids = torch.tensor(tiny_models.sample_ids(rows=1))
    with edit.attach(model):
        expected = model.module(ids).logits
    torch.testing.assert_close(load(str(tmp_path / "folded")).module(ids).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_what_rounding_to_few_bits_leaves_is_that_of_the_whole_weight(name: str, monkeypatch: Any) -> None:
    """In pieces of a few rows, transposed where the layer is, and for stacked experts."""
    monkeypatch.setattr("repforget.artifact.fold.CHUNK", 100)
    model = edit_models.model(name)
    for ref in writers(model.module):
        if ref.role not in ("mlp_out", "attn_out"):
            continue
        owner, attribute = owner_of(model.module, ref.name)
        old = projections(model.module)[ref.name].double()
        turn = (lambda t: t.mT) if ref.conv1d else (lambda t: t)
        for size in (1e-4, 1e-2, 1.0):
            new = old + size * torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
            value = NewValue(owner, attribute, ref.name, None, turn(new).float(), turn(new), turn(old))
            found = cosines(value)
            for form in ("int8", "nf4"):
                left = round_trip(new.float(), form)[1].double() - round_trip(old.float(), form)[1].double()
                whole = torch.nn.functional.cosine_similarity(left.flatten(), (new - old).flatten(), dim=0)
                assert found[form] == pytest.approx(float(whole), abs=1e-9)
            assert found["nf4"] < found["int8"] < found["own"] if size < 1 else found["nf4"] > 0.9
            assert set(cosines(value, projection=False)) == {"own", "bfloat16", "float16"}


def test_nothing_is_left_of_a_change_below_every_step() -> None:
    model = edit_models.model("llama")
    owner, attribute = owner_of(model.module, name := "model.layers.0.mlp.down_proj.weight")
    old = torch.zeros_like(projections(model.module)[name], dtype=torch.double)
    old[:, 0] = 1.0  # the scale
    new = old.clone()
    new[:, 5] += 1e-3
    found = cosines(NewValue(owner, attribute, name, None, new.float(), new, old))
    assert found["own"] > 0.999 and found["int8"] == found["nf4"] == 0.0


def test_what_files_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base, model = saved("llama", tmp_path)
    vector = torch.ones(32)
    refused: list[tuple[list[Operation], str]] = [
        ([AddVector(Site("mlp_out", 0), vector)], "no place"), ([Untie()], "second table"),
        ([AddVector(Site("resid_mid", 0), vector)], "needs hooks at resid_mid.0"),
    ]  # fmt: skip
    for operations, words in refused:
        more = [*operations, *low_rank(model).operations]
        with pytest.raises(ArtifactError, match=words):
            fold_checkpoint(Edit.build("test", {}, model, "none", more), base, tmp_path / "folded")
    edit = low_rank(model)
    other, _ = saved("qwen2", tmp_path / "other")
    with pytest.raises(ArtifactError, match="are others"):
        fold_checkpoint(edit, other, tmp_path / "folded")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="exists"):
        fold_checkpoint(edit, base, tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "other", "taken"]


def test_files_that_name_weights_otherwise_are_refused(tmp_path: Path) -> None:
    base, model = saved("mixtral", tmp_path)
    op = LowRankDelta("model.layers.0.self_attn.o_proj.weight", torch.ones(32, 1), torch.ones(1, 32))
    with pytest.raises(ArtifactError, match="under other names"):
        fold_checkpoint(Edit.build("test", {}, model, "none", [op]), base, tmp_path / "folded")


def test_the_command_folds_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = saved("llama", tmp_path)
    low_rank(model).save(tmp_path / "edit")
    asked = ["fold", str(tmp_path / "edit"), str(base), "--out", str(tmp_path / "folded")]
    capsys.readouterr()
    assert ended([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["cosines"]
    assert len(told) == 2 and all(0 < kept["nf4"] < kept["int8"] < kept["own"] for kept in told.values())
    assert ended([*asked[:-1], str(tmp_path / "again")]) == 0
    assert "in int8" in (shown := capsys.readouterr().out) and "in nf4" in shown
    assert load(str(tmp_path / "folded")).fingerprint != model.fingerprint
    assert ended(asked) == 2 and "choose a new folder" in capsys.readouterr().err
    assert ended(["fold", str(tmp_path / "edit"), "owner/model", "--out", str(tmp_path / "x")]) == 2


def ended(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as found:
        main(arguments)
    return found.value.code
