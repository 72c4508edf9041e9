"""Loading: the right model or one sentence, and a fingerprint that depends on content alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import ALL, LAYERS, VOCAB, WIDTH, build, sample_ids, tiny_tokenizer

from repforget.errors import ModelLoadError, ResourceError
from repforget.models import _files
from repforget.models.capture import Batch, forward, hooks
from repforget.models.load import copy_of, estimate, fingerprint, load, wrap
from repforget.records import Site

BATCH = Batch.pad(sample_ids())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    build("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def altered(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ALL)
def test_a_saved_model_comes_back_the_same(name: str, tmp_path: Path) -> None:
    module = build(name)
    module.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert model.fingerprint == fingerprint(module) and len(model.fingerprint) == 64
    real = BATCH.mask.bool()
    torch.testing.assert_close(forward(model, BATCH)[real], forward(module, BATCH)[real], atol=1e-5, rtol=1e-5)
    assert (model.n_layers, model.width, model.vocab_size) == (LAYERS, WIDTH, VOCAB)
    assert not model.module.training and model.dtype == torch.float32
    guess = estimate(str(tmp_path))
    stored = sum(p.numel() for p in module.parameters())
    assert guess.parameters == stored and guess.bytes == 4 * stored
    assert (guess.layers, guess.width, guess.vocab_size) == (LAYERS, WIDTH, VOCAB)


def test_attention_is_one_implementation(folder: Path) -> None:
    assert load(str(folder)).module.config._attn_implementation == "sdpa"
    assert load(str(folder), attention="eager").module.config._attn_implementation == "eager"


def test_dtypes(folder: Path, tmp_path: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path), device="cpu").dtype == torch.float32  # half precision on a CPU is slow and imprecise
    assert load(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16
    assert load(str(folder), dtype=torch.float64).dtype == torch.float64
    half, full = estimate(str(tmp_path), dtype="bfloat16"), estimate(str(tmp_path), dtype="float32")
    assert 2 * half.bytes == full.bytes and half.file_bytes == half.bytes
    with pytest.raises(ModelLoadError, match="did you mean 'float32'"):
        load(str(folder), dtype="float23")


def test_the_tokenizer_is_ready_for_batches(folder: Path) -> None:
    tokenizer = load(str(folder)).tokenizer
    assert tokenizer.padding_side == "right" and tokenizer.pad_token_id is not None
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert wrap(build("llama"), bare).tokenizer.pad_token == "<eos>"


# --- fingerprint -------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_content_alone() -> None:
    module = build("gpt2")
    expected = fingerprint(module)
    assert fingerprint(build("gpt2")) == expected
    with hooks(module, {Site("resid_post", 0): torch.zeros_like}):
        assert fingerprint(module) == expected
    assert fingerprint(torch.compile(module, backend="eager")) == expected  # type: ignore[arg-type]
    module.compile(backend="eager")
    module.requires_grad_(False)
    module.transformer.h[0].mlp.c_fc.weight.data = module.transformer.h[0].mlp.c_fc.weight.data.T.contiguous().T
    assert fingerprint(module) == expected  # another memory layout, the same numbers
    assert fingerprint(build("gpt2", seed=1)) != expected


def test_a_wider_dtype_of_the_same_numbers_has_the_same_fingerprint() -> None:
    half = build("llama").to(torch.bfloat16)
    assert fingerprint(half) == fingerprint(build("llama").to(torch.bfloat16).float()) != fingerprint(build("llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_single_entry_counts(name: str) -> None:
    module = build(name)
    seen = {fingerprint(module)}
    tensors = [*module.parameters(), *(b for n, b in module.named_buffers() if n in module.state_dict())]
    for tensor in tensors:
        flat = tensor.data.view(-1)
        old = flat[-1].clone()
        flat[-1] = torch.nextafter(old, torch.tensor(9.0))
        seen.add(fingerprint(module))
        flat[-1] = old
    assert len(seen) == len(tensors) + 1
    assert fingerprint(module) in seen


def test_swapped_tensors_and_chunks_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget.models import _fingerprint

    module = build("llama")
    before = fingerprint(module)
    first, second = (block.self_attn.q_proj.weight for block in module.model.layers)
    swapped = first.data.clone()
    first.data, second.data = second.data, swapped
    assert fingerprint(module) != before
    whole = fingerprint(module)
    monkeypatch.setattr(_fingerprint, "CHUNK", 100)
    assert fingerprint(module) == whole  # the result does not depend on the chunk


def test_a_copy_is_independent() -> None:
    model = wrap(build("llama_tied"), tiny_tokenizer())
    copied = copy_of(model)
    assert copied.fingerprint == model.fingerprint == fingerprint(copied.module)
    with torch.no_grad():
        copied.module.model.embed_tokens.weight.zero_()
    assert fingerprint(model.module) == model.fingerprint != fingerprint(copied.module)
    assert copied.module.lm_head.weight is copied.module.model.embed_tokens.weight  # still tied


# --- refusals ----------------------------------------------------------------------------------------------


def sentence(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_pickled_weights_are_refused(altered: Path) -> None:
    (altered / "model.safetensors").unlink()
    torch.save(build("llama").state_dict(), altered / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin, a format that can run code") as error:
        load(str(altered))
    sentence(error)
    (altered / "pytorch_model.bin").unlink()
    with pytest.raises(ModelLoadError, match="holds no weights"):
        estimate(str(altered))


def test_damaged_files_are_refused_before_loading(altered: Path) -> None:
    weights = altered / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"\xff" * 100, b""):
        weights.write_bytes(damaged)
        with pytest.raises(ModelLoadError, match="not a whole safetensors file") as error:
            load(str(altered))
        sentence(error)
    weights.unlink()
    (altered / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelLoadError, match="lacks 1 of 1 weight files"):
        load(str(altered))
    (altered / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not a readable index"):
        load(str(altered))


def test_a_checkpoint_that_does_not_match_is_refused(altered: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = str(altered / "model.safetensors")
    whole = load_file(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    cases = {
        "lacks": {k: v for k, v in whole.items() if k != name},
        "holds beyond it": {**whole, name.replace("weight", "bias"): torch.zeros(WIDTH)},
    }
    for words, tensors in cases.items():
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match=rf"{words} 1 tensors, first 'model\.layers\.1\.mlp\.down_proj"):
            load(str(altered))
    save_file({**whole, name: torch.zeros(WIDTH, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError):
        load(str(altered))
    ignored = {**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(ignored, weights, metadata={"format": "pt"})
    assert load(str(altered)).fingerprint == fingerprint(build("llama"))


def test_folders_that_are_no_models(altered: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="did you mean 'copy'"):
        load(str(altered.parent / "copi"))
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load(str(tmp_path))
    (altered / "tokenizer.json").unlink()
    (altered / "tokenizer_config.json").unlink()
    with pytest.raises(ModelLoadError, match="tokenizer") as error:
        load(str(altered))
    sentence(error)
    (altered / "config.json").write_text("{")
    with pytest.raises(ModelLoadError) as error:
        load(str(altered))
    sentence(error)


def test_code_of_a_checkpoint_is_not_run(altered: Path) -> None:
    config = json.loads((altered / "config.json").read_text())
    config.update(model_type="custom", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (altered / "config.json").write_text(json.dumps(config))
    marker = altered / "was-run"
    (altered / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ModelLoadError, match="trust_remote_code: true") as error:
        load(str(altered))
    sentence(error)
    assert not marker.exists()


def test_devices_that_do_not_exist(folder: Path) -> None:
    for device in ("cuda:99", "gpu", "cpu:3", "meta"):
        with pytest.raises(ModelLoadError, match=f"Device '{device}' does not exist"):
            load(str(folder), device=device)
    with pytest.raises(ModelLoadError, match="choose one of them"):
        load(str(folder), device="cpu", device_map="auto")
    assert load(str(folder), device="cpu").device == torch.device("cpu")


def test_device_maps_are_supported(folder: Path) -> None:
    model = load(str(folder), device_map={"": "cpu"})
    assert torch.equal(forward(model, BATCH), forward(load(str(folder), device="cpu"), BATCH))


def test_too_little_memory_is_said_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget.models import load as room

    monkeypatch.setattr(room, "free_memory", lambda _device: 1000)
    with pytest.raises(ResourceError, match="are free on cpu"):
        load(str(folder), device="cpu")


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for request in (load, estimate):
        with pytest.raises(ModelLoadError, match="neither a local folder nor reachable on the hub") as error:
            request("nobody/nothing")
        assert "organism:bios" in sentence(error)


def test_without_a_network_the_answer_comes_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    tried: list[Any] = []

    def connect(place: Any, seconds: float) -> Any:
        tried.append(place)
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(_files.socket, "create_connection", connect)
    monkeypatch.setattr(_files, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for request in (load, estimate):
        with pytest.raises(ModelLoadError, match="hub.example cannot be reached: Name or service not known") as error:
            request("gpt2")
        assert "organism:bios" in sentence(error)
    assert tried == [("hub.example", 443)] * 2
    copy = tmp_path / "models--owner--model" / "snapshots" / "abc"  # as the client lays out what it downloads
    shutil.copytree(folder, copy)
    (copy.parents[1] / "refs").mkdir()
    (copy.parents[1] / "refs" / "main").write_text("abc")
    assert load("owner/model").name == "owner/model" and len(tried) == 3
    monkeypatch.setattr(_files, "getproxies", lambda: {"https": "http://proxy.example"})
    assert _files.without_hub("owner/model", None) is None and len(tried) == 3
    monkeypatch.setattr(_files.socket, "create_connection", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(_files, "getproxies", dict)
    assert _files.without_hub("gpt2", None) is None  # the hub is asked


def test_estimates_of_hub_models_read_headers_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsRepoMetadata
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata, TensorInfo

    from repforget.models import load as room

    infos = {n: TensorInfo(dtype=c, shape=list(s), data_offsets=(0, 0)) for n, c, s in _files.headers(folder)}
    one = SafetensorsFileMetadata(metadata={}, tensors=infos)
    files = {"model.safetensors": one}
    whole = SafetensorsRepoMetadata(metadata=None, sharded=False, weight_map={}, files_metadata=files)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda _name, revision=None: whole)
    config = room._config("local", str(folder), False, None)
    monkeypatch.setattr(room, "_config", lambda *_: config)
    monkeypatch.setattr(_files, "without_hub", lambda *_: None)
    ours, local = estimate("owner/model"), estimate(str(folder))
    assert (ours.parameters, ours.bytes, ours.dtype) == (local.parameters, local.bytes, local.dtype)


def test_offloaded_weights_cannot_be_hashed() -> None:
    module = build("llama")
    module.model.layers[0].mlp.down_proj.to("meta")
    with pytest.raises(ModelLoadError, match=r"layers\.0\.mlp\.down_proj\.weight' is offloaded"):
        fingerprint(module)


def test_organisms_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="did you mean 'organism:bios'"):
        load("organism:bio")
    weights = tmp_path / "organism" / "weights"
    shutil.copytree(folder, weights / "bios-twin-1")
    monkeypatch.setattr(_files.resources, "files", lambda _package: tmp_path)
    assert load("organism:bios/twin-1").name == "organism:bios/twin-1"
    with pytest.raises(ModelLoadError, match="not part of this installation"):
        load("organism:bios/twin-0")


