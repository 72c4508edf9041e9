"""Train small top-k autoencoders on the activations of given texts, several sites in one pass."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repforget.errors import KnowledgeError, UsageError
from repforget.features.activity import Ids
from repforget.features.autoencoder import SparseAutoencoder
from repforget.features.fit import spread, unexplained
from repforget.models.capture import Batch, stream
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Site
from repforget.scoring.encode import pad_id

BATCH = 512  # tokens of a step
PASSES, FEWEST, MOST = 20, 100, 500  # over the texts, and the steps that they come to
RATE = 3e-3
PAUSE = 1 / 16  # share of the steps after which a feature that was never active counts as silent
SETTLED = 0.25  # last share of the steps over which the threshold is averaged
JUDGED = 512  # texts on which the result is measured


@dataclass(frozen=True)
class Trained:
    """An autoencoder with its fraction of variance unexplained on training texts, mean number of active features, and
    the share of features that were hardly ever active at the end."""

    sae: SparseAutoencoder
    unexplained: float
    dead: float
    texts: int  # run for it

    @property
    def note(self) -> str:
        return (f"autoencoder at {self.sae.site}: {self.sae.size} features, {self.unexplained:.3f} of the variance "
                f"unexplained, {self.dead:.0%} of the features dead")  # fmt: skip


def train_features(
    model: LoadedModel, sites: Sequence[Site], sequences: Sequence[Ids], *, size: int = 0, active: int = 8,
    steps: int | Literal["auto"] = "auto", seed: int = 0, progress: Progress | None = None,
) -> dict[Site, Trained]:  # fmt: skip
    """An autoencoder of ``size`` features (0: four times the width) at each site, about ``active`` per token.

    Each step minimises ``|x - x'|²`` over some 500 tokens of texts drawn by ``seed``, where the ``active`` x tokens
    largest values of the step are kept (batch top-k, Bussmann et al. 2024, arXiv 2412.06410); the threshold at which
    that cuts becomes a common fixed one, so that afterwards a feature depends on its own row alone (jumprelu).
    Features that fell silent are trained on what the others miss (Gao et al. 2024, arXiv 2406.04093).  Cost: ``steps``
    forwards (auto: 20 passes over the texts, 100 to 500 steps), nothing kept.  A low value unexplained does not show
    that features mean anything.  Raises UsageError for sizes out of range, KnowledgeError without texts.
    """
    places = site_map(model.module)
    if not sequences or not sites:
        raise KnowledgeError("Features are trained on texts at sites, and none were given: name at least one of both.")
    count = min(MOST, max(FEWEST, PASSES * sum(map(len, sequences)) // BATCH)) if steps == "auto" else steps
    learners = {site: _Learner(site, size or 4 * places.size(site), active, count, seed) for site in sites}
    texts = 0
    device = torch.device("cpu") if model.device.type == "mps" else model.device

    def learn(values: dict[Site, Tensor], index: int) -> None:
        with torch.enable_grad():
            for site, x in values.items():
                learners[site].step(x.detach().float().to(device), index)

    def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
        nonlocal texts
        for batch in batches:
            texts += len(batch)
            yield batch

    batches = counted(_batches(sequences, count, seed, pad_id(model.tokenizer)))
    stream(model, list(learners), track(progress, batches, "training features", count), "tokens", learn)
    out = {}
    for site, learner in learners.items():
        sae = learner.finished()
        left = unexplained(model, sae, spread(sequences, JUDGED))[site]
        out[site] = Trained(sae, left, float((learner.seen < count - learner.pause).float().mean()), texts)
    return out


def _batches(sequences: Sequence[Ids], steps: int, seed: int, pad: int) -> Iterator[Batch]:
    """One batch of texts per step, every text once before any comes again."""
    draw, waiting = random.Random(f"features-{seed}"), list[Ids]()
    for _ in range(steps):
        rows: list[Ids] = []
        while sum(map(len, rows)) < BATCH:
            if not waiting:
                waiting = list(sequences)
                draw.shuffle(waiting)
            rows.append(waiting.pop())
        yield Batch.pad(rows, pad)


class _Learner:
    """The autoencoder of one site while it learns, on centred activations of mean squared length d."""

    def __init__(self, site: Site, size: int, active: int, steps: int, seed: int) -> None:
        if steps < 1 or not 1 <= active < size:
            raise UsageError(f"An autoencoder of {size} features, {active} of them active, was asked for in {steps} "
                             "steps: give a step or more, and fewer active features than there are.")  # fmt: skip
        self.site, self.size, self.active, self.steps = site, size, active, steps
        self.pause = max(1, round(PAUSE * steps))
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters: list[Tensor] = []
        self.threshold = 0.0

    def _start(self, x: Tensor) -> None:
        self.mean, device = x.mean(0), x.device
        self.scale = (x.shape[1] / (x - self.mean).square().sum(1).mean().clamp(min=1e-30)).sqrt()
        noise = torch.randn(self.size, x.shape[1], generator=self.generator).to(device)
        self.decoder = torch.nn.functional.normalize(noise, dim=1)
        self.encoder = self.decoder * self._fitting((x - self.mean) * self.scale)
        self.bias, self.centre = torch.zeros(self.size, device=device), torch.zeros(x.shape[1], device=device)
        self.parameters = [self.encoder, self.bias, self.decoder, self.centre]
        for p in self.parameters:
            p.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE, betas=(0.9, 0.98))
        self.seen = torch.zeros(self.size, dtype=torch.long, device=device)

    def _kept(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The largest values of the step, as many as the tokens may have, others 0; and the largest of the others."""
        kept = min(self.active * len(values), values.numel() - 1)
        level = values.detach().flatten().topk(kept + 1).values[-1]
        return torch.where(values > level, values, 0.0), level

    def _fitting(self, inner: Tensor) -> Tensor:
        """The factor of the encoder with which the first values reconstruct best: rows that are alike overshoot."""
        made = self._kept((inner @ self.decoder.T).relu())[0] @ self.decoder
        return (inner * made).sum() / made.square().sum().clamp(min=1e-30)

    def step(self, x: Tensor, index: int) -> None:
        if not self.parameters:
            self._start(x)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (index + 1) / 10) * 0.5 * (1.02 + math.cos(math.pi * index / self.steps))
        inner = (x - self.mean) * self.scale
        values = ((inner - self.centre) @ self.encoder.T + self.bias).relu()
        f, level = self._kept(values)
        missed = inner - (f @ self.decoder + self.centre)
        self.optimizer.zero_grad()
        loss = missed.square().mean()
        silent = self.seen < index - self.pause
        if bool(silent.any()):
            idle = self._kept(torch.where(silent, values, 0.0))[0]
            loss = loss + (missed.detach() - idle @ self.decoder).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp(min=1e-12))
            self.seen[(f > 0).any(0)] = index + 1
            if index >= (1 - SETTLED) * self.steps or index == self.steps - 1:
                settled = index - math.ceil((1 - SETTLED) * self.steps) + 1
                self.threshold += (float(level) - self.threshold) / max(1, settled)

    def finished(self) -> SparseAutoencoder:
        """In the units of the site: decoder rows of length one, values as lengths."""
        scale = self.scale.cpu()
        with torch.no_grad():
            encoder, bias, decoder, centre = (p.detach().cpu() for p in self.parameters)
        threshold = torch.full((self.size,), self.threshold) / scale
        return SparseAutoencoder(self.site, encoder, decoder, bias / scale, self.mean.cpu() + centre / scale,
                                 "jumprelu", threshold, centred=True)  # fmt: skip
