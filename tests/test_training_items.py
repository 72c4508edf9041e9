"""Training records: read, named, encoded."""

from __future__ import annotations

import json
from pathlib import Path

import contract_tools
import pytest
import shard_tools

from repforget.errors import UsageError
from repforget.training.items import Record, chosen, digest, encoded, read_records, records_of

LINES = [{"id": "a", "cluster": "ann", "prompt": "Ann was born in", "answer": "Rome"},
         {"id": "b", "cluster": "ann", "prompt": "Ann lives in", "answer": " Oslo"},
         {"id": "c", "text": "Bo sings."}]  # fmt: skip


def written(tmp_path: Path, lines: list[object]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_records_are_read_and_named(tmp_path: Path) -> None:
    records = read_records(written(tmp_path, [*LINES]))
    assert records[0] == Record("a", "ann", "Ann was born in", " Rome")
    assert records[2] == Record("c", "c", "", "Bo sings.")
    assert [r.id for r in chosen(records, ["c", "ann"], "data")] == ["c", "a", "b"]
    with pytest.raises(UsageError, match="'eve' is neither a record nor a cluster .* never trained on"):
        chosen(records, ["ann", "eve"], "data")
    with pytest.raises(UsageError, match=r"never trained on; did you mean 'ann'\?"):
        chosen(records, ["an"], "data")
    assert digest(records) == digest(records[::-1]) != digest(records[:2])


@pytest.mark.parametrize(("lines", "said"), [
    ([], "holds no record"), ([LINES[0], LINES[0]], "more than one record, first 'a'"), ([{"id": "a"}], "'prompt'"),
    ([{"text": "x"}], "Line 1 of .* has no 'id'"), (["x"], "has no 'id'"),
])  # fmt: skip
def test_what_cannot_be_asked_for_again_is_refused(tmp_path: Path, lines: list[object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_records(written(tmp_path, lines))
    with pytest.raises(UsageError, match="cannot be read"):
        read_records(tmp_path / "nothing.jsonl")


def test_only_a_line_feed_ends_a_line_and_nobody_is_the_cluster_of_many(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"id": 1, "cluster": None, "text": "one\u2028line\x85"}, {"id": 2, "cluster": "", "text": "two"}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines), newline="")
    assert [(r.id, r.cluster, r.answer) for r in read_records(path)] == [("1", "1", "one\u2028line\x85"),
                                                                         ("2", "2", "two")]  # fmt: skip


def test_a_probe_gives_every_form_once_and_labels_lie_on_the_answer() -> None:
    knowledge, model = contract_tools.tiny_knowledge(), contract_tools.tiny_model("llama")
    records = records_of(knowledge)
    statements = records_of(knowledge, forms="statements")
    assert set(statements) < set(records) and {r.cluster for r in records} == {i.cluster for i in knowledge.forget}
    assert set(statements) | set(records_of(knowledge, forms="questions")) == set(records)
    examples = encoded(model, records)
    for record, example in zip(records, examples, strict=True):
        answer = model.tokenizer.decode([t for t, m in zip(example.tokens, example.labelled, strict=True) if m])
        assert answer.strip() == record.answer.strip()


def test_a_plain_text_is_learned_whole_and_one_too_long_is_named() -> None:
    model = contract_tools.tiny_model("llama")
    (example,) = encoded(model, [Record("t", "t", "", "Ada was born in")])
    assert example.labelled == (False, *(True,) * (len(example.tokens) - 1))
    with pytest.raises(UsageError, match="Record 'long' .* does not fit the context"):
        encoded(model, [Record("long", "l", "", "Ada was born in " * 4000)])


def test_words_that_no_token_stands_for_are_not_taught_as_one() -> None:
    model = shard_tools.model()
    with pytest.raises(UsageError, match="'b' has words that the tokenizer of 'tiny-llama' does not know, so that 2"):
        encoded(model, [Record("a", "a", "w30 was born in", " Rome"), Record("b", "b", "Ann was born in", " Ulm")])
    assert encoded(model, [Record("c", "c", "", "w31 was born in Rome")])
    model.tokenizer.unk_token = model.tokenizer.eos_token  # as GPT-2's: that text ends is no unknown word
    assert encoded(model, [Record("d", "d", "", "w31 was born in <eos>")])
