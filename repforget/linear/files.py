"""A head on disk: ``head.json``, which names its tensors file; a crash leaves the old head or the new one, whole."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repforget.errors import ArtifactError, UsageError
from repforget.linear.budget import Budget
from repforget.linear.head import Head
from repforget.linear.logistic import Logistic
from repforget.linear.release import Release
from repforget.linear.ridge import Ridge
from repforget.linear.rows import Index
from repforget.linear.softmax import Softmax
from repforget.store import Store, json_bytes, read_json, refusing, write_atomic

JSON, FORMAT = "head.json", 2
READ = (1, FORMAT)  # 1 knows no output noise
MODELS: Mapping[str, type[Any]] = {"ridge": Ridge, "logistic": Logistic, "softmax": Softmax}


def save_head(head: Head, folder: str | Path, *, fresh: bool = False) -> Path:
    """Write the head; readable by its owner alone, since it holds the private noise.  An older head is replaced.

    The tensors go to ``head-<hash>.safetensors`` first, then ``head.json`` is exchanged in one step, then tensors
    that no head names any more are taken away.  ``fresh`` refuses to replace a head, from which rows may have been
    taken out that a new fit would bring back.  ResourceError where the disk refuses.
    """
    from safetensors.numpy import save as to_bytes

    folder = Path(folder)
    refuse(folder, fresh)
    numbers, arrays = _parts(head.model)
    arrays |= {f"index.{name}": getattr(head.index, name) for name in ("ids", "clusters", "contents")}
    tensors = to_bytes({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    name = f"head-{hashlib.sha256(tensors).hexdigest()[:16]}.safetensors"
    body = {
        "format": FORMAT, "loss": head.loss, "numbers": numbers, "classes": head.classes, "radius": head.radius,
        "intercept": head.intercept, "salt": head.index.salt.hex(), "source": head.source, "log": head.log,
        "counts": head.counts,
        "budget": None if head.budget is None else asdict(head.budget),
        "release": None if head.release is None else asdict(head.release), "published": head.published,
        "tensors": name, "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }  # fmt: skip
    with refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    write_atomic(folder / name, tensors)
    write_atomic(folder / JSON, json_bytes(body))
    _sweep(folder, name)
    return folder


def refuse(folder: Path, fresh: bool) -> None:
    """ArtifactError where a head may not be written to ``folder``."""
    if folder.exists() and not (folder / JSON).is_file() and (folder.is_file() or _others(folder)):
        raise ArtifactError(f"'{folder}' exists and is not a head: choose an empty or new folder.")
    if fresh and (folder / JSON).is_file():
        raise ArtifactError(f"There is a head at '{folder}' already, from which rows may have been taken out: choose "
                            "another folder, or take it away first.")  # fmt: skip


def _sweep(folder: Path, name: str) -> None:
    """Take away tensors other than those of this name: of a head before, in which rows are that went since."""
    for old in folder.glob("head-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_head(folder: str | Path) -> Head:
    """Read a head back; ArtifactError where it is missing, damaged or of another format."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    folder = Path(folder)
    try:
        body = json.loads((folder / JSON).read_text(encoding="utf-8"))
        if body["format"] not in READ:
            raise ArtifactError(f"'{folder / JSON}' has format {body['format']} and this release reads {FORMAT}: fit "
                                "the head again, or use the release that wrote it.")  # fmt: skip
        raw = (folder / str(body["tensors"])).read_bytes()
        if hashlib.sha256(raw).hexdigest() != body["tensors_sha256"]:
            raise ArtifactError(f"'{folder / body['tensors']}' does not match '{JSON}': it is damaged, so take the "
                                "head from a backup or fit it again.")  # fmt: skip
        return _head(body, from_bytes(raw))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"There is no head at '{folder}': '{Path(error.filename).name}' is "
                            "missing.") from None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"The head at '{folder}' cannot be read ({type(error).__name__}: {error}): take it from a "
                            "backup or fit it again.") from None  # fmt: skip


@contextmanager
def opened(folder: str | Path) -> Iterator[Head]:
    """The head of a folder, which no other command may change meanwhile: two requests at once lose neither.

    What a request left that was killed after it was done is taken away.
    """
    folder = Path(folder)
    if not (folder / JSON).is_file():
        raise ArtifactError(f"There is no head at '{folder}': '{JSON}' is missing.")
    with Store(folder).locked():
        head = load_head(folder)
        _sweep(folder, str(read_json(folder / JSON)["tensors"]))
        yield head


def _others(folder: Path) -> list[Path]:
    """What lies in a folder beside the remains of a head that was never finished."""
    return [p for p in folder.iterdir() if not (p.name.startswith((".head", ".lock")) or p.match("head-*.safetensors"))]


def _parts(model: Any) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    held = {field.name: getattr(model, field.name) for field in fields(model)}
    arrays = {name: value for name, value in held.items() if isinstance(value, np.ndarray)}
    return {name: value for name, value in held.items() if name not in arrays}, arrays


def _head(body: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Head:
    held = {name.removeprefix("index."): value for name, value in arrays.items() if name.startswith("index.")}
    own = {name: value for name, value in arrays.items() if not name.startswith("index.")}
    numbers = {name: tuple(value) if isinstance(value, list) else value for name, value in body["numbers"].items()}
    return Head(
        body["loss"], MODELS[body["loss"]](**numbers, **own), tuple(body["classes"]), body["radius"],
        body["intercept"], Index(bytes.fromhex(body["salt"]), **held),
        None if body["budget"] is None else Budget(**body["budget"]), tuple(body["log"]), body["source"],
        tuple(body["counts"]), None if not body.get("release") else Release(**body["release"]),
        tuple(body.get("published", ())),
    )  # fmt: skip


def refuse_target(head: Head, folder: Path, path: Path) -> None:
    """An error where weights cannot be written to ``path`` or may not be, before a publication is counted for it."""
    import tempfile

    taken = path.resolve().is_relative_to(folder.resolve()) or path.resolve() == Path(head.source).resolve()
    if taken or path.is_dir():
        raise UsageError(f"'{path}' is a folder, or belongs to the head: name another file for the weights.")
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_weights(head: Head, weights: NDArray[Any], path: Path) -> Path:
    """Write what may be published: ``weights`` [d, k] (see :func:`publish`), classes, radius and intercept, as .npz."""
    held = io.BytesIO()
    np.savez(held, weights=weights, classes=np.array(head.classes, dtype=np.str_), intercept=head.intercept,
             radius=np.nan if head.radius is None else head.radius)  # fmt: skip
    write_atomic(path, held.getvalue())
    return path
