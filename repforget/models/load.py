"""Hub id, local folder or embedded organism -> model and tokenizer, safely and always in the same way."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repforget.errors import ModelLoadError, ResourceError, nearest
from repforget.models import _files
from repforget.models._files import locate
from repforget.models._fingerprint import fingerprint
from repforget.models._names import core, text_config

__all__ = ["LoadedModel", "ModelEstimate", "copy_of", "estimate", "fingerprint", "load", "wrap"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
QUIET_BELOW = 1 << 29  # bytes of weights that load in about a second
CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
IGNORED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode with its tokenizer and the hash of what was loaded.

    ``fingerprint`` describes the weights at loading; call :func:`fingerprint` on ``module`` after changing
    them.
    """

    name: str
    module: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Device on which token ids enter the model."""
        from repforget.models._hooking import input_device

        return input_device(core(self.module))

    @property
    def dtype(self) -> torch.dtype:
        return core(self.module).dtype  # type: ignore[return-value]

    @property
    def n_layers(self) -> int:
        return int(text_config(core(self.module)).num_hidden_layers)

    @property
    def width(self) -> int:
        return int(text_config(core(self.module)).hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding: the length of a logits vector, not of the tokenizer."""
        return len(core(self.module).get_input_embeddings().weight)  # type: ignore[operator]


@dataclass(frozen=True)
class ModelEstimate:
    """What a model will need, read from its configuration and file headers without loading a weight.

    ``bytes`` is what the weights occupy once loaded in ``dtype``; activations, gradients and optimiser come
    on top.  ``shapes`` are those of the tensors in the files, by name.
    """

    name: str
    parameters: int
    file_bytes: int
    bytes: int
    dtype: str
    layers: int
    width: int
    vocab_size: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()


