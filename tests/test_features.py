"""Autoencoders with an exact dictionary: files, the site they fit, what their features tell apart, training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from artifact_tools import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.errors import ArtifactError, SiteError, UsageError
from repforget.features import (
    Activity,
    SparseAutoencoder,
    check_site,
    frequency_difference,
    highest_share,
    importance_ratio,
    measure,
    rare_elsewhere,
    read,
    save,
    share_open,
    train_features,
    unexplained,
)
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.records import Site

HERE = Site("resid_post", 0)
TEXTS = [tuple(row) for row in tiny_models.sample_ids(rows=60, length=12, seed=5)]


def exact(site: Site = HERE, d: int = 32, k: int | None = None, **changes: Any) -> SparseAutoencoder:
    """Features are an orthonormal basis in both signs: relu reconstructs every activation exactly."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(3))).Q
    rows = torch.cat([basis, -basis])[: k or 2 * d]
    made = SparseAutoencoder(site, rows, rows, torch.zeros(len(rows)), torch.zeros(d))
    return dataclasses.replace(made, **changes)


def random(seed: int = 0, k: int = 20, d: int = 32, **changes: Any) -> SparseAutoencoder:
    g = torch.Generator().manual_seed(seed)
    made = SparseAutoencoder(HERE, *(torch.randn(s, generator=g) for s in ((k, d), (k, d), (k,), (d,))))
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny("llama")


def test_an_exact_dictionary_reconstructs_and_its_features_are_coordinates() -> None:
    sae, x = exact(), torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sae.reconstruct(x), x)
    torch.testing.assert_close(sae.encode(x), torch.cat([x @ sae.encoder[:32].T, -x @ sae.encoder[:32].T], 1).relu())


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("scaling", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("centred", [True, False])
def test_encoding_is_the_written_formula(activation: str, scaling: str, centred: bool) -> None:
    threshold = torch.full((20,), 1.5) if activation == "jumprelu" else None
    sae = random(activation=activation, threshold=threshold, top=3 if activation == "topk" else 0, centred=centred,
                 scaling=scaling)  # fmt: skip
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)) + 2
    inner, back = {
        "none": (x, lambda y: y),
        "constant_norm_rescale": (x * (32**0.5 / x.norm(dim=1, keepdim=True)),
                                  lambda y: y * x.norm(dim=1, keepdim=True) / 32**0.5),
        "layer_norm": ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5),
                       lambda y: y * x.std(1, keepdim=True) + x.mean(1, keepdim=True)),
    }[scaling]  # fmt: skip
    pre = (inner - sae.decoder_bias * centred) @ sae.encoder.T + sae.encoder_bias
    f = pre.relu()
    if activation == "jumprelu":
        f = f * (pre > 1.5)
    if activation == "topk":
        f = torch.where(f >= f.topk(3, dim=1).values[:, -1:], f, 0.0)
    torch.testing.assert_close(sae.encode(x), f, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.reconstruct(x), back(f @ sae.decoder + sae.decoder_bias), atol=1e-4, rtol=1e-4)


