"""Fold an edit into a checkpoint on disk, one weight at a time: the model is never loaded.

The files are copied, and the bytes of the changed tensors are overwritten in the copies, which have the same names,
shapes and dtypes; memory holds the weight at hand in float64 and nothing else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repforget.artifact.edit import Edit
from repforget.artifact.fold import cosines, fold_changes
from repforget.artifact.operations import Untie
from repforget.artifact.weights import Change, NewValue, new_values
from repforget.errors import ArtifactError, ModelLoadError, NoEffectError, ResourceError
from repforget.models import _files
from repforget.models._fingerprint import fingerprint_of
from repforget.progress import Progress, track


@dataclass(frozen=True)
class Folded:
    """What was written: parameter -> dtype -> cosine of the change that is left after rounding with the exact one."""

    folder: Path
    cosines: Mapping[str, Mapping[str, float]]

    @property
    def touched(self) -> tuple[str, ...]:
        return tuple(self.cosines)


class Checkpoint:
    """The tensors of a model folder by name, read from disk when asked for, and the module they belong to, empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = _files.checked(folder)
        self.files = {name: (path, entry) for path in _files.weight_files(self.folder)
                      for name, entry in _files.tensors(path).items()}  # fmt: skip
        self.module = _empty(self.folder)
        state = self.module.state_dict(keep_vars=True)
        named = {id(t): name for name, t in reversed(state.items()) if name in self.files}
        names = {name: named.get(id(t), name) for name, t in state.items()}
        self.names = {name: where for name, where in names.items() if where in self.files}
        self.names |= self._renamed({name: tuple(state[name].shape) for name in names if name not in self.names})
        lost = sorted({*names} - {*self.names}) or sorted({*self.files} - {*self.names.values()})
        if lost:
            raise ArtifactError(f"The files of '{folder}' hold {type(self.module).__name__} under other names than the "
                                f"loaded model has (first '{lost[0]}'), so that weights cannot be changed in the "
                                "files: load the model and use --checkpoint of 'repforget edit'.")  # fmt: skip

    def _renamed(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Names that no file has, with the only name left over in the files of that shape; the hash proves them."""
        spare = {name: tuple(entry["shape"]) for name, (_, entry) in self.files.items()
                 if name not in self.names.values()}  # fmt: skip
        shapes = [*wanted.values()], [*spare.values()]
        single = {shape for shape in shapes[0] if shapes[0].count(shape) == shapes[1].count(shape) == 1}
        by_shape = {shape: name for name, shape in spare.items()}
        return {name: by_shape[shape] for name, shape in wanted.items() if shape in single}

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        stored = self.names[name]
        with safe_open(self.files[stored][0], framework="pt") as file:
            found: Tensor = file.get_tensor(stored)
        return found

    def fingerprint(self) -> str:
        """The fingerprint of the model these files load to."""
        return fingerprint_of(type(self.module).__name__, self.names, self.read)

    @contextmanager
    def owner(self, path: str) -> Iterator[nn.Module]:
        """The module at ``path`` with its own parameters read from disk, emptied again afterwards."""
        owner = self.module.get_submodule(path)
        before = dict(owner._parameters)
        try:
            for attribute, parameter in before.items():
                if parameter is not None:
                    held = self.read(f"{path}.{attribute}")
                    owner._parameters[attribute] = nn.Parameter(held, requires_grad=False)
            yield owner
        finally:
            owner._parameters.update(before)


def _empty(folder: Path) -> nn.Module:
    """The model of a folder without any weight in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as reason:
        raise ModelLoadError(f"The configuration in '{folder}' describes no model that can be built ({reason}): give a "
                             "folder that save_pretrained wrote.") from None  # fmt: skip


def fold_checkpoint(
    edit: Edit, source: Path, folder: Path, *, check: bool = True, progress: Progress | None = None
) -> Folded:
    """Write the model in ``source`` with ``edit`` in its weights to the new ``folder``; ``source`` stays as it is.

    The folder appears whole or not at all. Memory: one weight matrix in float64, a few times over, whatever the size of
    the model; disk: a second copy. With ``check`` the weights in ``source`` are hashed first, and must be those that
    the edit was made for.

    Raises ArtifactError for another base, for operations that only hooks can hold, for biases the files have no place
    for, and where the names in the files are not those of the loaded model; NoEffectError where no byte changes.
    """
    if folder.exists():
        raise ArtifactError(f"'{folder}' exists: choose a new folder for the folded checkpoint.")
    checkpoint = Checkpoint(source)
    if check and checkpoint.fingerprint() != edit.manifest.base_fingerprint:
        raise ArtifactError(f"Edit '{edit.manifest.method}' was made for '{edit.manifest.model}' (weights "
                            f"{edit.manifest.base_fingerprint[:12]}) and the weights in '{source}' are others: give "
                            "the checkpoint it was made for, or make the edit again for this one.")  # fmt: skip
    grouped = _grouped(edit, checkpoint)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            built = Path(temporary) / folder.name
            shutil.copytree(checkpoint.folder, built)
            found = _patch(checkpoint, grouped, built, progress)
            if not found:
                raise NoEffectError(f"Edit '{edit.manifest.method}' changes no weight at the precision of '{source}': "
                                    "raise its strength, or fold it into a float32 checkpoint.")  # fmt: skip
            os.replace(built, folder)
    except OSError as reason:
        raise ResourceError(f"The folded checkpoint cannot be written to '{folder}' ({reason.strerror or reason}): "
                            "free space for a copy of the model, or choose another place.") from None  # fmt: skip
    return Folded(folder, found)


def _grouped(edit: Edit, checkpoint: Checkpoint) -> dict[str, list[Change]]:
    if any(isinstance(op, Untie) for op in edit.weight_operations):
        raise ArtifactError(f"Edit '{edit.manifest.method}' unties the embeddings, for which the files have no second "
                            "table: load the model and use --checkpoint of 'repforget edit'.")  # fmt: skip
    grouped, rest = fold_changes(checkpoint.module, edit.operations)
    if rest:
        places = ", ".join(dict.fromkeys(str(op.site) for op in rest))
        raise ArtifactError(f"Edit '{edit.manifest.method}' needs hooks at {places}, which a checkpoint cannot hold: "
                            "serve it with Edit.attach, or choose an editor that changes weights.")  # fmt: skip
    return grouped


def _patch(
    checkpoint: Checkpoint, grouped: Mapping[str, Sequence[Change]], built: Path, progress: Progress | None
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for path in track(progress, list(grouped), "folding weights"):
        found |= _patched(checkpoint, path, grouped[path], built)
    return found


def _patched(checkpoint: Checkpoint, path: str, changes: Sequence[Change], built: Path) -> dict[str, dict[str, float]]:
    """One module's weights; a function of its own, so that none of its tensors outlives it."""
    found: dict[str, dict[str, float]] = {}
    head = checkpoint.module.get_output_embeddings()  # type: ignore[operator]
    with checkpoint.owner(path):
        for new in new_values(checkpoint.module, {path: changes}):
            _overwrite(checkpoint, new, built)
            found[new.name] = cosines(new, projection=new.owner is not head)
    return found


def _overwrite(checkpoint: Checkpoint, new: NewValue, built: Path) -> None:
    """Put the bytes of a new value where the old ones are in the copied file."""
    if new.parameter is None:
        raise ArtifactError(f"The edit adds '{new.name}', for which the files have no place: load the model and use "
                            "--checkpoint of 'repforget edit'.")  # fmt: skip
    stored = checkpoint.names[new.name]
    path, entry = checkpoint.files[stored]
    data: Any = new.value.contiguous().view(-1).view(torch.uint8).numpy().data
    start, stop = entry["data_offsets"]
    if len(data) != stop - start:
        raise ArtifactError(f"'{stored}' has {stop - start} bytes in '{path}' and {len(data)} after the edit: the file "
                            "is not of the dtype its header names; save the model again.")  # fmt: skip
    with (built / path.name).open("r+b") as file:
        file.seek(entry["start"] + start)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

