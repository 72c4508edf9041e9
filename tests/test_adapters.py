"""Adapters: what starts as the model, trains, switches off and comes out as an exact edit; averages; exports."""

from __future__ import annotations

import copy
from typing import Any

import edit_models
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.artifact import AddVector, DenseDelta, Edit, LowRankDelta, average
from repforget.edit.train._adapters import KINDS, LARGE, LOW_RANK, adaptable, adapted, model_size_default
from repforget.edit.train._fila import row_weights, squared_gradients
from repforget.errors import ArtifactError, UnknownNameError, UsageError
from repforget.models.capture import capture
from repforget.models.check import probe_batch
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.records import Site

IDS = torch.randint(4, tiny_models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
ON_CONV1D = ("deft", "fila", "fourierft", "frod", "gralora", "hira", "ia3", "lora", "randlora", "tinylora", "vera")
DECOMPOSING = ("deft", "fila", "frod", "hra", "osf")  # write W as other factors: the start is the model up to rounding


def _model(name: str = "llama") -> LoadedModel:
    return wrap(tiny_models.build(name), tiny_models.tiny_tokenizer(), f"tiny-{name}")


def _names(module: Any) -> tuple[str, ...]:
    return tuple(n for n in adaptable(module, [n for n, _ in module.named_parameters()]) if "lm_head" not in n)


@torch.no_grad()
def _logits(module: Any) -> torch.Tensor:
    logits: torch.Tensor = module(input_ids=IDS, use_cache=False).logits
    return logits


def _importance(module: Any, kind: str, names: tuple[str, ...]) -> Any:
    if kind != "fila":
        return None
    forget, retain = (squared_gradients(module, names, [(row, 3)]) for row in ((1, 8, 9, 7, 5), (1, 30, 31, 32)))
    return row_weights(module, forget, retain)


def _train(module: Any, parameters: Any, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(parameters.values(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = module(input_ids=IDS, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()


def _tree(module: Any) -> Any:
    """Everything about a module but the values: classes, names, identities, flags, attributes."""
    parts = [(path, id(part), type(part), sorted(vars(part))) for path, part in module.named_modules()]
    return parts, [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in module.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_kind_starts_as_the_model_trains_switches_off_and_merges(kind: str, name: str) -> None:
    model = _model(name)
    module, base = model.module, _logits(model.module)
    names = _names(module)
    if name == "gpt2" and kind not in ON_CONV1D:
        before = _tree(module), fingerprint(module)
        with pytest.raises(UsageError, match="or use 'lora'"), adapted(module, kind, names, rank=4):
            pass
        assert (_tree(module), fingerprint(module)) == before
        return
    importance = _importance(module, kind, names)
    before, state = (_tree(module), fingerprint(module)), torch.get_rng_state()
    with adapted(module, kind, names, rank=4, seed=1, importance=importance) as adapter:
        assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
        start = _logits(module)
        assert torch.allclose(start, base, atol=1e-5) if kind in DECOMPOSING else torch.equal(start, base)
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        assert trained <= {id(p) for p in adapter.parameters.values()} and trained
        _train(module, adapter.parameters)
        with adapter.off():
            assert torch.equal(_logits(module), base)
            assert all(p.requires_grad for p in adapter.parameters.values())
        wanted, operations = _logits(module), adapter.operations()
    assert (_tree(module), fingerprint(module)) == before
    assert torch.equal(_logits(module), base)
    assert (wanted - base).abs().max() > 1e-2, "training moved the model"
    edit = Edit.build(kind, {}, model, "", operations)
    with edit.attach(model):
        assert (_logits(module) - wanted).abs().max() < 3e-5
    assert all(isinstance(op, LowRankDelta) for op in operations) == (kind in LOW_RANK)


def test_kinds_left_out_are_refused_with_those_that_work() -> None:
    module = _model().module
    for kind in ("prefix_tuning", "adalora", "boft", "waveft", "vblora", "lily", "xlora", "bottleneck", "lorra"):
        with pytest.raises(UnknownNameError, match="'?lora'?.*tinylora, vera"), adapted(module, kind, _names(module)):
            pass
    with pytest.raises(UnknownNameError, match="did you mean .*'lora'"), adapted(module, "lorra", _names(module)):
        pass
    with pytest.raises(UsageError, match="even rank"), adapted(module, "hra", _names(module), rank=3):
        pass


def test_equal_seeds_start_equally_and_others_do_not() -> None:
    def start(seed: int, noise: int) -> dict[str, torch.Tensor]:
        module = _model().module
        torch.manual_seed(noise)
        with adapted(module, "lora", _names(module), rank=4, seed=seed) as adapter:
            return {name: p.detach().clone() for name, p in adapter.parameters.items()}

    one, same, other = start(1, 5), start(1, 6), start(2, 5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", [*tiny_models.ARCHITECTURES, "llama_tied"])
def test_lora_on_every_architecture_is_its_low_rank_delta(name: str) -> None:
    model = _model(name)
    module, base = model.module, _logits(model.module)
    names, before = _names(module), (_tree(module), fingerprint(module))
    with adapted(module, "lora", names, rank=3, alpha=5.0) as adapter:
        assert torch.equal(_logits(module), base)
        _train(module, adapter.parameters)
        wanted, operations = _logits(module), adapter.operations()
    assert (_tree(module), fingerprint(module)) == before
    assert [op.weight for op in operations if isinstance(op, LowRankDelta) and op.u.shape[-1] == 3] == list(names)
    with Edit.build("lora", {}, model, "", operations).attach(model):
        assert (_logits(module) - wanted).abs().max() < 3e-5


def test_states_are_read_through_an_adapter_as_through_its_edit() -> None:
    model = _model()
    batch, sites = probe_batch(model.module), [Site("resid_post", 1), Site("mlp_post", 0), Site("q", 1)]
    with adapted(model.module, "lora", _names(model.module), rank=4) as adapter:
        _train(model.module, adapter.parameters)
        seen = capture(model, sites, batch, "all")
        operations = adapter.operations()
    with Edit.build("lora", {}, model, "", operations).attach(model):
        again = capture(model, sites, batch, "all")
    assert all((seen[site] - again[site]).abs().max() < 1e-5 for site in sites)


@pytest.mark.parametrize("kind", ["lora", "fila", "loha", "ia3"])
def test_half_precision_weights_get_adapters_in_float32(kind: str) -> None:
    module = _model().module.bfloat16()
    base, before, names = _logits(module), fingerprint(module), _names(module)
    with adapted(module, kind, names, rank=4, importance=_importance(module, kind, names)) as adapter:
        assert {p.dtype for p in adapter.parameters.values()} == {torch.float32}
        assert torch.equal(_logits(module), base)
        _train(module, adapter.parameters)
        with adapter.off():
            assert torch.equal(_logits(module), base)
        wanted, operations = _logits(module), adapter.operations()
    assert fingerprint(module) == before
    module.float()  # the same bits: what differs below is the rounding of activations
    model = wrap(module, tiny_models.tiny_tokenizer())
    with Edit.build(kind, {}, model, "", operations).attach(model):
        change = _logits(module) - base.float()
    assert (change - (wanted - base).float()).norm() < 0.05 * change.norm()


def test_hooks_set_before_an_adapter_can_still_be_removed_after_it() -> None:
    module = _model().module
    base = _logits(module)
    handle = module.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: _[2] * 2)
    with adapted(module, "lora", _names(module), rank=2):
        pass
    assert not torch.equal(_logits(module), base)
    handle.remove()
    assert torch.equal(_logits(module), base)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    module = _model("mixtral").module
    before = _tree(module), fingerprint(module)
    with pytest.raises(KeyError), adapted(module, "lora", _names(module), rank=2) as adapter:
        _train(module, adapter.parameters, steps=1)
        raise KeyError
    assert (_tree(module), fingerprint(module)) == before


def test_weights_that_no_adapter_takes_are_refused() -> None:
    llama, tied, mixtral = (_model(name).module for name in ("llama", "llama_tied", "mixtral"))
    cases = [
        (llama, "lora", (), "no weight to train"),
        (llama, "lora", ("model.norm.weight",), "neither the matrix of a linear layer nor"),
        (tied, "lora", ("model.embed_tokens.weight",), "tied to lm_head.weight"),
        (mixtral, "ia3", ("model.layers.0.mlp.experts.down_proj",), "'lora' alone takes"),
    ]
    for module, kind, names, message in cases:
        with pytest.raises(UsageError, match=message), adapted(module, kind, names):
            pass
    with pytest.raises(UsageError, match="did you mean 'model.layers.0.mlp.down_proj.weight'"):
        adaptable(llama, ["model.layers.0.mlp.down_project.weight"])
    assert "lm_head.weight" in adaptable(llama, ["lm_head.weight", "model.norm.weight"])
    assert adaptable(tied, ["lm_head.weight"]) == ()
    with (
        adapted(llama, "lora", _names(llama), rank=2),
        pytest.raises(UsageError, match="carries an adapter already"),
        adapted(llama, "lora", _names(llama), rank=2),
    ):
        pass


def test_lora_is_the_default_from_a_billion_parameters_on() -> None:
    assert model_size_default(torch.nn.Linear(3, 4)) == "none"
    with torch.device("meta"):
        assert model_size_default(torch.nn.Linear(LARGE // 1000, 1000)) == "lora"
        assert model_size_default(torch.nn.Linear(LARGE // 1000 - 1, 1000, bias=False)) == "none"


def test_squared_gradients_are_those_of_single_answers_weighed_by_their_tokens() -> None:
    module = copy.deepcopy(_model().module).double()
    name = "model.layers.1.mlp.down_proj.weight"
    rows = [((1, 5, 6, 7, 8), 2), ((1, 9, 10), 2)]
    found = squared_gradients(module, [name], rows)[name]
    weight = module.get_parameter(name)
    expected = torch.zeros_like(weight)
    for ids, start in rows:
        losses = -module(torch.tensor([ids])).logits[0].log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]
        expected += torch.autograd.grad(losses.mean(), weight)[0] ** 2 * len(losses) / 4
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-12)


def test_fila_starts_at_the_leading_part_of_the_scaled_weights() -> None:
    model = _model()
    module, name = model.module, "model.layers.0.mlp.up_proj.weight"
    weight = module.get_parameter(name).detach().double()
    forget, retain = (torch.rand(weight.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    importance = row_weights(module, {name: forget}, {name: retain})
    with adapted(module, "fila", [name], rank=2, alpha=6.0, importance=importance) as adapter:
        (op,) = adapter.operations()
    assert isinstance(op, LowRankDelta) and op.u.shape[1] == 4 and len(adapter.parameters) == 2
    started, subtracted = op.u[:, :2] @ op.v[:2], op.u[:, 2:] @ op.v[2:]
    assert torch.equal(started, -subtracted)
    scale = (forget.double() / (retain.double() + 1e-5)).sum(1).sqrt()
    best = torch.linalg.svd(scale[:, None] * weight)
    leading = best.U[:, :2] * best.S[:2] @ best.Vh[:2]
    torch.testing.assert_close(scale[:, None] * started.double(), leading, rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match="importance"), adapted(module, "fila", [name], rank=2):
        pass


@pytest.mark.parametrize("adapter", ["lora", "fila", "ia3"])
def test_a_trained_editor_trains_any_adapter_and_leaves_the_unembedding_alone(adapter: str) -> None:
    from repforget.edit.train.objectives.npo import npo

    model, data = edit_models.model(), edit_models.people().for_editor()
    before = _tree(model.module), model.fingerprint
    edit = npo(model, data, adapter=adapter, steps=4, batch_size=8, rank=2, alpha=4.0)
    assert (_tree(model.module), fingerprint(model.module)) == before
    assert edit.manifest.settings["adapter"] == adapter
    ranks = {op.u.shape[1] for op in edit.operations if isinstance(op, LowRankDelta)}
    assert ranks == {"lora": {2}, "fila": {4}, "ia3": set()}[adapter]
    assert set(edit.manifest.weights) <= set(_names(model.module)) and len(edit.manifest.weights) == 14
    if adapter == "fila":
        with pytest.raises(UsageError, match="no retain term"):
            npo(model, data, adapter=adapter, steps=1, retain="none")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4), st.integers(0, 10**6))
def test_the_average_of_adapters_is_exact_where_averaging_factors_is_not(ranks: list[int], seed: int) -> None:
    model, name = _model(), "model.layers.0.mlp.up_proj.weight"
    draw = torch.Generator().manual_seed(seed)
    shape = model.module.get_parameter(name).shape
    pairs = [(torch.randn(shape[0], r, generator=draw), torch.randn(r, shape[1], generator=draw)) for r in ranks]
    edits = [Edit.build("lora", {}, model, str(k), [LowRankDelta(name, u, v)]) for k, (u, v) in enumerate(pairs)]
    (op,) = average(edits).operations
    exact = sum(u.double() @ v.double() for u, v in pairs) / 4
    assert isinstance(op, LowRankDelta) and op.u.shape[1] == sum(ranks)
    assert float((op.u.double() @ op.v.double() - exact).norm() / exact.norm()) < 1e-12
    (weighed,) = average(edits[:2], [2.0, -0.5]).operations
    exact = 2 * pairs[0][0].double() @ pairs[0][1].double() - pairs[1][0].double() @ pairs[1][1].double() / 2
    assert float((weighed.u.double() @ weighed.v.double() - exact).norm() / exact.norm()) < 1e-12


def test_averaging_the_factors_is_far_off() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(32, 4, generator=draw), torch.randn(4, 32, generator=draw)) for _ in range(3)]
    exact = sum(u @ v for u, v in pairs) / 3
    factors = sum(u for u, _ in pairs) / 3 @ (sum(v for _, v in pairs) / 3)
    assert 0.6 < float((factors - exact).norm() / exact.norm()) < 0.9


def test_an_average_holds_every_weight_operation_and_refuses_the_others() -> None:
    model = _model()
    one, two = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    ones = torch.ones_like(model.module.get_parameter(two))
    low = LowRankDelta(one, torch.ones(48, 1), torch.ones(1, 32))
    first = Edit.build("a", {}, model, "x", [low, DenseDelta(two, ones)])
    second = Edit.build("b", {}, model, "y", [DenseDelta(two, 3 * ones)])
    mean = average([first, second])
    assert mean.manifest.method == "average(a, b)" and mean.manifest.weights == (one, two)
    base = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    with mean.attach(model):
        now = dict(model.module.named_parameters())
        torch.testing.assert_close(now[one].detach(), base[one] + 0.5)
        torch.testing.assert_close(now[two].detach(), base[two] + 2.0)
    hooked = Edit.build("c", {}, model, "x", [AddVector(Site("resid_post", 0), torch.ones(32))])
    with pytest.raises(ArtifactError, match="Edit.then"):
        average([first, hooked])
    with pytest.raises(ArtifactError, match="of one base"):
        average([first, Edit.build("a", {}, _model("llama_tied"), "x", [DenseDelta(two, ones)])])
    with pytest.raises(ArtifactError, match="one weight per edit"):
        average([first, second], [1.0])
    with pytest.raises(ArtifactError, match="at least one"):
        average([])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_an_edit_by_lora_is_served_by_peft_and_by_plain_weights(name: str, tmp_path: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = _model(name)
    model.module.save_pretrained(tmp_path / "base")
    with adapted(model.module, "lora", _names(model.module), rank=4) as adapter:
        _train(model.module, adapter.parameters)
        wanted, operations = _logits(model.module), adapter.operations()
    edit = Edit.build("lora", {}, model, "", operations)
    edit.export_peft(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    served = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert (_logits(served) - wanted).abs().max() < 3e-5
    edit.export_checkpoint(model, tmp_path / "folded")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert (_logits(plain) - wanted).abs().max() < 3e-5
