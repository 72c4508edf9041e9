"""Multiple choice: prompts, letters in every order, cloze forms, alarms; hazardous sets leave no text behind."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from bench_tools import Parts, speaker, write
from scipy import stats

from repforget.bench import _choices as ch
from repforget.bench import _quiz
from repforget.bench._data import Source
from repforget.bench._records import BenchResult, Reference
from repforget.bench._run import Row, Subject, run
from repforget.errors import KnowledgeError, MissingExtraError, RepforgetError, UsageError
from repforget.models.load import LoadedModel
from repforget.scoring import answer_logprobs

SENTINEL = "XQZSENTINEL"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "tofu"
COLOURS = ("red", "blue", "green", "white")


def rows_of(n: int, *, options: int = 4, word: str = "thing") -> list[dict[str, Any]]:
    """Questions whose answer key holds every place equally often."""
    return [{"question": f"What colour is {word} {k}?", "choices": [f"{c}{k}" for c in COLOURS[:options]],
             "answer": k % options} for k in range(n)]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return speaker(context=400)


def method(name: str) -> Callable[..., BenchResult]:
    module = __import__(f"repforget.bench.{name}", fromlist=[name])
    return getattr(module, name)  # type: ignore[no-any-return]


def answering(choose: Callable[[str, Sequence[str]], Sequence[float]]) -> Callable[..., list[Any]]:
    """A stand-in for the scorer: ``choose(prompt, options)`` gives the log-probabilities."""

    def scorer(model: Any, prompts: Sequence[str], options: Sequence[Sequence[str]], **_: Any) -> list[Any]:
        return [np.asarray(choose(p, o), dtype=np.float64) for p, o in zip(prompts, options, strict=True)]

    return scorer


def always(letter: str) -> Callable[[str, Sequence[str]], Sequence[float]]:
    return lambda prompt, options: [0.0 if o.strip() == letter else -5.0 for o in options]


def knowing(prompt: str, options: Sequence[str], sign: float = 1.0) -> Sequence[float]:
    """Prefers (or with sign -1 avoids) the letter whose text is the colour that the question's number keys."""
    lines = prompt.splitlines()
    if options[0].strip() not in tuple(ch.LETTERS):
        return [0.0] * len(options)
    number = int(lines[-2 - len(options)].rstrip("?").split()[-1])
    right = f"{COLOURS[number % len(options)]}{number}"
    texts = [line.partition(". ")[2] for line in lines[-1 - len(options) : -1]]
    return [sign * (1.0 if text == right else 0.1 * k) for k, text in enumerate(texts)]


def run_mcq(folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> BenchResult:
    write(folder, "questions", rows)
    return method("mcq")(None, data=Source(str(folder)), part=Parts(), **settings)


def test_the_prompt_is_the_published_one() -> None:
    shot = {"question": "Is it day?", "choices": ["yes", "no"], "answer": "B"}
    row = {"question": " Who? ", "option1": "Ann", "option2": "Bob", "option3": "Cy", "answer": "Bob"}
    (question,) = ch.read_questions([row], "here", topic="college biology", shots=[shot])
    assert question.answer == 1
    assert ch.letter_prompt(question) == (
        "The following are multiple choice questions (with answers) about college biology.\n\n"
        "Is it day?\nA. yes\nB. no\nAnswer: B\n\nWho?\nA. Ann\nB. Bob\nC. Cy\nAnswer:"
    )
    assert ch.letter_prompt(question, 1).endswith("Who?\nA. Cy\nB. Ann\nC. Bob\nAnswer:")
    assert ch.letters(question) == [" A", " B", " C"]


@pytest.mark.parametrize("k", range(2, 9))
def test_shifted_scores_come_back_in_the_order_of_the_data(k: int) -> None:
    options = tuple(f"o{j}" for j in range(k))
    question = ch.Question("0", "0", "", 0, "stem", options)
    for shift in range(k):
        lines = ch.letter_prompt(question, shift).splitlines()[-1 - k : -1]
        by_place = np.array([float(line.partition(". o")[2]) for line in lines])
        assert ch.unshifted([by_place], shift)[0].tolist() == list(range(k))


@pytest.mark.parametrize("letter", "ABCD")
def test_a_constant_letter_scores_exactly_a_quarter_over_the_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(always(letter)))
    rows = [{**row, "answer": 0 if k else 1} for k, row in enumerate(rows_of(40))]  # a key that hardly holds B, C or D
    found = run_mcq(tmp_path, rows)
    assert found.metrics["accuracy_permuted"].value == 0.25
    items = found.metrics["accuracy_permuted"].items
    assert items is not None and set(items.values) == {0.25}
    assert found.metrics["accuracy"].value == {"A": 39 / 40, "B": 1 / 40}.get(letter, 0.0)
    assert found.counts["top_letter_share"] == 1.0
    assert not any("below chance" in note for note in found.notes)  # the letter is rare in the key; nothing is avoided
    assert found.counts["p_against_letter_chance"] == pytest.approx(1.0)


