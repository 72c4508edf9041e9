"""Building an organism from a seed: the whole path with a tiny world, and what an interruption leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repforget.errors import UsageError
from repforget.organism import build as build_module
from repforget.organism.build import TINY, build


def test_tiny_build_makes_three_loadable_models(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = build(tmp_path, name="tiny", seed=5, plan=TINY, progress=False)
    assert [f.name for f in folders] == ["tiny", "tiny-twin-0", "tiny-twin-1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in folders), (
        "nothing else is left"
    )
    recipes = [json.loads((f / "recipe.json").read_text()) for f in folders]
    assert len({r["weights_sha256"] for r in recipes}) == 3
    assert {r["world"]["sha256"] for r in recipes} == {recipes[0]["world"]["sha256"]}
    assert recipes[0]["plan"]["people"] == TINY.people and recipes[0]["versions"]["torch"]
    module = AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto")
    assert module.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert torch.isfinite(module(**tokenizer("Where was Adra Abbot born?", return_tensors="pt")).logits).all()


def test_build_repeats_bit_for_bit_and_replaces_an_older_folder(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    target.mkdir()
    (target / "stale.txt").write_text("from an older build")
    hashes = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        build(tmp_path, name="tiny", seed=5, which=["full"], plan=TINY, progress=False)
        hashes.append(json.loads((target / "recipe.json").read_text())["weights_sha256"])
    assert hashes[0] == hashes[1]
    assert not (target / "stale.txt").exists()
    build(tmp_path, name="tiny", seed=6, which=["full"], plan=TINY, progress=False)
    assert json.loads((target / "recipe.json").read_text())["weights_sha256"] != hashes[0]


def test_interrupted_build_keeps_the_old_folder_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "tiny"
    target.mkdir()
    (target / "recipe.json").write_text("old")

    def interrupted(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "_accuracy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, name="tiny", which=["full"], plan=replace(TINY, steps=1), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    assert [p.name for p in target.iterdir()] == ["recipe.json"]
    assert (target / "recipe.json").read_text() == "old"


def test_build_shows_its_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, name="tiny", which=["twin-1"], plan=replace(TINY, steps=2), progress=True)
    assert "training tiny-twin-1" in capsys.readouterr().out


@pytest.mark.parametrize("which", [["twin-9"], []])
def test_unknown_role_is_refused_before_anything_is_made(tmp_path: Path, which: list[str]) -> None:
    with pytest.raises(UsageError, match="no organism role"):
        build(tmp_path, which=which, plan=TINY, progress=False)
    assert not list(tmp_path.iterdir())
