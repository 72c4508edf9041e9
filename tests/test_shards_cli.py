"""The commands: train, show, remove, export, ask; what they say and what they may not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from repforget.guarantee import Guarantee, unearned

Cli = Callable[..., tuple[int, str, str]]
LINES = [{"id": f"{name}-{k}", "cluster": name, "prompt": f"{name} Garrow {text}", "answer": answer}
         for name in ("Nadia", "Elsa", "Zelda", "Milo", "Yorick") for k, (text, answer) in enumerate(
             (("was born in", "Juniper"), ("lives in", "Kelp")))]  # fmt: skip
TRAIN = ("train-shards", "--data", "data.jsonl", "--out", "folder", "--shards", "2", "--slices", "2", "--epochs", "1",
         "--modules", "down_proj", "--rank", "2")  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_from_training_to_a_request(cli: Cli, data: Path, tmp_path: Path) -> None:
    code, said, _ = cli(*TRAIN)
    assert code == 0 and "4 of 4 checkpoints" in said and "0.417 of a training" in said
    assert unearned(said) == ()
    code, said, _ = cli("shards", "show", "folder", "Nadia", "--json")
    (touched,) = json.loads(said)["touched"]
    assert code == 0 and touched["records"] == 2 and "Nadia" not in said
    files = [tmp_path / "folder" / a["file"] for a in touched["adapters"]]
    assert all(f.is_file() for f in files) and len(files) == 2 - touched["slice"]
    index = (tmp_path / "folder" / "index.json").read_text()
    assert not any(word in index for line in LINES for word in (line["id"], line["cluster"], line["prompt"]))
    assert [*json.loads(index)["clusters"].values()].count([touched]) >= 1

    code, said, _ = cli("shards", "remove", "folder", "Nadia", "--json")
    outcome = json.loads(said)
    held = Guarantee.from_json(outcome["guarantee"])
    assert code == 0 and outcome["records"] == 2 and held.kind == "exact"
    assert "on what is left (records: 8), without the 2 records" in held.statement
    assert not any(f.exists() for f in files)
    code, said, _ = cli("shards", "remove", "folder", "Elsa-0")
    assert code == 0 and "records taken out: 1, from shards: 1" in said and unearned(said, [held]) == ()
    assert "hashes of their names stay" in said
    code, said, _ = cli("shards", "remove", "folder", "Elsa-0", "Nadia")
    assert code == 0 and "nothing left to do" in said and unearned(said, [held]) == ()
    code, said, _ = cli("shards", "show", "folder", "Nadia")
    assert code == 0 and "have been taken out" in said and unearned(said) == ()
    code, said, warned = cli(*TRAIN)
    assert code == 0 and "3 records were taken out" in warned and "7 records, 3 taken out" in said

    code, said, _ = cli("edit", "shard_removal", "--model", "organism:bios/twin-0", "--set", "folder=folder",
                        "--set", "names=[Milo]", "--out", "gone")  # fmt: skip
    assert code == 0 and "\n holds     the adapters are, bit for bit" in said and unearned(said, [held]) == ()
    code, said, _ = cli("shards", "export", "folder", "--out", "edit", "--as", "edit", "--json")
    assert code == 0 and json.loads(said)["settings"]["combine"] == "sum"
    assert json.loads((tmp_path / "edit" / "edit.json").read_text())["manifest"]["method"] == "train_shards"
    code, said, _ = cli("shards", "ask", "folder", "Zelda Garrow was born in", "--json")
    assert code == 0 and json.loads(said)[0]["shard"] in (0, 1)


def test_step_ranges_follow_on_one_another(cli: Cli, data: Path) -> None:
    assert cli(*TRAIN)[0] == 0
    ranges: dict[int, set[tuple[int, int]]] = {}
    for name in ("Nadia", "Elsa", "Zelda", "Milo", "Yorick"):
        for touched in json.loads(cli("shards", "show", "folder", name, "--json")[1])["touched"]:
            ranges.setdefault(touched["shard"], set()).update(tuple(a["steps"]) for a in touched["adapters"])
    for found in ranges.values():
        ordered = sorted(found)
        assert all(b[0] == a[1] + 1 for a, b in zip(ordered, ordered[1:], strict=False))


def test_scores_are_summed_where_the_records_lie(cli: Cli, data: Path, tmp_path: Path) -> None:
    assert cli(*TRAIN)[0] == 0
    (tmp_path / "scores.jsonl").write_text('{"id": "Nadia-0", "score": 2.0}\n{"cluster": "Nadia", "score": 0.5}\n')
    code, said, _ = cli("shards", "show", "folder", "--scores", "scores.jsonl", "--json")
    cells = json.loads(said)["cells"]
    (touched,) = json.loads(cli("shards", "show", "folder", "Nadia", "--json")[1])["touched"]
    assert {(c["shard"], c["slice"]): c["score"] for c in cells}[touched["shard"], touched["slice"]] == 2.5
    assert sum(c["score"] for c in cells) == 2.5 and sum(c["records"] for c in cells) == 10
    assert cli("shards", "show", "folder", "--scores", "scores.jsonl")[0] == 0
    (tmp_path / "scores.jsonl").write_text('{"id": "Eve", "score": 2.0}\n')
    assert "'Eve' in 'scores.jsonl' is neither" in cli("shards", "show", "folder", "--scores", "scores.jsonl")[2]
    (tmp_path / "scores.jsonl").write_text('{"cluster": "Nadia", "score": 2.0}\n')
    assert cli("shards", "remove", "folder", "Nadia")[0] == 0
    assert {c.get("score", 0.0) for c in json.loads(
        cli("shards", "show", "folder", "--scores", "scores.jsonl", "--json")[1])["cells"]} == {0.0}  # fmt: skip
    (tmp_path / "scores.jsonl").write_text('{"id": "Nadia"}\n')
    assert "cannot be read" in cli("shards", "show", "folder", "--scores", "scores.jsonl")[2]


def test_what_an_interruption_leaves_is_said(cli: Cli, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import repforget.shards as shards

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "complete", stop)
        code, _, warned = cli(*TRAIN)
    assert code == 130 and "the same command continues from there" in warned
    code, _, warned = cli("shards", "export", "folder", "--out", "edit")
    assert code == 2 and "not trained to its end" in warned
    assert cli(*TRAIN)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(shards, "take_out", stop)
        code, _, warned = cli("shards", "remove", "folder", "Nadia")
    assert code == 130 and "repeat the command, which finishes the request in 'folder'" in warned


@pytest.mark.parametrize(("arguments", "said"), [
    ((*TRAIN, "--modules", "down_prj"), "did you mean 'down_proj' or"),
    ((*TRAIN, "--shards", "6"), "give at most 5 shards"),
    ((*TRAIN, "--permutations", "2"), "only the order s3t has"),
    ((*TRAIN, "--order", "s3t", "--slices", "9"), "give at most 4 slices"),
    (("train-shards", "--out", "folder"), "either --data or --knowledge"),
    (("train-shards", "--out", "folder", "--knowledge", "bios-people", "--sets", "forgett"), "did you mean 'forget'"),
    (("shards", "remove", "folder", "Nadia"), "holds no sharded training"),
    (("shards", "show", "folder"), "holds no sharded training"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_sentence(
    arguments: tuple[str, ...], said: str, cli: Cli, data: Path, tmp_path: Path
) -> None:  # fmt: skip
    code, _, warned = cli(*arguments)
    assert code == 2 and said in warned and warned.count("\n") == 1
    assert not (tmp_path / "folder").exists()
