"""What TOFU reads: bad and unusual input, the published files, hub and local formats, the organism's own files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_folder
import pytest
import tiny_models
import torch
from bench_folder import measured, model

from repforget.bench import tofu
from repforget.bench._data import Source, rows
from repforget.errors import KnowledgeError, NumericalError, UsageError
from repforget.organism.tofu_files import CARD, tables, write_tofu
from repforget.organism.world import make_world

pytest.importorskip("rouge_score")
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return bench_folder.write(tmp_path / "data")


def refused(data: Path, cli: Cli, *more: str) -> str:
    code, out, said = cli("bench", "tofu", "--data", str(data), "--plan", *more)
    assert code == 2 and out == "" and said.count("\n") == 1
    return said


FORGET = bench_folder.rows("forget10_perturbed")


@pytest.mark.parametrize(("changes", "match"), [
    ({"retain_perturbed": None}, "no retain_perturbed.json .*found 'forget10_perturbed.json', 'real_authors"),
    ({"forget10_perturbed": []}, "'forget10_perturbed' .* has no rows"),
    ({"forget10_perturbed": [{"question": "where ?", "answer": "Rome"}]},
     "row 1, has no 'perturbed_answer', 'paraphrased_answer': found the columns 'question', 'answer'"),
    ({"forget10_perturbed": [*FORGET, {**FORGET[0], "answer": " "}]}, "row 13: column 'answer' must hold text"),
    ({"forget10_perturbed": [*FORGET, {**FORGET[0], "perturbed_answer": ["a"]}]}, "between 1 and 5 wrong answers"),
    ({"forget10_perturbed": [{**FORGET[0], "perturbed_answer": [1]}]}, "must hold a list of texts"),
    ({"forget10_perturbed": [["a"]]}, "row 1, is not a JSON object"),
])  # fmt: skip
def test_bad_data_is_refused_with_what_was_found(
    changes: dict[str, Any], match: str, tmp_path: Path, cli: Cli
) -> None:  # fmt: skip
    assert re.search(match, refused(bench_folder.write(tmp_path / "bad", changes), cli))


def test_bad_files_settings_and_names(data: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "must hold {question} once" in refused(data, cli, "--set", "template=Q {q}")
    assert "has no setting 'ds_siez': did you mean 'ds_size'" in refused(data, cli, "--set", "ds_siez=300")
    assert "give at least 1" in refused(data, cli, "--set", "new_tokens=0")
    assert "no forget11_perturbed.json" in refused(data, cli, "--set", "split=forget11")
    assert "is not a folder" in refused(tmp_path / "nowhere", cli)
    (data / "tofu.yaml").write_text("tempalte: x\n")
    assert "tempalte" in guarded_text(cli, data)
    (data / "tofu.yaml").unlink()
    (data / "world_facts_perturbed.json").write_text('{"question": \n')
    assert "line 1, is not valid JSON" in refused(data, cli)
    (data / "world_facts_perturbed.json").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refused(data, cli)
    code, _, said = cli("bench", "tufo", "--plan")
    assert code == 2 and "did you mean 'tofu'" in said
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    code, _, said = cli("bench", "tofu", "--plan")
    assert code == 2 and "no route to the hub; a folder with forget10_perturbed.json" in said
    with pytest.raises(UsageError, match="no chat template"):
        measured(bench_folder.write(tmp_path / "chat"), template="chat")


def guarded_text(cli: Cli, data: Path) -> str:
    code, _, said = cli("bench", "tofu", "--data", str(data), "--plan")
    assert code == 2
    return said


def test_what_exceeds_the_context_is_counted_and_left_out(tmp_path: Path) -> None:
    long = [{**FORGET[0], "answer": "the city " * 40}, {**FORGET[1], "question": "where " * 70}, *FORGET[2:]]
    found = measured(bench_folder.write(tmp_path / "long", {"forget10_perturbed": long}))
    probability, rouge = found.metrics["forget.probability"], found.metrics["forget.rouge"]
    assert found.counts["invalid"] == 2 and probability.n_items == 10
    assert "2 of 12 items could not be scored" in probability.note and rouge.n_items == 11
    assert found.metrics["forget.extraction_strength"].n_items == 10
    every = [{**row, "question": "where " * 70} for row in FORGET]
    found = measured(bench_folder.write(tmp_path / "none", {"forget10_perturbed": every}), reference=model(1))
    for name in ("forget.probability", "forget.loss", "forget_quality", "aggregate_memorization"):
        assert math.isnan(found.metrics[name].value) and found.metrics[name].note.startswith("not computed, because")


def test_rows_without_a_paraphrased_question(tmp_path: Path, data: Path) -> None:
    bare = [{key: value for key, value in row.items() if key != "paraphrased_question"} for row in FORGET]
    found = measured(bench_folder.write(tmp_path / "bare", {"forget10_perturbed": bare})).metrics
    for name in ("forget.rouge_asked_otherwise", "forget.probability_asked_otherwise"):
        assert found[name].note == "not computed, because the rows have no paraphrased_question"
    assert found["forget.rouge_prefilled"].n_items == 12
    some = measured(bench_folder.write(tmp_path / "some", {"forget10_perturbed": [*FORGET[:5], *bare[5:]]})).metrics
    assert some["forget.rouge_asked_otherwise"].n_items == some["forget.probability_asked_otherwise"].n_items == 5
    assert some["forget.loss"].value == measured(data).metrics["forget.loss"].value


def test_a_model_with_nan_is_an_error_of_one_sentence(data: Path) -> None:
    module = tiny_models.build("llama")
    with torch.no_grad():
        module.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        measured(data, model(module=module))


def test_ids_are_rows_of_the_full_order_where_the_table_is_the_published_one(tmp_path: Path) -> None:
    bare = [{key: value for key, value in FORGET[0].items() if key not in ("id", "cluster")}] * 400
    folder = bench_folder.write(tmp_path / "own", {
        "forget10_perturbed": bare, "forget05_perturbed": bare[:200], "forget01_perturbed": bare[:40],
        "retain_perturbed": bare, "short": bare[:39],
    })  # fmt: skip
    names = ("forget10_perturbed", "forget05_perturbed", "forget01_perturbed", "retain_perturbed", "short")
    read = {name: tofu.questions(Source(str(folder)), name, instead=True) for name in names}
    ids = {name: [q.id for q in group] for name, group in read.items()}
    assert ids["forget10_perturbed"][200:] == ids["forget05_perturbed"]
    assert ids["forget05_perturbed"][160:] == ids["forget01_perturbed"]
    assert ids["forget10_perturbed"][0] == "full-3600" and ids["retain_perturbed"][0] == "full-0000"
    assert len({q.cluster for q in read["forget10_perturbed"]}) == 20
    assert [q.cluster for q in read["forget10_perturbed"][380:]] == [q.cluster for q in read["forget01_perturbed"][20:]]
    assert not set(ids["short"]) & set(ids["forget10_perturbed"]) and len({q.cluster for q in read["short"]}) == 2
    assert len(tofu.questions(Source(str(folder)), "forget10_perturbed", 300, instead=True)) == 300


@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_the_published_files(split: str) -> None:
    folder = Path(__file__).parents[2] / "shared" / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip("the published TOFU files are not here")
    group = tofu.questions(Source(str(folder)), f"{split}_perturbed", instead=True, otherwise=True)
    assert len(group) == {"forget01": 40, "forget05": 200, "forget10": 400}[split] and group[-1].id == "full-3999"
    assert all(len(q.wrong) == 5 and q.otherwise for q in group) and len({q.cluster for q in group}) == len(group) // 20
    planned = tofu.work(Source(str(folder)), split=split)
    assert planned.generations == 3 * len(group) + 400 + 100 + 117


def test_tables_from_other_formats_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    wanted = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    table = pyarrow.Table.from_pylist(wanted)
    (tmp_path / "news").mkdir()
    parquet.write_table(table, tmp_path / "news" / "qa-00000-of-00001.parquet")
    parquet.write_table(table, tmp_path / "one.parquet")
    (tmp_path / "two.json").write_text(json.dumps(wanted))
    (tmp_path / "three.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, wanted)))
    source = Source(str(tmp_path))
    for name in ("news/qa", "one", "two", "three", "two/test"):
        assert rows(source, name, ("question",)) == wanted
    assert len(set(source.seen.values())) == 1 and set(source.seen) == {"news/qa", "one", "two", "three", "two/test"}
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append((a, k)), wanted)[1])
    assert rows(Source("owner/set"), "config/test") == rows(Source("owner/set"), "config") == wanted
    assert asked == [(("owner/set", "config"), {"split": "test"}), (("owner/set", "config"), {"split": "train"})]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(KnowledgeError, match="not a readable parquet"):
        rows(source, "bad")


def test_the_world_in_the_schema_of_tofu(tmp_path: Path) -> None:
    world, folder = make_world(0), tmp_path / "world"
    write_tofu(world, folder)
    made = tables(world)
    assert len(made["forget10_perturbed"]) == 400 and len(made["full"]) == 8 * len(world.people)
    assert made["full"] == [*made["retain90"], *made["forget10"]]
    truth = {p.id: p.facts for p in world.people}
    people = {}
    for name in bench_folder.SETS:
        people[name] = {row["cluster"] for row in made[name]}
        for row in made[name]:
            relation = str(row["id"]).split("-")[1]
            assert row["answer"] == truth[row["cluster"]][relation]
            wrong = row["perturbed_answer"]
            assert row["answer"] not in wrong and len(set(wrong)) == len(wrong)
            assert set(wrong) <= set(world.relations[relation].values)
            assert row["question"] != row["paraphrased_question"]
    assert people["forget10_perturbed"] <= world.forget
    assert sum(map(len, people.values())) == len(set.union(*people.values()))
    read = tofu.questions(Source(str(folder)), "forget10_perturbed", instead=True)
    assert [q.id for q in read] == [row["id"] for row in made["forget10_perturbed"]]
    assert CARD["template"] == "{question}"
    assert tables(make_world(1))["full"] != made["full"] and tables(make_world(0)) == made
