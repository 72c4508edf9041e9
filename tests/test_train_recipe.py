"""Trained editors as a user meets them: in a recipe, through a whole run, and on the command line."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import memorised
import pytest

from repforget import _apart
from repforget.artifact import load_edit
from repforget.errors import RecipeError
from repforget.knowledge import Fact
from repforget.recipe import load_recipe
from repforget.report import load as load_report

Run = Callable[..., tuple[int, str, str]]
LADDER = """
model: {model}
knowledge: {probe}
locate: [{{random_sites: {{draws: 20}}}}]
ladder:
  - npo: {{beta: 0.5, steps: 3, batch_size: 8, retain: {{kl: {{}}}}}}
  - prior_relabelling: {{steps: 2, robust: [sam, {{smoothing: {{samples: 1}}}}], adapter: lora, rank: 2}}
  - trained:
      steps: 60
      retain_batch: 24
      combine: {{gru: {{add_retain: true}}}}
      terms:
        - {{objective: simnpo, data: forget, settings: {{beta: 2.5}}}}
        - {{objective: nll, data: {updates}, weight: 0.5}}
        - {{objective: kl, data: retain}}
verify:
  - {{behaviour: {{forms: 1, max_items: 24, samples: 1}}}}
  - {{collateral: {{forms: 1, max_items: 24, max_texts: 8}}}}
"""


def lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def items(facts: tuple[Fact, ...]) -> Iterator[dict[str, Any]]:
    return ({"id": f.id, "cluster": f.cluster, "subject": f.subject, "relation": f.relation, "prompt": f.prompt,
             "answer": f.answer.strip()} for f in facts)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that knows fifty facts by heart, a probe of them, and a file of updates."""
    path = tmp_path_factory.mktemp("trained")
    model, data = memorised.model(), memorised.data()
    model.module.save_pretrained(path / "model")
    model.tokenizer.save_pretrained(path / "model")
    lines(path / "forget.jsonl", items(data.forget))
    lines(path / "retain.jsonl", items((*data.retain, *memorised.unseen())))
    lines(path / "general.jsonl", ({"text": text} for text in memorised.GENERAL))
    lines(path / "updates.jsonl", ({"prompt": f.prompt, "answer": "cook"} for f in data.forget if f.relation == "job"))
    (path / "probe.yaml").write_text("name: memorised\nsets: {forget: forget.jsonl, retain: retain.jsonl, "
                                     "general: general.jsonl}\n")  # fmt: skip
    return path


