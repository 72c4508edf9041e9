"""Questions put to a model: how they are written, what their answers score, what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repforget.bench._records import LEVEL, Metric
from repforget.bench._saying import say
from repforget.errors import UsageError
from repforget.progress import Progress, track
from repforget.scoring import metrics
from repforget.scoring.rouge import rouge_l
from repforget.scoring.tokens import token_scores

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

Array = NDArray[np.float64]
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
SAID_TOGETHER = 256  # generations between two steps of the progress
SCORED_TOGETHER = 2048  # sequences between two steps of the progress


class Form(Protocol):
    """How questions are put: ``template`` with {question}, or "chat"; what stands before the answer; its length."""

    @property
    def template(self) -> str: ...
    @property
    def separator(self) -> str: ...
    @property
    def new_tokens(self) -> int: ...


@dataclass(frozen=True)
class Scores:
    """Answers scored by teacher forcing, with their end token where the tokenizer has one; NaN = did not fit."""

    loss: Array  # [n] mean nats per token
    hits: tuple[str, ...]  # n strings, "1" where the token is the arg max
    membership: Mapping[str, Array]  # attack -> [n], higher = rather a member
    eos: bool  # the end token is the last of each

    def to_json(self) -> dict[str, Any]:
        return {"loss": self.loss.tolist(), "hits": list(self.hits), "eos": self.eos,
                "membership": {name: values.tolist() for name, values in self.membership.items()}}  # fmt: skip

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Scores:
        arrays = {name: np.array(values, dtype=np.float64) for name, values in data["membership"].items()}
        return cls(np.array(data["loss"], dtype=np.float64), tuple(data["hits"]), arrays, data["eos"])


def rendered(model: LoadedModel, form: Form, question: str) -> str:
    """The question as the model reads it; "chat" uses the tokenizer's own template."""
    if form.template != "chat":
        return form.template.replace("{question}", question)
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"The tokenizer of '{model.name}' has no chat template: give --set template=... with "
                         "{question} in it.")  # fmt: skip
    turns = [{"role": "user", "content": question}]
    said = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return said.removeprefix(tokenizer.bos_token or "")  # the tokenizer puts its own in front


def before(form: Form) -> str:
    """What stands between the rendered question and the answer."""
    return "" if form.template == "chat" else form.separator


def asked(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], form: Form, *, moments: bool = False,
    progress: Progress | None = None,
) -> Scores:  # fmt: skip
    """Score each answer after its rendered question; ``moments`` adds what membership attacks need."""
    eos = model.tokenizer.eos_token_id is not None
    blocks = []
    for start in track(progress, range(0, len(pairs), SCORED_TOGETHER), "answers"):
        joined = [(prompt, before(form) + answer) for prompt, answer in pairs[start : start + SCORED_TOGETHER]]
        blocks.append(token_scores(model, joined, eos=eos, moments=moments))
    mean = np.concatenate([block.mean_logprob for block in blocks])
    membership = {}
    if moments:
        logs, mu, sigma2 = ([x for block in blocks for x in getattr(block, name) or ()]
                            for name in ("logprobs", "mu", "sigma2"))  # fmt: skip
        values = (mean, metrics.zlib_score(mean, [answer for _, answer in pairs]), metrics.min_k(logs),
                  metrics.min_k_plus_plus(logs, mu, sigma2))  # fmt: skip
        membership = dict(zip(ATTACKS, values, strict=True))
    hits = tuple("".join("1" if hit else "0" for hit in row) for block in blocks for row in block.hits)
    return Scores(-mean, hits, membership, eos)


def recalls(
    model: LoadedModel, prompts: Sequence[str], answers: Sequence[str], form: Form, progress: Progress | None = None,
    hits: Sequence[str] | None = None,
) -> list[float | None]:  # fmt: skip
    """ROUGE-L recall of each answer in the greedy continuation; None where the context leaves no room for one.

    ``hits`` of :func:`asked` for the same prompts and answers spare what they tell already.
    """
    agreed = None if hits is None else [np.array([sign == "1" for sign in line], dtype=np.bool_) for line in hits]
    out: list[float | None] = []
    for start in track(progress, range(0, len(prompts), SAID_TOGETHER), "generations"):
        block = slice(start, start + SAID_TOGETHER)
        drafts = [before(form) + answer for answer in answers[block]]
        said = say(model, prompts[block], new_tokens=form.new_tokens, whole=True, answers=drafts,
                   hits=None if agreed is None else agreed[block])  # fmt: skip
        out += [None if text is None else rouge_l(answer, text).recall
                for text, answer in zip(said, answers[block], strict=True)]  # fmt: skip
    return out


def attacks(
    members: Scores, others: Scores, clusters: Sequence[str], clusters_others: Sequence[str], *, seed: int = 0
) -> list[Metric]:
    """AUC of each membership attack with limits from resampled clusters: 1 = members stand out, 0.5 = they do not."""
    from repforget.verify.statistics import auc_interval

    out = []
    for name in ATTACKS:
        high, low = members.membership[name], others.membership[name]
        kept, kept_low = ~np.isnan(high), ~np.isnan(low)
        names = [c for c, ok in zip(clusters, kept, strict=True) if ok]
        names_low = [c for c, ok in zip(clusters_others, kept_low, strict=True) if ok]
        found = auc_interval(high[kept], low[kept_low], names, names_low, alpha=LEVEL, seed=seed)
        out.append(Metric(f"membership.{name}", found.point, found.low, found.high, found.n_items, found.n_clusters,
                          "reference", note="AUC, forget above holdout", token_based=True))  # fmt: skip
    return out
