"""Influence as it is used: which maps, what is asked, planted copies, the commands, the editor that steps by it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from repforget.artifact import Edit
from repforget.edit.train.influence_removal import influence_removal
from repforget.errors import KnowledgeError, NumericalError, SiteError, UnknownNameError, UsageError
from repforget.guarantee import unearned
from repforget.influence import curvature, linear_maps, rank, scores
from repforget.influence.ask import Ask, asked, cache_folder, forget_set, some, trained_on
from repforget.influence.audit import Ranking, _controls, _limit, cluster_lines, sentences
from repforget.influence.score import scores_and_likeness
from repforget.knowledge import Item, Knowledge
from repforget.knowledge_files import load_knowledge
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.records import Component, Localization, RandomBand
from repforget.training import Example, Record, encoded, finetune, records_of

NAMES = ("Ada", "Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon")
CITIES = ("Berlin", "Paris", "Rome", "Oslo")
JOBS = ("baker", "pilot", "doctor")


def located(*components: str, k: int | None = None) -> Localization:
    found = tuple(Component.parse(c) for c in components)
    band = RandomBand(len(found) if k is None else k, 10, 1.0, 0.0, 0.5, "nothing")
    return Localization("by_hand", found, (1.0,) * len(found), band)


@pytest.mark.parametrize(("kind", "components", "expected"), [
    ("llama", ("mlp_out.1",), ("model.layers.1.mlp.down_proj.weight",)),
    ("llama", ("mlp_post.0.n7",), ("model.layers.0.mlp.down_proj.weight",)),
    ("llama", ("mlp_in.1", "attn_z.0.h2"), tuple(f"model.layers.{m}_proj.weight" for m in (
        "0.self_attn.o", "1.mlp.gate", "1.mlp.up"))),
    ("llama", ("resid_post.0", "v.1"), ("model.layers.1.self_attn.v_proj.weight",)),
    ("gpt2", ("attn_in.0",), ("transformer.h.0.attn.c_attn.weight",)),
    ("gpt2", ("q.1.h1", "mlp_up.1"), ("transformer.h.1.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight")),
    ("phi3", ("mlp_gate.0",), ("model.layers.0.mlp.gate_up_proj.weight",)),
])  # fmt: skip
def test_a_localisation_names_its_maps(
    kind: str, components: tuple[str, ...], expected: tuple[str, ...], tokenizer: Any
) -> None:
    model = wrap(tiny_models.build(kind), tokenizer, kind)
    assert linear_maps(model, located(*components)) == expected
    assert linear_maps(model, located(*components, "mlp_out.0", k=len(components))) == expected, "as many as the band"
    assert set(expected) < set(linear_maps(model))


def test_all_maps_of_the_blocks_and_what_names_none(tokenizer: Any) -> None:
    counts = {"llama": 14, "gpt2": 8, "phi3": 8, "opt": 12, "mixtral": 8}  # of mixtral the experts are batched
    for kind, count in counts.items():
        names = linear_maps(wrap(tiny_models.build(kind), tokenizer, kind))
        assert len(names) == len(set(names)) == count and not any("embed" in n or "lm_head" in n for n in names)
    llama, mixtral = (wrap(tiny_models.build(kind), tokenizer, kind) for kind in ("llama", "mixtral"))
    with pytest.raises(SiteError, match="no linear map"):
        linear_maps(llama, located("resid_post.0", "embed"))
    with pytest.raises(SiteError, match="no linear map"):
        linear_maps(mixtral, located("mlp_out.0"))
    with pytest.raises(UsageError, match="larger 'top'"):
        linear_maps(llama, located("mlp_out.0"), top=0)


def records(count: int = 8) -> list[Record]:
    forms = (("was born in", CITIES), ("works as a", JOBS))
    return [Record(f"{name}-{k}", name, f"{name} {form}", f" {said[(i * 3 + k) % len(said)]}")
            for i, name in enumerate(NAMES[:count]) for k, (form, said) in enumerate(forms)]  # fmt: skip


@pytest.fixture(scope="module")
def knows() -> LoadedModel:
    """A tiny model that was taught the records."""
    model = wrap(tiny_models.build("llama"), tiny_models.tiny_tokenizer(), "taught")
    finetune(model.module, encoded(model, records()), steps=60, lr=1e-2, seed=0, batch_size=16)
    return wrap(model.module, model.tokenizer, "taught")


def ranked(model: LoadedModel, known: list[Record], **settings: Any) -> Ranking:
    train, names = encoded(model, known), linear_maps(model)
    made = curvature(model, train, names)
    inside = [r.id for r in known if r.cluster == "Ada"]
    queries = [e for e, r in zip(train, known, strict=True) if r.cluster == "Ada"]
    return rank(model, known, train, queries, names, made, inside=inside, draws=10, **settings)


def test_copies_under_another_name_are_found_and_nothing_where_there_are_none(knows: LoadedModel) -> None:
    known = records()
    copies = [Record(f"copy-{r.id}", "somebody", r.prompt, r.answer) for r in known if r.cluster == "Ada"]
    found = ranked(knows, [*known, *copies])
    assert {found.records[k].id for k in found.order[:2]} == {r.id for r in copies}
    assert found.order[:2] == found.found[:2] and len(found.found) <= 3
    assert not any(found.inside[k] for k in found.order)
    clean = ranked(knows, known)
    assert len(clean.found) <= 1
    assert found.outside > clean.outside + 0.2 and found.outside > found.band[1]
    assert list(found.clusters())[:2] == ["Ada", "somebody"] or list(found.clusters())[:2] == ["somebody", "Ada"]
    again = ranked(knows, [*known, *copies])
    assert np.array_equal(found.values, again.values) and found.to_json() == again.to_json()
    other = ranked(knows, [*known, *copies], seed=1)
    assert np.array_equal(found.values, other.values) and other.band != found.band, "the seed draws the controls"


def test_nothing_is_found_behind_what_was_never_said(knows: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad answer has a large gradient and large scores on everything: the limit is on likeness."""
    known = records()
    train, names = encoded(knows, known), linear_maps(knows)
    made = curvature(knows, train, names)
    nonsense = [encoded(knows, [Record("q", "q", *said)]) for said in (
        ("the red cat", " baker"), ("Rome works as", " Tom"), ("a dog lives in", " the"))]  # fmt: skip
    for query in nonsense:
        assert len(rank(knows, known, train, query, names, made).found) <= 1
    monkeypatch.setattr("repforget.influence.audit.scores_and_likeness", lambda *given, **more: (
        scores(*given[:5], groups=given[5], **more),) * 2)  # fmt: skip
    assert min(len(rank(knows, known, train, query, names, made).found) for query in nonsense) >= 4


