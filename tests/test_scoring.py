"""Scoring: the fast paths against the model's own plain forward pass, one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_models import ARCHITECTURES, WORDS, byte_tokenizer, tiny, word_tokenizer

from repforget.errors import KnowledgeError, NumericalError, UsageError
from repforget.models.load import LoadedModel
from repforget.scoring import (
    answer_logprobs,
    candidate_logprobs,
    encode,
    generate,
    token_batches,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny("llama")


def plain(model: LoadedModel, prompt: str, answer: str) -> np.ndarray:
    """The slow, obviously right score: one sequence, no padding, no cache, log-softmax in fp64."""
    e = encode(model.tokenizer, prompt, answer)
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0].double()
    table = logits.log_softmax(-1)
    return np.array([table[k - 1, e.ids[k]].item() for k in range(e.start, len(e.ids))])


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)
PAIRS = [("Ada Berg was born in", " Oslo"), ("the city of", " New York"), ("Q : is the city red ? A :", " a"),
         ("Cora", " Dahl was born in the city of New Delhi ."), ("the city of", " New Delhi")]  # fmt: skip


class TestEncode:
    @given(texts, texts)
    @settings(max_examples=50, deadline=None)
    def test_answer_tokens_spell_the_answer(self, prompt: str, answer: str) -> None:
        e = encode(_WORD, prompt, " " + answer)
        assert [WORDS.index(w) + 4 for w in answer.split()] == list(e.answer)
        assert e.ids[0] == 1 and e.valid and not e.eos

    @given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8).filter(lambda t: t.strip()))
    @settings(max_examples=100, deadline=None)
    def test_bytes_lose_nothing(self, prompt: str, answer: str) -> None:
        """Whatever the characters, the ids spell the text and the answer tokens cover the answer."""
        try:
            e = encode(_BYTE, "the " + prompt, answer)
        except UnicodeEncodeError:
            return
        whole = _BYTE.decode(e.ids, clean_up_tokenization_spaces=False)
        assert whole == "the " + prompt + answer
        said = _BYTE.decode(e.answer, clean_up_tokenization_spaces=False)
        assert said.endswith(answer) or "\ufffd" in said

    def test_straddling_token_belongs_to_the_answer(self) -> None:
        tokenizer = byte_tokenizer()
        joint = encode(tokenizer, "the city of O", "slo")
        assert tokenizer.decode(joint.answer).strip() == "Oslo"

    def test_eos(self) -> None:
        e = encode(word_tokenizer(), "Ada", " Berg", eos=True)
        assert e.answer[-1] == 2 and len(e.answer) == 2 and e.eos

    def test_empty_answer_names_the_item(self) -> None:
        with pytest.raises(KnowledgeError, match="Ada was"):
            encode(word_tokenizer(), "Ada was", "  ")

    def test_too_long_is_invalid_not_truncated(self) -> None:
        e = encode(word_tokenizer(), "the " * 80, " Oslo")
        assert not e.valid and len(e.ids) == 82

    def test_tokenizer_without_offsets(self) -> None:
        fast = word_tokenizer()

        class Slow:
            is_fast, eos_token_id, bos_token_id, model_max_length = False, 2, 1, 64

            def __init__(self, glue: bool) -> None:
                self.glue = glue

            def __call__(self, texts: list[str], **kwargs: object) -> dict[str, list[list[int]]]:
                ids = [fast(t)["input_ids"] for t in texts]
                ids = [[1, sum(i)] for i in ids] if self.glue else ids
                return {"input_ids": ids, "special_tokens_mask": [[1] + [0] * (len(i) - 1) for i in ids]}

        assert encode(Slow(False), "Ada Berg", " was born") == encode(fast, "Ada Berg", " was born")
        with pytest.raises(UsageError, match="offsets"):
            encode(Slow(True), "Ada Berg", " was born")

    def test_believes_no_empty_offsets(self) -> None:
        fast = word_tokenizer()

        class Broken:
            is_fast, eos_token_id, bos_token_id, model_max_length = True, 2, 1, 64

            def __call__(self, texts: list[str], **kwargs: object) -> dict[str, object]:
                coded = fast(texts, return_special_tokens_mask=True)
                empty = [[(0, 0)] * len(ids) for ids in coded["input_ids"]]
                return {**coded, "offset_mapping": empty}

        assert encode(Broken(), "Ada Berg", " was born").start == 3


_WORD, _BYTE = word_tokenizer(), byte_tokenizer()


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.booleans(), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_every_row_once_within_budget(
    lengths: list[int], budget: int, left: bool, equal: bool
) -> None:
    rows = [[7] * n for n in lengths]
    seen: list[int] = []
    side = "left" if left else "right"
    for index, batch in token_batches(rows, token_budget=budget, pad_id=0, side=side, equal_length=equal):
        assert batch.ids.numel() <= budget or len(index) == 1
        assert (batch.ids == 7).equal(batch.mask.bool())
        assert batch.mask[:, -1 if left else 0].all()
        assert batch.mask.sum(1).tolist() == [lengths[k] for k in index]
        assert not equal or batch.mask.all()
        seen += index
    assert sorted(seen) == list(range(len(rows)))


class TestAnswerLogprobs:
    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_equals_the_plain_forward(self, kind: str) -> None:
        model = tiny(kind)
        scores = answer_logprobs(model, PAIRS)
        for k, (prompt, answer) in enumerate(PAIRS):
            slow = plain(model, prompt, answer)
            assert scores.token_logprobs[k] == pytest.approx(slow, abs=2e-5)
            assert scores.sum_logprob[k] == pytest.approx(slow.sum(), abs=5e-5)
        assert scores.valid.all() and len(set(scores.sum_logprob.round(3))) == len(PAIRS)

    @given(st.permutations(range(5)), st.integers(1, 60))
    @settings(max_examples=15, deadline=None)
    def test_independent_of_order_and_batches(self, order: list[int], budget: int) -> None:
        whole = answer_logprobs(_LLAMA, PAIRS)
        parts = answer_logprobs(_LLAMA, [PAIRS[k] for k in order], token_budget=budget)
        assert parts.sum_logprob == pytest.approx(whole.sum_logprob[list(order)], abs=1e-5)
        assert (parts.n_tokens == whole.n_tokens[list(order)]).all()
        assert (parts.greedy_match == whole.greedy_match[list(order)]).all()

    def test_greedy_match_is_what_generation_says(self, model: LoadedModel) -> None:
        said = generate(model, ["Ada Berg was born in"], max_new_tokens=2)[0][0]
        pairs = [("Ada Berg was born in", " " + said), ("Ada Berg was born in", " Oslo Oslo")]
        assert answer_logprobs(model, pairs).greedy_match.tolist() == [True, said == "Oslo Oslo"]

    def test_too_long_is_nan_and_counted(self, model: LoadedModel) -> None:
        scores = answer_logprobs(model, [("the " * 80, " Oslo"), PAIRS[0]])
        assert (
            scores.n_invalid == 1 and np.isnan(scores.sum_logprob[0]) and np.isfinite(scores.sum_logprob[1])
        )

    def test_total_probability_of_all_tokens_is_one(self, model: LoadedModel) -> None:
        names = [w for w in model.tokenizer.get_vocab() if w in WORDS]
        mass = np.exp(answer_logprobs(model, [("the city of", " " + w) for w in names]).sum_logprob).sum()
        assert 0.5 < mass < 1.0  # the rest is on the special tokens

    def test_hooks_are_respected(self, model: LoadedModel) -> None:
        before = answer_logprobs(model, PAIRS).sum_logprob
        options = [[a] for _, a in PAIRS]
        layer = model.module.model.layers[0]
        handle = layer.register_forward_hook(
            lambda _m, _i, out: (out[0] if isinstance(out, tuple) else out) * 0.3
        )
        try:
            hooked = answer_logprobs(model, PAIRS).sum_logprob
            cached = np.concatenate(candidate_logprobs(model, [p for p, _ in PAIRS], options))
        finally:
            handle.remove()
        assert np.abs(hooked - before).min() > 1e-3
        assert cached == pytest.approx(hooked, abs=1e-5)

    def test_adapters_are_scored_as_they_stand(self) -> None:
        """A LoRA wrapper hides the model's signature; the fast path must not depend on it."""
        from peft import LoraConfig, get_peft_model

        module = get_peft_model(tiny("gpt2").module, LoraConfig(r=2, fan_in_fan_out=True)).eval()
        wrapped = LoadedModel("adapter", module, word_tokenizer(), "")
        with torch.no_grad():
            for name, parameter in wrapped.module.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.ones_like(parameter))
        slow = [plain(wrapped, prompt, answer).sum() for prompt, answer in PAIRS]
        assert answer_logprobs(wrapped, PAIRS).sum_logprob == pytest.approx(slow, abs=5e-5)
        assert np.abs(answer_logprobs(tiny("gpt2"), PAIRS).sum_logprob - slow).max() > 1e-3
        cached = candidate_logprobs(wrapped, [p for p, _ in PAIRS], [[a] for _, a in PAIRS])
        assert np.concatenate(cached) == pytest.approx(slow, abs=5e-5)

    def test_nan_is_an_error(self) -> None:
        broken = tiny("llama")
        broken.module.lm_head.weight.data.fill_(float("nan"))
        for call in (lambda: answer_logprobs(broken, PAIRS), lambda: generate(broken, ["Ada"]),
                     lambda: candidate_logprobs(broken, ["Ada"], [[" Berg"]])):  # fmt: skip
            with pytest.raises(NumericalError, match="float32"):
                call()


