"""Forgetting that also holds where hidden states are pushed towards the forgotten answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from repforget.edit.train._depth import at_depth
from repforget.errors import UsageError
from repforget.models._names import core
from repforget.models.capture import Batch, capture, hooks
from repforget.records import Site
from repforget.scoring.encode import pad_id

if TYPE_CHECKING:
    from repforget.edit.train._data import Row
    from repforget.edit.train._engine import Gradients, StepContext
    from repforget.models.load import LoadedModel


def latent_adversarial(
    step: StepContext, *, eps: float = 0.5, layers: Literal["auto"] | list[int] = "auto", attack_steps: int = 16,
    step_size: float = 0.15,
) -> Gradients:  # fmt: skip
    """Take all gradients while an attacker's changes of hidden states elicit the forget answers.

    The attacker adds to the residual states of the forget prompts (all tokens but the first; of plain texts the whole
    text) at ``layers`` ("auto": the one at 7/32 of the depth) and descends on the answers' negative log-probability in
    ``attack_steps`` steps from zero, each of ``step_size`` radii against the gradient of a token, kept in a ball
    of ``eps`` times the mean length of these states.  The changes are then frozen and the objectives see them; retained
    rows and what the untouched model is asked stay clean.  Source: LAT, 2024, arXiv 2407.15549; there
    radii are absolute, the descent is Adam's, and four steps on the model share one attack.  Cost: ``attack_steps``
    forwards and backwards over the forget rows more per step.  What holds against this attacker need not hold against a
    larger radius, other layers, or changed weights.
    """
    if eps < 0 or attack_steps < 0 or step_size <= 0:
        raise UsageError(f"latent_adversarial was given eps {eps}, attack_steps {attack_steps}, step_size {step_size}: "
                         "give a radius and steps of at least 0, and a positive step_size.")  # fmt: skip
    rows, depth = step.rows("forget"), step.model.n_layers
    if not rows:
        raise UsageError("latent_adversarial attacks the forget rows of a step, and there are none: give it an "
                         "objective that forgets.")  # fmt: skip
    chosen = at_depth(7 / 32)(depth) if layers == "auto" else tuple(layers)
    if not chosen or not all(0 <= layer < depth for layer in chosen):
        raise UsageError(f"latent_adversarial was given layers {list(chosen)}: give some of 0 to {depth - 1}.")
    pushes = Pushes.zero(step.model, rows, step.rows("retain"), chosen, eps)
    with pushes.added(step.model):
        for _ in range(attack_steps):
            pushes.descend(step, rows, step_size)
        return step.gradients()


@dataclass(eq=False)
class Pushes:
    """What is added to the states of texts that begin with one of n token sequences.

    ``at``: per layer [n, t, d], zero at first tokens and beyond the end of a sequence; ``radius`` per layer.
    """

    at: dict[int, Tensor]
    radius: Mapping[int, float]
    inside: Tensor  # [n, t, 1] tokens that may be pushed
    number: Mapping[tuple[int, ...], int | None]  # sequence -> n, None where it is left alone
    _found: list[tuple[int, int]] = field(default_factory=list)  # rows of the batch that is running, with their n

    @classmethod
    def zero(
        cls, model: LoadedModel, rows: Sequence[Row], clean: Sequence[Row], layers: Sequence[int], eps: float
    ) -> Pushes:
        """No pushes yet, with radii ``eps`` times the mean length of the states they may change."""
        keys = list(dict.fromkeys(row.ids[: row.start] if row.start > 1 else row.ids for row in rows))
        batch = Batch.pad(keys, pad_id(model.tokenizer)).to(model.device)
        sites = [Site("resid_post", layer) for layer in layers]
        states = capture(model, sites, batch, gather="tokens")
        radius = {site.layer: eps * float(x.float().norm(dim=-1).mean()) for site, x in states.items()}
        inside = batch.counted[..., None]
        at = {layer: torch.zeros(*batch.ids.shape, model.width, device=inside.device) for layer in layers}
        number = {row.ids: None for row in clean} | {key: n for n, key in enumerate(keys)}
        return cls(at, radius, inside, number)

    def descend(self, step: StepContext, rows: Sequence[Row], step_size: float) -> float:
        """One step of every push against the gradient of the answers' loss; returns that loss (nats per token)."""
        for x in self.at.values():
            x.requires_grad_()
        with torch.enable_grad():
            loss = step.nll(rows)
            found = torch.autograd.grad(loss, list(self.at.values()))
        for layer, g in zip(list(self.at), found, strict=True):
            radius = self.radius[layer]
            moved = self.at[layer].detach() - step_size * radius * g / _length(g)
            self.at[layer] = moved * (radius / _length(moved)).clamp(max=1.0) * self.inside
        return float(loss.detach())

    @contextmanager
    def added(self, model: LoadedModel) -> Iterator[None]:
        """Add the pushes in every forward that keeps gradients; without them the untouched model is asked."""

        def remember(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            texts = (args[0] if args else kwargs["input"]).tolist()
            self._found[:] = [(row, n) for row, ids in enumerate(texts) if (n := self._which(tuple(ids))) is not None]

        embedding: Any = core(model).get_input_embeddings()  # type: ignore[operator]
        handle = embedding.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            with hooks(model, {Site("resid_post", layer): self._adder(layer) for layer in self.at}):
                yield
        finally:
            handle.remove()

    def _adder(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        def add(value: Tensor) -> Tensor | None:
            if not self._found or not torch.is_grad_enabled():
                return None
            where, which = torch.tensor(self._found).T
            own = self.at[layer][which.to(self.inside.device), : value.shape[1]].to(value.device)
            extra = own.new_zeros(value.shape)
            extra[where.to(value.device), : own.shape[1]] = own
            return value + extra.to(value.dtype)

        return add

    def _which(self, text: tuple[int, ...]) -> int | None:
        """The number of the longest sequence that a (padded) text begins with."""
        lengths = sorted({len(key) for key in self.number}, reverse=True)
        return next((self.number[text[:n]] for n in lengths if text[:n] in self.number), None)


def _length(x: Tensor) -> Tensor:
    found: Tensor = vector_norm(x, dim=-1, keepdim=True)
    return found.clamp(min=torch.finfo(x.dtype).tiny)
