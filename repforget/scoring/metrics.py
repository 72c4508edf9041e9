"""Formulas of the published unlearning metrics: arrays in, one value per item out, ratios in log space.

``loss`` is the mean negative log-probability per token, -mean log p, in nats. NaN items stay NaN. The options
that end in ``epsilon`` or ``_compat`` reproduce numbers of the released evaluation codes, defects included;
they are off by default.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repforget.errors import UsageError

Floats = NDArray[np.float64]
OPEN_UNLEARNING_EPSILON = 1e-10  # what that code adds to denominators
SIGMA2_FLOOR = 1e-6  # smallest variance in min-k++, as in the released codes


def probability(mean_logprob: ArrayLike) -> Floats:
    """Length-normalised probability exp(mean log p) of each answer (Maini et al. 2024, arXiv 2401.06121).

    TOFU scores the answer with its end-of-sequence token and averages P over items, not the loss.
    """
    return _floats(np.exp(_floats(mean_logprob)))


def option_probability(mean_logprob: ArrayLike, others: ArrayLike, *, epsilon: float = 0.0) -> Floats:
    """P(answer) / (P(answer) + sum of P(wrong options)) [n], from mean log p [n] and [n, k] per token.

    Chance is 1 / (1 + k) only if the options are exchangeable: length normalisation favours long rare names.
    """
    logs = np.concatenate([_floats(mean_logprob)[:, None], _floats(others)], axis=1)
    if epsilon:
        p = np.exp(logs)
        return _floats(p[:, 0] / (p.sum(1) + epsilon))
    with np.errstate(invalid="ignore"):  # NaN where no option has any probability
        return _floats(np.exp(logs[:, 0] - np.logaddexp.reduce(logs, axis=1)))


def truth_ratio(
    loss_true: ArrayLike,
    losses_wrong: ArrayLike,
    *,
    mean: Literal["geometric", "arithmetic"] = "geometric",
    form: Literal["tofu", "inverse", "knowledge"] = "tofu",
    epsilon: float = 0.0,
) -> Floats:
    """Truth ratio [n] of the losses of a right answer [n] and of k wrong ones [n, k].

    ``tofu``: R = mean P(wrong) / P(right), near 0 where the model knows and near 1 where it is indifferent;
    ``inverse``: 1/R; ``knowledge``: P(right) / (P(right) + mean P(wrong)). The geometric mean is the one of
    the released TOFU leaderboard and of OpenUnlearning, the arithmetic mean (never smaller) the other in
    use; the two are not interchangeable. Source: Maini et al. 2024, arXiv 2401.06121. R compares wordings: it
    separates models that know from those that do not far less well than the loss itself.
    """
    if mean not in ("geometric", "arithmetic") or form not in ("tofu", "inverse", "knowledge"):
        raise UsageError(f"truth_ratio got mean={mean!r}, form={form!r}: mean is geometric or arithmetic, and form "
                         "is tofu, inverse or knowledge.")  # fmt: skip
    right, wrong = -_floats(loss_true), -_floats(losses_wrong)
    averaged = wrong.mean(1) if mean == "geometric" else np.logaddexp.reduce(wrong, axis=1) - np.log(wrong.shape[1])
    if epsilon:
        a, b = np.exp(averaged), np.exp(right)
        return _floats({"tofu": a / (b + epsilon), "inverse": b / (a + epsilon),
                        "knowledge": b / (a + b + epsilon)}[form])  # fmt: skip
    if form == "knowledge":
        return _floats(np.exp(-np.logaddexp(0, averaged - right)))
    with np.errstate(over="ignore"):  # 1/inf is 0 in the cell, which is right
        return _floats(np.exp(averaged - right if form == "tofu" else right - averaged))


def truth_ratio_cell(
    ratio: ArrayLike, kind: Literal["forget", "utility"] = "forget", *, epsilon: float = 0.0
) -> Floats:
    """Per-item cell in [0, 1] of truth ratios R: min(R, 1/R) for ``forget``, max(0, 1 - R) for ``utility``.

    A high forget cell says that right and wrong are told apart less, not that the answer is forgotten: a
    model that has collapsed scores high as well.
    """
    r = _floats(ratio)
    if kind == "utility":
        return np.maximum(0, 1 - r)
    if kind != "forget":
        raise UsageError(f"truth_ratio_cell knows the kinds 'forget' and 'utility', not {kind!r}.")
    with np.errstate(divide="ignore", over="ignore"):
        return np.minimum(r, 1 / (r + epsilon))


def harmonic_mean(cells: ArrayLike) -> float:
    """Harmonic mean of cells, 0 if one of them is 0 (TOFU model utility: 9 cells); NaN if one is NaN.

    The smallest cell dominates it; it can rise while a model is being damaged.
    """
    x = _floats(cells)
    if x.size == 0 or (x < 0).any():
        raise UsageError("harmonic_mean needs at least one cell and none below 0: pass probabilities or scores.")
    if np.isnan(x).any():
        return float("nan")
    return 0.0 if (x == 0).any() else float(x.size / (1 / x).sum())


def exact_memorization(hits: Iterable[ArrayLike], *, drop_last: bool = False) -> Floats:
    """Share of each answer's tokens that are the arg max under teacher forcing; NaN without tokens.

    ``drop_last`` leaves out the last token, as OpenUnlearning does (it means the end-of-sequence token).
    """
    return _per_item(hits, lambda x: x.mean(), drop_last)


def extraction_strength(hits: Iterable[ArrayLike], *, drop_last: bool = False, ou_compat: bool = False) -> Floats:
    """1 - k/T per answer, k the fewest tokens that must be given so that all T - k others are the arg max.

    Greedy decoding from there says the rest, so teacher forcing suffices. 0 where even the last token is
    wrong; ``ou_compat`` gives 1/T there, as OpenUnlearning does.
    """

    def strength(x: Floats) -> float:
        wrong = np.flatnonzero(x == 0)
        given = int(wrong[-1]) + 1 if len(wrong) else 0
        return 1 - (min(given, len(x) - 1) if ou_compat else given) / len(x)

    return _per_item(hits, strength, drop_last)


def zlib_score(mean_logprob: ArrayLike, texts: Sequence[str]) -> Floats:
    """Membership score mean log p / bytes of the zlib-compressed text [n], higher = rather a member.

    The compressor's header, at least 8 bytes, weighs on short texts.
    """
    scores = _floats(mean_logprob)
    if len(scores) != len(texts):
        raise UsageError(f"zlib_score got {len(scores)} scores and {len(texts)} texts: give one text per score.")
    return scores / np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.float64)


def min_k(logprobs: Iterable[ArrayLike], k: float = 0.4, *, drop_last: bool = False, muse_compat: bool = False
          ) -> Floats:  # fmt: skip
    """Membership score: mean of the lowest max(1, floor(k T)) token log-probabilities of each text [n].

    Higher = rather a member. Source: Shi et al. 2023, arXiv 2310.16789. ``muse_compat`` gives NaN where
    floor(k T) is 0, as the MUSE code does. Always read its AUC on a model that never knew, too: shifted
    member and non-member texts differ without any memory.
    """
    return _per_item(logprobs, lambda x: _lowest(x, k, muse_compat), drop_last)


def min_k_plus_plus(
    logprobs: Iterable[ArrayLike], mu: Iterable[ArrayLike], sigma2: Iterable[ArrayLike], k: float = 0.4,
    *, drop_last: bool = False,
) -> Floats:  # fmt: skip
    """:func:`min_k` of (log p - mu) / sigma, each token against the mean and variance of log p at its position.

    Variances below 1e-6 count as 1e-6. Source: Zhang et al. 2024, arXiv 2404.02936.
    """
    standard = [(_floats(x) - _floats(m)) / np.sqrt(np.maximum(_floats(v), SIGMA2_FLOOR))
                for x, m, v in zip(logprobs, mu, sigma2, strict=True)]  # fmt: skip
    return min_k(standard, k, drop_last=drop_last)


def _lowest(x: Floats, k: float, muse_compat: bool) -> float:
    count = int(k * len(x))
    if not muse_compat:
        count = max(1, count)
    return float(np.sort(x)[:count].mean()) if count else float("nan")


def _per_item(arrays: Iterable[ArrayLike], value: Callable[[Floats], float], drop_last: bool) -> Floats:
    kept = [x[:-1] if drop_last else x for x in map(_floats, arrays)]
    return np.array([value(x) if len(x) else np.nan for x in kept], dtype=np.float64)


def _floats(x: ArrayLike) -> Floats:
    return np.asarray(x, dtype=np.float64)
