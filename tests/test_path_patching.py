"""Path patching: identities on every architecture, brute force, edge patching as second opinion, planted facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import known_words
import numpy as np
import planted
import pytest
import test_locate_planted as planted_truth
import tiny_models
import torch
from test_circuits import POST_NORM, model_of, runs
from torch import Tensor

import repforget as rf
from repforget.causal import Run, patch_effects, prepare
from repforget.errors import SiteError, UsageError
from repforget.locate._circuit import patch_edges
from repforget.locate._graph import Graph, graph_of
from repforget.locate._paths import Through, path_moves, receiver_of
from repforget.locate._units import expand_nodes
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.records import Component, Site

ALL = pytest.mark.parametrize("name", tiny_models.ALL)


def edges(graph: Graph, sender: Component, to: Callable[[Component], bool]) -> Any:
    patch = np.zeros(graph.exists.shape, dtype=bool)
    patch[graph.senders.index(sender), [k for k, r in enumerate(graph.receivers) if to(r)]] = True
    return patch & graph.exists


@ALL
def test_holding_nothing_is_activation_patching_and_what_is_not_before_the_receiver_moves_nothing(name: str) -> None:
    model, items = model_of(name), runs()
    senders = expand_nodes(model, ("embed", "heads", "attn_out", "mlp_out"))
    expected = patch_effects(model, items, [(c,) for c in senders])
    scale = float(np.abs(expected.gap).max())
    for receiver in ("final", "resid_pre.1"):
        before = np.array([c.site.layer < (1 if receiver == "resid_pre.1" else 2) for c in senders])
        found = path_moves(model, items, senders, receiver_of(model, receiver), "everything")
        np.testing.assert_allclose(found[before], expected.moved[before], atol=3e-5 * scale)
        for through in ("nothing", "mlps", "everything"):
            late = path_moves(model, items, senders, receiver_of(model, receiver), through)[~before]
            assert not late.any() and np.abs(found[before]).min(axis=1).max() > 0
    heads = receiver_of(model, ["q.0.h1", "v.0.h0"])
    assert not path_moves(model, items, senders[1:], heads).any()


@ALL
def test_a_direct_path_is_the_exact_patch_of_its_edges(name: str) -> None:
    """Heads under one norm share its scale when edges are patched, and each has its own here: not compared."""
    model, items = model_of(name), runs()
    graph = graph_of(model)
    senders = [c for c in graph.senders[1:] if c.site.kind == "mlp_out" or name not in POST_NORM]
    some = {Site("q", 1, 2), Site("k", 1, 0), Site("v", 1, 0)}
    cases: list[tuple[Any, Callable[[Component], bool]]] = [
        ("final", lambda r: r.site.kind == "logits"),
        ("resid_pre.1", lambda r: r.site.layer == 1 or r.site.kind == "logits"),
        ([str(s) for s in sorted(some)], lambda r: r.site in some),
    ]  # fmt: skip
    for receiver, reads in cases:
        early = [c for c in senders if receiver == "final" or c.site.layer == 0]
        found = path_moves(model, items, early, receiver_of(model, receiver))
        patches = [np.zeros_like(graph.exists), *(edges(graph, c, reads) for c in early)]
        exact = patch_edges(model, graph, items, patches)
        np.testing.assert_allclose(found, exact[1:] - exact[0], atol=1e-4)
        assert np.abs(found).max() > 0.01


def _llama(module: Any) -> list[Callable[[Tensor], Tensor]]:
    return [lambda x, k=k: k.mlp(k.post_attention_layernorm(x)) for k in module.model.layers]


def _gpt2(module: Any) -> list[Callable[[Tensor], Tensor]]:
    return [lambda x, k=k: k.mlp(k.ln_2(x)) for k in module.transformer.h]


def _gemma2(module: Any) -> list[Callable[[Tensor], Tensor]]:
    return [lambda x, k=k: k.post_feedforward_layernorm(k.mlp(k.pre_feedforward_layernorm(x)))
            for k in module.model.layers]  # fmt: skip


def _logits(model: LoadedModel, name: str, state: Tensor) -> Tensor:
    module = model.module
    norm = module.transformer.ln_f if name == "gpt2" else module.model.norm
    logits = module.lm_head(norm(state))
    cap = getattr(module.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize(("name", "mlps"), [("llama", _llama), ("gpt2", _gpt2), ("gemma2", _gemma2)])
@pytest.mark.parametrize("through", ["nothing", "mlps"])
def test_brute_force_of_what_one_sender_adds_to_the_stream(name: str, mlps: Any, through: Through) -> None:
    """The stream of the base plus the sender's change, through each later MLP by hand, the final norm taken anew."""
    model, run = model_of(name), runs((8,))[0]
    item = next(iter(prepare(model, [run])))
    sites = [Site(kind, k) for k in range(2) for kind in ("resid_mid", "resid_post", "attn_out", "mlp_out")]
    base, donor = (capture(model, sites, batch, "all") for batch in (item.base, item.donor))
    for sender in (Site("attn_out", 0), Site("mlp_out", 0), Site("attn_out", 1), Site("mlp_out", 1)):
        change = donor[sender] - base[sender]
        with torch.no_grad():
            for layer, mlp in enumerate(mlps(model.module)):
                reads = layer > sender.layer or (layer == sender.layer and sender.kind == "attn_out")
                if through == "mlps" and reads:
                    state = base[Site("resid_mid", layer)]
                    change = change + mlp(state + change) - mlp(state)
            final = base[Site("resid_post", 1)]
            chances = [_logits(model, name, x)[0].double().log_softmax(-1) for x in (final + change, final)]
        places = range(run.start - 1, len(run.base) - 1)
        expected = sum(float(chances[0][p, run.base[p + 1]] - chances[1][p, run.base[p + 1]]) for p in places)
        found = path_moves(model, [run], [Component(sender)], receiver_of(model, "final"), through)
        assert found[0, 0] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon", "mixtral"])
