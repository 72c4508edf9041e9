"""A small two-layer network for many layers and folds at once: finds what no linear classifier can."""

from __future__ import annotations

import torch
from torch import Tensor

from repforget.probing.logistic import Problem

BATCH = 64
CHECKS = 12
DECAY = 4.0  # strong: with hundreds of rows an undecayed network memorises them
BETAS = (0.9, 0.99)


def network(
    x: Tensor, problem: Problem, stopping: Tensor, *, hidden: int = 64, steps: int = 400, rate: float = 0.02,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """Logits [l, j, c, n] of ReLU networks with one hidden layer, trained by Adam with early stopping.

    ``x`` [l, n, d]; ``stopping`` [j, n] marks training rows that are kept out of the updates and choose the step
    whose predictions are returned.  All fits share minibatches and start from the same random weights, so they
    differ only in what they were shown.  Cost: 6 l d hidden j multiply-adds per row of each of ``steps`` batches of
    64.  Source: Kingma and Ba, 2015, arXiv 1412.6980; decoupled decay as in arXiv 1711.05101.
    """
    draws = torch.Generator().manual_seed(seed)
    train = problem.weights * ~stopping
    keep = train.sum(1, keepdim=True).clamp(min=1e-12)
    train = (train / keep * train.shape[1]).to(x)  # mean weight 1 over all rows, so that batches are unbiased
    judge = (problem.weights * stopping).to(x)
    parameters = _initial(x, problem, hidden, draws)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    best = torch.full((x.shape[0], len(problem.labels)), torch.inf, dtype=x.dtype, device=x.device)
    logits = torch.zeros(x.shape[0], len(problem.labels), problem.n_classes, x.shape[1], dtype=x.dtype, device=x.device)
    every = max(1, steps // CHECKS)
    order: list[int] = []
    for step in range(1, steps + 1):
        if len(order) < min(BATCH, x.shape[1]):
            order += torch.randperm(x.shape[1], generator=draws).tolist()
        rows = torch.tensor(order[:BATCH], device=x.device)
        order = order[BATCH:]
        gradients = _gradients(parameters, x[:, rows], problem.labels[:, rows], train[:, rows])
        decayed = rate * (0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / steps))))
        _update(parameters, gradients, moments, step, decayed)
        if step % every == 0 or step == steps:
            now = _forward(parameters, x)[1]
            value = -now.log_softmax(2).gather(2, problem.labels[None, :, None].expand(len(x), -1, 1, -1))[:, :, 0]
            loss = (value * judge).sum(2)
            better = loss < best
            best = torch.where(better, loss, best)
            logits = torch.where(better[:, :, None, None], now, logits)
    return logits


def _initial(x: Tensor, problem: Problem, hidden: int, draws: torch.Generator) -> list[Tensor]:
    depth, _, d = x.shape
    j, c = len(problem.labels), problem.n_classes
    first = torch.randn(hidden, d, generator=draws, dtype=x.dtype) * (2 / d) ** 0.5
    second = torch.randn(c, hidden, generator=draws, dtype=x.dtype) * hidden**-0.5
    return [
        first.to(x.device).expand(depth, j, hidden, d).clone(),
        torch.zeros(depth, j, hidden, 1, dtype=x.dtype, device=x.device),
        second.to(x.device).expand(depth, j, c, hidden).clone(),
        torch.zeros(depth, j, c, 1, dtype=x.dtype, device=x.device),
    ]


def _forward(parameters: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden activations [l, j, h, n] and logits [l, j, c, n]."""
    first, bias, second, shift = parameters
    depth, j, h, d = first.shape
    hidden = ((first.reshape(depth, j * h, d) @ x.mT).reshape(depth, j, h, -1) + bias).relu_()
    return hidden, second @ hidden + shift


def _gradients(parameters: list[Tensor], x: Tensor, labels: Tensor, weights: Tensor) -> list[Tensor]:
    """Gradients of the weighted mean cross-entropy of a batch."""
    first, _, second, _ = parameters
    depth, j, h, d = first.shape
    hidden, logits = _forward(parameters, x)
    error = logits.softmax(2)
    index = labels[None, :, None].expand(depth, -1, 1, -1)
    error.scatter_add_(2, index, torch.full_like(error[:, :, :1], -1.0))
    error *= weights[:, None] / x.shape[1]
    back = (second.mT @ error) * (hidden > 0)
    return [
        (back.reshape(depth, j * h, -1) @ x).reshape(depth, j, h, d), back.sum(3, keepdim=True),
        error @ hidden.mT, error.sum(3, keepdim=True),
    ]  # fmt: skip


def _update(
    parameters: list[Tensor], gradients: list[Tensor], moments: list[tuple[Tensor, Tensor]], step: int, rate: float
) -> None:
    for p, g, (mean, square) in zip(parameters, gradients, moments, strict=True):
        mean.lerp_(g, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        size = (square / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
        if p.shape[3] > 1:  # biases are not decayed
            p.mul_(1 - rate * DECAY)
        p.addcdiv_(mean, size, value=-rate / (1 - BETAS[0] ** step))
