"""The report: same records, same bytes; everything said, nothing leaked, nothing fetched."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic_run
from hypothesis import given
from hypothesis import strategies as st

from repforget import report
from repforget.errors import KnowledgeError, ResourceError, UsageError
from repforget.knowledge import Item, Knowledge
from repforget.records import Curve
from repforget.report import render, series, svg, tables
from repforget.report.data import ReportData
from repforget.store import result_files


class Page(HTMLParser):
    """Visible text and every attribute of a page, script bodies apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page.replace(render.plotly_js(), ""))  # four megabytes that are not ours

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"unbalanced {tag}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render.html(synthetic_run.run("fail")))


def test_two_writes_give_the_same_bytes_and_a_reload_writes_them_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        report.write(tmp_path / name, synthetic_run.run())
    first = result_files(tmp_path / "one")
    assert first == result_files(tmp_path / "two")
    assert {"report.html", "report.md", "result.json", "plots/knowledge.svg", "plots/knowledge.json"} <= set(first)
    report.write(tmp_path / "two", report.load(tmp_path / "one"))
    assert result_files(tmp_path / "two") == first


def test_plots_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    report.write(tmp_path, synthetic_run.run())
    bare = dataclasses.replace(synthetic_run.run(), evidence=(), localizations=())
    report.write(tmp_path, bare)
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"shares-knowledge.svg", "shares-collateral.svg"}


def test_page_is_balanced_and_says_verdict_controls_and_every_measure(page: Page) -> None:
    run = synthetic_run.run("fail")
    assert page.open == []
    assert run.verdict.sentence in page.text
    for claim in run.verdict.claims:
        assert claim.name in page.text and claim.reason in page.text
    for words in ("Controls", "placebo as expected", "weights+hook", "sealed split", "Teaches the model: half of the",
                  "steps 100", "does not say that no other attack works", "mlp_out.3", "down_proj.weight", "0.035",
                  run.environment["model_fingerprint"], "forwards 3", "null_space_surgery (rank: 8)"):  # fmt: skip
        assert words in page.text, words


def test_a_wrong_control_stands_on_top_and_takes_the_verdict_away() -> None:
    page = Page(render.html(synthetic_run.run("pass", controls_ok=False)))
    top = page.text[: page.text.index("What is left")]
    assert "No verdict: a control came out wrong" in top and "judged 'pass' although" in top
    text = render.markdown(synthetic_run.run("pass", controls_ok=False), ())
    assert text.splitlines()[0].endswith("NO VERDICT: a control came out wrong")


@pytest.mark.parametrize("edit", [{}, {"method": "leace"}, {"manifest": {"method": "leace", "sites": ["mlp_in.0"]}}])
def test_records_with_little_in_them_still_make_a_report(tmp_path: Path, edit: dict[str, Any]) -> None:
    claim = dataclasses.replace(synthetic_run.claims("pass")[0], levels={}, reason="")
    verdict = dataclasses.replace(synthetic_run.verdict(), claims=(claim,), worst=None, controls={})
    bare = ReportData({}, verdict, (), edits=(edit,), rungs=({"method": "leace"}, {}))
    report.write(tmp_path, bare)
    assert report.load(tmp_path).edits == (edit,) and Page(render.html(bare)).open == []
    nothing = ReportData({}, dataclasses.replace(verdict, claims=()), ())
    assert "No control was run." in Page(render.html(nothing)).text and render.markdown(nothing, ())


def test_a_report_says_what_rounding_leaves_of_the_change() -> None:
    manifest = {**synthetic_run.manifest(), "rounding": {"a": {"own": 1.0, "nf4": 0.5}, "b": {"own": 1.0, "nf4": 0.1}}}
    assert tables.rounding_rows(manifest) == [
        ("left in nf4", "0.300 of the change (cosine, mean of 2 weights; least 0.100 in b)")
    ]
    run = dataclasses.replace(synthetic_run.run(), edits=(manifest,))
    assert "least 0.100 in b" in Page(render.html(run)).text
    assert tables.rounding_rows(synthetic_run.manifest()) == []


def test_nothing_is_fetched_and_no_handler_is_inline(page: Page) -> None:
    whole = render.html(synthetic_run.run())
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on")] and not names & {"src", "href", "srcset"}
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert whole.count("<script>") == 2 and "connect-src" not in policy


def test_every_text_is_escaped() -> None:
    evil = '</script><img src=x onerror="alert(1)">&'
    run = synthetic_run.run()
    curve = Curve(evil, "layer", evil, (0.0, 1.0), {"original": (0.1, 0.2), "edit": (0.0, 0.0)})
    step = Curve(evil, "steps", evil, (0.0, 1.0), {evil: (0.1, 0.2)})
    spoiled = dataclasses.replace(
        run,
        recipe={**run.recipe, "knowledge": evil, "model": evil},
        verdict=dataclasses.replace(run.verdict, sentence=evil, worst=evil, controls={evil: evil}),
        evidence=(dataclasses.replace(run.evidence[0], curves=(curve, step), teaches=evil),),
        edits=({**run.edits[0], "method": evil, "notes": [evil]},),
    )
    page = Page(render.html(spoiled))
    assert page.open == [] and not [n for n, _ in page.attributes if n in ("onerror", "src")]
    assert evil in page.text
    markdown = render.markdown(spoiled, ())
    assert "<img" not in re.sub(r"\\[<>]", "", markdown) and "</script>" not in markdown