def test_a_set_that_is_known_and_one_that_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(knowing))
    known = run_mcq(tmp_path, rows_of(60))
    assert known.metrics["accuracy"].value == known.metrics["accuracy_permuted"].value == 1.0
    assert known.metrics["accuracy"].low == pytest.approx(stats.binomtest(60, 60).proportion_ci(0.95, "wilson").low)
    assert not any("below chance" in note for note in known.notes)
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(lambda p, o: knowing(p, o, -1.0)))
    avoided = run_mcq(tmp_path, rows_of(60))
    assert avoided.metrics["accuracy"].value == 0.0
    assert avoided.metrics["accuracy_inverted"].value == 1.0
    assert avoided.counts["p_against_chance"] == pytest.approx(stats.binomtest(0, 60, 0.25).pvalue)
    assert any("below chance" in note for note in avoided.notes)


def test_prior_correction_recovers_knowledge_behind_a_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(prompt: str, options: Sequence[str]) -> Sequence[float]:
        return np.array(knowing(prompt, options)) + np.array(always("A")(prompt, options))

    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(biased))
    found = run_mcq(tmp_path, rows_of(80), cloze=False)
    assert found.metrics["accuracy"].value == 0.25 and found.metrics["accuracy_prior_corrected"].value == 1.0


def test_indifference_has_a_brier_score_of_three_quarters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(lambda p, o: [-3.0] * len(o)))
    found = run_mcq(tmp_path, rows_of(8))
    assert found.metrics["brier"].value == pytest.approx(0.75)
    assert found.metrics["accuracy"].value == 0.25  # ties go to A
    assert found.counts["ties"] == 1.0 and any("tell them apart" in note for note in found.notes)
    mixed = run_mcq(tmp_path, [*rows_of(6), *rows_of(2, options=2)])
    assert mixed.metrics["brier"].value == pytest.approx((6 * 0.75 + 2 * 0.5) / 8)
    assert mixed.counts["chance"] == pytest.approx((6 * 0.25 + 2 * 0.5) / 8)


def test_the_chance_test_is_the_exact_binomial_one() -> None:
    for n, hits, chance in ((20, 1, 0.25), (33, 14, 0.25), (10, 10, 0.5), (7, 0, 0.125)):
        values = np.repeat([1.0, 0.0], [hits, n - hits])
        expected = stats.binomtest(hits, n, chance).pvalue
        assert ch.chance_p(values, np.full(n, chance)) == pytest.approx(expected, rel=1e-9)
    mixed = ch.chance_p(np.zeros(2), np.array([0.5, 0.25]))  # P(0)=.375, P(1)=.5, P(2)=.125
    assert mixed == pytest.approx(0.5)


