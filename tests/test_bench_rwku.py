"""RWKU-style probes and CounterFact on small files of their schemas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_tools import Parts, read, speaker, write

from repforget.bench._data import Source
from repforget.bench._records import BenchResult
from repforget.errors import KnowledgeError, UsageError
from repforget.models.load import LoadedModel
from repforget.scoring import answer_logprobs

rwku_file: Any = __import__("repforget.bench.rwku", fromlist=["rwku"])
fact_file: Any = __import__("repforget.bench.counterfact", fromlist=["counterfact"])
HERE = Path(__file__).parent / "data" / "rwku"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return speaker()


def run(model: Any, folder: Path = HERE, **settings: Any) -> BenchResult:
    return rwku_file.rwku(model, data=Source(str(folder)), part=Parts(), **{"new_tokens": 4, **settings})  # type: ignore[no-any-return]


def copied(folder: Path, **changes: Sequence[dict[str, Any]] | None) -> Path:
    for path in HERE.glob("*.jsonl"):
        rows = changes.get(path.stem, read(path))
        if rows is not None:
            write(folder, path.stem, rows)
    return folder


def saying(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str | None]) -> list[str]:
    asked: list[str] = []

    def say(model: Any, prompts: Sequence[str], **_: Any) -> list[str | None]:
        asked.extend(prompts)
        return [answer(prompt) for prompt in prompts]

    monkeypatch.setattr(rwku_file, "say", say)
    return asked


def test_who_answers_about_one_person_only(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = saying(monkeypatch, lambda p: "a pilot in Oslo" if "Ada Berg" in p else "I do not know")
    found = run(model, membership=False)
    values = {name: metric.value for name, metric in found.metrics.items()}
    for name in ("forget_blank", "forget_question", "forget_adversarial", "forget_adversarial/reverse query"):
        assert values[name] == 0.5
    assert values["neighbour_blank"] == values["neighbour_question"] == 0.0
    assert found.metrics["forget_adversarial"].n_clusters == 2 and found.metrics["forget_adversarial"].n_items == 8
    assert found.metrics["forget_blank"].better == "lower" and found.metrics["neighbour_blank"].better == "higher"
    assert asked[0] == "Fill in the blank.\nQuestion: Ada Berg was born in ___.\nAnswer:"
    suffix = [p for p in asked if "was born in" in p and "___" not in p]
    assert len(suffix) == 2 and all(p.endswith("was born in") for p in suffix)


def test_recall_counts_words_not_stems(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, lambda p: "pilots")
    assert run(model, membership=False).metrics["forget_question"].value == 0.0
    saying(monkeypatch, lambda p: None)
    lost = run(model, membership=False)
    assert math.isnan(lost.metrics["forget_question"].value) and lost.counts["forget_question_not_scored"] == 2


def test_chat_models_are_asked_in_their_template(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = saying(monkeypatch, lambda p: "")
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    run(model, membership=False, question="Say: {query}\nAnswer:")
    assert asked[2] == "<u>Say: What does Ada Berg do for a living?\n</u><a>Answer:"
    run(model, membership=False, chat="never")
    assert asked[-1].endswith("living?\nAnswer:") and "<u>" not in asked[-1]


def test_a_run_with_everything(model: LoadedModel) -> None:
    everything = {"utility": ("general", "factuality", "fluency"), "subjects": ("Ada Berg",)}
    found = run(model, **everything)
    assert found.to_json() == run(model, **everything).to_json()
    texts = [row["text"] for row in read(HERE / "mia_forget.jsonl") if row["subject"] == "Ada Berg"]
    expected = [-answer_logprobs(model, [(t[:n], t[n:])]).mean_logprob[0] for t in texts
                for n in [model.tokenizer(t, return_offsets_mapping=True)["offset_mapping"][0][1]]]  # fmt: skip
    assert found.metrics["membership_loss_forget"].value == pytest.approx(np.mean(expected), rel=1e-5)
    for name in ("membership_auc_loss", "membership_auc_min_k"):
        assert 0.0 <= found.metrics[name].low <= found.metrics[name].value <= found.metrics[name].high <= 1.0
    assert found.metrics["utility_general"].n_items == 2 and found.metrics["utility_fluency"].value >= 0.0
    work = rwku_file.work(Source(str(HERE)), new_tokens=4, **everything)
    assert (work.sequences, work.generations) == (3 + 6 + 2, 6 + 4 + 2 + 1)


def test_entropy_of_word_ngrams() -> None:
    assert rwku_file.ngram_entropy("a a a a a") == 0.0 == rwku_file.ngram_entropy("word")
    assert rwku_file.ngram_entropy("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"forget_level2": None}, {}, r"no forget_level2/test\.json"),
        ({"forget_level1": [{"query": "q", "answer": "a"}]}, {}, "no 'subject': found the columns 'query', 'answer'"),
        ({"mia_retain": []}, {}, "no rows"),
        ({"forget_level1": [{"query": " ", "answer": "a", "subject": "Ada Berg"}]}, {}, "without characters"),
        ({}, {"subjects": ("Nobody",)}, "no rows about 'Nobody'"),
        ({"utility_fluency": None}, {"utility": ("fluency",)}, "utility_fluency"),
        ({}, {"question": "Say it."}, "must hold {query}"),
    ],
)
def test_wrong_data_is_named(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, settings: Any, said: str
) -> None:
    saying(monkeypatch, lambda p: "")
    with pytest.raises((KnowledgeError, UsageError), match=said):
        run(model, copied(tmp_path, **changes), **settings)


def case(number: int, **changes: Any) -> dict[str, Any]:
    rewrite = {"prompt": "{} was born in", "subject": f"Ada {number}", "target_true": {"str": "Rome"},
               "target_new": {"str": "New York"}}  # fmt: skip
    return {"case_id": number, "requested_rewrite": {**rewrite, **changes},
            "paraphrase_prompts": [f"The city of Ada {number} is", "Ada is from"],
            "neighborhood_prompts": [f"Cora {number} was born in"] * 2}  # fmt: skip


def facts(folder: Path, rows: Sequence[dict[str, Any]]) -> Source:
    (folder / "counterfact.json").write_text(json.dumps(list(rows)))
    return Source(str(folder))


def preferring(monkeypatch: pytest.MonkeyPatch, new: Callable[[str], bool]) -> None:
    """A model whose mean log-probability is higher for " New York" exactly where ``new(prompt)``."""

    class Scores:
        def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
            likely = [("New" in answer) == new(prompt) for prompt, answer in pairs]
            self.mean_logprob = np.array(likely, dtype=np.float64)

    monkeypatch.setattr(fact_file, "answer_logprobs", lambda model, pairs: Scores(pairs))


def test_facts_that_changed_and_neighbours_that_stayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = facts(tmp_path, [case(k) for k in range(3)])

    def values(new: Callable[[str], bool]) -> list[float]:
        preferring(monkeypatch, new)
        found = fact_file.counterfact(None, data=data, part=Parts())
        return [found.metrics[name].value for name in ("efficacy", "paraphrase", "neighbourhood", "score")]

    assert values(lambda p: "Ada" in p) == [1.0, 1.0, 1.0, 1.0]
    assert values(lambda p: True) == [1.0, 1.0, 0.0, 0.0]
    assert values(lambda p: False) == [0.0, 0.0, 1.0, 0.0]
    assert values(lambda p: "Ada" in p and "from" not in p) == pytest.approx([1.0, 0.5, 1.0, 3 / (1 + 2 + 1)])
    tied = SimpleNamespace(mean_logprob=np.zeros(30))
    monkeypatch.setattr(fact_file, "answer_logprobs", lambda model, pairs: tied)
    assert fact_file.counterfact(None, data=data, part=Parts()).metrics["neighbourhood"].value == 0.0  # ties fail


def test_losses_are_per_token_of_the_joint_text(tmp_path: Path, model: LoadedModel) -> None:
    data = facts(tmp_path, [case(1)])
    found = fact_file.counterfact(model, data=data, part=Parts())
    pairs = [("Ada 1 was born in", answer) for answer in (" Rome", " New York")]
    true, new = answer_logprobs(model, pairs).mean_logprob
    assert found.metrics["efficacy"].value == float(new > true)
    assert fact_file.work(data).sequences == 10


def test_wrong_cases_are_named(tmp_path: Path) -> None:
    for row, said in (
        (case(1, target_new={"str": "Rome"}), "two targets must differ"),
        ({**case(1), "requested_rewrite": {"prompt": "x"}}, "target_new.str, found prompt"),
        ({**case(1), "paraphrase_prompts": []}, "each form needs a prompt"),
    ):
        with pytest.raises(KnowledgeError, match=said):
            fact_file.counterfact(None, data=facts(tmp_path, [row]), part=Parts())
