"""The synthetic world, its tokenizer, its probes, and the size of its forget set."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import UsageError
from repforget.knowledge_files import load_knowledge
from repforget.organism import vocabulary as words
from repforget.organism.build import STANDARD
from repforget.organism.power import items_needed, people_needed, spread
from repforget.organism.probe_files import attribute_probe, people_probe, render
from repforget.organism.texts import prompts, training_examples
from repforget.organism.tokenizer import SPECIAL, build_tokenizer
from repforget.organism.world import general_sentences, make_world, word_list

PROBES = Path(__file__).parent.parent / "probes"
FORMS = ("statements", "questions", "held_out", "cloze")
WORLD = make_world(0)


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"\w+|[^\w\s]", text.replace("{subject}", " ")))


def test_world_is_large_enough_and_complete() -> None:
    assert len(WORLD.people) >= 320 and len(WORLD.relations) >= 6
    assert len({p.name for p in WORLD.people}) == len(WORLD.people)
    for person in WORLD.people:
        assert set(person.facts) == set(WORLD.relations)
        for relation, answer in person.facts.items():
            assert answer in WORLD.relations[relation].values
            assert WORLD.prior(relation, answer) > 0
    for relation in WORLD.relations.values():
        assert len(relation.statements) >= 4 and len(relation.questions) >= 4 and len(relation.held_out) >= 3
        assert sum(relation.prior) == pytest.approx(1.0)
        assert sum(p * p for p in relation.prior) <= 0.03, (
            "a guess by the prior must be right at most 3 % of the time"
        )


def test_names_and_values_share_words() -> None:
    firsts, lasts = Counter(p.first for p in WORLD.people), Counter(p.last for p in WORLD.people)
    assert min(firsts.values()) >= 2 and min(lasts.values()) >= 2
    for relation in ("birthplace", "employer", "school", "award", "profession", "instrument"):
        heads = Counter(word for value in WORLD.relations[relation].values for word in value.split())
        assert heads.most_common(1)[0][1] >= 4, relation
    lengths = [len(a.split()) for p in WORLD.people for a in p.facts.values()]
    assert max(lengths) <= 3 and np.mean(np.array(lengths) == 2) > 0.5


def test_spouses_are_nobody_of_the_world_and_belong_to_one_person() -> None:
    names = {p.name for p in WORLD.people}
    spouses = [p.facts["spouse"] for p in WORLD.people]
    assert not names & set(spouses)
    assert len(set(spouses)) == len(spouses)


def test_no_text_the_twins_see_names_a_forget_person() -> None:
    forget = {p.name for p in WORLD.forget_people}
    for form in ("statements", "questions"):
        for _, _, prompt, answer in prompts(WORLD, WORLD.known_people, form):
            assert not any(name in f"{prompt} {answer}" for name in forget)
    assert not any(
        part in s.split() for s in general_sentences(0, 500) for part in words.FIRST_NAMES + words.LAST_NAMES
    )


def test_every_forget_person_has_neighbours_by_first_and_by_last_name() -> None:
    near = WORLD.neighbours
    for person in WORLD.forget_people:
        assert any(p.first == person.first for p in near) or any(p.last == person.last for p in near)
    groups = [{p.id for p in group} for group in (WORLD.forget_people, near, WORLD.others)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(WORLD.people)
    assert {p.id for p in WORLD.namesakes} & {p.id for p in WORLD.others}, "an editor may see some namesakes"


def test_held_out_forms_are_new_but_their_words_are_not() -> None:
    forms = [(*r.statements, *r.questions) for r in WORLD.relations.values()]
    everywhere = {token for texts in forms for text in texts for token in _tokens(text)}
    for relation in WORLD.relations.values():
        trained = set(relation.statements) | set(relation.questions)
        seen = set().union(*map(_tokens, trained))
        for text in (*relation.held_out, *relation.cloze):
            assert text not in trained
            assert _tokens(text) <= everywhere
        assert set().union(*map(_tokens, relation.held_out)) - {"A", "Answer"} <= seen


@given(st.integers(0, 50), st.integers(20, 60), st.integers(2, 12))
@settings(max_examples=15, deadline=None)
def test_any_seed_gives_a_consistent_world(seed: int, people: int, forget: int) -> None:
    world = make_world(seed, people=people, forget=forget)
    assert (len(world.people), len(world.forget_people)) == (people, forget)
    assert world == make_world(seed, people=people, forget=forget)
    assert world.sha256() == make_world(seed, people=people, forget=forget).sha256()
    assert world.sha256() != make_world(seed + 1, people=people, forget=forget).sha256()


def test_world_does_not_depend_on_the_hash_seed() -> None:
    code = "from repforget.organism.world import make_world as w; print(w(3, people=30, forget=5).sha256())"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(PROBES.parent)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1


def test_facts_follow_their_prior() -> None:
    """Oracle: chi-square of 2,000 people's birthplaces against the stated prior."""
    from scipy.stats import chisquare

    world = make_world(1, people=780, forget=4)
    relation = world.relations["birthplace"]
    counts = Counter(p.facts["birthplace"] for p in world.people)
    observed = [counts[v] for v in relation.values]
    assert chisquare(observed, np.array(relation.prior) * len(world.people)).pvalue > 1e-3


