"""The shards served together: their weight changes side by side, or the one that a prompt is at home in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from repforget.artifact import Edit
from repforget.errors import UsageError
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.scoring import encode_prompts, generate, token_batches
from repforget.scoring.encode import pad_id
from repforget.scoring.forward import forward
from repforget.shards.adapters import Factors, merged_factors, operations, worn
from repforget.shards.folder import Training, factors_of, served
from repforget.training.items import digest

METHOD = "train_shards"
Route = Literal["confidence", "loss"]


def combined(training: Training, model: LoadedModel) -> Edit:
    """All shards in one edit of the base: per layer one low-rank delta with the factors of all shards side by side.

    The weight change is w sum_k s B_k A_k, exactly; w is 1 ("sum") or 1/K ("mean").  The sum keeps what each shard has
    learned at full strength however many shards there are; the mean is, to first order, the model whose logits are the
    mean of the shards', K-1 of which know no more of a record than the base.  In both, shards that were trained apart
    disturb one another, the more the longer they were trained (measured: experiments/speed/shards.json); one shard at
    a time (:func:`answers`) keeps far more.  Raises ArtifactError for another model than the base, UsageError where a
    shard is not finished, NoEffectError where no record is left.
    """
    training.check_base(model)
    parts = [(training.settings.weight, factors) for factors in shard_factors(training).values()]
    how = {"combine": training.settings.combine, "weight": training.settings.weight, "shards": training.settings.shards}
    return _edit(training, model, merged_factors(parts), how)


def shard_edit(training: Training, model: LoadedModel, shard: int) -> Edit:
    """One shard alone, at full strength, as an edit of the base: what :func:`best_shard` chooses among."""
    training.check_base(model)
    if not 0 <= shard < training.settings.shards:
        raise UsageError(f"There is no shard {shard}: give one of 0 to {training.settings.shards - 1}.")
    factors = merged_factors([(1.0, factors_of(training, served(training)[shard]))])
    return _edit(training, model, factors, {"combine": "one", "weight": 1.0, "shard": shard})


def _edit(training: Training, model: LoadedModel, factors: Factors, how: dict[str, Any]) -> Edit:
    settings = {**how, "folder": training.root.name, "order": training.settings.order}
    return Edit.build(METHOD, settings, model, digest(training.records), operations(factors, training.settings.scale))


def shard_factors(training: Training) -> dict[int, Factors]:
    """Shard -> the factors that it serves."""
    return {shard: factors_of(training, stages) for shard, stages in served(training).items()}


def best_shard(
    training: Training, model: LoadedModel, prompts: Sequence[str], *, by: Route = "confidence", base: bool = False,
    progress: Progress | None = None,
) -> list[int]:  # fmt: skip
    """The shard that answers each prompt: the surest of its next token, or the one with the lowest prompt loss.

    "confidence" compares the largest probability of the next token, "loss" the mean cross-entropy of the prompt (which
    was never trained on where records have prompts).  Of equals the lowest number.  A shard is chosen by what it says,
    so a prompt about nobody is answered by some shard, too, unless the ``base`` (then -1, and first of equals) is
    surer.  Cost: one pass over the prompts per shard.
    """
    training.check_base(model)
    tokens = encode_prompts(model.tokenizer, prompts)
    if by == "loss" and any(len(ids) < 2 for ids in tokens):
        raise UsageError("A prompt of one token has no loss to route by: give longer prompts, or route by confidence.")
    candidates: list[Factors] = [{}] if base else []
    candidates += shard_factors(training).values()
    scores = [_scores(model, factors, training.settings.scale, tokens, by)
              for factors in track(progress, candidates, "routing prompts")]  # fmt: skip
    return [int(k) - base for k in torch.stack(scores).argmax(0)]


@torch.no_grad()
def _scores(
    model: LoadedModel, factors: Factors, scale: float, tokens: Sequence[Sequence[int]], by: Route
) -> Tensor:
    """[n] float64, higher where the shard is more at home."""
    found = torch.empty(len(tokens), dtype=torch.float64)
    placed = {name: t.to(model.device) for name, t in factors.items()}
    with worn(model.module, placed, scale):
        for rows, batch in token_batches(tokens, pad_id=pad_id(model.tokenizer)):
            width = batch.ids.shape[1]
            logits = forward(model, batch.ids, batch.mask, batch.position_ids, width)[0]
            logp = functional.log_softmax(logits.double(), -1).cpu()
            ends = batch.mask.sum(1).long() - 1
            if by == "confidence":
                found[rows] = logp[torch.arange(len(rows)), ends].max(-1).values
            else:
                said = logp[:, :-1].gather(-1, batch.ids[:, 1:, None])[..., 0] * batch.mask[:, 1:]
                found[rows] = said.sum(1) / ends
    return found


def answers(
    training: Training, model: LoadedModel, prompts: Sequence[str], *, by: Route = "confidence",
    max_new_tokens: int = 16,
) -> list[tuple[int, str]]:  # fmt: skip
    """Each prompt continued greedily by the shard it is routed to: (shard, text)."""
    chosen = best_shard(training, model, prompts, by=by)
    scale, said = training.settings.scale, [""] * len(prompts)
    for shard, factors in shard_factors(training).items():
        rows = [i for i, k in enumerate(chosen) if k == shard]
        placed = {name: t.to(model.device) for name, t in factors.items()}
        with worn(model.module, placed, scale):
            texts = generate(model, [prompts[i] for i in rows], max_new_tokens=max_new_tokens) if rows else []
        for i, (text, *_) in zip(rows, texts, strict=True):
            said[i] = text
    return list(zip(chosen, said, strict=True))
