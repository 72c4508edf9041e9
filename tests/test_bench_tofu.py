"""TOFU on tiny models: numbers against plain torch, resuming, and every kind of bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_folder
import numpy as np
import pytest
import tiny_models
import torch
from bench_folder import measured, model, same

import repforget as rf
from repforget.bench import _run, _tofu, tofu
from repforget.bench._asking import rendered
from repforget.bench._records import BenchResult, Metric, mean_metric
from repforget.bench._run import load_row
from repforget.errors import KnowledgeError, RepforgetError, UsageError
from repforget.models.load import LoadedModel
from repforget.records import ItemScores
from repforget.scoring import metrics

pytest.importorskip("rouge_score")
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return bench_folder.write(tmp_path / "data")


def plain_loss(subject: LoadedModel, prompt: str, answer: str) -> tuple[float, list[bool]]:
    """Mean loss and hits of an answer with its end token, by one forward pass over one row."""
    start = len(subject.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([[*subject.tokenizer(f"{prompt} {answer}")["input_ids"], subject.tokenizer.eos_token_id]])
    with torch.no_grad():
        logs = subject.module(ids).logits[0].double().log_softmax(-1)
    picked = [logs[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1])]
    return -float(np.mean(picked)), [bool(logs[k - 1].argmax() == ids[0, k]) for k in range(start, ids.shape[1])]


def test_every_number_of_an_item_against_plain_torch(data: Path) -> None:
    subject, found = model(), measured(data).metrics
    for k, row in enumerate(bench_folder.rows("forget10_perturbed")):
        prompt = f"Question: {row['question']}\nAnswer:"
        loss, hits = plain_loss(subject, prompt, row["answer"])
        instead, _ = plain_loss(subject, prompt, row["paraphrased_answer"])
        wrong = [plain_loss(subject, prompt, text)[0] for text in row["perturbed_answer"]]
        again, _ = plain_loss(subject, f"Question: {row['paraphrased_question']}\nAnswer:", row["answer"])
        ratio = math.exp(instead - np.mean(wrong))
        expected = {
            "probability": math.exp(-loss), "loss": loss, "truth_ratio": min(ratio, 1 / ratio),
            "log_truth_ratio": math.log(ratio), "probability_paraphrased": math.exp(-instead),
            "probability_asked_otherwise": math.exp(-again), "exact_memorization": np.mean(hits[:-1]),
            "knowledge": 1 / (1 + ratio),
        }  # fmt: skip
        for name, value in expected.items():
            items = found[f"forget.{name}"].items
            assert items is not None and items.values[k] == pytest.approx(value, rel=1e-5), name
    for k, row in enumerate(bench_folder.rows("real_authors_perturbed")):
        prompt = f"Question: {row['question']}\nAnswer:"
        losses = [plain_loss(subject, prompt, text)[0] for text in (row["answer"], *row["perturbed_answer"])]
        p = np.exp(-np.array(losses))
        assert found["real_authors.probability"].items.values[k] == pytest.approx(p[0] / p.sum(), rel=1e-5)
        assert found["real_authors.truth_ratio"].items.values[k] == pytest.approx(
            max(0, 1 - math.exp(losses[0] - np.mean(losses[1:]))), rel=1e-5, abs=1e-9)  # fmt: skip
    cells = [found[f"{s}.{c}"].value for s in _tofu.UTILITY_SETS for c in ("probability", "rouge", "truth_ratio")]
    assert found["model_utility"].value == metrics.harmonic_mean(np.array(cells))


def test_a_model_that_gives_every_token_the_same_probability(data: Path) -> None:
    module = tiny_models.build("llama")
    torch.nn.init.zeros_(module.lm_head.weight)
    subject = model(module=module)
    found = measured(data, subject, reference=subject).metrics
    for name in ("forget.probability", "retain.probability", "forget.probability_paraphrased"):
        assert found[name].items.values == pytest.approx(1 / tiny_models.VOCAB)
    assert found["real_authors.probability"].items.values == pytest.approx(0.25)
    assert found["forget.truth_ratio"].value == pytest.approx(1.0) and found["forget.knowledge"].value == 0.5
    assert found["model_utility"].value == 0.0 and "retain.truth_ratio" in found["model_utility"].note
    assert found["forget_quality"].value == 1.0 and "nothing can be told" in found["forget_quality"].note


def test_a_run_a_reload_and_a_continued_run_give_the_same_numbers(
    data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, never = bench_folder.save_model(tmp_path / "m"), bench_folder.save_model(tmp_path / "r", seed=5)
    command = ("bench", "tofu", "--model", name, "--reference", never, "--data", str(data), "--out", "run")
    whole = rf.bench(name, "tofu", data=str(data), reference=never).result

    def fails(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tofu, "_said", fails)
        code, _, said = cli(*command)
    assert code == 130 and "continues from there" in said
    kept = {path.name for path in Path("run").glob("part-*")}
    assert len(kept) == 4 and all("answers" in part for part in kept)  # the reference's, nothing of the model yet
    code, text, said = cli(*command)
    assert code == 0 and "forget_quality" in text and said.count("\n") <= 2
    row = load_row("run")
    assert same(row.result, whole) and row.reference["name"] == never
    assert same(load_row("run/reference").result, measured(data, model(5)))
    with monkeypatch.context() as patched:  # nothing is scored or generated any more
        patched.setattr(tofu, "_said", fails)
        patched.setattr(tofu, "_answers", fails)
        code, text, _ = cli(*command, "--json")
    assert code == 0 and json.loads(text)["result"] == json.loads(Path("run/row.json").read_text())["result"]
    again = cli("bench", "tofu", "--model", name, "--reference", "run/reference", "--data", str(data), "--out", "other")
    assert again[0] == 0 and same(load_row("other").result, whole)


def test_another_model_in_the_same_folder_gets_its_own_numbers(data: Path, tmp_path: Path) -> None:
    first, second = (measured(data, model(seed), out=tmp_path / "one") for seed in (0, 1))
    assert same(first, measured(data, model(0))) and same(second, measured(data, model(1)))
    assert first.metrics["forget.loss"].value != second.metrics["forget.loss"].value
    changed = model(0)
    with torch.no_grad():
        changed.module.lm_head.weight.mul_(0.5)
    assert same(measured(data, changed, out=tmp_path / "one"), measured(data, changed))
    hooked = model(0)  # its weights are those of the first
    hooked.module.model.layers[0].register_forward_hook(lambda module, given, out: out * 0.5)
    assert not same(measured(data, hooked, out=tmp_path / "one"), first)
    other = bench_folder.write(tmp_path / "other", {"retain_perturbed": bench_folder.rows("retain_perturbed")[::-1]})
    assert not same(measured(other, model(0), out=tmp_path / "one"), first)
    said: list[str] = []
    for seed in (3, 3, 4):
        _run.run("tofu", lambda seed=seed: _run.in_memory(model(seed)), data=str(data), out=tmp_path / "two",
                 echo=said.append)  # fmt: skip
    assert [line.startswith("The row of tofu on tiny-3") for line in said] == [True]


def test_an_edited_model_is_another_model(data: Path, tmp_path: Path, cli: Cli) -> None:
    """The edit doubles the unembedding of every token, which is the same as halving the temperature."""
    from repforget.artifact import Edit
    from repforget.artifact.operations import DenseDelta

    name = bench_folder.save_model(tmp_path / "m")
    subject = rf.load(name)
    delta = subject.module.lm_head.weight.detach().clone()
    edit = Edit.build("doubled", {}, subject, "none", (DenseDelta("lm_head.weight", delta),))
    edit.save(tmp_path / "edit")
    for out in ("plain", "edited"):
        more = ("--edit", str(tmp_path / "edit")) if out == "edited" else ()
        assert cli("bench", "tofu", "--model", name, "--data", str(data), "--out", "both", *more)[0] == 0
        assert load_row("both").model["edit"] == (more[1] if more else None)
        row = load_row("both").result
        if out == "plain":
            assert same(row, measured(data))
    doubled = tiny_models.build("llama")
    with torch.no_grad():
        doubled.lm_head.weight.mul_(2)
    expected = measured(data, model(module=doubled)).metrics["forget.loss"]
    assert row.metrics["forget.loss"].value == pytest.approx(expected.value, rel=1e-6)
    assert measured(data, subject, reference=subject).notes[-1] == "the reference is the model itself"


def test_the_plan_counts_what_the_run_does_and_loads_nothing(data: Path, tmp_path: Path, cli: Cli) -> None:
    name = bench_folder.save_model(tmp_path / "m")
    code, text, _ = cli("bench", "tofu", "--model", name, "--data", str(data), "--plan", "--json")
    planned, counts = json.loads(text), measured(data).counts
    assert code == 0 and planned["fits"] and planned["models"][0]["name"] == name
    assert planned["work"]["generations"] == counts["generations"] == 3 * 12 + 8 + 6 + 6
    # Answers that equal their paraphrase are scored once.
    assert planned["work"]["sequences"] == 12 * 8 + 8 * 7 + 6 * 4 * 2 == counts["sequences"] - 12
    code, text, _ = cli("bench", "tofu", "--model", name, "--data", str(data), "--plan")
    assert code == 0 and "new tokens at most" in text and not list(Path().glob("runs*"))


def test_references(data: Path, tmp_path: Path) -> None:
    alone = measured(data)
    for name in _tofu.QUALITY:
        assert "not computed, because no reference was given" in alone.metrics[name].note
    with_one = measured(data, reference=model(5))
    difference = with_one.metrics["truth_ratio_difference"]
    assert difference.items.values == pytest.approx(
        alone.metrics["forget.log_truth_ratio"].items.values
        - measured(data, model(5)).metrics["forget.log_truth_ratio"].items.values)  # fmt: skip
    # A random model cannot tell its retain questions from the forget questions: it is no model that never knew.
    assert any("it may know them too" in note for note in with_one.notes)
    other = model(5, words=tuple(reversed(tiny_models.WORDS)))
    for name in _tofu.QUALITY:
        assert "another tokenizer" in measured(data, reference=other).metrics[name].note


def test_a_row_of_other_questions_settings_or_data_is_no_reference(data: Path, tmp_path: Path) -> None:
    never = tmp_path / "never"
    measured(data, model(5), out=never, ds_size=10)
    with pytest.raises(UsageError, match=r"other settings \(ds_size\)"):
        measured(data, reference=str(never))
    unpaired = measured(data, reference=str(never), unpaired=True).metrics
    assert "n=12, m=10, different questions" in unpaired["forget_quality"].note
    assert "other questions" in unpaired["forget_quality_swap"].note
    other = bench_folder.write(tmp_path / "other", {"retain_perturbed": bench_folder.rows("retain_perturbed")[::-1]})
    with pytest.raises(UsageError, match=r"other data \(retain_perturbed differ\)"):
        measured(other, reference=str(never), ds_size=10)
    renamed = [{**row, "id": f"x{row['id']}"} for row in bench_folder.rows("forget10_perturbed")]
    moved = bench_folder.write(tmp_path / "moved", {"forget10_perturbed": renamed})
    with pytest.raises(UsageError, match="asks 10, 0 of them the same"):
        measured(moved, reference=str(never), ds_size=10)
    with pytest.raises(UsageError, match="is no row of a benchmark"):
        bad = tmp_path / "bad.json"
        bad.write_text("[]")
        measured(data, reference=str(bad))


def test_truth_ratio_of_a_collapsed_model_and_of_the_peer() -> None:
    generator = np.random.default_rng(0)
    loss = generator.normal(60, 2, 400)
    names = tuple(map(str, range(400)))
    collapsed = _tofu.Scored(names, names, loss, loss, loss[:, None] + generator.normal(0.3, 0.3, (400, 5)), loss)
    alive = _tofu.Scored(names, names, loss / 60, loss / 60, collapsed.wrong - loss[:, None] + loss[:, None] / 60, loss)
    assert np.median(_tofu.truth_ratio(collapsed)) == pytest.approx(0.74, abs=0.02)
    peer = _tofu.truth_ratio(collapsed, compat="open-unlearning")
    assert np.median(peer) < 1e-15
    assert peer == pytest.approx(np.exp(-collapsed.wrong.mean(1)) / (np.exp(-loss) + 1e-10), rel=1e-12)

    def quality(compat: _tofu.Compat) -> float:
        a, b = (s.items(_tofu.log_truth_ratio(s, compat=compat)) for s in (collapsed, alive))
        return _tofu.forget_quality(a, b)[0].value

    assert quality("none") == 1.0 and quality("open-unlearning") == pytest.approx(1.0636e-239, rel=1e-4)
    cell = _tofu.cells("real_authors", collapsed, compat="open-unlearning")["probability"].values
    p, others = np.exp(-loss), np.exp(-collapsed.wrong)
    assert cell == pytest.approx(p / (p + others.sum(1) + 1e-10), rel=1e-12)
    # The peer's numbers are its own only where probabilities are small.
    assert _tofu.truth_ratio(alive, compat="open-unlearning") == pytest.approx(_tofu.truth_ratio(alive), rel=1e-8)


def test_log_truth_ratio_is_the_logarithm_and_survives_overflow() -> None:
    one = _tofu.Scored(("a",), ("a",), np.array([1.0]), np.array([2.0]), np.array([[3.0, 5.0]]), np.array([1.0]))
    for mean in ("geometric", "arithmetic"):
        ratio = _tofu.truth_ratio(one, mean=mean)
        assert _tofu.log_truth_ratio(one, mean=mean) == pytest.approx(np.log(ratio), rel=1e-12)
    far = _tofu.Scored(("a",), ("a",), np.array([1e4]), np.array([1e4]), np.array([[3.0, 5.0]]), np.array([1.0]))
    assert _tofu.log_truth_ratio(far) == pytest.approx(9996.0)
    assert np.isfinite(_tofu.log_truth_ratio(far, compat="open-unlearning")).all()


def test_compat_changes_memorization_the_way_the_peer_counts_it(data: Path, tmp_path: Path) -> None:
    """Nothing is ever right here: the peer still reports a strength of 1 / length."""
    module = tiny_models.build("llama")
    torch.nn.init.zeros_(module.lm_head.weight)  # the arg max is token 0, which no answer holds
    ours = measured(data, model(module=module), out=tmp_path / "o").metrics
    peer = measured(data, model(module=module), out=tmp_path / "o", compat="open-unlearning")
    assert ours["forget.extraction_strength"].value == ours["forget.exact_memorization"].value == 0.0
    assert peer.metrics["forget.extraction_strength"].items.values == pytest.approx(1 / 4)  # four words
    assert peer.metrics["forget.exact_memorization"].value == 0.0
    assert any("open-unlearning" in note for note in peer.notes)
    assert len(list((tmp_path / "o").glob("part-*"))) == 8  # what only the aggregation reads makes no new parts


def test_membership_and_the_lost_aggregates(data: Path, tmp_path: Path) -> None:
    outside = [{"question": f"what is {name} ?", "answer": f"{name} is a dog"} for name in bench_folder.NAMES[:6]]
    bench_folder.write(data, {"holdout10": outside})
    found = measured(data, holdout="holdout10", reference=model(5)).metrics
    attacks = {name: found[f"membership.{name}"] for name in ("loss", "zlib", "min_k", "min_k_plus_plus")}
    theirs = measured(data, model(5), holdout="holdout10").metrics
    shares = []
    for name, metric in attacks.items():
        base = theirs[f"membership.{name}"].value
        assert 0 <= metric.low <= metric.value <= metric.high <= 1
        shares.append(min(max(1 - abs(metric.value - base) / base, 0), 1))
    assert found["aggregate_privacy"].value == pytest.approx(metrics.harmonic_mean(np.array(shares)))
    names = ("extraction_strength", "exact_memorization", "probability_paraphrased", "knowledge")
    parts = [1 - found[f"forget.{name}"].value for name in names]
    assert found["aggregate_memorization"].value == pytest.approx(metrics.harmonic_mean(np.array(parts)))
    assert "fluency classifier" in found["aggregate_overall"].note
    assert "no holdout set" in measured(data).metrics["aggregate_privacy"].note


def test_questions_are_put_as_the_card_the_setting_or_the_chat_template_says(data: Path) -> None:
    (data / "tofu.yaml").write_text('template: "Q : {question} A :"\nnew_tokens: 4\n')
    carded = measured(data)
    assert any("Q : {question} A :" in note for note in carded.notes)
    assert same(carded, measured(data, template="Q : {question} A :", separator=" "))
    assert carded.metrics["forget.loss"].value != measured(data, template="{question}").metrics["forget.loss"].value
    subject = model()
    subject.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}Q {{ m.content }} {% endfor %}A :"
    form = tofu.Card(template="chat")
    assert rendered(subject, form, "where ?") == "Q where ? A :"  # the tokenizer puts its own <bos> in front
    chatted = measured(data, subject, template="chat").metrics
    plain = measured(data, template="Q {question} A :", separator="").metrics
    assert chatted["forget.loss"].value == pytest.approx(plain["forget.loss"].value)


def test_metrics_through_json(data: Path) -> None:
    found = measured(data)
    through = BenchResult.from_json(json.loads(json.dumps(found.to_json()).replace("NaN", "null")), found.items_json())
    assert same(through, found)
    lone = Metric.from_json({**Metric("a", 1.0).to_json(), "low": None, "high": None})
    assert lone.value == 1.0 and math.isnan(lone.low) and lone.items is None
    empty = ItemScores.of(["a"], ["a"], [math.nan])
    assert mean_metric("x", empty).note == "not computed, because none of its 1 items could be scored"


@pytest.mark.slow
def test_the_organism_knows_and_its_twin_does_not(tmp_path: Path, cli: Cli) -> None:
    assert cli("organism", "tofu", "world")[0] == 0
    code, text, _ = cli("bench", "tofu", "--model", "organism:bios", "--reference", "organism:bios/twin-0",
                        "--data", "world", "--set", "ds_size=80", "--out", "run", "--json")  # fmt: skip
    assert code == 0
    row, twin = load_row("run"), load_row("run/reference")
    found, never = row.result.metrics, twin.result.metrics
    assert found["forget.probability"].value > 0.99 > 0.3 > never["forget.probability"].value
    assert found["forget.probability_asked_otherwise"].value > 0.95
    assert found["forget.extraction_strength"].value == 1.0 and never["forget.extraction_strength"].value < 0.5
    assert found["forget_quality"].value < 1e-30 and found["truth_ratio_difference"].high < -3
    assert abs(found["model_utility"].value - never["model_utility"].value) < 0.02
    assert not any("may know" in note for note in row.result.notes)


def test_from_python_by_name_and_unknown_names(data: Path, tmp_path: Path) -> None:
    name = bench_folder.save_model(tmp_path / "m")
    row = rf.bench(name, "tofu", data=str(data), out=str(tmp_path / "run"))
    assert same(row.result, measured(data)) and row.settings["split"] == "forget10"
    with pytest.raises(RepforgetError, match="there is no 'tofuu'|no method 'tofuu'"):
        rf.bench(name, "tofuu")
    with pytest.raises(KnowledgeError, match="not a folder"):
        rf.bench(model(), "tofu", data="./nowhere")
