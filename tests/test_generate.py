"""Generation: against repeated full passes, alone and in company; and whether a text says the answer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_models import ARCHITECTURES, WORDS, tiny

from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import Item
from repforget.models.load import LoadedModel
from repforget.scoring import answer_logprobs, answers_match, generate

_LLAMA = tiny("llama")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny("llama")


class TestGenerate:
    PROMPTS = ("Ada Berg was born in", "the", "Q : is the city of Rome red ? A :", "Cora Dahl")

    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_greedy_equals_repeated_full_passes(self, kind: str) -> None:
        model = tiny(kind)
        said = generate(model, self.PROMPTS, max_new_tokens=6)
        for prompt, (text,) in zip(self.PROMPTS, said, strict=True):
            ids = model.tokenizer(prompt)["input_ids"]
            new: list[int] = []
            while len(new) < 6:
                with torch.no_grad():
                    token = int(model.module(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
                if token == 2:
                    break
                new.append(token)
            assert (
                text == model.tokenizer.decode(new, skip_special_tokens=True).lstrip().split("\n")[0].strip()
            )

    @given(st.permutations(range(4)), st.integers(1, 64))
    @settings(max_examples=10, deadline=None)
    def test_samples_do_not_depend_on_order_or_batch(self, order: list[int], budget: int) -> None:
        options = {"samples": 3, "temperature": 1.0, "max_new_tokens": 5, "seed": 3}
        whole = generate(_LLAMA, self.PROMPTS, **options)
        parts = generate(_LLAMA, [self.PROMPTS[k] for k in order], token_budget=budget, **options)
        assert parts == [whole[k] for k in order]

    def test_seeds_and_occurrences_differ(self, model: LoadedModel) -> None:
        options = {"samples": 4, "temperature": 1.5, "max_new_tokens": 6}
        first = generate(model, ["Ada", "Ada"], seed=0, **options)
        assert first == generate(model, ["Ada", "Ada"], seed=0, **options)
        assert first[0] != first[1] and first != generate(model, ["Ada", "Ada"], seed=1, **options)
        assert generate(model, ["Ada"], seed=0, **{**options, "samples": 2})[0] == first[0][:2]

    def test_sampling_frequencies_follow_the_model(self, model: LoadedModel) -> None:
        said = generate(
            model, ["the city of"], samples=2000, temperature=1.0, max_new_tokens=1, token_budget=10**6
        )[0]
        top = max(set(said) - {""}, key=said.count)
        expected = float(np.exp(answer_logprobs(model, [("the city of", " " + top)]).sum_logprob[0]))
        assert said.count(top) / 2000 == pytest.approx(
            expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5
        )

    def test_tiny_nucleus_is_greedy(self, model: LoadedModel) -> None:
        sampled = generate(model, self.PROMPTS, temperature=1.0, top_p=1e-6, max_new_tokens=5)
        assert sampled == generate(model, self.PROMPTS, max_new_tokens=5)

    def test_stops_at_line_break_and_eos(self) -> None:
        model = tiny("llama")
        newline = model.tokenizer.get_vocab()["\n"]

        def say(token: int) -> list[str]:
            handle = model.module.lm_head.register_forward_hook(
                lambda _m, _i, out: (
                    torch.nn.functional.one_hot(torch.full(out.shape[:-1], token), out.shape[-1]) * 9.0
                )
            )
            try:
                return generate(model, ["Ada"], max_new_tokens=4)[0]
            finally:
                handle.remove()

        assert say(2) == [""] and say(newline) == [""]
        assert say(model.tokenizer.get_vocab()["Oslo"]) == ["Oslo Oslo Oslo Oslo"]

    SCRIPT = (" Oslo", "\n", " is", "\n", "\n", " red", " Q", ":", " blue", " green")

    @pytest.fixture()
    def scripted(self) -> Iterator[LoadedModel]:
        """A model that says the words of SCRIPT whatever it is asked, then <eos>."""
        model = tiny("llama")
        vocab = model.tokenizer.get_vocab()
        words = [vocab[w if w == "\n" else w.strip()] for w in self.SCRIPT] + [2] * 20

        def say(_m: object, _a: object, kwargs: dict[str, torch.Tensor], out: object) -> None:
            step = int(kwargs["position_ids"][0, -1]) - 1
            out.logits = torch.nn.functional.one_hot(torch.full(out.logits.shape[:2], words[step]), 40) * 9.0  # type: ignore[attr-defined]

        handle = model.module.register_forward_hook(say, with_kwargs=True)
        yield model
        handle.remove()

    @pytest.mark.parametrize(
        ("stop", "whole", "expected"),
        [((), False, "Oslo"), ((), True, "Oslo \n is \n \n red Q : blue green"),
         (("Q :",), True, "Oslo \n is \n \n red"), (("\n \n",), True, "Oslo \n is"), (("red", "is"), True, "Oslo"),
         (("slo",), False, "O"), (("Q :",), False, "Oslo"), ((" ",), True, "Oslo"),
         (("never",), True, "Oslo \n is \n \n red Q : blue green")],
    )  # fmt: skip
    def test_stops_and_whole_texts(
        self, scripted: LoadedModel, stop: tuple[str, ...], whole: bool, expected: str
    ) -> None:
        passes: list[int] = []
        handle = scripted.module.register_forward_pre_hook(lambda _m, _a: passes.append(1))
        said = generate(scripted, ["Ada"], max_new_tokens=20, stop=stop, whole=whole)
        handle.remove()
        assert said == [[expected]]
        assert len(passes) <= max(expected.count(" ") + 4, 2)  # decoding ends with the text

    def test_complete_texts_leave_the_batch(self, model: LoadedModel) -> None:
        """Half the rows end at once: later steps carry few rows, and every text is as if generated alone."""
        rows: list[int] = []
        prompts = [f"{a} {b}" for a in ("Ada", "the", "Q : is", "Cora Dahl") for b in WORDS[:12]]
        whole = generate(model, prompts, max_new_tokens=12)
        stops = [words[3] for (text,) in whole if len(words := text.split()) > 3][:4]
        handle = model.module.register_forward_pre_hook(
            lambda _m, _a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        said = generate(model, prompts, max_new_tokens=12, stop=stops, token_budget=10**6)
        handle.remove()
        assert rows[0] == len(prompts) and rows[-1] <= len(prompts) // 2
        assert said == [generate(model, [p], max_new_tokens=12, stop=stops)[0] for p in prompts]
        for (text,), (longer,) in zip(said, whole, strict=True):
            assert longer.startswith(text) and not any(stop in text for stop in stops)

    def test_empty_prompt_starts_from_bos(self, model: LoadedModel) -> None:
        with torch.no_grad():
            first = int(model.module(input_ids=torch.tensor([[1]])).logits[0, -1].argmax())
        expected = model.tokenizer.decode([first], skip_special_tokens=True)
        assert generate(model, [""], max_new_tokens=1) == [[expected]]

    def test_refusals(self, model: LoadedModel) -> None:
        with pytest.raises(UsageError, match="greedy"):
            generate(model, ["Ada"], samples=2)
        with pytest.raises(UsageError, match="list of strings"):
            generate(model, ["Ada"], stop="\n\n")
        with pytest.raises(UsageError, match="top_p"):
            generate(model, ["Ada"], top_p=0.0)
        with pytest.raises(KnowledgeError, match="room"):
            generate(model, ["the " * 60], max_new_tokens=16)


class TestMatch:
    ITEM = Item("1", "c", "Where ?", "New York", aliases=("NYC", "ニューヨーク"))

    @pytest.mark.parametrize("text", ["New York", " new  york.", "\n'New-York', yes", "nyc!", "NEW YORK",
                                      "ニューヨークです"])  # fmt: skip
    def test_says_it(self, text: str) -> None:
        assert answers_match(text, self.ITEM)

    @pytest.mark.parametrize("text", ["", "New Yorker", "In New York", "New", "NYCs", "York New"])
    def test_does_not(self, text: str) -> None:
        assert not answers_match(text, self.ITEM)

    def test_numbers_keep_their_points(self) -> None:
        three = Item("1", "c", "How many ?", "3")
        assert (
            answers_match("3.", three)
            and answers_match("3, or so", three)
            and not answers_match("3.5", three)
        )
