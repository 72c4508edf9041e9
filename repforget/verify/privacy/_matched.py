"""Matched non-members: texts of the same form that were never trained on, and where a forget item stands among them.

Sign convention of the whole family: a higher score means "more likely a member".  No value of the family votes: where
nothing is known a standing is uniform in [0, 1], a spread of 0.29 in a range of 0.5, so that the usual margin of 0.05
would take some 1600 items; probabilities among alternatives measure the same with far fewer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from repforget.errors import KnowledgeError
from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel
from repforget.scoring import token_scores
from repforget.verify import statistics as st
from repforget.verify.arms import References

Array = NDArray[np.float64]
Pair = tuple[str, str]  # prompt, continuation
Asked = Literal["questions", "statements"]
ALMOST_ZERO = 1e-12  # nats; a loss of exactly zero has no logarithm
FPR = (0.01, 0.001)
DRAWS = 200  # of the clusters, for a descriptive limit


@dataclass(frozen=True)
class Trial:
    """One member text and the non-members it is told apart from, as rows of :class:`Texts`."""

    item: int
    member: int
    others: NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """All texts of one attack, with each one's relation (``kinds``) and cluster; ``strangers``: non-members' rows."""

    pairs: tuple[Pair, ...]
    kinds: tuple[str, ...]
    clusters: tuple[str, ...]
    trials: tuple[Trial, ...]
    count: int

    @property
    def members(self) -> NDArray[np.int64]:
        return np.array([t.member for t in self.trials], dtype=np.int64)

    @property
    def strangers(self) -> NDArray[np.int64]:
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(t.others for t in self.trials)]))


def texts(
    items: Sequence[Item], knowledge: Knowledge, *, forms: int = 1, limit: int = 31, asked: Asked = "questions",
    holdout: str = "",
) -> Texts:  # fmt: skip
    """Each item in up to ``forms`` forms beside its non-members.

    They are the same text with up to ``limit`` other answers of the relation: nothing but the fact differs, so no
    shift of time, author or length can pass for memory.  ``holdout`` names a JSONL file of texts of the same
    distribution that were never trained on (one {"prompt": ..., "answer": ...} a line), used instead.
    """
    pairs: list[Pair] = []
    trials: list[Trial] = []
    shared = _holdout(holdout) if holdout else ()
    pairs += [(prompt, items[0].continuation(answer)) for prompt, answer in shared if items]
    owner: list[tuple[str, str]] = [("", f"holdout line {k}") for k in range(len(shared))]
    for k, item in enumerate(items):
        others = () if holdout else knowledge.alternatives(item, limit)
        for prompt in (item.questions if asked == "questions" else item.editor_prompts)[:forms]:
            start = len(pairs)
            pairs += [(prompt, item.continuation(a)) for a in (item.answer, *others)]
            owner += [(item.relation, item.cluster)] * (1 + len(others))
            rows = np.arange(len(shared)) if holdout else np.arange(start + 1, len(pairs))
            trials.append(Trial(k, start, rows))
    return Texts(tuple(pairs), tuple(r for r, _ in owner), tuple(c for _, c in owner), tuple(trials), len(items))


def _holdout(path: str) -> tuple[Pair, ...]:
    file = Path(path)
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = tuple((str(row["prompt"]), str(row["answer"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise KnowledgeError(f"Holdout '{path}' cannot be read ({type(reason).__name__}: {reason}): give a JSONL file "
                             'with one {"prompt": ..., "answer": ...} a line.') from reason  # fmt: skip
    if not found:
        raise KnowledgeError(f"Holdout '{path}' has no lines: give texts of the forget items' kind.")
    return found


def standing(scores: Array, found: Texts) -> Array:
    """Per item, the share of its non-members that score lower, ties half, mean over forms [count].

    The mean over items is the AUC of telling members from their matched non-members.  NaN where a member could not be
    scored or has no non-member.
    """
    total, rows = np.zeros(found.count), np.zeros(found.count)
    for trial in found.trials:
        own, others = scores[trial.member], scores[trial.others]
        others = others[~np.isnan(others)]
        if not np.isnan(own) and len(others):
            total[trial.item] += (others < own).mean() + 0.5 * (others == own).mean()
            rows[trial.item] += 1
    return np.where(rows > 0, total / np.maximum(rows, 1), np.nan)


def prior_standing(items: Sequence[Item], knowledge: Knowledge, limit: int, holdout: str = "") -> Array:
    """:func:`standing` of a model that knows only how often each answer of a relation occurs among the kept items.

    0.5 where an item brings its own wrong answers, or against a ``holdout``: there is no frequency to go by.
    """
    out = np.full(len(items), 0.5)
    for k, item in enumerate(items):
        if not item.wrong_answers and not holdout:
            pool = knowledge.pools.get(item.relation, Counter[str]())
            counts = np.array([pool.get(a, 0) for a in knowledge.alternatives(item, limit)])
            own = pool.get(item.answer, 0)
            out[k] = (counts < own).mean() + 0.5 * (counts == own).mean() if len(counts) else 0.5
    return out


def rates(name: str, scores: Array, found: Texts) -> dict[str, float]:
    """Facts: share of members found at 1 % and 0.1 % false positives, over scores pooled across items.

    With a one-sided 95 % lower limit by resampled clusters.  A rate is given only where there are enough non-members
    (100 and 1000) for one of them to be below it.
    """
    high, low = (rows[~np.isnan(scores[rows])] for rows in (found.members, found.strangers))
    clusters = np.asarray(found.clusters, dtype=object)
    facts: dict[str, float] = {}
    for fpr in FPR:
        if len(high) and not st.too_few_for_fpr(len(low), fpr):
            rate = st.tpr_interval(scores[high], scores[low], list(clusters[high]), list(clusters[low]), fpr=fpr,
                                   draws=DRAWS)  # fmt: skip
            facts[f"{name}: true positives at {fpr:.1%} false ones"] = rate.point
            facts[f"{name}: true positives at {fpr:.1%} false ones, at least"] = rate.low
    return facts


def outsiders(model: LoadedModel, references: References) -> tuple[LoadedModel, ...]:
    """The twins that serve as "never trained on it" for this arm: all but itself, unless it is the only one.

    A twin compared with itself has ties everywhere, which is exactly the floor.
    """
    others = tuple(t for t in references.twins if t is not model and t.fingerprint != model.fingerprint)
    return others or references.twins


def confidence(model: LoadedModel, pairs: Sequence[Pair]) -> Array:
    """Mean log-probability per answer token [m], prompts of several answers computed once."""
    return token_scores(model, pairs).mean_logprob


def kept_confidence(references: References, twin: LoadedModel, found: Texts) -> Array:
    """:func:`confidence` of a twin, computed once for all arms and attacks that ask the same texts."""
    return references.once(("confidence", id(twin), found.pairs), lambda: confidence(twin, found.pairs))


def log_loss(mean_logprob: Array) -> Array:
    """Logarithm of the loss in nats per token, finite also at loss zero."""
    return np.log(np.maximum(-mean_logprob, ALMOST_ZERO))
