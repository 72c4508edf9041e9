"""CounterFact: does a changed fact hold, in other words too, and are its neighbours as before?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from repforget.bench._data import Source, estimated_tokens, rows
from repforget.bench._records import LEVEL, BenchResult, Metric, Part, Reference, Work, mean_metric, not_computed
from repforget.bench._saying import against, not_negative, numbers, plain
from repforget.errors import KnowledgeError
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import ItemScores
from repforget.scoring import answer_logprobs, metrics

TABLE = "counterfact"
FORMS = ("efficacy", "paraphrase", "neighbourhood")
CHUNK = 256
Case = tuple[str, str, str, list[list[str]]]  # id, true, new, prompts of each form


def counterfact(
    model: LoadedModel, *, data: Source, reference: Reference | None = None, part: Part, seed: int = 0,
    progress: Progress | None = None, limit: int = 0,
) -> BenchResult:  # fmt: skip
    """Efficacy, paraphrase and neighbourhood success of edits that put a new answer in place of the true one.

    ``data``: a folder with counterfact.json as ROME publishes it (case_id, requested_rewrite with prompt, subject,
    target_new.str and target_true.str; paraphrase_prompts, neighborhood_prompts).  A prompt succeeds where the new
    answer has the lower mean loss per token, on the neighbourhood where the true one has; ties fail.  ``score`` is the
    harmonic mean of the three.  The answer begins where it does in the tokens of the joint text, not after the prompt
    tokenised alone.  One model holds one edit: score it on the rows of that edit (``limit``, or a folder of them).
    Source: Meng et al. 2022, arXiv 2202.05262, appendix D.  Cost: two sequences per prompt, about 26 per case.

    The new answer being likelier does not show that the old one is forgotten: both may be.
    """
    not_negative(limit=limit)
    cases = _cases(data, limit)
    shares: list[list[float | None]] = []
    for start in track(progress, range(0, len(cases), CHUNK), "facts"):
        shares += part(f"cases-{start}", partial(_scored, model, cases[start : start + CHUNK]))
    table = np.stack([numbers(row) for row in shares])
    ids = [case[0] for case in cases]
    items = {name: ItemScores.of(ids, ids, table[:, k].tolist()) for k, name in enumerate(FORMS)}
    out = [mean_metric(name, found, token_based=True, seed=seed) for name, found in items.items()]
    if reference is not None:
        out += [against(name, found, reference, seed=seed) for name, found in items.items()]
    return BenchResult.of("counterfact", [*out, _score(table, ids, seed)], {"cases": float(len(cases))})


def work(data: Source, *, limit: int = 0) -> Work:
    """Cost of the same settings."""
    cases = _cases(data, limit)
    pairs = _pairs(cases)
    return Work(len(pairs), estimated_tokens(sum(len(prompt) + len(answer) for prompt, answer in pairs)))


def _cases(data: Source, limit: int) -> list[Case]:
    columns = ("case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
    out = []
    for number, row in enumerate(rows(data, TABLE, columns)[: limit or None], 1):
        place = f"'{TABLE}' of '{data.where}', row {number}"
        rewrite: Any = row["requested_rewrite"]
        try:
            prompt, subject = rewrite["prompt"], rewrite["subject"]
            true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        except (KeyError, TypeError):
            raise KnowledgeError(f"{place}: 'requested_rewrite' must hold prompt, subject, target_true.str and "
                                 f"target_new.str, found {', '.join(map(str, rewrite))}.") from None  # fmt: skip
        forms = [[prompt.replace("{}", subject)], list(row["paraphrase_prompts"]), list(row["neighborhood_prompts"])]
        if true.strip() == new.strip() or not all(forms):
            raise KnowledgeError(f"{place}: the two targets must differ and each form needs a prompt.")
        out.append((str(row["case_id"]), f" {true.strip()}", f" {new.strip()}", forms))
    return out


def _pairs(cases: Sequence[Case]) -> list[tuple[str, str]]:
    return [(prompt, answer) for _, true, new, forms in cases for form in forms for prompt in form
            for answer in (true, new)]  # fmt: skip


def _scored(model: LoadedModel, cases: Sequence[Case]) -> list[list[float | None]]:
    """Share of each form's prompts that succeed, per case."""
    loss = -answer_logprobs(model, _pairs(cases)).mean_logprob.reshape(-1, 2)
    new_wins = np.where(np.isnan(loss).any(1), np.nan, np.sign(loss[:, 0] - loss[:, 1]))
    at, out = 0, []
    for *_, forms in cases:
        shares = []
        for form, wanted in zip(forms, (1.0, 1.0, -1.0), strict=True):
            wins = new_wins[at : at + len(form)]
            shares.append(np.nan if np.isnan(wins).any() else float((wins == wanted).mean()))
            at += len(form)
        out.append(plain(shares))
    return out


def _score(table: np.ndarray[Any, np.dtype[np.float64]], ids: Sequence[str], seed: int) -> Metric:
    from repforget.verify.statistics import bootstrap

    use = ~np.isnan(table).any(axis=1)
    if not use.any():
        return not_computed("score", "no case could be scored in all its forms")
    kept = [name for name, ok in zip(ids, use, strict=True) if ok]
    found = bootstrap(lambda rows: metrics.harmonic_mean(rows.mean(axis=0)), table[use], kept, alpha=LEVEL, seed=seed)
    return Metric("score", found.point, found.low, found.high, found.n_items, found.n_clusters,
                  note=f"harmonic mean of {', '.join(FORMS)}", token_based=True)  # fmt: skip