def load(
    name: str, *, device: str = "auto", dtype: str | torch.dtype = "auto", device_map: Any = None,
    attention: str = "sdpa", trust_remote_code: bool = False, revision: str | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a causal language model and its tokenizer.

    Args:
        name: a hub id ("owner/model"), a local folder, or an organism ("organism:bios",
        "organism:bios/twin-0").
        device: "auto" (an accelerator where there is one) or a torch device.
        dtype: "auto" or a torch dtype or its name; "auto" is the checkpoint's own, but float32 on a CPU,
            where half precision is slow and imprecise.
        device_map: passed to transformers for models that need several devices; then ``device`` must be
        "auto".
        attention: one attention implementation for the whole run; architectures without "sdpa" use "eager".
        trust_remote_code: allow code that comes with a checkpoint to run.

    Raises:
        ModelLoadError: one sentence for everything that cannot be loaded safely: unknown names, folders
        without safetensors, devices that do not exist, checkpoints whose tensors do not match the
        architecture.
        ResourceError: the weights do not fit into the free memory; said before anything is loaded.
    """
    source, folder = _place(name, revision)
    if device_map is not None and device != "auto":
        raise ModelLoadError(f"Both device '{device}' and device_map were given: choose one of them.")
    place = device_of(device)
    config = _config(name, source, trust_remote_code, revision)
    kind = _dtype(dtype, config, place, folder)
    if folder is not None:
        _refuse_too_large(name, folder, kind, None if device_map is not None else place)
    from transformers import AutoModelForCausalLM

    arguments = {
        "dtype": kind, "attn_implementation": _attention(attention, config), "device_map": device_map,
        "use_safetensors": True, "trust_remote_code": trust_remote_code, "output_loading_info": True,
    }  # fmt: skip
    if revision is not None:
        arguments["revision"] = revision
    try:
        with _quiet(folder):
            module, report = AutoModelForCausalLM.from_pretrained(source, **arguments)
        if device_map is None:
            module = module.to(place)
    except torch.OutOfMemoryError as reason:
        raise ResourceError(f"Model '{name}' does not fit on {place}; use a smaller dtype, another device or "
                            "a device_map.") from reason  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as reason:
        raise _refusal(name, reason) from reason
    _check_report(name, report)
    return wrap(module, _tokenizer(name, source, trust_remote_code, revision), name)


def wrap(module: Any, tokenizer: Any, name: str = "in-memory") -> LoadedModel:
    """Make a LoadedModel of a module that is already in memory; puts it into evaluation mode."""
    module.eval()
    if tokenizer is not None and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.unk_token
    return LoadedModel(name, module, tokenizer, fingerprint(module))


def copy_of(model: LoadedModel) -> LoadedModel:
    """Return an independent deep copy, for whatever changes weights; attached hooks stay attached to the copy."""
    return LoadedModel(model.name, copy.deepcopy(model.module), model.tokenizer, model.fingerprint)


def estimate(
    name: str, *, device: str = "auto", dtype: str | torch.dtype = "auto", trust_remote_code: bool = False,
    revision: str | None = None,
) -> ModelEstimate:  # fmt: skip
    """Return what a model needs, from its configuration and safetensors headers alone (no weight is loaded)."""
    source, folder = _place(name, revision)
    config = _config(name, source, trust_remote_code, revision)
    entries = list(_files.headers(folder)) if folder is not None else _hub_headers(name, revision)
    total, size, code = _files.count(iter(entries))
    kind = _dtype(dtype, config, device_of(device), folder, code)
    text = config.get_text_config()
    itemsize = torch.empty((), dtype=kind).element_size()
    return ModelEstimate(name, total, size, total * itemsize, str(kind).removeprefix("torch."),
                         int(text.num_hidden_layers), int(text.hidden_size), int(text.vocab_size),
                         tuple((tensor, shape) for tensor, _, shape in entries))  # fmt: skip


def _place(name: str, revision: str | None) -> tuple[str, Path | None]:
    """Source and folder of a name; the folder of its downloaded copy where the hub cannot be reached."""
    source, folder = locate(name)
    if folder is None and (folder := _files.without_hub(name, revision)) is not None:
        source = str(folder)
    return source, folder


def _hub_headers(name: str, revision: str | None) -> list[tuple[str, str, tuple[int, ...]]]:
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(name, revision=revision)
    except Exception as reason:  # the hub client raises errors of several libraries
        raise _refusal(name, reason) from reason
    return [(tensor, info.dtype, tuple(info.shape)) for file in metadata.files_metadata.values()
            for tensor, info in file.tensors.items()]  # fmt: skip


def device_of(device: str) -> torch.device:
    """The torch device of a name; "auto" is an accelerator where there is one, each process's own where several run."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = torch.device("meta")
    valid = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    valid += ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if str(wanted) not in valid and str(wanted) != "cpu:0":
        raise ModelLoadError(f"Device '{device}' does not exist on this machine: {nearest(device, valid)}")
    return wanted


def _dtype(
    dtype: str | torch.dtype, config: Any, device: torch.device, folder: Path | None, code: str | None = None
) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelLoadError(f"Dtype '{dtype}' is unknown: {nearest(dtype, DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    stated = getattr(config, "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    found = code or (_files.count(_files.headers(folder))[2] if folder is not None else "F32")
    return DTYPES[CODES.get(found, "float32")]


def _config(name: str, source: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as reason:
        raise _refusal(name, reason) from reason


def _attention(wanted: str, config: Any) -> str:
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    cls = mapping.get(type(config), None)
    cls = cls[0] if isinstance(cls, tuple) else cls
    if wanted == "sdpa" and cls is not None and not getattr(cls, "_supports_sdpa", True):
        return "eager"
    return wanted


@contextmanager
def _quiet(folder: Path | None) -> Iterator[None]:
    """Show transformers' progress bar only for local models that take a while."""
    from transformers.utils import logging

    small = folder is not None and sum(p.stat().st_size for p in _files.weight_files(folder)) < QUIET_BELOW
    if not small or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _tokenizer(name: str, source: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as reason:  # tokenizer files fail in the ways of several libraries
        raise ModelLoadError(f"The tokenizer of '{name}' cannot be loaded ({_short(reason)}); a model folder "
                             "needs its tokenizer files beside the weights.") from reason  # fmt: skip
    tokenizer.padding_side = "right"
    return tokenizer


def _refuse_too_large(name: str, folder: Path, dtype: torch.dtype, device: torch.device | None) -> None:
    total, _, _ = _files.count(_files.headers(folder))
    needed = total * torch.empty((), dtype=dtype).element_size()
    free = needed if device is None or device.type == "mps" else free_memory(device)
    if needed > free:
        raise ResourceError(f"Model '{name}' needs {needed / 2**30:.1f} GiB for its weights in {dtype} and "
                            f"{free / 2**30:.1f} GiB are free on {device}; use a smaller dtype, another "
                            "device or a device_map.")  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device (those of the machine where the device has none of its own)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _check_report(name: str, report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys", ()))
    shapes = report.get("mismatched_keys", ())
    mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in shapes)
    extra = sorted(key for key in report.get("unexpected_keys", ()) if not key.endswith(IGNORED))
    for what, keys in (("lacks", missing), ("holds in another shape", mismatched), ("holds beyond it", extra)):
        if keys:
            raise ModelLoadError(f"The checkpoint of '{name}' does not match its architecture: it {what} "
                                 f"{len(keys)} tensors, first '{keys[0]}', so that the loaded model would "
                                 "not be the saved one; check config.json.")  # fmt: skip


def _refusal(name: str, reason: Exception) -> ModelLoadError:
    text = str(reason)
    if "trust_remote_code" in text:
        return ModelLoadError(f"Model '{name}' brings its own code, which repforget does not run unless you "
                              "say trust_remote_code: true.")  # fmt: skip
    if "safetensors" in text:
        return ModelLoadError(f"Model '{name}' has no safetensors weights, and other formats can run code when they "
                              f"are read ({_short(reason)}); choose a revision that has them.")  # fmt: skip
    if isinstance(reason, json.JSONDecodeError):
        return ModelLoadError(f"The config.json of '{name}' is not valid JSON ({_short(reason)}).")
    if not Path(name).exists() and not name.startswith(_files.ORGANISM):
        return ModelLoadError(f"Model '{name}' is neither a local folder nor reachable on the hub "
                              f"({_short(reason)}); check the name and the network, or use a folder or "
                              "'organism:bios'.")  # fmt: skip
    return ModelLoadError(f"Model '{name}' cannot be loaded: {_short(reason)}.")


def _short(reason: Exception, limit: int = 160) -> str:
    line = str(reason).strip().split("\n")[0].rstrip(".") or type(reason).__name__
    return line if len(line) <= limit else line[:limit] + "..."


def module_of(model: LoadedModel | nn.Module) -> nn.Module:
    """Return the plain module of a LoadedModel, a compiled module or an adapter wrapper."""
    return core(model)
