"""Edges and circuits: exact identities on every architecture, brute force, and models whose truth is known."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import test_locate_planted as planted_truth
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import repforget as rf
from repforget.causal import Run, answer_metric, patch_effects, prepare
from repforget.errors import SiteError, UsageError
from repforget.locate._circuit import faithfulness, patch_edges
from repforget.locate._edge_locator import Plan, ladder, measure_edges, score_edges
from repforget.locate._edges import _slopes, edge_attributions, receiver_gradients
from repforget.locate._exact import Task
from repforget.locate._graph import Graph, circuit, component_scores, edge_order, graph_of, pruned, shuffled
from repforget.locate._tasks import corrupted_tasks
from repforget.locate.attribution_patching import node_attributions
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel, wrap
from repforget.models.norms import secant
from repforget.models.sites import site_map
from repforget.records import Component, Localization, Site

Array = NDArray[np.float64]
POST_NORM = ("gemma2", "gemma3", "olmo2")
SMALL: dict[str, Any] = {"items": 6, "partners": 1, "draws": 20, "recheck": 3}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return wrap(tiny_models.build(name).to(dtype), tiny_models.tiny_tokenizer(), name)


def runs(lengths: tuple[int, ...] = (9, 6, 11), seed: int = 0, positions: range | None = None) -> list[Run]:
    """Prompts of different lengths that differ from their donors in two tokens, with an answer of two."""
    generator = np.random.default_rng(seed)
    found = []
    for index, length in enumerate(lengths):
        base = generator.integers(4, tiny_models.VOCAB, length)
        donor = base.copy()
        donor[1:3] = (base[1:3] - 4 + generator.integers(1, tiny_models.VOCAB - 5, 2)) % (tiny_models.VOCAB - 4) + 4
        ids = [tuple(int(i) for i in row) for row in (base, donor)]
        rival = (4 + (ids[0][-2] - 3) % (tiny_models.VOCAB - 4), 5)
        found.append(Run(str(index), str(index), *ids, length - 2, tuple(positions or range(length - 1)), rival))
    return found


def scored(model: LoadedModel, items: list[Run], **given: Any) -> Array:
    graph = graph_of(model)
    result = np.zeros((len(items), len(graph.senders), len(graph.receivers)))
    for rows, found in edge_attributions(model, graph, items, **given):
        result[list(rows)] = found
    return result


def out_of(graph: Graph) -> list[NDArray[np.bool_]]:
    """One patch per sender: all of its edges."""
    patches = []
    for sender in range(len(graph.senders)):
        patch = np.zeros(graph.exists.shape, dtype=bool)
        patch[sender] = graph.exists[sender]
        patches.append(patch)
    return patches


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_no_edge_is_the_base_all_edges_are_the_donor_and_all_edges_of_a_sender_are_its_patch(name: str) -> None:
    """On prompts of unequal lengths, left-padded; several heads under one norm share its scale, so there not."""
    model = model_of(name)
    graph, items = graph_of(model), runs()
    expected = patch_effects(model, items, [(c,) for c in graph.senders])
    found = patch_edges(model, graph, items, [np.zeros_like(graph.exists), graph.exists, *out_of(graph)])
    scale = float(np.abs(expected.gap).max())
    np.testing.assert_allclose(found[0], expected.base, atol=1e-5 * scale)
    np.testing.assert_allclose(found[1], expected.donor, atol=1e-5 * scale)
    same = [k for k, c in enumerate(graph.senders) if name not in POST_NORM or c.site.kind != "attn_z"]
    np.testing.assert_allclose(found[2:][same], expected.patched[same], atol=3e-5 * scale)
    shares = faithfulness(model, graph, items, [graph.exists, np.zeros_like(graph.exists)])
    np.testing.assert_allclose(shares, [1.0, 0.0], atol=1e-4)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_edges_of_a_sender_add_up_to_the_attribution_of_its_node(name: str) -> None:
    model = model_of(name)
    graph, items = graph_of(model), runs()
    found = scored(model, items)
    nodes = node_attributions(model, items, graph.senders)
    same = [k for k, c in enumerate(graph.senders) if name not in POST_NORM or c.site.kind != "attn_z"]
    np.testing.assert_allclose(found.sum(2).T[same], nodes[same], atol=2e-5 * np.abs(nodes).max())
    last = Component(Site("resid_post", graph.n_layers - 1))
    np.testing.assert_allclose(found[:, :, -1].sum(1), node_attributions(model, items, [last])[0],
                               atol=2e-5 * np.abs(nodes).max())  # fmt: skip
    assert not found[:, ~graph.exists].any() and np.abs(found[:, graph.exists]).min(axis=0).max() > 0


@pytest.mark.parametrize("name", [n for n in tiny_models.ALL if n != "mixtral"])
def test_integrated_edges_out_of_the_embedding_add_up_to_the_gap(name: str) -> None:
    """Not where tokens are routed to experts: the metric then jumps along the line."""
    model, items = model_of(name), runs((8, 6))
    gap = patch_effects(model, items, []).gap
    np.testing.assert_allclose(scored(model, items, steps=25)[:, 0].sum(1), gap, rtol=0.05, atol=0.05)


def test_the_midpoint_rule_needs_fewer_steps_than_the_plain_gradient() -> None:
    model, items = model_of("llama"), runs()
    gap = patch_effects(model, items, []).gap
    errors = [np.abs(scored(model, items, steps=n)[:, 0].sum(1) - gap).mean() for n in (1, 4, 16)]
    assert errors[2] < 0.2 * errors[0] and errors[2] < errors[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "phi", "falcon_new", "opt"])
def test_edges_into_one_norm_add_up_to_the_slope_at_its_input(name: str) -> None:
    """A norm in front of attention or MLP is read by those receivers alone, so its input's gradient is theirs."""
    model, items = model_of(name), runs()
    graph, found = graph_of(model), scored(model, items)
    shared: dict[Any, list[int]] = {}
    states: dict[Any, Site] = {}
    for layer, paths in enumerate(site_map(model).anatomy.layers):
        attention = list(range(graph.attention(layer).start, graph.attention(layer).stop))
        pre = Site("resid_pre", layer)
        for norm, receivers, state in (
            (paths.attention_norm, attention, pre),
            (paths.mlp_norm or (graph.parallel and paths.attention_norm), [graph.mlp(layer)],
             pre if graph.parallel else Site("resid_mid", layer)),
        ):  # fmt: skip
            if norm:
                shared.setdefault(norm, []).extend(receivers)
                states[norm] = state
    assert shared or name == "olmo2"
    for path, receivers in shared.items():
        slopes = _slope_at(model, path, items)
        for run, slope in zip(items, slopes, strict=True):
            item, state = next(iter(prepare(model, [run]))), states[path]
            change = [capture(model, [state], side, "all")[state] for side in (item.donor, item.base)]
            expected = float(((change[0] - change[1]) * slope).sum())
            assert found[items.index(run), :, receivers].sum() == pytest.approx(expected, abs=1e-4)