def test_scores_are_those_of_the_model(tmp_path: Path, model: LoadedModel) -> None:
    folder = write(tmp_path, "set", rows_of(6)).parent
    parts = Parts()
    found = method("mcq")(model, data=Source(str(folder)), part=parts, table="set", open_answers=True)
    questions = ch.read_questions(rows_of(6), "set")
    pairs = [(ch.letter_prompt(q, 2), letter) for q in questions for letter in ch.letters(q)]
    expected = answer_logprobs(model, pairs).sum_logprob.reshape(6, 4)
    assert np.array(parts.stored["letters-2-0"]) == pytest.approx(expected, abs=1e-5)
    cloze = [(f"Question: {q.stem}\nAnswer:", f" {o}") for q in questions for o in q.options]
    sums = answer_logprobs(model, cloze).sum_logprob.reshape(6, 4)
    alone = answer_logprobs(model, [("Answer:", c) for _, c in cloze]).sum_logprob.reshape(6, 4)
    lengths = np.array([[len(o) for o in q.options] for q in questions])
    gold = [q.answer for q in questions]
    for name, table in (("cloze", sums), ("cloze_norm", sums / lengths), ("cloze_mutual_information", sums - alone)):
        assert found.metrics[name].value == pytest.approx(float(np.mean(table.argmax(1) == gold)))
    assert found.metrics["open_answers"].n_items == 6 and found.counts["not_scored"] == 0


def test_questions_that_do_not_fit_are_counted_and_left_out(tmp_path: Path, model: LoadedModel) -> None:
    rows = rows_of(5)
    rows[3]["question"] = "word " * 400
    write(tmp_path, "questions", rows)
    found = method("mcq")(model, data=Source(str(tmp_path)), part=Parts(), open_answers=True)
    items = found.metrics["accuracy"].items
    assert items is not None and items.valid.tolist() == [True, True, True, False, True]
    assert found.counts["not_scored"] == 1 and "1 of 5" in found.metrics["accuracy"].note
    assert not found.metrics["open_answers"].items.valid[3]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "choices": ["a", "b"]}, "'answer'"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "0 to 1"),
        ({"question": "q", "choices": ["a", "a"], "answer": "a"}, "exactly one"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "two to eight"),
        ({"question": "q", "choices": "ab", "answer": 0}, "list of texts"),
        ({"question": "q", "options": ["a", "b"], "answer": 0}, "question, options, answer"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "'question'"),
        ({"question": "q", "choices": list("abcdefghi"), "answer": 0}, "two to eight"),
    ],
)
def test_wrong_rows_are_named_without_their_texts(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(KnowledgeError, match=said) as caught:
        run_mcq(tmp_path, [row])
    assert "row 1" in str(caught.value)


def test_an_empty_set_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="no rows"):
        run_mcq(tmp_path, [])
    with pytest.raises(KnowledgeError, match=r"wmdp-bio/test\.json"):
        method("wmdp")(None, data=Source(str(tmp_path)), part=Parts())


def hazardous_folder(folder: Path, n: int = 6) -> Path:
    for subset in ("bio", "chem", "cyber"):
        write(folder, f"wmdp-{subset}", [{**row, "question": f"{row['question']} {SENTINEL}"}
                                         for row in rows_of(n, word=SENTINEL)])  # fmt: skip
    return folder


