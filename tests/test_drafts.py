"""Generation with drafts: the same texts as without, whatever the draft says, in fewer passes where it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_models import ARCHITECTURES, WORDS, byte_tokenizer, tiny

from repforget.artifact.attach import hook_operations
from repforget.artifact.operations import AddVector, Gate
from repforget.errors import NumericalError, UsageError
from repforget.models.load import LoadedModel
from repforget.records import Site
from repforget.scoring import generate, token_scores

PROMPTS = ("Ada Berg was born in", "the", "Q : is the city of Rome red ? A :", "Cora Dahl", "a", "Delhi is")
STEPS = 7


def wordy(kind: str) -> LoadedModel:
    """A tiny model that says words only: no special token, which would be missing from the text."""
    model = tiny(kind)
    with torch.no_grad():
        weight = model.module.get_output_embeddings().weight
        weight[[0, 1, 2, 3, -1]] = 0
    return model


_LLAMA = wordy("llama")


@contextmanager
def passes(model: LoadedModel) -> Iterator[list[tuple[int, ...]]]:
    """Shape [rows, columns] of every forward pass."""
    seen: list[tuple[int, ...]] = []
    handle = model.module.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def own(model: LoadedModel, prompts: tuple[str, ...] = PROMPTS, tokens: int = STEPS) -> list[str]:
    return [text for (text,) in generate(model, prompts, max_new_tokens=tokens, whole=True)]


def kinds(said: str) -> dict[str, str]:
    """Drafts of every kind where the model says ``said``."""
    words = said.split(" ")
    other = "Oslo" if words[0] != "Oslo" else "Rome"
    middle = words[: len(words) // 2]
    return {
        "right": f" {said}", "longer": f" {said} {said}", "shorter": " " + " ".join(middle), "empty": "", "space": " ",
        "wrong at first": " " + " ".join([other, *words[1:]]),
        "wrong in the middle": " ".join(["", *middle, other, other]),
        "line break": " " + " ".join([*middle, "\n", *middle]), "joined": said, "long": " the city of" * 40,
    }  # fmt: skip


def scored(model: LoadedModel, prompts: Sequence[str], drafts: Sequence[str]) -> list[list[bool]]:
    """Hits by teacher forcing with the end token; none for drafts without tokens or beyond the context."""
    rows = [row for row, draft in enumerate(drafts) if draft.strip()]
    found = token_scores(model, [(prompts[row], drafts[row]) for row in rows], eos=True).hits if rows else ()
    hits: list[list[bool]] = [[] for _ in drafts]
    for row, each in zip(rows, found, strict=True):
        hits[row] = each.tolist()
    return hits


@pytest.mark.parametrize("make", [tiny, wordy])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_same_texts_for_every_draft(kind: str, make: Callable[[str], LoadedModel]) -> None:
    model = make(kind)
    said = own(model)
    stop = sorted({text.split()[len(text.split()) // 2] for text in said if text})[:2]
    of = [kinds(text) for text in said]
    names = list(of[0])
    for options in ({"whole": True}, {"stop": stop}):
        plain = generate(model, PROMPTS, max_new_tokens=STEPS, **options)  # type: ignore[arg-type]
        for shift in range(0, len(names), 3):  # one batch holds drafts of many kinds
            drafts = [group[names[(row + shift) % len(names)]] for row, group in enumerate(of)]
            for hits in (None, scored(model, PROMPTS, drafts)):
                got = generate(model, PROMPTS, max_new_tokens=STEPS, drafts=drafts, hits=hits, **options)  # type: ignore[arg-type]
                assert got == plain


@given(
    st.lists(st.tuples(st.sampled_from(PROMPTS), st.lists(st.sampled_from([*WORDS, "\n"]), max_size=5),
                       st.integers(0, STEPS)), min_size=1, max_size=6),
    st.integers(1, STEPS), st.integers(1, 60), st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_drafts_that_leave_anywhere(
    rows: list[tuple[str, list[str], int]], most: int, budget: int, whole: bool
) -> None:
    prompts = tuple(prompt for prompt, _, _ in rows)
    drafts = [" ".join(["", *text.split(" ")[:kept], *tail])
              for text, (_, tail, kept) in zip(own(_LLAMA, prompts), rows, strict=True)]  # fmt: skip
    options = {"max_new_tokens": most, "whole": whole}
    plain = generate(_LLAMA, prompts, **options)  # type: ignore[arg-type]
    for hits in (None, scored(_LLAMA, prompts, drafts)):
        assert generate(_LLAMA, prompts, drafts=drafts, hits=hits, token_budget=budget, **options) == plain  # type: ignore[arg-type]


@pytest.mark.parametrize("tail", ["", "lo", " Oslo", "\n\nOslo", "é"])
def test_tokens_that_straddle_words(tail: str) -> None:
    model = tiny("llama", byte_tokenizer())
    prompts = ("Ada was born in", "the city of ", "Q : is Os")
    plain = generate(model, prompts, max_new_tokens=12, whole=True)
    drafts = [(text[: len(text) // 2] if k else text) + tail for k, (text,) in enumerate(plain)]
    for hits in (None, scored(model, prompts, drafts)):
        assert generate(model, prompts, max_new_tokens=12, whole=True, drafts=drafts, hits=hits) == plain


class TestCost:
    def test_right_drafts_take_one_pass(self) -> None:
        said = own(_LLAMA)
        with passes(_LLAMA) as seen:
            got = generate(_LLAMA, PROMPTS, max_new_tokens=STEPS, whole=True, drafts=[" " + text for text in said])
        assert [text for (text,) in got] == said and len(seen) == 1

    def test_only_rows_that_leave_their_draft_are_decoded(self) -> None:
        said = own(_LLAMA)
        drafts = [" " + text for text in said]
        drafts[3] = " " + " ".join([*said[3].split(" ")[:4], "Oslo", "Oslo"])
        assert not said[3].startswith(drafts[3].strip())
        with passes(_LLAMA) as seen:
            got = generate(_LLAMA, PROMPTS, max_new_tokens=STEPS, whole=True, drafts=drafts)
        assert [text for (text,) in got] == said
        # Four agreed tokens and the first other one are known, so that two passes say what is left.
        assert len(seen) == 3 and {rows for rows, _ in seen[1:]} == {1}

    def test_an_end_that_the_draft_does_not_say(self) -> None:
        """The pass tells the token after the draft too, so that a text which ends there takes no step."""
        model, words = tiny("llama"), ("Oslo", "is", "red")
        script = torch.tensor([*(model.tokenizer.get_vocab()[w] for w in words), *[2] * 60])

        def say(_m: object, _a: object, kwargs: dict[str, torch.Tensor], out: object) -> None:
            keep = kwargs["logits_to_keep"]
            positions = kwargs["position_ids"]
            chosen = positions[:, -keep:] if isinstance(keep, int) else positions[:, keep]
            out.logits = torch.nn.functional.one_hot(script[(chosen - 1).clamp(min=0)], 40) * 9.0  # type: ignore[attr-defined]

        handle = model.module.register_forward_hook(say, with_kwargs=True)
        with passes(model) as seen:
            assert generate(model, ["Ada"], max_new_tokens=9, drafts=[" Oslo is red"]) == [["Oslo is red"]]
            assert len(seen) == 1
            assert generate(model, ["Ada"], max_new_tokens=9, drafts=[" Oslo is red red"]) == [["Oslo is red"]]
            assert len(seen) == 2
            assert generate(model, ["Ada"], max_new_tokens=2, drafts=[" Oslo is red"]) == [["Oslo is"]]
            assert len(seen) == 3
            # Teacher forcing told all of this already.
            hits = scored(model, ["Ada"], [" Oslo is red"])
            del seen[:]
            assert generate(model, ["Ada"], max_new_tokens=9, drafts=[" Oslo is red"], hits=hits) == [["Oslo is red"]]
            assert hits == [[True] * 4] and not seen
            hits = scored(model, ["Ada"], [" Oslo is blue"])
            del seen[:]
            assert generate(model, ["Ada"], max_new_tokens=9, drafts=[" Oslo is blue"], hits=hits) == [["Oslo is red"]]
            assert len(seen) == 2 and seen[0] == (1, 4)
        handle.remove()

    @pytest.mark.parametrize("kind", ["bloom", "mpt", "mamba"])
    def test_models_without_positions_do_without(self, kind: str) -> None:
        model = wordy(kind)
        with passes(model) as plain:
            said = own(model)
        with passes(model) as drafted:
            generate(model, PROMPTS, max_new_tokens=STEPS, whole=True, drafts=[" " + text for text in said])
        assert plain == drafted


class TestEdits:
    @pytest.mark.parametrize("positions", ["all", "prompt", "last", "generated"])
    @pytest.mark.parametrize("scope", [None, "prefix", "token"])
    def test_placed_and_gated(self, positions: str, scope: str | None) -> None:
        model, random = wordy("llama"), torch.Generator().manual_seed(1)
        gate = Gate(torch.randn(32, generator=random), threshold=3.0, scope=scope) if scope else None  # type: ignore[arg-type]
        edit = AddVector(Site("resid_post", 0), torch.randn(32, generator=random), 4.0, gate, positions=positions)  # type: ignore[arg-type]
        before = own(model)
        with ExitStack() as stack:
            hook_operations(model.module, [edit], stack)
            said = own(model)
            of = [kinds(text) for text in said]
            for name in ("right", "wrong in the middle", "shorter"):
                drafts = [group[name] for group in of]
                for hits in (None, scored(model, PROMPTS, drafts)):
                    got = generate(model, PROMPTS, max_new_tokens=STEPS, whole=True, drafts=drafts, hits=hits)
                    assert [text for (text,) in got] == said
        assert said != before

    def test_not_a_number(self) -> None:
        model = tiny("llama")
        with torch.no_grad():
            model.module.lm_head.weight[5] = torch.nan
        with pytest.raises(NumericalError, match="NaN"):
            generate(model, ["Ada"], drafts=[" Oslo is"])


def test_refusals() -> None:
    with pytest.raises(UsageError, match="drafts"):
        generate(_LLAMA, ["Ada"], drafts=[" Oslo"], temperature=1.0)
    with pytest.raises(UsageError, match="one per prompt"):
        generate(_LLAMA, ["Ada"], drafts=[])
    with pytest.raises(UsageError, match="hits"):
        generate(_LLAMA, ["Ada"], hits=[[True]])
    assert generate(_LLAMA, [], drafts=[]) == []