def _slope_at(model: LoadedModel, path: str, items: list[Run]) -> list[Tensor]:
    leaves: list[Tensor] = []

    def visit(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves.append(torch.zeros_like(args[0], requires_grad=True))
        return (args[0] + leaves[-1].reshape(args[0].shape), *args[1:])

    slopes = []
    handle = model.module.get_submodule(path).register_forward_pre_hook(visit)
    for run in items:
        item = next(iter(prepare(model, [run])))
        with torch.enable_grad():
            total = answer_metric(model, item.base, item, "logprob").sum()
            slopes.append(torch.autograd.grad(total, leaves[-1])[0].reshape(1, *item.base.ids.shape[1:], -1))
    handle.remove()
    return slopes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3", "olmo2", "phi3", "falcon"])
def test_the_slope_of_one_head_is_the_metric_moved_by_what_it_alone_reads(name: str) -> None:
    """Brute force: only one head's query, key or value is computed from a nudged stream (some norms round to
    float32 within)."""
    model = model_of(name, torch.float64)
    graph, item = graph_of(model), next(iter(prepare(model, runs((7,)))))
    state, slopes = _slopes(model, graph, item, "logprob", torch.zeros(()))
    generator = torch.Generator().manual_seed(1)
    for layer in range(graph.n_layers):
        gradients = receiver_gradients(model, graph, layer, state, slopes, slice(None))
        stream = state[Site("resid_pre", layer)]
        nudge = torch.randn(stream.shape, generator=generator, dtype=torch.float64)
        for place in range(graph.reads):
            site = graph.receivers[graph.attention(layer).start + place].site
            moved = [_metric_with(model, item, site, stream + k * 1e-3 * nudge) for k in (1, -1, 2, -2)]
            expected = (8 * (moved[0] - moved[1]) - (moved[2] - moved[3])) / (12 * 1e-3)
            assert float((gradients[place] * nudge).sum()) == pytest.approx(expected, rel=2e-3, abs=5e-4)


def _metric_with(model: LoadedModel, item: Any, site: Site, stream: Tensor) -> float:
    place = site_map(model).locate(site)
    norm = site_map(model).anatomy.layers[site.layer].attention_norm
    with torch.no_grad():
        normed = model.module.get_submodule(norm)(stream) if norm else stream
        value = place.read(model.module.get_submodule(place.path)(normed))
        with hooks(model, {site: lambda _: value}):
            return float(answer_metric(model, item.base, item, "logprob")[0])


def linear_model() -> LoadedModel:
    """GPT-2 whose logits are linear in its embeddings: no norms, even attention, no non-linearity."""
    module = tiny_models.build("gpt2")
    module.transformer.ln_f = torch.nn.Identity()
    for block in module.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = (torch.nn.Identity() for _ in range(3))
        with torch.no_grad():
            block.attn.c_attn.weight[:, : 2 * tiny_models.WIDTH] = 0.0
            block.attn.c_attn.bias[: 2 * tiny_models.WIDTH] = 0.0
    return wrap(module, tiny_models.tiny_tokenizer(), "linear")


def test_on_a_linear_model_every_score_is_the_exact_patch_of_its_edge() -> None:
    model, items = linear_model(), runs()
    graph = graph_of(model)
    places = list(zip(*np.nonzero(graph.exists), strict=True))
    exact = measure_edges([Task(model, tuple(items), metric="logit_difference")], graph, places).forget
    found = scored(model, items, metric="logit_difference")
    assert np.abs(exact).max() > 0.01
    np.testing.assert_allclose(np.array([found[:, s, r] for s, r in places]), exact, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "falcon"])
