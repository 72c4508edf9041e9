"""One stage of a sharded training: from the factors before it, by steps that follow from its records alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor, nn

import repforget
from repforget.errors import NumericalError
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.shards.adapters import Factors, fresh, worn
from repforget.shards.plan import Settings, Stage
from repforget.store import write_atomic
from repforget.training import Example, Stepper, collate, label_loss, only

PARTIAL = "epoch.safetensors"
ENVIRONMENT = ("software", "device", "threads")  # what rounding depends on beside the arithmetic itself


@dataclass(frozen=True)
class Trained:
    """What a stage leaves behind: its factors, the moments of the optimiser, and facts about how it went."""

    factors: Factors
    moments: dict[str, Tensor]
    facts: dict[str, float | int | str]


def environment(module: nn.Module) -> dict[str, str | int]:
    device = next(module.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    software = f"repforget {repforget.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    found = (software, f"{device.type} {name}", torch.get_num_threads())
    return dict(zip(ENVIRONMENT, found, strict=True))


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Kernels that give the same bits every time, or an error where there are none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":  # read when the first matrices are multiplied
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def train_stage(
    model: LoadedModel, settings: Settings, stage: Stage, examples: Mapping[str, Example], before: Trained | None,
    *, partial: Path | None = None, progress: Progress | None = None,
) -> Trained:  # fmt: skip
    """Train the stage's factors on its records, on the frozen base, starting after the stage ``before``.

    "sisa": the same factors and moments go on; "s3t": the factors before stay as they are and a new group starts.  No
    random number is drawn and nothing is dropped out.  After every epoch the state goes to the folder ``partial``,
    from which the same call continues to the same bits; in another environment it begins anew.
    Raises NumericalError when the loss is not finite.
    Cost: epochs x records forward and backward passes; memory: activations of one batch, factors and two moments.
    """
    module = model.module.eval()
    own = fresh(module, settings, stage.shard, stage.group(settings))
    frozen: Factors = {}
    moments: dict[str, Tensor] = {}
    if before is not None and settings.order == "s3t":
        frozen = {name: t.to(model.device) for name, t in before.factors.items()}
    elif before is not None:
        own, moments = {name: before.factors[name].to(t.device) for name, t in own.items()}, before.moments
    where = environment(module)
    own, moments, done = _kept(partial, where, own, moments)
    factors = {name: t.clone().requires_grad_() for name, t in own.items()}
    stepper = Stepper(list(factors.values()), steps=stage.steps(settings), lr=settings.lr,
                      schedule=settings.schedule, weight_decay=settings.weight_decay)  # fmt: skip
    stepper.load({**{f"master.{i}": t for i, t in enumerate(own.values())}, **moments})
    loss = math.nan
    text = f"shard {stage.shard}, slice {stage.position + 1} of {settings.slices}"
    with only(module, ()), repeatable(model.device), worn(module, {**frozen, **factors}, settings.scale):
        for epoch in track(progress, range(done, settings.epochs), text):
            for place, records in enumerate(batches := stage.batches(settings, epoch)):
                index = epoch * len(batches) + place
                loss_now = label_loss(module, collate([examples[r.id] for r in records], model.device))
                loss = float(loss_now.detach())
                if not math.isfinite(loss):
                    raise NumericalError(f"The loss is {loss} at step {index + 1} of {text}: lower the learning rate.")
                stepper.step(index, torch.autograd.grad(loss_now, list(factors.values()), allow_unused=True))
            if partial is not None and epoch + 1 < settings.epochs:
                _keep(partial, where, factors, stepper, epoch + 1)
    facts: dict[str, float | int | str] = {"steps": stage.steps(settings), "passes": stage.passes(settings),
                                           "loss": loss, **where}  # fmt: skip
    return Trained({n: t.detach().cpu() for n, t in factors.items()}, _moments(stepper), facts)


def _moments(stepper: Stepper) -> dict[str, Tensor]:
    return {name: t for name, t in stepper.state().items() if not name.startswith("master.")}


def _keep(
    partial: Path, where: Mapping[str, str | int], factors: Mapping[str, Tensor], stepper: Stepper, done: int
) -> None:  # fmt: skip
    tensors = {**{n: t.detach().cpu().contiguous() for n, t in factors.items()}, **_moments(stepper)}
    write_atomic(partial / PARTIAL, save(tensors, {"done": json.dumps(done), "environment": json.dumps(where)}))


def _kept(
    partial: Path | None, where: Mapping[str, str | int], own: Factors, moments: dict[str, Tensor]
) -> tuple[Factors, dict[str, Tensor], int]:  # fmt: skip
    """Factors, moments and epochs done of a stage that was interrupted here; what was given where there is none."""
    from safetensors import safe_open

    path = None if partial is None else partial / PARTIAL
    if path is None or not path.is_file():
        return own, moments, 0
    with safe_open(path, "pt") as file:
        said = {name: json.loads(text) for name, text in file.metadata().items()}
    if said.get("environment") != where:  # half of the steps would be rounded in another way, and nobody be told
        return own, moments, 0
    tensors = load_file(path)
    return ({name: tensors[name].to(t.device) for name, t in own.items()},
            {name: t for name, t in tensors.items() if name not in own}, int(said["done"]))  # fmt: skip
