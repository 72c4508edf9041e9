"""Edits on disk and for other tools: nothing damaged is read, nothing lossy is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_tools import build, draw, logits, site_operation, tiny, weight_operation

from repforget.artifact import (
    AddVector,
    Affine,
    BiasDelta,
    DenseDelta,
    Edit,
    Gate,
    LowRankDelta,
    ScaleUnits,
    SparseDelta,
    Untie,
    load_edit,
)
from repforget.errors import ArtifactError
from repforget.records import Site

DOWN = "model.layers.1.mlp.down_proj.weight"
HERE = Site("resid_post", 0)


def every_kind(model: Any) -> Edit:
    gate = Gate(draw(32), 0.5, scope="prefix", cosine=True, site=Site("embed"))
    basis = torch.linalg.qr(draw(32, 2)).Q
    return build(
        model, Untie(), LowRankDelta(DOWN, draw(32, 2), draw(2, 48)), DenseDelta(DOWN, draw(32, 48)),
        SparseDelta(DOWN, torch.tensor([4, 2]), draw(2)), BiasDelta(DOWN.replace("weight", "bias"), draw(32)),
        Affine(HERE, basis, basis.T, draw(32), gate=gate), Affine(HERE, basis, basis.T),
        AddVector(Site("attn_z", 1, 3), draw(8), 0.25, gate=None, positions="prompt"),
        ScaleUnits(Site("mlp_post", 0), torch.tensor([1, 2]), torch.tensor([0.0, 3.0])),
        notes=("one of each",),
    )  # fmt: skip


def test_saved_and_loaded_is_the_same_edit(tiny_llama: Any, tmp_path: Path) -> None:
    edit = every_kind(tiny_llama)
    folder = edit.save(tmp_path / "deep" / "edit")
    assert sorted(p.name for p in folder.iterdir()) == ["edit.json", "edit.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["edit"]  # no temporary folder is left
    loaded = load_edit(folder)
    assert loaded.manifest == edit.manifest
    assert loaded.digest == edit.digest
    with edit.attach(tiny_llama):
        expected = logits(tiny_llama)
    with loaded.attach(tiny_llama):
        assert torch.equal(logits(tiny_llama), expected)


def test_saving_twice_gives_the_same_bytes_and_replaces_the_old(tiny_llama: Any, tmp_path: Path) -> None:
    edit = every_kind(tiny_llama)
    first = {p.name: p.read_bytes() for p in edit.save(tmp_path / "a").iterdir()}
    edit.scaled(0.5).save(tmp_path / "b")
    second = {p.name: p.read_bytes() for p in edit.save(tmp_path / "b").iterdir()}
    assert first == second


def test_manifest_is_complete_json(tiny_llama: Any, tmp_path: Path) -> None:
    body = json.loads((every_kind(tiny_llama).save(tmp_path / "e") / "edit.json").read_text())
    manifest = body["manifest"]
    assert set(manifest) == {f.name for f in dataclasses.fields(type(every_kind(tiny_llama).manifest))}
    assert manifest["base_fingerprint"] == tiny_llama.fingerprint
    assert manifest["architecture"] == "LlamaForCausalLM"
    assert manifest["artifact"] == "weights+hook"
    assert manifest["sites"] == ["resid_post.0", "attn_z.1.h3", "mlp_post.0"]
    assert manifest["weights"] == [DOWN, DOWN.replace("weight", "bias")]
    assert set(manifest["versions"]) == {"repforget", "torch", "transformers"}
    assert len(body["tensors_sha256"]) == 64


def _truncate(folder: Path) -> None:
    path = folder / "edit.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _flip(folder: Path) -> None:
    path = folder / "edit.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


def _json(change: Any) -> Any:
    def damage(folder: Path) -> None:
        body = json.loads((folder / "edit.json").read_text())
        change(body)
        (folder / "edit.json").write_text(json.dumps(body))

    return damage


DAMAGE = {
    "truncated tensors": (_truncate, "truncated or damaged"),
    "one bit": (_flip, "truncated or damaged"),
    "no tensors": (lambda f: (f / "edit.safetensors").unlink(), r"'edit\.safetensors' is missing"),
    "no manifest": (lambda f: (f / "edit.json").unlink(), r"'edit\.json' is missing"),
    "half a manifest": (lambda f: (f / "edit.json").write_text("{"), "cannot be read"),
    "another file": (lambda f: (f / "edit.json").write_text("[]"), "not the manifest"),
    "newer format": (_json(lambda b: b["manifest"].update(format_version=99)), "format version 99"),
    "unknown operation": (_json(lambda b: b["operations"][0].update(kind="magic")), "magic"),
    "unknown field": (_json(lambda b: b["operations"][0].update(colour=1)), "colour"),
    "field gone": (_json(lambda b: b["manifest"].pop("method")), "method"),
    "bad site": (_json(lambda b: b["operations"][5].update(site="nowhere.1")), "nowhere"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_edits_are_refused_in_one_sentence(tiny_llama: Any, tmp_path: Path, damage: str) -> None:
    folder = every_kind(tiny_llama).save(tmp_path / "edit")
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_edit(folder)
    assert "\n" not in str(caught.value)


def test_save_leaves_other_folders_alone(tiny_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not an edit"):
        every_kind(tiny_llama).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_save_keeps_the_old_edit(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = every_kind(tiny_llama)
    folder = edit.save(tmp_path / "edit")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("repforget.artifact.files._fsync", full)
    with pytest.raises(Exception, match="No space left"):
        edit.scaled(2.0).save(folder)
    assert load_edit(folder).digest == edit.digest
    assert [p.name for p in tmp_path.iterdir()] == ["edit"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "mixtral"])
def test_checkpoint_holds_the_edit(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(architecture)
    edit = build(model, weight_operation("low_rank", model), site_operation("scale_units", Site("attn_z", 1), 32))
    with edit.attach(model):
        expected = logits(model)
    folder = edit.export_checkpoint(model, tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, atol=2e-5, rtol=1e-4)


def test_checkpoint_keeps_an_added_bias_where_the_config_can_say_so(tiny_llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    affine = site_operation("affine", Site("attn_in", 0), 32)
    edit = build(tiny_llama, AddVector(Site("resid_post", 1), draw(32)), affine)
    with edit.attach(tiny_llama):
        expected = logits(tiny_llama)
    reloaded = AutoModelForCausalLM.from_pretrained(edit.export_checkpoint(tiny_llama, tmp_path / "out"))
    assert reloaded.config.mlp_bias is True
    assert reloaded.config.attention_bias is True
    torch.testing.assert_close(logits(reloaded), expected, atol=2e-5, rtol=1e-4)
    assert tiny_llama.module.config.mlp_bias is False


def test_checkpoint_refuses_what_it_would_lose(tmp_path: Path) -> None:
    qwen = tiny("qwen2")  # has no flag for a bias in its MLP
    with pytest.raises(ArtifactError, match=r"down_proj\.bias"):
        build(qwen, AddVector(HERE, draw(32))).export_checkpoint(qwen, tmp_path / "bias")
    hooked = build(qwen, site_operation("affine", HERE, 32))
    with pytest.raises(ArtifactError, match="needs hooks at resid_post.0"):
        hooked.export_checkpoint(qwen, tmp_path / "hook")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ArtifactError, match="not empty"):
        build(qwen, weight_operation("dense", qwen)).export_checkpoint(qwen, tmp_path / "full")


def test_checkpoint_keeps_an_untied_unembedding(tiny_gpt2: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    table = tiny_gpt2.module.get_input_embeddings().weight
    edit = build(tiny_gpt2, Untie(), DenseDelta("lm_head.weight", draw(*table.shape)))
    with edit.attach(tiny_gpt2):
        expected = logits(tiny_gpt2)
    reloaded = AutoModelForCausalLM.from_pretrained(edit.export_checkpoint(tiny_gpt2, tmp_path / "out"))
    torch.testing.assert_close(logits(reloaded), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_adapter_holds_the_edit(architecture: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny(architecture)
    first = build(model, weight_operation("low_rank", model))
    edit = first.then(first.scaled(-0.5))  # two deltas on one weight
    with edit.attach(model):
        expected = logits(model)
    folder = edit.export_peft(model, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(tiny(architecture).module, str(folder)).eval()
    torch.testing.assert_close(logits(adapted), expected, atol=2e-5, rtol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)


def test_adapter_refuses_what_is_not_low_rank(tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'dense' operation"):
        build(tiny_llama, weight_operation("dense", tiny_llama)).export_peft(tiny_llama, tmp_path / "a")
    table = LowRankDelta("model.embed_tokens.weight", draw(96, 1), draw(1, 32))
    with pytest.raises(ArtifactError, match="linear layer"):
        build(tiny_llama, table).export_peft(tiny_llama, tmp_path / "a")
    with pytest.raises(ArtifactError, match="was made for"):
        build(tiny_llama, weight_operation("low_rank", tiny_llama)).export_peft(tiny("llama", 3), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