def test_scores_do_not_depend_on_batch_padding_or_blocks_of_positions(name: str) -> None:
    model = model_of(name)
    items = [*runs((30, 6, 11)), *runs((7,), seed=1, positions=range(2, 4))]
    together = scored(model, items, steps=2)
    alone = np.concatenate([scored(model, [run], steps=2) for run in items])
    blocks = scored(model, items, steps=2, values=1)
    np.testing.assert_allclose(together, alone, atol=3e-5 * np.abs(alone).max())
    np.testing.assert_allclose(blocks, alone, atol=3e-5 * np.abs(alone).max())
    patch = np.random.default_rng(0).random(together.shape[1:]) < 0.3
    graph = graph_of(model)
    singly = [patch_edges(model, graph, [run], [patch])[0, 0] for run in items]
    np.testing.assert_allclose(patch_edges(model, graph, items, [patch])[0], singly, atol=1e-4)


@pytest.mark.parametrize("kind", ["LayerNorm", "gemma", "plain"])
def test_the_secant_of_a_norm_splits_its_change_over_parts_exactly(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    path = {"gemma": ("gemma2", "model.layers.0.post_attention_layernorm"), "plain": ("llama", "model.norm"),
            "LayerNorm": ("gpt2", "transformer.ln_f")}[kind]  # fmt: skip
    norm = tiny_models.build(path[0]).double().get_submodule(path[1])
    start, parts = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 32), (4, 5, 32)))
    parts[2] = 0.0
    with torch.no_grad():
        split = secant(norm, start, start + parts.sum(0))(parts)
        torch.testing.assert_close(split.sum(0), norm(start + parts.sum(0)) - norm(start), atol=1e-5, rtol=1e-4)
    assert not split[2].any()