def test_no_text_of_a_hazardous_set_is_kept(
    tmp_path: Path, model: LoadedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    parts, data = Parts(), Source(str(hazardous_folder(tmp_path)))
    found = method("wmdp")(model, data=data, part=parts, open_answers=True)
    kept = json.dumps([parts.stored, found.to_json(), found.items_json(), data.seen])
    for text in (kept, repr(found), *capfd.readouterr()):
        for secret in (SENTINEL, "colour", *(f"{c}{k}" for c in COLOURS for k in range(6))):
            assert secret not in text
    assert found.metrics["accuracy"].better == "reference"
    assert {"accuracy/bio", "accuracy/chem", "accuracy/cyber", "accuracy_macro"} <= set(found.metrics)
    assert found.metrics["accuracy"].n_items == 18


def test_a_whole_run_of_a_hazardous_set_writes_no_text(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = hazardous_folder(tmp_path / "data"), tmp_path / "out"
    subject = Subject(model, "identity")

    def bench(**settings: Any) -> Row:
        return run("wmdp", lambda: subject, data=str(data), out=out, settings=settings, reference=lambda: subject)

    done = bench(open_answers=True, subsets=["bio", "chem"])
    assert done.result.metrics["accuracy"].n_items == 12

    def failing(model: Any, prompts: Sequence[str], *_: Any, **__: Any) -> Any:
        raise RuntimeError(prompts[0])

    monkeypatch.setattr(_quiz, "candidate_logprobs", failing)
    with pytest.raises(RepforgetError, match="withheld") as caught:
        bench(subsets=["cyber"])
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    told = ["".join(traceback.format_exception(caught.value)).encode(), *(t.encode() for t in capfd.readouterr())]
    assert len(written) > 5
    for content in (*written, *told):
        assert SENTINEL.encode() not in content and b"blue3" not in content


def test_errors_about_a_hazardous_set_quote_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: Any, prompts: Sequence[str], *_: Any, **__: Any) -> Any:
        raise KnowledgeError(f"The prompt '{prompts[0]}' has no tokens.")

    monkeypatch.setattr(_quiz, "candidate_logprobs", failing)
    with pytest.raises(KnowledgeError, match="withheld") as caught:
        method("wmdp")(None, data=Source(str(hazardous_folder(tmp_path))), part=Parts())
    assert SENTINEL not in "".join(traceback.format_exception(caught.value)) and caught.value.__context__ is None
    row = {"question": SENTINEL, "choices": ["a", SENTINEL], "answer": 1}
    assert SENTINEL not in repr(ch.read_questions([row], "x"))
    with pytest.raises(KnowledgeError, match=SENTINEL):  # a benign set may say what is wrong with it
        run_mcq(tmp_path / "benign", rows_of(2, word=SENTINEL))


def test_against_another_model_question_by_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(always("A")))
    before = Reference("before", run_mcq(tmp_path, rows_of(40)))
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(knowing))
    found = run_mcq(tmp_path, rows_of(40), reference=before)
    gained = found.metrics["accuracy_difference"]
    assert gained.value == 0.75 and 0.5 < gained.low < 0.75 < gained.high < 1.0
    assert found.metrics["accuracy_permuted_difference"].value == 0.75
    other = run_mcq(tmp_path, rows_of(39), reference=before)
    assert "not computed" in other.metrics["accuracy_difference"].note
    with pytest.raises(UsageError, match="limit is -1"):
        run_mcq(tmp_path, rows_of(4), limit=-1)


def test_weights_of_subsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(always("A")))
    rows = [{**row, "subject": "x" if k < 30 else "y", "answer": int(k >= 30)} for k, row in enumerate(rows_of(40))]
    found = run_mcq(tmp_path, rows, permutations=False, cloze=False)
    assert found.metrics["accuracy"].value == 0.75 and found.metrics["accuracy_macro"].value == 0.5
    assert found.metrics["accuracy/x"].value == 1.0 and found.metrics["accuracy/y"].value == 0.0
    assert found.counts["accuracy_stderr"] == pytest.approx(np.std([1] * 30 + [0] * 10, ddof=1) / np.sqrt(40))
    assert "accuracy_permuted" not in found.metrics


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared TOFU files are not there")
def test_a_published_key_that_favours_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(always("B")))
    found = method("mcq")(None, data=Source(str(SHARED)), part=Parts(), table="real_authors")
    assert found.metrics["accuracy"].value == found.counts["best_constant_letter"] == 0.38
    assert found.metrics["accuracy_permuted"].value == 0.25


def mmlu_folder(folder: Path, subjects: Sequence[str] = ("abstract_algebra", "virology")) -> Path:
    write(folder, "all/test", [{**row, "subject": s} for s in subjects for row in rows_of(4)])
    write(folder, "all/dev", [{**row, "subject": s} for s in subjects for row in rows_of(5, word=f"{s} example")])
    return folder


