"""Choosing a direction by what it does: ablated it must hide forget answers and spare the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit._collect import subsample
from repforget.edit.steer._writers import ablate_writers
from repforget.errors import NoEffectError
from repforget.knowledge import Fact
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.models.weights import writers
from repforget.records import Site
from repforget.scoring.encode import context_limit, encode_many, pad_id, token_batches
from repforget.scoring.forward import forward, places_tokens

MOST_KL = 0.1  # nats at the last prompt token of retained facts
LEAST_INDUCED = 0.0
JUDGED = 32  # facts of each set
LATEST = 0.8  # share of the depth beyond which directions belong to the output (Arditi et al., appendix C)


@dataclass(frozen=True)
class Scores:
    """What one direction does: log-odds of forget answers with it ablated (``bypass``, low is good), fall of those of
    retained answers when it is added at its site (``induce``), KL of ablation on retained prompts (``kl``)."""

    bypass: float
    induce: float
    kl: float


def allowed(scores: Scores, layer: int, layers: int) -> bool:
    """The rules of arXiv 2406.11717: none of the last fifth of layers, ``induce`` at least 0, KL at most 0.1."""
    finite = all(map(math.isfinite, (scores.bypass, scores.induce, scores.kl)))
    early = layer < max(1, int(LATEST * layers))
    return finite and early and scores.induce >= LEAST_INDUCED and scores.kl <= MOST_KL


def best(scores: Mapping[tuple[Site, str], Scores], layers: int) -> tuple[Site, str]:
    """The candidate (site, position) with the lowest bypass among those allowed; NoEffectError where none is."""
    kept = {key: s for key, s in scores.items() if allowed(s, key[0].layer or 0, layers)}
    if not kept:
        least = min((s.kl for s in scores.values()), default=float("nan"))
        raise NoEffectError(f"None of {len(scores)} directions passes the rules (first {LATEST:.0%} of the layers, "
                            f"induce at least 0, KL at most {MOST_KL}; the smallest KL is {least:.3g}): read other "
                            "positions, or select by spread.")  # fmt: skip
    return min(kept, key=lambda key: kept[key].bypass)


@dataclass(frozen=True)
class Judge:
    """Prompts with the first token of their answers, and what the untouched model says of the retained ones."""

    model: LoadedModel
    forget: tuple[tuple[tuple[int, ...], ...], Tensor]
    retain: tuple[tuple[tuple[int, ...], ...], Tensor]
    known: Tensor  # [n, V] log-probabilities on retained prompts

    @classmethod
    def of(cls, model: LoadedModel, forget: Sequence[Fact], retain: Sequence[Fact]) -> Judge:
        """Two forward passes over the facts."""
        ours, others = _prompts(model, forget), _prompts(model, retain)
        return cls(model, ours, others, last_log_probs(model, others[0]))

    def scores(self, basis: Tensor, added: Tensor, site: Site) -> Scores:
        """Of the direction(s) ``basis`` [r, d] ablated everywhere, and of ``added`` [d] at ``site``; three passes."""
        with ablated(self.model, basis):
            hidden = last_log_probs(self.model, self.forget[0])
            spared = last_log_probs(self.model, self.retain[0])
        with hooks(self.model, {site: addition(added)}):
            moved = last_log_probs(self.model, self.retain[0])
        fall = log_odds(self.known, self.retain[1]) - log_odds(moved, self.retain[1])
        kl = (self.known.exp() * (self.known - spared)).sum(-1)
        return Scores(float(log_odds(hidden, self.forget[1]).mean()), float(fall.mean()), float(kl.mean()))


def ablated(model: LoadedModel, basis: Tensor) -> AbstractContextManager[object]:
    """Nothing is written along orthonormal ``basis`` [r, d] while inside: by hooks at what is written, or, where norms
    stand behind the writers and rescale it, by the weights of the edit."""
    if any(ref.post_norm is not None for ref in writers(model.module)):
        return Edit.build("ablation", {}, model, "", ablate_writers(model, basis)).attach(model)
    places = site_map(model.module)
    writes = [*places.expand("resid_pre")[:1], *places.expand("attn_out"), *places.expand("mlp_out")]
    return hooks(model, dict.fromkeys(writes, lambda x: x - (x @ basis.to(x).mT) @ basis.to(x)))


def addition(vector: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x + vector.to(x)


def log_odds(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """log p - log(1 - p) of the answers' first tokens [n], finite also at p = 1."""
    p = log_probs.gather(1, tokens[:, None])[:, 0]
    return p - torch.log(-torch.expm1(p.clamp(max=-1e-12)))


def last_log_probs(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities [n, V] of what follows each prompt, float64 on the CPU."""
    found: dict[int, Tensor] = {}
    for rows, batch in token_batches(prompts, pad_id=pad_id(model.tokenizer), side="left",
                                     equal_length=not places_tokens(model)):  # fmt: skip
        logits, _ = forward(model, batch.ids, batch.mask, batch.position_ids, 1)
        found.update(zip(rows, logits[:, -1].double().cpu().log_softmax(-1), strict=True))
    return torch.stack([found[row] for row in range(len(prompts))])


def held_out(facts: Sequence[Fact], seed: int) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Facts to fit directions on, and at most ``JUDGED`` others (a quarter at most) to judge them by."""
    judged = subsample(facts, max(1, min(JUDGED, len(facts) // 4)), seed)
    chosen = {fact.id for fact in judged}
    return tuple(fact for fact in facts if fact.id not in chosen) or judged, judged


def _prompts(model: LoadedModel, facts: Sequence[Fact]) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
    coded = encode_many(model.tokenizer, [(f.prompt, f.answer) for f in facts], limit=context_limit(model))
    return tuple(c.ids[: c.start] for c in coded), torch.tensor([c.ids[c.start] for c in coded])