def brute_paths(graph: Graph, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Edges on a path from the embedding to the final state, by walking every path."""
    used = np.zeros_like(kept)

    def walk(sender: int, path: list[tuple[int, int]]) -> None:
        for receiver in np.nonzero(kept[sender])[0]:
            step = [*path, (sender, int(receiver))]
            if receiver == len(graph.receivers) - 1:
                for place in step:
                    used[place] = True
            for nxt in range(len(graph.senders)):
                if int(receiver) in graph.inputs(nxt):
                    walk(nxt, step)

    walk(0, [])
    return used


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(2, 2, 1, False), (2, 2, 2, True), (3, 2, 1, True)]),
       st.floats(0.1, 0.7))  # fmt: skip
def test_pruning_keeps_what_lies_on_a_path_and_circuits_grow(seed: int, shape: Any, share: float) -> None:
    graph = Graph(*shape)
    generator = np.random.default_rng(seed)
    kept = graph.exists & (generator.random(graph.exists.shape) < share)
    found = pruned(graph, kept)
    assert np.array_equal(found, brute_paths(graph, kept)) and np.array_equal(pruned(graph, found), found)
    scores = generator.standard_normal(graph.exists.shape) * graph.exists
    for growth in ("greedy", "top"):
        order = edge_order(graph, scores, growth)
        assert sorted(order) == sorted(zip(*np.nonzero(graph.exists), strict=True))
        grown = [circuit(graph, order, n) for n in range(1, len(order) + 1)]
        assert all(c.sum() <= n for n, c in enumerate(grown, 1)) and np.array_equal(grown[-1], graph.exists)
        assert all((small <= large).all() for small, large in itertools.pairwise(grown))
        sizes = [abs(scores[place]) for place in order]
        assert growth == "greedy" or sizes == sorted(sizes, reverse=True)
    reached = {len(graph.receivers) - 1}
    for sender, receiver in edge_order(graph, scores, "greedy"):
        assert receiver in reached
        reached |= set(graph.inputs(sender))
    assert sorted(shuffled(graph, scores, generator)[graph.exists]) == sorted(scores[graph.exists])


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_graph_has_the_edges_of_the_architecture(name: str) -> None:
    model = model_of(name)
    graph, places = graph_of(model), site_map(model)
    for component in (*graph.senders, *graph.receivers[:-1]):
        places.locate(component.site)
    own = [graph.exists[graph.head(k) : graph.head(k) + graph.n_heads, graph.mlp(k)] for k in range(graph.n_layers)]
    assert all(bool(part.all()) is not places.parallel for part in own)
    assert graph.inputs(0) == ()
    for sender, component in list(enumerate(graph.senders))[1:]:
        sites = {graph.receivers[r].site for r in graph.inputs(sender)}
        layer, head = component.site.layer, component.site.head
        group = 0 if head is None else head // (places.n_heads // places.n_kv_heads)
        expected = {Site("mlp_in", layer)} if head is None else {Site("q", layer, head), Site("k", layer, group),
                                                                 Site("v", layer, group)}  # fmt: skip
        assert sites == expected
        assert not any(graph.exists[sender:, r].any() for r in graph.inputs(sender))  # nothing reads the future


def test_pruned_edges_carry_nothing() -> None:
    for name in ("llama", "gpt_neox", "opt"):
        model, items = model_of(name), runs((7,))
        graph = graph_of(model)
        kept = graph.exists & (np.random.default_rng(2).random(graph.exists.shape) < 0.25)
        assert pruned(graph, kept).sum() < kept.sum()
        a, b = faithfulness(model, graph, items, [kept, pruned(graph, kept)])
        assert a == pytest.approx(b, abs=1e-4)


def test_what_writes_to_the_stream_beside_heads_and_mlps_is_refused() -> None:
    model = model_of("llama")
    with hooks(model, {Site("resid_pre", 1): lambda x: 2 * x}), pytest.raises(SiteError, match="unexplained"):
        scored(model, runs())
    with pytest.raises(UsageError, match="at least one gradient step"):
        scored(model, runs(), steps=0)


@cache
def located(layer: int, method: str, **given: Any) -> Localization:
    return rf.locate(planted_truth.model(layer), planted_truth.KNOWLEDGE, method, **{**SMALL, **given})


@pytest.mark.parametrize(("given", "match"), [({"edges": 10**6}, "cannot be cut"), ({"edges": 0}, "cannot be cut"),
                                              ({"faithful": 0.0}, "above 0")])  # fmt: skip
def test_impossible_circuits_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        located(1, "eap", **given)


def test_prompts_without_a_gap_have_no_circuit() -> None:
    model, items = model_of("llama"), runs()
    gap = patch_effects(model, items, []).gap.sum()
    task = Task(model, tuple(items), sign=-1.0 if gap > 0 else 1.0)  # the clean prompt knows less
    plan = Plan(3, 1, "noise", "logprob", 0.0, 1, "greedy", "auto", 0.8, 0, "auto", 20, "mean", 0)
    with pytest.raises(UsageError, match="nothing to locate"):
        score_edges([task], graph_of(model), plan)


@pytest.mark.parametrize("method", ["eap", "eap_ig"])
def test_the_localization_holds_a_circuit_of_the_size_asked_for(method: str) -> None:
    found = located(1, method, edges=30, growth="top")
    graph = graph_of(planted_truth.model(1))
    kept = np.zeros_like(graph.exists)
    for edge in found.edges:
        kept[graph.senders.index(edge.source), graph.receivers.index(edge.target)] = True
    assert 0 < len(found.edges) <= 30 and np.array_equal(pruned(graph, kept), kept)
    sizes = [abs(edge.score) for edge in found.edges]
    assert sizes == sorted(sizes, reverse=True)
    assert Localization.from_json(found.to_json()).edges == found.edges
    curve = next(rows for title, rows in found.tables.items() if title.startswith("faithfulness by number"))
    assert len(curve[0]) == len({*ladder(int(graph.exists.sum())), 30})


@pytest.mark.parametrize(("mode", "steps", "signed"), [("both", 1, 4), ("noise", 10, 3)])
def test_edges_tell_the_planted_layer_where_their_signs_are_kept(mode: Any, steps: int, signed: int) -> None:
    """Contrasted with retain facts. Ranked by summed |score| as the locators do, it is first in 2 of 4."""
    found = []
    for layer in range(4):
        model = planted_truth.model(layer)
        graph = graph_of(model)
        tasks, _ = corrupted_tasks(model, planted_truth.KNOWLEDGE, 0, items=32, partners=2, mode=mode, contrast=1.0)
        plan = Plan(32, 2, mode, "logprob", 1.0, steps, "greedy", "auto", 0.8, 0, "auto", 20, "mean", 0)
        scores = score_edges(tasks, graph, plan)
        mlps = [graph.head(k, graph.n_heads) for k in range(4)]
        rankings = scores.all.sum(1), component_scores(graph, scores.all)
        found.append([int(np.argmax(ranking[mlps])) == layer for ranking in rankings])
    assert sum(right for right, _ in found) >= signed and sum(right for _, right in found) >= 2


def test_the_circuit_of_the_organism_is_small_faithful_and_beats_random_ones() -> None:
    found = rf.locate(rf.load("organism:bios"), rf.knowledge("bios-people"), "eap_ig", items=16, draws=20)
    assert 5 < len(found.edges) <= 20
    curve, control = ([row[0] for title, row in found.tables.items() if title.startswith(start)][0]
                      for start in ("faithfulness by number", "faithfulness of 20 random"))  # fmt: skip
    assert curve[2] > 0.9 and control[2] < 0.3  # 20 of 343 edges
    agreement = next(note for note in found.notes if "Pearson" in note)
    assert float(agreement.split("of ")[-1].split(" ")[0]) > 0.9