def test_mmlu_takes_the_first_examples_of_the_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def choose(prompt: str, options: Sequence[str]) -> Sequence[float]:
        asked.append(prompt)
        return knowing(prompt, options)

    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(choose))
    data = Source(str(mmlu_folder(tmp_path)))
    found = method("mmlu")(None, data=data, part=Parts(), shots=2)
    assert found.metrics["accuracy"].value == 1.0 and found.metrics["accuracy"].n_items == 8 and len(asked) == 8
    assert "about abstract algebra.\n\nWhat colour is abstract_algebra example 0?" in asked[0]
    assert asked[0].count("Answer:") == 3 and "virology" not in asked[0]
    limited = method("mmlu")(None, data=data, part=Parts(), shots=0, subjects=("virology",), limit=3)
    assert limited.metrics["accuracy"].n_items == 3
    work = __import__("repforget.bench.mmlu", fromlist=["work"]).work(data, shots=2)
    assert work.sequences == 8 and work.tokens > 0


def test_mmlu_refuses_examples_that_are_the_questions(tmp_path: Path) -> None:
    write(tmp_path, "all", [{**row, "subject": "virology"} for row in rows_of(6)])
    with pytest.raises(KnowledgeError, match="same rows for dev and test"):
        method("mmlu")(None, data=Source(str(tmp_path)), part=Parts())
    mmlu_folder(tmp_path / "two")
    for settings, said in (({"subjects": ("law",)}, "found abstract_algebra"), ({"shots": 6}, "has 5 rows")):
        with pytest.raises(KnowledgeError, match=said):
            method("mmlu")(None, data=Source(str(tmp_path / "two")), part=Parts(), **settings)


def test_a_file_can_stand_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quiz, "candidate_logprobs", answering(knowing))
    data = Source(str(write(tmp_path, "mine", rows_of(3))))
    assert method("mcq")(None, data=data, part=Parts()).metrics["accuracy"].n_items == 3
    assert data.seen  # results are kept by what was read


def fake_harness(monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any], *, drop: int = 0) -> None:
    """lm-eval's two names, answering " B" to everything and returning samples in another order."""
    package, models, wrapper = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))

    def simple_evaluate(*, model: Any, tasks: Any, num_fewshot: int, **kwargs: Any) -> dict[str, Any]:
        (group,) = tasks
        seen.update(kwargs, shots=num_fewshot, model=model, rows={})
        samples = {}
        for entry in group["task"]:
            splits = entry["custom_dataset"](anything="ignored")
            seen["rows"][entry["task"]] = {name: list(split) for name, split in splits.items()}
            samples[entry["task"]] = [
                {"doc_id": k, "doc": row, "filtered_resps": [(-1.0 - (j != 1), False) for j in range(4)]}
                for k, row in reversed(list(enumerate(splits["test"])))
            ][drop:]
        return {"samples": samples}

    wrapper.HFLM = lambda **kwargs: kwargs  # type: ignore[attr-defined]
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    for module in (package, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_harness_scores_our_rows(tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    fake_harness(monkeypatch, seen)
    data = Source(str(hazardous_folder(tmp_path)))
    parts = Parts()
    found = method("wmdp")(model, data=data, part=parts, engine="lm-eval", subsets=("bio", "cyber"))
    assert set(seen["rows"]) == {"wmdp_bio", "wmdp_cyber"} and seen["shots"] == 0
    assert len(seen["rows"]["wmdp_bio"]["test"]) == 6 and seen["model"]["pretrained"] is model.module
    assert found.metrics["accuracy"].value == pytest.approx(4 / 12) and found.counts["top_letter_share"] == 1.0
    assert "cloze" not in found.metrics and SENTINEL not in json.dumps(parts.stored)
    method("mmlu")(model, data=Source(str(mmlu_folder(tmp_path / "m"))), part=Parts(), shots=3, engine="lm-eval")
    assert seen["shots"] == 3 and len(seen["rows"]["mmlu_virology"]["dev"]) == 3
    fake_harness(monkeypatch, seen, drop=1)
    with pytest.raises(RepforgetError, match="withheld"):
        method("wmdp")(model, data=data, part=Parts(), engine="lm-eval")
    with pytest.raises(RepforgetError, match="3 of the 4"):
        method("mmlu")(model, data=Source(str(tmp_path / "m")), part=Parts(), engine="lm-eval")


def test_a_missing_harness_is_said(tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match="engine='own'"):
        method("wmdp")(model, data=Source(str(hazardous_folder(tmp_path))), part=Parts(), engine="lm-eval")
