"""Uphill on forget facts as far as a budget of divergence on what must stay allows: what such editors share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repforget.edit._collect import subsample
from repforget.edit.surgery._rows import checked
from repforget.edit.train._data import Row, fact_rows, text_rows
from repforget.edit.train._head import head_of
from repforget.edit.train._pass import LABELS, STATES, Request, read
from repforget.errors import KnowledgeError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel

LOGITS = 1 << 26  # made at a time: 256 MiB in float32
TRIES = 8  # lengths tried per step
CLOSE = 0.7  # share of the allowed divergence that is close enough


@dataclass(frozen=True)
class Split:
    """Rows by what they are for."""

    forget: tuple[Row, ...]
    kept: tuple[Row, ...]  # of which the factors are made
    aside: tuple[tuple[Row, ...], ...]  # on which the divergence is measured, group by group


def split_rows(model: LoadedModel, data: EditData, max_facts: int, seed: int, method: str) -> Split:
    """Rows to forget, rows for the curvature, and every fifth retained cluster and half of the texts set aside."""
    if not data.forget or not data.retain:
        missing = "retain" if data.forget else "forget"
        raise KnowledgeError(f"{method} needs facts to forget and facts to keep: the knowledge has no {missing} facts.")
    forget, _ = fact_rows(model, subsample(data.forget, max_facts, seed), "forget")
    found, facts = fact_rows(model, subsample(data.retain, max_facts, seed), "retain")
    apart = checked(facts)
    held = tuple(row for row, fact in zip(found, facts, strict=True) if fact.cluster in apart)
    kept = tuple(row for row, fact in zip(found, facts, strict=True) if fact.cluster not in apart) or held
    texts = text_rows(model, data.general, "general") if data.general else ()
    return Split(forget, kept + (texts[1::2] or texts), tuple(group for group in (held, texts[::2]) if group))


def longest(at: Callable[[float], float], allowed: float, first: float) -> tuple[float, float]:
    """The longest of some lengths whose divergence is ``allowed``, and that divergence; leaves the weights there."""
    low, spent, high, size = 0.0, math.inf, math.inf, first
    for _ in range(TRIES):
        found = at(size)
        if found <= allowed:
            low, spent = size, found
            if found >= CLOSE * allowed:
                return low, spent
        else:  # not a number counts as too far
            high = size
        size = 4 * low if high == math.inf else math.sqrt(low * high) if low else high / 8
    return low, at(low)


def uphill(
    model: LoadedModel, rows: Sequence[Row], trained: Mapping[str, nn.Parameter], floor: float
) -> tuple[dict[str, Tensor], float, int]:
    """Gradient of the mean negative log-probability of answers above ``floor``; mean probability; how many are it."""
    chosen = list(trained.values())
    total = {name: torch.zeros(p.shape, device=p.device) for name, p in trained.items()}
    chances: list[Tensor] = []
    for part in portions(model, rows):
        (reading,) = read(model, [Request(tuple(part), frozenset({LABELS}))])
        if reading.scores is None:
            raise RuntimeError("the answers were not scored")
        sums = reading.scores.sums
        chances.append(sums.detach().exp())
        known = chances[-1] > floor
        if bool(known.any()):
            loss = -sums[known].sum() / len(rows)
            for kept, gradient in zip(total.values(), torch.autograd.grad(loss, chosen), strict=True):
                kept += gradient
    joined = torch.cat(chances)
    return total, float(joined.mean()), int((joined > floor).sum())


@torch.no_grad()
def put(
    trained: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor], deltas: Mapping[str, Tensor] | None
) -> None:
    """Set the trained parameters to their original values plus ``deltas``."""
    for name, parameter in trained.items():
        start = originals[name]
        parameter.copy_(start if deltas is None else start.float() + deltas[name])


def measure(model: LoadedModel, groups: Sequence[Sequence[Row]]) -> Callable[[], float]:
    """A function that says how far the model has moved: mean divergence (nats per token), that of the worst group."""
    parts = [portions(model, few(model, rows)) for rows in groups]

    @torch.no_grad()
    def told(part: Sequence[Row]) -> Tensor:
        (reading,) = read(model, [Request(tuple(part), frozenset({STATES}))])
        return head_of(model.module).logits(states_of(reading.states)).log_softmax(-1)

    before = [[told(part).cpu() for part in group] for group in parts]

    def divergence() -> float:
        found = []
        for group, known in zip(parts, before, strict=True):
            pairs = ((b.to(model.device), told(part)) for b, part in zip(known, group, strict=True))
            found.append(float(torch.cat([(b.exp() * (b - now)).sum(-1) for b, now in pairs]).double().mean()))
        return max(found)

    return divergence


def few(model: LoadedModel, rows: Sequence[Row]) -> list[Row]:
    """As many rows, at equal distances, as make that number of logits, all of which are remembered."""
    labels = sum(row.labels for row in rows)
    return list(rows[:: -(-labels * model.vocab_size // LOGITS)])


def portions(model: LoadedModel, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in parts of like length that make a bounded number of logits at a time."""
    most = max(1, LOGITS // model.vocab_size)
    parts: list[list[Row]] = []
    size = 0
    for row in sorted(rows, key=lambda row: (len(row.ids), row.ids)):
        if not parts or size + row.labels > most:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += row.labels
    return parts


def states_of(states: Tensor | None) -> Tensor:
    if states is None:
        raise RuntimeError("the states were not read")
    return states
