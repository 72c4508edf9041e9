"""Locators side by side: agreement on what both rank, the truth, refusals before loading, what an interrupt keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from repforget import discover
from repforget.cli._side_by_side import budgeted, collect, settings_of
from repforget.errors import RecipeError, UnknownNameError, UsageError
from repforget.knowledge_files import load_knowledge
from repforget.locate import _dispatch
from repforget.locate._compare import Comparison, agreement, common, find, spearman, unit_scores
from repforget.locate._labelled import relations
from repforget.records import Component, Localization, RandomBand
from repforget.report import locators

BAND = RandomBand(2, 20, 0.5, 0.1, 0.2, "effect of the top 2")
Cli = Callable[..., tuple[int, str, str]]
FAST = ("--set", "items=4", "--set", "draws=20", "--set", "partners=1")


def ranking(method: str, **scores: float) -> Localization:
    """A localization from scores by component, underscores of the last part read as dots: ``mlp_out__2=0.5``."""
    order = sorted(scores, key=lambda name: -scores[name])
    return Localization(method, tuple(Component.parse(n.replace("__", ".")) for n in order),
                        tuple(scores[n] for n in order), BAND, {"forwards": 3.0, "backwards": 1.0})  # fmt: skip


HEADS = ranking("heads", attn_z__0__h0=0.1, attn_z__0__h1=0.9, attn_z__1__h0=0.2, attn_z__1__h1=0.3, mlp_out__0=0.8,
                mlp_out__1=0.4)  # fmt: skip
WHOLE = ranking("whole", attn_out__0=0.7, attn_out__1=0.1, mlp_out__0=0.6, mlp_out__1=0.3)
STREAM = ranking("stream", resid_post__0=0.2, resid_post__1=0.6, embed=5.0)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=20))
def test_the_correlation_of_ranks_is_scipys(values: list[tuple[int, int]]) -> None:
    a, b = (list(map(float, side)) for side in zip(*values, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_rankings_meet_on_what_both_look_at() -> None:
    assert unit_scores(HEADS) == {(0, "attention"): 0.9, (1, "attention"): 0.3, (0, "MLP"): 0.8, (1, "MLP"): 0.4}
    words, a, b = common(HEADS, WHOLE)  # heads meet whole attention; two shared MLPs would leave attention out
    assert words == "layers x {attention, MLP}" and list(zip(a, b, strict=True)) == [
        (0.8, 0.6), (0.9, 0.7), (0.4, 0.3), (0.3, 0.1)]  # fmt: skip
    assert common(HEADS, HEADS)[1] == list(HEADS.scores) and common(HEADS, HEADS)[0] == "heads, mlp_out"
    words, a, b = common(HEADS, STREAM)  # the embedding is no layer
    assert (words, a, b) == ("layers", [0.9, 0.4], [0.2, 0.6])


def test_agreement_of_a_ranking_with_itself_its_reverse_and_others() -> None:
    same = agreement(WHOLE, WHOLE)
    assert (same.spearman, same.overlap, same.k, same.count) == (pytest.approx(1.0), 1.0, 1, 4)
    turned = Localization("turned", WHOLE.components, tuple(-s for s in WHOLE.scores), BAND)
    assert agreement(WHOLE, turned).spearman == pytest.approx(-1.0) and agreement(WHOLE, turned).overlap == 0.0
    assert np.isnan(agreement(HEADS, STREAM).spearman)  # two layers correlate with anything
    both = Comparison({"heads": HEADS, "stream": STREAM}).to_json()
    assert json.loads(json.dumps(both, allow_nan=False))["agreement"][0]["spearman"] is None


def test_the_truth_is_ranked_among_its_kind() -> None:
    truth = [Component.parse("mlp_out.0"), Component.parse("mlp_out.1")]
    assert [(f.rank, f.count, f.hit) for f in find(HEADS, truth[1:])] == [(2, 2, False)]
    assert [(f.rank, f.hit) for f in find(HEADS, truth)] == [(1, True), (2, True)]  # both of two
    assert [(f.unit, f.rank, f.hit) for f in find(STREAM, truth[1:])] == [("layer", 1, True)]
    assert find(HEADS, [Component.parse("attn_out.0")])[0].unit == "attention"
    assert find(WHOLE, [Component.parse("mlp_out.7")])[0].unit == "not ranked"
    tie = ranking("tie", mlp_out__0=0.5, mlp_out__1=0.5)
    assert not find(tie, truth[:1])[0].hit  # a constant locator finds nothing
    result = Comparison({"heads": HEADS, "stream": STREAM}, truth=tuple(truth[1:]))
    assert (result.accuracy("heads"), result.accuracy("stream")) == (0.0, 1.0)
    assert Comparison({"heads": HEADS}).accuracy("heads") is None


def test_settings_go_to_the_methods_that_have_them() -> None:
    methods = ["atp_star", "probe_sweep"]
    chosen = settings_of(methods, {"items": 5, "folds": 3, "atp_star.steps": 2})
    assert chosen == {"atp_star": {"items": 5, "steps": 2}, "probe_sweep": {"items": 5, "folds": 3}}
    for wrong in ({"stepps": 1}, {"eap.steps": 1}, {"probe_sweep.steps": 1}):
        with pytest.raises(RecipeError, match="setting"):
            settings_of(methods, wrong)
    with pytest.raises(UnknownNameError, match="atp_star"):
        settings_of(["atp_stra", "probe_sweep"], {})
    with pytest.raises(UsageError, match="twice"):
        settings_of(["eap", "eap"], {})


def test_a_budget_lowers_the_facts_and_is_shared_among_relations() -> None:
    probe = load_knowledge("bios-people")
    count = len(relations(probe.for_editor(), 2, 200, 0)[0])
    assert budgeted("flu", {}, 10, probe) == {"items": 10}
    shared = budgeted("flu", {"mode": "categories"}, 30 * count, probe)
    assert shared == {"mode": "categories", "items": 30}
    assert budgeted("eap", {}, 10, probe) == {"items": 10} and budgeted("eap", {}, None, probe) == {}
    assert budgeted("eap", {"items": 4}, 10, probe) == {"items": 4}
    assert budgeted("probe_sweep", {}, 30 * count + 1, probe) == {"items": 30}
    assert budgeted("probe_sweep", {"items": 20}, 30 * count, probe) == {"items": 20}


@pytest.mark.parametrize("method", ["probe_sweep", "mdl_probe"])
def test_a_budget_too_small_for_a_probe_says_how_many_it_takes(method: str) -> None:
    probe = load_knowledge("bios-people")
    with pytest.raises(UsageError, match="relations it can probe") as refused:
        budgeted(method, {}, 10, probe)
    least = int(re.search(r"--budget (\d+)", str(refused.value))[1])
    data, statements = probe.for_editor(), discover.method("locate", method).hyperparameters["statements"].default
    given = budgeted(method, {}, least, probe)["items"]
    assert len(relations(data, statements, given, 0)[0]) == len(relations(data, statements, 200, 0)[0])
    assert len(relations(data, statements, given - 1, 0)[0]) < len(relations(data, statements, 200, 0)[0])
    with pytest.raises(UsageError, match=f"give --budget {least} or more"):
        budgeted(method, {}, least - 1, probe)


def test_what_fails_and_what_is_left_is_kept_beside_what_is_done() -> None:
    def run(name: str) -> Localization:
        if name == "bad":
            raise UsageError("no twins.")
        if name == "slow":
            raise KeyboardInterrupt
        return HEADS

    said: list[str] = []
    steps = collect(["heads", "bad", "slow", "never"], run, said.append, ())
    seen = [next(steps) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert [list(s.localizations) for s in seen] == [[], ["heads"], ["heads"]]
    assert seen[-1].failed == {"bad": "no twins."} and seen[-1].missing == ("slow", "never")
    assert said == ["1 of 4: heads", "2 of 4: bad", "3 of 4: slow"] and seen[-1].seconds["heads"] >= 0


def test_the_page_shows_every_method_and_leaves_no_request() -> None:
    named = {w.method: w for w in (HEADS, WHOLE, STREAM)}
    truth = (Component.parse("mlp_out.1"),)
    page = locators.html(Comparison(named, {"heads": 1.5}, truth, {"<bad>": "a < b"}, ("late",)))
    assert page.count("data-figure=") == 2 and "&lt;bad&gt;" in page and "late" in page and "a &lt; b" in page
    shown = page.partition("<script>")[0]  # the library of the pictures names addresses it never asks
    assert not re.search(r"(?:src|href)\s*=\s*['\"]?(?:http|//)", shown) and "default-src 'none'" in page
    panels = locators.unit_panels([HEADS, STREAM])
    assert [[row.title for row in panel.rows] for panel in panels] == [["attention", "MLP", "layer"]] * 2
    assert panels[1].rows[0].values == (None, None) and panels[1].rows[2].shade == (0.0, 1.0)
    square = locators.agreement_panels(Comparison(named))
    values = np.array([row.values for row in square[1].rows], dtype=float)
    np.testing.assert_array_equal(values, values.T)
    assert "data-figure" not in locators.html(Comparison({}))


def test_side_by_side_on_the_organism(cli: Cli) -> None:
    code, out, error = cli("locate", "--compare", "direct_logit_attribution", "attribution_patching", *FAST, "--set",
                           "steps=1", "--truth", "mlp_out.2", "--out", "both.json", "--html", "both.html")  # fmt: skip
    assert code == 0, error
    for word in ("Spearman", "CPU s", "rank of mlp_out.2", "layers x {attention, MLP}"):
        assert word in out
    assert "2 of 2: attribution_patching" in error and "Plotly" in Path("both.html").read_text()
    record = json.loads(Path("both.json").read_text())
    assert set(record["methods"]) == {"direct_logit_attribution", "attribution_patching"} and not record["not_run"]
    one = record["methods"]["attribution_patching"]
    assert one["localization"]["settings"]["items"] == 4 and one["truth"][0]["count"] == 4


def test_a_budget_for_one_method(cli: Cli) -> None:
    code, out, error = cli("locate", "direct_logit_attribution", "--budget", "3", "--set", "draws=20", "--json")
    assert code == 0, error
    assert json.loads(out)["cost"]["facts"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compare", "eap", "no_such"], "There is no method 'no_such'"),
        (["eap", "atp_star"], "--compare"),
        (["eap", "--truth", "mlp_out.1"], "--compare"),
        (["--compare", "eap", "atp_star", "--set", "nothing=1"], "setting 'nothing'"),
        (["--compare", "eap", "atp_star", "--truth", "mlp"], "mlp"),
        (["eap", "--budget", "0"], "1 or more"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], words: str
) -> None:
    import repforget.models.load as loading

    def never(*given: Any, **more: Any) -> None:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr(loading, "load", never)
    code, _, error = cli("locate", *arguments)
    assert code not in (0, 1) and words in error and "loaded" not in error


def test_an_interrupt_keeps_what_is_done(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    own = _dispatch.locate

    def stop(model: Any, knowledge: Any, method: str, **given: Any) -> Localization:
        if method == "attribution_patching":
            raise KeyboardInterrupt
        return own(model, knowledge, method, **given)

    monkeypatch.setattr(_dispatch, "locate", stop)
    code, out, error = cli("locate", "--compare", "direct_logit_attribution", "attribution_patching", "eap", *FAST,
                           "--out", "some.json")  # fmt: skip
    assert code == 130 and "direct_logit_attribution finished and is in 'some.json'" in error and "CPU s" in out
    record = json.loads(Path("some.json").read_text())
    assert record["not_run"] == ["attribution_patching", "eap"]
    assert list(record["methods"]) == ["direct_logit_attribution"]


def test_a_failure_leaves_the_others_and_an_exit_code(cli: Cli) -> None:
    code, out, error = cli("locate", "--compare", "twin_patching", "direct_logit_attribution", *FAST)
    assert code == 1 and "twin_patching failed" in error and "mlp_out" in out