def test_scores_do_not_depend_on_batch_or_padding_and_a_run_patched_into_itself_stays(name: str) -> None:
    model = model_of(name)
    items = [*runs((20, 6, 11)), *runs((7,), seed=1, positions=range(2, 4))]
    senders = expand_nodes(model, ("heads", "mlp_out"))
    for receiver in ("final", ["q.1.h0", "k.1.h0"]):
        to = receiver_of(model, receiver)
        together = path_moves(model, items, senders, to, "mlps")
        alone = np.concatenate([path_moves(model, [run], senders, to, "mlps", token_budget=1) for run in items], axis=1)
        np.testing.assert_allclose(together, alone, atol=3e-5 * max(1.0, np.abs(alone).max()))
        same = [Run(r.id, r.cluster, r.base, r.base, r.start, r.positions) for r in items]
        np.testing.assert_allclose(path_moves(model, same, senders, to, "mlps"), 0.0, atol=2e-5)


@pytest.mark.parametrize(("named", "match"), [("mlp_in.1", "cannot end in mlp_in.1"), ([], "cannot end in nothing"),
                                              (["resid_pre.1", "q.1.h0"], "cannot end in"),
                                              (["resid_pre.0", "resid_pre.1"], "cannot end in")])  # fmt: skip
def test_receivers_that_are_none_are_refused(named: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        receiver_of(model_of("llama"), named)
    with pytest.raises(SiteError):
        receiver_of(model_of("llama"), "resid_pre.9")


@ALL
def test_the_locator_runs_on_every_architecture(name: str) -> None:
    model = model_of(name)
    for receiver in ("final", ["q.1.h1", "k.1.h0"]):
        found = rf.locate(model, known_words.knowledge_of(model), "path_patching", items=8, partners=1, draws=20,
                          receiver=receiver, through="mlps", mode="denoise")  # fmt: skip
        assert len(found.components) == 10 and max(map(abs, found.scores)) > 1e-4
        assert found.settings["receiver"] == receiver


@pytest.mark.parametrize("layer", planted.LAYERS)
def test_the_mlp_that_says_the_planted_facts_is_the_planted_one(layer: int) -> None:
    """4 of 4, contrasted with retain facts, along the direct path and through later MLPs."""
    for through in ("nothing", "mlps"):
        found = planted_truth.located(layer, "path_patching", nodes=("mlp_out",), contrast=1.0, through=through)
        assert found.layers("mlp_out")[0] == layer


def test_a_path_reads_its_own_positions_alone() -> None:
    """What MLPs write at the subject moves the organism's answer through attention alone."""
    model, knowledge = rf.load("organism:bios"), rf.knowledge("bios-people")
    first, last = (Component(Site("mlp_out", k)) for k in (0, model.n_layers - 1))

    def scores(method: str, **given: Any) -> dict[Component, float]:
        found = rf.locate(model, knowledge, method, nodes=("mlp_out",), items=16, draws=20, **given)
        return dict(zip(found.components, found.scores, strict=True))

    assert max(scores("activation_patching", positions="subject").values()) > 0.03
    assert max(map(abs, scores("path_patching", positions="subject", through="mlps").values())) < 1e-5
    whole, direct = scores("activation_patching"), scores("path_patching")
    assert direct[last] == pytest.approx(whole[last], abs=1e-5)  # nothing lies behind it
    assert 0.2 < direct[first] < 0.6 * whole[first]
