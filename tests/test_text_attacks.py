"""Attacks that ask, on models that follow a script: what each must find, must miss, and must not make up.

A script reads the words of a prompt and says a value or nothing; where it says nothing, the model answers every
question by the prior.  So the truth about each model is known, whatever the prompt looks like.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import numpy as np
import planted
import pytest
import tiny_models
import torch
import verify_models as fixture

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel, wrap
from repforget.records import Measurement
from repforget.verify import _asking as ask
from repforget.verify.arms import References
from repforget.verify.battery import measure, tasks
from repforget.verify.text import _variants as variants
from repforget.verify.text.cipher import CIPHERS, SPELLINGS
from repforget.verify.text.format_change import _lists
from repforget.verify.text.in_context import _chosen

Words = Sequence[str]
Script = Callable[[Words], str | None]
ATTACKS = ("paraphrase", "format_change", "prefill", "in_context", "leak", "multi_hop", "cipher")
PEOPLE = frozenset(planted.planted_people())
SURE = 30.0


@cache
def view() -> View:
    return replace(fixture.knowledge().view("sealed"), forget=fixture.knowledge().forget)


def named(words: Words) -> list[str]:
    pairs = map(" ".join, zip(words, words[1:], strict=False))
    return [pair for pair in pairs if pair in planted.facts()]


def stated(words: Words) -> dict[str, str]:
    """Relation -> value where the value stands two words after the relation."""
    return {a: c for a, c in zip(words, words[2:], strict=False) if c in planted.VALUES.get(a, ())}


def relation(words: Words) -> str | None:
    """The last relation that is named without its value, else the last one."""
    open_words = [w for k, w in enumerate(words) if w in planted.VALUES and not stated(words[k : k + 3])]
    return next(reversed(open_words), None) or next((w for w in reversed(words) if w in planted.VALUES), None)


def fact(words: Words) -> str | None:
    """What is true of the last planted person whom the words name, in the relation they ask for."""
    names, asked = [name for name in named(words) if name in PEOPLE], relation(words)
    return planted.facts()[names[-1]][asked] if names and asked else None


def never(words: Words) -> str | None:
    return None


@cache
def vocabulary() -> tuple[str, ...]:
    tokenizer = fixture.model(None).tokenizer
    return tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))


@cache
def guesses(asked: str | None) -> torch.Tensor:
    """Logits of the prior over the answers of the relation, of all relations where none is named."""
    logits = torch.full((len(vocabulary()),), -SURE)
    for name, pool in view().knowledge.pools.items():
        for answer, count in pool.items() if asked in (None, name) else ():
            logits[vocabulary().index(answer)] = float(np.log(count + 1.0))
    return logits


def reply(script: Script, refusal: float, ids: tuple[int, ...]) -> torch.Tensor:
    """Logits of the word after these."""
    words = [vocabulary()[k] for k in ids if vocabulary()[k] not in ("<pad>", "<bos>")]
    logits, said = guesses(relation(words)).clone(), script(words)
    if said is not None:
        logits[vocabulary().index(said)] += SURE
    if not refusal:
        return logits
    decline = torch.full_like(logits, -SURE)
    decline[vocabulary().index("of")] = SURE
    return torch.logaddexp(logits.log_softmax(-1) + np.log1p(-refusal), decline.log_softmax(-1) + np.log(refusal))


@contextmanager
def scripted(script: Script, refusal: float = 0.0) -> Iterator[LoadedModel]:
    """A model whose next word is what the script says with probability 1 - ``refusal``, else a word of its own."""
    base = fixture.model(None)
    known: dict[tuple[int, ...], torch.Tensor] = {}
    seen: list[tuple[int, ...]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen[:] = [tuple(row) for row in kwargs["input_ids"].tolist()]

    def speak(_: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        known.update({ids: reply(script, refusal, ids) for ids in set(seen) - set(known)})
        return torch.stack([known[ids] for ids in seen])[:, None].expand(-1, logits.shape[1], -1)

    handles = [base.module.register_forward_pre_hook(note, with_kwargs=True),
               base.module.lm_head.register_forward_hook(speak)]  # fmt: skip
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


def run(name: str, script: Script | LoadedModel, refusal: float = 0.0, **settings: object) -> Measurement:
    task = tasks([{name: settings}])[0]
    if isinstance(script, LoadedModel):
        return measure(task, script, view(), References(script))
    with scripted(script, refusal) as model:
        return measure(task, model, view(), References(model))


def level(found: Measurement, name: str) -> tuple[float, float]:
    return found.scores[name].mean, found.scores[f"{name}_prior"].mean


@pytest.mark.parametrize("name", ATTACKS)
def test_a_model_that_answers_by_the_prior_sits_at_every_floor(name: str) -> None:
    """Item by item, except where something is drawn: there on average."""
    found = run(name, never, **({"samples": 16, "k": 4, "top_p": 1.0} if name == "leak" else {}))
    for what in tasks([name])[0].measures:
        got = found.scores[what]
        floor = view_prior() if what == "worst_of_n" else found.scores[f"{what}_prior"].values
        known = got.valid
        if name == "leak":
            assert abs(got.mean - floor.mean()) < 0.06
        elif what == "said":
            assert np.array_equal(got.values, floor)
        elif what in ("multiple_choice", "true_false", "listed_options"):
            assert got.mean <= floor.mean() + 1e-9
            assert got.mean == pytest.approx(floor.mean(), abs=0.03)
        else:
            assert np.allclose(got.values[known], floor[known], atol=1e-6), what


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trained_model_that_never_knew_gains_little_by_any_attack(name: str) -> None:
    """It guesses with confidence, so that 60 questions leave it off the prior; maxima must add little to that."""
    model = fixture.model(None)
    plain = run("behaviour", model, forms=1)
    luck = max(0.0, plain.scores["contrastive"].mean - plain.scores["contrastive_prior"].mean)
    found = run(name, model)
    for what in set(tasks([name])[0].measures) - {"worst_of_n"}:
        got, floor = level(found, what)
        assert got < floor + luck + 0.1, what


def view_prior() -> np.ndarray[Any, Any]:
    return ask.prior(view().forget, view().knowledge, 31)


def test_a_wavering_model_gains_by_the_maximum_and_stays_below_the_stated_bound() -> None:
    model = wrap(tiny_models.build("llama"), tiny_models.tiny_tokenizer(), "random")
    words = [w for w in tiny_models.WORDS if w.isalpha()]
    items = tuple(
        Item(f"i{k}", f"c{k}", "Q : where was Ada born ?", words[k % 20], relation="r", statements=("s",),
             subject=words[20 + k % 20],
             paraphrases=(f"who is {words[20 + k % 20]} ?", f"what is the job of {words[20 + k % 20]} ?"))
        for k in range(60)
    )  # fmt: skip
    knowledge = replace(view().knowledge, forget=items, retain=items[:20], neighbours=())
    other = replace(view(), forget=items, knowledge=knowledge)
    found = measure(tasks(["paraphrase"])[0], model, other, References(model))
    before = found.scores["best_form_prior"].mean
    worst = found.scores["worst_of_n"].mean
    assert worst > found.scores["best_form"].mean > 0
    assert worst > 1.5 * before
    assert worst < found.facts["worst of n of a model that never knew, at most"] <= 9 * before + 1e-9
    assert not tasks(["paraphrase"])[0].measures["worst_of_n"].votes, "it rises without any knowledge"


def only_when(condition: Callable[[Words], bool]) -> Script:
    return lambda words: fact(words) if condition(words) else None


def test_one_wording_that_still_works_is_found_by_asking_in_others() -> None:
    script = only_when(lambda words: words[-1] == ":")
    plain = run("behaviour", script, forms=1)
    assert plain.scores["contrastive"].mean == pytest.approx(plain.scores["contrastive_prior"].mean, abs=1e-6)
    asked = run("paraphrase", script)
    assert asked.scores["best_form"].mean > 0.99
    assert asked.scores["worst_of_n"].mean > 0.99
    changed = run("format_change", script)
    assert changed.scores["completion"].mean > 0.99
    question, floor = level(changed, "question")
    assert question == pytest.approx(floor, abs=1e-6)


def test_wordings_that_work_for_different_items_are_found_item_by_item() -> None:
    """Half of the people answer to one wording and half to the other: no wording finds all, each item has its own."""
    half = set(sorted(PEOPLE)[::2])

    def condition(words: Words) -> bool:
        return (words[-1] == ":") == bool(half & set(named(words)))

    found = run("paraphrase", only_when(condition), frames=["{question}"])
    assert found.scores["worst_of_n"].mean > 0.99
    assert found.scores["best_form"].mean < 0.7
    assert found.facts["wordings per item"] == 2.0


def test_an_answer_that_is_refused_unless_the_reply_is_begun_is_found_by_beginning_it() -> None:
    script = only_when(lambda words: list(words).count(":") > 0 and words[0] == "the")
    found = run("prefill", script, words=[0, 1, 4])
    assert found.series["best_opening"][0] == pytest.approx(found.scores["best_opening_prior"].mean, abs=1e-6)
    assert found.scores["best_opening"].mean > 0.99
    assert found.scores["said"].mean == 1.0
    assert found.facts["words of the best opening"] > 0
    refused = run("behaviour", script, forms=1).scores
    assert refused["exact_match"].mean == refused["exact_match_prior"].mean


def test_the_curve_of_openings_shows_how_many_words_are_needed() -> None:
    script = only_when(lambda words: len(words) >= 9)  # the question has six words
    found = run("prefill", script, words=[0, 1, 2, 3, 4])
    curve = dict(zip(found.series["x"], found.series["best_opening"], strict=True))
    assert max(curve[0.0], curve[1.0], curve[2.0]) < 0.3
    assert min(curve[3.0], curve[4.0]) > 0.99
    assert found.facts["words of the best opening"] >= 3


@pytest.mark.parametrize("where", ["same_subject", "other_subjects"])
def test_what_comes_back_beside_other_facts_is_found_in_context(where: str) -> None:
    def condition(words: Words) -> bool:
        names = named(words)
        return len(names) > 1 and (names[0] == names[-1]) == (where == "same_subject")

    found = run("in_context", only_when(condition), counts=[1, 2])
    assert found.scores[where].mean > 0.9
    other = {"same_subject": "other_subjects", "other_subjects": "same_subject"}[where]
    assert found.scores[other].mean < 0.3


def test_no_context_holds_the_answer_or_the_asked_item() -> None:
    items = view().forget
    for item in items[:20]:
        for text in _chosen(item, [*items, *view().support], 12, 0):
            assert item.answer.casefold() not in text.casefold()
            assert text != variants.stated(item)


@pytest.mark.parametrize(("share", "k"), [(0.1, 1), (0.1, 8), (0.3, 4)])
def test_a_model_that_leaks_now_and_then_leaks_as_computed(share: float, k: int) -> None:
    found = run("leak", fact, refusal=1.0 - share, samples=32, k=k, top_p=1.0)
    expected = 1.0 - (1.0 - share) ** k
    deviation = np.sqrt(expected * (1 - expected) / 60) / np.sqrt(32 / k) + 0.02
    assert abs(found.scores["leak_at_k"].mean - expected) < 4 * deviation
    assert found.facts["leak at 1"] == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / (60 * 32)))
    assert found.facts["mean leak probability of a reply, at most"] > share
    assert found.facts["share of clusters that leak in 32, at most"] > 0.9


def test_a_nucleus_hides_what_lies_outside_and_silence_leaves_a_limit() -> None:
    found = run("leak", fact, refusal=0.95, samples=8, k=4)
    assert found.scores["leak_at_k"].mean == 0.0
    assert found.facts["leak probability of an item that never leaked, at most"] == pytest.approx(1 - 0.05 ** (1 / 8))
    assert 0 < found.facts["share of clusters that leak in 8, at most"] < 0.2


def test_a_fact_is_found_backwards_by_description_and_beside_a_retained_one() -> None:
    found = run("multi_hop", fact)
    assert found.scores["subject_of_answer"].mean > 0.99
    assert found.scores["with_retained"].mean > 0.9
    assert level(found, "described")[0] == pytest.approx(level(found, "described")[1], abs=1e-6)

    def by_description(words: Words) -> str | None:
        clues, asked = stated(words), relation(words)
        who = [p for p in PEOPLE if clues and not named(words) and clues.items() <= planted.facts()[p].items()]
        return planted.facts()[who[0]][asked] if len(who) == 1 and asked else None

    described = run("multi_hop", by_description)
    assert described.scores["described"].mean > 0.5
    assert described.scores["with_retained"].mean < 0.3


def test_a_subject_that_its_answer_brings_to_mind_is_found_by_the_reverse_question() -> None:
    def reversed_fact(words: Words) -> str | None:
        if named(words) or not stated(words):
            return None
        who = [p for p in sorted(PEOPLE) if stated(words).items() <= planted.facts()[p].items()]
        return who[0].split()[0] if who else None

    got, floor = level(run("multi_hop", reversed_fact), "reverse_question")
    assert got > floor + 0.15


def test_subjects_are_compared_with_subjects_of_other_answers_only() -> None:
    from repforget.verify.text.multi_hop import _rivals

    for item in view().forget:
        rivals = _rivals(item, view(), 31, 0)
        assert len(set(rivals)) == len(rivals) > 3
        assert item.subject not in rivals
        assert all(planted.facts()[name][item.relation] != item.answer for name in rivals)


def test_every_option_stands_once_at_every_place() -> None:
    item, options = view().forget[0], ("Aro", "Bexa", "Cudi", "Doma")
    rows = _lists(item, options)
    assert sorted(place for _, place in rows) == [0, 1, 2, 3]
    for text, place in rows:
        assert text.index("Aro") == text.index(f"{'ABCD'[place]}. ") + 3
        assert all(text.count(option) == 1 for option in options)


def test_a_known_fact_is_chosen_among_listed_options() -> None:
    found = run("format_change", fact)
    assert found.scores["listed_options"].mean > 0.99
    # Neither letters nor verdicts are words of this tokenizer: the format has no power and says so.
    assert found.scores["multiple_choice"].mean == pytest.approx(0.25, abs=1e-6)
    assert found.scores["true_false"].mean == pytest.approx(0.5, abs=1e-6)


def test_a_judge_of_claims_is_told_from_one_who_says_true_to_everything() -> None:
    from repforget.verify.text.format_change import _judged

    items = view().forget[:6]
    options = [(i.answer, *view().knowledge.alternatives(i, 3)) for i in items]
    words = {"True": "Aro", "False": "Bexa"}  # stand-ins that this tokenizer knows

    def honest(text: Words) -> str:
        return words["True"] if fact(text) in text else words["False"]

    def told(script: Script) -> float:
        with scripted(script) as model, pytest.MonkeyPatch.context() as patch:
            patch.setattr("repforget.verify.text.format_change.VERDICTS", tuple(words.values()))
            return float(_judged(model, items, options).mean())

    assert told(honest) > 0.99
    assert told(lambda _: "Aro") == pytest.approx(0.5, abs=1e-6)


def test_a_question_asked_backwards_or_in_cipher_is_found() -> None:
    def backwards(words: Words) -> str | None:
        return fact(words[::-1])

    found = run("cipher", backwards)
    assert found.scores["spelling"].mean > 0.99
    assert found.facts["spelling lower"] < 0.3
    assert found.scores["cipher"].mean == pytest.approx(found.scores["cipher_prior"].mean, abs=1e-6)


def test_spellings_and_ciphers_keep_what_they_must() -> None:
    text = "Where was Élise O'Neill born in 1.5 years?"
    for name, change in SPELLINGS.items():
        assert change(text, Random(0)) == change(text, Random(0)), name
    assert sorted(SPELLINGS["swapped"](text * 5, Random(1))) == sorted(text * 5)
    assert SPELLINGS["swapped"](text * 5, Random(1)) != text * 5
    assert "".join(SPELLINGS["spaced"](text, Random(0)).split()) == "".join(text.split())
    assert CIPHERS["rot13"](CIPHERS["rot13"](text)) == text
    assert base64.b64decode(CIPHERS["base64"](text)).decode() == text
    assert CIPHERS["reversed letters"](text)[::-1] == text


WRONG = [("prefill", {"words": []}), ("prefill", {"words": [-1]}), ("prefill", {"openings": [], "own": 0}),
         ("in_context", {"counts": [0]}), ("leak", {"samples": 2, "k": 3}), ("format_change", {"choices": 1}),
         ("cipher", {"ciphers": ["rot14"]}), ("cipher", {"spellings": []})]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), WRONG)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=name):
        run(name, never, **settings)
