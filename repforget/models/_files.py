"""Names of models -> folders and files, and what a checkpoint's headers say before anything is loaded."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from repforget.errors import ModelLoadError, nearest

ORGANISM = "organism:"
ORGANISMS = ("bios", "bios/twin-0", "bios/twin-1")
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
          "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip


def locate(name: str) -> tuple[str, Path | None]:
    """Return (source, folder): the folder of a local model or organism, or None when ``name`` is a hub id."""
    if name.startswith(ORGANISM):
        folder = _organism(name)
        return str(folder), folder
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), _checked_folder(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ModelLoadError(f"'{name}' is not a model folder: give a folder with config.json and "
                             f"*.safetensors, a hub id such as 'owner/model', or "
                             f"'organism:bios'{_sibling(path)}.")  # fmt: skip
    return name, None


def without_hub(name: str, revision: str | None) -> Path | None:
    """The downloaded copy of a hub model where the hub cannot be reached; None where it can.

    Asked once instead of through the client, which tries again for half a minute. ModelLoadError where neither is
    there.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    reason = "offline mode is on" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if reason is None:
        return None
    config = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    if isinstance(config, str):
        return _checked_folder(Path(config).parent)
    raise ModelLoadError(f"Model '{name}' is neither a local folder nor reachable on the hub ({reason}, and no copy "
                         "was downloaded before); check the name and the network, or use a folder or "
                         "'organism:bios'.")  # fmt: skip


def _unreachable(address: str) -> str | None:
    """Why nothing answers at a web address; None where something does, or where a proxy is asked instead."""
    place = urlsplit(address)
    if not place.hostname or {place.scheme, "all"} & getproxies().keys():
        return None
    try:
        socket.create_connection((place.hostname, place.port or (80 if place.scheme == "http" else 443)), 5).close()
    except OSError as reason:
        return f"{place.hostname} cannot be reached: {reason.strerror or reason}"
    return None


def _organism(name: str) -> Path:
    wanted = name.removeprefix(ORGANISM)
    root = Path(str(resources.files("repforget"))) / "organism" / "weights"
    if wanted not in ORGANISMS:
        valid = [ORGANISM + known for known in ORGANISMS]
        raise ModelLoadError(f"There is no organism '{name}': {nearest(name, valid)}")
    folder = root / wanted.replace("/", "-")
    if not folder.is_dir():
        raise ModelLoadError(f"The weights of '{name}' are not part of this installation (looked for "
                             f"organism/weights/{folder.name}); reinstall repforget.")  # fmt: skip
    return _checked_folder(folder)


def _sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    folders = [p.name for p in path.parent.iterdir() if (p / "config.json").is_file()]
    return f" ({nearest(path.name, folders)})" if folders else ""


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"Folder '{folder}' has no config.json: a model folder needs config.json, a "
                             "tokenizer and *.safetensors, as save_pretrained writes them.")  # fmt: skip
    if not weight_files(folder):
        unsafe = sorted(p.name for p in folder.iterdir() if p.suffix in UNSAFE)
        found = f"only {unsafe[0]}, a format that can run code when it is read" if unsafe else "no weights"
        raise ModelLoadError(f"Folder '{folder}' holds {found}: repforget loads *.safetensors alone; convert "
                             "it with save_pretrained in an environment that you trust.")  # fmt: skip
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder (those of the index, where there is one)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise ModelLoadError(f"'{index}' is not a readable index of safetensors files; save the model "
                                 "again.") from None  # fmt: skip
        absent = sorted(name for name in names if not (folder / name).is_file())
        if absent:
            raise ModelLoadError(f"Folder '{folder}' lacks {len(absent)} of {len(names)} weight files, first "
                                 f"'{absent[0]}'; copy the model again.")  # fmt: skip
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("model*.safetensors"))
    return files or sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))


def headers(folder: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (tensor name, dtype code, shape) from the headers of a folder's safetensors files."""
    for path in weight_files(folder):
        for name, entry in _header(path).items():
            if name != "__metadata__":
                yield name, entry["dtype"], tuple(entry["shape"])


def checked(folder: Path) -> Path:
    """The folder itself, once it is seen to hold a configuration and safetensors files; ModelLoadError otherwise."""
    if not folder.is_dir():
        raise ModelLoadError(f"'{folder}' is not a model folder: give a folder with config.json and *.safetensors.")
    return _checked_folder(folder)


def tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> its header entry (dtype, shape, data_offsets) and ``start``, where the data of the file begin."""
    header = _header(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    return {name: {**entry, "start": 8 + length} for name, entry in header.items() if name != "__metadata__"}


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end > path.stat().st_size:
            raise ValueError("tensors end after the file")
    except (ValueError, struct.error, KeyError, TypeError, OSError) as reason:
        raise ModelLoadError(f"'{path}' is not a whole safetensors file ({reason}); copy or download it "
                             "again.") from None  # fmt: skip
    return header  # type: ignore[no-any-return]


def count(entries: Iterator[tuple[str, str, tuple[int, ...]]]) -> tuple[int, int, str]:
    """Return (parameters, bytes in the files, most frequent dtype code by size)."""
    total, size, by_code = 0, 0, dict[str, int]()
    for _, code, shape in entries:
        number = math.prod(shape)
        total += number
        size += number * WIDTHS.get(code, 4)
        by_code[code] = by_code.get(code, 0) + number
    return total, size, max(by_code, key=lambda code: by_code[code]) if by_code else "F32"