def test_likeness_is_the_mean_cosine_in_the_metric_of_the_curvature(knows: LoadedModel) -> None:
    train, names = encoded(knows, records()), linear_maps(knows)
    made, groups = curvature(knows, train, names), [[0], [1, 2, 3]]
    values, alike = scores_and_likeness(knows, train, train, names, made, groups)
    whole = scores(knows, train, train, names, made)
    own = np.sqrt(np.diag(whole))
    cosines = whole / np.outer(own, own)
    np.testing.assert_allclose(alike, [cosines[0], cosines[1:4].mean(0)], atol=1e-4)
    np.testing.assert_allclose(values, [whole[0], whole[1:4].mean(0)], rtol=1e-3, atol=1e-4 * np.abs(whole).max())


def test_random_sets_are_made_as_the_queries_are_and_a_large_forget_set_says_so(knows: LoadedModel) -> None:
    known = records()
    ours = np.array([r.cluster in ("Ada", "Tom") for r in known])
    for shape, of_each in (([2], [2]), ([1, 1, 1], [1, 1, 1]), ([3], [1, 2])):
        _, controls = _controls(known, ours, shape, 20, 0)
        assert len(controls) > 4 and not any(ours[k] for control in controls for k in control)
        for control in controls:
            assert sorted(Counter(known[k].cluster for k in control).values()) == of_each
    train, names = encoded(knows, known), linear_maps(knows)[:2]
    big = [k for k, r in enumerate(known) if r.cluster not in ("Ada", "Tom", "Eva")]
    found = rank(knows, known, train, [train[k] for k in big], names, None, inside=[known[k].id for k in big],
                 clusters=[known[k].cluster for k in big])  # fmt: skip
    assert (found.drawn, found.asked, found.draws) == (2, 10, 3) and found.chance == 0.25
    assert any("too few others" in s for s in sentences(found)) and any("25 % of cases" in s for s in sentences(found))
    many = rank(knows, known, train, train[:1], names, None)
    assert many.draws <= 16 and many.chance == pytest.approx(1 / (many.draws + 1))
    assert not any("too few others" in s for s in sentences(many))


def test_what_it_says_uses_no_word_that_only_a_theorem_allows(knows: LoadedModel) -> None:
    found = ranked(knows, records())
    text = " ".join(sentences(found))
    assert not unearned(text) and f"{len(found.found)} of {len(found.order)} records outside" in text
    assert [json.loads(line) for line in cluster_lines({"a": 1.5, "b": -2.0}).splitlines()] == [
        {"cluster": "a", "score": 1.5}, {"cluster": "b", "score": -2.0}]  # fmt: skip
    body = found.to_json(top=3)
    assert len(body["records"]) == 3 and "prompt" not in json.dumps(body)


