"""Confuse MLPs about the forget facts, by updates without the directions that many texts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repforget.artifact import DenseDelta, Edit
from repforget.artifact.weights import is_conv1d
from repforget.edit._collect import subsample
from repforget.edit.train._budget import divergence, norm, probability
from repforget.edit.train._collapse import principal, without
from repforget.edit.train._data import fact_rows, text_rows
from repforget.edit.train._pass import swapped
from repforget.errors import KnowledgeError, NumericalError, SiteError, UsageError
from repforget.knowledge import EditData
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization, Site
from repforget.scoring.encode import pad_id
from repforget.training import only

SPAN, LEAST = (6 / 32, 11 / 32), 4  # of the depth, and layers
INPUTS, OUTPUTS, SHARE = 24, 36, 32  # shared directions in wide models; one in so many directions in narrow ones
SAMPLES = 4096  # tokens that show what is shared
HALVINGS = 4  # of the step, before the budget counts as used up


def cir(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layers: Literal["auto"] | list[int] = "auto", top_layers: int = 4,
    input_components: Literal["auto"] | int = "auto", output_components: Literal["auto"] | int = "auto",
    steps: int = 100, size: float = 5e-3, floor: float = 0.0, retain_size: float = 2.0,
    batch_size: int = 32, max_disruption: float = 0.01, check_every: int = 10, max_facts: int = 4000,
) -> Edit:  # fmt: skip
    """Turn the outputs of some MLPs away from what they were on forget facts, by what is particular to those facts.

    Loss: mean over layers and tokens of ``max(<o, o0> / |o0|^2, floor)``, o the MLP output and o0 that of the untouched
    model.  Every weight gradient is a sum over tokens of output gradient times input; before it is summed, both lose
    their part along directions that many texts share: the mean and the first principal components of the forget set's
    inputs and output gradients at the gate, up and output projections, taken once from the untouched model.  Each step
    has a fixed norm; a second one moves the state behind the layers, on kept texts, back to what it was.  First and
    last tokens are left out.  Source: CIR, 2025, arXiv 2509.11816; norms relative to the weights and the divergence as
    the measure of damage are this project's own.

    Args:
        layers: whose MLPs change; "auto" is the ``top_layers`` best of ``where``, or those from 6/32 to 11/32 of the
            depth, four at least.
        input_components, output_components: shared directions; "auto" is 24 and 36, at most one in 32.
        steps: updates. size: norm of each, as a share of that of the weights. floor: of the loss.
        retain_size: norm of the retain step, as a share of the other.
        batch_size: texts per step. max_facts: facts read per set, chosen by seed.
        max_disruption: divergence from the untouched model (nats per token, retained answers or general text) beyond
            which the last good state is kept; looked at every ``check_every`` steps.

    Raises SiteError where an MLP has no projections of its own (batched experts), UsageError for settings out of range,
    KnowledgeError without facts.  Cost: per step a forward and backward up to the layers, once for either side, no
    weight gradient of the rest; memory: three copies of the changed weights.

    Weakness: the forget set has to show what is shared.  MLP outputs that are turned away do not show that nothing
    else in the model holds the facts.
    """
    _check({"steps": steps, "batch_size": batch_size, "check_every": check_every, "size": size})
    run = _Run(model, tuple(_layers(model, layers, where, top_layers)), floor)
    forget = _batches(model, _forgotten(model, data, max_facts, seed), batch_size, seed)
    kept = _batches(model, _kept(model, data, max_facts, seed), batch_size, seed)
    damage, known = divergence(model, data, seed), probability(model, data.forget, "forget", seed)
    before = known()
    with run.training():
        shared = run.shared(forget, input_components, output_components, seed)

        def step(index: int, length: float) -> None:
            run.move(run.confusing(forget[index % len(forget)], shared), length)
            run.move(run.repairing(kept[index % len(kept)]), length * retain_size)

        note = _descend(run, step, damage, steps, size, max_disruption, check_every, progress)
        note += f", mean probability of forget answers {before:.3g} -> {known():.3g}"
        operations = run.operations()
    return Edit.build("cir", {"layers": list(run.layers)}, model, data.digest, operations, notes=[note])


def _check(numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        if value <= 0:
            raise UsageError(f"cir needs a positive {name}: {value} was given.")


def _layers(
    model: LoadedModel, layers: Literal["auto"] | list[int], where: Localization | None, top: int
) -> list[int]:
    depth = model.n_layers
    if layers == "auto" and where is not None and where.layers():
        return sorted(where.layers()[:top])
    if layers == "auto":
        start = min(round(SPAN[0] * depth), max(0, depth - LEAST))
        return list(range(start, min(depth, max(start + LEAST, round(SPAN[1] * depth) + 1))))
    if not layers or not set(layers) <= set(range(depth)):
        raise SiteError(f"Layers {layers} were asked for: give some of 0 to {depth - 1}.")
    return sorted(set(layers))


def _forgotten(model: LoadedModel, data: EditData, max_facts: int, seed: int) -> list[tuple[int, ...]]:
    """Forget facts without their last token, after which nothing of them is predicted."""
    if not data.forget:
        raise KnowledgeError("cir was given no facts to forget.")
    return [row.ids[:-1] for row in fact_rows(model, subsample(data.forget, max_facts, seed), "forget")[0]]


def _kept(model: LoadedModel, data: EditData, max_facts: int, seed: int) -> list[tuple[int, ...]]:
    facts = fact_rows(model, subsample(data.retain, max_facts, seed), "retain")[0] if data.retain else ()
    texts = text_rows(model, data.general, "general") if data.general else ()
    return [row.ids for row in (*facts, *texts)]


def _batches(model: LoadedModel, texts: Sequence[Sequence[int]], size: int, seed: int) -> list[Batch]:
    """Texts of like length together, in an order of the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = sorted(torch.randperm(len(texts), generator=generator).tolist(), key=lambda i: len(texts[i]))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    return [Batch.pad([texts[i] for i in chunks[at]], pad_id(model.tokenizer)).to(model.device)
            for at in torch.randperm(len(chunks), generator=generator).tolist()]  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """The MLP projections of ``layers`` in training."""

    model: LoadedModel
    layers: tuple[int, ...]
    floor: float

    @cached_property
    def paths(self) -> list[str]:
        """Module paths of the projections, gate and up fused or not."""
        found: list[str] = []
        for layer in self.layers:
            own = site_map(self.model.module).anatomy.layers[layer]
            if own.down is None:
                raise SiteError(f"Layer {layer} of '{self.model.name}' has batched experts, whose inputs and output "
                                "gradients cannot be told apart: choose repselect.")  # fmt: skip
            found += [path for path in (own.gate, own.up, own.gate_up, own.down) if path]
        return found

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [self.model.module.get_parameter(f"{path}.weight") for path in self.paths]

    @cached_property
    def originals(self) -> list[Tensor]:
        return [p.data for p in self.parameters]

    @cached_property
    def masters(self) -> list[Tensor]:
        return [p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.originals]

    @cached_property
    def length(self) -> float:
        return norm(self.originals)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Copies in the place of the weights, open for gradients; the weights themselves are not written to."""
        working = [p.clone() for p in self.originals]
        with only(self.model.module, self.parameters), swapped(self.parameters, working):
            yield

    def read(self, kind: str, layers: Sequence[int], batch: Batch) -> Tensor:
        """States [n, l, d] of all tokens but first ones."""
        sites = [Site(kind, layer) for layer in layers]
        found = capture(self.model, sites, batch, gather="tokens", grad=torch.is_grad_enabled())
        return torch.stack([found[site] for site in sites], 1)

    def before(self, kind: str, layers: Sequence[int], batch: Batch) -> Tensor:
        """The same states of the untouched model."""
        with torch.no_grad(), swapped(self.parameters, self.originals):
            return self.read(kind, layers, batch)

    def flows(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Inputs [n, in] and gradients of the confusion loss on outputs [n, out] of every projection."""
        then = self.before("mlp_out", self.layers, batch)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def tap(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def keep(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                seen[path] = (args[0].detach(), output)

            return keep

        with ExitStack() as stack:
            for path in self.paths:
                handle = self.model.module.get_submodule(path).register_forward_hook(tap(path))
                stack.callback(handle.remove)
            now = self.read("mlp_out", self.layers, batch)
        aligned = (now.float() * then.float()).sum(-1) / then.float().pow(2).sum(-1).clamp(min=1e-12)
        gradients = torch.autograd.grad(aligned.clamp(min=self.floor).mean(), [seen[path][1] for path in self.paths])
        inside = batch.mask.bool().clone()
        inside[:, 0] = False
        chosen = inside.flatten()
        return [tuple(x.flatten(0, -2)[chosen].float() for x in (seen[path][0], g))  # type: ignore[misc]
                for path, g in zip(self.paths, gradients, strict=True)]  # fmt: skip

    def shared(
        self, batches: Sequence[Batch], inputs: int | str, outputs: int | str, seed: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Directions of the inputs and output gradients of every projection that the texts share."""
        rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.paths]
        count = 0
        for batch in batches:
            for own, pair in zip(rows, self.flows(batch), strict=True):
                own.append(pair)
            count += len(rows[0][-1][0])
            if count >= SAMPLES:
                break

        def directions(parts: Sequence[Tensor], k: int | str, most: int) -> Tensor:
            count = min(most, parts[0].shape[1] // SHARE) if isinstance(k, str) else k
            return principal(torch.cat(list(parts)), count, seed)

        return [(directions([a for a, _ in own], inputs, INPUTS), directions([g for _, g in own], outputs, OUTPUTS))
                for own in rows]  # fmt: skip

    def confusing(self, batch: Batch, shared: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Gradient of the confusion loss on the weights, without what is shared, in the layout of the parameters."""
        found = []
        for path, (a, g), (inputs, outputs) in zip(self.paths, self.flows(batch), shared, strict=True):
            gradient = without(g, outputs).mT @ without(a, inputs)
            found.append(gradient.mT if is_conv1d(self.model.module.get_submodule(path)) else gradient)
        return found

    def repairing(self, batch: Batch) -> list[Tensor]:
        """Gradient of the mean distance of kept texts' states, behind the layers, from what they were."""
        behind = [min(self.layers[-1] + 1, self.model.n_layers - 1)]
        away = (self.read("resid_post", behind, batch) - self.before("resid_post", behind, batch)).float()
        return list(torch.autograd.grad(away.norm(dim=-1).mean(), self.parameters))

    @torch.no_grad()
    def move(self, gradients: Sequence[Tensor], size: float) -> None:
        """A step of norm ``size`` times that of the weights against the gradients; none where they vanish."""
        total = norm(gradients)
        if total == 0.0:
            return
        for parameter, master, gradient in zip(self.parameters, self.masters, gradients, strict=True):
            master.add_(gradient, alpha=-size * self.length / total)
            parameter.copy_(master)

    @torch.no_grad()
    def restore(self, masters: Sequence[Tensor]) -> None:
        for parameter, master, good in zip(self.parameters, self.masters, masters, strict=True):
            master.copy_(good)
            parameter.copy_(good)

    def operations(self) -> list[DenseDelta]:
        return [DenseDelta(f"{path}.weight", now.detach().float() - then.float())
                for path, now, then in zip(self.paths, self.parameters, self.originals, strict=True)]  # fmt: skip


def _descend(
    run: _Run, step: Callable[[int, float], None], damage: Callable[[], float], steps: int, size: float,
    budget: float, check_every: int, progress: Progress | None,
) -> str:  # fmt: skip
    """Take steps; where the damage is over the budget, go back to the last good state and on with half their size."""
    good, taken, halved, cost = [m.clone() for m in run.masters], 0, 0, 0.0
    for index in track(progress, range(steps), "confusing MLPs", steps):
        step(index, size / 2**halved)
        if index == 0 or (index + 1) % check_every == 0 or index + 1 == steps:
            found = damage()
            if found <= budget:
                good, taken, cost = [m.clone() for m in run.masters], index + 1, found
                continue
            run.restore(good)
            halved += 1
            if halved > HALVINGS:
                break
    if not taken:
        raise NumericalError(f"No state of cir stayed within the budget of {budget:g} nats per token: give a smaller "
                             "size or a larger max_disruption.")  # fmt: skip
    return f"last good state after step {taken} of {steps}: divergence {cost:.3g} of {budget:g} nats per token"