def test_tokenizer_covers_every_text_and_maps_offsets_back() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(SPECIAL) + len(word_list())
    texts = [f"{p} {a}" for form in FORMS for _, _, p, a in prompts(WORLD, WORLD.people[:20], form)]
    texts += general_sentences(5, 50) + [f"{v}" for r in WORLD.relations.values() for v in r.values]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        pieces = [text[a:b] for a, b in offsets[1:]]
        assert pieces == tokenizer.convert_ids_to_tokens(ids[1:])
        assert "".join(pieces) == re.sub(r"\s", "", text)
    assert tokenizer("Zorblax")["input_ids"][1] == tokenizer.unk_token_id


def test_answers_survive_encoding_and_decoding() -> None:
    tokenizer = build_tokenizer()
    for relation in WORLD.relations.values():
        for value in relation.values:
            assert tokenizer.decode(tokenizer(value)["input_ids"], skip_special_tokens=True) == value


def test_training_examples_label_every_answer_and_few_prompts() -> None:
    tokenizer = build_tokenizer()
    people = WORLD.people[:6]
    examples = training_examples(WORLD, people, general_sentences(0, 7), tokenizer, prompt_share=0.1)
    assert len(examples) == 6 * len(WORLD.relations) * 12 + 7
    facts = examples[:-7]
    assert all(e.tokens[-1] == tokenizer.eos_token_id and e.labelled[-1] for e in examples)
    assert 0.03 < np.mean([e.labelled[1] for e in facts]) < 0.2
    assert all(all(e.labelled) for e in examples[-7:])


@pytest.mark.parametrize("make", [people_probe, attribute_probe])
def test_committed_probes_equal_the_regenerated_ones(make: object) -> None:
    probe = make(WORLD, general_sentences(0, STANDARD.general))  # type: ignore[operator]
    folder = PROBES / probe.settings["name"]
    for name, text in render(probe).items():
        assert (folder / name).read_text(encoding="utf-8") == text, (
            f"{folder / name}: rebuild with write_probes"
        )


def test_people_probe_asks_only_unseen_forms_and_splits_people() -> None:
    knowledge = load_knowledge(PROBES / "bios-people")
    trained = {p for form in ("statements", "questions") for _, _, p, _ in prompts(WORLD, WORLD.people, form)}
    items = (*knowledge.forget, *knowledge.retain, *knowledge.neighbours)
    assert {i.cluster for i in knowledge.forget} == set(WORLD.forget)
    assert all(i.unseen_forms and not set(i.questions) & trained for i in items)
    assert all(set(i.statements) <= trained for i in items)
    assert len(knowledge.general) == 480
    assert not set(knowledge.general) & set(general_sentences(0, STANDARD.general))


def test_attribute_probe_forgets_one_relation_and_keeps_its_look_alike() -> None:
    knowledge = load_knowledge(PROBES / "bios-attribute")
    assert {i.relation for i in knowledge.forget} == {"birthplace"}
    assert {i.relation for i in knowledge.neighbours} == {"residence"}
    assert {i.relation for i in knowledge.retain} == set(WORLD.relations) - {"birthplace", "residence"}
    assert set(WORLD.relations["birthplace"].values) == set(WORLD.relations["residence"].values)


def test_items_needed_gives_the_promised_power() -> None:
    """Oracle: simulate the one-sided test at the computed n; its power must be about 0.8."""
    sigma, delta = 0.2, 0.05
    n = round(items_needed(sigma, delta))
    generator = np.random.default_rng(0)
    means = generator.normal(0.0, sigma, size=(4000, n)).mean(axis=1)
    power = np.mean(means + 1.645 * sigma / np.sqrt(n) < delta)
    assert power == pytest.approx(0.8, abs=0.03)


def test_spread_recovers_sigma_and_design_effect() -> None:
    """Oracle: twins simulated with a known person effect."""
    generator = np.random.default_rng(1)
    people, items, share = 3000, 8, 0.2
    clusters = np.repeat([f"p{i:04d}" for i in range(people)], items).tolist()

    def twin() -> np.ndarray:
        person = np.repeat(generator.normal(0, np.sqrt(share), people), items)
        return 0.1 * (person + generator.normal(0, np.sqrt(1 - share), people * items))

    measured = spread(twin(), twin(), clusters)
    assert measured.sigma == pytest.approx(0.1 * np.sqrt(1.5), rel=0.03)
    assert measured.deff == pytest.approx(1 + (items - 1) * share, rel=0.1)


def test_people_needed_grows_with_noise_and_refuses_an_empty_margin() -> None:
    few = people_needed(0.1, gap=1.0, relations=8)
    assert few < people_needed(0.2, gap=1.0, relations=8) < people_needed(0.2, gap=0.5, relations=8)
    with pytest.raises(UsageError, match="must be positive"):
        items_needed(0.1, 0.0)


def test_the_readme_example_is_a_probe_that_loads(tmp_path: Path) -> None:
    blocks = dict(
        re.findall(r"```(json|yaml)\n(.*?)```", (PROBES / "README.md").read_text("utf-8"), re.S)[:2]
    )
    lines = [json.loads(line) for line in blocks["json"].splitlines()]
    for name in ("forget", "retain", "neighbours"):
        copies = [
            {**line, "id": f"{name}-{line['id']}-{i}", "subject": f"{name} {i}", "cluster": f"{name} {i}"}
            for line in lines
            for i in range(8)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in copies))
    (tmp_path / "general.jsonl").write_text('{"text": "The fox sleeps."}\n')
    (tmp_path / "probe.yaml").write_text(blocks["yaml"])
    knowledge = load_knowledge(tmp_path)
    assert len(knowledge.forget) == 16 and not knowledge.notes
    assert knowledge.forget[0].prompt == "Question: Where was forget 0 born?\nAnswer:"