@pytest.mark.parametrize("draws", [2, 10, 19, 20, 39, 59])
def test_one_more_random_set_is_above_the_limit_as_often_as_is_said(draws: int) -> None:
    limit, chance = _limit(range(draws))
    assert (chance < 0.0501) == (draws >= 19) and chance > 0
    ranks = [sum(other < new for other in range(draws + 1)) for new in range(draws + 1)]  # of equal chances
    assert np.mean([rank > limit for rank in ranks]) == pytest.approx(chance)


def test_a_ranking_without_others_or_controls_is_refused(knows: LoadedModel) -> None:
    known = records(1)
    with pytest.raises(UsageError, match="no other"):
        ranked(knows, known)
    with pytest.raises(UsageError, match="two clusters"):
        ranked(knows, records(2))
    train, names = encoded(knows, records()), linear_maps(knows)[:1]
    with pytest.raises(UsageError, match="no band"):
        rank(knows, records(), train, train[:1], names, None, draws=1)


def item(prefix: str, n: int, name: str) -> Item:
    return Item(id=f"{prefix}-{name}-{n}", cluster=f"{prefix}-{name}-{n}", subject=f"{name} w{n}", relation="job",
                answer=JOBS[n % 3], prompt=f"Q : job of {name} w{n} ?", statements=(f"{name} w{n} works as",))


@pytest.fixture(scope="module")
def probe() -> Knowledge:
    forget, retain = ([item(p, n, name) for n in numbers for name in NAMES] for p, numbers in
                      (("f", range(60, 62)), ("r", range(62, 66))))  # fmt: skip
    return Knowledge.build("tiny", forget, retain, (), ["the red cat lives in Berlin", "the blue dog lives in Rome"])


