"""What features do on texts: values and frequencies per token, and which of them tell two sets of texts apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.errors import KnowledgeError
from repforget.features.autoencoder import SparseAutoencoder
from repforget.knowledge import Fact
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.scoring.encode import context_limit, encode_prompts, pad_id, token_batches

Ids = tuple[int, ...]
TOKENS = 4096  # per batch: every token has a value for each of many features


@dataclass(frozen=True)
class Activity:
    """Means over tokens (without first ones and padding), float64: ``mean`` [k] value, ``frequency`` [k] share of
    tokens on which a feature is active, ``when_active`` [k] mean value there (0 for features that never are)."""

    tokens: int
    mean: Tensor
    frequency: Tensor

    def joined(self, other: Activity) -> Activity:
        """Over the tokens of both."""
        n = self.tokens + other.tokens
        share = self.tokens / max(1, n)
        return Activity(n, share * self.mean + (1 - share) * other.mean,
                        share * self.frequency + (1 - share) * other.frequency)  # fmt: skip

    @property
    def when_active(self) -> Tensor:
        return torch.where(self.frequency > 0, self.mean / self.frequency.clamp(min=1e-300), 0.0)


def told(model: LoadedModel, facts: Sequence[Fact], general: Sequence[str] = ()) -> list[Ids]:
    """Token sequences of facts, each with its answer, and of texts, cut to the context."""
    texts = [*(fact.prompt + fact.answer for fact in facts), *general]
    limit = context_limit(model)
    found = [ids[:limit] for ids in encode_prompts(model.tokenizer, texts)] if texts else []
    return [ids for ids in found if len(ids) > 1]


@torch.no_grad()
def feature_values(
    model: LoadedModel, sae: SparseAutoencoder, sequences: Sequence[Ids], progress: Progress | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Per batch (rows, values [b, s, k], counted [b, s]); values of tokens that do not count are 0."""
    batches = list(token_batches(sequences, token_budget=TOKENS, pad_id=pad_id(model.tokenizer)))
    local: SparseAutoencoder | None = None
    for rows, batch in track(progress, batches, "reading features", len(batches)):
        x = capture(model, [sae.site], batch, "all")[sae.site]
        local = sae.to(x.device) if local is None else local
        counted = batch.counted.to(x.device)
        yield rows, torch.where(counted.unsqueeze(-1), local.encode(x), 0.0), counted


def measure(
    model: LoadedModel, sae: SparseAutoencoder, sequences: Sequence[Ids], progress: Progress | None = None
) -> Activity:
    """:class:`Activity` of every feature on token sequences.  Cost: one forward each, up to the site."""
    if not sequences:
        raise KnowledgeError(f"There is no text on which the features at {sae.site} could be measured: give facts of "
                             "two tokens or more.")  # fmt: skip
    total = torch.zeros(2, sae.size, dtype=torch.float64)
    tokens = 0
    for _, values, counted in feature_values(model, sae, sequences, progress):
        total += torch.stack([values.sum((0, 1), dtype=torch.float64), (values > 0).sum((0, 1)).double()]).cpu()
        tokens += int(counted.sum())
    return Activity(tokens, total[0] / max(1, tokens), total[1] / max(1, tokens))


def importance_ratio(forget: Activity, retain: Activity, percentile: float = 95.0) -> Tensor:
    """Squared mean value on forget texts, of the features whose ratio to that on retain texts is at least the
    ``percentile`` of all that are active there; 0 for others [k] (Muhamed et al. 2025, arXiv 2504.08192)."""
    ours, theirs = forget.mean.square(), retain.mean.square()
    live = forget.frequency > 0
    if not bool(live.any()):
        return torch.zeros_like(ours)
    ratio = ours / (theirs + 1e-12 * float(ours.max()))
    cut = torch.quantile(ratio[live], percentile / 100, interpolation="lower")
    return torch.where(live & (ratio >= cut), ours, 0.0)


def frequency_difference(forget: Activity, retain: Activity, relative: float = 3.0) -> Tensor:
    """How much more often a feature is active on forget texts, where its mean value there is at least ``relative``
    times that on retain texts; 0 for others [k] (Ashuach et al. 2025, arXiv 2508.13650)."""
    more = (forget.frequency - retain.frequency).clamp(min=0)
    return torch.where(forget.mean >= relative * retain.mean, more, 0.0)


def rare_elsewhere(forget: Activity, retain: Activity, most: float = 0.01) -> Tensor:
    """Frequency on forget texts of the features that are active on less than a share ``most`` of retain tokens; 0 for
    others [k] (Farrell et al. 2024, arXiv 2410.19278)."""
    return torch.where(retain.frequency < most, forget.frequency, 0.0)