def test_a_threshold_in_place_of_top_k_keeps_as_many_and_makes_rows_independent() -> None:
    sae = random(activation="topk", top=3)
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(2))
    made = sae.thresholded(x)
    assert int((made.encode(x) > 0).sum()) == 400 * 3
    alone = dataclasses.replace(made, encoder=made.encoder[:1], decoder=made.decoder[:1],
                                encoder_bias=made.encoder_bias[:1], threshold=made.threshold[:1])  # fmt: skip
    torch.testing.assert_close(alone.encode(x)[:, 0], made.encode(x)[:, 0])
    with pytest.raises(UsageError, match="depends on all others"):
        sae.rows()


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_saved_and_read_it_is_the_same(activation: str, tmp_path: Path) -> None:
    sae = random(activation=activation, threshold=torch.rand(20) if activation == "jumprelu" else None,
                 top=4 if activation == "topk" else 0, scaling="layer_norm", site=Site("mlp_out", 1))  # fmt: skip
    folder = save(sae, tmp_path / "sae")
    assert read(folder).digest == sae.digest == read(folder / "cfg.json").digest
    assert read(folder, Site("mlp_out", 0)).site == Site("mlp_out", 0)
    config = json.loads((folder / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.hook_mlp_out"
    weights = folder / "sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        read(folder)


def write(folder: Path, config: dict[str, Any], **arrays: Tensor) -> Path:
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    plain = {"W_enc": torch.randn(8, 5, generator=g), "b_enc": torch.zeros(5), "W_dec": torch.randn(5, 8, generator=g),
             "b_dec": torch.ones(8)}  # fmt: skip
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({**plain, **arrays}, folder / "sae_weights.safetensors")
    return folder


def test_files_of_others_are_read(tmp_path: Path) -> None:
    old = read(write(tmp_path / "old", {"hook_name": "blocks.7.hook_resid_pre", "activation_fn_str": "relu",
                                        "apply_b_dec_to_input": False, "normalize_activations": None}))  # fmt: skip
    assert (old.site, old.activation, old.centred, old.size, old.width) == (Site("resid_pre", 7), "relu", False, 5, 8)
    nested = {"architecture": "jumprelu", "metadata": {"hook_name": "blocks.3.attn.hook_z"}}
    new = read(write(tmp_path / "new", nested, threshold=torch.full((5,), 0.25)))
    assert (new.site, new.centred) == (Site("attn_z", 3), True) and float(new.threshold[0]) == 0.25
    top = read(write(tmp_path / "top", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2},
                                        "hook_name": "blocks.0.hook_mlp_out"}))  # fmt: skip
    assert (top.activation, top.top) == ("topk", 2)
    rescaled = {"architecture": "topk", "k": 2, "metadata": {"hook_name": "blocks.0.hook_mlp_out"}}
    raw, folded = (read(write(tmp_path / str(flag), {**rescaled, "rescale_acts_by_decoder_norm": flag}))
                   for flag in (False, True))  # fmt: skip
    torch.testing.assert_close(folded.decoder.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(folded.encoder, raw.encoder * raw.decoder.norm(dim=1)[:, None])


def test_gemma_scope_arrays_are_read_as_the_output_of_their_block(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    arrays = {"W_enc": np.ones((8, 5), np.float32), "W_dec": np.ones((5, 8), np.float32),
              "b_enc": np.zeros(5, np.float32), "b_dec": np.zeros(8, np.float32),
              "threshold": np.full(5, 2.0, np.float32)}  # fmt: skip
    np.savez(folder / "params.npz", **arrays)
    sae = read(folder)
    assert (sae.site, sae.activation, sae.centred) == (Site("resid_post", 12), "jumprelu", False)
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(ArtifactError, match="say where the autoencoder belongs"):
        read(tmp_path / "params.npz")
    assert read(tmp_path / "params.npz", HERE).site == HERE
    np.savez(tmp_path / "params.npz", **{**arrays, "b_enc": np.array([object()], dtype=object)})
    with pytest.raises(ArtifactError, match="plain arrays"):
        read(tmp_path / "params.npz", HERE)


@pytest.mark.parametrize(("config", "arrays", "said"), [
    ({"architecture": "gated", "hook_name": "blocks.0.hook_resid_pre"}, {}, "architecture 'gated'"),
    ({"hook_name": "blocks.0.hook_resid_pre", "hook_name_out": "blocks.0.hook_mlp_out"}, {}, "hook_name_out"),
    ({"hook_name": "blocks.0.ln2.hook_normalized"}, {}, "no site here"),
    ({}, {}, "no site"),
    ({"architecture": "jumprelu", "hook_name": "blocks.0.hook_resid_pre"}, {}, "threshold"),
    ({"hook_name": "blocks.0.hook_resid_pre"}, {"b_enc": torch.zeros(4)}, "encoder_bias"),
    ({"hook_name": "blocks.0.hook_resid_pre"}, {"b_dec": torch.full((8,), torch.nan)}, "NaN"),
    ({"hook_name": "blocks.0.hook_resid_pre", "normalize_activations": "expected_average_only_in"}, {}, "scaling"),
    ({"architecture": "topk", "hook_name": "blocks.0.hook_resid_pre", "k": None}, {}, "active features 'None'"),
    ({"hook_name": "blocks.0.hook_resid_pre"}, {"W_dec": torch.ones(16, 8).long()}, "int64"),
    ({"metadata": [1], "activation_fn_kwargs": [1]}, {}, "no site"),
])  # fmt: skip
def test_files_that_are_not_understood_are_refused(
    config: dict[str, Any], arrays: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=said) as error:
        read(write(tmp_path / "sae", config, **arrays))
    assert str(error.value).count(". ") == 0


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no autoencoder at"):
        read(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"cfg\.json"):
        read(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no safetensors"):
        read(tmp_path)
    np.savez_compressed(tmp_path / "params.npz", W_enc=np.random.default_rng(0).normal(size=(8, 16)))
    whole = bytearray((tmp_path / "params.npz").read_bytes())
    for damaged in (b"", whole[:90] + bytes(40) + whole[130:]):
        (tmp_path / "params.npz").write_bytes(damaged)
        with pytest.raises(ArtifactError, match="plain arrays"):
            read(tmp_path / "params.npz")


def principal(model: LoadedModel, site: Site, rank: int) -> SparseAutoencoder:
    """An exact dictionary of the leading principal directions of a site, in both signs."""
    x = capture(model, [site], Batch.pad(TEXTS), "tokens")[site]
    mean = x.mean(0)
    rows = torch.linalg.svd(x - mean, full_matrices=False).Vh[:rank]
    both = torch.cat([rows, -rows])
    return SparseAutoencoder(site, both, both, torch.zeros(2 * rank), mean)


def test_the_unexplained_share_is_that_of_the_directions_left_out(model: LoadedModel) -> None:
    x = capture(model, [HERE], Batch.pad(TEXTS), "tokens")[HERE].double()
    squares = torch.linalg.svdvals(x - x.mean(0)).square()
    found = unexplained(model, principal(model, HERE, 6), TEXTS)[HERE]
    assert found == pytest.approx(float(squares[6:].sum() / squares.sum()), rel=1e-4)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "mlp_out"])
def test_an_autoencoder_one_site_off_is_refused_by_name(model: LoadedModel, kind: str) -> None:
    right = principal(model, Site(kind, 1), 8)
    assert min(check_site(model, right, TEXTS).values()) == check_site(model, right, TEXTS)[Site(kind, 1)]
    wrong = dataclasses.replace(right, site=Site(kind, 0))
    with pytest.raises(SiteError, match=rf"least variance unexplained at {kind}\.1"):
        check_site(model, wrong, TEXTS)
    stranger = dataclasses.replace(right, decoder_bias=right.decoder_bias + 100)  # worse than the mean everywhere
    with pytest.raises(SiteError, match="nor the sites beside it"):
        check_site(model, stranger, TEXTS)
    with pytest.raises(ArtifactError, match="32"):
        check_site(model, exact(d=16), TEXTS)


def test_activity_is_counted_on_tokens_but_first_ones(model: LoadedModel) -> None:
    sae = exact()
    x = capture(model, [HERE], Batch.pad(TEXTS), "tokens")[HERE]
    found = measure(model, sae, TEXTS)
    assert found.tokens == len(x)
    torch.testing.assert_close(found.mean.float(), sae.encode(x).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.frequency.float(), (sae.encode(x) > 0).float().mean(0))
    halves = measure(model, sae, TEXTS[:25]).joined(measure(model, sae, TEXTS[25:]))
    torch.testing.assert_close(halves.mean, found.mean)


def test_rules_of_selection() -> None:
    forget = Activity(100, torch.tensor([4.0, 4.0, 1.0, 0.0]).double(), torch.tensor([0.5, 0.2, 0.4, 0.0]).double())
    retain = Activity(100, torch.tensor([4.0, 0.1, 0.5, 1.0]).double(), torch.tensor([0.5, 0.005, 0.3, 0.2]).double())
    assert importance_ratio(forget, retain, 60).tolist() == [0, 16, 1, 0]
    assert importance_ratio(forget, retain, 100).tolist() == [0, 16, 0, 0]
    assert importance_ratio(forget, retain, 0).tolist() == [16, 16, 1, 0]
    assert frequency_difference(forget, retain, 3).tolist() == pytest.approx([0, 0.195, 0, 0])
    assert rare_elsewhere(forget, retain, 0.01).tolist() == pytest.approx([0, 0.2, 0, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 4))
def test_the_sequence_gate_looks_back_only(flags: list[bool], share: float, prior: float) -> None:
    active, tokens = torch.tensor([flags]), torch.arange(1, len(flags) + 1)[None]
    found = share_open(active, tokens, share, prior)[0].tolist()
    shares = highest_share(active, tokens, prior)[0].tolist()
    for t in range(len(flags)):
        assert found[t] == any(s > share for s in shares[: t + 1])
        assert share_open(active[:, : t + 1], tokens[:, : t + 1], share, prior)[0, -1].item() == found[t]


def test_training_finds_a_planted_dictionary_and_leaves_the_model_alone(model: LoadedModel) -> None:
    """What a random autoencoder cannot: variance explained with few features per token, the same twice."""
    state = torch.random.get_rng_state()
    made, again = (train_features(model, [HERE], TEXTS, size=64, active=8, steps=60, seed=1)[HERE] for _ in range(2))
    assert made.sae.digest == again.sae.digest and torch.equal(torch.random.get_rng_state(), state)
    assert made.unexplained < 0.5 and made.sae.activation == "jumprelu"
    assert made.unexplained == pytest.approx(unexplained(model, made.sae, TEXTS)[HERE])
    assert 4 < float(measure(model, made.sae, TEXTS).frequency.sum()) < 12
    torch.testing.assert_close(made.sae.decoder.norm(dim=1), torch.ones(64))
    with pytest.raises(UsageError, match="fewer active"):
        train_features(model, [HERE], TEXTS, size=8, active=8)
