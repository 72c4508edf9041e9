"""The site map: coverage, meaning of every site, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ALL, LAYERS, build, sample_ids

from repforget.errors import SiteError
from repforget.models.capture import Batch, capture, forward, hooks
from repforget.models.check import check_sites
from repforget.models.sites import Location, site_map
from repforget.records import Site

NO_MID = {"gpt_neox", "phi", "gptj", "falcon", "falcon_new"}
UNGATED = {"gpt2", "gpt_neox", "gpt_neox_sequential", "phi", "opt", "gptj", "falcon", "falcon_new", "falcon_sequential"}
KEY_VALUE_HEADS = {"gpt2": 4, "gpt_neox": 4, "gpt_neox_sequential": 4, "phi": 4, "opt": 4, "gptj": 4, "falcon": 1,
                   "falcon_sequential": 4}  # fmt: skip  # all others: 2


def batch(side: str = "right") -> Batch:
    return Batch.pad(sample_ids(), side=side)


@pytest.mark.parametrize("name", ALL)
def test_the_residual_stream_is_the_sum_of_what_is_written(name: str) -> None:
    module = build(name)
    for side in ("right", "left"):
        assert check_sites(module, batch(side)) < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_every_kind_the_architecture_has_is_there_and_has_its_size(name: str) -> None:
    module = build(name)
    places = site_map(module)
    absent = {"resid_mid"} if name in NO_MID else set()
    if name in UNGATED:
        absent.add("mlp_gate")
    if name == "mixtral":
        absent |= {"mlp_gate", "mlp_up", "mlp_post"}
    expected = {"embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in", "q", "k", "v", "attn_z",
                "attn_out", "mlp_gate", "mlp_up", "mlp_post", "mlp_out", "final_norm", "logits"} - absent  # fmt: skip
    assert set(places.kinds) == expected
    assert places.n_layers == LAYERS and places.n_kv_heads == KEY_VALUE_HEADS.get(name, 2)
    found = capture(module, places.sites, batch(), "last")
    assert list(found) == list(places.sites)
    for site, value in found.items():
        assert value.shape == (3, places.size(site)), site


@pytest.mark.parametrize("name", ALL)
def test_what_attention_and_mlp_read_is_what_the_projections_read(name: str) -> None:
    """attn_in and mlp_in are the norm outputs: the projections applied to them give q and mlp_up."""
    from repforget.models.weights import find, get_bias, get_weight

    module = build(name)
    pairs = [("attn_in", role) for role in ("q", "k", "v")]
    pairs += [("mlp_in", role) for role in ("mlp_gate", "mlp_up") if role in site_map(module).kinds]
    for reads, role in pairs:
        found = capture(module, [Site(reads, 1), Site(role, 1)], batch(), "last")
        ref = find(module, role, 1)  # type: ignore[arg-type]
        bias = get_bias(module, ref)
        predicted = found[Site(reads, 1)] @ get_weight(module, ref).T + (0 if bias is None else bias)
        torch.testing.assert_close(predicted, found[Site(role, 1)], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_sites_that_share_a_state_agree(name: str) -> None:
    module = build(name)
    places = site_map(module)
    found = capture(module, places.sites, batch(), "all")
    real = batch().mask.bool()
    assert torch.equal(found[Site("resid_post", 0)], found[Site("resid_pre", 1)])
    if "resid_mid" in places.kinds:
        middle = found[Site("resid_pre", 1)] + found[Site("attn_out", 1)]
        torch.testing.assert_close(middle[real], found[Site("resid_mid", 1)][real])
    if name == "olmo2":  # attention and MLP read the raw residual
        assert torch.equal(found[Site("attn_in", 1)], found[Site("resid_pre", 1)])
        assert torch.equal(found[Site("mlp_in", 1)], found[Site("resid_mid", 1)])
    else:
        assert not torch.allclose(found[Site("attn_in", 1)], found[Site("resid_pre", 1)], atol=1e-2)
    torch.testing.assert_close(found[Site("logits")][real], forward(module, batch())[real])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_a_head_is_that_head(name: str, kind: str) -> None:
    """Changing one head of q, k or v moves exactly the attention heads that use it: the fused layouts are
    right."""
    module = build(name)
    places = site_map(module)
    group = places.n_heads // places.n_kv_heads
    heads = [Site("attn_z", 0, h) for h in range(places.n_heads)]
    before = capture(module, heads, batch(), "last")
    for head in range(places.heads_of(kind)):
        with hooks(module, {Site(kind, 0, head): lambda x: x.flip(-1) * 1.5 + 0.3}):
            after = capture(module, heads, batch(), "last")
        moved = {h for h, site in enumerate(heads) if not torch.allclose(before[site], after[site], atol=1e-6)}
        if name == "olmo2" and kind in ("q", "k"):
            assert head * (1 if kind == "q" else group) in moved  # its q and k norms run over all heads
        else:
            assert moved == ({head} if kind == "q" else set(range(head * group, (head + 1) * group)))


@pytest.mark.parametrize("name", ["gpt_neox", "falcon_new", "phi3", "gpt2", "llama"])
def test_the_whole_kind_is_its_heads_side_by_side(name: str) -> None:
    module = build(name)
    places = site_map(module)
    for kind in ("q", "k", "v", "attn_z"):
        heads = [s for s in places.heads(kind) if s.layer == 1]
        found = capture(module, [Site(kind, 1), *heads], batch(), "all")
        assert torch.equal(found[Site(kind, 1)], torch.cat([found[s] for s in heads], -1))


def test_the_value_state_is_what_attention_mixes() -> None:
    """With one token attention can only copy v: attn_z of each head is the v of its key/value head."""
    single = Batch(torch.tensor([[5]]), torch.tensor([[1]]))
    for name in ALL:
        module = build(name)
        places = site_map(module)
        found = capture(module, [Site("v", 0), Site("attn_z", 0)], single)
        v = found[Site("v", 0)].view(places.n_kv_heads, 1, places.head_dim)
        copied = v.expand(-1, places.n_heads // places.n_kv_heads, -1).reshape(1, -1)
        torch.testing.assert_close(copied, found[Site("attn_z", 0)])


def test_a_location_reads_and_writes_its_columns_only() -> None:
    place = Location("x", "out", ((4, 6), (0, 2)))
    value = torch.arange(8.0)
    assert place.read(value).tolist() == [4, 5, 0, 1]
    changed = place.write(value, torch.tensor([-4.0, -5.0, -0.5, -1.0]))
    assert changed.tolist() == [-0.5, -1, 2, 3, -4, -5, 6, 7]
    assert value.tolist() == list(range(8))


def test_expand_and_rank() -> None:
    places = site_map(build("llama"))
    assert places.expand("resid_post") == (Site("resid_post", 0), Site("resid_post", 1))
    assert places.expand("attn_z.1.h3") == (Site("attn_z", 1, 3),)
    assert places.expand("final_norm") == (Site("final_norm"),)
    assert places.rank(Site("attn_z", 1, 2)) < places.rank(Site("mlp_post", 1)) < places.rank(Site("logits"))


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("llama", "resid_post.7", "2 layers"),
        ("llama", "attn_z.0.h4", "4 heads"),
        ("llama", "k.0.h2", "2 heads"),
        ("gptj", "resid_mid.0", "both read resid_pre"),
        ("gpt2", "mlp_gate.0", "no gate"),
        ("mixtral", "mlp_post.0", "experts are one batched tensor"),
    ],
)
def test_absent_sites_say_why(name: str, site: str, words: str) -> None:
    with pytest.raises(SiteError, match=words):
        site_map(build(name)).locate(Site.parse(site))
    with pytest.raises(SiteError):
        capture(build(name), [Site.parse(site)], batch())


def test_partly_covered_models_are_refused_with_their_coverage() -> None:
    module = build("llama")
    module.model.layers[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(SiteError, match=r"only partly covered.*attention 2/2.*layers\.1\.extra\.weight"):
        site_map(module)
    module = build("llama")
    del module.model.layers[0].mlp.down_proj
    with pytest.raises(SiteError, match=r"MLP down projection 1/2.*missing: MLP down projection"):
        site_map(module)


def test_an_unknown_fused_layout_is_refused() -> None:
    module = build("gpt_neox")
    module.config.model_type = "something_new"
    with pytest.raises(SiteError, match="order of the fused query-key-value rows of 'something_new'"):
        site_map(module)


def test_unproven_architectures_are_checked_by_a_forward_pass() -> None:
    good = build("llama")
    good.config.model_type = "something_new"
    assert site_map(good).n_layers == LAYERS
    bad: Any = build("llama")
    bad.config.model_type = "something_new"
    block = bad.model.layers[1]
    block.register_forward_hook(lambda _m, _a, out: out * 1.5)  # a write that no site shows
    for _ in range(2):  # a refused map is not remembered
        with pytest.raises(SiteError, match="layer 1"):
            site_map(bad)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("OPTConfig", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, "normalises the residual stream"),
        ("OPTConfig", {"word_embed_proj_dim": 16}, "partly covered"),
        ("GraniteConfig", {"residual_multiplier": 0.5}, "scales what is written"),
        ("GPT2Config", {"add_cross_attention": True}, "cross-attention"),
        ("T5Config", {}, "encoder-decoder"),
    ],
)
def test_known_exceptions_are_refused(kind: str, arguments: dict[str, Any], words: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32, "d_model": 32,
             "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "ffn_dim": 32,
             "intermediate_size": 32}  # fmt: skip
    config = getattr(transformers, kind)(**{**sizes, **arguments})
    automatic = transformers.AutoModelForSeq2SeqLM if kind == "T5Config" else transformers.AutoModelForCausalLM
    with pytest.raises(SiteError, match=words):
        site_map(automatic.from_config(config))


def test_a_parallel_block_in_disguise_is_found_out() -> None:
    """Two norms, but both read resid_pre: the sum is right and resid_mid would be wrong."""
    module: Any = build("gpt_neox")
    module.config.use_parallel_residual = False  # not what its blocks do
    with pytest.raises(SiteError, match=r"resid_mid in layer 0|what the MLP reads in layer 0"):
        check_sites(module, batch())


def test_what_is_no_language_model_is_refused() -> None:
    from transformers import AutoModel

    with pytest.raises(SiteError, match="not a transformers causal language model"):
        site_map(torch.nn.Linear(2, 2))
    with pytest.raises(SiteError, match="missing: unembedding"):
        site_map(AutoModel.from_config(build("llama").config))


def test_the_language_part_of_a_multimodal_model_is_covered() -> None:
    import transformers

    text = build("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    module = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert site_map(module).n_layers == LAYERS
    assert check_sites(module, batch()) < 1e-5


def test_the_map_is_read_again_when_blocks_are_removed() -> None:
    module = build("llama")
    assert site_map(module).n_layers == 2
    module.model.layers = torch.nn.ModuleList(list(module.model.layers)[:1])
    module.config.num_hidden_layers = 1
    assert site_map(module).n_layers == 1