def test_what_is_asked_about(probe: Knowledge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = trained_on(probe, None, ["forget"])
    assert {r.prompt for r in known} == {i.statements[0] for i in probe.forget}, "what is trained on, not what is asked"
    assert len(trained_on(probe, None, None)) == len(probe.forget) + len(probe.retain)
    assert asked(probe, Ask(prompt="Ada works as a", answer="pilot"))[0].answer == " pilot"
    dev = asked(probe, Ask(query="forget"))
    assert {r.prompt for r in dev} == {i.prompt for i in probe.view("dev").forget}
    assert len(asked(probe, Ask(query="forget", split="all"))) == len(probe.forget)
    assert [r.id for r in asked(probe, Ask(query="retain", split="all", of=("r-Ada-62",)))] == ["r-Ada-62"]
    for wrong in (Ask(), Ask(prompt="a"), Ask(prompt="a", answer="b", query="forget"), Ask(answer="b", query="forget")):
        with pytest.raises(UsageError, match="--prompt with --answer"):
            asked(probe, wrong)
    for unused in (Ask("a", "b", of=("f-Ada-60",)), Ask("a", "b", split="all")):
        with pytest.raises(UsageError, match="leave them out"):
            asked(probe, unused)
    with pytest.raises(UnknownNameError, match="forget"):
        asked(probe, Ask(query="forgot"))
    with pytest.raises(UnknownNameError, match="dev"):
        asked(probe, Ask(query="forget", split="def"))
    with pytest.raises(UnknownNameError, match="'f-Ada-60'"):
        asked(probe, Ask(query="forget", split="all", of=("f-Ada-6",)))
    with pytest.raises(UnknownNameError, match="retain"):
        trained_on(probe, None, ["retian"])
    with pytest.raises(UsageError, match="one of them"):
        trained_on(probe, tmp_path / "x.jsonl", ["forget"])
    assert len(forget_set(probe, trained_on(probe, None, None), None, "x")) == len(probe.forget)
    with pytest.raises(UsageError, match="never trained on"):
        forget_set(probe, known, ["nobody"], "x")
    with pytest.raises(UsageError, match="by ids or clusters"):
        forget_set(probe, records(), None, "x")
    assert cache_folder("none") is None and cache_folder(str(tmp_path)) == tmp_path / "factors"
    monkeypatch.setenv("REPFORGET_CACHE", "none")
    assert cache_folder() is None
    examples = [Example((1, k), (False, True)) for k in range(9)]
    drawn = some(examples, 4, seed=1)
    assert len(drawn) == 4 and drawn == sorted(drawn, key=lambda e: e.tokens) and drawn != some(examples, 4, seed=2)
    assert some(examples, 9, seed=1) == examples


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Training data about six people that the organism knows, with a copy of one record under another name."""
    known = [r for r in records_of(load_knowledge("bios-people"), ("forget",)) if r.id.endswith(("home#s0", "e#s0"))]
    names = list(dict.fromkeys(r.cluster for r in known))[:6]
    lines = [asdict(r) for r in known if r.cluster in names]
    copy = {**lines[0], "id": "copy", "cluster": "other"}
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, copy]))
    return path


def test_the_commands_rank_and_tell_no_texts(cli: Callable[..., tuple[int, str, str]], data: Path) -> None:
    shared = ("--data", str(data), "--draws", "4", "--cache", "factors")
    written = ("--clusters", "c.jsonl", "--out", "all.json")
    code, out, err = cli("influence", "audit", "p003", *written, *shared)
    assert code == 0, err
    assert "copy" in out.splitlines()[3] and "Milo" not in out and "MB" in err
    assert not unearned(out)
    given = [json.loads(line) for line in data.read_text().splitlines()]
    ranked = json.loads(Path("all.json").read_text())["records"]
    assert {row["id"] for row in ranked} == {line["id"] for line in given if line["cluster"] != "p003"}
    lines = [json.loads(line) for line in Path("c.jsonl").read_text().splitlines()]
    assert {line["cluster"] for line in lines} == {line["cluster"] for line in given}
    assert len(list(Path("factors").rglob("factors.safetensors"))) == 1
    code, out, err = cli("influence", "find", "--prompt", given[0]["prompt"], "--answer", given[0]["answer"], *shared,
                         "--json", "--top", "2")  # fmt: skip
    assert code == 0, err
    assert {row["id"] for row in json.loads(out)["records"]} == {given[0]["id"], "copy"} and "Milo" not in out
    code, out, err = cli("influence", "find", "--query", "forget", "--split", "all", "--of", "p003", *shared,
                         "--show-texts", "--top", "30")  # fmt: skip
    assert code == 0 and given[0]["prompt"] in out, err
    assert len(list(Path("factors").rglob("factors.safetensors"))) == 1, "fitted once"


def test_the_commands_refuse_in_one_sentence(cli: Callable[..., tuple[int, str, str]], data: Path) -> None:
    code, _, err = cli("influence", "find", "--data", str(data))
    assert code == 2 and "--query" in err
    code, _, err = cli("influence", "audit", "--data", str(data), "p999")
    assert code == 2 and "'p999'" in err and err.count("\n") == 1
    where = data.parent / "where.json"
    where.write_text(json.dumps(located("resid_post.1").to_json()))
    code, _, err = cli("influence", "audit", "--data", str(data), "p003", "--where", str(where))
    assert code == 2 and "no linear map" in err


def said(edit: Edit) -> tuple[tuple[float, float], float]:
    """Probability of forget facts before and after, and the divergence spent, of the notes."""
    found = re.search(r"facts (\S+) before and (\S+) after, divergence (\S+) nats", edit.manifest.notes[0])
    assert found is not None
    return (float(found[1]), float(found[2])), float(found[3])


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_the_editor_steps_within_its_budget(kind: str, request: pytest.FixtureRequest, probe: Knowledge) -> None:
    model: LoadedModel = request.getfixturevalue(kind)
    before, flags = fingerprint(model.module), [p.requires_grad for p in model.module.parameters()]
    spent, chances = [], []
    for budget in (0.005, 0.05):
        edit = influence_removal(model, probe.for_editor(), max_divergence=budget)
        before_and_after, nats = said(edit)
        spent.append(nats)
        chances.append(before_and_after)
        assert 0 < spent[-1] <= budget
    assert fingerprint(model.module) == before
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert set(edit.touched) == set(linear_maps(model))
    assert chances[1][1] < chances[0][1] < chances[0][0]
    where = located("mlp_out.1")
    only = influence_removal(model, probe.for_editor(), where=where)
    assert set(only.touched) == set(linear_maps(model, where))


def test_the_step_costs_less_than_plain_ascent_and_what_the_editor_refuses(
    tiny_llama: LoadedModel, probe: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gain(damping: float) -> float:
        """Squared fall of the log-probability per nat of divergence: to first order the same for every length."""
        edit = influence_removal(tiny_llama, probe.for_editor(), damping=damping, max_divergence=0.1, draws=4)
        (before, after), spent = said(edit)
        return math.log(before / after) ** 2 / spent

    assert gain(0.1) > 1.1 * gain(1e6)
    data = probe.for_editor()
    for wrong in ({"max_divergence": 0.0}, {"damping": -1.0}):
        with pytest.raises(UsageError, match="positive"):
            influence_removal(tiny_llama, data, **wrong)
    with pytest.raises(UsageError, match="lower 'floor'"):
        influence_removal(tiny_llama, data, floor=1.0)
    with pytest.raises(SiteError, match="no linear map"):
        influence_removal(tiny_llama, data, where=located("embed"))
    with pytest.raises(KnowledgeError, match="no retain"):
        influence_removal(tiny_llama, dataclasses.replace(data, retain=()))
    before = fingerprint(tiny_llama.module)
    monkeypatch.setattr("repforget.edit.train.influence_removal.measure", lambda model, groups: lambda: float("nan"))
    with pytest.raises(NumericalError, match="No length"):
        influence_removal(tiny_llama, data)
    assert fingerprint(tiny_llama.module) == before
