"""A hash of what a model is: names, shapes and values of its parameters and saved buffers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from repforget.errors import ModelLoadError
from repforget.models._names import core

CHUNK = 1 << 24  # elements hashed at a time, so that memory does not grow with the tensor


def fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a model's content as 64 hex digits.

    Values are hashed in float32 (float64 where a tensor is float64), so that the same checkpoint has one
    fingerprint whether it is held in bfloat16 on an accelerator or widened to float32 on a CPU. Hooks,
    compilation, device and whether equal tensors are tied make no difference. Cost: one read of all weights;
    memory of one chunk per thread.
    """
    module = core(module)
    state = module.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    away = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if away is not None:
        raise ModelLoadError(f"Weight '{away}' is offloaded from memory, so that the model's content cannot be "
                             "hashed; use a device_map without offloading, or a smaller dtype.")  # fmt: skip
    distinct = {(t.data_ptr(), t.shape, t.dtype, t.device, t.stride()): t for t in tensors.values()}
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing releases the interpreter lock
        digests = dict(zip(distinct, pool.map(_digest, distinct.values()), strict=True))
    keys = {name: (t.data_ptr(), t.shape, t.dtype, t.device, t.stride()) for name, t in tensors.items()}
    return _whole(type(module).__name__, {name: digests[key] for name, key in keys.items()})


def fingerprint_of(kind: str, names: Mapping[str, str], read: Callable[[str], Tensor]) -> str:
    """The :func:`fingerprint` of a model of class ``kind`` from its tensors one at a time.

    ``names``: of the state -> what ``read`` is asked for; names of one stored tensor are read once.
    """
    stored = {where: _digest(read(name)) for name, where in names.items() if name == where}
    return _whole(kind, {name: stored[where] if where in stored else _digest(read(name))
                         for name, where in names.items()})  # fmt: skip


def _whole(kind: str, digests: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256(kind.encode())
    for name in sorted(digests):
        whole.update(name.encode() + b"\0" + digests[name])
    return whole.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        if part.is_floating_point():
            part = part.to("cpu", torch.float64 if part.dtype == torch.float64 else torch.float32)
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Identity of the way a tokenizer cuts text: equal digests give equal tokens."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
