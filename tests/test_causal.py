"""The exact patch: endpoints, independence of batching, and an oracle with bare PyTorch hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repforget.causal import Run, patch_effects, patch_scores, prompt_run
from repforget.errors import KnowledgeError, UsageError
from repforget.models.load import wrap
from repforget.records import Component, Site
from repforget.scoring import answer_logprobs

CLEAN = "where was Ada born ?"
CORRUPT = "where was Tom born ?"


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, Any]:
    tokenizer = tiny_models.tiny_tokenizer()
    names = ("llama", "gpt2", "gemma2", "falcon", "opt")
    return {name: wrap(tiny_models.build(name), tokenizer, name) for name in names}


def runs_for(model: Any, positions: str = "all") -> list[Run]:
    texts = [(CLEAN, CORRUPT, " Berlin", "Ada"), ("the job of Eva is", "the job of Max is", " baker Rome", "Eva"),
             ("Lea lives in", "Ben lives in", " Oslo", "Lea")]  # fmt: skip
    return [prompt_run(model.tokenizer, f"i{k}", f"c{k}", clean, answer, donor_prompt=corrupt, subject=subject,
                       positions=positions, rival=" Paris")
            for k, (clean, corrupt, answer, subject) in enumerate(texts)]  # fmt: skip


def whole(kind: str, layer: int) -> tuple[Component]:
    return (Component(Site(kind, layer)),)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon", "opt"])
def test_endpoints(models: dict[str, Any], name: str) -> None:
    model = models[name]
    runs = runs_for(model)
    last = whole("resid_post", tiny_models.LAYERS - 1)
    effects = patch_effects(model, runs, [last, (), whole("mlp_out", 0)])
    assert np.abs(effects.gap).min() > 1e-3  # there is something to move
    np.testing.assert_allclose(effects.patched[0], effects.donor, atol=1e-5)
    np.testing.assert_allclose(effects.shares()[0], 1.0, atol=1e-4)
    assert np.abs(effects.moved[1]).max() < 1e-5  # alone and in a wider batch: rounding only
    assert np.abs(effects.moved[2]).max() > 1e-3
    same = [Run(r.id, r.cluster, r.base, r.base, r.start, r.positions) for r in runs]
    assert np.abs(patch_scores(model, same, [last])[0] - effects.base).max() < 1e-5


def test_unpatched_scores_are_those_of_scoring(models: dict[str, Any]) -> None:
    model = models["llama"]
    effects = patch_effects(model, runs_for(model), [()])
    pairs = [(CLEAN, " Berlin"), ("the job of Eva is", " baker Rome"), ("Lea lives in", " Oslo")]
    np.testing.assert_allclose(effects.base, answer_logprobs(model, pairs).sum_logprob, atol=1e-5)
    corrupt = [(CORRUPT, " Berlin"), ("the job of Max is", " baker Rome"), ("Ben lives in", " Oslo")]
    np.testing.assert_allclose(effects.donor, answer_logprobs(model, corrupt).sum_logprob, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "subject", "last", "answer"])
def test_equals_bare_hooks(models: dict[str, Any], positions: str) -> None:
    model = models["llama"]
    scores = patch_scores(model, runs_for(model, positions), [whole("mlp_out", 1)])[0]
    for k, run in enumerate(runs_for(model, positions)):
        kept: list[torch.Tensor] = []
        mlp = model.module.model.layers[1].mlp
        handle = mlp.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out.clone()))
        with torch.no_grad():
            model.module(torch.tensor([run.donor]))
        handle.remove()

        def put(m: Any, a: Any, out: torch.Tensor, kept: Any = kept, run: Run = run) -> torch.Tensor:
            out = out.clone()
            out[0, list(run.positions)] = kept[0][0, list(run.positions)]
            return out

        handle = mlp.register_forward_hook(put)
        with torch.no_grad():
            logp = model.module(torch.tensor([run.base])).logits[0].double().log_softmax(-1)
        handle.remove()
        expected = sum(float(logp[i - 1, run.base[i]]) for i in range(run.start, len(run.base)))
        assert abs(scores[k] - expected) < 1e-5


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budget=st.integers(1, 400), order=st.permutations(range(3)))
def test_batching_does_not_matter(models: dict[str, Any], budget: int, order: list[int]) -> None:
    model = models["gpt2"]
    runs = runs_for(model)
    patches = [whole("attn_out", 0), whole("mlp_out", 1), (*whole("attn_out", 1), *whole("mlp_out", 0)), ()]
    reference = patch_scores(model, runs, patches)
    found = patch_scores(model, [runs[k] for k in order], patches, token_budget=budget)
    np.testing.assert_allclose(found, reference[:, order], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_parts_make_the_whole(models: dict[str, Any], name: str) -> None:
    model = models[name]
    runs = runs_for(model)
    heads = [Component(Site("attn_z", 1, h)) for h in range(tiny_models.HEADS)]
    neurons = [Component(Site("mlp_post", 0), n) for n in range(model.module.config.to_dict().get("intermediate_size")
                                                                or 4 * tiny_models.WIDTH)]  # fmt: skip
    patches = [heads, whole("attn_z", 1), neurons, whole("mlp_post", 0), whole("mlp_out", 0), heads[:1]]
    scores = patch_scores(model, runs, patches)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    np.testing.assert_allclose(scores[2], scores[3], atol=1e-6)
    np.testing.assert_allclose(scores[3], scores[4], atol=1e-5)
    assert np.abs(scores[5] - scores[0]).max() > 1e-4


def test_another_model_as_donor(models: dict[str, Any]) -> None:
    model = models["llama"]
    module = tiny_models.build("llama")
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
    twin = wrap(module, model.tokenizer, "twin")
    runs = [prompt_run(model.tokenizer, "i", "c", CLEAN, " Berlin")]
    patches = [whole("mlp_out", 0), whole("resid_post", 0), whole("mlp_out", 1), whole("resid_post", 1)]
    effects = patch_effects(model, runs, patches, donor=twin)
    assert abs(effects.gap[0]) > 1e-3
    assert np.abs(effects.moved[:2]).max() < 1e-6  # nothing differs before the changed layer
    np.testing.assert_allclose(effects.shares()[2:], 1.0, atol=1e-4)
    with pytest.raises(UsageError, match="same architecture"):
        patch_scores(model, runs, patches, donor=models["gpt2"])


def test_logit_difference(models: dict[str, Any]) -> None:
    model = models["llama"]
    runs = runs_for(model)[:1]
    value = patch_scores(model, runs, [()], metric="logit_difference")[0, 0]
    with torch.no_grad():
        logits = model.module(torch.tensor([runs[0].base[:-1]])).logits[0, -1]
    truth, rival = (model.tokenizer.convert_tokens_to_ids(w) for w in ("Berlin", "Paris"))
    assert abs(value - float(logits[truth] - logits[rival])) < 1e-5
    plain = prompt_run(model.tokenizer, "i", "c", CLEAN, " Berlin")
    with pytest.raises(KnowledgeError, match="rival answer"):
        patch_scores(model, [plain], [()], metric="logit_difference")


def test_subject_positions(models: dict[str, Any]) -> None:
    run = prompt_run(models["llama"].tokenizer, "i", "c", CLEAN, " Berlin", subject="Ada", positions="subject")
    assert [models["llama"].tokenizer.convert_ids_to_tokens(run.base[p]) for p in run.positions] == ["Ada"]


def test_positions_end_where_the_last_answer_token_is_predicted(models: dict[str, Any]) -> None:
    tokenizer = models["llama"].tokenizer
    told = {"last": ["?"], "answer": ["?", "baker"], "all": ["<bos>", *CLEAN.split(), "baker"]}
    for positions, words in told.items():
        run = prompt_run(tokenizer, "i", "c", CLEAN, " baker Rome", positions=positions)  # type: ignore[arg-type]
        assert [tokenizer.convert_ids_to_tokens(run.base[p]) for p in run.positions] == words


def test_refusals(models: dict[str, Any]) -> None:
    tokenizer = models["llama"].tokenizer
    with pytest.raises(KnowledgeError, match="equal token length"):
        prompt_run(tokenizer, "i", "c", CLEAN, " Berlin", donor_prompt="where was Tom Tom born ?")
    with pytest.raises(KnowledgeError, match="subject 'Zoe' of item 'i' does not occur"):
        prompt_run(tokenizer, "i", "c", CLEAN, " Berlin", subject="Zoe", positions="subject")
    with pytest.raises(KnowledgeError, match="equal token length"):
        Run("i", "c", (1, 2, 3), (1, 2), 1, (0,))
    same = prompt_run(tokenizer, "i", "c", CLEAN, " Berlin")
    with pytest.raises(UsageError, match="mean gap 0"):
        patch_effects(models["llama"], [same], [whole("mlp_out", 0)]).shares()
