"""TransformerLens as a second opinion: scores of edges and exact faithfulness of circuits, where it has them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers

from repforget.causal import Run
from repforget.locate._circuit import faithfulness
from repforget.locate._edges import edge_attributions
from repforget.locate._graph import graph_of
from repforget.models.bridge import lens_source
from repforget.models.load import LoadedModel, wrap
from repforget.records import Component, Site

KINDS = {"q": "q_input", "k": "k_input", "v": "v_input", "mlp_in": "mlp_in", "logits": "logits",
         "embed": "embed", "attn_z": "attn_head_out", "mlp_out": "mlp_out"}  # fmt: skip


@cache
def model_of(name: str) -> LoadedModel:
    """Tiny models with as many key/value as query heads, for TransformerLens has no edges for grouped ones."""
    if name != "llama":
        return wrap(tiny_models.build(name), tiny_models.tiny_tokenizer(), name)
    config = transformers.LlamaConfig(**{**tiny_models.CONFIGS["llama"][1], "num_key_value_heads": 4})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.LlamaForCausalLM(config).eval()
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape)
            wide = noise * 0.7 / parameter.shape[-1] ** 0.5
            parameter.data = parameter + 0.2 * noise if parameter.ndim == 1 else wide
    return wrap(module, tiny_models.tiny_tokenizer(), name)


def pair() -> Run:
    base = tuple(tiny_models.sample_ids(1, 8, seed=3)[0])
    donor = (base[0], *tiny_models.sample_ids(1, 2, seed=4)[0], *base[3:])
    return Run("pair", "pair", base, donor, len(base) - 1, tuple(range(len(base) - 1)), (4 + base[-1] % 90,))


def scores_of(model: LoadedModel, run: Run) -> Any:
    return next(iter(edge_attributions(model, graph_of(model), [run], "logit_difference")))[1][0]


def lens_key(node: Any) -> tuple[str, int, int | None]:
    return node.kind, -1 if node.kind in ("embed", "logits") else node.layer, node.head


def our_key(component: Component) -> tuple[str, int, int | None]:
    site: Site = component.site
    return KINDS[site.kind], site.layer, site.head


def lens_arguments(run: Run) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(base ids, donor ids, metric): truth minus rival after the last prompt token, as ours for one-token answers."""
    base, donor = (torch.tensor([ids[:-1]]) for ids in (run.base, run.donor))
    return base, donor, lambda logits: logits[0, -1, run.base[-1]] - logits[0, -1, run.rival[0]]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_edge_scores_agree(name: str) -> None:
    from transformer_lens.tools.analysis import attribution_patching as lens

    model, run = model_of(name), pair()
    graph, ours = graph_of(model), scores_of(model, run)
    base, donor, metric = lens_arguments(run)
    config = lens.EdgeAttributionConfig(granularity="edge")
    theirs = lens.attribution_patch(lens_source(model).bridge, donor, base, metric, config)  # from base towards donor
    summed: dict[Any, float] = {}
    for (source, target), score in theirs.edge_scores.items():
        key = lens_key(source), lens_key(target)
        summed[key] = summed.get(key, 0.0) + score
    found = {(our_key(graph.senders[s]), our_key(graph.receivers[r])): float(ours[s, r])
             for s, r in zip(*np.nonzero(graph.exists), strict=True)}  # fmt: skip
    assert set(found) == set(summed) and max(map(abs, found.values())) > 0.01
    assert max(abs(found[key] - summed[key]) for key in found) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_exact_faithfulness_agrees(name: str) -> None:
    from transformer_lens.tools.analysis import attribution_patching as lens

    model, run = model_of(name), pair()
    graph = graph_of(model)
    base, donor, metric = lens_arguments(run)
    source = lens_source(model).bridge
    generator = np.random.default_rng(5)
    config = lens.EdgeAttributionConfig(granularity="edge")
    every = list(lens.attribution_patch(source, donor, base, metric, config).edge_scores)
    for share in (0.3, 0.6, 0.9):
        circuit = graph.exists & (generator.random(graph.exists.shape) < share)
        ours = faithfulness(model, graph, [run], [circuit], "logit_difference")[0]
        places = zip(*np.nonzero(circuit), strict=True)
        kept = {(our_key(graph.senders[s]), our_key(graph.receivers[r])) for s, r in places}
        theirs = lens.faithfulness(source, base, donor, metric, [e for e in every if tuple(map(lens_key, e)) in kept])
        assert ours == pytest.approx(theirs.recovered, abs=1e-4) and abs(ours - 1) > 1e-3
