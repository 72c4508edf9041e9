"""MUSE: six ways to look at a model that should have forgotten a corpus of texts (arXiv 2407.06460)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from repforget.bench import _muse as m
from repforget.bench._data import Source, estimated_tokens, has, rows, text
from repforget.bench._muse_series import scalability, sustainability
from repforget.bench._records import LEVEL, BenchResult, Metric, Part, Reference, Work, not_computed
from repforget.bench._saying import against, not_negative, numbers, plain, say, spoken, whole_text
from repforget.errors import KnowledgeError, UsageError
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import ItemScores
from repforget.scoring import metrics
from repforget.scoring.rouge import rouge_l
from repforget.scoring.tokens import token_scores

DATA = "muse-bench/MUSE-News"
AGGREGATION = ("published_reference", "scal_models", "sust_models")
SIDES = {"knowmem_forget": "forget", "utility": "retain"}
STOPS = ("\n\n", "\nQuestion", "Question:")
Compat = Literal["muse", "open-unlearning"]
Row = dict[str, Any]


def muse(
    model: LoadedModel, *, data: Source, reference: Reference | None = None, part: Part, seed: int = 0,
    progress: Progress | None = None, shots: int = 10, verbatim_tokens: int = 128, answer_tokens: int = 32,
    k: float = 0.4, compat: Compat = "muse", published_reference: Literal["none", "news", "books"] = "none",
    scal_models: tuple[str, ...] = (), sust_models: tuple[str, ...] = (), fold_texts: int = 50,
    fold_characters: int = 1000, limit: int = 0,
) -> BenchResult:  # fmt: skip
    """Verbatim and knowledge memorisation, privacy leakage and utility; over folds also scale and sequences.

    Data: muse-bench/MUSE-News or MUSE-Books, or a folder with verbmem/forget (prompt, gt), knowmem/{forget,retain}_qa
    and their ``_icl`` (question, answer), privleak/{forget,holdout} (text), and scal, sust/forget_1, ... (text).
    ``verbmem`` is ROUGE-L F1 of 128 greedy tokens with the true continuation cut to 128 tokens (any <bos> counted),
    ``knowmem_forget`` and ``utility`` that of 32 tokens after ten worked examples, without stemming (``compat=
    "open-unlearning"``: with), from 0 to 1.  ``privleak`` = 100 (A - A_r) / A_r with A the AUC of Min-40 % scores by
    which unseen texts look more like members than forgotten ones; A_r is the reference's, or with
    ``published_reference`` the constant of the MUSE code.  ``scal_models`` are models made from scal/forget_1, 2, ...,
    ``sust_models`` those after request 1, 2, ...  Source: Shi et al. 2024, arXiv 2407.06460.  Cost: 100 generations
    of 128 tokens, 200 of 32 and 200 texts of about 2,000 tokens on the published data, and per further model the 200
    questions, or the 100 retained ones and ``fold_texts`` of each earlier fold.

    Values of a model that was never trained on the texts are above 0 (they are the aim), and no value here shows that
    a fine-tuned or quantised copy does not say the texts again.
    """
    not_negative(shots=shots, limit=limit, fold_texts=fold_texts)
    if not 0.0 < k <= 1.0:
        raise UsageError(f"k is {k}: give the share of tokens, above 0 and at most 1.")
    stem = compat == "open-unlearning"
    verbatim = _verbatim(data, limit)
    questions = {name: _questions(data, side, shots, limit) for name, side in SIDES.items()}
    texts = {name: rows(data, f"privleak/{name}", ("text",))[: limit or None] for name in ("forget", "holdout")}
    _differ(data)

    def asked(which: LoadedModel, name: str, prefix: str = "") -> ItemScores:
        prompts, group = questions[name]
        build = partial(_knowledge, which, prompts, group, answer_tokens, stem, progress)
        return _items(name, group, numbers(part(prefix + name, build)))

    found = part("verbmem", partial(_continued, model, verbatim, verbatim_tokens, stem, progress))
    scored = {"verbmem": _items("verbmem", verbatim, numbers(found)),
              **{name: asked(model, name) for name in questions}}  # fmt: skip
    out = []
    for name, items in scored.items():
        out.append(spoken(name, items, better="higher" if name == "utility" else "reference", seed=seed))
        out.append(_difference(name, items, reference, seed))
    member = part("privleak", lambda: {name: _membership(model, group, k) for name, group in texts.items()})
    out += _leak(texts, member, reference, published_reference, k, seed)
    if scal_models:
        out += scalability(data, model, scal_models, asked, seed)
    if sust_models:
        out += sustainability(data, model, sust_models, asked, part, fold_texts, fold_characters, seed)
    counts = {name: float(len(items.ids)) for name, items in scored.items()}
    counts |= {f"{name}_not_scored": float((~items.valid).sum()) for name, items in scored.items()}
    said = f"ROUGE-L F1 {'with' if stem else 'without'} stemming, {shots} worked examples, Min-{k:.0%}"
    return BenchResult.of("muse", out, counts, (said,))


def work(
    data: Source, *, shots: int = 10, verbatim_tokens: int = 128, answer_tokens: int = 32,
    scal_models: tuple[str, ...] = (), sust_models: tuple[str, ...] = (), fold_texts: int = 50,
    fold_characters: int = 1000, limit: int = 0, **_: Any,
) -> Work:  # fmt: skip
    """What :func:`muse` will cost; tokens are estimated from the characters."""
    verbatim = _verbatim(data, limit)
    asked = [prompt for side in SIDES.values() for prompt in _questions(data, side, shots, limit)[0]]
    texts = [row["text"] for name in ("forget", "holdout")
             for row in rows(data, f"privleak/{name}", ("text",))[: limit or None]]  # fmt: skip
    rounds, folds = 1 + len(scal_models) + len(sust_models), len(sust_models)
    fold_rows = fold_texts * folds * (folds + 1) // 2
    characters = sum(len(row["prompt"]) for row in verbatim) + rounds * sum(map(len, asked)) + sum(map(len, texts))
    generations = len(verbatim) + rounds * len(asked)
    return Work(len(texts) + fold_rows, estimated_tokens(characters + fold_rows * fold_characters), generations,
                len(verbatim) * verbatim_tokens + rounds * len(asked) * answer_tokens)  # fmt: skip


def _verbatim(data: Source, limit: int) -> list[Row]:
    return rows(data, "verbmem/forget", ("prompt", "gt"))[: limit or None]


def _questions(data: Source, side: str, shots: int, limit: int) -> tuple[list[str], list[Row]]:
    """Few-shot prompts and rows of one side; earlier revisions of the published sets call retain retain2."""
    earlier = not has(data, f"knowmem/{side}_qa") and has(data, f"knowmem/{side}2_qa")
    name = f"{side}2" if earlier else side
    columns = ("question", "answer")
    found = rows(data, f"knowmem/{name}_qa", columns)[: limit or None]
    examples = rows(data, f"knowmem/{name}_qa_icl", columns)[:shots] if shots else []
    head = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
    for number, row in enumerate(found, 1):
        for column in columns:
            text(row, column, f"'knowmem/{name}_qa' of '{data.where}', row {number}")
    return [f"{head}Question: {row['question']}\nAnswer: " for row in found], found


def _differ(data: Source) -> None:
    """One file named like a config serves every split of it: refuse the same rows as both sides."""
    for one, other in (("privleak/forget", "privleak/holdout"), ("knowmem/forget_qa", "knowmem/retain_qa")):
        if one in data.seen and data.seen[one] == data.seen.get(other):
            raise KnowledgeError(f"'{data.where}' has the same rows for {one} and {other}: give a file for each.")


def _items(name: str, group: Sequence[Row], values: m.Array) -> ItemScores:
    ids = [str(row.get("id") or f"{name}-{number:04d}") for number, row in enumerate(group)]
    clusters = [str(row.get("cluster") or name) for row, name in zip(group, ids, strict=True)]
    return ItemScores.of(ids, clusters, values.tolist())


def _continued(
    model: LoadedModel, group: Sequence[Row], tokens: int, stem: bool, progress: Progress | None
) -> list[float | None]:
    """ROUGE-L F1 of each continuation with the true one, both of ``tokens`` tokens; None: it does not fit."""
    tokenizer: Any = model.tokenizer
    truth = [tokenizer.decode(tokenizer(row["gt"])["input_ids"][:tokens], skip_special_tokens=True) for row in group]
    said = _said(model, [row["prompt"] for row in group], tokens, (), progress, [row["gt"] for row in group])
    return [None if s is None else rouge_l(t, s, stem=stem).f1 for t, s in zip(truth, said, strict=True)]


def _knowledge(
    model: LoadedModel, prompts: Sequence[str], group: Sequence[Row], tokens: int, stem: bool, progress: Progress | None
) -> list[float | None]:
    said = _said(model, prompts, tokens, STOPS, progress)
    return [None if s is None else rouge_l(row["answer"], s, stem=stem).f1 for row, s in zip(group, said, strict=True)]


def _said(
    model: LoadedModel, prompts: Sequence[str], tokens: int, stop: Sequence[str], progress: Progress | None,
    answers: Sequence[str] | None = None,
) -> list[str | None]:  # fmt: skip
    out: list[str | None] = []
    for start in track(progress, range(0, len(prompts), 64), "generating"):
        known = answers and answers[start : start + 64]
        out += say(model, prompts[start : start + 64], new_tokens=tokens, stop=stop, whole=True, answers=known)
    return out


def _membership(model: LoadedModel, group: Sequence[Row], k: float) -> dict[str, Any]:
    """Min-k score of each text, and how many are too short for k of their tokens to be one."""
    scored = token_scores(model, [whole_text(model.tokenizer, row["text"]) for row in group])
    values = np.where(scored.valid, metrics.min_k(scored.logprobs, k), np.nan)
    return {"scores": plain(values), "short": int((scored.valid & (np.floor(k * scored.n_tokens) < 1)).sum())}


def _difference(name: str, items: ItemScores, reference: Reference | None, seed: int) -> Metric:
    """The item-wise difference to the model that never knew: what these values mean anything against."""
    if reference is None:
        why = "no reference was given: a model that never saw the texts"
        return not_computed(f"{name}_difference", why, better="reference")
    return against(name, items, reference, seed=seed)


def _leak(
    texts: dict[str, list[Row]], member: dict[str, Any], reference: Reference | None, published: str, k: float,
    seed: int,
) -> list[Metric]:  # fmt: skip
    """The two AUCs and their ratio; without a reference the ratio is not computed."""
    values = {name: numbers(member[name]["scores"]) for name in texts}
    names = [f"{side}-{number:04d}" for side, group in texts.items() for number in range(len(group))]
    sides = np.array([name.startswith("holdout") for name in names], dtype=np.float64)
    items = ItemScores.of(names, names, np.concatenate([values[side] for side in texts]).tolist())
    short = sum(member[name]["short"] for name in texts)
    note = f"Min-{k:.0%}" + (f"; {short} texts are so short that a single token stands for it" if short else "")
    theirs = reference.result.metrics.get("privleak_auc") if reference else None
    own = _ratio("privleak_auc", items, sides, None, note, seed)
    if theirs is not None and theirs.items is not None and theirs.items.ids == items.ids:
        if np.isnan(theirs.value) or theirs.value == 0:
            return [own, not_computed("privleak", f"the reference's AUC is {theirs.value}", better="reference")]
        said = f"AUC {own.value:.4f}, reference {theirs.value:.4f}, at most {m.privleak(1.0, theirs.value):+.1f}"
        return [own, _ratio("privleak", items, sides, theirs.items, said, seed)]
    if published != "none":
        constant = m.PUBLISHED_AUC[published]
        said = f"AUC {own.value:.4f}, published reference {constant}, at most {m.privleak(1.0, constant):+.1f}"
        value, low, high = (m.privleak(limit, constant) for limit in (own.value, own.low, own.high))
        note = f"{said}; {own.note}"
        return [own, replace(own, name="privleak", value=value, low=low, high=high, items=None, note=note)]
    why = "no reference was given: a model that never saw the texts, or --set published_reference=news"
    if reference is not None:
        why = "the reference's row has no scores of these texts"
    return [own, not_computed("privleak", why, better="reference")]


def _ratio(name: str, items: ItemScores, sides: m.Array, theirs: ItemScores | None, note: str, seed: int) -> Metric:
    """AUC, or with ``theirs`` privleak, with limits from texts resampled within each side."""
    from repforget.verify.statistics import bootstrap

    use = items.valid if theirs is None else items.valid & theirs.valid
    side = sides[use]
    if len(set(side)) < 2:
        return not_computed(name, "no text of one side fits the model's context", better="reference")
    columns = np.stack([side, items.values[use], *([theirs.values[use]] if theirs is not None else [])], axis=1)

    def value(table: m.Array) -> float:
        held = table[:, 0] == 1.0
        aucs = [m.forget_auc(table[held, column], table[~held, column]) for column in range(1, table.shape[1])]
        return aucs[0] if len(aucs) == 1 else m.privleak(aucs[0], aucs[1])

    clusters = [name for name, ok in zip(items.ids, use, strict=True) if ok]
    found = bootstrap(value, columns, clusters, strata=side.astype(str).tolist(), alpha=LEVEL, seed=seed)
    lost = f"{int((~use).sum())} texts do not fit the context and are left out" if not use.all() else ""
    return Metric(name, found.point, found.low, found.high, found.n_items, found.n_clusters, "reference", items,
                  "; ".join(filter(None, (note, lost))), token_based=True)  # fmt: skip
