"""An edit on disk: ``edit.json`` (manifest and operations) beside ``edit.safetensors`` (their tensors)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repforget.artifact.operations import KINDS, Gate, Operation
from repforget.errors import ArtifactError, ResourceError, SiteError
from repforget.guarantee import Guarantee
from repforget.records import FORMAT_VERSION, Site

if TYPE_CHECKING:
    from repforget.artifact.edit import Edit

JSON, TENSORS = "edit.json", "edit.safetensors"


def _parts(value: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A frozen value as (JSON fields, tensors); a gate's parts are named ``gate.<field>``."""
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            tensors[field.name] = item
        elif isinstance(item, Gate):
            inner, held = _parts(item)
            fields[field.name] = inner
            tensors.update({f"{field.name}.{name}": tensor for name, tensor in held.items()})
        elif item is not None:
            fields[field.name] = str(item) if isinstance(item, Site) else item
    return fields, tensors


def arrays(operations: Sequence[Operation]) -> dict[str, Tensor]:
    """All tensors of a list of operations, named ``<number>.<field>``."""
    return {f"{n}.{name}": t for n, op in enumerate(operations) for name, t in _parts(op)[1].items()}


def _restored(cls: type[Any], fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    given: dict[str, Any] = {**fields, **own}
    if "gate" in given:
        inner = {name.removeprefix("gate."): t for name, t in tensors.items() if name.startswith("gate.")}
        given["gate"] = _restored(Gate, given["gate"], inner)
    if "site" in given:
        given["site"] = Site.parse(given["site"])
    if not set(given) <= known:
        raise KeyError(sorted(set(given) - known)[0])
    return cls(**given)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(edit: Edit, folder: Path) -> Path:
    """Write the edit by way of a temporary folder beside it; a crash leaves the old or the new one, whole."""
    from safetensors.torch import save as to_bytes

    if folder.exists() and not (folder / JSON).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ArtifactError(f"'{folder}' exists and is not an edit: choose an empty or new folder.")
    tensors = to_bytes({k: v.contiguous() for k, v in arrays(edit.operations).items()})
    body = {
        "manifest": dataclasses.asdict(edit.manifest),
        "operations": [{"kind": op.kind, **_parts(op)[0]} for op in edit.operations],
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            (work / TENSORS).write_bytes(tensors)
            (work / JSON).write_text(text, encoding="utf-8")
            os.chmod(work, 0o755)
            for path in (work / TENSORS, work / JSON, work):
                _fsync(path)
            _replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ResourceError(f"The edit could not be written to '{folder}': "
                            f"{error.strerror or error}.") from None  # fmt: skip
    return folder


def _replace(work: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old)
        os.rename(work, folder)
        shutil.rmtree(old)
    else:
        os.rename(work, folder)
    _fsync(folder.parent)


def load_edit(folder: str | Path) -> Edit:
    """Read an edit back; ArtifactError (one sentence) when it is missing, damaged or of another format."""
    from repforget.artifact.edit import Edit, EditManifest

    folder = Path(folder)
    body, tensors = _read(folder)
    version = body.get("manifest", {}).get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(f"'{folder / JSON}' has format version {version} and this release reads "
                            f"{FORMAT_VERSION}: make the edit again, or use the release that wrote "
                            "it.")  # fmt: skip
    try:
        fields = dict(body["manifest"])
        for name in ("sites", "weights", "notes"):
            fields[name] = tuple(fields[name])
        held = fields.get("guarantee")
        fields["guarantee"] = None if held is None else Guarantee.from_json(held)
        manifest = EditManifest(**fields)
        operations = tuple(_operation(n, entry, tensors) for n, entry in enumerate(body["operations"]))
    except (KeyError, TypeError, ValueError, AttributeError, SiteError) as error:
        raise ArtifactError(f"'{folder / JSON}' does not describe an edit ({error}): it is damaged, so take "
                            "it from a backup or make the edit again.") from None  # fmt: skip
    return Edit(manifest, operations)


def _operation(number: int, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Operation:
    prefix = f"{number}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    fields = {name: value for name, value in entry.items() if name != "kind"}
    operation: Operation = _restored(KINDS[entry["kind"]], fields, own)
    return operation


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        body = json.loads((folder / JSON).read_text(encoding="utf-8"))
        raw = (folder / TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no edit at '{folder}': '{Path(error.filename).name}' is "
                            "missing.") from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise ArtifactError(f"The edit at '{folder}' cannot be read ({error}): take it from a backup or make "
                            "it again.") from None  # fmt: skip
    if not isinstance(body, dict) or not isinstance(body.get("manifest"), dict):
        raise ArtifactError(f"'{folder / JSON}' is not the manifest of an edit: give the folder that "
                            "Edit.save wrote.")
    if hashlib.sha256(raw).hexdigest() != body.get("tensors_sha256"):
        raise ArtifactError(f"'{folder / TENSORS}' does not match its manifest: it is truncated or damaged, "
                            "so take it from a backup or make the edit again.")  # fmt: skip
    try:
        return body, from_bytes(raw)
    except SafetensorError as error:
        raise ArtifactError(f"'{folder / TENSORS}' is no safetensors file ({error}): make the edit "
                            "again.") from None  # fmt: skip