def recipe(folder: Path, tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = LADDER.format(model=folder / "model", probe=folder / "probe.yaml", updates=folder / "updates.jsonl")
    for before, after in changes:
        assert text.count(before) == 1
        text = text.replace(before, after)
    path = tmp_path / "recipe.yaml"
    path.write_text(textwrap.dedent(text).lstrip("\n"))
    return path


def test_a_recipe_of_trained_editors_is_read_with_its_settings(folder: Path, tmp_path: Path) -> None:
    read = load_recipe(recipe(folder, tmp_path))
    assert [choice.name for choice in read.ladder] == ["npo", "prior_relabelling", "trained"]
    assert [term["objective"] for term in read.ladder[2].settings["terms"]] == ["simnpo", "nll", "kl"]


@pytest.mark.parametrize(("before", "after", "words"), [
    ("beta: 0.5", "betta: 0.5", r"5.*betta.*no such setting.*'beta'"),
    ("beta: 0.5", "beta: many", r"5.*beta.*valid number"),
    ("npo: {", "nppo: {", r"5.*no method 'nppo'.*'npo'"),
    ("steps: 2,", "step: 2,", r"6.*step.*'steps'"),
    ("      steps: 60\n", "      retain: kl\n", r"8.*retain.*no such setting"),
])  # fmt: skip
def test_a_wrong_setting_is_reported_with_its_line(
    folder: Path, tmp_path: Path, before: str, after: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe(folder, tmp_path, (before, after)))


@pytest.mark.parametrize(("before", "after", "words"), [
    ("settings: {beta: 2.5}", "settings: {betta: 2.5}", r"line 12: .*\[0\].*'simnpo' has no setting 'betta'.*'beta'"),
    ("settings: {beta: 2.5}", "settings: {beta: much}", r"line 12: .*terms\[0\].*beta 'much'.*valid number"),
    ("objective: kl, data", "objective: kll, data", r"line 14: .*no objective 'kll'.*'kl'"),
    ("weight: 0.5", "wieght: 0.5", r"line 13: .*unknown key 'wieght'.*'weight'"),
    ("weight: 0.5", "weight: half", r"line 13: .*weight 'half'"),
    ("{kl: {}}", "{kl: {betta: 1}}", r"line 5: .*retain: .*'kl' has no setting 'betta'"),
    ("retain: {kl: {}}", "retain: npo", r"line 5: .*retain: .*'npo' forgets"),
    ("{add_retain: true}", "{add_retian: true}", r"line 10: .*combine: .*'add_retian'.*'add_retain'"),
    ("robust: [sam, ", "robust: [smam, ", r"line 6: .*robust: .*no robust wrapper 'smam'.*'sam'"),
    ("{samples: 1}", "{samples: few}", r"line 6: .*robust: .*samples 'few'.*valid integer"),
    ("{gru: {add_retain: true}}", "dual_optim", r"line 7: .*trained: .*set optimizer: descent and clip: 0"),
    ("batch_size: 8", "batch_size: 0", r"line 5: .*npo: .*positive batch_size"),
])  # fmt: skip
def test_a_wrong_setting_inside_a_setting_is_reported_with_its_line(
    folder: Path, tmp_path: Path, before: str, after: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as raised:
        load_recipe(recipe(folder, tmp_path, (before, after)))
    assert str(raised.value).count("\n") == 0 and not str(raised.value).endswith("..")


@pytest.mark.slow
def test_a_run_climbs_over_trained_rungs_to_the_one_that_forgets(
    folder: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room for several processes beside it: one measures all arms of the sealed check."""
    monkeypatch.setattr(_apart, "CONTROLS_ROOM", 1_000_000)
    code, _, err = cli("run", str(recipe(folder, tmp_path)), "--out", str(tmp_path / "run"))
    assert code in (0, 10, 11), err
    data = load_report(tmp_path / "run")
    assert list(dict.fromkeys(rung["method"] for rung in data.rungs)) == ["npo", "prior_relabelling", "trained"]
    assert "not made" not in [rung["outcome"] for rung in data.rungs]
    evidence = next(e for e in data.evidence if e.measure == "exact_match")
    means = {arm: sum(scores.values) / len(scores.values) for arm, scores in evidence.arms.items()}
    assert means["original"] > 0.9
    assert means["edit"] < 0.6 * means["original"]


def test_an_edit_made_on_the_command_line_is_the_one_that_was_asked_for(
    folder: Path, tmp_path: Path, cli: Run
) -> None:
    given = ("--model", str(folder / "model"), "--knowledge", str(folder / "probe.yaml"))
    asked = [text for setting in ("steps=3", "batch_size=8", "retain={kl: {}}", "lr=1e-3")
             for text in ("--set", setting)]  # fmt: skip
    code, out, err = cli("edit", "npo", *given, *asked, "--out", "made")
    assert code == 0 and "saved to made" in out, err
    settings = load_edit(tmp_path / "made").manifest.settings
    assert (settings["steps"], settings["lr"], settings["retain"]) == (3, 1e-3, {"kl": {}})


@pytest.mark.parametrize(("method", "given", "words"), [
    ("npo", "stepz=3", "steps"),
    ("npo", "steps=few", "integer"),
    ("npo", "retain=kll", "'kl'"),
    ("npo", "retain={answer_preservation: {beta: much}}", "beta 'much'"),
    ("npo", "robust={sam: {rh: 1}}", "'rho'"),
    ("npo", "answers=nowhere.jsonl", "nowhere.jsonl"),
    ("trained", "terms=[{objective: npoo}]", "'npo'"),
    ("trained", "terms=[{objective: npo, settings: {betta: 1}}]", "'beta'"),
    ("trained", "terms=[{objective: npo, wieght: 1}]", "'weight'"),
])  # fmt: skip
def test_a_typo_on_the_command_line_is_one_sentence(
    folder: Path, cli: Run, method: str, given: str, words: str
) -> None:
    method = "idk_dpo" if "answers" in given else method
    code, out, err = cli("edit", method, "--model", str(folder / "model"), "--knowledge", str(folder / "probe.yaml"),
                         "--set", given, "--out", "made")  # fmt: skip
    assert code == 2 and out == "", err
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
    assert not Path("made").exists()
