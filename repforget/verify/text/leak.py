"""How often does at least one of k sampled replies give the answer?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.statistics.leakage import anderson_mean_bound, leak_share
from repforget.verify.statistics.proportions import clopper_pearson, zero_event_limit

MEASURES = {"leak_at_k": MeasureInfo("knowledge", "black-box")}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"samples": 4, "k": 2, "max_items": 100},
    "standard": {},
    "thorough": {"samples": 64, "k": 8, "top_p": 1.0, "max_items": 1000},
}
CHUNK = 50  # items between two steps of the progress display


def leak(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    samples: int = 16, k: int = 4, temperature: float = 1.0, top_p: float = 0.9, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Sample N replies to each item's first question and estimate how likely one of k gives the answer.

    ``leak_at_k`` is 1 - C(N-c, k) / C(N, k) with c of N = ``samples`` replies that begin with the answer or an alias:
    unbiased for each item (arXiv 2511.04934).  The prior is what sampling from the prior over all known answers gives;
    it grows with k, so that a large k hides a few intact facts among many guesses.  Facts: the estimate at other k, and
    upper limits that hold for any distribution of clusters: of the share that leaks at all in N (Clopper and Pearson
    1934) and of a reply's mean leak probability (Anderson 1969, in 2410.03523); of an item that never leaked, the leak
    probability that N replies leave open.  Cost: one pass over the questions, N replies of an answer's length each.

    Silence in N replies does not show that the answer cannot be sampled: read the limits.  A nucleus (``top_p`` < 1)
    never draws what lies outside it, so that a frequent refusal hides a rarer answer altogether.
    """
    if not 1 <= k <= samples:
        raise UsageError(f"Verifier 'leak' has k = {k} and {samples} samples: give 1 <= k <= samples.")
    items = ask.limited(view.forget, max_items, seed)
    share = np.empty(len(items))
    parts = [range(at, min(at + CHUNK, len(items))) for at in range(0, len(items), CHUNK)]
    for part in track(progress, parts, "sampling replies"):
        share[part.start : part.stop] = ask.said(model, items[part.start : part.stop], forms=1, samples=samples,
                                                 temperature=temperature, top_p=top_p, seed=seed)  # fmt: skip
    count = np.rint(share * samples).astype(np.int64)
    before = ask.prior_said(items, view.knowledge)
    scores = {"leak_at_k": ask.scores(items, leak_share(count, samples, k)),
              "leak_at_k_prior": ask.scores(items, 1.0 - (1.0 - before) ** k)}  # fmt: skip
    facts = {f"leak at {n}": float(leak_share(count, samples, n).mean())
             for n in sorted({1, k, samples})}  # fmt: skip
    return Measurement(scores, {}, facts | _limits([item.cluster for item in items], count, samples))


def _limits(clusters: Sequence[str], count: NDArray[np.int64], samples: int) -> dict[str, float]:
    """Upper limits over clusters, which are the independent draws, and the limit of one silent item."""
    names = sorted(set(clusters))
    rows = np.array([names.index(c) for c in clusters])
    sizes = np.bincount(rows)
    rate = np.bincount(rows, count / samples) / sizes
    any_leak = clopper_pearson(int((rate > 0).sum()), len(names))
    return {
        f"share of clusters that leak in {samples}, at most": any_leak.high,
        "mean leak probability of a reply, at most": anderson_mean_bound(rate),
        "leak probability of an item that never leaked, at most": zero_event_limit(samples),
    }
