"""The command train: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repforget.artifact import load_edit
from repforget.cli._guard import guarded

NAMES = ["Nadia", "Larch", "Ashby", "Elsa", "Hollis", "Fern", "Gorse", "Zelda"]
LINES = [{"id": f"r{n}", "cluster": f"c{n // 2}", "prompt": f"{NAMES[n]} was born in", "answer": "Juniper"}
         for n in range(8)]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return path


def test_plain_then_private_into_folders(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, private = tmp_path / "plain", tmp_path / "private"
    own = ["--data", str(data), "--epochs", "1", "--rank", "2"]
    assert guarded(["train", "--out", str(plain), *own, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["settings"]["clusters"] == 4 and "guarantee" not in body
    assert load_edit(plain).digest == body["edit_digest"]
    budget = ["--private", "--epsilon", "8", "--delta", "0.1", "--batch", "4"]
    assert guarded(["train", "--out", str(private), *own, *budget]) == 0
    said = capsys.readouterr().out
    assert "4 clusters" in said and "(unit: cluster)" in said and "differentially private" in said
    assert json.loads((private / "train.json").read_text())["guarantee"]["numbers"]["epsilon"] <= 8


@pytest.mark.parametrize(
    "given,says",
    [
        (["--epsilon", "8"], "add --private"),
        (["--private", "--epsilon", "8"], "needs a budget"),
        (["--private", "--epsilon", "8", "--delta", "0.5"], "outside (0, 1/4]"),
        (["--private", "--epsilon", "8", "--delta", "0.1", "--accountant", "gdp"], "can understate"),
        (["--private", "--epsilon", "8", "--delta", "0.1", "--unit", "person"], "cluster or record"),
        (["--knowledge", "bios-people"], "give one of them"),
        (["--seed", "-1"], "from 0 to"),
        (["--seed", "9" * 20], "from 0 to"),
        (["--epochs", "inf"], "finite epochs"),
        (["--lr", "nan"], "finite epochs"),
    ],
)
def test_refusals_are_sentences(
    given: list[str], says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(["train", "--out", str(tmp_path / "out"), "--data", str(data), *given]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert says in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "/"])
def test_a_folder_that_holds_other_things_is_refused(
    out: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data.parent)
    assert guarded(["train", "--out", out, "--data", str(data)]) != 0
    said = capsys.readouterr().err
    assert "is not an edit" in said and "Unexpected" not in said