def test_interactive_figures_are_valid_plotly_and_hold_the_numbers() -> None:
    from plotly.graph_objects import Figure

    run = synthetic_run.run()
    figures = render.interactive_plots(run)
    assert set(figures) == {"knowledge", "curve-0", "curve-1", "locate-probe_sweep-0", "locate-attribution_patching-0"}
    for figure in figures.values():
        Figure(figure)  # raises on any property that plotly does not know
    before, after, never = figures["knowledge"]["data"]
    assert before["y"] == ["behaviour: patching depth", "logit_lens: answer rank (reversed)", "reprobe: probe accuracy"]
    assert before["customdata"][2] == list(run.evidence[3].curves[0].y["original"])
    flat = [v for data in (before, after, never) for row in data["z"] for v in row]
    assert min(flat) == 0.0 and max(flat) == 1.0 and max(map(max, after["z"])) < 0.2
    names = [line["name"] for line in figures["curve-0"]["data"]]
    assert names == ["original", "placebo", "edit", "never knew (twin-0)", "never knew (twin-1)"]


def test_static_pictures_are_well_formed_and_place_the_shares_in_order() -> None:
    import xml.etree.ElementTree as tree

    run = synthetic_run.run("fail")
    for picture in render.static_plots(run).values():
        tree.fromstring(picture)
    failing, passing = (next(c for c in run.verdict.claims if c.status == s) for s in ("fail", "pass"))
    at = [float(re.search(r"cx='([\d.]+)'", svg.interval(c))[1]) for c in (passing, failing)]  # type: ignore[index]
    assert at[0] < at[1]
    assert "<circle" not in svg.interval(next(c for c in run.verdict.claims if c.status == "no power"))


def test_missing_values_leave_gaps_and_not_zeros() -> None:
    curve = Curve("t", "layer", "y", (0.0, 1.0, 2.0), {"original": (0.0, 2.0, 4.0), "edit": (float("nan"), 1.0, 1.0)})
    evidence = dataclasses.replace(synthetic_run.evidence()[0], curves=(curve,))
    before, after = series.knowledge_panels([evidence])
    assert before.rows[0].shade == (0.0, 0.5, 1.0) and after.rows[0].shade == (None, 0.25, 0.25)
    assert "not measured" in svg.heat_map([before, after])
    assert json.loads(json.dumps(render.interactive_plots(ReportData({}, synthetic_run.verdict(), (evidence,)))))


def test_claims_are_ordered_worst_first_and_silent_ones_last() -> None:
    rows = tables.claim_rows(synthetic_run.verdict("fail"), synthetic_run.evidence())
    assert [rows[0].claim.status, rows[-1].claim.status] == ["fail", "no power"]
    assert rows[0].cells[2:] == ("0.940", "0.065", "0.930", "0.090", "27.0 %", "19.0 % … 36.0 %", "5.0 %", "fail")


def test_items_that_could_not_be_scored_are_counted() -> None:
    first = synthetic_run.evidence()[0]
    holes = first.arms["edit"].valid.copy()
    holes[:3] = False
    edit = dataclasses.replace(first.arms["edit"], valid=holes)
    spoiled = dataclasses.replace(first, arms={**first.arms, "edit": edit})
    assert tables.unscored([spoiled]) == ["behaviour.answer_probability on edit: 3 of 48 items could not be scored"]


def test_a_ranking_that_does_not_beat_chance_says_so() -> None:
    where = synthetic_run.localization()
    poor = dataclasses.replace(where, band=dataclasses.replace(where.band, top=0.3))
    assert "beats" in tables.location_sentence(where) and "does NOT beat" in tables.location_sentence(poor)


def secret_knowledge(*_: Any, **__: Any) -> Knowledge:
    numbers = range(48)

    def some(name: str, answer: str) -> list[Item]:
        return [Item(f"{name}-{k:03d}", f"{name}-{k // 4}", f"Where is {name} {k}?", f"{answer} {k}") for k in numbers]

    return Knowledge.build("bios-people", some("item", synthetic_run.SECRET), some("kept", "Oslo"))


def test_forget_texts_appear_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repforget.knowledge_files.load_knowledge", secret_knowledge)
    report.write(tmp_path / "hidden", synthetic_run.run())
    report.write(tmp_path / "shown", synthetic_run.run(), show_texts=True)
    for name in ("report.html", "report.md"):
        assert synthetic_run.SECRET not in (tmp_path / "hidden" / name).read_text()
        assert "Forget items that stand out most" in (tmp_path / "shown" / name).read_text()
    assert synthetic_run.SECRET in (tmp_path / "shown" / "report.html").read_text()
    assert synthetic_run.SECRET not in (tmp_path / "shown" / "result.json").read_text()
    worst = synthetic_run.evidence()[4].arms["edit"]
    highest = worst.ids[int(worst.values.argmax())]
    listed = render.leaking_items(synthetic_run.run(), render.forget_texts(synthetic_run.run()))
    assert listed[0][0] == f"Where is item {int(highest[-3:])}?" and len(listed) == 10


def test_texts_of_another_probe_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repforget.knowledge_files.load_knowledge", secret_knowledge)
    run = dataclasses.replace(synthetic_run.run(), environment={"knowledge_digest": "other"})
    with pytest.raises(KnowledgeError, match="has changed since this run"):
        report.write(tmp_path, run, show_texts=True)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_missing_results_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no file .*result\.json"):
        report.load(tmp_path)
    for content, words in (("{}", "not a result of format"), ('{"format_version": 1}', "is incomplete")):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(UsageError, match=words):
            report.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"):
        report.write(tmp_path / "file", synthetic_run.run())


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_with_few_round_values(low: float, size: float) -> None:
    found = svg.ticks(low, low + size)
    slack = 1e-6 * (abs(low) + size)
    assert 3 <= len(found) <= 8 and found[0] <= low + slack and found[-1] >= low + size - slack
    assert found == sorted(found)
