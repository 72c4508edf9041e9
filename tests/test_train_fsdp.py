"""Two launched processes with the model in shards: the edit of one process, in half of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edit_models
import pytest
from test_train_processes import SMALL, launch

from repforget.artifact import load_edit
from repforget.artifact.files import arrays
from repforget.edit._dispatch import edit
from repforget.errors import UsageError
from repforget.models.load import load
from repforget.records import Component, Localization, RandomBand

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WHERE = Localization("test", (Component.parse("attn_z.1.h2"), Component.parse("mlp_post.0.n5")), (2.0, 1.0),
                     RandomBand(2, 5, 1, 0, 0.5, "e"))  # fmt: skip
# Rows in parts, and parts in which one process has no row; a global norm; moments; layers that get no gradient; what
# is measured on the untouched model; frozen parameters beside trained ones; an adapter; masks.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("grad_diff", {"clip": 0.05, "optimizer": "nesterov"}),
    "sequences in parts": ("npo", {"retain": "kl", "accumulate": 3, "retain_batch": 1}),
    "other answers": ("idk_dpo", {"targets": ["mlp"], "checkpointing": True}),
    "hidden states": ("adaptive_rmu", {"layers": [0], "retain": "hidden_state"}),
    "adapter": ("npo", {"adapter": "lora", "rank": 2}),
    "mask": ("npo", {"mask": True}),
}
COPIES = 5  # of the weights, in one process of the first case: themselves, start, last good state, gradients, momentum


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model whose embeddings are tied."""
    path, model = tmp_path_factory.mktemp("shards"), edit_models.model("llama_tied")
    model.module.save_pretrained(path / "model")
    model.tokenizer.save_pretrained(path / "model")
    return path


def run(folder: Path, cases: dict[str, Any], event: str = "", code: int = 0, **env: str) -> list[list[str]]:
    """What both processes print."""
    both = launch(folder, cases, event, **env)
    try:
        said = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [code, 0], said
    return [out.split() for out, _ in said]


def compare(folder: Path, cases: dict[str, Any]) -> None:
    """The edits in the folder are those that one process makes."""
    model, data = load(str(folder / "model"), device="cpu"), edit_models.people().for_editor()
    for name, (method, settings) in cases.items():
        where = WHERE if settings.get("mask") else None
        one, two = edit(model, data, method, where=where, **settings), load_edit(folder / name)
        expected, found = arrays(one.operations), arrays(two.operations)
        assert expected.keys() == found.keys(), name
        for key, value in expected.items():
            room = 1e-5 * float(value.abs().max()) + 2e-8  # and the grid of float32 weights below 0.2
            assert float((found[key] - value).abs().max()) <= room, f"{name}, {key}"


@pytest.mark.slow
def test_two_processes_with_shards_train_what_one_does_on_half_of_the_memory(folder: Path) -> None:
    cases = {name: (method, {**SMALL, **settings}) for name, (method, settings) in CASES.items()}
    sent = {name: (method, {**s, "where": WHERE.to_json()} if s.get("mask") else s)
            for name, (method, s) in cases.items()}  # fmt: skip
    said = run(folder, sent, "measure", **FSDP)
    assert said[1][-1] == "served"
    compare(folder, cases)
    weights = sum(p.nbytes for p in load(str(folder / "model"), device="cpu").module.parameters())
    shares = [int(process[0]) / (COPIES * weights) for process in said]
    print("of what one process holds, each of two holds", shares)
    assert all(share < 0.53 for share in shares)


@pytest.mark.slow
def test_a_process_that_failed_goes_on_from_the_state_of_both(folder: Path) -> None:
    cases = {"resumed": ("npo", {**SMALL, "optimizer": "nesterov", "check_every": 1, "steps": 4})}
    assert run(folder, cases, "error, wait", code=1, **FSDP)[0] == ["0", "1"]
    assert run(folder, cases, "wait", **FSDP)[0] in (["1", "2", "3"], ["2", "3"])
    compare(folder, cases)


@pytest.mark.parametrize("method, settings, said", [
    ("npo", {"combine": "pcgrad"}, "combine: pcgrad"), ("npo", {"robust": [{"sam": {"rho": 0.1}}]}, "robust: sam"),
    ("npo", {"adapter": "oft"}, "adapter: oft"), ("npo", {"optimizer": "sophia"}, "optimizer: sophia"),
    ("npo", {"precision": "stochastic"}, "precision: stochastic"), ("npo", {"teacher": "live"}, "teacher: live"),
    ("idk_dpo", {"answers": "fresh"}, "answers: fresh"), ("npo", {"retain": "l2"}, "retain: l2"),
])  # fmt: skip
def test_what_needs_whole_weights_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any], said: str
) -> None:
    for name, value in {**FSDP, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"'{said}' needs whole"):
        edit(edit_models.model(), edit_models.people(), method, **{**SMALL, **settings})
