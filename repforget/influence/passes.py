"""Passes over examples that give what linear maps read, and the gradients of what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.errors import NumericalError, SiteError, UsageError
from repforget.influence.factors import watched
from repforget.models._hooking import run_forward
from repforget.models.gather import Batch
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.scoring.encode import pad_id, token_batches
from repforget.training import Example, only

LOGITS = 1 << 26  # made at a time: 256 MiB in float32
TOKENS = 4096  # read at a time
DRAWN = 1 << 21  # logits from which labels are drawn at a time


@dataclass(frozen=True, eq=False)
class Pass:
    """One batch: per linear map inputs [b, s, in] and gradients of outputs [b, s, out] of the losses of ``rows``,
    each summed over its labelled tokens; ``predictions`` are these tokens, ``losses`` [b] in nats."""

    rows: list[int]
    seen: Mapping[str, tuple[Tensor, Tensor]]
    predictions: int
    losses: Tensor


def passes(
    model: LoadedModel, examples: Sequence[Example], names: Sequence[str], *, drawn: Tensor | None = None,
    progress: Progress | None = None, description: str = "reading gradients",
) -> Iterator[Pass]:  # fmt: skip
    """Forward and backward over ``examples`` in batches of like length; their order and padding do not matter.

    ``drawn`` [predictions, in the order of the examples] are numbers in [0, 1) by which labels are drawn from the model
    in the place of the true ones, those of one prediction always alike.  Raises NumericalError for a loss that is not
    finite.
    """
    if not examples:
        raise UsageError("There is no example to read gradients of: give at least one.")
    starts = _starts(examples)
    budget = max(1, min(TOKENS, LOGITS // model.vocab_size))
    parts = list(token_batches([e.tokens for e in examples], token_budget=budget, pad_id=pad_id(model.tokenizer)))
    for rows, batch in track(progress, parts, description, len(parts)):
        which = None if drawn is None else torch.cat([torch.arange(starts[k], starts[k + 1]) for k in rows])
        numbers = None if drawn is None or which is None else drawn[which]
        yield _read(model, rows, batch, [examples[k] for k in rows], names, numbers)


def _read(
    model: LoadedModel, rows: list[int], batch: Batch, examples: Sequence[Example], names: Sequence[str],
    drawn: Tensor | None,
) -> Pass:  # fmt: skip
    row, place = _places(examples)
    weights: list[nn.Parameter] = [model.module.get_parameter(name) for name in names]
    with only(model.module, weights), watched(model, names) as seen:
        logits = run_forward(model.module, batch.to(model.device), vocabulary=True).logits
        found = logits[row, place - 1]
        found = found if found.dtype == torch.float64 else found.float()
        labels = batch.ids[row, place] if drawn is None else drawn_labels(found.detach(), drawn)
        losses = functional.cross_entropy(found, labels.to(found.device), reduction="none")
        if not bool(torch.isfinite(losses).all()):
            raise NumericalError("The loss of an example is not finite: check the model, or load it in float32.")
        gradients = torch.autograd.grad(losses.sum(), [output for _, output in seen.values()])
    pairs = {name: (_rows(inputs, batch, name), _rows(g, batch, name))
             for (name, (inputs, _)), g in zip(seen.items(), gradients, strict=True)}  # fmt: skip
    each = torch.zeros(len(rows), dtype=torch.float64).index_add(0, row, losses.detach().double().cpu())
    return Pass(rows, pairs, len(row), each)


def _rows(values: Tensor, batch: Batch, name: str) -> Tensor:
    """Values as [b, s, width]: some architectures join rows and positions in front of a map (OPT)."""
    if values.shape[:-1].numel() != batch.ids.numel():
        raise SiteError(f"'{name}' does not read every token once (some are routed elsewhere): influence is not read "
                        "there; name other maps by a localization.")  # fmt: skip
    return values.reshape(*batch.ids.shape, values.shape[-1])


def uniform(examples: Sequence[Example], seed: int) -> Tensor:
    """A number in [0, 1) for every prediction of the examples, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(_starts(examples)[-1], generator=generator, dtype=torch.float64)


def drawn_labels(logits: Tensor, numbers: Tensor) -> Tensor:
    """Labels [m] drawn from the distributions of ``logits`` [m, V] by ``numbers`` [m] in [0, 1): the inverse of the
    distribution function, so that a draw belongs to its prediction and not to its batch."""
    out = []
    size = max(1, DRAWN // logits.shape[-1])
    for part in (slice(k, k + size) for k in range(0, len(logits), size)):
        reached = logits[part].cpu().double().softmax(-1).cumsum(-1)
        out.append(torch.searchsorted(reached, (numbers[part] * reached[:, -1])[:, None], right=True)[:, 0])
    return torch.cat(out).clamp(max=logits.shape[-1] - 1)


def predictions(example: Example) -> int:
    """How many tokens carry loss; position 0 never does."""
    return sum(example.labelled[1:])


def _starts(examples: Sequence[Example]) -> list[int]:
    starts = [0]
    for example in examples:
        starts.append(starts[-1] + predictions(example))
    return starts


def _places(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    table = [(row, at) for row, e in enumerate(examples) for at in range(1, len(e.tokens)) if e.labelled[at]]
    columns = torch.tensor(table, dtype=torch.long).T
    return columns[0], columns[1]
