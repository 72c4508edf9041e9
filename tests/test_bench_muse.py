"""MUSE: closed forms of its six metrics, its prompts, and runs on small files of its schema."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_tools import Parts, read, speaker, write
from hypothesis import given
from hypothesis import strategies as some
from scoring_models import byte_tokenizer, word_tokenizer
from sklearn.metrics import roc_auc_score

from repforget.bench import _muse as m
from repforget.bench import _muse_series as series
from repforget.bench._data import Source
from repforget.bench._records import BenchResult, Reference, mean_metric
from repforget.bench._saying import against, whole_text
from repforget.errors import KnowledgeError, UsageError
from repforget.models.load import LoadedModel
from repforget.records import ItemScores
from repforget.scoring import encode

muse_file: Any = __import__("repforget.bench.muse", fromlist=["muse"])
PLACES = ("harbour", "market", "bridge", "tower", "garden", "station")
HERE = Path(__file__).parent / "data" / "muse"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return speaker(0)


def run(model: Any, data: Source | Path = HERE, part: Any = None, **settings: Any) -> BenchResult:
    source = data if isinstance(data, Source) else Source(str(data))
    small = {"verbatim_tokens": 8, "answer_tokens": 4, "shots": 2, **settings}
    return muse_file.muse(model, data=source, part=part or Parts(), **small)  # type: ignore[no-any-return]


def copied(folder: Path, **changes: Sequence[dict[str, Any]] | None) -> Path:
    """The small data set with some tables replaced ("privleak/forget") or left out (None)."""
    for path in HERE.rglob("*.jsonl"):
        name = path.relative_to(HERE).with_suffix("").as_posix()
        rows = changes.get(name, read(path))
        if rows is not None:
            write(folder, name, rows)
    return folder


def test_privleak_in_closed_form() -> None:
    assert m.privleak(0.4, 0.4) == 0.0 and m.privleak(0.0, 0.5) == -100.0
    assert m.privleak(1.0, 0.4772) == pytest.approx(109.6, abs=0.05)  # the bounds that follow from the constants
    assert m.privleak(1.0, 0.5393) == pytest.approx(85.4, abs=0.05)
    assert math.isnan(m.privleak(0.5, 0.0))
    for auc, reference, coded in ((2e-5, 0.40, 66.7), (2e-5, 0.90, 900.0), (2e-5, 0.98, 4899.9)):
        # The other orientation of the AUCs: forgotten texts on top.
        assert m.privleak(1 - auc, 1 - reference) == pytest.approx(coded, abs=0.05)


@given(some.lists(some.integers(0, 5), min_size=1, max_size=9), some.lists(some.integers(0, 5), min_size=1, max_size=9))
def test_the_auc_is_of_unseen_over_forgotten_and_swaps(a: list[int], b: list[int]) -> None:
    high, low = np.array(a, dtype=float), np.array(b, dtype=float)
    found = m.forget_auc(high, low)
    labels = np.repeat([1, 0], [len(a), len(b)])
    assert found == pytest.approx(roc_auc_score(labels, np.concatenate([high, low])))
    assert found == pytest.approx(1 - m.forget_auc(low, high))


@given(some.lists(some.floats(-1, 1), min_size=3, max_size=3), some.floats(-2, 2))
def test_item_slopes_average_to_the_slope_of_the_average(noise: list[float], slope: float) -> None:
    at = np.log([10.0, 20.0, 40.0])
    values = np.array([[slope * x + y, slope * x - y] for x, y in zip(at, noise, strict=True)])
    slopes = m.item_slopes(values, at)
    assert slopes.mean() == pytest.approx(slope, abs=1e-9)
    assert slopes[0] == pytest.approx(np.polyfit(at, values[:, 0], 1)[0], abs=1e-9)


def test_slopes_need_two_places() -> None:
    with pytest.raises(UsageError, match="at least two models"):
        m.item_slopes(np.zeros((2, 3)), [1.0, 1.0])


def test_what_comes_back_after_later_requests() -> None:
    flat = m.Requests({(i, j): np.full(4, 0.3) for i in range(3) for j in range(i, 3)}, 3)
    assert flat.worst()[1] == 0.0 and not flat.drift(0).any() and np.isnan(flat.matrix()[1, 0])
    scores = {(0, 0): [0.1, 0.3], (0, 1): [0.5, 0.3], (0, 2): [0.3, 0.3],
              (1, 1): [0.2, 0.2], (1, 2): [0.1, 0.1], (2, 2): [0, 0]}  # fmt: skip
    found = m.Requests({key: np.array(value, dtype=float) for key, value in scores.items()}, 3)
    assert found.drift(0).tolist() == pytest.approx([0.3, 0.0])
    assert found.drift(1).tolist() == pytest.approx([-0.1, -0.1])
    assert found.worst() == (0, pytest.approx(0.2))
    assert m.area([0.4, 0.6, 0.2]) == pytest.approx(0.45) and m.area([0.7]) == 0.7


def test_a_text_is_scored_from_its_first_predicted_token() -> None:
    words, letters = word_tokenizer(), byte_tokenizer()
    assert whole_text(words, "Ada was born") == ("", "Ada was born")  # <bos> stands in front
    prompt, rest = whole_text(letters, "Ada was born")
    assert prompt + rest == "Ada was born"
    assert encode(letters, prompt, rest).start == 1 and encode(words, "", "Ada was born").start == 1


def test_the_prompts_are_the_published_ones() -> None:
    prompts, rows = muse_file._questions(Source(str(HERE)), "forget", 1, 0)
    shot = read(HERE / "knowmem/forget_qa_icl.jsonl")[0]
    expected = f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\nQuestion: {rows[0]['question']}\nAnswer: "
    assert prompts[0] == expected


def saying(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], str | None]) -> None:
    def say(model: Any, prompts: Sequence[str], **_: Any) -> list[str | None]:
        return [answer(prompt) for prompt in prompts]

    monkeypatch.setattr(muse_file, "say", say)


def truths() -> dict[str, str]:
    out = {row["prompt"]: row["gt"] for row in read(HERE / "verbmem/forget.jsonl")}
    for side in ("forget", "retain"):
        prompts, rows = muse_file._questions(Source(str(HERE)), side, 2, 0)
        out |= {prompt: row["answer"] for prompt, row in zip(prompts, rows, strict=True)}
    return out


def test_a_model_that_copies_has_every_memory(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    known = truths()
    saying(monkeypatch, lambda prompt: known[prompt])
    found = run(model, verbatim_tokens=500)
    assert [found.metrics[name].value for name in ("verbmem", "knowmem_forget", "utility")] == [1.0, 1.0, 1.0]
    cut = run(model, verbatim_tokens=40)  # the truth is cut, what was said is not: precision falls
    assert 0.0 < cut.metrics["verbmem"].value < 1.0
    saying(monkeypatch, lambda prompt: "")
    assert run(model).metrics["verbmem"].value == 0.0


def test_stemming_is_the_peers(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, lambda prompt: "walking boats")
    data = copied(tmp_path, **{"knowmem/forget_qa": [{"question": "q?", "answer": "walked boat"}]})
    assert run(model, data).metrics["knowmem_forget"].value == 0.0
    assert run(model, data, compat="open-unlearning").metrics["knowmem_forget"].value == 1.0


def test_a_run_on_small_files(model: LoadedModel) -> None:
    parts = Parts()
    found = run(model, part=parts)
    again = run(model, part=Parts())
    assert found.to_json() == again.to_json()
    for name in ("verbmem", "knowmem_forget", "utility"):
        metric = found.metrics[name]
        assert 0.0 <= metric.value <= 1.0 and metric.n_items == 4
        assert "no reference" in found.metrics[f"{name}_difference"].note
    leak = found.metrics["privleak"]
    assert math.isnan(leak.value) and leak.note.startswith("not computed, because")
    auc = found.metrics["privleak_auc"]
    assert auc.items is not None
    values = auc.items.values
    assert auc.value == pytest.approx(m.forget_auc(values[6:], values[:6])) and auc.low <= auc.value <= auc.high
    work = muse_file.work(Source(str(HERE)), verbatim_tokens=8, answer_tokens=4, shots=2)
    assert (work.sequences, work.generations, work.new_tokens) == (12, 12, 4 * 8 + 8 * 4)


def test_against_a_reference(model: LoadedModel) -> None:
    other = Reference("other", run(speaker(1)))
    found = run(model, reference=other)
    auc, theirs = found.metrics["privleak_auc"].value, other.result.metrics["privleak_auc"].value
    assert found.metrics["privleak"].value == pytest.approx(m.privleak(auc, theirs))
    assert f"{auc:.4f}" in found.metrics["privleak"].note and f"{theirs:.4f}" in found.metrics["privleak"].note
    gap = found.metrics["verbmem"].value - other.result.metrics["verbmem"].value
    assert found.metrics["verbmem_difference"].value == pytest.approx(gap)
    same = run(model, reference=Reference("same", run(model)))
    assert same.metrics["privleak"].value == 0.0 == same.metrics["utility_difference"].value
    constant = run(model, published_reference="news").metrics["privleak"]
    assert constant.value == pytest.approx(m.privleak(auc, 0.4772)) and "0.4772" in constant.note


def test_separated_texts_leak_everything(model: LoadedModel) -> None:
    texts = {name: [{"text": "x"}] * 3 for name in ("forget", "holdout")}

    def metric(forget: float, reference: Reference | None = None) -> list[Any]:
        member = {"forget": {"scores": [forget, forget - 0.1, forget - 0.2], "short": 0},
                  "holdout": {"scores": [-2.0, -2.1, -2.2], "short": 0}}  # fmt: skip
        return muse_file._leak(texts, member, reference, "none", 0.4, 0)  # type: ignore[no-any-return]

    alike = metric(-2.0)[0]
    assert alike.value == 0.5
    never = Reference("never", BenchResult.of("muse", [alike], {}))
    leaked, over = metric(-0.1, never)[1], metric(-9.0, never)[1]
    assert leaked.value == -100.0 and over.value == 100.0
    at_zero = Reference("knows", BenchResult.of("muse", [metric(-0.1)[0]], {}))
    assert "reference's AUC is 0" in metric(-2.0, at_zero)[1].note


def test_short_and_long_texts_are_counted(model: LoadedModel, tmp_path: Path) -> None:
    rows = [{"text": "a b"}, {"text": "the red city is Oslo . " * 90}, {"text": "the blue city is Rome ."}]
    data = copied(tmp_path, **{"privleak/forget": rows})
    found = run(model, data).metrics["privleak_auc"]
    assert found.items is not None and found.items.valid[:3].tolist() == [True, False, True]
    assert "1 texts are so short" in found.note and "1 texts do not fit" in found.note
    long = [{"text": "word " * 400}] * 2
    none = run(model, copied(tmp_path / "long", **{"privleak/forget": long})).metrics["privleak_auc"]
    assert math.isnan(none.value) and "fits the model's context" in none.note


def test_prompts_that_do_not_fit_are_counted(model: LoadedModel, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 300, "gt": "next"}, {"prompt": "The harbour", "gt": "was closed"}]
    found = run(model, copied(tmp_path, **{"verbmem/forget": rows}))
    assert found.counts["verbmem_not_scored"] == 1 and "1 of 2" in found.metrics["verbmem"].note


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verbmem/forget": [{"prompt": "a", "continuation": "b"}]}, "no 'gt': found the columns 'prompt', 'cont"),
        ({"verbmem/forget": None}, r"no verbmem/forget\.json"),
        ({"privleak/holdout": []}, "has no rows"),
        ({"knowmem/forget_qa": [{"question": "q", "answer": 3}]}, "must hold text, found int"),
        ({"knowmem/retain_qa": None}, r"no knowmem/retain_qa\.json"),
    ],
)
def test_wrong_folders_are_named(model: LoadedModel, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KnowledgeError, match=said):
        run(model, copied(tmp_path, **changes))


def test_one_file_is_not_both_sides(model: LoadedModel, tmp_path: Path) -> None:
    data = copied(tmp_path, **{"privleak/forget": None, "privleak/holdout": None})
    (data / "privleak.jsonl").write_text(json.dumps({"text": "the same text"}))
    with pytest.raises(KnowledgeError, match="same rows for privleak/forget and privleak/holdout"):
        run(model, data)


def test_series_of_models(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: speaker(k) for k, name in enumerate(("first", "second", "third"))}
    monkeypatch.setattr(series, "_opened", lambda name, like: made[name])
    parts = Parts()
    found = run(model, part=parts, scal_models=("first", "second"), sust_models=("first", "second", "third"))
    utility = [run(made[name]).metrics["utility"].value for name in made]
    sizes = np.log([4, 8])
    assert found.metrics["scal_utility_slope"].value == pytest.approx((utility[1] - utility[0]) / (sizes[1] - sizes[0]))
    assert found.metrics["sust_utility_slope"].value == pytest.approx(np.polyfit([1, 2, 3], utility, 1)[0])
    assert found.metrics["sust_utility_area"].value == pytest.approx(m.area(utility))
    assert found.metrics["sust_reemergence"].n_items == 6 and "request 3" in found.metrics["sust_reemergence"].note
    assert sum(name.startswith("sust") and "fold" in name for name in parts.built) == 6
    still = run(model, sust_models=("first", "first"), part=Parts())
    assert still.metrics["sust_reemergence"].value == 0.0 == still.metrics["sust_worst_rise"].value
    assert still.metrics["sust_utility_slope"].value == 0.0
    with pytest.raises(UsageError, match="at least two"):
        run(model, sust_models=("first",))


def test_differences_need_the_same_items() -> None:
    def never(ids: list[str]) -> Reference:
        items = ItemScores.of(ids, ids, [0.2, 0.1])
        return Reference("never", BenchResult.of("muse", [mean_metric("verbmem", items)], {}))

    mine = ItemScores.of(["a", "b"], ["a", "b"], [0.5, math.nan])
    found = against("verbmem", mine, never(["a", "b"]), seed=0)
    assert found.name == "verbmem_difference" and found.value == pytest.approx(0.3) and "1 of 2" in found.note
    assert "not computed" in against("verbmem", mine, never(["a", "c"]), seed=0).note
    assert "not computed" in against("utility", mine, never(["a", "b"]), seed=0).note


def test_an_earlier_revision_calls_retain_retain2(model: LoadedModel, tmp_path: Path) -> None:
    data = copied(tmp_path)
    for name in ("retain_qa", "retain_qa_icl"):
        (data / f"knowmem/{name}.jsonl").rename(data / f"knowmem/{name.replace('retain', 'retain2')}.jsonl")
    assert run(model, data).metrics["utility"].value == run(model).metrics["utility"].value


@pytest.mark.parametrize("settings", [{"shots": -1}, {"limit": -2}, {"k": 0.0}, {"k": 1.5}])
def test_settings_out_of_range(model: LoadedModel, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give"):
        run(model, **settings)
