"""Probe folders: what loads, and what each malformed one is told."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repforget.errors import KnowledgeError, MissingExtraError, RecipeError, UnknownNameError
from repforget.knowledge_files import find_probe, load_knowledge

TOFU = Path(__file__).parents[2] / "shared" / "data" / "tofu"
Row = dict[str, Any]
PLAIN = "name: tiny\nsets:\n  forget: forget.jsonl\n  retain: retain.jsonl\n"


def rows(name: str, clusters: int = 8, each: int = 2) -> list[Row]:
    return [
        {"id": f"{name}-{c}-{k}", "cluster": f"{name}-{c}", "prompt": f"Q {name} {c} {k}?", "answer": f"{name} {c} {k}",
         "paraphrases": [f"Asked again: {name} {c} {k}?"]}
        for c in range(clusters) for k in range(each)
    ]  # fmt: skip


def write_lines(path: Path, entries: list[Row]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


@pytest.fixture
def probe(tmp_path: Path) -> Callable[..., Path]:
    """Write a probe folder; keyword arguments replace sets, ``text`` replaces probe.yaml."""

    def make(text: str = PLAIN, **sets: list[Row]) -> Path:
        (tmp_path / "probe.yaml").write_text(text, encoding="utf-8")
        for name, entries in {"forget": rows("f"), "retain": rows("r"), **sets}.items():
            write_lines(tmp_path / f"{name}.jsonl", entries)
        return tmp_path

    return make


def test_plain_probe_loads_every_field(probe: Callable[..., Path]) -> None:
    first = {**rows("f")[0], "aliases": ["x"], "wrong_answers": ["y", "z"], "entity_span": [2, 5], "statements": ["S"]}
    knowledge = load_knowledge(probe(forget=[first, *rows("f")[1:]]))
    item = knowledge.forget[0]
    assert (item.id, item.cluster, item.aliases, item.wrong_answers) == ("f-0-0", "f-0", ("x",), ("y", "z"))
    assert item.entity_span == (2, 5) and item.statements == ("S",) and item.questions[0] == "Q f 0 0?"
    assert len(knowledge.forget) == len(knowledge.retain) == 16
    assert knowledge.neighbours == () and knowledge.general == ()


def test_templates_make_prompt_paraphrases_and_statements(probe: Callable[..., Path]) -> None:
    text = PLAIN + 'separator: ""\ntemplates:\n  born:\n    questions: ["Where {subject}?", "{subject} from?"]\n' \
                   '    statements: ["{subject} was born in"]\n'  # fmt: skip
    people = [{"id": f"{c}", "subject": f"P{c}", "relation": "born", "answer": f"T{c}"} for c in range(8)]
    item = load_knowledge(probe(text, forget=people)).forget[3]
    assert (item.prompt, item.paraphrases) == ("Where P3?", ("P3 from?",))
    assert item.statements == ("P3 was born in",) and item.cluster == "P3" and item.continuation() == "T3"


def test_what_is_written_around_questions_reaches_the_judge_and_not_the_statements(probe: Callable[..., Path]) -> None:
    text = PLAIN + 'ask: "<user>{question}</user>\\n"\n'
    first = {**rows("f")[0], "statements": ["S"]}
    items = load_knowledge(probe(text, forget=[first, *rows("f")[1:]])).forget
    assert items[0].statements == ("S",) and items[0].prompt == "<user>Q f 0 0?</user>\n"
    assert items[1].paraphrases == ("<user>Asked again: f 0 1?</user>\n",)
    with pytest.raises(RecipeError, match="'ask' must contain {question}"):
        load_knowledge(probe(PLAIN + "ask: no place\n"))


def test_columns_clusters_of_rows_and_general_texts(probe: Callable[..., Path]) -> None:
    text = ("name: mapped\nsets:\n  forget: {path: forget.jsonl, columns: {q: prompt, a: answer}, cluster: {rows: 2}, "
            "relation: qa}\n  retain: retain.jsonl\n  general: general.jsonl\n")  # fmt: skip
    forget = [{"q": f"q{k}", "a": f"a{k}", "note": "never read"} for k in range(16)]
    knowledge = load_knowledge(probe(text, forget=forget, general=[{"text": "one"}, {"text": "two"}]))
    assert len({i.cluster for i in knowledge.forget}) == 8 and knowledge.forget[0].relation == "qa"
    assert len({i.id for i in knowledge.forget}) == 16 and knowledge.general == ("one", "two")
    assert "judged on a prompt that the editor sees" in knowledge.notes[0]


def test_json_array_equals_json_lines(probe: Callable[..., Path]) -> None:
    folder = probe()
    lines = load_knowledge(folder).digest
    (folder / "forget.jsonl").write_text(json.dumps(rows("f"), indent=2))
    assert load_knowledge(folder).digest == lines


def test_seed_changes_the_splits_only(probe: Callable[..., Path]) -> None:
    one, two = (load_knowledge(probe(forget=rows("f", 16)), seed=s) for s in (0, 1))
    assert one.forget == two.forget
    assert {i.cluster for i in one.view("dev").forget} != {i.cluster for i in two.view("dev").forget}


def test_tofu_perturbed_rows_become_four_hundred_items_in_twenty_clusters(tmp_path: Path) -> None:
    if not TOFU.is_dir():
        pytest.skip("shared/data/tofu is not here")
    columns = "{question: prompt, answer: answer, paraphrased_question: paraphrases, perturbed_answer: wrong_answers}"
    text = "name: tofu\nsets:\n" + "".join(
        f"  {name}: {{path: '{TOFU / file}', columns: {columns}, cluster: {{rows: 20}}}}\n"
        for name, file in (("forget", "forget10_perturbed.json"), ("retain", "retain_perturbed.json"))
    )
    (tmp_path / "probe.yaml").write_text(text)
    knowledge = load_knowledge(tmp_path)
    assert len(knowledge.forget) == len(knowledge.retain) == 400
    assert len({item.cluster for item in knowledge.forget}) == 20
    assert all(len(item.wrong_answers) == 5 and item.paraphrases for item in knowledge.forget)
    assert {len(knowledge.view(split).forget) % 20 for split in ("dev", "gate", "sealed")} == {0}  # clusters stay whole


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"answer": None}, "line 3: no 'answer'"),
        ({"anwser": "x"}, "line 3: unknown field 'anwser'; did you mean 'answer'?"),
        ({"answer": 3}, "line 3: 'answer' must be text, found 3"),
        ({"paraphrases": [1]}, "line 3: 'paraphrases' must be a list of texts"),
        ({"entity_span": [5, 2]}, r"line 3: 'entity_span' must be \[start, end\]"),
        ({"cluster": None}, "line 3: no 'cluster'"),
        ({"prompt": None}, "line 3: no 'prompt', and relation '' has no template"),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(probe: Callable[..., Path], broken: Row, words: str) -> None:
    forget = rows("f")
    forget[2] = {**forget[2], **broken}
    with pytest.raises(KnowledgeError, match=r"forget\.jsonl, " + words):
        load_knowledge(probe(forget=forget))


def test_every_broken_line_is_reported_and_the_rest_counted(probe: Callable[..., Path]) -> None:
    with pytest.raises(KnowledgeError, match=r"(?s)has 16 faults:.*line 1:.*line 8:.*and 8 more"):
        load_knowledge(probe(forget=[{**row, "answer": 1} for row in rows("f")]))


def test_invalid_json_is_named_with_line_and_column(probe: Callable[..., Path]) -> None:
    folder = probe()
    (folder / "forget.jsonl").write_text('{"id": "a"}\n{"id": "b",}\n')
    with pytest.raises(KnowledgeError, match=r"forget\.jsonl, line 2 is not valid JSON: .*column 12"):
        load_knowledge(folder)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"forget": []}, "the forget set is empty"),
        ({"retain": []}, "the retain set is empty"),
        ({"retain": rows("f")}, "(?s)16 ids occur more than once.*16 items are both to forget and to keep"),
        ({"forget": rows("f") + rows("f")[:1]}, "1 ids occur more than once, first 'f-0-0'"),
        ({"forget": rows("f", 3)}, "3 clusters and needs at least 8"),
        ({"retain": rows("r", 2)}, "retain set has 2 clusters, none of them left for the dev and gate split"),
    ],
)
def test_sets_that_cannot_be_judged_are_refused(
    probe: Callable[..., Path], sets: dict[str, list[Row]], words: str
) -> None:
    with pytest.raises(KnowledgeError, match=words):
        load_knowledge(probe(**sets))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nsets: {forget: a.jsonl}\n", "line 2: sets.retain: this key is required"),
        (PLAIN.replace("forget:", "forgett:"), "(?s)line 2: sets.forget: .*required.*did you mean 'forget'"),
        (PLAIN.replace("forget.jsonl", "forgot.jsonl"), "There is no forget file .*did you mean 'forget.jsonl'"),
        (PLAIN + "templates:\n  a:\n    questions: ['none']\n", "line 6: templates.a: .*must contain {subject}"),
        ("name: x\nsets:\n  forget: {path: f, hub: g}\n  retain: r\n", "line 3: sets.forget: give either 'path"),
        ("name: x\nsets:\n  forget: {path: f, columns: {q: promt}}\n  retain: r\n", "did you mean 'prompt'"),
        ("name: x\nsets:\n  forget: {path: f, cluster: {}}\n  retain: r\n", "give either 'column: <name>' or 'rows"),
    ],
)
def test_a_faulty_probe_file_says_line_and_nearest_key(probe: Callable[..., Path], text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_knowledge(probe(text))


def test_missing_columns_list_what_was_found(probe: Callable[..., Path]) -> None:
    mapped = "forget: {path: forget.jsonl, columns: {question: prompt, answer: answer}}"
    text = PLAIN.replace("forget: forget.jsonl", mapped)
    with pytest.raises(KnowledgeError, match=r"no column 'question' \(to be read as 'prompt'\); found the columns id"):
        load_knowledge(probe(text))


def test_unknown_probe_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "probes" / "bios-people").mkdir(parents=True)
    (tmp_path / "probes" / "bios-people" / "probe.yaml").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    assert find_probe("bios-people") == Path("probes/bios-people/probe.yaml")
    with pytest.raises(UnknownNameError, match="no knowledge probe 'bios-peopel'.*did you mean 'bios-people'"):
        find_probe("bios-peopel")
    with pytest.raises(KnowledgeError, match="holds no probe.yaml"):
        find_probe(tmp_path / "probes")


def test_hub_sets_are_read_by_datasets_and_their_faults_are_sentences(
    probe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    text = PLAIN.replace("forget: forget.jsonl", "forget: {hub: some/data, config: c, split: test}")

    def fake(*names: Any, split: str) -> list[Row]:
        asked.append((*names, split))
        return rows("f")

    monkeypatch.setattr("datasets.load_dataset", fake)
    assert len(load_knowledge(probe(text)).forget) == 16 and asked == [("some/data", "c", "test")]

    def unreachable(*names: Any, split: str) -> list[Row]:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(KnowledgeError, match="Hub data set 'some/data'.*no route to the hub"):
        load_knowledge(probe(text))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="pip install datasets"):
        load_knowledge(probe(text))


@given(st.text(min_size=1).filter(str.strip))
def test_any_text_survives_the_way_from_the_file(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "probe.yaml").write_text(PLAIN)
        clean = text.encode("utf-8", "ignore").decode() or "x"
        if not clean.strip():
            return
        lines = [json.dumps(row, ensure_ascii=False) for row in [{**rows("f")[0], "answer": clean}, *rows("f")[1:]]]
        (folder / "forget.jsonl").write_bytes("\n".join(lines).encode())
        write_lines(folder / "retain.jsonl", rows("r"))
        assert load_knowledge(folder).forget[0].answer == clean


def test_every_message_is_free_of_tracebacks(probe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_knowledge(probe("name: [1\n"))
    assert re.search(r"line \d+, column \d+", str(caught.value)) and caught.value.exit_code == 2