_LLAMA = tiny("llama")


class TestCandidates:
    OPTIONS = (
        " Oslo",
        " New York",
        " New Delhi",
        " New Delhi .",
        " Rome",
        " New York is red",
        " Oslo is",
        " New",
    )

    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_equals_the_plain_forward(self, kind: str) -> None:
        model = tiny(kind)
        prompts = [p for p, _ in PAIRS[:4]]
        found = candidate_logprobs(model, prompts, [self.OPTIONS] * 4)
        for prompt, row in zip(prompts, found, strict=True):
            assert row == pytest.approx([plain(model, prompt, c).sum() for c in self.OPTIONS], abs=5e-5)

    @given(
        st.lists(st.lists(texts.map(lambda t: " " + t), max_size=6), min_size=1, max_size=4),
        st.integers(1, 80),
    )
    @settings(max_examples=20, deadline=None)
    def test_equals_answer_logprobs(self, options: list[list[str]], budget: int) -> None:
        prompts = [PAIRS[k][0] for k in range(len(options))]
        found = candidate_logprobs(_LLAMA, prompts, options, token_budget=budget)
        for prompt, row, candidates in zip(prompts, found, options, strict=True):
            slow = answer_logprobs(_LLAMA, [(prompt, c) for c in candidates]).sum_logprob
            assert row == pytest.approx(slow, abs=2e-5)

    def test_boundary_that_depends_on_the_candidate(self) -> None:
        """'O' + 'slo' is one token in the joint text and two alone: the prefix differs between candidates."""
        model = tiny("llama", byte_tokenizer())
        options = ["slo", "ld man", "f"]
        found = candidate_logprobs(model, ["the city of O"], [options])[0]
        slow = answer_logprobs(model, [("the city of O", c) for c in options]).sum_logprob
        assert found == pytest.approx(slow, abs=2e-5)

    def test_too_long_is_nan(self, model: LoadedModel) -> None:
        found = candidate_logprobs(model, ["the " * 61], [[" Oslo", " New York is"]])[0]
        assert np.isfinite(found[0]) and np.isnan(found[1])

    def test_one_list_per_prompt(self, model: LoadedModel) -> None:
        with pytest.raises(UsageError, match="one list of candidates per prompt"):
            candidate_logprobs(model, ["a", "the"], [[" Oslo"]])


def test_remembered_encodings_follow_a_changed_tokenizer() -> None:
    tokenizer = word_tokenizer()
    before = encode(tokenizer, "the city", " was").ids
    assert encode(tokenizer, "the city", " was").ids == before
    word = "zzqx"
    old = encode(tokenizer, "the city", f" {word}").ids
    tokenizer.add_tokens([word])
    new = encode(tokenizer, "the city", f" {word}").ids
    assert new != old and new[-1] == len(tokenizer) - 1
