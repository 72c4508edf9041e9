"""The Edit: a frozen, portable value that says what is done to which model, never a mutated model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from repforget.artifact.operations import (
    ClampFeatures,
    Gate,
    Operation,
    ScaleUnits,
    SiteOperation,
    Untie,
    WeightOperation,
    inverse,
    is_zero,
    normalised,
    scaled,
    site_operations,
    target,
    weight_operations,
)
from repforget.artifact.runtime import check_finite
from repforget.errors import ArtifactError, NoEffectError, SiteError
from repforget.guarantee import Guarantee
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.records import FORMAT_VERSION, Site

if TYPE_CHECKING:
    from repforget.artifact.fold import Undo

ArtifactKind = Literal["weights", "weights+hook"]


@dataclass(frozen=True)
class EditManifest:
    """What an edit is and what it was made for; everything here is in ``edit.json``."""

    method: str
    settings: Mapping[str, Any]
    model: str
    base_fingerprint: str
    architecture: str
    knowledge: str  # digest of the knowledge probe the editor saw
    sites: tuple[str, ...]  # sites whose activations the operations change
    weights: tuple[str, ...]  # parameters that the operations change
    artifact: ArtifactKind  # "weights+hook" where some operation cannot be folded exactly
    versions: Mapping[str, str]
    strength: float = 1.0
    notes: tuple[str, ...] = ()
    guarantee: Guarantee | None = None  # of the whole edit at full strength, where a theorem holds
    format_version: int = FORMAT_VERSION


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import repforget

    return {"repforget": repforget.__version__, "torch": str(torch.__version__),
            "transformers": transformers.__version__}  # fmt: skip


def plain(value: Any) -> Any:
    """``value`` as JSON would give it back, so that a saved manifest equals a fresh one."""

    def other(item: Any) -> Any:
        return sorted(item) if isinstance(item, set | frozenset) else str(item)

    return json.loads(json.dumps(value, sort_keys=True, default=other))


@dataclass(frozen=True, eq=False)
class Edit:
    """A list of operations with its manifest: attach it, fold it, save it, compose it, export it.

    Make one with :meth:`build`; the order of operations is weights first, then sites in their order.
    """

    manifest: EditManifest
    operations: tuple[Operation, ...]

    @classmethod
    def build(
        cls, method: str, settings: Mapping[str, Any], model: LoadedModel, data_digest: str,
        operations: Sequence[Operation], sites: Sequence[Site | str] = (), notes: Sequence[str] = (),
        guarantee: Guarantee | None = None,
    ) -> Edit:  # fmt: skip
        """Check the operations against the model and freeze them into an Edit; ``sites`` are those requested.

        Raises NoEffectError where nothing would change, SiteError where a site or parameter is absent or a
        requested site is left untouched, ArtifactError where shapes do not fit, NumericalError on NaN.
        Cost: no forward pass.
        """
        from repforget.artifact.fold import foldable

        own = tuple(normalised(op) for op in operations)
        check_operations(method, own, model)
        touched = {target(op) for op in site_operations(own)}
        missed = sorted({str(site) for site in sites} - touched) if touched else []
        if missed:
            raise SiteError(f"Editor '{method}' was asked to edit {', '.join(missed)} and no operation "
                            f"touches it: drop it from the request, or ask for one of "
                            f"{', '.join(sorted(touched))}.")  # fmt: skip
        can = foldable(model.module, own)
        hooked = [op for op in site_operations(own) if not can(op)]
        manifest = EditManifest(
            method=method, settings=plain(dict(settings)), model=model.name,
            base_fingerprint=model.fingerprint, architecture=type(model.module).__name__,
            knowledge=data_digest, sites=_sites(own), weights=parameter_names(own), versions=_versions(),
            artifact="weights+hook" if hooked else "weights", notes=tuple(notes),
            guarantee=guarantee,
        )  # fmt: skip
        return cls(manifest, own)

    @property
    def artifact(self) -> ArtifactKind:
        """``"weights"``, or ``"weights+hook"`` where a part is gone for whoever holds the weights."""
        return self.manifest.artifact

    @property
    def touched(self) -> tuple[str, ...]:
        """Sites and parameters that the operations change."""
        return (*self.manifest.sites, *self.manifest.weights)

    @property
    def site_operations(self) -> tuple[SiteOperation, ...]:
        return tuple(site_operations(self.operations))

    @property
    def weight_operations(self) -> tuple[WeightOperation, ...]:
        return tuple(weight_operations(self.operations))

    @cached_property
    def digest(self) -> str:
        """sha256 over manifest and tensors: two edits with one digest are the same edit."""
        from repforget.artifact.files import arrays

        body = hashlib.sha256(json.dumps(plain(dataclasses.asdict(self.manifest)), sort_keys=True).encode())
        for name, tensor in sorted(arrays(self.operations).items()):
            body.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            body.update(tensor.numpy().tobytes())
        return body.hexdigest()

    def check_base(self, model: LoadedModel) -> None:
        """ArtifactError when ``model`` is not the model this edit was made for."""
        if model.fingerprint != self.manifest.base_fingerprint:
            raise ArtifactError(
                f"Edit '{self.manifest.method}' was made for '{self.manifest.model}' (weights "
                f"{self.manifest.base_fingerprint[:12]}) and '{model.name}' has weights "
                f"{model.fingerprint[:12]}: load the model it was made for, or make the edit again for this "
                "one."
            )

    def attach(self, model: LoadedModel, *, check: bool = True) -> AbstractContextManager[LoadedModel]:
        """Put the edit in place while inside ``with``; afterwards the model is bit for bit what it was.

        Weight operations swap parameters, site operations are hooks.  ``check=False`` allows another model of
        the same shape.  Memory: one copy of the touched parameters.
        """
        from repforget.artifact.attach import attach

        return attach(self, model, check=check)

    def fold(self, model: LoadedModel, *, check: bool = True) -> Undo:
        """Write the edit into the weights of ``model``; the returned :class:`Undo` restores it bit for bit.

        Operations that have no exact weight form stay as hooks (``undo.hooked``).  ``undo.parity`` compares
        the result with the hook form.  Cost: two forwards of a 2 x 16 batch; a copy of each touched
        parameter.
        """
        from repforget.artifact.fold import fold

        return fold(self, model, check=check)

    def applied_to(self, model: LoadedModel, *, check: bool = True) -> LoadedModel:
        """An independent copy of ``model`` with the edit in place: folded where exact, hooks otherwise."""
        from repforget.artifact.fold import applied

        return applied(self, model, check=check)

    def save(self, folder: str | Path) -> Path:
        """Write ``edit.json`` and ``edit.safetensors``, all or nothing; an older edit there is replaced."""
        from repforget.artifact.files import save

        return save(self, Path(folder))

    def scaled(self, a: float) -> Edit:
        """The edit at strength ``a`` (0 is the identity, bit for bit)."""
        held = self.manifest.guarantee if a == 1.0 else None  # a theorem is about the whole edit
        manifest = dataclasses.replace(self.manifest, strength=self.manifest.strength * a, guarantee=held)
        return Edit(manifest, tuple(scaled(op, a) for op in self.operations))

    def inverse(self) -> Edit:
        """The edit that takes this one back up to rounding; ArtifactError where information is destroyed."""
        manifest = dataclasses.replace(self.manifest, method=f"inverse({self.manifest.method})", guarantee=None)
        return Edit(manifest, tuple(inverse(op) for op in reversed(self.operations)))

    def then(self, other: Edit, *, stacked: bool = False) -> Edit:
        """This edit, then ``other`` of the same base; ``stacked``: ``other`` was made on the edited model."""
        first, second = self.manifest, other.manifest
        if not stacked and first.base_fingerprint != second.base_fingerprint:
            raise ArtifactError(f"Edits '{first.method}' and '{second.method}' were made for different "
                                "weights: make both for one base, or say stacked=True if the second was made "
                                "on the first.")  # fmt: skip
        hooked = "weights+hook" in (first.artifact, second.artifact)
        both = (*self.operations, *other.operations)
        manifest = dataclasses.replace(
            first, method=f"{first.method}+{second.method}",
            settings={"first": dict(first.settings), "second": dict(second.settings)},
            knowledge="+".join(dict.fromkeys((first.knowledge, second.knowledge))),
            sites=_sites(both), weights=parameter_names(both), artifact="weights+hook" if hooked else "weights",
            strength=1.0, notes=(*first.notes, *second.notes), guarantee=None,
        )  # fmt: skip
        return Edit(manifest, both)

    def export_checkpoint(self, model: LoadedModel, folder: str | Path) -> Path:
        """Write the edited model as a plain Hugging Face checkpoint; reload it, compare keys and logits."""
        from repforget.artifact.export import export_checkpoint

        return export_checkpoint(self, model, Path(folder))

    def export_peft(self, model: LoadedModel, folder: str | Path) -> Path:
        """Write a low-rank edit as a PEFT LoRA adapter, reload it onto the base and compare logits."""
        from repforget.artifact.export import export_peft

        return export_peft(self, model, Path(folder))


def _sites(operations: Sequence[Operation]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(target(op) for op in site_operations(operations)))


def parameter_names(operations: Sequence[Operation]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(target(op) for op in weight_operations(operations) if target(op)))


def _check_site(operation: SiteOperation, model: LoadedModel) -> None:
    sites = site_map(model.module)
    sites.locate(operation.site)
    width = sites.size(operation.site)
    if isinstance(operation, ScaleUnits):
        ends = (int(operation.index.min()), int(operation.index.max())) if operation.index.numel() else (0, 0)
        if not 0 <= ends[0] <= ends[1] < width or operation.index.shape != operation.factor.shape:
            raise ArtifactError(f"Units {operation.index.tolist()[:4]}... do not fit site {operation.site}, "
                                f"which has {width} units: give one factor per unit, counted from "
                                "0.")  # fmt: skip
        return
    held = {name: value for name, value in vars(operation).items() if isinstance(value, Tensor)}
    if isinstance(operation, ClampFeatures):
        n = len(operation.encoder)
        if any(held.pop(name).shape != (n,) for name in ("bias", "threshold", "factor", "value")):
            raise ArtifactError(f"The clamp at {operation.site} has {n} features: give one bias, threshold, factor and "
                                "value for each.")  # fmt: skip
    tensors = {name: value.shape[0 if name == "left" else -1] for name, value in held.items()}
    gate = getattr(operation, "gate", None)
    if isinstance(gate, Gate):
        gate_site = gate.site or operation.site
        sites.locate(gate_site)
        if gate.direction.shape[-1] != sites.size(gate_site):
            tensors["gate.direction"] = -1
        if sites.rank(gate_site) > sites.rank(operation.site):
            raise SiteError(f"Gate site {gate_site} lies after {operation.site}, which it is to gate: choose "
                            "an earlier one.")
    wrong = [name for name, size in tensors.items() if size != width]
    if wrong:
        raise ArtifactError(f"Tensor '{wrong[0]}' of the {operation.kind} operation does not fit site "
                            f"{operation.site}, which is {width} wide: the edit was made for another "
                            "model.")  # fmt: skip


def check_operations(method: str, operations: Sequence[Operation], model: LoadedModel) -> None:
    """Every operation fits the model, is finite, and at least one changes something."""
    from repforget.artifact.files import arrays
    from repforget.artifact.weights import changes_by_owner

    for name, tensor in arrays(operations).items():
        check_finite(f"{method}: {name}", tensor)
    for op in site_operations(operations):
        _check_site(op, model)
    changes_by_owner(model.module, weight_operations(operations))
    if all(is_zero(op) for op in operations if not isinstance(op, Untie)):
        raise NoEffectError(f"Editor '{method}' produced an edit that changes nothing on '{model.name}': "
                            "raise its strength, or check that the forget items match the "
                            "model.")  # fmt: skip
