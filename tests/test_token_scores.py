"""One shared pass per sequence: equal to separate passes, as cheap as it says, and exact in its moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_models import ARCHITECTURES, WORDS, tiny

from repforget.artifact.attach import hook_operations
from repforget.artifact.operations import AddVector, Gate
from repforget.errors import NumericalError, UsageError
from repforget.models.load import LoadedModel, wrap
from repforget.records import Site
from repforget.scoring import (
    answer_logprobs,
    candidate_logprobs,
    encode,
    generate,
    metrics,
    token_scores,
)  # fmt: skip
from repforget.scoring import forward as forward_module
from repforget.scoring.forward import read_logits

PROMPTS = ("Ada Berg was born in", "the city of", "Q : is the city of New York red ? A :")
ANSWERS = (" Oslo", " Oslo is red", " New York is the city of Rome .", " a", " New York", " Oslo is")
PAIRS = [(p, a) for p in PROMPTS for a in ANSWERS] + [("Cora", " Dahl was born"), (PROMPTS[0], ANSWERS[1])]
_LLAMA = tiny("llama")
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(lambda words: " " + " ".join(words))


def slow(model: LoadedModel, prompt: str, answer: str, eos: bool = False) -> np.ndarray:
    """Log-probability, arg max, mean and variance of log p per answer token, one sequence in fp64."""
    e = encode(model.tokenizer, prompt, answer, eos=eos)
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0].double()
    table = logits.log_softmax(-1).numpy()[e.start - 1 : -1]
    p = np.exp(table)
    mu = (p * table).sum(1)
    return np.stack([table[np.arange(len(table)), e.answer], table.argmax(1) == np.array(e.answer), mu,
                     (p * table**2).sum(1) - mu**2])  # fmt: skip


@contextmanager
def counted(model: LoadedModel) -> Iterator[list[int]]:
    """Collect the number of tokens of every forward pass."""
    seen: list[int] = []

    def note(_m: object, _a: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["input_ids"].numel())

    handle = model.module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_one_sequence_at_a_time(kind: str) -> None:
    model = tiny(kind)
    scores = token_scores(model, PAIRS, moments=True)
    assert scores.mu is not None and scores.sigma2 is not None
    for k, pair in enumerate(PAIRS):
        exact = slow(model, *pair)
        found = np.stack([scores.logprobs[k], scores.hits[k], scores.mu[k], scores.sigma2[k]])
        assert found == pytest.approx(exact, abs=2e-5)
        assert scores.mean_logprob[k] == pytest.approx(exact[0].mean(), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_sharing_changes_nothing(kind: str) -> None:
    """In fp64, where rounding cannot hide a difference (eager attention has its softmax in fp32)."""
    model = tiny(kind)
    model.module.double().set_attn_implementation("sdpa")
    together = token_scores(model, PAIRS, moments=True, eos=True)
    for k, pair in enumerate(PAIRS):
        alone = token_scores(model, [pair], moments=True, eos=True)
        for ours, theirs in ((together.logprobs, alone.logprobs), (together.mu, alone.mu),
                             (together.sigma2, alone.sigma2)):  # fmt: skip
            assert ours is not None and theirs is not None
            assert ours[k] == pytest.approx(theirs[0], abs=1e-9)
        assert (together.hits[k] == alone.hits[0]).all()


@given(st.lists(st.tuples(st.sampled_from(PROMPTS), texts), max_size=12), st.integers(1, 120), st.booleans())
@settings(max_examples=25, deadline=None)
def test_independent_of_order_batches_and_company(pairs: list[tuple[str, str]], budget: int, eos: bool) -> None:
    together = token_scores(_LLAMA, pairs, token_budget=budget, eos=eos)
    alone = answer_logprobs(_LLAMA, pairs, eos=eos)
    assert together.sum_logprob == pytest.approx(alone.sum_logprob, abs=2e-5)
    assert (together.n_tokens == alone.n_tokens).all() and together.eos == eos
    assert [bool(h.all()) for h in together.hits] == alone.greedy_match.tolist()


def test_eos_is_the_last_token() -> None:
    without, with_eos = token_scores(_LLAMA, PAIRS), token_scores(_LLAMA, PAIRS, eos=True)
    for k, pair in enumerate(PAIRS):
        assert with_eos.logprobs[k][:-1] == pytest.approx(without.logprobs[k], abs=1e-5)
        assert with_eos.logprobs[k][-1] == pytest.approx(slow(_LLAMA, *pair, eos=True)[0, -1], abs=1e-5)


def test_one_pass_feeds_every_metric() -> None:
    """Distinct prompts once, maximal continuations once; min-k++ costs no second pass, nor do repeated pairs."""
    with counted(_LLAMA) as seen:
        token_scores(_LLAMA, PAIRS * 3, moments=True)
    prompts = [len(encode(_LLAMA.tokenizer, p, " a").ids) - 1 for p in PROMPTS]
    # Five, two and no tokens are read after the first: of 'New York is the city of Rome .' and 'Oslo is red'.
    tails = [7, 2]
    alone = len(encode(_LLAMA.tokenizer, "Cora", " Dahl was born").ids) - 1
    assert sum(seen) == len(prompts) * max(prompts) + 3 * 2 * max(tails) + alone
    assert all(p.grad is None and p.requires_grad for p in _LLAMA.module.parameters())
    with counted(_LLAMA) as apart:
        for pair in set(PAIRS):
            token_scores(_LLAMA, [pair], moments=True)
    assert sum(apart) > 2 * sum(seen)


def test_too_long_is_invalid_and_counted() -> None:
    pairs = [("the " * 60, " Oslo"), ("the " * 60, " Oslo is red and so"), PAIRS[0]]
    scores = token_scores(_LLAMA, pairs, moments=True)
    assert scores.valid.tolist() == [True, False, True] and scores.n_invalid == 1
    assert scores.n_tokens.tolist() == [1, 0, 1]
    assert np.isnan(scores.sum_logprob).tolist() == np.isnan(scores.mean_logprob).tolist() == [False, True, False]
    for values in (metrics.min_k(scores.logprobs), metrics.exact_memorization(scores.hits)):
        assert np.isnan(values).tolist() == [False, True, False]
    empty = token_scores(_LLAMA, [])
    assert empty.sum_logprob.shape == empty.valid.shape == (0,)


def test_extraction_strength_is_what_greedy_decoding_extracts() -> None:
    """The brute-force definition: the shortest beginning of the answer after which decoding says the rest."""
    begun = [f"{PROMPTS[0]} {word}" for word in WORDS]
    said = generate(_LLAMA, begun, max_new_tokens=3)
    answers = [f" {word} {text}" for word, (text,) in zip(WORDS, said, strict=True)]
    strengths = metrics.extraction_strength(token_scores(_LLAMA, [(PROMPTS[0], a) for a in answers]).hits)
    for answer, strength in zip(answers, strengths, strict=True):
        words = answer.split()
        given = next(k for k in range(len(words) + 1) if k == len(words) or generate(
            _LLAMA, [" ".join([PROMPTS[0], *words[:k]])], max_new_tokens=len(words) - k)[0][0].split() == words[k:])
        assert strength == pytest.approx(1 - given / len(words))
    assert {0, 1} < set(strengths) and ((strengths > 0) & (strengths < 1)).sum() > 3


def test_moments_of_marked_pairs_only() -> None:
    marks = [k % 3 == 0 for k in range(len(PAIRS))]
    some, every = token_scores(_LLAMA, PAIRS, moments=marks), token_scores(_LLAMA, PAIRS, moments=True)
    assert token_scores(_LLAMA, PAIRS).mu is None and some.mu is not None and every.mu is not None
    again = {PAIRS[k] for k, marked in enumerate(marks) if marked}
    for pair, ours, theirs in zip(PAIRS, some.mu, every.mu, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6) if pair in again else np.isnan(ours).all()
    with pytest.raises(UsageError, match="one per pair"):
        token_scores(_LLAMA, PAIRS, moments=[True])


class TestReading:
    def test_slices_read_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = token_scores(_LLAMA, PAIRS, moments=True)
        monkeypatch.setattr(forward_module, "READ_ELEMENTS", 100)
        sliced = token_scores(_LLAMA, PAIRS, moments=True)
        for ours, theirs in zip(whole.sigma2 or (), sliced.sigma2 or (), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)

    def test_zero_probabilities_count_nothing(self) -> None:
        logits = torch.tensor([[[0.0, 0.0, -torch.inf, -1e4]]])
        at = torch.tensor([0])
        logprob, hit, mu, sigma2 = read_logits(logits, at, at, torch.tensor([1]), moments=True)[:, 0]
        assert (logprob, mu, sigma2) == pytest.approx((-np.log(2), -np.log(2), 0), abs=1e-6) and hit == 0
        impossible = read_logits(logits, at, at, torch.tensor([2]))
        assert impossible[0, 0] == -np.inf

    @given(st.integers(0, 2**31), st.floats(0.1, 30))
    @settings(max_examples=30, deadline=None)
    def test_moments(self, seed: int, scale: float) -> None:
        logits = scale * torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(seed))
        rows, columns = torch.tensor([0, 2, 1]), torch.tensor([1, 1, 0])
        found = read_logits(logits, rows, columns, torch.tensor([4, 5, 6]), moments=True)
        logp = logits.double().log_softmax(-1)[rows, columns].numpy()
        p = np.exp(logp)
        mu = (p * logp).sum(1)
        assert found[2] == pytest.approx(mu, abs=1e-4)
        assert found[3] == pytest.approx((p * (logp - mu[:, None]) ** 2).sum(1), rel=1e-4, abs=1e-4)

    def test_nan_is_an_error(self) -> None:
        broken = tiny("llama")
        broken.module.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(NumericalError, match="float32"):
            token_scores(broken, PAIRS, moments=True)

    def test_bfloat16(self) -> None:
        half = wrap(tiny("llama").module.to(torch.bfloat16), _LLAMA.tokenizer)
        ours, exact = token_scores(half, PAIRS, moments=True), token_scores(_LLAMA, PAIRS, moments=True)
        assert ours.sigma2 is not None
        assert ours.logprobs[0].dtype == ours.sigma2[0].dtype == np.float64
        assert np.abs(ours.mean_logprob - exact.mean_logprob).max() < 0.2
        z = metrics.min_k_plus_plus(ours.logprobs, ours.mu or (), ours.sigma2)
        assert np.isfinite(z).all()


@pytest.mark.parametrize("where", ["all", "prompt", "last", "generated"])
def test_edits_that_mind_the_prompt(where: str) -> None:
    """They must act as in generation, where the prompt is one pass and each token of the answer another."""
    edit = AddVector(Site("resid_post", 0), torch.randn(32, generator=torch.Generator().manual_seed(0)), 3.0,
                     positions=where)  # type: ignore[arg-type]  # fmt: skip
    exact = []
    with ExitStack() as stack:
        hook_operations(_LLAMA.module, [edit], stack)
        for pair in PAIRS:
            e = encode(_LLAMA.tokenizer, *pair)
            with torch.no_grad():
                first = _LLAMA.module(input_ids=torch.tensor([e.ids[: e.start]]), use_cache=True)
                rows, past = [first.logits[0, -1:]], first.past_key_values
                for token in e.answer[:-1]:
                    step = _LLAMA.module(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
                    rows, past = [*rows, step.logits[0]], step.past_key_values
            exact.append(torch.cat(rows).log_softmax(-1)[range(len(e.answer)), list(e.answer)].sum().item())
        for scores in (token_scores(_LLAMA, PAIRS), answer_logprobs(_LLAMA, PAIRS)):
            assert scores.sum_logprob == pytest.approx(exact, abs=5e-5)
    assert np.abs(answer_logprobs(_LLAMA, PAIRS).sum_logprob - exact).max() > 1e-2


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_every_proven_architecture(name: str) -> None:
    model = wrap(tiny_models.build(name), tiny_models.tiny_tokenizer())
    words = tiny_models.WORDS
    pairs = [(" ".join(words[k : k + k % 4 + 2]), " " + " ".join(words[k + j : k + 2 * j + 1]))
             for k in range(6) for j in range(1, 5)]  # fmt: skip
    scores = token_scores(model, pairs)
    for k, pair in enumerate(pairs):
        assert scores.logprobs[k] == pytest.approx(slow(model, *pair)[0], abs=5e-5)


class TestGatedEdits:
    """A gate that stays open must stay with its row when a cache's rows are chosen, repeated or dropped."""

    @pytest.fixture()
    def gated(self) -> Iterator[LoadedModel]:
        random = torch.Generator().manual_seed(0)
        gate = Gate(torch.randn(32, generator=random), threshold=4.0, scope="prefix")
        edit = AddVector(Site("resid_post", 0), torch.randn(32, generator=random), 3.0, gate)
        with ExitStack() as stack:
            hook_operations(_LLAMA.module, [edit], stack)
            yield _LLAMA

    def test_sharing(self, gated: LoadedModel) -> None:
        untouched = [slow(tiny("llama"), *pair)[0].sum() for pair in PAIRS]
        exact = [slow(gated, *pair)[0].sum() for pair in PAIRS]
        moved = np.abs(np.subtract(exact, untouched)) > 1e-3
        assert moved.any() and not moved.all()  # open in some rows only
        assert token_scores(gated, PAIRS).sum_logprob == pytest.approx(exact, abs=5e-5)
        options = candidate_logprobs(gated, PROMPTS, [ANSWERS] * 3)
        assert np.concatenate(options) == pytest.approx(exact[: len(PROMPTS) * len(ANSWERS)], abs=5e-5)

    def test_dropped_rows(self, gated: LoadedModel) -> None:
        asked = [f"{a} {b}" for a in ("Ada", "the", "Q : is", "Cora Dahl") for b in WORDS[:12]]
        free = generate(gated, asked, max_new_tokens=12)
        stop = [words[3] for (text,) in free if len(words := text.split()) > 3][:4]
        together = generate(gated, asked, max_new_tokens=12, stop=stop)
        assert together == [generate(gated, [p], max_new_tokens=12, stop=stop)[0] for p in asked]
        assert together != free != generate(tiny("llama"), asked, max_new_tokens=12)
